"""Measured recommendations: found by model and behaviour, true to their measurement, and told where there are none."""

from __future__ import annotations

import pytest

import mlxsteer as ms
from mlxsteer import InterpretableModel


def test_a_recommendation_steers_as_it_was_measured(pocket: InterpretableModel) -> None:
    found = ms.recommended(pocket, "pocket/sentiment")
    assert found.measurement["record"]["model"] == pocket.name == found.model
    assert ms.recommended("pocket")["pocket/sentiment"] == found
    pairs = ms.datasets.load("pocket/sentiment")
    vector = ms.extract(pocket, pairs.split("train")[:12])
    steering = found.interventions(vector)
    assert list(steering) == [f"layers.{layer}" for layer in found.strengths]
    shift = ms.measures.preference_shift(pocket, steering, pairs.split("report")[:4])
    assert shift.mean() > 0.5 * found.shift[1]
    assert "residual norms at layer" in str(found)


def test_what_was_not_measured_is_told_with_what_to_do() -> None:
    with pytest.raises(LookupError, match=r"nothing was measured for another: choose by ms\.select.*pocket"):
        ms.recommended("another")
    with pytest.raises(LookupError, match=r"'pocket/sentimant' was not measured.*Nearest: pocket/sentiment"):
        ms.recommended("pocket", "pocket/sentimant")
    with pytest.raises(TypeError, match="a model or its name"):
        ms.recommended(3)
