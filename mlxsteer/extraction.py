"""From contrast pairs to a steering vector: one pass over the model, all layers at once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np

from mlxsteer import directions
from mlxsteer.budget import Estimate, check_limit, check_memory, estimated
from mlxsteer.contrast import Contrast, contrast, places
from mlxsteer.directions import Compute, Method, Readings, check_scikit_learn, single
from mlxsteer.model import InterpretableModel
from mlxsteer.moments import Moments
from mlxsteer.pairs import ContrastPair, check_seed, check_switch, checked, in_split, pair_hashes
from mlxsteer.progress import Step, reporting
from mlxsteer.reading import (
    Batch,
    Read,
    Reader,
    Text,
    bos_of,
    check_budget,
    check_completions,
    check_finite,
    check_model,
    check_progress,
    check_read,
    check_widths,
    encode_pairs,
    encode_texts,
    pair_batches,
    reading,
    single_batches,
)
from mlxsteer.sites import Site
from mlxsteer.vectors import SteeringVector


def extract(
    model: InterpretableModel,
    pairs: Iterable[ContrastPair] | None = None,
    *,
    positive: Iterable[Any] | None = None,
    negative: Iterable[Any] | None = None,
    texts: Iterable[Any] | None = None,
    labels: Iterable[bool | int] | None = None,
    background: Iterable[Any] | None = None,
    method: str | Compute = "mean_difference",
    layers: str | int | Sequence[int] = "all",
    site: str = "residual",
    read: Read = "last",
    chat: bool = False,
    batch_tokens: int = 4096,
    memory: int | None = None,
    seed: int = 0,
    progress: bool | Step | None = True,
) -> SteeringVector:
    """Compute a steering vector from contrast pairs, from two sets of texts, or from labelled texts.

    By default the mean difference of the two sides (contrastive activation addition, Rimsky et al. 2024, arXiv
    2312.06681): ``v_l = mean_i [h_l(p_i, positive_i) − h_l(p_i, negative_i)]``, with h_l the residual stream after
    block l. All layers are read in one pass: what the two sides of a pair share runs once, the blocks behind the last
    layer asked for and the head never run, and sums are kept in place of activations.

    Args:
        model: the model.
        pairs: contrast pairs; where they have splits, the ``"train"`` ones are used.
        positive, negative: in place of pairs, two lists of texts (or token ids, or chats) that don't come in pairs.
            ``"mean_centred"`` needs no negative one.
        texts, labels: in place of pairs, texts with True or 1 for the positive side, False or 0 for the negative.
        background: a set of texts, for ``"mean_centred"``.
        method: one of `directions.available()`, or a callable `directions.Readings` → (layers, D).
        layers: ``"all"``, a layer, or several.
        site: ``"residual"``, ``"attn"``, ``"mlp"``, or a key with ``{layer}`` in it.
        read: which token of each text: ``"last"``; ``"first"`` or ``"mean"`` of the completion; ``"all"`` (the mean
            over every token but BOS); an index (-2 for the letter in ``" (A)"``); or a callable from token ids to one
            index or several. ``"single"`` reads every position, and takes no other.
        chat: prompts are a user's messages, also in pairs that don't say so.
        batch_tokens: the most tokens in one batch, padding included. A batch holds at least one pair, or one text of
            those that don't come in pairs, whatever the budget; ``"single"`` is one batch.
        memory: the most bytes to take; all that is free unless told.
        seed: for methods that draw at random, and for the halvings of the reliability.
        progress: True for a bar on a terminal, or a function that is called with the number of texts done and in all.

    Returns:
        A `SteeringVector` with one direction per layer, float32, the layers' median norms, and in `info` where it comes
        from: model, quantization, method, data; and per layer the `agreement` of the pairs' differences and the
        split-half `reliability`.

    Raises:
        TypeError: no model; the texts come in no way that is known; a switch is neither True nor False.
        ValueError: no such method or layer; nothing to read in a text; a method that needs pairs or a background set;
            the layers' places differ in width; activations are NaN; the direction is zero at every layer, because
            both sides read the same.
        UnknownKey: no such place.
        MemoryError: a batch would not fit; the message says which `batch_tokens` does.

    Warns:
        UserWarning: pairs without a split are left out, beside others that are in ``"train"``.
    """
    check_progress(progress)
    run, found = _planned(
        model, pairs, positive, negative, texts, labels, background, method, layers, site, read, chat, batch_tokens,
        memory, seed,
    )  # fmt: skip
    if run.method.name == "probe":
        check_scikit_learn("method='probe'")
    check_memory(found, run.method, batch_tokens, memory)
    with reporting(progress, "reading") as step:
        rows, norms, measured = (_by_position if run.method.compute is single else _by_side)(model, run, seed, step)
    return SteeringVector(
        dict(zip(run.layers, rows, strict=True)),
        site=run.site,
        residual_norms={layer: float(norm) for layer, norm in zip(run.layers, norms, strict=True) if norm > 0},
        info=_info(model, run, read, chat, rows.shape[-1]) | measured,
    )


def estimate(
    model: InterpretableModel,
    pairs: Iterable[ContrastPair] | None = None,
    *,
    positive: Iterable[Any] | None = None,
    negative: Iterable[Any] | None = None,
    texts: Iterable[Any] | None = None,
    labels: Iterable[bool | int] | None = None,
    background: Iterable[Any] | None = None,
    method: str | Compute = "mean_difference",
    layers: str | int | Sequence[int] = "all",
    site: str = "residual",
    read: Read = "last",
    chat: bool = False,
    batch_tokens: int = 4096,
    memory: int | None = None,
    seed: int = 0,
) -> Estimate:
    """What `extract` with the same arguments would take, without running the model; it refuses what `extract` does.

    Returns:
        An `Estimate`: texts, tokens, batches, bytes, and the `largest_budget`, which is the largest `batch_tokens` that
        the free memory (or `memory`) has room for.
    """
    return _planned(
        model, pairs, positive, negative, texts, labels, background, method, layers, site, read, chat, batch_tokens,
        memory, seed,
    )[1]  # fmt: skip


@dataclass(frozen=True)
class _Run:
    """All that an extraction runs, before it does.

    Attributes:
        method: the method.
        site, layers, places: the key template, the layers, and their places.
        sides: what is contrasted.
        texts: the texts of both sides, then those of the background.
        weights: how much each token of each text counts.
        batches: the batches of the sides.
        behind: the batches of the background.
        seen: hashes of the pairs, to tell later whether a vector is tried on what it was computed from.
    """

    method: Method
    site: str
    layers: list[int]
    places: list[Site]
    sides: Contrast
    texts: list[Text]
    weights: list[np.ndarray[Any, Any]]
    batches: list[Batch]
    behind: list[Batch]
    seen: dict[str, str]

    @property
    def background(self) -> int:
        """Number of texts of the background."""
        return len(self.texts) - len(self.sides.texts)


def _planned(
    model: InterpretableModel,
    pairs: Any,
    positive: Any,
    negative: Any,
    texts: Any,
    labels: Any,
    background: Any,
    method: str | Compute,
    layers: Any,
    site: str,
    read: Read,
    chat: bool,
    batch_tokens: int,
    memory: int | None,
    seed: int,
) -> tuple[_Run, Estimate]:
    """What an extraction runs and takes; whatever is wrong is refused here, before any compute."""
    check_model(model)
    check_read(read)
    check_switch("chat", chat)
    check_budget(batch_tokens)
    check_limit(memory)
    check_seed(seed)
    template, numbers, sites = places(model, site, layers)
    chosen = directions.find(method)
    if chosen.compute is single:
        pairs = _one_pair(pairs, read)
    pairs = list(pairs) if isinstance(pairs, Iterator) else pairs  # looked at twice
    sides = contrast(model, chosen, pairs, positive, negative, texts, labels, chat, read)
    if chosen.matched and sides.partners is None:
        raise ValueError(
            f"{chosen.name} needs matched pairs; for two sets of texts take 'mean_difference' or 'pca_centre'."
        )
    if chosen.background != (background is not None):
        need = "needs a background set: background=[...]" if chosen.background else "takes no background set"
        raise ValueError(f"{chosen.name} {need}.")
    seen = {} if pairs is None else pair_hashes(in_split(checked(pairs), "train"))
    bos = bos_of(model)
    if all(text.tokens == [bos] for text in sides.texts):
        raise ValueError(f"every text is the token {model.token_to_str(bos or 0)} alone: there is nothing to read.")
    if chosen.compute is single:
        whole, batch = _padded(model, sides.texts), Batch([0, 1])
        run = _Run(chosen, template, numbers, sites, sides, whole, [], [batch], [], seen)
        return run, estimated(model, whole, [batch], sites, chosen, 2, memory)
    weights = [reading(read, text, bos) for text in sides.texts]
    if chosen.negative and read_the_same(sides, weights):
        raise ValueError(
            f"both sides of every pair read the same: read={said_of(read)!r} lies in what they share; read='last' lies "
            "behind it."
        )
    batches = batches_of(sides, weights, batch_tokens)
    others = [] if background is None else encode_texts(model, background, "background=", chat=chat)
    # A background text is all prompt: what is read of a completion is read of the whole text there.
    whole_text = {"mean": "all", "first": "all"}.get(read, read) if isinstance(read, str) else read
    weights += [reading(whole_text, text, bos) for text in others]
    first = len(sides.texts)
    behind = [
        Batch([first + row for row in rows])
        for rows in single_batches([len(text.tokens) for text in others], batch_tokens)
    ]
    run = _Run(chosen, template, numbers, sites, sides, [*sides.texts, *others], weights, batches, behind, seen)
    return run, estimated(model, run.texts, [*batches, *behind], sites, chosen, first, memory)


def _one_pair(pairs: Any, read: Read) -> list[ContrastPair]:
    """The one pair of activation addition, whatever split it is in."""
    if pairs is None:
        raise TypeError("method='single' takes one contrast pair: extract(model, [pair], method='single').")
    if read != "last":
        raise ValueError("single reads every position: leave read= out.")
    given = checked(pairs)
    if len(given) != 1:
        raise ValueError(f"method='single' is made of one pair, and these are {len(given)}.")
    return [replace(given[0], split=None)]


def _padded(model: InterpretableModel, texts: Sequence[Text]) -> list[Text]:
    """Texts with spaces behind the shorter ones."""
    space, length = model.encode(" ")[-1], max(len(text.tokens) for text in texts)
    return [Text([*text.tokens, *[space] * (length - len(text.tokens))], length) for text in texts]


def read_the_same(sides: Contrast, weights: Sequence[np.ndarray[Any, Any]]) -> bool:
    """Whether in every pair what is read, and all text up to there, is the same on both sides."""
    if sides.partners is None:
        return False
    for a, b in sides.partners:
        end = max(int(np.flatnonzero(weights[side])[-1]) for side in (a, b)) + 1
        alike = sides.texts[a].tokens[:end] == sides.texts[b].tokens[:end]
        if not alike or not np.array_equal(weights[a][:end], weights[b][:end]):
            return False
    return True


def batches_of(sides: Contrast, weights: Sequence[np.ndarray[Any, Any]], batch_tokens: int) -> list[Batch]:
    """The batches in which texts are read: pairs whole, or texts one by one."""
    if sides.partners is None:
        return [Batch(rows) for rows in single_batches([len(text.tokens) for text in sides.texts], batch_tokens)]
    earliest = [int(np.flatnonzero(weight)[0]) for weight in weights]
    return list(pair_batches(sides.texts, sides.partners, earliest, batch_tokens))


_Found: TypeAlias = "tuple[mx.array, np.ndarray[Any, Any], dict[str, Any]]"
"""Directions, (layers, ..., D); the layers' median norms; what was measured of the data, by name."""


