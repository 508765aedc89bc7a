"""From contrast pairs to a steering vector: one pass over the model, all layers at once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import numpy as np

from mlxsteer import directions
from mlxsteer.budget import Estimate, check_memory, estimated
from mlxsteer.contrast import Contrast, contrast, of_pairs, places
from mlxsteer.directions import SINGLE, Compute, Method
from mlxsteer.model import InterpretableModel
from mlxsteer.moments import Moments
from mlxsteer.pairs import ContrastPair, checked
from mlxsteer.progress import Step, reporting
from mlxsteer.reading import (
    Batch,
    Read,
    Reader,
    Text,
    as_chat,
    bos_of,
    check_read,
    encode_side,
    encode_text,
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
        texts, labels: in place of pairs, texts with True or 1 for the positive side, False or 0 for the negative.
        background: a set of texts, for ``"mean_centred"``.
        method: one of `directions.available()`, or a callable `directions.Readings` → (layers, D).
        layers: ``"all"``, a layer, or several.
        site: ``"residual"``, ``"attn"``, ``"mlp"``, or a key with ``{layer}`` in it.
        read: which token of each text: ``"last"``; ``"first"`` or ``"mean"`` of the completion; ``"all"`` (the mean
            over every token but BOS); an index (-2 for the letter in ``" (A)"``); or a callable from token ids to one
            index or several.
        chat: prompts are a user's messages, also in pairs that don't say so.
        batch_tokens: the most tokens in one batch, padding included.
        memory: the most bytes to take; all that is free unless told.
        seed: for methods that draw at random, and for the halvings of the reliability.
        progress: True for a bar on a terminal, or a function that is called with the number of texts done and in all.

    Returns:
        A `SteeringVector` with one direction per layer, float32, the layers' median norms, and in `info` where it comes
        from: model, quantization, method, data; and per layer the `agreement` of the pairs' differences and the
        split-half `reliability`.

    Raises:
        TypeError: the texts come in no way that is known.
        ValueError: no such method or layer; nothing to read in a text; a method that needs pairs or a background set.
        UnknownKey: no such place.
        MemoryError: a batch would not fit; the message says which `batch_tokens` does.
    """
    check_read(read)
    template, numbers, sites = places(model, site, layers)
    if method == SINGLE:
        return _single(model, pairs, template, numbers, sites, chat)
    chosen = directions.find(method)
    _installed(chosen)
    sides = contrast(model, pairs, positive, negative, texts, labels, chat)
    if chosen.matched and sides.partners is None:
        raise ValueError(
            f"{chosen.name} needs matched pairs; for two sets of texts take 'mean_difference' or 'pca_centre'."
        )
    if chosen.background != (background is not None):
        need = "needs a background set: background=[...]" if chosen.background else "takes no background set"
        raise ValueError(f"{chosen.name} {need}.")
    others = [] if background is None else [encode_text(model, text, chat=chat) for text in background]
    if background is not None and not others:
        raise ValueError("background= is empty: give at least one text.")
    bos = bos_of(model)
    weights = [reading(read, text, bos) for text in sides.texts]
    # A background text is all prompt: what is read of a completion is read of the whole text there.
    behind = [reading({"mean": "all", "first": "all"}.get(read, read) if isinstance(read, str) else read, text, bos)
              for text in others]  # fmt: skip
    batches = _plan(sides, weights, batch_tokens)
    check_memory(estimated(model, sides, batches, sites, chosen, batch_tokens, memory), batch_tokens, memory)
    reader = Reader(model, sites, norms=True)
    sums = Moments(sides, rows=chosen.rows, seed=seed)
    total, done = len(sides.texts) + len(others), 0
    with reporting(progress, "reading") as step:
        for batch in batches:
            sums.add(batch, *reader(sides.texts, weights, batch))
            done += len(batch.texts)
            step(done, total)
        mean = _mean(Reader(model, sites), others, behind, batch_tokens, lambda n: step(done + n, total))
    readings = sums.readings(mean, seed)
    found = np.asarray(chosen.compute(readings), np.float64)
    if found.shape != readings.difference.shape:
        raise ValueError(f"{chosen.name} gave shape {found.shape}; directions are {readings.difference.shape}.")
    norms = sums.median_norms()
    info = _info(model, sides, chosen.name, read, layers=len(model.layers), width=found.shape[-1])
    for name, values in (("agreement", sums.agreement()), ("reliability", sums.reliability())):
        if values is not None:
            info[name] = {str(layer): round(float(value), 6) for layer, value in zip(numbers, values, strict=True)}
    return SteeringVector(
        {layer: mx.array(row.astype(np.float32)) for layer, row in zip(numbers, found, strict=True)},
        site=template,
        residual_norms={layer: float(norm) for layer, norm in zip(numbers, norms, strict=True)},
        info=info,
    )


def estimate(
    model: InterpretableModel,
    pairs: Iterable[ContrastPair] | None = None,
    *,
    positive: Iterable[Any] | None = None,
    negative: Iterable[Any] | None = None,
    method: str | Compute = "mean_difference",
    layers: str | int | Sequence[int] = "all",
    site: str = "residual",
    read: Read = "last",
    chat: bool = False,
    batch_tokens: int = 4096,
    memory: int | None = None,
) -> Estimate:
    """What `extract` with the same arguments would take, without running the model."""
    check_read(read)
    _, _, sites = places(model, site, layers)
    sides = contrast(model, pairs, positive, negative, None, None, chat)
    bos = bos_of(model)
    batches = _plan(sides, [reading(read, text, bos) for text in sides.texts], batch_tokens)
    return estimated(model, sides, batches, sites, directions.find(method), batch_tokens, memory)


