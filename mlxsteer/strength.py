"""How strongly to steer: the strength that spends a given budget of side effects, in a few evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mlxsteer import datasets
from mlxsteer.interventions.base import Intervention, number
from mlxsteer.measures.divergence import Divergence, Reference, edits_of, listed, perplexity
from mlxsteer.model import InterpretableModel
from mlxsteer.positions import At
from mlxsteer.vectors import SteeringVector

BUDGETS = ("kl_mean", "kl_p95", "perplexity_ratio")
"""What a budget may limit: mean and 95th percentile over tokens of KL(base ‖ steered) in nats; the perplexity of
steered text under the unsteered model over that of its own text."""

STRONGEST = 64.0
"""Residual norms: beyond, an addition is all there is."""


@dataclass(frozen=True)
class Strength:
    """A strength that meets a target, or the best there was.

    Attributes:
        value: the strength.
        measure: what was measured, see `BUDGETS`.
        target: what was asked for.
        reached: what was measured at `value`.
        hit: whether that is the target, to the tolerance.
        trials: every (strength, measured) that was tried, in order.
        unit: of the strengths.
    """

    value: float
    measure: str
    target: float
    reached: float
    hit: bool
    trials: tuple[tuple[float, float], ...]
    unit: str = "residual"

    @property
    def maximum(self) -> float:
        """The largest value that was measured."""
        return max(found for _, found in self.trials)

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        unit = {"residual": "residual norms", "raw": "vectors"}[self.unit]
        said = f"{self.value:.4g} {unit}: {self.measure} {self.reached:.3g}"
        if self.hit:
            return f"{said}, in {len(self.trials)} evaluations"
        if self.maximum > self.target:
            return f"{said}; {self.target:g} was not met in {len(self.trials)} evaluations"
        return f"{said}; {self.target:g} is out of reach, the maximum found was {self.maximum:.3g}"


def strength_for(
    model: InterpretableModel,
    vector: SteeringVector,
    layers: int | Sequence[int] | Mapping[int, float],
    *,
    kl: float | None = None,
    budget: Mapping[str, float] | None = None,
    neutral: Iterable[Any] | None = None,
    at: At = -1,
    unit: Literal["raw", "residual"] = "residual",
    tokens: int = 24,
    tolerance: float = 0.05,
    evaluations: int = 8,
    strongest: float | None = None,
    chat: bool = False,
    seed: int = 0,
    batch_tokens: int = 4096,
) -> Strength:
    """The strength at which a vector spends a budget of side effects.

    KL grows with the square of a small strength, so a secant in logarithms needs few evaluations; the clean pass runs
    once for all of them.

    Args:
        model: the model.
        vector: the vector; a negated one, ``-vector``, for the other side.
        layers: a layer, several, or layer → relative strength; see `SteeringVector.at`.
        kl: mean KL per token in nats; short for ``budget={"kl_mean": …}``.
        budget: one measure and its target, see `BUDGETS`.
        neutral: prompts to measure side effects on; `datasets.neutral` for the model unless given.
        at: which tokens are steered.
        unit: of the strength.
        tokens: how many tokens of the unsteered model's continuations are measured, or are generated for the
            perplexity.
        tolerance: how far from the target is a hit, as a share of it; of its excess over 1 for a perplexity ratio.
        evaluations: the most strengths to try.
        strongest: the largest strength to try; 64 residual norms, or 1,000 vectors.
        chat: texts are a user's messages.
        seed: of the sampling, for the perplexity.
        batch_tokens: the most tokens in one batch, padding included.

    Returns:
        A `Strength`; where the target is out of reach, the one with the largest value found.

    Raises:
        TypeError: no vector, or one prompt in place of a list.
        ValueError: no target or several, or one that can't be; nothing may be tried.
        KeyError: the vector lacks a layer.
    """
    measure, target = target_of(kl, budget)
    if not isinstance(vector, SteeringVector):
        raise TypeError(f"strength_for takes a SteeringVector, not {vector!r:.60}.")
    for name, value in (("tolerance", tolerance), ("evaluations", evaluations), ("strongest", strongest)):
        if value is not None and number(value, name) <= 0:
            raise ValueError(f"{name} is above 0, not {value}.")
    vector.check(model)
    steering = vector.at(layers, 1.0, at, unit=unit)
    strongest = (STRONGEST if unit == "residual" else 1000.0) if strongest is None else number(strongest, "strongest")
    asked = listed(datasets.neutral(model) if neutral is None else neutral)
    evaluate: Callable[[float], float]
    if measure == "perplexity_ratio":
        said = [[{"role": "user", "content": p}] if chat and isinstance(p, str) else p for p in asked]
        evaluate = _perplexity_ratios(model, steering, said, tokens, seed, batch_tokens)
    else:
        reference = Reference(model, asked, tokens=tokens, at=at, chat=chat, batch_tokens=batch_tokens)

        def evaluate(strength: float) -> float:
            return measured(reference.divergence(steering, strength), measure)

    return solved(evaluate, measure, target, tolerance=tolerance, evaluations=evaluations, strongest=strongest,
                  unit=unit)  # fmt: skip


def target_of(kl: float | None, budget: Mapping[str, float] | None) -> tuple[str, float]:
    """The one measure that limits, and its limit.

    Raises:
        TypeError: it is no number.
        ValueError: none, several, an unknown one, or one that can't be.
    """
    if budget is not None and not isinstance(budget, Mapping):
        raise TypeError(f"a budget names what it limits, such as {{'kl_mean': 0.5}}, and {budget!r} doesn't.")
    given = {**({} if kl is None else {"kl_mean": kl}), **(budget or {})}
    unknown = [name for name in given if name not in BUDGETS]
    if len(given) != 1 or unknown or (kl is not None and budget):
        said = ", ".join(f"{name}={value!r}" for name, value in given.items()) or "nothing"
        raise ValueError(
            f"a budget is one of {', '.join(BUDGETS)} and its limit, such as {{'kl_mean': 0.5}}, not {said}."
        )
    ((name, value),) = given.items()
    value = number(value, f"the budget of {name}")
    least = 1.0 if name == "perplexity_ratio" else 0.0
    if value <= least:
        raise ValueError(f"the budget of {name} is above {least:g}, not {value:g}.")
    return name, value


def measured(divergence: Divergence, measure: str) -> float:
    """The number that a budget limits."""
    return divergence.mean if measure == "kl_mean" else divergence.p95


def _perplexity_ratios(
    model: InterpretableModel, steering: dict[str, Intervention], given: list[Any], tokens: int, seed: int,
    batch_tokens: int,
) -> Callable[[float], float]:  # fmt: skip
    """Strength → perplexity of steered text over that of the model's own, sampled with one seed."""
    base = perplexity(model, model.generate(given, max_tokens=tokens, temp=1.0, seed=seed), batch_tokens)

    def ratio(strength: float) -> float:
        edits = {site.key: edit for site, edit in edits_of(model, steering, strength)}
        made = model.generate(given, edits, max_tokens=tokens, temp=1.0, seed=seed)
        return perplexity(model, made, batch_tokens) / base

    return ratio