def _by_side(model: InterpretableModel, run: _Run, seed: int, step: Step) -> _Found:
    """Any method of `Readings`: both sides' rows, batch by batch, as sums, and then the method."""
    reader = Reader(model, run.places, norms=True)
    sums = Moments(run.sides, rows=run.method.rows, seed=seed)
    done = 0
    for batch in run.batches:
        sums.add(batch, *reader(run.texts, run.weights, batch))
        done += len(batch.texts)
        step(done, len(run.texts))
    reader = Reader(model, run.places)
    total: mx.array | None = None
    for batch in run.behind:
        part = mx.sum(reader(run.texts, run.weights, batch)[0], axis=1)
        total = part if total is None else total + part
        mx.eval(total)
        done += len(batch.texts)
        step(done, len(run.texts))
    background = None if total is None else np.array(total, np.float64) / run.background
    check_finite(run.places, sums.finite())
    if background is not None:
        check_finite(run.places, np.isfinite(background))
    readings = sums.readings(background, seed)
    found = _computed(run.method, readings)
    if not found.any():
        raise ValueError("the direction is zero at every layer: both sides read the same on average.")
    measured = {
        name: {str(layer): round(float(value), 6) for layer, value in zip(run.layers, values, strict=True)}
        for name, values in (("agreement", sums.agreement()), ("reliability", sums.reliability()))
        if values is not None
    }
    return mx.array(found.astype(np.float32)), sums.median_norms(), measured


