"""From contrast pairs, or two sets of texts, to linear probes: one split to fit, one to choose, one to report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from mlxsteer.contrast import Contrast, of_pairs, of_sides, places
from mlxsteer.directions import Readings, check_scikit_learn, discriminant, logistic
from mlxsteer.extraction import auroc, batches_of, projected, read_the_same, said_of
from mlxsteer.interventions.base import number
from mlxsteer.measures.detection import (
    auroc_interval,
    balanced_accuracy,
    best_threshold,
    hit_scores,
    permuted_aurocs,
    platt,
    sigmoid,
)
from mlxsteer.measures.nulls import null_p_value
from mlxsteer.measures.uncertainty import generator
from mlxsteer.model import InterpretableModel
from mlxsteer.moments import Moments
from mlxsteer.pairs import (
    ContrastPair,
    PairSet,
    check_seed,
    check_switch,
    checked,
    counted,
    hint,
    pair_hashes,
    shared_by_splits,
)
from mlxsteer.probes import LayerProbe, Probe, area_of
from mlxsteer.progress import Step, reporting
from mlxsteer.questions import check_count
from mlxsteer.reading import (
    Read,
    Reader,
    bos_of,
    check_budget,
    check_completions,
    check_finite,
    check_model,
    check_progress,
    check_read,
    encode_pairs,
    encode_texts,
    reading,
)
from mlxsteer.sites import Site

Array = np.ndarray[Any, Any]
Method = Literal["logistic", "lda", "mean_difference"]
Goal = Literal["balanced_accuracy", "f1"]

METHODS = ("logistic", "lda", "mean_difference")
GOALS = ("balanced_accuracy", "f1")
_FEW, _FEW_TO_CHOOSE = 30, 10
"""Fewer held-out pairs leave a wide interval; on fewer, a threshold and the layer are chosen by chance."""


def probe(
    model: InterpretableModel,
    pairs: Iterable[ContrastPair] | None = None,
    *,
    positive: Iterable[Any] | None = None,
    negative: Iterable[Any] | None = None,
    method: Method = "logistic",
    layers: str | int | Sequence[int] = "all",
    site: str = "residual",
    read: Read = "last",
    chat: bool = False,
    C: float | None = None,  # noqa: N803 - scikit-learn's name
    shrinkage: float | None = None,
    goal: Goal = "balanced_accuracy",
    nulls: int = 200,
    seed: int = 0,
    batch_tokens: int = 4096,
    progress: bool | Step | None = True,
) -> Probe:
    """Fit a linear probe at each layer: does a direction tell the two sides of pairs, or of two sets of texts, apart?

    Directions are fitted to the train split; the layer, the threshold and the calibration are chosen on the choose
    split; AUROC, accuracy and Brier score are those of the report split. A pair lies in one of them as a whole, with
    all that share its prompt or a text. Alain & Bengio 2016, Understanding intermediate layers using linear classifier
    probes, arXiv 1610.01644. That a behaviour is readable doesn't say that the model uses it: Belinkov 2022, Probing
    classifiers, Computational Linguistics 48(1).

    - ``"logistic"``: logistic regression, L2-regularised; needs scikit-learn.
    - ``"lda"``: linear discriminant analysis, ``w = Σ_s⁻¹ (μ₊ − μ₋)`` with the covariance Σ_s shrunk towards a multiple
      of the identity (Fisher 1936).
    - ``"mean_difference"``: ``w = μ₊ − μ₋``, the mass-mean probe (Marks & Tegmark 2023, arXiv 2310.06824).

    The last two have ``b = −w·(μ₊ + μ₋)/2``.

    Args:
        model: the model.
        pairs: contrast pairs; without splits they are put into some by `seed` (0.5 : 0.2 : 0.3).
        positive, negative: in place of pairs, two lists of texts (or token ids, or chats) that don't come in pairs, 6
            of each at least; each is split likewise.
        method: ``"logistic"``, ``"lda"`` or ``"mean_difference"``.
        layers: ``"all"``, a layer, or several.
        site: ``"residual"``, ``"attn"``, ``"mlp"``, or a key with ``{layer}`` in it.
        read: which token of each text, as in `extract`.
        chat: prompts are a user's messages, also in pairs that don't say so.
        C: the inverse strength of the penalty, for ``"logistic"``; 1 unless told.
        shrinkage: how far Σ is shrunk, above 0 and at most 1, for ``"lda"``; 0.1 unless told.
        goal: the threshold is that of the highest ``"balanced_accuracy"`` or ``"f1"``.
        nulls: how many permutations of the report split's labels chance is told by; 0 for none.
        seed: of splits, intervals and permutations.
        batch_tokens: the most tokens in one batch, padding included.
        progress: as in `extract`.

    Returns:
        A `Probe`.

    Raises:
        ImportError: there is no scikit-learn, and the method is ``"logistic"``.
        TypeError: no model; the texts come in no way that is known, or in both.
        ValueError: no such method, layer or goal; an option of another method; too few pairs or texts; nothing to read
            in one; both sides read the same; activations are NaN.
        UnknownKey: no such place.
    """
    check_model(model)
    check_progress(progress)
    check_read(read)
    check_switch("chat", chat)
    check_budget(batch_tokens)
    check_seed(seed)
    check_count(nulls, "nulls", 0)
    for name, value, known in (("method", method, METHODS), ("goal", goal, GOALS)):
        if value not in known:
            raise ValueError(f"{name} is one of {', '.join(known)}, not {value!r}.{hint(value, known)}")
    strength = _strength(method, C, shrinkage)
    template, numbers, sites = places(model, site, layers)
    if method == "logistic":
        check_scikit_learn("method='logistic' (not 'lda' or 'mean_difference')")
    splits, doubts, told = _split(model, pairs, positive, negative, chat, read, seed)
    with reporting(progress, "reading") as step:
        readings, norms = _train(
            model, sites, splits["train"], read, method != "mean_difference", batch_tokens, seed, step
        )
    weights, intercepts = zip(*(_fitted(readings, i, method, strength) for i in range(len(numbers))), strict=True)
    flat = [n for n, w in zip(numbers, weights, strict=True) if not w.any()]
    if flat:
        raise ValueError(f"both sides read the same at layer {flat[0]}: there is nothing to tell apart.")
    directions = [mx.array(w.astype(np.float32)) for w in weights]
    by_key = {place.key: w for place, w in zip(sites, directions, strict=True)}
    held = {}
    for name in ("choose", "report"):
        sides = splits[name]
        scores = projected(model, by_key, sides, read, batch_tokens) + np.array(intercepts)[:, None]
        held[name] = scores[:, : sides.positives], scores[:, sides.positives :]
    gaps = [float(w @ d) for w, d in zip(weights, readings.difference, strict=True)]
    matched = splits["report"].partners is not None
    drawn = permuted_aurocs(*held["report"], matched=matched, draws=nulls, seed=seed) if nulls else None
    made = {}
    for i, layer in enumerate(numbers):
        some = {name: (sides[0][i], sides[1][i]) for name, sides in held.items()}
        chance = None if drawn is None else drawn[:, i]
        made[layer] = _judged(directions[i], float(intercepts[i]), gaps[i], some, chance, goal, matched, seed)
    apart = [_apart(held["choose"][0][i], held["choose"][1][i]) for i in range(len(numbers))]
    order = sorted(range(len(numbers)), key=lambda i: (-round(made[numbers[i]].chosen_by, 9), -apart[i]))
    best = numbers[order[0]]
    doubts += _doubts(made[best], splits, nulls)
    info = {
        **model.identity, "hidden_size": int(directions[0].size), "layers": len(model.layers),
        "method": f"probe: {method}", "read": said_of(read), **({"chat": True} if chat else {}),
        **({"C": strength} if method == "logistic" else {"shrinkage": strength} if method == "lda" else {}),
        **{name: _counted(sides) for name, sides in splits.items()}, "goal": goal, "nulls": nulls, "seed": seed,
        "data": splits["train"].hash, **told, "mlxsteer": version("mlxsteer"),
    }  # fmt: skip
    kept = {layer: float(norm) for layer, norm in zip(numbers, norms, strict=True) if norm > 0}
    return Probe(made, best, template, method, kept, tuple(doubts), info)


def _strength(method: str, C: Any, shrinkage: Any) -> float:  # noqa: N803
    """The regularisation of a method; an option of another one would be heard by nobody."""
    for name, value, own in (("C", C, "logistic"), ("shrinkage", shrinkage, "lda")):
        if value is not None and method != own:
            raise ValueError(f"{name}= is for method={own!r}, and this is {method!r}.")
    if method == "lda":
        s = number(0.1 if shrinkage is None else shrinkage, "shrinkage")
        if not 0 < s <= 1:
            raise ValueError(f"shrinkage is above 0 and at most 1, not {s}.")
        return s
    c = number(1.0 if C is None else C, "C")
    if c <= 0:
        raise ValueError(f"C is above 0, not {c}.")
    return c


def _split(
    model: InterpretableModel, pairs: Any, positive: Any, negative: Any, chat: bool, read: Read, seed: int
) -> tuple[dict[str, Contrast], list[str], dict[str, Any]]:
    """The three splits as tokens, what is doubtful about them, and what to keep of the pairs."""
    sides = positive is not None or negative is not None
    if (pairs is not None) == sides or (sides and (positive is None or negative is None)):
        raise TypeError("probe takes pairs, or positive= and negative= together.")
    if sides:
        return *_split_sides(model, positive, negative, chat, seed), {}
    given = PairSet(checked(pairs))
    own = bool(given.splits)
    given = given if own else given.with_splits(seed=seed)
    found = {"train": of_pairs(model, given, chat, read)}
    for name in ("choose", "report"):
        chosen = given.split(name)
        check_completions(read, given, chosen)
        encoded = encode_pairs(model, given, chosen, chat)
        n = len(encoded)
        found[name] = Contrast([pair[i] for i in (0, 1) for pair in encoded], n, [(i, i + n) for i in range(n)])
    for name, one in found.items():
        if one.positives < 2:
            raise ValueError(f"a probe needs at least 2 pairs in every split, and there is 1 in {name!r}.")
    doubts = []
    copies, beside = shared_by_splits(given)
    if copies or beside:
        doubts.append(
            f"{counted(copies, 'pair')} lie in several splits, and {beside} others share a prompt across them: "
            "held-out numbers are too good. PairSet.with_splits keeps such pairs together."
        )
    return found, doubts, pair_hashes(given.split("train"))


def _split_sides(
    model: InterpretableModel, positive: Any, negative: Any, chat: bool, seed: int
) -> tuple[dict[str, Contrast], list[str]]:
    doubts, parts = [], []
    for row, (name, texts) in enumerate((("positive", positive), ("negative", negative))):
        encoded = encode_texts(model, texts, f"{name}=", chat=chat)
        single = list({tuple(text.tokens): text for text in encoded}.values())
        if len(single) < len(encoded):
            doubts.append(f"{len(encoded) - len(single)} of {len(encoded)} {name} texts are copies, and left out.")
        if len(single) < 6:
            raise ValueError(f"{name}=: a probe takes at least 6 different texts of a side, not {len(single)}.")
        order = generator(seed, 2 + row).permutation(len(single))
        choose = max(2, round(0.2 * len(single)))
        report = max(2, round(0.3 * len(single)))
        cuts = [len(single) - choose - report, len(single) - report]
        parts.append([[single[i] for i in part] for part in np.split(order, cuts)])
    both = {tuple(t.tokens) for part in parts[0] for t in part} & {tuple(t.tokens) for part in parts[1] for t in part}
    if both:
        raise ValueError(f"{counted(len(both), 'text')} lie on both sides: there is no contrast.")
    names = ("train", "choose", "report")
    return {name: of_sides(a, b) for name, a, b in zip(names, *parts, strict=True)}, doubts


def _train(
    model: InterpretableModel, sites: Sequence[Site], sides: Contrast, read: Read, rows: bool, batch_tokens: int,
    seed: int, step: Step,
) -> tuple[Readings, Array]:  # fmt: skip
    """What is read of the train split, and the layers' median norms."""
    bos = bos_of(model)
    weights = [reading(read, text, bos) for text in sides.texts]
    if read_the_same(sides, weights):
        raise ValueError(
            f"both sides of every pair read the same: read={said_of(read)!r} lies in what they share; read='last' lies "
            "behind it."
        )
    reader = Reader(model, sites, norms=True)
    sums = Moments(sides, rows=rows, seed=seed)
    done = 0
    for batch in batches_of(sides, weights, batch_tokens):
        sums.add(batch, *reader(sides.texts, weights, batch))
        done += len(batch.texts)
        step(done, len(sides.texts))
    check_finite(sites, sums.finite())
    return sums.readings(None, seed), sums.median_norms()


