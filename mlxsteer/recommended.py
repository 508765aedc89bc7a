"""Layers and strengths that were measured, by model and behaviour, each with the measurement beside it."""

from __future__ import annotations

import ast
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxsteer.interventions.base import Intervention
from mlxsteer.positions import At
from mlxsteer.vectors import SteeringVector

_FOLDER = Path(__file__).parent / "recommendations"


@dataclass(frozen=True)
class Recommendation:
    """Where and how strongly a behaviour was found to be steered in a model.

    Attributes:
        model: the model's name.
        behaviour: the contrast set it was measured on.
        strengths: layer → strength in residual norms.
        at: which tokens.
        shift: of ``log P(positive) − log P(negative)`` on held-out pairs, in nats: (mean, low, high).
        p_value: against random vectors.
        measurement: everything that was measured, as `Choice.to_json` gives it.
    """

    model: str
    behaviour: str
    strengths: Mapping[int, float]
    at: At
    shift: tuple[float, float, float]
    p_value: float | None
    measurement: Mapping[str, Any]

    def __str__(self) -> str:
        where = " and ".join(f"{s:.3g} residual norms at layer {layer}" for layer, s in self.strengths.items())
        mean, low, high = self.shift
        measure, limit = self.measurement["budget"]
        return (
            f"{self.behaviour} in {self.model}: {where}, at={self.at!r}; moves held-out pairs by {mean:+.2f} "
            f"[{low:+.2f}, {high:+.2f}] nats at {measure} ≤ {limit:g}"
        )

    def interventions(self, vector: SteeringVector) -> dict[str, Intervention]:
        """The key dict that steers so with a vector of this behaviour."""
        return vector.at(self.strengths, at=self.at, unit="residual")


def recommended(model: Any, behaviour: str | None = None) -> Any:
    """What was measured for a model.

    Args:
        model: an `InterpretableModel`, or a model's name.
        behaviour: a contrast set's name; None for all that there are.

    Returns:
        A `Recommendation`; without a behaviour, a dict of them by behaviour.

    Raises:
        LookupError: nothing was measured for the model, or not for the behaviour; the message says how to.
    """
    name = getattr(model, "name", model)
    if not isinstance(name, str):
        raise TypeError(f"recommended takes a model or its name, not {type(model).__name__}.")
    found = {one.behaviour: one for one in map(_read, sorted(_FOLDER.glob("*/*.json"))) if one.model == name}
    if not found:
        known = ", ".join(sorted({_read(path).model for path in _FOLDER.glob("*/*.json")})) or "none"
        raise LookupError(
            f"nothing was measured for {name}: choose by ms.select(model, pairs). Measured models: {known}."
        )
    if behaviour is None:
        return found
    if behaviour not in found:
        near = difflib.get_close_matches(behaviour, found, n=1)
        hint = f"Nearest: {near[0]}." if near else f"Measured: {', '.join(found)}."
        raise LookupError(f"{behaviour!r} was not measured for {name}: choose by ms.select(model, pairs). {hint}")
    return found[behaviour]


def _read(path: Path) -> Recommendation:
    data = json.loads(path.read_text(encoding="utf-8"))
    shift = data["evidence"]["shift"]
    return Recommendation(
        data["record"]["model"], data["behaviour"], {int(k): v for k, v in data["strengths"].items()},
        ast.literal_eval(data["at"]), (shift["value"], shift["low"], shift["high"]), data["evidence"]["p_value"], data,
    )  # fmt: skip