def _computed(method: Method, readings: Readings) -> np.ndarray[Any, Any]:
    """The directions that a method gives, (layers, D) float64."""
    given, needed = method.compute(readings), f"shape {readings.difference.shape}"
    if isinstance(given, mx.array) and given.dtype == mx.bfloat16:  # NumPy has no such type
        given = given.astype(mx.float32)
    try:
        found = np.asarray(given)
    except ValueError:  # rows of several lengths
        found = np.array(None)
    what = f"shape {found.shape}" if found.dtype.kind in "biuf" else f"{type(given).__name__} of {found.dtype.name}"
    if what != needed:
        raise ValueError(f"{method.name} gave {what}; directions are an array of real numbers of {needed}.")
    return found.astype(np.float64)


def _by_position(model: InterpretableModel, run: _Run, seed: int, step: Step) -> _Found:
    """Activation addition: of one pair the difference at each position, (layers, tokens, D)."""
    taken, norms = Reader(model, run.places, norms=True).everywhere(run.texts, run.sides.texts)
    check_widths(run.places, [both.shape[-1] for both in taken])
    found = mx.stack([both[0] - both[1] for both in taken])
    mx.eval(found, norms)
    step(2, 2)
    check_finite(run.places, np.isfinite(np.array(found)))
    check_finite(run.places, np.isfinite(np.array(norms)))
    if not found.any().item():
        raise ValueError("the direction is zero at every layer: both sides read the same.")
    return found, np.median(np.array(norms), axis=1), {}


