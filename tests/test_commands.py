"""The commands do what the Python API does, and refuse in one sentence before any work."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from mlxsteer import (
    InterpretableModel,
    SteeringVector,
    Sweep,
    bake,
    datasets,
    evaluate,
    extract,
    recommended,
    select,
    sweep,
)
from mlxsteer import interventions as iv
from mlxsteer.cli import main

PROMPT = "The food at the little place was"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """A command's exit code and what it printed, out and aside; side effects are measured on three prompts."""
    neutral = datasets.neutral
    monkeypatch.setattr(datasets, "neutral", lambda model=None: neutral(model)[:3])

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mlxsteer", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        return int(ended.value.code or 0), told.out, told.err

    return command


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a few sentiment pairs in every split."""
    data = datasets.load("pocket/sentiment")
    path = tmp_path_factory.mktemp("few") / "few.jsonl"
    datasets.write(
        [pair for name, n in (("train", 12), ("choose", 6), ("report", 6)) for pair in data.split(name)[:n]], path
    )
    return path


@pytest.fixture(scope="module")
def saved(few: Path, pocket: InterpretableModel) -> Path:
    """A vector's file."""
    return extract(pocket, datasets.read(few), progress=None).save(few.with_name("mood.safetensors"))


def test_extract_saves_what_python_extracts(run: Run, few: Path, pocket: InterpretableModel, tmp_path: Path) -> None:
    out = tmp_path / "é v.safetensors"
    code, told, _ = run("extract", "--pairs", few, "--out", out, "--layers", "2:4,6", "--read", "-1",
                        "--method", "pca_centre", "--json")  # fmt: skip
    assert code == 0
    vector = extract(pocket, datasets.read(few), layers=[2, 3, 6], read=-1, method="pca_centre", progress=None)
    found = SteeringVector.load(out)
    assert found.layers == [2, 3, 6]
    assert all(mx.array_equal(found[layer], vector[layer]) for layer in found.layers)
    rows = json.loads(told)["layers"]
    assert [row["layer"] for row in rows] == [2, 3, 6]
    assert rows[0]["length"] == pytest.approx(vector.norms[2])
    assert rows[0]["residual_norm"] == pytest.approx(vector.residual_norms[2])
    first, *_, last = run("extract", "--pairs", few, "--out", out, "--layers", "3")[1].splitlines()
    assert (first, last) == ("pairs: few, 12 of train", f"Saved: {out}")
    assert json.loads(told)["set"] == {"name": "few", "train": 12}
    one = datasets.write(datasets.read(few).split("train")[:1], tmp_path / "one.jsonl")
    assert "note: one pair" in run("extract", "--pairs", one, "--out", out, "--layers", "3")[2]


