"""Which layer, how strongly: chosen on one part of the data, reported on another, against what chance does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np

from mlxsteer import datasets
from mlxsteer.choice import Candidate, Choice, Evidence, doubts_about_pairs, warnings_of
from mlxsteer.extraction import extract, separation
from mlxsteer.interventions.base import Intervention
from mlxsteer.measures.divergence import Divergence, Reference, listed
from mlxsteer.measures.effect import rank_correlation, steerability
from mlxsteer.measures.nulls import null_p_value, random_like
from mlxsteer.measures.preference import Preferences
from mlxsteer.measures.uncertainty import bootstrap, generator
from mlxsteer.model import InterpretableModel
from mlxsteer.pairs import PAIR_HASHES, ContrastPair, PairSet, checked, pairs_seen, shared_by_splits
from mlxsteer.positions import At
from mlxsteer.progress import Step, reporting
from mlxsteer.questions import check_count
from mlxsteer.reading import Read, as_chat, encode_side
from mlxsteer.sites import Site
from mlxsteer.strength import Strength, measured, solved, target_of
from mlxsteer.sweep import chosen_layers
from mlxsteer.vectors import SteeringVector

__all__ = ["Candidate", "Choice", "Evidence", "select"]

TRIED = (0.7, 2.5)
"""Strengths of the first look, in residual norms: less than the stream itself, and more."""

GLANCE, FIRST = 2, 4
"""Tokens of each neutral continuation (or a sixth of them), and of each completion, that the first look is at."""

STRONGEST = 10.0
"""Residual norms: a budget that isn't spent by then isn't what limits."""

_NULLS = 20_241
"""Key of the nulls' draws, so that they are no one else's: a random vector is to be held against others."""

MULTIPLES = (-1.0, -0.5, 0.5, 1.0)
"""Of the chosen strength, for the dose–response that is reported."""


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
    budget. All are read from outside first (separation), then tried on the first tokens of every text; the
    best are measured on all of them, alone and together.

    Args:
        model: the model.
        pairs: contrast pairs with completions; where they have no splits, they are split by chance.
        vector: a vector that is there already; it must not come from the choose or report pairs. Of a vector that says
            which pairs it was computed from, the warnings say how many of these it has seen.
        budget: ``{"kl_mean": …}`` or ``{"kl_p95": …}``, mean or 95th percentile over tokens of KL(base ‖ steered) on
            neutral text in nats, met to 5 %; ``{"kl_mean": 0.3}`` unless given. No strength is above 10 residual norms.
        neutral: prompts to measure side effects on; `datasets.neutral` for the model unless given.
        layers: which layers are considered, negative ones counted from the model's last.
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
        KeyError: the given vector lacks a layer.
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
            wanted = list(vector)
        else:
            vector.check(model)
            wanted = chosen_layers(model, vector, layers)
        vector.at(wanted, 1.0, at, unit="residual")  # refuse what is missing before anything is measured
        some = _parted(choose, max(4, len(choose) // 6))[0]
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
            kept = bench.promising(guesses, max(2, len(wanted) // 8))
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
        replace(found[layer], separation=looks[layer], agreement=vector.agreement.get(layer, np.nan))
        if layer in found
        else _glanced(layer, guesses.get(layer), looks[layer], vector)
        for layer in wanted
    ]
    known = [row for row in rows if not np.isnan(row.effect)]
    correlation = rank_correlation([row.separation for row in known], [row.effect for row in known])
    stages = ("measured", "tried", "read")
    candidates = sorted(
        [*rows, *together],
        key=lambda row: (row.strengths != best.strengths, stages.index(row.stage), -np.nan_to_num(row.effect)),
    )
    held_out = {"choose": choose, "report": report}
    seen = {split: (pairs_seen(vector.info.get(PAIR_HASHES), part), len(part)) for split, part in held_out.items()}
    warnings = doubts_about_pairs(seen, shared_by_splits(given)) + warnings_of(vector, best, evidence, measure, limit)
    record = {
        **model.identity, "pairs_name": given.name, "data": given.fingerprint,
        "pairs": given.splits, "vector": vector.fingerprint, "layers": wanted, "leave": sorted(leave or {}),
        "pairs_seen": {split: "unknown" if count is None else count for split, (count, _) in seen.items()},
        "method": vector.info.get("method"), "read": vector.info.get("read"), "at": repr(at), "seed": seed,
        "neutral_prompts": len(prompts), "neutral": hashlib.sha256(repr(prompts).encode()).hexdigest()[:16],
        "tokens": tokens, "mlxsteer": version("mlxsteer"), "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
    }  # fmt: skip
    return Choice(vector, best.strengths, at, (measure, limit), tuple(candidates), evidence, correlation,
                  tuple(warnings), record, cost)  # fmt: skip


def _glanced(layer: int, guess: tuple[float, float] | None, looks: float, vector: SteeringVector) -> Candidate:
    """A layer that wasn't measured on all the choosing data: tried at a few strengths, or only read."""
    factor, effect = guess or (np.nan, np.nan)
    stage = "tried" if guess else "read"
    return Candidate({layer: factor or np.nan}, effect, np.nan, looks, vector.agreement.get(layer, np.nan), stage)


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