def _fitted(readings: Readings, i: int, method: str, strength: float) -> tuple[Array, float]:
    """w and b of one layer."""
    if method == "logistic":
        return logistic(readings.rows[0][:, i], readings.rows[1][:, i], strength)
    weights = readings.difference[i]
    if method == "lda" and weights.any():
        weights = discriminant(readings.rows[0][:, i], readings.rows[1][:, i], weights, strength)
    return weights, float(-weights @ readings.means[:, i].mean(axis=0))


def _judged(
    direction: mx.array, intercept: float, gap: float, held: dict[str, tuple[Array, Array]], drawn: Array | None,
    goal: Goal, matched: bool, seed: int,
) -> LayerProbe:  # fmt: skip
    """One layer's probe, with its choices on the choose split and its numbers on the report split."""
    _, threshold, *_ = best_threshold(*held["choose"], goal=goal, signs=(">",))
    slope, offset = platt(*held["choose"])
    above, below = held["report"]
    opened, wrongly = above > threshold, below > threshold
    chances = [sigmoid(slope * scores + offset) for scores in (above, below)]
    area = auroc_interval(above, below, matched=matched, seed=seed)
    return LayerProbe(
        direction, intercept, area, auroc(*held["choose"]), threshold, slope, offset,
        balanced_accuracy(opened, wrongly), hit_scores(opened, wrongly)[0],
        float((np.mean((1 - chances[0]) ** 2) + np.mean(chances[1] ** 2)) / 2), gap,
        None if drawn is None else null_p_value(area.value, drawn.tolist()),
        None if drawn is None else (float(np.quantile(drawn, 0.025)), float(np.quantile(drawn, 0.975))),
    )  # fmt: skip