def solved(
    evaluate: Callable[[float], float],
    measure: str,
    target: float,
    *,
    tolerance: float = 0.05,
    evaluations: int = 8,
    strongest: float = STRONGEST,
    first: float | None = None,
    unit: str = "residual",
) -> Strength:
    """Find the strength at which a growing measure meets its target: a secant in logarithms within a bracket.

    Args:
        evaluate: strength → measure.
        measure: its name.
        target: what it is to be; a perplexity ratio is counted from 1.
        tolerance: how far from the target is a hit, as a share of it; of its excess over 1 for a perplexity ratio.
        evaluations: the most strengths to try.
        strongest: the largest.
        first: the strength to begin with.
        unit: of the strengths, for the report.
    """
    zero = 1.0 if measure == "perplexity_ratio" else 0.0
    trials: list[tuple[float, float]] = []
    strength = min(first or float((target - zero) ** 0.25), strongest)
    while len(trials) < evaluations:
        found = evaluate(strength)
        # Where numbers overflow, the model has given way: more than any target.
        trials.append((strength, found if np.isfinite(found) else float("inf")))
        if abs(trials[-1][1] - target) <= tolerance * (target - zero):
            break
        following = _next_strength(trials, target, zero, strongest)
        if following is None:
            break
        strength = following
    below = [trial for trial in trials if trial[1] <= target + tolerance * (target - zero)]
    hits = [trial for trial in trials if abs(trial[1] - target) <= tolerance * (target - zero)]
    tried = max if below else min
    value, reached = hits[0] if hits else tried(below or trials, key=lambda trial: trial[1])
    return Strength(value, measure, target, reached, bool(hits), tuple(trials), unit)