def _token_count(model: InterpretableModel, pairs: Iterable[ContrastPair], chat: bool) -> int:
    """Tokens of both sides, for the account of what choosing cost."""
    both = [as_chat(pair) if chat else pair for pair in pairs]
    return sum(len(encode_side(model, pair, side)[0]) for pair in both for side in ("positive", "negative"))


def _parted(values: Sequence[Any], count: int) -> list[list[Any]]:
    """So many values, spread over the whole; and the rest, if there is any."""
    first = set(np.linspace(0, len(values) - 1, min(count, len(values))).round().astype(int).tolist())
    parts = [[value for i, value in enumerate(values) if (i in first) == wanted] for wanted in (True, False)]
    return [part for part in parts if part]


def _looked_at(model: InterpretableModel, pairs: Sequence[ContrastPair], chat: bool) -> int:
    """How many pairs a first look takes: their first tokens are a sixth of all there are, and at least six pairs."""
    texts = [encode_side(model, as_chat(pair) if chat else pair, "positive") for pair in pairs]
    lengths = np.array([len(tokens) - prompt for tokens, prompt in texts])
    return max(6, int(len(pairs) * lengths.mean() / 6 / np.minimum(lengths, FIRST).mean()))


def _of_one_length(model: InterpretableModel, pairs: Sequence[ContrastPair], chat: bool) -> list[list[ContrastPair]]:
    """Pairs in groups with prompts of nearly one length: in a look at a few tokens, padding would be most of it."""
    lengths = [encode_side(model, as_chat(pair) if chat else pair, "positive")[1] for pair in pairs]
    found: list[list[int]] = []
    for i in sorted(range(len(pairs)), key=lengths.__getitem__):
        if not found or lengths[i] > lengths[found[-1][0]] + 1:
            found.append([])
        found[-1].append(i)
    return [[pairs[i] for i in group] for group in found]


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
        self.reference = Reference(model, prompts, tokens=tokens, variants=len(TRIED), **options)
        split: list[Sequence[ContrastPair]] = [pairs]
        looked = 1
        if parts:
            first, *rest = _parted(pairs, _looked_at(model, pairs, chat))
            alike = _of_one_length(model, first, chat)
            looked, split = len(alike), [*alike, *rest]
        self.preferences = [Preferences(model, part, **options) for part in split]
        self.others = [Preferences(model, others, **options) for others in leave.values()]
        # The first look is at the first tokens behind every prompt, and of as many completions as may be: texts differ
        # more in how much they are moved than tokens do, and where one token is steered, most of it shows at once.
        self.glance, self.first, self.first_others = self.reference, self.preferences, self.others
        if parts and tokens > GLANCE:
            self.glance = self.reference.shortened(max(GLANCE, tokens // 6))
        if parts:
            self.first = [one.shortened(FIRST) for one in self.preferences[:looked]]
            self.first_others = [others.shortened(FIRST) for others in self.others]
        self._longer: float | None = None
        self._slopes: dict[tuple[int, ...], float] = {}  # of log spent over log strength
        self._corrected: set[int] = set()
        self._spent: dict[Any, float] = {}

    @property
    def block_tokens(self) -> int:
        """Tokens times blocks that ran so far."""
        each: list[Reference | Preferences] = [self.reference, *self.preferences, *self.others]
        each += [self.glance, *self.first, *self.first_others]
        return sum(one.block_tokens for one in {id(one): one for one in each}.values())

    def divergence(self, edits: Sequence[tuple[Site, Intervention]]) -> Divergence:
        """KL(base ‖ steered) on all neutral text."""
        return Divergence.of(self.reference.per_token(edits))

    def spent(self, relative: Mapping[int, float], factor: float) -> float:
        """What some layers' strengths times a factor spend of the budget, on all neutral text; each is run once."""
        name = (*relative.items(), factor)
        if name not in self._spent:
            self._spent[name] = measured(self.divergence(self.edits(relative, factor)), self.measure)
        return self._spent[name]

    def edits(self, strengths: Mapping[int, float], factor: Any) -> list[tuple[Site, Intervention]]:
        made = self.vector.at(dict(strengths), factor, self.at, unit="residual")
        return [(self.model._sites.resolve(key), edit) for key, edit in made.items()]

    def effect(self, strengths: Mapping[int, float]) -> float:
        """Mean shift of the pairs, less what the behaviours to be left alone are moved by."""
        return _net(self.edits(strengths, 1.0), self.preferences, self.others)

    def measured(self, relative: Mapping[int, float], first: float | None) -> Candidate:
        """Some layers at the strength that spends the budget, on all the choosing data."""

        def spent(strength: float) -> float:
            return self.spent(relative, strength)

        strongest = STRONGEST / max(relative.values())
        solution: Strength = solved(spent, self.measure, self.limit, strongest=strongest, first=first, tolerance=0.05)
        strengths = {layer: share * solution.value for layer, share in relative.items()}
        return Candidate(strengths, self.effect(strengths), solution.reached, np.nan, np.nan, "measured")

    def combined(self, singles: Sequence[Candidate], guesses: Mapping[int, tuple[float, float]]) -> list[Candidate]:
        """Two layers together, measured if they look better than one of them on some of the data."""
        relative = {layer: strength for one in singles for layer, strength in one.strengths.items()}
        factor: float | None = None
        if guesses:
            enough = 1.1 * max(guesses[layer][1] for layer in relative)
            factor, effect = self.tried(relative)
            if effect > enough:
                factor, effect = self.corrected(relative, factor, effect)
            if effect <= enough:
                return [
                    Candidate({k: factor * v for k, v in relative.items()}, effect, np.nan, np.nan, np.nan, "tried")
                ]
        return [self.measured(relative, factor or 0.6)]

    def tried(self, relative: Mapping[int, float]) -> tuple[float, float]:
        """(factor that spends the budget, effect there) of some layers, estimated from two strengths on some data."""

        def make(rows: list[float]) -> list[tuple[Site, Intervention]]:
            return self.edits(relative, rows)

        seen = [measured(Divergence.of(row), self.measure) for row in self.glance.dose(make, TRIED)]
        low, high = np.log(np.maximum(seen, 1e-12))
        self._slopes[tuple(relative)] = float(np.clip((high - low) / np.log(TRIED[1] / TRIED[0]), 0.7, 2.0))
        factor = _crossing(TRIED, [self._whole(spent) for spent in seen], self.limit)
        return factor, _net(self.edits(relative, factor), self.first, self.first_others)

    def corrected(self, relative: Mapping[int, float], factor: float, effect: float) -> tuple[float, float]:
        """The same two, once all neutral text has said what the factor really spends."""
        spent = max(self.spent(relative, factor), 1e-12)
        if abs(spent - self.limit) <= 0.05 * self.limit:
            return factor, effect
        step = (self.limit / spent) ** (1 / self._slopes[tuple(relative)])
        factor = min(factor * float(np.clip(step, 0.5, 2.0)), STRONGEST / max(relative.values()))
        return factor, _net(self.edits(relative, factor), self.first, self.first_others)

    def promising(self, guesses: dict[int, tuple[float, float]], count: int) -> list[int]:
        """The layers that are worth measuring on everything, the best first; what is guessed of them is corrected.

        A guess may take a layer for stronger than it is, where it spends more than it seems to: the best ones are
        looked at again, and one that then looks clearly worse than the best isn't worth it.
        """
        kept: list[int] = []
        while len(kept) < min(count, len(guesses)):
            layer = max((layer for layer in guesses if layer not in kept), key=lambda layer: guesses[layer][1])
            if kept and guesses[layer][1] < 0.95 * guesses[kept[0]][1]:
                break
            if layer in self._corrected:
                kept.append(layer)
            else:
                self._corrected.add(layer)
                guesses[layer] = self.corrected({layer: 1.0}, *guesses[layer])
        return kept

    def _whole(self, glanced: float) -> float:
        """What the first tokens say is spent, as all tokens would say it: in the ratio that one late layer has."""
        if self.glance is self.reference:
            return glanced
        if self._longer is None:
            layers = self.vector.layers
            late = {layers[3 * len(layers) // 4]: 1.0}  # where few blocks are left to run
            edits = self.edits(late, TRIED[1])
            whole, first = (measured(Divergence.of(one.per_token(edits)), self.measure)
                            for one in (self.reference, self.glance))  # fmt: skip
            self._longer = whole / first if first else 1.0
        return glanced * self._longer


def _net(edits: Sequence[tuple[Site, Intervention]], on: Sequence[Preferences], others: Sequence[Preferences]) -> float:
    """Mean shift of some pairs, less what each of the other behaviours is moved by."""
    moved = float(np.concatenate([one.under(edits) - one.base for one in on]).mean())
    return moved - sum(abs(float((one.under(edits) - one.base).mean())) for one in others)


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