def _plan(sides: Contrast, weights: Sequence[np.ndarray[Any, Any]], batch_tokens: int) -> list[Batch]:
    if isinstance(batch_tokens, bool) or not isinstance(batch_tokens, (int, np.integer)) or batch_tokens < 1:
        raise ValueError(f"batch_tokens is a number of tokens from 1 on, not {batch_tokens!r}.")
    if sides.partners is None:
        return [Batch(rows) for rows in single_batches([len(text.tokens) for text in sides.texts], batch_tokens)]
    earliest = [int(np.flatnonzero(weight)[0]) for weight in weights]
    return list(pair_batches(sides.texts, sides.partners, earliest, batch_tokens))


def _mean(
    reader: Reader, texts: list[Text], weights: list[np.ndarray[Any, Any]], budget: int, step: Any
) -> np.ndarray[Any, Any] | None:
    """Mean over texts of what is read of each, (places, D) float64; None without texts."""
    total: mx.array | None = None
    done = 0
    for rows in single_batches([len(text.tokens) for text in texts], budget):
        taken, _ = reader(texts, weights, Batch(rows))
        part = mx.sum(taken, axis=1)
        total = part if total is None else total + part
        mx.eval(total)
        done += len(rows)
        step(done)
    return None if total is None else np.array(total, np.float64) / len(texts)


def _single(
    model: InterpretableModel,
    pairs: Iterable[ContrastPair] | None,
    template: str,
    numbers: list[int],
    sites: list[Site],
    chat: bool,
) -> SteeringVector:
    """Activation addition: one pair, position by position, (tokens, D) per layer."""
    if pairs is None:
        raise TypeError("method='single' takes one contrast pair: extract(model, [pair], method='single').")
    given = checked(pairs)
    if len(given) != 1:
        raise ValueError(f"method='single' is made of one pair, and these are {len(given)}.")
    pair = as_chat(given[0]) if chat else given[0]
    sides = of_pairs(model, [ContrastPair(pair.prompt, pair.positive, pair.negative, None, pair.chat, pair.messages)],
                         False)  # fmt: skip
    space = model.encode(" ")[-1]
    length = max(len(text.tokens) for text in sides.texts)
    padded = [Text([*text.tokens, *[space] * (length - len(text.tokens))], length) for text in sides.texts]
    reader = Reader(model, sites, norms=True)
    at: list[Any] = []
    norms: Any = None
    for position in range(length):
        one = np.zeros(length, np.float32)
        one[position] = 1.0
        taken, norms = reader(padded, [one, one], Batch([0, 1]))
        at.append(taken[:, 0] - taken[:, 1])
    found = mx.stack(at, axis=1)  # (places, tokens, D)
    mx.eval(found, norms)
    middle = np.median(np.array(norms), axis=1)
    info = _info(model, sides, SINGLE, "each position", layers=len(model.layers), width=found.shape[-1])
    return SteeringVector(
        {layer: found[i] for i, layer in enumerate(numbers)},
        site=template,
        residual_norms={layer: float(norm) for layer, norm in zip(numbers, middle, strict=True)},
        info=info,
    )


def _installed(method: Method) -> None:
    """Refuse a method whose package is missing before anything is computed.

    Raises:
        ImportError: with the command that installs it.
    """
    if method.name == "probe":
        try:
            import sklearn  # noqa: F401
        except ImportError as error:
            raise ImportError("method='probe' needs scikit-learn: pip install 'mlxsteer[probe]'.") from error


def _info(
    model: InterpretableModel, sides: Contrast, method: str, read: Read, *, layers: int, width: int
) -> dict[str, Any]:
    template = getattr(model.tokenizer, "chat_template", None)
    both = sides.positives, len(sides.texts) - sides.positives
    counts = {"pairs": both[0]} if sides.partners is not None else {"positive": both[0], "negative": both[1]}
    return {
        **model.identity,
        "hidden_size": width,
        "layers": layers,
        "method": method,
        "read": read if isinstance(read, (str, int)) else getattr(read, "__name__", "callable"),
        **counts,
        "data": sides.hash,
        "chat_template": hashlib.sha256(template.encode()).hexdigest()[:16] if isinstance(template, str) else None,
        "mlxsteer": version("mlxsteer"),
    }


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
    """
    check_read(read)
    chosen = [as_chat(pair) if chat else pair for pair in checked(pairs)]
    texts = [Text(*encode_side(model, pair, side)) for side in ("positive", "negative") for pair in chosen]
    bos = bos_of(model)
    weights = [reading(read, text, bos) for text in texts]
    sites = [model._sites.resolve(vector.site.format(layer=layer)) for layer in vector]
    unit = mx.stack([vector[layer] for layer in vector])[:, None]
    if unit.ndim != 3:
        raise ValueError("separation needs one direction per layer, and this vector has one per position.")
    reader = Reader(model, sites)
    scores = np.zeros((len(vector), len(texts)))
    n = len(chosen)
    partners = [(i, i + n) for i in range(n)]
    earliest = [int(np.flatnonzero(weight)[0]) for weight in weights]
    for batch in pair_batches(texts, partners, earliest, batch_tokens):
        taken, _ = reader(texts, weights, batch)
        scores[:, batch.texts] = np.array(mx.sum(taken * unit, axis=-1))
    return {layer: auroc(row[:n], row[n:]) for layer, row in zip(vector, scores, strict=True)}


def auroc(positive: Any, negative: Any) -> float:
    """Area under the ROC curve of two sets of scores: ``P(positive > negative) + ½ P(equal)``."""
    above = np.subtract.outer(np.asarray(positive, np.float64), np.asarray(negative, np.float64))
    return float(np.mean((above > 0) + 0.5 * (above == 0)))
