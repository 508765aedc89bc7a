"""The command line: the demo's effect is real, and errors are one sentence with exit code 1."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlxsteer import InterpretableModel, SteeringVector, datasets, extract, sweep
from mlxsteer.cli import main


def run(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["mlxsteer", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


SMALL = ("--pairs", "8", "--held-out", "1", "--max-tokens", "3")


def test_the_demo_steers_held_out_pairs_both_ways(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "mood.safetensors"
    assert run("demo", *SMALL, "--json", "--out", str(target), monkeypatch=monkeypatch) == 0
    told = json.loads(capsys.readouterr().out)
    effect = told["held_out_effect"]
    assert effect["minus"] < effect["plain"] < effect["plus"]
    assert len(told["effect"]) == 8
    assert set(told["completions"][0]) == {"prompt", "minus", "plain", "plus"}
    vector = SteeringVector.load(target)
    assert vector.layers == list(range(8))
    assert vector.info["pairs"] == 8


def test_the_demo_prints_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("demo", *SMALL, "--behaviour", "certainty", monkeypatch=monkeypatch) == 0
    shown = capsys.readouterr().out
    assert "log P(positive) − log P(negative)" in shown
    assert "pairs: pocket/certainty, 8 of train, 1 of choose, 2 of report" in shown
    assert "Saved: certainty.safetensors" in shown
    assert (tmp_path / "certainty.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("demo", "--model", "./nowhere"), "there is no folder ./nowhere"),
        (("demo", "--behaviour", "sentimnt"), "Nearest: sentiment"),
        (("demo", "--out", "vector.txt"), "name a .safetensors file"),
        (("demo", "--out", "no/such/folder/v.safetensors"), "in a folder that exists"),
    ],
)
def test_errors_are_one_sentence(
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run(*arguments, monkeypatch=monkeypatch) == 1
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


def test_a_missing_key_is_told_without_quotes_and_the_demo_says_where_it_saves(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise KeyError("there is no layer 9; it has 'a' and 'b'.")

    monkeypatch.setattr("mlxsteer.datasets.load", missing)
    assert run("demo", monkeypatch=monkeypatch) == 1
    assert capsys.readouterr().err == "error: there is no layer 9; it has 'a' and 'b'.\n"
    monkeypatch.setenv("COLUMNS", "200")
    assert run("demo", "--help", monkeypatch=monkeypatch) == 0
    assert "[default: (BEHAVIOUR.safetensors)]" in capsys.readouterr().out


def test_paragraphs_fill_their_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run("bake", "--help", monkeypatch=monkeypatch) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "is refused, with the reason. What is written is compared with the hooked model" in lines
    monkeypatch.setenv("COLUMNS", "200")
    assert run("datasets", "formality", "--show", "0", monkeypatch=monkeypatch) == 0
    card = capsys.readouterr().out.split("--model pocket")[0]
    assert max(map(len, card.splitlines())) <= 80
    assert "against 11), and the" in " ".join(card.split())


def test_version_and_wrong_usage(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("--version", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out.strip()
    assert run("demo", "--pairs", "0", monkeypatch=monkeypatch) == 2
    assert run("demos", monkeypatch=monkeypatch) == 2


def test_ctrl_c_is_exit_code_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlxsteer.datasets.load", interrupted)
    assert run("demo", monkeypatch=monkeypatch) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_an_output_that_is_full_is_called_so() -> None:
    for arguments in (["datasets"], ["datasets", "--json"]):
        with open("/dev/full", "w") as full:
            command = [sys.executable, "-m", "mlxsteer", *arguments]
            ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert (ran.returncode, ran.stderr) == (1, "error: can't write the output: No space left on device.\n")


@pytest.mark.full  # test_sweep holds sweeps against it, and test_commands the command against a sweep
def test_a_sweep_is_the_plain_loop(pocket: InterpretableModel) -> None:
    pairs = datasets.load("pocket/sentiment")
    vector = extract(pocket, [p for p in pairs if p.split == "train"][:4])
    held_out = [p for p in pairs if p.split == "choose"][:2]
    strengths = [-1.5, 0.0, 2.0]
    for at in (-1, "all"):
        grid = sweep(pocket, vector, held_out, layers=[0, 7], strengths=strengths, at=at, unit="raw")
        for i, layer in enumerate([0, 7]):
            for j, strength in enumerate(strengths):
                for k, pair in enumerate(held_out):
                    alone = _difference(pocket, vector, layer, strength, pair, at)
                    assert abs(grid.effect[i, j, k] - alone) < 1e-3
    assert grid.effect[0, 1, 0] == grid.effect[1, 1, 0]
    with pytest.raises(KeyError, match="no direction for layer 9"):
        sweep(pocket, vector, held_out, layers=[9])
    with pytest.raises(ValueError, match="at least one contrast pair"):
        sweep(pocket, vector, [])
    with pytest.raises(ValueError, match="its negative and 0"):
        sweep(pocket, vector, held_out, layers=[0], strengths=[1.0]).best()


def _difference(
    model: InterpretableModel, vector: SteeringVector, layer: int, strength: float, pair: object, at: object
) -> float:
    """One side after the other, one forward each, no batch and no replay."""
    sums = []
    for side in (pair.positive, pair.negative):  # type: ignore[attr-defined]
        prompt, tokens = model.encode(pair.prompt), model.encode(pair.prompt + side)  # type: ignore[attr-defined]
        steer = vector.at(layer, strength, at=at)  # type: ignore[arg-type]
        with model.trace(tokens, interventions=steer, prompt_tokens=len(prompt)):
            logits = model.output[0].save()
        logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        sums.append(sum(logs[i - 1, tokens[i]].item() for i in range(len(prompt), len(tokens))))
    return float(sums[0] - sums[1])
