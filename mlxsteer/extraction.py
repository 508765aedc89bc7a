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


def encode_side(model: InterpretableModel, pair: ContrastPair, side: str) -> tuple[list[int], int]:
    """Token ids of a pair's prompt with one of its sides, and how many of them are prompt.

    Args:
        model: the model, with its chat template for pairs that are chats.
        pair: the pair.
        side: ``"positive"`` or ``"negative"``.

    Raises:
        ValueError: the pair is a chat, and the model has no chat template.
    """
    completion = getattr(pair, side)
    if pair.chat or pair.messages:
        said = list(pair.messages) or [{"role": "user", "content": pair.prompt or completion}]
        tokens = model.encode(said)
        if not (pair.prompt or pair.messages):  # the sides are messages themselves: all of it is prompt
            return tokens, len(tokens)
        assert model.tokenizer is not None
        return [*tokens, *model.tokenizer.encode(completion, add_special_tokens=False)], len(tokens)
    tokens = model.encode(pair.prompt + completion)
    alone = model.encode(pair.prompt) if pair.prompt else tokens[:1]
    shared = next((i for i, (a, b) in enumerate(zip(tokens, alone, strict=False)) if a != b), len(alone))
    return tokens, min(shared, len(tokens) - 1)


def _bos(model: InterpretableModel) -> int | None:
    return getattr(model.tokenizer, "bos_token_id", None) if model.tokenizer is not None else None


def _reading(read: str | int, length: int, prompt: int) -> np.ndarray:
    """How much each token of a text counts, (length,); they sum to 1.

    Raises:
        ValueError: there is no such token, or no completion to average over.
    """
    weights = np.zeros(length, np.float32)
    if read == "mean":
        if prompt >= length:
            raise ValueError("read='mean' averages over a completion, and these pairs have none: read='last'.")
        weights[prompt:] = 1 / (length - prompt)
        return weights
    index = -1 if read == "last" else int(read)
    if not -length <= index < length:
        raise ValueError(f"read={read}: a text has only {length} tokens.")
    weights[index] = 1.0
    return weights


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
    read: str | int = "last",
    batch_tokens: int = 4096,
    progress: Callable[[int, int], None] | None = None,
) -> SteeringVector:
    """Compute a steering vector: the mean difference of the two sides' activations.

    ``v_l = mean_i [h_l(p_i, positive_i) − h_l(p_i, negative_i)]``, with h_l the residual stream after block l, read at
    one token or averaged; all layers in one forward per batch, and the head never runs. Contrastive activation
    addition, Rimsky et al. 2024, arXiv 2312.06681.

    Args:
        model: the model.
        pairs: contrast pairs; where they have splits, the ``"train"`` ones are used.
        read: ``"last"`` for each text's last token, an index for another one (-2 for the letter in ``" (A)"``), or
            ``"mean"`` for the mean over the completion's tokens.
        batch_tokens: the most tokens in one batch, padding included.
        progress: called with the number of texts done and the number of texts.

    Returns:
        A `SteeringVector` with one direction per layer.

    Raises:
        TypeError: they are no contrast pairs.
        ValueError: there is no pair, or a text has no token to read.
    """
    if read not in ("last", "mean") and (not isinstance(read, int) or isinstance(read, bool)):
        raise ValueError(f"read is 'last', 'mean' or the index of a token, not {read!r}.")
    chosen = in_split(checked(pairs), "train")
    sides = [(pair, side, sign) for pair in chosen for side, sign in (("positive", 1.0), ("negative", -1.0))]
    encoded = [encode_side(model, pair, side) for pair, side, _ in sides]
    tokens = [ids for ids, _ in encoded]
    weights = [_reading(read, len(ids), prompt) for ids, prompt in encoded]
    layers = range(len(model.layers))
    bos = _bos(model)
    total: mx.array | None = None
    norms: list[mx.array] = []
    done = 0
    for batch in _batches([len(t) for t in tokens], batch_tokens):
        width = max(len(tokens[i]) for i in batch)
        with model.trace([tokens[i] for i in batch]) as trace:
            weight = mx.array(np.stack([np.pad(weights[i], (0, width - len(weights[i]))) for i in batch]))
            states = [trace.activations[f"layers.{layer}"].astype(mx.float32) for layer in layers]
            taken = mx.stack([mx.sum(h * weight[..., None], axis=1) for h in states])  # (L, rows, D)
            norms.append(_norms(trace, layers, bos))
        signs = mx.array([sides[i][2] for i in batch])[None, :, None]
        part = mx.sum(signs * taken, axis=1)
        total = part if total is None else total + part
        mx.eval(total, norms)
        done += len(batch)
        if progress is not None:
            progress(done, len(sides))
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
            "read": read,
            "pairs": len(chosen),
        },
    )
