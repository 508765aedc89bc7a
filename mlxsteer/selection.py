"""Which layer, how strongly: chosen on one part of the data, reported on another, against what chance does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mlxsteer import datasets
from mlxsteer.contrast import places
from mlxsteer.extraction import extract, separation
from mlxsteer.interventions.base import Intervention
from mlxsteer.interventions.files import as_json
from mlxsteer.measures.divergence import Divergence, Reference, listed
from mlxsteer.measures.effect import Steerability, rank_correlation, steerability
from mlxsteer.measures.nulls import null_p_value, random_like
from mlxsteer.measures.preference import Preferences
from mlxsteer.measures.uncertainty import Interval, bootstrap, generator
from mlxsteer.model import InterpretableModel
from mlxsteer.pairs import ContrastPair, PairSet, checked, counted
from mlxsteer.positions import At
from mlxsteer.progress import Step, reporting
from mlxsteer.questions import check_count
from mlxsteer.reading import Read, as_chat, encode_side
from mlxsteer.sites import Site
from mlxsteer.strength import Strength, measured, solved, target_of
from mlxsteer.vectors import SteeringVector

TRIED = (0.7, 2.5)
"""Strengths of the first look, in residual norms: less than the stream itself, and more."""

STRONGEST = 10.0
"""Residual norms: a budget that isn't spent by then isn't what limits."""

_NULLS = 20_241
"""Key of the nulls' draws, so that they are no one else's: a random vector is to be held against others."""

MULTIPLES = (-1.0, -0.5, 0.5, 1.0)
"""Of the chosen strength, for the dose–response that is reported."""


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
class Choice:
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
        """The key dict that steers so."""
        return self.vector.at(self.strengths, at=self.at, unit="residual")

    def __repr__(self) -> str:
        where = " + ".join(f"layer {layer} × {strength:.3g}" for layer, strength in self.strengths.items())
        warned = f", {counted(len(self.warnings), 'warning')}" if self.warnings else ""
        return f"Choice({where}, shift {self.evidence.shift} nats{warned})"

    def table(self) -> str:
        """The candidates, what the choice does on the report split, and the warnings, in plain text."""
        console = Console(width=100, no_color=True, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
            console.print(self.summary(), markup=False, highlight=False)
        return capture.get().rstrip()

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

    def __rich__(self) -> Table:
        less = f", less what moves {', '.join(self.record['leave'])}" if self.record.get("leave") else ""
        table = Table(
            title=f"effect in nats{less}, at {self.budget[0]} {self.budget[1]:g} (± 5 %), on the choosing split"
        )
        for head in ("layer", "strength", "effect", self.budget[0], "AUROC", "agreement", "stage"):
            table.add_column(head, justify="right")
        for one in self.candidates:
            numbers = (one.effect, one.spent, one.separation, one.agreement)
            cells = ["" if np.isnan(x) else f"{x:{form}}" for x, form in zip(numbers, ("+.2f", ".3g", ".2f", ".2f"),
                                                                             strict=True)]  # fmt: skip
            strengths = " + ".join(f"{s:.3g}" for s in one.strengths.values()) if not np.isnan(one.effect) else ""
            style = "bold" if one.strengths == self.strengths else None
            table.add_row(" + ".join(map(str, one.strengths)), strengths, *cells, one.stage, style=style)
        return table

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


def select(
    model: InterpretableModel,
    pairs: Iterable[ContrastPair],
    *,
    vector: SteeringVector | None = None,
    budget: Mapping[str, float] | None = None,
    neutral: Iterable[Any] | None = None,
    layers: str | int | Sequence[int] = "all",
    at: At = -1,
    method: str | Callable[..., Any] = "mean_difference",
    read: Read = "last",
    leave: Mapping[str, Iterable[ContrastPair]] | None = None,
    combine: bool = True,
    screen: bool = True,
    nulls: int = 20,
    tokens: int = 24,
    chat: bool = False,
    seed: int = 0,
    batch_tokens: int = 4096,
    progress: bool | Step | None = True,
) -> Choice:
    """Choose where and how strongly to steer, by what steering does.

    The vector is computed on the train split, layer and strength are chosen on the choose split, and what is reported
    comes from the report split. Layers are compared at equal side effects: each at the strength that spends the
    budget. All are read from outside first (separation), then tried on a sixth of the data; the
    best are measured on all of it, alone and together.

    Args:
        model: the model.
        pairs: contrast pairs with completions; where they have no splits, they are split by chance.
        vector: a vector that is there already; it must not come from the choose or report pairs.
        budget: ``{"kl_mean": …}`` or ``{"kl_p95": …}``, mean or 95th percentile over tokens of KL(base ‖ steered) on
            neutral text in nats, met to 5 %; ``{"kl_mean": 0.3}`` unless given. No strength is above 10 residual norms.
        neutral: prompts to measure side effects on; `datasets.neutral` for the model unless given.
        layers: which layers are considered.
        at: which tokens are steered.
        method, read: of the extraction.
        leave: other behaviours' pairs by name, to be left alone: what steering moves them by, on average and in either
            direction, is subtracted from the effect when layers are compared.
        combine: also try the best layers together.
        screen: False measures every layer on all the choosing data, which is slow and the yardstick.
        nulls: matched-norm random vectors to hold the result against; at least 20 for p < 0.05.
        tokens: of the unsteered model's continuation of each neutral prompt, for the side effects.
        chat: prompts are a user's messages.
        seed: of splits, nulls and intervals.
        batch_tokens: the most tokens in one batch.
        progress: True for a bar on a terminal, or a function that is called with the number of steps done and in all.

    Returns:
        A `Choice`.

    Raises:
        ValueError: a split is empty, the budget can't be, or the vector doesn't fit.
        TypeError: the pairs are none.
    """
    measure, limit = target_of(None, budget or {"kl_mean": 0.3})
    if measure == "perplexity_ratio":
        raise ValueError("select compares layers by kl_mean or kl_p95; strength_for solves for a perplexity_ratio.")
    check_count(nulls, "nulls", 0)
    given, train, choose, report = _splits(pairs, vector, leave, seed)
    prompts = listed(datasets.neutral(model) if neutral is None else neutral)
    if not prompts:
        raise ValueError("there are no neutral prompts: give at least one.")
    cost = 0
    with reporting(progress, "selecting") as step:
        step(0, 5)
        if vector is None:
            vector = extract(model, train, layers=layers, method=method, read=read, chat=chat, seed=seed, progress=None,
                             batch_tokens=batch_tokens)  # fmt: skip
        wanted = _wanted(model, vector, layers)
        vector.check(model)
        vector.at(wanted, 1.0, at, unit="residual")  # refuse what is missing before anything is measured
        some = _parted(choose)[0]
        looks = separation(model, vector.only(wanted), some, read=read, chat=chat, batch_tokens=batch_tokens)
        cost += _token_count(model, some, chat) * (1 + max(wanted))
        step(1, 5)
        bench = _Bench(model, vector, at, choose, prompts, leave or {}, measure, limit, tokens, chat, batch_tokens,
                       parts=screen)  # fmt: skip
        kept = [layer for layer in wanted if looks[layer] >= max(0.6, max(looks.values()) - 0.3)] or wanted
        kept = kept if screen else wanted
        guesses: dict[int, tuple[float, float]] = {}
        if screen and len(kept) > 2:
            guesses = {layer: bench.tried({layer: 1.0}) for layer in kept}
            kept = sorted(kept, key=lambda layer: -guesses[layer][1])[: max(2, len(wanted) // 8)]
        step(2, 5)
        found = {layer: bench.measured({layer: 1.0}, guesses.get(layer, (None, 0))[0]) for layer in sorted(kept)}
        single = sorted(found.values(), key=lambda one: -one.effect)
        together = bench.combined(single[:2], guesses) if combine and len(single) > 1 else []
        step(3, 5)
        # Several layers have to earn their keep: what one does is easier to understand, and to reproduce.
        better = [one for one in together if one.stage == "measured" and one.effect > 1.05 * abs(single[0].effect)]
        best = better[0] if better else single[0]
        cost += bench.block_tokens
        evidence = _evidence(model, vector, best, at, report, bench, nulls, chat, seed, batch_tokens, step)
    rows = [
        Candidate(
            one.strengths if one else {layer: guesses.get(layer, (np.nan, 0))[0] or np.nan},
            one.effect if one else guesses.get(layer, (0, np.nan))[1],
            one.spent if one else np.nan,
            looks[layer],
            vector.agreement.get(layer, np.nan),
            "measured" if one else "tried" if layer in guesses else "read",
        )
        for layer in wanted
        for one in [found.get(layer)]
    ]
    known = [row for row in rows if not np.isnan(row.effect)]
    correlation = rank_correlation([row.separation for row in known], [row.effect for row in known])
    stages = ("measured", "tried", "read")
    candidates = sorted(
        [*rows, *together],
        key=lambda row: (row.strengths != best.strengths, stages.index(row.stage), -np.nan_to_num(row.effect)),
    )
    warnings = _warnings(vector, best, evidence, measure, limit)
    record = {
        **model.identity, "pairs_name": given.name, "data": given.fingerprint,
        "pairs": given.splits, "vector": vector.fingerprint, "layers": wanted, "leave": sorted(leave or {}),
        "method": vector.info.get("method"), "read": vector.info.get("read"), "at": repr(at), "seed": seed,
        "neutral_prompts": len(prompts), "neutral": hashlib.sha256(repr(prompts).encode()).hexdigest()[:16],
        "tokens": tokens, "mlxsteer": version("mlxsteer"), "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
    }  # fmt: skip
    return Choice(vector, best.strengths, at, (measure, limit), tuple(candidates), evidence, correlation,
                  tuple(warnings), record, cost)  # fmt: skip


def _splits(
    pairs: Iterable[ContrastPair],
    vector: Any,
    leave: Any,
    seed: int,
) -> tuple[PairSet, PairSet, PairSet, PairSet]:
    """All pairs, and those of each split; no train pairs where there is a vector already.

    Raises:
        TypeError: the vector or what is to be left alone is no such thing.
        ValueError: a split is missing or too small.
    """
    if vector is not None and not isinstance(vector, SteeringVector):
        raise TypeError(f"vector is a SteeringVector, not {type(vector).__name__}.")
    if leave is not None and not isinstance(leave, Mapping):
        raise TypeError(
            f"leave names other behaviours' pairs, such as {{'formality': pairs}}, not {type(leave).__name__}."
        )
    given = PairSet(checked(pairs), name=getattr(pairs, "name", ""))
    if not given.splits:
        given = given.with_splits(seed=seed)
    report = given.split("report")
    if len(report) < 2:
        raise ValueError("an interval needs 2 pairs or more, and the report split has 1.")
    return given, given.split("train") if vector is None else PairSet(), given.split("choose"), report


def _wanted(model: InterpretableModel, vector: SteeringVector, layers: str | int | Sequence[int]) -> list[int]:
    if isinstance(layers, str) and layers == "all":
        return list(vector)
    return places(model, vector.site, layers)[1]


def _token_count(model: InterpretableModel, pairs: Iterable[ContrastPair], chat: bool) -> int:
    """Tokens of both sides, for the account of what choosing cost."""
    both = [as_chat(pair) if chat else pair for pair in pairs]
    return sum(len(encode_side(model, pair, side)[0]) for pair in both for side in ("positive", "negative"))


def _parted(values: Sequence[Any]) -> list[list[Any]]:
    """A sixth, but at least four, spread over the whole; and the rest, if there is any."""
    count = min(len(values), max(4, len(values) // 6))
    first = set(np.linspace(0, len(values) - 1, count).round().astype(int).tolist())
    parts = [[value for i, value in enumerate(values) if (i in first) == wanted] for wanted in (True, False)]
    return [part for part in parts if part]


class _Bench:
    """What steering is measured on while a choice is made: all of it, or the first part of it."""

    def __init__(
        self,
        model: InterpretableModel,
        vector: SteeringVector,
        at: At,
        pairs: Sequence[ContrastPair],
        prompts: Sequence[Any],
        leave: Mapping[str, Iterable[ContrastPair]],
        measure: str,
        limit: float,
        tokens: int,
        chat: bool,
        batch_tokens: int,
        *,
        parts: bool,
    ) -> None:
        self.model, self.vector, self.at, self.measure, self.limit = model, vector, at, measure, limit
        options: dict[str, Any] = {"at": at, "chat": chat, "batch_tokens": batch_tokens}
        some_prompts, some_pairs = (_parted(values) if parts else [values] for values in (prompts, pairs))
        self.references = [
            Reference(model, part, tokens=tokens, variants=len(TRIED), **options) for part in some_prompts
        ]
        self.preferences = [Preferences(model, part, **options) for part in some_pairs]
        self.others = [Preferences(model, others, **options) for others in leave.values()]

    @property
    def block_tokens(self) -> int:
        """Tokens times blocks that ran so far."""
        each: list[Reference | Preferences] = [*self.references, *self.preferences, *self.others]
        return sum(one.block_tokens for one in each)

    def divergence(self, edits: Sequence[tuple[Site, Intervention]]) -> Divergence:
        """KL(base ‖ steered) on all neutral text."""
        return Divergence.of(np.concatenate([one.per_token(edits) for one in self.references]))

    def edits(self, strengths: Mapping[int, float], factor: Any) -> list[tuple[Site, Intervention]]:
        made = self.vector.at(dict(strengths), factor, self.at, unit="residual")
        return [(self.model._sites.resolve(key), edit) for key, edit in made.items()]

    def effect(self, strengths: Mapping[int, float]) -> float:
        """Mean shift of the pairs, less what the behaviours to be left alone are moved by."""
        edits = self.edits(strengths, 1.0)
        return self._net(edits, self.preferences)

    def _net(self, edits: Sequence[tuple[Site, Intervention]], on: Sequence[Preferences]) -> float:
        moved = float(np.concatenate([one.under(edits) - one.base for one in on]).mean())
        return moved - sum(abs(float((one.under(edits) - one.base).mean())) for one in self.others)

    def measured(self, relative: Mapping[int, float], first: float | None) -> Candidate:
        """Some layers at the strength that spends the budget, on all the choosing data."""

        def spent(strength: float) -> float:
            return measured(self.divergence(self.edits(relative, strength)), self.measure)

        strongest = STRONGEST / max(relative.values())
        solution: Strength = solved(spent, self.measure, self.limit, strongest=strongest, first=first, tolerance=0.05)
        strengths = {layer: share * solution.value for layer, share in relative.items()}
        return Candidate(strengths, self.effect(strengths), solution.reached, np.nan, np.nan, "measured")

    def combined(self, singles: Sequence[Candidate], guesses: Mapping[int, tuple[float, float]]) -> list[Candidate]:
        """Two layers together, measured if they look better than one of them on some of the data."""
        relative = {layer: strength for one in singles for layer, strength in one.strengths.items()}
        factor: float | None = None
        if guesses:
            factor, effect = self.tried(relative)
            if effect <= 1.05 * max(guesses[layer][1] for layer in relative):
                return [
                    Candidate({k: factor * v for k, v in relative.items()}, effect, np.nan, np.nan, np.nan, "tried")
                ]
        return [self.measured(relative, factor or 0.6)]

    def tried(self, relative: Mapping[int, float]) -> tuple[float, float]:
        """(factor that spends the budget, effect there) of some layers, estimated from two strengths on some data."""

        def make(rows: list[float]) -> list[tuple[Site, Intervention]]:
            return self.edits(relative, rows)

        some, few = self.references[0], self.preferences[0]
        spent = [measured(Divergence.of(row), self.measure) for row in some.dose(make, TRIED)]
        factor = _crossing(TRIED, spent, self.limit)
        return factor, self._net(self.edits(relative, factor), [few])


def _crossing(strengths: Sequence[float], spent: Sequence[float], limit: float) -> float:
    """Where log spent, a line between the points in log strength, meets the limit; slope 2 outside, and not too far."""
    x, y, goal = np.log(strengths), np.log(np.maximum(spent, 1e-12)), np.log(limit)
    above = np.flatnonzero(y > goal)
    if not len(above):
        return float(min(strengths[-1] * np.exp((goal - y[-1]) / 2), STRONGEST, 2 * strengths[-1]))
    k = int(above[0])
    if k == 0:
        return float(strengths[0] * np.exp((goal - y[0]) / 2))
    return float(np.exp(x[k - 1] + (goal - y[k - 1]) / (y[k] - y[k - 1]) * (x[k] - x[k - 1])))


def _evidence(
    model: InterpretableModel,
    vector: SteeringVector,
    best: Candidate,
    at: At,
    report: Sequence[ContrastPair],
    bench: _Bench,
    nulls: int,
    chat: bool,
    seed: int,
    batch_tokens: int,
    step: Step,
) -> Evidence:
    preferences = Preferences(model, report, at=at, chat=chat, variants=len(MULTIPLES), batch_tokens=batch_tokens)
    doses = preferences.dose(lambda rows: bench.edits(best.strengths, rows), MULTIPLES)
    step(4, 5)
    drawn = []
    for draw in range(nulls):
        random = random_like(vector, seed=int(generator(seed, _NULLS, draw).integers(2**62)))
        edits = [(model._sites.resolve(key), edit)
                 for key, edit in random.at(best.strengths, at=at, unit="residual").items()]  # fmt: skip
        drawn.append(float((preferences.under(edits) - preferences.base).mean()))
    shift = doses[MULTIPLES.index(1.0)] - preferences.base
    order = np.argsort([*MULTIPLES, 0.0])
    curve = steerability(np.array([*doses, preferences.base])[order], np.array([*MULTIPLES, 0.0])[order].tolist(),
                         seed=seed)  # fmt: skip
    step(5, 5)
    return Evidence(
        bootstrap(shift, seed=seed),
        bootstrap(doses[MULTIPLES.index(-1.0)] - preferences.base, seed=seed),
        float(preferences.base.mean()),
        curve,
        tuple(drawn),
        null_p_value(float(shift.mean()), drawn) if drawn else float("nan"),
        bench.divergence(bench.edits(best.strengths, 1.0)),
        len(report),
    )


def _warnings(vector: SteeringVector, best: Candidate, found: Evidence, measure: str, limit: float) -> list[str]:
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
