"""What was chosen, and why: candidates, evidence on held-out pairs, and what speaks against it, as words and data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlxsteer.display import Displayed, Shown
from mlxsteer.interventions.base import Intervention
from mlxsteer.interventions.files import as_json
from mlxsteer.measures.divergence import Divergence
from mlxsteer.measures.effect import Steerability
from mlxsteer.measures.uncertainty import Interval
from mlxsteer.pairs import PAIR_HASHES, counted
from mlxsteer.positions import At
from mlxsteer.vectors import SteeringVector


@dataclass(frozen=True)
class Candidate:
    """A layer, or several together, and what is known of steering there.

    Attributes:
        strengths: layer → strength in residual norms, at which the budget is spent, or the effect greatest within it.
        effect: mean shift of ``log P(positive) − log P(negative)`` over the choosing pairs, in nats; NaN if not run.
        spent: the budget's measure at that strength; NaN if not run.
        separation: AUROC of held-out projections; NaN for several layers.
        agreement: mean cosine of the pairs' differences; NaN for several layers, or where it is unknown.
        stage: ``"read"``: only looked at from outside; ``"tried"``: at a few strengths on some of the data, so that
            effect and strength are estimates; ``"measured"``: on all the choosing data.
    """

    strengths: dict[int, float]
    effect: float
    spent: float
    separation: float
    agreement: float
    stage: str


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the chosen steering does on the report split, which no choice was made on.

    Attributes:
        shift: mean shift of ``log P(positive) − log P(negative)`` in nats, with its interval over pairs.
        opposite: the same at the negated strength.
        base: the unsteered mean.
        curve: dose–response over multiples of the strength.
        nulls: mean shifts by matched-norm random vectors in its place.
        p_value: of the shift against them, one-sided.
        divergence: KL(base ‖ steered) on neutral text.
        pairs: number of pairs.
    """

    shift: Interval
    opposite: Interval
    base: float
    curve: Steerability
    nulls: tuple[float, ...]
    p_value: float
    divergence: Divergence
    pairs: int


@dataclass(frozen=True, eq=False)
class Choice(Displayed):
    """A layer (or several) and a strength, with the evidence.

    Attributes:
        vector: the steering vector.
        strengths: layer → strength in residual norms.
        at: which tokens are steered.
        budget: the measure that limits, and its limit.
        candidates: everything that was considered, the choice first, then by stage and effect. Two layers together are
            chosen only if they do 5 % more than one.
        evidence: what it does on the report split.
        rank_correlation: between what the layers look like from outside (separation) and what steering there does.
        warnings: what speaks against relying on it, in words; empty where nothing does.
        record: model, data, seed, versions.
        block_tokens: what choosing cost: tokens times blocks that ran.
    """

    vector: SteeringVector
    strengths: dict[int, float]
    at: At
    budget: tuple[str, float]
    candidates: tuple[Candidate, ...]
    evidence: Evidence
    rank_correlation: float
    warnings: tuple[str, ...]
    record: dict[str, Any] = field(default_factory=dict)
    block_tokens: int = 0

    @property
    def layer(self) -> int:
        """The layer; the first one of several."""
        return next(iter(self.strengths))

    @property
    def strength(self) -> float:
        """The strength at `layer`, in residual norms."""
        return self.strengths[self.layer]

    @property
    def interventions(self) -> dict[str, Intervention]:
        """The key dict that steers so; `evaluate` knows by it which pairs the vector was computed from."""
        made = self.vector.at(self.strengths, at=self.at, unit="residual")
        for edit in made.values():
            edit._cache[PAIR_HASHES] = self.vector.info.get(PAIR_HASHES)  # goes with the object, into no file
        return made

    def __repr__(self) -> str:
        where = " + ".join(f"layer {layer} × {strength:.3g}" for layer, strength in self.strengths.items())
        warned = f", {counted(len(self.warnings), 'warning')}" if self.warnings else ""
        return f"Choice({where}, shift {self.evidence.shift} nats{warned})"

    def table(self) -> str:
        """The candidates, what the choice does on the report split, and the warnings, in plain text."""
        return self._shown().plain(foot=True)

    def summary(self) -> str:
        """What it does and what it costs, in words."""
        found, (measure, limit) = self.evidence, self.budget
        where = " and ".join(f"{strength:.3g} residual norms at layer {layer}" for layer, strength in
                             self.strengths.items())  # fmt: skip
        lines = [
            f"Chosen: {where}, at={self.at!r}.",
            f"On {counted(found.pairs, 'held-out pair')}: log P(positive) − log P(negative) moves by {found.shift} "
            f"nats from {found.base:+.2f}, and by {found.opposite} at the negated strength.",
            f"Dose–response: {found.curve} (per multiple of the strength).",
            f"{counted(len(found.nulls), 'random vector')} of the same length: {np.mean(found.nulls):+.2f} on average, "
            f"{max(found.nulls):+.2f} at most; p = {found.p_value:.3f}." if found.nulls else "No null was drawn.",
            f"On neutral text: {found.divergence}; the budget was {measure} {limit:g}, ± 5 %.",
            "Separation tells no layers apart." if np.isnan(self.rank_correlation) else
            f"Rank correlation of separation and effect over layers: {self.rank_correlation:+.2f}.",
        ]  # fmt: skip
        return "\n".join([*lines, *(f"Warning: {warning}" for warning in self.warnings)])

    def _shown(self) -> Shown:
        less = f", less what moves {', '.join(self.record['leave'])}" if self.record.get("leave") else ""
        rows = []
        for one in self.candidates:
            numbers = (one.effect, one.spent, one.separation, one.agreement)
            cells = ["" if np.isnan(x) else f"{x:{form}}" for x, form in zip(numbers, ("+.2f", ".3g", ".2f", ".2f"),
                                                                             strict=True)]  # fmt: skip
            strengths = " + ".join(f"{s:.3g}" for s in one.strengths.values()) if not np.isnan(one.effect) else ""
            rows.append((" + ".join(map(str, one.strengths)), strengths, *cells, one.stage))
        return Shown(
            f"effect in nats{less}, strength in residual norms, at {self.budget[0]} {self.budget[1]:g} (± 5 %), on the "
            "choosing split",
            ("layer", "strength", "effect", self.budget[0], "AUROC", "agreement", "stage"),
            rows,
            styles={i: "bold" for i, one in enumerate(self.candidates) if one.strengths == self.strengths},
            foot=self.summary(),
        )

    def to_json(self, path: str | Path | None = None) -> str:
        """Everything but the vector as JSON; with a path, also written there, whole or not at all."""
        found = self.evidence
        data = {
            "strengths": self.strengths, "unit": "residual", "at": repr(self.at), "budget": list(self.budget),
            "candidates": [asdict(one) for one in self.candidates],
            "evidence": {
                "shift": asdict(found.shift), "opposite": asdict(found.opposite), "base": found.base,
                "mean_slope": asdict(found.curve.mean_slope), "anti_steerable": found.curve.anti_steerable,
                "multiples": found.curve.strengths.tolist(), "mean_curve": found.curve.mean_curve.tolist(),
                "changes": [asdict(one) for one in found.curve.changes()],
                "nulls": list(found.nulls), "p_value": found.p_value, "divergence": asdict(found.divergence),
                "pairs": found.pairs,
            },
            "rank_correlation": self.rank_correlation, "warnings": list(self.warnings), "record": self.record,
            "block_tokens": self.block_tokens,
        }  # fmt: skip
        return as_json(data, path)

    def plot(self, path: str | Path | None = None) -> Any:
        """The candidates' effects, and the dose–response against the nulls; a matplotlib figure.

        Args:
            path: also write it there, as PNG, PDF or SVG by suffix.
        """
        from mlxsteer.plots import plot_choice

        return plot_choice(self, path)