def said_of(read: Read) -> str | int:
    """What is read, as a file says it: a callable by its name."""
    if isinstance(read, (int, np.integer)):
        return int(read)
    return read if isinstance(read, str) else getattr(read, "__name__", "callable")


def _info(model: InterpretableModel, run: _Run, read: Read, chat: bool, width: int) -> dict[str, Any]:
    template = getattr(model.tokenizer, "chat_template", None)
    both = run.sides.positives, len(run.sides.texts) - run.sides.positives
    counts = {"pairs": both[0]} if run.sides.partners is not None else {"positive": both[0], "negative": both[1]}
    counts["background"] = run.background
    set_by_partial = getattr(run.method.compute, "keywords", None) or {}
    return {
        **model.identity,
        "hidden_size": width,
        "layers": len(model.layers),
        "method": run.method.name,
        **({"parameters": {name: _plain(value) for name, value in set_by_partial.items()}} if set_by_partial else {}),
        "read": "each position" if run.method.compute is single else said_of(read),
        **({"chat": True} if chat else {}),
        **{name: count for name, count in counts.items() if count},
        "data": run.sides.hash,
        **run.seen,
        "chat_template": hashlib.sha256(template.encode()).hexdigest()[:16] if isinstance(template, str) else None,
        "mlxsteer": version("mlxsteer"),
    }