def _next_strength(trials: Sequence[tuple[float, float]], target: float, zero: float, strongest: float) -> float | None:
    """The next strength to try; None where the target is out of reach."""
    least, most = 1e-12, 1e3 * (target - zero)
    points = sorted((np.log(s), np.log(np.clip(found - zero, least, most))) for s, found in trials)
    goal = np.log(target - zero)
    above = [point for point in points if point[1] > goal]
    high = min(above, default=None)
    low = max((point for point in points if point[1] <= goal and (high is None or point[0] < high[0])), default=None)
    if low is not None and high is not None:
        # Within the bracket the secant; a parabola once two points are near enough to bend it well. Next to nothing at
        # the lower end says nothing of the way up.
        share = 0.5 if goal - low[1] > 7 else (goal - low[1]) / (high[1] - low[1])
        x = low[0] + share * (high[0] - low[0])
        near = sorted((p for p in points if p not in (low, high)), key=lambda p: abs(p[1] - goal))[:1]
        if near and sorted(abs(p[1] - goal) for p in (low, high, *near))[1] < 1.0:
            if high[1] - goal > 2 and near[0][0] < low[0]:  # a cliff, which says nothing of the way up to it
                x = low[0] + (goal - low[1]) / _slope([near[0], low])
            else:
                curved = _parabola([low, high, *near], goal)
                x = x if curved is None else curved
        margin = 0.02 * (high[0] - low[0])
        return float(np.exp(np.clip(x, low[0] + margin, high[0] - margin)))
    if high is not None:
        return float(np.exp(high[0] + np.clip((goal - high[1]) / _slope(points[:2]), -np.log(20), -np.log(1.05))))
    last = points[-1]
    if last[0] >= np.log(strongest) - 1e-9 or (len(points) > 2 and last[1] - points[-2][1] < 0.02):
        return None  # stronger does no more
    # The curve bends down where it saturates: from the second step on, some further than the slope says.
    reach = (1.0, 1.4, 2.0)[min(len(points), 3) - 1]
    step = np.clip(reach * (goal - last[1]) / _slope(points[-2:]), np.log(1.05), np.log(8))
    return float(min(np.exp(last[0] + step), strongest))


def _slope(points: Sequence[tuple[float, float]]) -> float:
    """Of log measure in log strength. At first 3: it is 2 for small strengths, and more where the model gives way."""
    if len(points) < 2 or points[1][0] == points[0][0]:
        return 3.0
    return float(np.clip((points[1][1] - points[0][1]) / (points[1][0] - points[0][0]), 0.2, 6.0))


def _parabola(points: Sequence[tuple[float, float]], goal: float) -> float | None:
    """log strength between the first two of three points where the parabola through them meets a goal, if it does."""
    low, high = points[0][0], points[1][0]
    (a, fa), (b, fb), (c, fc) = sorted(points)
    first = (fb - fa) / (b - a)
    bend = ((fc - fb) / (c - b) - first) / (c - a)
    # fa + first·(x − a) + bend·(x − a)(x − b) = goal
    roots = np.roots([bend, first - bend * (a + b), fa - goal - first * a + bend * a * b])
    inside = [float(root.real) for root in roots if abs(root.imag) < 1e-12 and low < root.real < high]
    return inside[0] if len(inside) == 1 else None
