"""Steerings that leave the house: control vectors with llama.cpp's meaning, the Hub, and the command line."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import hub_server
import huggingface_hub
import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import make_prompt_cache

import mlxsteer as ms
from mlxsteer import InterpretableModel, SteeringVector
from mlxsteer import interventions as iv
from mlxsteer.cli import main
from mlxsteer.refusal import RefusalCandidate, RefusalDirection

PROMPT = "The food was"


def directions(*layers: int, width: int = 256) -> SteeringVector:
    drawn = np.random.default_rng(1).normal(size=(len(layers), width)).astype(np.float32)
    norms = {layer: 3.0 + layer for layer in layers}
    return SteeringVector({n: mx.array(row) for n, row in zip(layers, drawn, strict=True)}, residual_norms=norms)


def near(a: Any, b: Any) -> bool:
    return bool(np.allclose(np.array(a), np.array(b), rtol=1e-6, atol=1e-6))


# -- control vectors -------------------------------------------------------------------------------------------------


def llama_cpp(files: dict[Path, float], width: int, blocks: int) -> list[np.ndarray | None]:
    """What llama.cpp adds behind each block, by its rules: load (offset N − 1), sum, apply (offset il − 1, il ≥ 1)."""
    data = np.zeros(0, np.float32)
    for file, scale in files.items():
        for tensor in gguf.GGUFReader(file).tensors:
            number = int(tensor.name.removeprefix("direction."))
            assert number > 0, "llama.cpp refuses the file"
            assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
            assert tensor.shape.tolist() == [width]
            start = width * (number - 1)
            data = np.concatenate([data, np.zeros(max(0, start + width - len(data)), np.float32)])
            data[start : start + width] += np.float32(scale) * tensor.data
    found: list[np.ndarray | None] = [None]
    for il in range(1, blocks):
        row = data[width * (il - 1) : width * il]
        found.append(row if len(row) else None)
    return found


def run_as_llama_cpp(model: InterpretableModel, files: dict[Path, float]) -> mx.array:
    """The bundled llama, block by block, with what llama.cpp adds behind each of them; no hooks."""
    inner: Any = model.model.model  # type: ignore[attr-defined]
    rows = llama_cpp(files, 256, len(inner.layers))
    h = inner.embed_tokens(mx.array([model.encode(PROMPT)]))
    mask = create_attention_mask(h, None)
    for il, block in enumerate(inner.layers):
        h = block(h, mask, None)
        if rows[il] is not None:
            h = h + mx.array(rows[il])
    h = inner.norm(h)
    logits: mx.array = (
        inner.embed_tokens.as_linear(h) if model.model.args.tie_word_embeddings else model.model.lm_head(h)
    )  # type: ignore[attr-defined]
    return logits


def hooked(model: InterpretableModel, interventions: Any) -> mx.array:
    with model.trace(PROMPT, interventions=interventions):
        logits: mx.array = model.output.save()
    return logits


def test_a_control_vector_means_to_llama_cpp_what_the_vector_means_here(
    pocket: InterpretableModel, tmp_path: Path
) -> None:
    v, w = directions(1, 4, 7), directions(4)
    files = {v.save(tmp_path / "v.gguf"): 0.75, w.save(tmp_path / "w.gguf"): -2.0}
    steer = v.at("all", strength=0.75)
    steer["layers.4"] = steer["layers.4"] | w.at(4, strength=-2.0)["layers.4"]
    here, there = hooked(pocket, steer), run_as_llama_cpp(pocket, files)
    assert mx.abs(here - there).max().item() < 1e-4
    assert mx.abs(here - hooked(pocket, None)).max().item() > 1


def test_exported_interventions_do_at_scale_1_what_the_hooks_do(pocket: InterpretableModel, tmp_path: Path) -> None:
    v = directions(2, 5)
    steer: dict[str, Any] = v.at({2: 0.05, 5: -0.1}, unit="residual")
    steer["layers.5"] = [steer["layers.5"], iv.add_vector(v[2], 0.5), iv.add_vector(v[2], 0.0)]
    steer["layers.-1"] = iv.add_vector(v[5], 0.25)
    made = ms.export_control_vector(pocket, steer, tmp_path / "steer.gguf")
    assert made.layers == [2, 5, 7]
    assert "layers 2, 5, 7" in str(made)
    assert f"--control-vector-scaled {tmp_path / 'steer.gguf'}:1" in str(made)
    there = run_as_llama_cpp(pocket, {tmp_path / "steer.gguf": 1.0})
    assert mx.abs(hooked(pocket, steer) - there).max().item() < 1e-4
    back = SteeringVector.load(tmp_path / "steer.gguf", model=pocket)
    assert near(hooked(pocket, back.at("all")), hooked(pocket, steer))
    fields = gguf.GGUFReader(tmp_path / "steer.gguf").fields
    assert bytes(fields["controlvector.model_hint"].parts[-1]) == b"llama"


def test_a_dry_run_writes_nothing(pocket: InterpretableModel, tmp_path: Path) -> None:
    made = ms.export_control_vector(pocket, directions(3).at(3), tmp_path / "x.gguf", dry_run=True)
    assert (made.path, made.layers, list(tmp_path.iterdir())) == (None, [3], [])
    assert "nothing written" in str(made)


V = mx.ones((256,))
NO_CONTROL_VECTOR: dict[str, tuple[dict[str, Any], str]] = {
    "ablate": ({"layers.3": iv.ablate(V)}, "ablate at layers.3 can't be exported: .*adds a constant.*ms.bake"),
    "a function": ({"layers.3": lambda x: x}, "adds a constant"),
    "block 0": ({"layers.0": iv.add_vector(V)}, r"nothing behind block 0.*nearest is layers\.1"),
    "an input": ({"layers.3.input": iv.add_vector(V)}, r"nearest is layers\.2, which is the same place"),
    "a part": ({"layers.3.mlp": iv.add_vector(V)}, r"layers\.3\.mlp can't .*layers\.1 to layers\.7.*is layers\.3\."),
    "the embedding": ({"embed": iv.add_vector(V)}, r"nearest is layers\.1"),
    "some tokens": ({"layers.3": iv.add_vector(V, at="last")}, "at='last', and llama.cpp adds it at every token"),
    "a schedule": ({"layers.3": iv.add_vector(V, schedule=iv.decay(half_life=2))}, "it has a schedule"),
    "a span": ({"layers.3": iv.add_vector(V, exclude=("a", "b"))}, "it has exclude="),
    "the norm": ({"layers.3": iv.add_vector(V, preserve_norm=True)}, "preserve_norm=True"),
    "rows": ({"layers.3": iv.add_vector(V, strength=[1.0, 2.0])}, "2 strengths, one per row"),
    "a gate": ({"layers.3": iv.when(iv.cosine(V) > 0.1, iv.add_vector(V))}, "adds a constant"),
    "one of two": ({"layers.3": [iv.add_vector(V), iv.scale(2.0)]}, "scale at layers.3"),
}


@pytest.mark.parametrize(("steer", "sentence"), NO_CONTROL_VECTOR.values(), ids=NO_CONTROL_VECTOR)
def test_what_a_control_vector_can_not_do_is_refused_with_the_reason(
    steer: dict[str, Any], sentence: str, pocket: InterpretableModel, tmp_path: Path
) -> None:
    with pytest.raises(ms.CannotExport, match=sentence) as caught:
        ms.export_control_vector(pocket, steer, tmp_path / "x.gguf")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_export_and_wrong_names_are_refused(pocket: InterpretableModel, tmp_path: Path) -> None:
    steer = {"layers.3": iv.add_vector(V)}
    with pytest.raises(ValueError, match="every strength is 0"):
        ms.export_control_vector(pocket, {"layers.3": iv.add_vector(V, 0.0)}, tmp_path / "x.gguf")
    with pytest.raises(ValueError, match=r"x\.bin: a control vector is a \.gguf file"):
        ms.export_control_vector(pocket, steer, tmp_path / "x.bin")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        ms.export_control_vector(pocket, steer, tmp_path / "no" / "x.gguf")
    with pytest.raises(ms.UnknownKey):
        ms.export_control_vector(pocket, {"layers.99": iv.add_vector(V)}, tmp_path / "x.gguf")


@pytest.mark.parametrize("suffix", [".gguf", ".safetensors", ".npz"])
@pytest.mark.parametrize("unit", ["raw", "residual"])
def test_strengths_are_folded_into_a_file(suffix: str, unit: Any, tmp_path: Path) -> None:
    v = directions(2, 4, 6)
    folded = SteeringVector.load(v.save(tmp_path / f"v{suffix}", strengths={2: 2.0, 4: 0.0, 6: -0.5}, unit=unit))
    assert folded.layers == [2, 6]
    for layer, one in v.at({2: 2.0, 6: -0.5}, unit=unit).items():
        number = int(layer.split(".")[1])
        assert near(folded[number], np.array(one.vector) * one.strength)  # type: ignore[attr-defined]
    if suffix != ".npz":
        assert folded.info["folded"] == {"2": 2.0, "6": -0.5}
        assert folded.residual_norms == {2: 5.0, 6: 9.0}


def test_strengths_that_can_not_be_folded_are_refused(tmp_path: Path) -> None:
    v = directions(2, 4)
    with pytest.raises(ValueError, match="are all 0"):
        v.save(tmp_path / "v.gguf", strengths={2: 0.0})
    with pytest.raises(KeyError, match="no direction for layer 3"):
        v.save(tmp_path / "v.gguf", strengths={3: 1.0})
    with pytest.raises(ValueError, match="give strengths="):
        v.save(tmp_path / "v.gguf", unit="residual")
    assert list(tmp_path.iterdir()) == []
    each = SteeringVector({1: mx.ones((3, 4))})
    assert SteeringVector.load(each.save(tmp_path / "e.npz", strengths={1: 2.0}))[1].tolist() == [[2.0] * 4] * 3


# -- the Hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_server.Hub]:
    """A Hub on loopback, asked by huggingface_hub itself; a writer is logged in."""
    with hub_server.serving() as server:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", hub_server.WRITER)
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        yield server


def card_of(server: hub_server.Hub, name: str, branch: str = "main") -> str:
    return server.repositories[name][branch]["README.md"].decode()


def test_a_vector_goes_to_a_branch_of_the_hub_and_comes_back_from_it(hub: hub_server.Hub) -> None:
    v = directions(1, 4)
    address = ms.push_to_hub(v, "me/mood", private=True, commit_message="First")
    assert address == f"{hub.url}/me/mood"
    assert hub.private == {"me/mood"}
    (2 * v).push_to_hub("me/mood", revision="twice", licence="mit", measured="It moves reviews by 3 nats.")
    assert set(hub.repositories["me/mood"]["twice"]) == {"vector.safetensors", "README.md"}
    assert hub.messages == ["First", "Add a steering vector"]
    assert near(SteeringVector.load("me/mood")[4], v[4])
    assert near(SteeringVector.load("me/mood", revision="twice")[4], 2 * v[4])
    assert near(SteeringVector.load("me/mood", revision="twice", token=hub_server.READER)[4], 2 * v[4])
    told = card_of(hub, "me/mood", "twice").splitlines()
    for line in ('license: "mit"', "It moves reviews by 3 nats.", "## Measured effect", "## Licence", "## Use"):
        assert line in told, line
    assert "Not measured. Which layer" in card_of(hub, "me/mood")
    assert "## Responsible use" not in told


def test_a_hub_that_cannot_be_reached_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def waits(*_: Any) -> None:
        raise AssertionError("it waits for another try")

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", waits)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mlxsteer", "inspect", "folder/vector"])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().err
    assert said.startswith("error: there is no file or folder folder/vector here. As a repository, user/repo: the Hug")
    assert said.count("\n") == 1


def test_files_are_pushed_as_the_vector_that_they_hold(hub: hub_server.Hub) -> None:
    v = directions(1, 4)
    ms.push_to_hub(v.save("v.npz"), "me/plain")
    assert near(SteeringVector.load("me/plain")[4], v[4])
    ms.push_to_hub(v.save("v.gguf"), "me/control")
    assert set(hub.repositories["me/control"]["main"]) == {"vector.gguf", "README.md"}
    assert hub.repositories["me/control"]["main"]["vector.gguf"] == Path("v.gguf").read_bytes()
    assert near(SteeringVector.load("me/control")[4], v[4])
    assert "llama-cli -m MODEL.gguf --control-vector-scaled vector.gguf:1" in card_of(hub, "me/control")


def test_what_was_chosen_is_pushed_with_its_evidence(pocket: InterpretableModel, hub: hub_server.Hub) -> None:
    whole = ms.datasets.load("pocket/sentiment")
    pairs = ms.PairSet([pair for split in ("train", "choose", "report") for pair in whole.split(split)[:4]])
    choice = ms.select(pocket, pairs, layers=[4], neutral=["Here is a short story."], tokens=4, nulls=2)
    ms.push_to_hub(choice, "me/mood")
    told = card_of(hub, "me/mood")
    assert choice.summary().splitlines()[1] in told
    code = told.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(
        compile(code.replace("InterpretableModel(", "(lambda name: MODEL)("), "card", "exec"), {"MODEL": pocket}, names
    )
    assert isinstance(names["vector"], SteeringVector)
    assert f"{{4: {round(choice.strength, 6)}}}" in code


@pytest.fixture(scope="module")
def baked(pocket: InterpretableModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("baked")
    steer = {"layers.4": iv.add_vector(mx.full((256,), 0.1), 2.0)}
    gone = {"layers.3.mlp": iv.ablate(mx.ones((256,)))}
    return {
        "steer": steer,
        "baked": ms.bake(pocket, steer, folder / "baked"),
        "adapter": ms.export_adapter(pocket, gone, folder / "adapter"),
        "gone": gone,
    }


def test_a_baked_folder_is_run_from_the_hub_by_plain_mlx_lm(
    pocket: InterpretableModel, baked: dict[str, Any], hub: hub_server.Hub
) -> None:
    hub.repositories["me/cheerful"] = {"main": {"model-00001-of-00002.safetensors": b"old", "notes.txt": b"kept"}}
    (baked["baked"].path / ".secret").write_text("x")
    ms.push_to_hub(baked["baked"], "me/cheerful", licence="mit")
    there = hub.repositories["me/cheerful"]["main"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "mlxsteer.json", "notes.txt"} <= set(there)
    assert not {"model-00001-of-00002.safetensors", ".secret"} & set(there)
    model, tokenizer = mlx_lm.load("me/cheerful", revision="main")[:2]
    logits = model(mx.array([tokenizer.encode(PROMPT)]))
    assert mx.abs(logits - hooked(pocket, baked["steer"])).max().item() < 1e-3
    told = card_of(hub, "me/cheerful")
    for line in ("add_vector ×2", "differ from the hooked model's by", 'mlx_lm.load("me/cheerful")', "Not measured."):
        assert line in told, line
    assert "## Responsible use" not in told
    assert "# cheerful" in told
    ms.push_to_hub(baked["baked"].path, "me/cheerful", measured="Refusals go down by 2 nats.")
    assert "## Responsible use" in card_of(hub, "me/cheerful")


def test_an_adapter_goes_to_the_hub_with_a_note_on_what_ablation_may_do(
    baked: dict[str, Any], hub: hub_server.Hub
) -> None:
    directions(1).push_to_hub("me/gone")
    ms.push_to_hub(str(baked["adapter"].path), "me/gone")
    there = hub.repositories["me/gone"]["main"]
    assert {"adapters.safetensors", "adapter_config.json", "mlxsteer.json", "vector.safetensors", "README.md"} == set(
        there
    )
    told = card_of(hub, "me/gone")
    assert 'adapter_path=snapshot_download("me/gone")' in told
    assert "## Responsible use" in told
    assert "answers what it was trained to refuse" in told
    folder = huggingface_hub.snapshot_download("me/gone")
    assert json.loads((Path(folder) / "mlxsteer.json").read_text())["kind"] == "adapter"


def test_a_vector_of_refusal_has_a_note_on_responsible_use(hub: hub_server.Hub) -> None:
    SteeringVector({3: mx.ones(4)}, info={"method": "refusal direction", "model": "org/chat"}).push_to_hub("me/no")
    told = card_of(hub, "me/no")
    assert "## Responsible use" in told
    assert 'base_model: "org/chat"' in told


def test_what_is_no_folder_of_ours_is_not_pushed(baked: dict[str, Any], hub: hub_server.Hub, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"plain holds no mlxsteer\.json, so it is no folder that ms\.bake"):
        ms.push_to_hub(tmp_path / "plain", "me/x")
    record = baked["baked"].path / "mlxsteer.json"
    damaged = {
        "{": "is damaged",
        '{"version": 9, "kind": "baked", "edits": []}': "of version 9",
        '{"version": 1, "kind": "x", "edits": []}': "is damaged",
        '{"version": 1, "kind": "baked", "edits": [], "comparison": {}}': "is damaged",
        record.read_text(): r"lacks model\*\.safetensors: it is no complete baked folder",
    }
    for text, said in damaged.items():
        (tmp_path / "plain" / "mlxsteer.json").write_text(text)
        with pytest.raises(ValueError, match=said):
            ms.push_to_hub(tmp_path / "plain", "me/x")
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        ms.push_to_hub(tmp_path / "none", "me/x")
    with pytest.raises(TypeError, match=r"a SteeringVector, a Choice, or the path .* not dict"):
        ms.push_to_hub(directions(1).at(1), "me/x")
    with pytest.raises(TypeError, match="measured= is a text"):
        ms.push_to_hub(directions(1), "me/x", measured=3)
    plan = ms.ControlVector(None, directions(1))
    with pytest.raises(FileNotFoundError, match="nothing was written yet"):
        ms.push_to_hub(plan, "me/x")
    assert hub.repositories == {}


def test_what_the_hub_refuses_is_one_sentence(hub: hub_server.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    v = directions(1)
    with pytest.raises(PermissionError, match=r"can't write to 'me/x': the token doesn't allow .* `hf auth login`"):
        v.push_to_hub("me/x", token=hub_server.READER)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(
        PermissionError, match=r"can't write to 'me/x': nobody is logged in, .* or give token=\."
    ) as one:
        v.push_to_hub("me/x")
    assert "\n" not in str(one.value)
    assert hub.repositories == {}
    v.push_to_hub("me/x", token=hub_server.WRITER, private=True)
    with pytest.raises(FileNotFoundError, match="no such repository, unless it is private"):
        SteeringVector.load("me/x")
    assert SteeringVector.load("me/x", token=hub_server.READER).layers == [1]
    with pytest.raises(FileNotFoundError, match="no such repository, unless it is private"):
        SteeringVector.load("me/none", token=hub_server.READER)
    with pytest.raises(FileNotFoundError, match="it has no revision 'v9'"):
        SteeringVector.load("me/x", revision="v9", token=hub_server.READER)
    with pytest.raises(FileNotFoundError, match="no such file"):
        SteeringVector.load("me/x", filename="none.npz", token=hub_server.READER)
    with pytest.raises(ValueError, match="of the form 'user/repo'"):
        v.push_to_hub("a/b/c", token=hub_server.WRITER)


def test_a_hub_that_is_not_there_is_one_sentence(hub: hub_server.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="can't write to 'me/x': .* can't be reached, or refuses") as caught:
        directions(1).push_to_hub("me/x")
    assert "\n" not in str(caught.value)


# -- the command line ------------------------------------------------------------------------------------------------


class Shell:
    """`mlxsteer` as it is typed, in a folder of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: str, code: int = 0) -> str:
        """What it prints; of an error, what it says."""
        self.monkeypatch.setattr(sys, "argv", ["mlxsteer", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, said = self.capsys.readouterr()
        assert int(ended.value.code or 0) == code, said
        if code:
            assert said.count("error: ") == 1
            assert "Traceback" not in said
        return said if code else out


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return Shell(monkeypatch, capsys)


def test_a_vector_is_baked_from_the_shell(pocket: InterpretableModel, shell: Shell) -> None:
    v = directions(2, 4)
    v.save("v.safetensors")
    planned = shell("bake", "--vector", "v.safetensors", "--layer", "4", "--strength", "2", "--to", "new", "--dry-run")
    assert "layers.4.mlp.down_proj: add_vector ×2" in planned
    assert "nothing written (dry run)" in planned
    assert not Path("new").exists()
    data = json.loads(
        shell("bake", "--vector", "v.safetensors", "--layer", "4", "--strength", "2", "--to", "new", "--json")
    )
    assert (data["path"], data["edits"]) == ("new", ["layers.4.mlp.down_proj: add_vector ×2"])
    model, tokenizer = mlx_lm.load("new")[:2]
    logits = model(mx.array([tokenizer.encode(PROMPT)]))
    assert mx.abs(logits - hooked(pocket, v.at(4, 2.0))).max().item() < 1e-3
    assert "new is there already and not empty: name another folder, or --overwrite" in shell(
        "bake", "--vector", "v.safetensors", "--to", "new", code=1
    )
    iv.save({"layers.2": iv.add_vector(v[2], 0.5)}, "steer.safetensors")
    shown = shell("bake", "--interventions", "steer.safetensors", "--to", "new", "--overwrite")
    assert "layers.2.mlp.down_proj: add_vector ×0.5" in shown
    assert "Written: new. Run it: mlx_lm.generate --model new" in shown


def test_ablations_are_exported_as_an_adapter_from_the_shell(pocket: InterpretableModel, shell: Shell) -> None:
    gone = {"layers.3.mlp": iv.ablate(mx.ones((256,)))}
    iv.save(gone, "gone.safetensors")
    planned = shell("export", "--interventions", "gone.safetensors", "--to", "adapter", "--dry-run")
    assert "Nothing written (dry run)." in planned
    assert not Path("adapter").exists()
    shown = shell("export", "--interventions", "gone.safetensors", "--to", "adapter")
    assert "layers.3.mlp.down_proj: ablate ×1" in shown
    assert "Written: adapter. Use it: mlx_lm.generate --model" in shown
    model, tokenizer = mlx_lm.load(str(ms.pocket.FOLDER), adapter_path="adapter")[:2]
    logits = model(mx.array([tokenizer.encode(PROMPT)]))
    assert mx.abs(logits - hooked(pocket, gone)).max().item() < 1e-3
    direction = RefusalDirection(
        directions(3), -1, gone, (RefusalCandidate(3, -1, -1.0, 1.0, 0.01, True),), (1.0, -1.0), (1.0, -1.0, -1.0, 1.0)
    )
    direction.to_json("refusal.json")
    data = json.loads(shell("export", "--interventions", "refusal.json", "--to", "other", "--json"))
    assert (data["format"], data["rank"], data["edits"]) == ("adapter", 1, ["layers.3.mlp.down_proj: ablate ×1"])
    assert "refusal.json: a refusal direction" in shell("inspect", "refusal.json")


def test_vectors_are_exported_in_every_format_from_the_shell(shell: Shell) -> None:
    v = directions(1, 4)
    v.save("v.safetensors")
    shown = shell("export", "--vector", "v.safetensors", "--to", "v.gguf")
    assert "llama-cli -m MODEL.gguf --control-vector-scaled v.gguf:1" in shown
    rows = {tensor.name: tensor.data for tensor in gguf.GGUFReader("v.gguf").tensors}
    assert near(rows["direction.1"], v[1])
    assert near(rows["direction.4"], v[4])
    for suffix in ("npz", "safetensors", "gguf"):
        shell("export", "--vector", "v.safetensors", "--layer", "4", "--strength", "-2", "--to", f"two.{suffix}")
        two = SteeringVector.load(f"two.{suffix}")
        assert two.layers == [4]
        assert near(two[4], -2 * v[4])
    assert "two.npz is there already" in shell("export", "--vector", "v.safetensors", "--to", "two.npz", code=1)
    shell("export", "--vector", "v.safetensors", "--to", "two.npz", "--overwrite")
    assert SteeringVector.load("two.npz").layers == [1, 4]
    iv.save({"layers.4": [iv.add_vector(v[4]), iv.add_vector(v[1])]}, "steer.safetensors")
    data = json.loads(shell("export", "--interventions", "steer.safetensors", "--to", "sum.gguf", "--json"))
    assert (data["path"], data["format"], data["layers"]) == ("sum.gguf", "gguf", [4])
    assert near(SteeringVector.load("sum.gguf")[4], v[4] + v[1])
    before = sorted(Path().iterdir())
    for to in ("dry.gguf", "dry.npz"):
        assert "Nothing written (dry run)." in shell("export", "--vector", "v.safetensors", "--to", to, "--dry-run")
    assert sorted(Path().iterdir()) == before


def test_what_can_not_be_taken_away_is_said_in_one_sentence_from_the_shell(shell: Shell) -> None:
    directions(1, 4).save("v.safetensors")
    iv.save({"layers.4": iv.add_vector(V, at="last")}, "last.safetensors")
    wrong = {
        ("bake", "--to", "x"): "nothing is named to take away: give --steer",
        ("bake", "--vector", "v.safetensors", "--to", "x", "--strength", "0"): "--strength 0 is the plain model",
        ("bake", "--vector", "v.safetensors", "--to", "x", "--layer", "3"): "v.safetensors has no direction there",
        ("bake", "--vector", "v.safetensors", "--to", "x", "--at", "lst"): "Nearest: last",
        ("bake", "--vector", "v.safetensors", "--to", "x", "--at", "last"): "weights act on every token",
        ("bake", "--vector", "v.safetensors", "--to", "no/x"): "there is no folder no",
        ("bake", "--interventions", "last.safetensors", "--to", "x"): "--at last",
        ("export", "--vector", "v.safetensors", "--to", "x.ggf"): "Nearest: .gguf",
        ("export", "--vector", "v.safetensors", "--to", "x", "--format", "gguff"): "Nearest: gguf",
        ("export", "--vector", "v.safetensors", "--to", "x", "--format", "npz"): "a npz file's name ends in .npz",
        ("export", "--vector", "v.safetensors", "--to", "x"): "can't be exported as an adapter: layers.4.mlp.down_proj",
        ("export", "--vector", "v.safetensors", "--to", "x.gguf", "--at", "last"): "leave --at out",
        ("export", "--interventions", "last.safetensors", "--to", "x.gguf"): "llama.cpp adds it at every token",
        ("export", "--interventions", "last.safetensors", "--to", "x.npz"): "--format npz holds one vector",
        (
            "bake",
            "--vector",
            "v.safetensors",
            "--to",
            "x",
            "--at",
            "first",
        ): "mlxsteer generate and mlxsteer chat run it",
        ("inspect",): "name one thing to look into",
        ("inspect", "v.safetensor"): "Nearest: v.safetensors",
    }
    before = sorted(Path().iterdir())
    for arguments, sentence in wrong.items():
        assert sentence in shell(*arguments, code=1), arguments
    assert sorted(Path().iterdir()) == before
    assert shell_usage(shell, "bake", "--vector", "v.safetensors") == 2


def shell_usage(shell: Shell, *arguments: str) -> int:
    shell.monkeypatch.setattr(sys, "argv", ["mlxsteer", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_inspect_says_what_is_in_everything_of_ours(
    pocket: InterpretableModel, baked: dict[str, Any], shell: Shell
) -> None:
    v = directions(1, 4)
    for suffix in ("safetensors", "gguf", "npz"):
        v.save(f"v.{suffix}")
        kind = "a control vector of llama.cpp's" if suffix == "gguf" else "a steering vector"
        assert f"v.{suffix}: {kind}\nSteeringVector(2 layers, 1 to 4, of width 256)" in shell("inspect", f"v.{suffix}")
    data = json.loads(shell("inspect", "v.safetensors", "--json"))
    assert (data["layers"], data["width"], data["residual_norms"]) == ([1, 4], 256, {"1": 4.0, "4": 7.0})
    gate = iv.when(iv.cosine(V) > 0.25, iv.add_vector(V, 0.5, at="last"))
    iv.save({"layers.4": [gate, iv.ablate(V)]}, "steer.safetensors")
    said = shell("inspect", "steer.safetensors")
    assert "add_vector at layers.4, strength 0.5 × the vector, tokens 'last', when" in said
    assert "ablate at layers.4, strength 1, tokens 'all'" in said
    data = json.loads(shell("inspect", "steer.safetensors", "--json"))
    assert [one["intervention"] for one in data["interventions"]] == ["add_vector", "ablate"]
    cache = make_prompt_cache(pocket.model)
    pocket.generate(PROMPT, baked["steer"], max_tokens=2, prompt_cache=cache)
    ms.save_prompt_cache("cache.safetensors", cache, {"what": "a start"})
    said = shell("inspect", "cache.safetensors")
    assert "a prompt cache\n8 layers, 1 row\nwhat: a start" in said
    assert "add_vector at layers.4 ×2" in said
    folder = baked["baked"].path
    for name in (folder, folder / "mlxsteer.json", folder / "model.safetensors"):
        said = shell("inspect", str(name))
        assert ": a baked model\nof pocket, for plain mlx-lm" in said
        assert "- layers.4.mlp.down_proj: add_vector ×2" in said
        assert "differ from the hooked model's by" in said
    data = json.loads(shell("inspect", str(baked["adapter"].path), "--json"))
    assert (data["kind"], data["base_model"], data["rank"]) == ("an adapter", "pocket", 1)
    loaded = ms.datasets.load("pocket/sentiment")
    pairs = ms.PairSet([pair for split in ("train", "choose", "report") for pair in loaded.split(split)[:4]])
    ms.probe(pocket, pairs, method="mean_difference", layers=[4], nulls=0, progress=False).save("mood.safetensors")
    assert "mood.safetensors: a probe\nProbe(" in shell("inspect", "mood.safetensors")
    assert json.loads(shell("inspect", "mood.safetensors", "--json"))["kind"] == "a probe"
    rows = np.eye(3, 256, dtype=np.float32)
    ms.SparseAutoencoder(rows.T, rows, np.zeros(3), np.zeros(256), key="layers.4").save("sae.safetensors")
    said = "sae.safetensors: a sparse autoencoder\nSparseAutoencoder(3 latents of width 256"
    assert said in shell("inspect", "sae.safetensors")
    assert json.loads(shell("inspect", "sae.safetensors", "--json"))["key"] == "layers.4"


def test_inspect_says_what_is_not_ours(shell: Shell, tmp_path: Path) -> None:
    assert "a model's folder, with nothing baked in by mlxsteer\nmodel_type: llama" in shell(
        "inspect", str(ms.pocket.FOLDER)
    )
    Path("lora").mkdir()
    Path("lora/adapter_config.json").write_text('{"fine_tune_type": "lora", "lora_parameters": {"rank": 8}}')
    assert "not made by mlxsteer\nfine_tune_type: lora\nrank: 8" in shell("inspect", "lora")
    Path("talk.json").write_text('{"model": "pocket", "messages": [{}, {}], "steering": ["mood: on"]}')
    assert "a conversation\nwith pocket, 2 messages\nmood: on" in shell("inspect", "talk.json")
    mx.save_safetensors("other.safetensors", {"a": mx.ones(2)})
    assert "holds 1 tensor, and is no vector" in shell("inspect", "other.safetensors", code=1)
    Path("half.safetensors").write_bytes(b"x" * 9)
    assert "no complete safetensors file" in shell("inspect", "half.safetensors", code=1)
    Path("half.json").write_text("{")
    assert "no complete JSON file" in shell("inspect", "half.json", code=1)
    Path("notes.txt").write_text("hello")
    assert "notes.txt is nothing that mlxsteer writes or reads" in shell("inspect", "notes.txt", code=1)


def test_a_folder_that_may_not_be_written_to_is_told_by_its_name(
    pocket: InterpretableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        with pytest.raises(PermissionError, match=f"the folder {tmp_path} may not be written to"):
            ms.bake(pocket, {"layers.4": iv.add_vector(V)}, tmp_path / "out")

    def refuses(path: Path, *_: Any) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuses)
    with pytest.raises(PermissionError, match=re.escape(str(tmp_path / "v.gguf"))):  # not by a temporary file's name
        directions(1, 4).save(tmp_path / "v.gguf")


def test_a_polite_kill_leaves_nothing_half_written(shell: Shell) -> None:
    def killed(*_: Any) -> None:
        assert list(Path().glob(".mood.*.unfinished"))
        signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    directions(1, 4).save("v.safetensors")
    shell.monkeypatch.setattr("mlxsteer.baking.card", killed)
    assert shell_usage(shell, "bake", "--steer", "v.safetensors", "--layer", "4", "--to", "mood") == 143
    assert [path.name for path in Path().iterdir()] == ["v.safetensors"]
    assert signal.getsignal(signal.SIGTERM) is before
