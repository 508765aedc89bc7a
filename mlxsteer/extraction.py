"""From prompts to mean activations, and from contrast pairs to a steering vector: one forward per batch, all layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlxsteer.model import InterpretableModel
from mlxsteer.pairs import ContrastPair, checked, in_split
from mlxsteer.positions import At, Position
from mlxsteer.sites import Site, UnknownKey
from mlxsteer.trace import Trace
from mlxsteer.vectors import SteeringVector


def _batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices of rows of similar length, so that each padded batch holds at most `budget` tokens."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[index] > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _bos(model: InterpretableModel) -> int | None:
    return getattr(model.tokenizer, "bos_token_id", None) if model.tokenizer is not None else None


def _norms(trace: Trace, layers: Sequence[int], bos: int | None) -> mx.array:
    """Norms of the residual stream at every real token but BOS, (layers, tokens)."""
    rows = np.array(trace.tokens)
    real = np.arange(rows.shape[1])[None] < np.array(trace.lengths)[:, None]
    if bos is not None:
        real[:, 0] &= rows[:, 0] != bos
    chosen = mx.array(np.flatnonzero(real))
    norms = [mx.linalg.norm(trace.activations[f"layers.{layer}"].astype(mx.float32), axis=-1) for layer in layers]
    return mx.stack(norms).reshape(len(layers), -1)[:, chosen]


def mean_activations(
    model: InterpretableModel,
    prompts: Sequence[Any],
    keys: str | Sequence[str],
    *,
    at: At = "all",
    skip_bos: bool = True,
    batch_tokens: int = 4096,
) -> dict[str, mx.array]:
    """The mean activation over the tokens of many prompts: what `interventions.mean_replace` puts in place.

    Args:
        model: the model.
        prompts: texts, lists of token ids, or chats.
        keys: keys, globs or ranges.
        at: which tokens of each prompt count; padding never does.
        skip_bos: leave the beginning-of-sequence token out, whose activation is unlike all others.
        batch_tokens: the most tokens in one batch, padding included.

    Returns:
        key → mean, (D,) float32; a glob or range gives one for each place, under its canonical key.

    Raises:
        UnknownKey: a key names no place.
        ValueError: there is no prompt, or no token to average.
    """
    wanted: dict[str, Site] = {}
    for key in [keys] if isinstance(keys, str) else keys:
        try:
            wanted[key] = model._sites.resolve(key)
        except UnknownKey:  # a glob or a range, or nothing at all, which expand refuses
            wanted |= {site.key: site for site in model._sites.expand(key)}
    sites = list(dict.fromkeys(wanted.values()))
    tokens, _ = model._encode_many(prompts if isinstance(prompts, (str, mx.array)) else list(prompts))
    position = Position.of(at)
    sums: dict[Site, mx.array] = {site: mx.array(0.0) for site in sites}
    count = 0
    bos = _bos(model)
    for batch in _batches([len(t) for t in tokens], batch_tokens):
        rows = [tokens[i] for i in batch]
        with model.trace(rows) as trace:
            marks = [trace.marks(row, position) for row in range(len(rows))]
            for row, mark in zip(rows, marks, strict=True):
                mark[0] &= not (skip_bos and row[0] == bos)
            weight = mx.array([mark.tolist() for mark in marks]).astype(mx.float32)
            count += int(sum(mark.sum() for mark in marks))
            for site in sites:
                value = trace.read(site).save().astype(mx.float32)
                sums[site] = sums[site] + mx.tensordot(weight, value, axes=[[0, 1], [0, 1]])
        mx.eval(list(sums.values()))
    if not count:
        raise ValueError(f"at={at!r} chooses no token of these prompts: there is nothing to average.")
    return {key: sums[site] / count for key, site in wanted.items()}


def extract(
    model: InterpretableModel,
    pairs: Iterable[ContrastPair],
    *,
    batch_tokens: int = 4096,
    progress: Callable[[int, int], None] | None = None,
) -> SteeringVector:
    """Compute a steering vector: the mean difference of the two sides' activations at their last tokens.

    ``v_l = mean_i [h_l(p_i, positive_i) − h_l(p_i, negative_i)]``, the residual stream after every block l, in one
    forward per batch; the head never runs. Contrastive activation addition, Rimsky et al. 2024, arXiv 2312.06681.

    Args:
        model: the model.
        pairs: contrast pairs; where they have splits, the ``"train"`` ones are used.
        batch_tokens: the most tokens in one batch, padding included.
        progress: called with the number of texts done and the number of texts.

    Returns:
        A `SteeringVector` with one direction per layer.

    Raises:
        TypeError: they are no contrast pairs.
        ValueError: there is no pair.
    """
    chosen = in_split(checked(pairs), "train")
    texts = [
        (pair.prompt + side, sign) for pair in chosen for side, sign in ((pair.positive, 1.0), (pair.negative, -1.0))
    ]
    tokens = [model.encode(text) for text, _ in texts]
    layers = range(len(model.layers))
    bos = _bos(model)
    total: mx.array | None = None
    norms: list[mx.array] = []
    done = 0
    for batch in _batches([len(t) for t in tokens], batch_tokens):
        with model.trace([tokens[i] for i in batch]) as trace:
            last = mx.stack([trace.last(f"layers.{layer}").astype(mx.float32) for layer in layers])  # (L, rows, D)
            norms.append(_norms(trace, layers, bos))
        signs = mx.array([texts[i][1] for i in batch])[None, :, None]
        part = mx.sum(signs * last, axis=1)
        total = part if total is None else total + part
        mx.eval(total, norms)
        done += len(batch)
        if progress is not None:
            progress(done, len(texts))
    assert total is not None
    median: Any = mx.median(mx.concatenate(norms, axis=1), axis=1).tolist()
    directions = total / len(chosen)
    return SteeringVector(
        {layer: directions[layer] for layer in layers},
        residual_norms={layer: float(median[layer]) for layer in layers},
        info={
            "model": model.name,
            "architecture": getattr(model.model, "model_type", None),
            "hidden_size": int(directions.shape[-1]),
            "layers": len(layers),
            "method": "mean_difference",
            "read": "last",
            "pairs": len(chosen),
        },
    )