def doubts_about_pairs(seen: Mapping[str, tuple[int | None, int]], shared: tuple[int, int]) -> list[str]:
    """What makes held-out pairs no held-out ones, in words; what is unknown of a vector is no doubt.

    Args:
        seen: split → how many of its pairs the vector was computed from (None where that is unknown), and how many it
            has.
        shared: number of pairs that are in several splits, and of those that share a prompt with another split.
    """
    said = []
    if leaks := [f"{count} of the {number} {split} pairs" for split, (count, number) in seen.items() if count]:
        said.append(f"the vector was computed from {' and '.join(leaks)}: what it does there looks better than it is.")
    copies, prompts = shared
    if copies:
        said.append(f"{counted(copies, 'pair')} of these are in another split too: the splits aren't independent.")
    if prompts:
        said.append(
            f"{counted(prompts, 'pair')}{' more' if copies else ''} have a prompt that is in another split too: the "
            "splits are less independent than they look."
        )
    return said


def warnings_of(vector: SteeringVector, best: Candidate, found: Evidence, measure: str, limit: float) -> list[str]:
    """What speaks against relying on a choice, in words."""
    said = []
    if not found.shift.excludes(0.0) or found.shift.value <= 0:
        said.append(f"no evidence that this steers: the shift on held-out pairs is {found.shift} nats.")
    elif found.nulls and found.p_value >= 0.05 and max(found.nulls) < found.shift.value:
        said.append(f"{counted(len(found.nulls), 'random vector')} can't tell whether the direction matters: take 20.")
    elif found.nulls and found.p_value >= 0.05:
        said.append(
            "no evidence that the direction matters: random vectors of its length do as much "
            f"(p = {found.p_value:.2f})."
        )
    if found.curve.anti_steerable > 0.25:
        said.append(f"{found.curve.anti_steerable:.0%} of the held-out pairs are moved the wrong way.")
    for layer in best.strengths:
        agreement, reliability = vector.agreement.get(layer), vector.reliability.get(layer)
        if agreement is not None and agreement < 0.1:
            said.append(f"the pairs' differences hardly agree at layer {layer} (mean cosine {agreement:.2f}).")
        if reliability is not None and reliability < 0.9:
            said.append(
                f"another half of the data would give another vector at layer {layer} (split-half cosine "
                f"{reliability:.2f}): more or clearer pairs are needed."
            )
    train = vector.info.get("pairs")
    if isinstance(train, int) and train < 80:
        said.append(f"the vector is made of {counted(train, 'pair')}; from 80 on they are usually reliable.")
    if found.pairs < 16:
        said.append(f"the report split has {counted(found.pairs, 'pair')}: its interval is not to be relied on.")
    if best.spent < 0.95 * limit:
        said.append(f"the budget isn't spent: {measure} reaches {best.spent:.3g} of {limit:g} at most.")
    return said
