"""Inference-time intervention: heads chosen by probes, shifted along their mean difference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlxsteer as ms
from mlxsteer import InterpretableModel
from mlxsteer.inference_time import _doubts, mass_mean_shift
from mlxsteer.measures import preference_shift


@pytest.fixture(scope="module")
def pairs() -> ms.PairSet:
    given = ms.datasets.load("pocket/sentiment")
    return ms.PairSet([pair for split in ("train", "choose", "report") for pair in given.split(split)[:6]])


@pytest.fixture(scope="module")
def found(pocket: InterpretableModel, pairs: ms.PairSet) -> ms.HeadShift:
    return ms.shift_heads(pocket, pairs, top=6, strength=1.0)


def test_the_most_accurate_heads_are_chosen(found: ms.HeadShift) -> None:
    assert found.accuracies.shape == (8, 4)
    ordered = np.sort(found.accuracies.ravel())[::-1]
    assert [accuracy for *_, accuracy in found.heads] == ordered[:6].tolist()
    assert all(found.accuracies[layer, head] == accuracy for layer, head, accuracy in found.heads)
    assert ordered[0] > 0.8
    assert sorted(head[:2] for head in found.heads) == sorted(
        (layer, head) for layer, (heads, _) in found.shifts.items() for head in heads
    )


def test_a_shift_is_the_standard_deviation_along_the_unit_mean_difference() -> None:
    values = np.random.default_rng(1).normal(size=(20, 5))
    theta = values[:10].mean(0) - values[10:].mean(0)
    theta /= np.linalg.norm(theta)
    np.testing.assert_allclose(mass_mean_shift(values), (values @ theta).std() * theta, atol=1e-6)
    assert not mass_mean_shift(np.zeros((4, 3))).any()


def test_shifts_are_of_the_values_of_the_train_pairs_alone(pocket: InterpretableModel, pairs: ms.PairSet) -> None:
    pairs = ms.PairSet([pair for split in ("train", "choose", "report") for pair in pairs.split(split)[:4]])
    found = ms.shift_heads(pocket, pairs, top=1)
    (layer, head, _), train = found.heads[0], pairs.split("train")
    texts = [pair.prompt + pair.positive for pair in train] + [pair.prompt + pair.negative for pair in train]
    values = np.array(ms.heads.values(pocket, texts)[layer][:, head], np.float64)
    np.testing.assert_allclose(found.shifts[layer][1][0], mass_mean_shift(values), rtol=1e-3, atol=1e-5)
    fewer = ms.PairSet([*train, *pairs.split("choose")])
    again = ms.shift_heads(pocket, fewer, top=1)
    assert again.heads == found.heads
    assert mx.array_equal(again.shifts[layer][1], found.shifts[layer][1])


def test_shifted_heads_prefer_their_side_and_random_directions_do_less(
    found: ms.HeadShift, pocket: InterpretableModel, pairs: ms.PairSet
) -> None:
    report = pairs.split("report")[:4]
    moved = preference_shift(pocket, found.interventions, report).mean()
    chance = [preference_shift(pocket, found.random(seed), report).mean() for seed in range(2)]
    assert moved > 1.0
    assert moved > 2 * max(map(abs, chance))


def test_what_is_done_is_the_shift_of_the_chosen_heads(found: ms.HeadShift, pocket: InterpretableModel) -> None:
    layer, (heads, shift) = next(iter(found.shifts.items()))
    key = f"layers.{layer}.attn.heads"
    with pocket.trace("The food was") as trace:
        before = np.array(trace.activations[key])
    with pocket.trace("The food was", interventions={key: found.interventions[key]}) as trace:
        after = np.array(trace.activations[key])
    expected = before.copy()
    expected[:, -1, list(heads)] += np.array(shift)  # the newest token
    np.testing.assert_allclose(after, expected, atol=1e-5)
    lengths = [
        np.linalg.norm(np.array(found.random(1)[key].then.vector), axis=-1),
        np.linalg.norm(np.array(shift), axis=-1),
    ]
    np.testing.assert_allclose(*lengths, rtol=1e-4)
    assert found.random(1)[key].fingerprint == found.random(1)[key].fingerprint != found.random(2)[key].fingerprint


def test_a_shift_is_written_saved_and_drawn(found: ms.HeadShift, tmp_path: Path) -> None:
    assert "accuracy" in found.table()
    assert '"strength": 1.0' in found.to_json(tmp_path / "iti.json")
    assert "HeadShift(6 heads" in repr(found)
    ms.interventions.save(found.interventions, tmp_path / "iti.safetensors")
    again = ms.interventions.load(tmp_path / "iti.safetensors")
    assert {k: v.fingerprint for k, v in again.items()} == {k: v.fingerprint for k, v in found.interventions.items()}
    pytest.importorskip("matplotlib")
    found.plot(tmp_path / "iti.png")
    assert (tmp_path / "iti.png").stat().st_size > 5000


@pytest.mark.full
def test_heads_that_tell_nothing_apart_are_warned_of(pocket: InterpretableModel, pairs: ms.PairSet) -> None:
    mixed = [
        ms.ContrastPair(p.prompt, *((p.positive, p.negative) if i % 2 else (p.negative, p.positive)), split=p.split)
        for i, p in enumerate([*pairs.split("train"), *pairs.split("choose")[:6]])
    ]
    warnings = " ".join(ms.shift_heads(pocket, mixed, top=32).warnings)
    assert "tell the sides apart" in warnings
    assert "chosen on 6 pairs" in warnings


def test_a_best_probe_at_chance_is_told_from_a_few_weak_ones() -> None:
    assert (
        "no head tells the sides apart: the best probe is right on 55%" in _doubts([(1, 2, 0.55), (0, 0, 0.5)], 20)[0]
    )
    assert _doubts([(1, 2, 0.9), (0, 0, 0.5)], 20) == ["1 of the 2 heads hardly tell the sides apart: take fewer."]
    assert _doubts([(1, 2, 0.9), (0, 0, 0.8)], 20) == []


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"top": 33}, ValueError, "top=33: the model has 32 heads"),
    ({"top": 0}, ValueError, "top is a whole number from 1 on"),
    ({"strength": None}, TypeError, "strength is a number"),
    ({"at": "lst"}, ValueError, "lst"),
    ({"chat": 1}, TypeError, "chat is True or False"),
    ({"seed": -1}, ValueError, "a seed is"),
]


@pytest.mark.parametrize(("options", "error", "sentence"), REFUSED)
def test_what_makes_no_shift_is_refused(
    options: dict[str, Any], error: type[Exception], sentence: str, pocket: InterpretableModel, pairs: ms.PairSet
) -> None:
    with pytest.raises(error, match=sentence):
        ms.shift_heads(pocket, pairs, **{"top": 2, **options})


def test_too_few_pairs_are_refused(pocket: InterpretableModel, pairs: ms.PairSet) -> None:
    with pytest.raises(ValueError, match="probes need at least 2 train pairs, and there are 1"):
        ms.shift_heads(pocket, [pairs.split("train")[0], pairs.split("choose")[0]], top=2)
    with pytest.raises(TypeError):
        ms.shift_heads(pocket, ["a"], top=2)  # type: ignore[list-item]
