"""The refusal direction: its candidates against plain traces, and how it is kept and drawn."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
from test_extraction import tokenizer

from mlxsteer import ContrastPair, InterpretableModel, RefusalDirection, select_refusal_direction
from mlxsteer import interventions as iv

SPLITS = ("train", "train", "choose", "choose", "report", "report")
STARTS = tuple("abcdefghijklmnopqrstuvw")  # most of the vocabulary: a random model "refuses", too
PAIRS = [
    ContrastPair("", f"{bad} it now.", f"{good} it now.", split)
    for bad, good, split in zip(("burn", "harm", "break", "rob", "kill", "cheat"),
                                ("cook", "sing", "paint", "read", "wash", "plant"), SPLITS, strict=True)
]  # fmt: skip


@pytest.fixture(scope="module")
def llama() -> InterpretableModel:
    return InterpretableModel(tiny.build("llama", vocab_size=32), tokenizer())


@pytest.fixture(scope="module", params=["zero", "harmless_mean"])
def found(request: pytest.FixtureRequest, llama: InterpretableModel) -> RefusalDirection:
    return select_refusal_direction(
        llama, PAIRS, refusal=STARTS, ablation=request.param, positions=2, largest_kl=50.0, progress=False
    )


def scores(model: InterpretableModel, texts: list[str], edits: dict[str, Any]) -> tuple[float, np.ndarray]:
    """Mean refusal score, and the log-probabilities behind each text, by a trace for each."""
    assert model.tokenizer is not None
    ids = sorted({model.tokenizer.encode(start, add_special_tokens=False)[0] for start in STARTS})
    logps = []
    for text in texts:
        with model.trace(text, edits or None):
            logps.append(np.array(tiny.logprobs(model.output[0, -1].astype(mx.float32)), np.float64))
    share = np.exp(np.array(logps)[:, ids]).sum(1)
    return float(np.mean(np.log(share / (1 - share)))), np.array(logps)


def test_the_best_candidate_is_what_plain_traces_measure(llama: InterpretableModel, found: RefusalDirection) -> None:
    best = found.candidates[0]
    assert (found.layer, found.position) == (best.layer, best.position)
    assert len(found.candidates) == 3 * 2
    bad, good = ([getattr(pair, side) for pair in PAIRS if pair.split == "choose"] for side in ("positive", "negative"))
    added = {f"layers.{best.layer}": iv.add_vector(found.vector[best.layer])}
    (harmful, _), (harmless, clean) = (scores(llama, texts, {}) for texts in (bad, good))
    assert found.base == pytest.approx((harmful, harmless), abs=1e-3)
    assert best.bypass == pytest.approx(scores(llama, bad, found.ablation)[0], abs=1e-3)
    assert best.induce == pytest.approx(scores(llama, good, added)[0], abs=1e-3)
    ablated = scores(llama, good, found.ablation)[1]
    assert best.kl == pytest.approx(np.mean((np.exp(clean) * (clean - ablated)).sum(1)), rel=1e-3, abs=1e-5)


def test_a_direction_is_kept_whole(llama: InterpretableModel, found: RefusalDirection, tmp_path: Path) -> None:
    odd = replace(found, candidates=(*found.candidates[:-1], replace(found.candidates[-1], kl=float("nan"))))
    text = odd.to_json(tmp_path / "refusal.json")
    assert json.loads(text)["candidates"][-1]["kl"] is None
    assert len(json.loads(text)["edits"]) == 1
    back = RefusalDirection.from_json(tmp_path / "refusal.json")
    assert back.table() == odd.table()
    assert (back.position, back.base, back.report) == (found.position, found.base, found.report)
    assert back.candidates[:-1] == found.candidates[:-1]
    assert np.isnan(back.candidates[-1].kl)
    assert (back.vector.fingerprint, back.vector.info) == (found.vector.fingerprint, found.vector.info)
    fingerprints = [{key: edit.fingerprint for key, edit in one.ablation.items()} for one in (back, found)]
    assert fingerprints[0] == fingerprints[1]
    assert llama.generate("burn", back.ablation, max_tokens=2) == llama.generate("burn", found.ablation, max_tokens=2)
    data = json.loads(text)
    for name, value in (("candidates", []), ("base", [1]), ("direction", "x"), ("edits", {}), ("ablation", 3)):
        (tmp_path / "bad.json").write_text(json.dumps({**data, name: value}))
        with pytest.raises(ValueError, match="holds no refusal direction"):
            RefusalDirection.from_json(tmp_path / "bad.json")
    with pytest.raises(FileNotFoundError):
        RefusalDirection.from_json(tmp_path / "none.json")


@pytest.mark.parametrize("found", ["zero"], indirect=True)
def test_a_direction_is_drawn(found: RefusalDirection, tmp_path: Path) -> None:
    last = replace(found.candidates[-1], passes=False, kl=float("inf"))
    figure = replace(found, candidates=(*found.candidates[:-1], last)).plot(tmp_path / "refusal.png")
    assert (tmp_path / "refusal.png").read_bytes()[:4] == b"\x89PNG"
    best, ruled_out = found.candidates[0], 1 + sum(not one.passes for one in found.candidates[:-1])
    for axes, name in zip(figure.axes[:3], ("bypass", "induce", "kl"), strict=True):
        shown = axes.images[0].get_array()
        assert shown.shape == (2, 3)
        for one in found.candidates[:-1]:
            assert shown[one.position + 2, one.layer] == pytest.approx(getattr(one, name))
        *grey, frame = axes.patches
        assert len(grey) == ruled_out
        assert all(patch.get_hatch() for patch in grey)
        assert (frame.get_x() + 0.5, frame.get_y() + 0.5) == (best.layer, best.position + 2)
        assert axes.get_ylabel() == "token"
    assert figure.axes[2].get_xlabel() == "layer"
    assert f"layer {best.layer}, token −{-best.position}" in figure.get_suptitle()