def _apart(positive: Array, negative: Array) -> float:
    """The sides' mean difference in standard deviations within them."""
    spread = math.sqrt((positive.var() + negative.var()) / 2)
    return float((positive.mean() - negative.mean()) / max(spread, 1e-30))


def _counted(sides: Contrast) -> str:
    if sides.partners is not None:
        return counted(sides.positives, "pair")
    return f"{sides.positives} + {counted(len(sides.texts) - sides.positives, 'text')}"


def _fewer(sides: Contrast) -> int:
    return min(sides.positives, len(sides.texts) - sides.positives)


def _doubts(best: LayerProbe, splits: dict[str, Contrast], nulls: int) -> list[str]:
    said = []
    report, choose = splits["report"], splits["choose"]
    if best.p is not None and best.p > 0.05:
        said.append(
            f"the best layer's AUROC, {best.auroc.value:.2f}, is what permuted labels give too (p = {best.p:.2f} of "
            f"{nulls} permutations): nothing here says that it tells the sides apart."
        )
    elif not best.auroc.excludes(0.5):
        said.append(f"the interval of the best layer's AUROC, {area_of(best)}, holds 0.5, which is chance.")
    if _fewer(report) < _FEW:
        said.append(f"held-out numbers are those of {_counted(report)}, and uncertain: {_FEW} a side are few.")
    if _fewer(choose) < _FEW_TO_CHOOSE:
        said.append(f"layer, threshold and calibration were chosen on {_counted(choose)}, where they differ by chance.")
    if best.brier > 0.25:
        said.append(f"the probabilities are worse than saying one half (Brier score {best.brier:.2f}).")
    return said