def test_sweep_prints_and_writes_what_python_sweeps(
    run: Run, few: Path, saved: Path, pocket: InterpretableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, plot = tmp_path / "sweep.json", tmp_path / "sweep.png"
    asked = ("sweep", "--vector", saved, "--pairs", few, "--layers", "3,5", "--strengths", "-1,0,2", "--limit", "4")
    code, told, _ = run(*asked, "--out", out, "--plot", plot, "--json")
    assert code == 0
    pairs = datasets.read(few).split("choose")[:4]
    found = sweep(pocket, SteeringVector.load(saved), pairs, layers=[3, 5], strengths=[-1, 0, 2], progress=None)
    for text in (told, out.read_text(encoding="utf-8")):
        np.testing.assert_allclose(json.loads(text)["effect"], found.effect, atol=1e-4)
    assert plot.read_bytes().startswith(b"\x89PNG")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    code, told, _ = run(*asked, "--unit", "raw", "--out", out)
    assert code == 0
    assert told.startswith("pairs: few, 4 of choose\n")
    assert "strength" in told
    assert told.splitlines()[-1] == f"Saved: {out}"
    monkeypatch.setattr(Sweep, "plot", full)
    code, told, aside = run(*asked, "--plot", plot)
    assert code == 1
    assert "strength" in told  # what was found isn't lost
    assert aside == f"error: can't write {plot}: No space left on device.\n"
    monkeypatch.setattr(SteeringVector, "save", full)
    code, _, aside = run("export", "--steer", saved, "--to", tmp_path / "x.gguf")
    assert aside == f"error: can't write {tmp_path / 'x.gguf'}: No space left on device.\n"


@pytest.mark.full  # test_tour and test_selection choose on the bundled model too
def test_select_saves_a_steering_that_generate_and_evaluate_take(
    run: Run, few: Path, saved: Path, pocket: InterpretableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    neutral = datasets.neutral(pocket)[:2]  # the commands and Python alike: what is tested is that they agree
    monkeypatch.setattr(datasets, "neutral", lambda _: neutral)
    few, given = tmp_path / "fewer.jsonl", datasets.read(few)
    datasets.write([pair for split in given.splits for pair in given.split(split)[:3]], few)
    out = tmp_path / "steer.safetensors"
    code, told, _ = run("select", "--pairs", few, "--vector", saved, "--out", out, "--layers", "4", "--nulls", "0",
                        "--budget", "0.2", "--json")  # fmt: skip
    assert code == 0
    choice = select(pocket, datasets.read(few), vector=SteeringVector.load(saved), layers=[4], nulls=0,
                    budget={"kl_mean": 0.2}, progress=None)  # fmt: skip
    assert {int(n): s for n, s in json.loads(told)["strengths"].items()} == pytest.approx(choice.strengths)
    assert json.loads(told)["record"]["set"] == {"name": "fewer", "choose": 3, "report": 3}
    steer = iv.load(out)
    texts = json.loads(run("generate", PROMPT, "--steer", out, "--compare", "--max-tokens", "12", "--json")[1])
    assert texts["steered"] == str(pocket.generate(PROMPT, steer, max_tokens=12))
    assert texts["plain"] == str(pocket.generate(PROMPT, max_tokens=12)) != texts["steered"]
    code, told, _ = run("evaluate", "--steer", out, "--pairs", few, "--nulls", "0", "--json")
    found = evaluate(pocket, steer, datasets.read(few), nulls=0, progress=None)
    assert json.loads(told)["shift"]["value"] == pytest.approx(found.shift.value, abs=1e-4)
    told = json.loads(run("evaluate", "--steer", out, "--pairs", few, "--nulls", "2", "--strength", "2", "--json")[1])
    assert len(told["nulls"]) == 2
    assert told["record"]["set"] == {"name": "fewer", "report": 3}
    twice = {key: one | one for key, one in steer.items()}
    doubled = evaluate(pocket, twice, datasets.read(few), nulls=0, progress=None)
    assert told["shift"]["value"] == pytest.approx(doubled.shift.value, abs=1e-3)


def test_layers_go_by_either_name(run: Run, few: Path, saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "four.safetensors"
    assert run("extract", "--pairs", few, "--layer", "4", "--out", out, "--json")[0] == 0
    assert SteeringVector.load(out).layers == [4]
    one, other = (
        run("generate", PROMPT, "--steer", saved, option, "4", "--max-tokens", "2", "--json")
        for option in ("--layer", "--layers")
    )
    assert one[0] == 0
    assert one[1] == other[1]


def test_generate_takes_vectors_sets_and_several(
    run: Run, saved: Path, pocket: InterpretableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["mlxsteer.cli.generate"], "ENOUGH", 8)

    def text(*arguments: Any) -> str:
        code, told, _ = run("generate", PROMPT, "--max-tokens", "8", "--json", *arguments)
        assert code == 0
        return str(json.loads(told)["steered"])

    vector = SteeringVector.load(saved)
    for unit in ("raw", "residual"):
        given = text("--steer", saved, "--layer", "3,4", "--strength", "-1", "--at", "-1", "--unit", unit)
        steer = vector.at([3, 4], -1.0, at=-1, unit=unit)
        assert given == str(pocket.generate(PROMPT, steer, max_tokens=8))
    measured = recommended(pocket, "pocket/sentiment")
    bundled = datasets.load("pocket/sentiment").split("train")[:8]
    steer = measured.interventions(extract(pocket, bundled, progress=None))
    assert text("--steer", "sentiment") == str(pocket.generate(PROMPT, steer, max_tokens=8))
    twice = vector.at(4, 0.5, at=-1)
    both = {key: one | one for key, one in twice.items()}
    given = text("--steer", saved, "--steer", saved, "--layer", "4", "--strength", "0.5", "--at", "-1")
    assert given == str(pocket.generate(PROMPT, both, max_tokens=8))
    plain = json.loads(run("generate", PROMPT, "--steer", saved, "--strength", "0", "--max-tokens", "8", "--json")[1])
    assert plain["plain"] == str(pocket.generate(PROMPT, max_tokens=8))


def test_datasets_are_listed_shown_and_checked(run: Run, few: Path) -> None:
    code, told, _ = run("datasets", "--json")
    assert code == 0
    assert [one["name"] for one in json.loads(told)] == datasets.available()
    shown = json.loads(run("datasets", few, "--show", "2", "--check", "--json")[1])
    assert (shown["pairs"], len(shown["shown"])) == (24, 2)
    assert shown["splits"] == {"train": 12, "choose": 6, "report": 6}
    assert len(shown["findings"]) == len(datasets.read(few).check().findings)
    assert "sentiment" in run("datasets")[1]
    assert "positive:" in run("datasets", "sentiment", "--show", "1")[1]
    assert "mlxsteer datasets pocket/formality" in run("datasets", "formality")[1]
    assert "two-option" not in run("datasets", few, "--check")[2]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("extract --pairs sentimnt --out x.safetensors", "Nearest: sentiment"),
        ("extract --pairs FEW --out x.bin", "name a .safetensors file"),
        ("extract --pairs FEW --out no/x.safetensors", "in a folder that exists"),
        ("extract --pairs FEW --out x.safetensors --layers 3-5", "like 4 or 3,5 or 2:6"),
        ("extract --pairs FEW --out x.safetensors --layers 30", "there is no layer 30"),
        ("extract --pairs FEW --out x.safetensors --method pca", "--method pca: there is none"),
        ("extract --pairs FEW --out x.safetensors --read frist", "Nearest: first"),
        ("sweep --vector nowhere --pairs FEW", "there is no file nowhere"),
        ("sweep --vector sentiment --pairs FEW", "mlxsteer extract --pairs sentiment"),
        ("sweep --vector SAVED --pairs FEW --strengths a,b", "--strengths a,b: numbers"),
        ("sweep --vector SAVED --pairs FEW --strengths=", "--strengths '': numbers"),
        ("sweep --vector SAVED --pairs FEW --unit norm", "there are raw and residual"),
        ("sweep --vector SAVED --pairs FEW --plot x.bmp", "name a .png, .pdf, .svg file"),
        ("sweep --vector SAVED --pairs FEW --split chose", "--split chose: one of train, choose, report. Near"),
        ("sweep --vector SAVED --pairs FEW --at middle", "a position is a name"),
        ("select --pairs FEW --out x.txt", "--out x.txt: name a .safetensors file"),
        ("evaluate --steer sentiment --pairs FEW", "a contrast set; extract a vector"),
        ("evaluate --steer SAVED --layer 30 --pairs FEW", "30"),
        ("generate hi --strength 2", "name it by --steer"),
        ("generate hi --steer SAVED --layer all", "name the layers"),
        ("generate hi --model ./nowhere", "there is no folder ./nowhere"),
        ("datasets nope", "mlxsteer datasets lists"),
        ("datasets .", ". is a folder, not a file of contrast pairs"),
        ("generate hi --model=", "this name is empty"),
        ("export --steer sentiment --to no/x.gguf", "--to no/x.gguf: there is no folder no"),
        ("datasets --check", "name a set or a file"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_sentence_and_exit_code_1(
    command: str, message: str, run: Run, few: Path, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = command.replace("FEW", str(few)).replace("SAVED", str(saved)).split()
    code, told, aside = run(*words)
    assert (code, told) == (1, "")
    assert aside.startswith("error: ")
    assert message in aside
    assert aside.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_inspect_says_what_a_model_has(run: Run) -> None:
    code, told, _ = run("inspect", "--model", "pocket", "--check")
    assert code == 0
    assert "layers.*.self_attn.q_proj" in told
    assert "4-bit" in told
    facts = json.loads(run("inspect", "--model", "pocket", "--json")[1])
    assert (facts["layers"], facts["architecture"], facts["chat_template"]) == (8, "llama", True)
    for words, message in ((("inspect",), "name one thing"), (("inspect", "x", "--check"), "--check is of a model")):
        code, _, aside = run(*words)
        assert code == 1
        assert message in aside


def test_a_strength_in_residual_norms_is_baked_and_exported_as_python_does(
    run: Run, saved: Path, pocket: InterpretableModel, tmp_path: Path
) -> None:
    said = ("--steer", saved, "--layer", "5", "--strength", "0.1", "--unit", "residual")
    code, _, aside = run("export", *said, "--to", tmp_path / "mood.gguf")
    assert (code, aside) == (0, "")
    exact = SteeringVector.load(saved)
    wanted = 0.1 * exact.residual_norms[5] * exact[5] / mx.linalg.norm(exact[5])
    assert mx.allclose(SteeringVector.load(tmp_path / "mood.gguf")[5], wanted, atol=1e-5)
    adapter = {"layers.5.attn": iv.ablate(exact[5]), "layers.5.mlp": iv.ablate(exact[5])}
    iv.save(adapter, tmp_path / "without.safetensors")
    assert run("export", "--steer", tmp_path / "without.safetensors", "--to", tmp_path / "adapter")[0] == 0
    use = run("inspect", tmp_path / "adapter")[1]
    given = re.search(r"mlx_lm\.load\('(.*)', adapter_path='(.*)'\)", use)
    assert given is not None
    model, _ = mlx_lm.load(given[1], adapter_path=given[2])[:2]
    tokens = mx.array([pocket.encode(PROMPT)])
    with pocket.steer(adapter):
        assert mx.allclose(model(tokens), pocket.model(tokens), atol=1e-4)
    short = {"layers.5.mlp": iv.ablate(exact[5][:10])}
    with pytest.raises(ValueError, match="has width 10, the activation has 256"):
        bake(pocket, short, tmp_path / "folder", dry_run=True)


def test_what_cannot_be_baked_is_told_in_the_words_of_a_shell(
    run: Run, saved: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steer = iv.save({"layers.4": iv.add_vector([1.0] * 256, at="last")}, tmp_path / "steer.safetensors")
    for command, to in (("bake", "b"), ("export", "a"), ("export", "x.gguf")):
        code, _, aside = run(command, "--steer", steer, "--to", tmp_path / to)
        assert code == 1
        assert "--at last" in aside
        assert "mlxsteer select --at all makes one that can" in aside
        assert "at=" not in aside
    aside = run("bake", "--steer", steer, "--to", tmp_path / "b", "--at", "all")[2]
    assert "mlxsteer select --at all makes some that act there" in aside
    assert "mlxsteer datasets lists the" in run("demo", "--behaviour", "xyz")[2]
    assert f"lists the {len(datasets.available())} there are" in run("datasets", "xyz")[2]
    (tmp_path / "wrong.jsonl").write_text('{"question": "a", "good": "b", "bad": "c"}\n')
    assert "A pair has prompt, positive, negative." in run("datasets", tmp_path / "wrong.jsonl")[2]
    assert "--steer and --vector take it" in run("extract", "--pairs", saved, "--out", tmp_path / "v.safetensors")[2]
    assert "--read 500" in run("extract", "--pairs", few, "--out", tmp_path / "v.safetensors", "--read", "500")[2]
    for errors in ("strict", "surrogateescape"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), "utf-8", errors))
        assert run("generate", "-")[2].startswith("error: the prompt is no UTF-8 text")


def test_an_option_that_nothing_would_hear_is_refused(run: Run, saved: Path, few: Path, tmp_path: Path) -> None:
    steer = iv.save({"layers.4": iv.scale(1.1)}, tmp_path / "steer.safetensors")
    commands: dict[str, tuple[Any, ...]] = {
        "generate": (PROMPT,), "evaluate": ("--pairs", few), "bake": ("--to", tmp_path / "b"),
        "export": ("--to", tmp_path / "a"), "chat": (),
    }  # fmt: skip
    for name, more in commands.items():
        given = "--interventions" if name in ("bake", "export", "chat") else "--steer"
        for option, value in (("--layer", "3"), ("--at", "last"), ("--unit", "residual")):
            code, _, aside = run(name, *more, given, steer, option, value)
            assert code == 1
            assert f"{option} {value} says how a vector acts" in aside
        code, _, aside = run(name, *more, "--steer", saved, "--layer", "30")
        assert code == 1
        assert "--layer 30" in aside


def test_a_strength_that_drowns_the_text_is_baked_with_a_warning(run: Run, saved: Path, tmp_path: Path) -> None:
    asked = ("bake", "--steer", saved, "--layer", "5", "--to", tmp_path / "b", "--strength")
    assert "drowns the text" in run(*asked, "1e6")[2]
    assert "drowns" not in run(*asked, "1", "--overwrite")[2]
    told = json.loads(
        run("inspect", iv.save({"layers.4": iv.add_vector([1.0] * 256, 1.25)}, tmp_path / "s.safetensors"), "--json")[1]
    )
    assert told["interventions"][0]["strength"] == 1.25