def _plain(value: Any) -> Any:
    """A value as JSON has it, or in words."""
    value = value.item() if isinstance(value, np.generic) else value
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)


def separation(
    model: InterpretableModel,
    vector: SteeringVector,
    pairs: Iterable[ContrastPair],
    *,
    read: Read = "last",
    chat: bool = False,
    batch_tokens: int = 4096,
) -> dict[int, float]:
    """How well projections on a vector tell the two sides of pairs apart: the area under the ROC curve, per layer.

    ``AUROC = P(⟨h₊, v⟩ > ⟨h₋, v⟩) + ½ P(equal)`` over all pairs of a positive and a negative side; 0.5 is chance. On
    pairs that the vector wasn't made from, it says whether the behaviour is linearly readable, which is not yet that
    adding the vector brings it about.

    Args:
        model: the model.
        vector: the vector.
        pairs: contrast pairs; all of them are used, so give the held-out split.
        read, chat, batch_tokens: as in `extract`.

    Returns:
        layer → AUROC.

    Raises:
        TypeError: no model, no vector, no contrast pairs.
        ValueError: the vector is another model's, has a direction per position, or is zero at a layer; nothing to read;
            activations are NaN.
        UnknownKey: the model has no such site.

    Warns:
        VectorMismatchWarning: the vector was computed on another model, or under another quantization.
    """
    check_model(model)
    if not isinstance(vector, SteeringVector):
        raise TypeError(f"separation takes a SteeringVector, not {type(vector).__name__}.")
    check_read(read)
    check_switch("chat", chat)
    check_budget(batch_tokens)
    if vector.positions is not None:
        raise ValueError("separation needs one direction per layer, and this vector has one per position.")
    if vector._zeros:
        raise ValueError(f"the direction of layer {min(vector._zeros)} is zero: it tells nothing apart.")
    vector._check(model, stacklevel=3)
    given = checked(pairs)
    check_completions(read, given, given)
    texts = [text for side in zip(*encode_pairs(model, given, given, chat), strict=True) for text in side]
    n = len(given)
    sides = Contrast(texts, n, [(i, i + n) for i in range(n)])
    scores = projected(model, {vector.key(layer): vector[layer] for layer in vector}, sides, read, batch_tokens)
    return {layer: auroc(row[:n], row[n:]) for layer, row in zip(vector, scores, strict=True)}


def projected(
    model: InterpretableModel, directions: Mapping[str, mx.array], sides: Contrast, read: Read, batch_tokens: int
) -> np.ndarray[Any, Any]:
    """What is read of texts, on a direction at each place: ``⟨h, v⟩``, (places, texts) float64.

    Args:
        model: the model.
        directions: key → v, (D,).
        sides: the texts.
        read, batch_tokens: as in `extract`.

    Raises:
        ValueError: a place is of another width; nothing to read; activations are NaN.
    """
    bos = bos_of(model)
    weights = [reading(read, text, bos) for text in sides.texts]
    sites = [model._sites.resolve(key) for key in directions]
    lines = mx.stack(list(directions.values()))[:, None]
    reader = Reader(model, sites)
    scores = np.zeros((len(sites), len(sides.texts)))
    for batch in batches_of(sides, weights, batch_tokens):
        taken, _ = reader(sides.texts, weights, batch)
        if taken.shape[-1] != lines.shape[-1]:
            raise ValueError(
                f"the vector is of width {lines.shape[-1]}, and {sites[0].key} of width {taken.shape[-1]}."
            )
        scores[:, batch.texts] = np.array(mx.sum(taken * lines, axis=-1))
    check_finite(sites, np.isfinite(scores))
    return scores


def auroc(positive: Any, negative: Any) -> float:
    """Area under the ROC curve of two sets of scores: ``P(positive > negative) + ½ P(equal)``."""
    above, below = np.asarray(positive, np.float64), np.sort(np.asarray(negative, np.float64))
    halves = np.searchsorted(below, above, "left") + np.searchsorted(below, above, "right")  # twice those below, ties 1
    return float(np.sum(halves) / (2 * len(above) * len(below)))
