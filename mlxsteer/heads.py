"""Attention heads one by one: what each writes to the residual stream, and what that does to the logits directly.

A head's *value* is its part of what enters the attention's output projection, (head_dim,); its *contribution* is what
that part becomes behind the projection, (D,). The projection is linear, so that the contributions of all heads and
its bias, counted once, sum to the attention's output. Elhage et al. 2021, A Mathematical Framework for Transformer
Circuits, https://transformer-circuits.pub/2021/framework/index.html.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxsteer.display import written_table
from mlxsteer.hooks import activation, attached, detached
from mlxsteer.interventions import zero_out
from mlxsteer.interventions.base import Function, tensor
from mlxsteer.interventions.files import as_json
from mlxsteer.model import InterpretableModel
from mlxsteer.plans import Plan, Stopped
from mlxsteer.positions import Prompt, Tokens
from mlxsteer.reading import (
    Batch,
    Reader,
    Text,
    bos_of,
    check_budget,
    check_model,
    encode_texts,
    reading,
    single_batches,
)
from mlxsteer.sites import Site, UnknownKey
from mlxsteer.trace import Trace

Array = np.ndarray[Any, Any]


def layers_with_heads(model: InterpretableModel) -> dict[int, Site]:
    """Layer → its heads' place, in the layers whose attention has heads before an output projection.

    Raises:
        TypeError: no model.
        UnknownKey: no layer has.
    """
    check_model(model)
    found = {}
    for layer in range(len(model.layers)):
        with suppress(UnknownKey):
            found[layer] = model._sites.resolve(f"layers.{layer}.attn.heads")
    if not found:
        raise UnknownKey(f"this {model._sites.model_type} model has no attention heads before an output projection.")
    return found


def heads_of(model: InterpretableModel, layer: Any) -> Site:
    """The place of a layer's heads.

    Raises:
        ValueError: the layer is no number of a layer that has heads.
    """
    found = layers_with_heads(model)
    if isinstance(layer, bool) or not isinstance(layer, (int, np.integer)) or int(layer) not in found:
        raise ValueError(f"layer is one of the layers that have heads, {_spans(list(found))}, not {layer!r}.")
    return found[int(layer)]


def _spans(numbers: list[int]) -> str:
    whole = numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{numbers[0]} to {numbers[-1]}" if whole and len(numbers) > 1 else ", ".join(map(str, numbers))


# -- values and contributions --------------------------------------------------------------------------------------


def values(
    model: InterpretableModel, prompts: Sequence[Any], *, chat: bool = False, batch_tokens: int = 4096
) -> dict[int, mx.array]:
    """The value of every head at the last token of each prompt.

    Args:
        model: the model.
        prompts: texts, lists of token ids, or chats.
        chat: texts are a user's messages.
        batch_tokens: the most tokens in one batch, padding included.

    Returns:
        layer → (prompts, heads, head_dim) float32, for the layers that have heads.

    Raises:
        TypeError: no model, no list of prompts.
        ValueError: there are none, or one can't be encoded.
    """
    check_model(model)
    check_budget(batch_tokens)
    return values_of(model, encode_texts(model, prompts, "prompts", chat=chat), batch_tokens)


def values_of(model: InterpretableModel, texts: Sequence[Text], batch_tokens: int) -> dict[int, mx.array]:
    """The same of encoded texts."""
    sites = layers_with_heads(model)
    flat = [Site(site.key, site.module, "input", site.call, site.layer) for site in sites.values()]
    weights = [reading("last", text, bos_of(model)) for text in texts]
    reader = Reader(model, flat)
    parts, order = [], list[int]()
    for rows in single_batches([len(text.tokens) for text in texts], batch_tokens):
        parts.append(reader.each(texts, weights, Batch(rows))[0])
        mx.eval(parts[-1])
        order += rows
    back = mx.array(np.argsort(order))
    whole = [mx.concatenate(list(rows))[back] for rows in zip(*parts, strict=True)]
    found = {
        layer: rows.reshape(len(texts), site.heads, -1)
        for (layer, site), rows in zip(sites.items(), whole, strict=True)
    }
    mx.eval(found)
    return found


def contributions(model: InterpretableModel, layer: int, values: Any) -> mx.array:
    """What each head's value becomes behind the output projection: ``c_j = W_O,j a_j``, without the bias.

    Each head goes through the model's own projection alone, quantized or adapted as it is, with zeros in the others'
    place. `bias` is what the projection adds once; the sum over heads plus the bias is the attention's output.

    Args:
        model: the model.
        layer: the layer.
        values: a, (..., heads, head_dim), as `values` or ``layers.5.attn.heads`` gives them.

    Returns:
        (..., heads, D), staged.

    Raises:
        TypeError: no model, no array.
        ValueError: the layer has no heads, or the values aren't of its heads.
    """
    check_model(model)
    site = heads_of(model, layer)
    a = values if isinstance(values, mx.array) else tensor(values, "contributions: the values")
    count, width = int(site.heads or 0), int(model._sites.width(site) or 0)
    if a.shape[-2:] != (count, width):
        raise ValueError(f"the values have shape {a.shape}; layer {layer} takes (..., {count}, {width}).")
    alone = mx.eye(count, dtype=a.dtype)[..., None] * a[..., None, :, :]  # (..., heads, heads, head_dim)
    with detached():
        through = site.module(alone.reshape(*a.shape[:-2], count, count * width))
    return through - bias(model, layer).astype(through.dtype)


def bias(model: InterpretableModel, layer: int) -> mx.array:
    """What a layer's output projection adds whatever enters it, (D,); zeros where it has no bias.

    Raises:
        TypeError: no model.
        ValueError: the layer has no heads.
    """
    check_model(model)
    site = heads_of(model, layer)
    features = int(site.heads or 0) * int(model._sites.width(site) or 0)
    with detached():
        found: mx.array = site.module(mx.zeros((1, features), dtype=dtype_of(model, site)))[0]
    return found


def dtype_of(model: InterpretableModel, site: Site) -> mx.Dtype:
    """The dtype in which a projection computes."""
    linear = site.module.get("linear", site.module)
    found: mx.Dtype = (linear.get("scales") if "scales" in linear else linear.weight).dtype
    return found if mx.issubdtype(found, mx.floating) else mx.float32


# -- norms, frozen -------------------------------------------------------------------------------------------------


def _largest(x: mx.array) -> float:
    return float(np.abs(np.array(x)).max())


class FrozenNorm:
    """A norm with the scale that it has at some activations: a linear map, so that it can be split into parts.

    ``norm(x) = g ⊙ (x − μ(x)) / σ(x) + b`` for a layer norm, and ``g ⊙ x / rms(x)`` for an RMS norm; frozen at x, it is
    ``L(c) = g ⊙ (c − μ(c)) / σ(x)``, with ``norm(x) = L(x) + b``.

    Args:
        module: the norm.
        x: the activations, (..., D).

    Raises:
        ValueError: it is neither an RMS norm nor a layer norm.
    """

    def __init__(self, module: nn.Module, x: mx.array) -> None:
        x = x.astype(mx.float32)
        width = x.shape[-1]
        eps = float(getattr(module, "eps", 1e-6))
        signs = mx.where(mx.arange(width) % 2 == 0, 1.0, -1.0)  # of mean 0 and mean square 1
        with detached():
            seen = module(mx.stack([mx.zeros(width), signs, mx.ones(width)])).astype(mx.float32)
            given = module(x).astype(mx.float32)
        self.bias = seen[0]
        self.gain = (seen[1] - seen[0]) * signs * (1 + eps) ** 0.5
        self.centres = _largest(seen[2] - seen[0]) < 1e-3 * _largest(self.gain)
        centred = self._centred(x)
        self.scale = mx.rsqrt(mx.mean(centred * centred, axis=-1, keepdims=True) + eps)
        found = self(x) + self.bias
        if _largest(found - given) > 1e-2 * _largest(given):
            raise ValueError(
                f"{type(module).__name__} is neither an RMS norm nor a layer norm: what goes through it can't be split "
                "into the parts of heads."
            )

    def _centred(self, x: mx.array) -> mx.array:
        return x - mx.mean(x, axis=-1, keepdims=True) if self.centres else x

    def __call__(self, part: mx.array, scale: mx.array | None = None) -> mx.array:
        """A part of the activations through the frozen norm, without its bias; shapes broadcast."""
        return self.gain * self._centred(part.astype(mx.float32)) * (self.scale if scale is None else scale)


def into_stream(model: InterpretableModel, layer: int, parts: mx.array, whole: mx.array) -> mx.array:
    """What parts of an attention's output become where they join the residual stream.

    They are the parts themselves but in families that norm the attention's output first (that norm is frozen at the
    whole output) or scale it.

    Args:
        model: the model.
        layer: the layer.
        parts: (..., k, D).
        whole: the attention's output that they are parts of, (..., D).
    """
    block = model._sites.blocks[layer]
    if name := model._sites.family.attention_norm:
        norm = FrozenNorm(block[name], whole)
        parts = norm(parts, norm.scale[..., None, :])
    factor = getattr(block, "residual_multiplier", None)
    if factor is None and hasattr(block, "scale_depth"):
        factor = block.scale_depth / block.num_hidden_layers**0.5
    return parts.astype(mx.float32) * (1.0 if factor is None else float(factor))


# -- direct attribution --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class HeadAttribution:
    """What each head adds to a logit difference directly, not by way of later layers.

    Attributes:
        heads: (prompts, layers, heads) float64, in logits; NaN in layers without heads.
        rest: what everything else adds (embedding, MLPs, biases), (prompts,); with the heads it sums to `total`.
        total: the logit difference itself, before any softcap, (prompts,).
        record: model, answers and so on.
    """

    heads: Array
    rest: Array
    total: Array
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def mean(self) -> Array:
        """The mean over prompts, (layers, heads)."""
        found: Array = self.heads.mean(axis=0)
        return found

    def top(self, count: int = 10) -> list[tuple[int, int, float]]:
        """The heads that add most, in size: (layer, head, mean logits)."""
        return ranked(self.mean, count, size=True)

    def __repr__(self) -> str:
        (layer, head, value) = self.top(1)[0]
        return (
            f"HeadAttribution({len(self.total)} prompts, difference {self.total.mean():+.2f}, of which the rest "
            f"{self.rest.mean():+.2f}; most: layer {layer} head {head} {value:+.2f})"
        )

    def table(self, count: int = 10) -> str:
        """The heads that add most, and the rest, in plain text."""
        rows = [(f"layer {layer} head {head}", value) for layer, head, value in self.top(count)]
        others = float(np.nansum(self.mean)) - sum(value for _, value in rows)
        every = [*rows, ("other heads", others), ("the rest", float(self.rest.mean())), ("total", self.total.mean())]
        return written_table("direct attribution, in logits", ("part", "logits"), [(n, f"{v:+.3f}") for n, v in every])

    def to_json(self, path: str | Path | None = None) -> str:
        """Everything as JSON; with a path, also written there, whole or not at all."""
        data = {name: getattr(self, name).tolist() for name in ("heads", "rest", "total")}
        return as_json({**data, "record": self.record}, path)

    def plot(self, path: str | Path | None = None) -> Any:
        """The mean over prompts as a heat map of layers × heads; a matplotlib figure.

        Args:
            path: also write it there, as PNG, PDF or SVG by suffix.
        """
        from mlxsteer.plots import plot_heads

        return plot_heads(self.mean, "direct attribution", "logits", [], path)


def ranked(grid: Array, count: int, *, size: bool = False) -> list[tuple[int, int, float]]:
    """The first so many of a grid, (layer, head, value), highest first (by `size` of either sign); NaN is left out."""
    flat = grid.reshape(-1)
    order = np.argsort(-np.where(np.isnan(flat), -np.inf, np.abs(flat) if size else flat), kind="stable")
    chosen = [i for i in order if not np.isnan(flat[i])][:count]
    return [(int(i) // grid.shape[1], int(i) % grid.shape[1], float(flat[i])) for i in chosen]


def attribution(
    model: InterpretableModel, prompts: Sequence[Any], answers: Sequence[str], others: Sequence[str]
) -> HeadAttribution:
    """What each head adds to a logit difference at the last token of each prompt, directly.

    With h the residual stream behind the last block, ``logit(answer) − logit(other) = u·norm(h) + b``, and the final
    norm frozen at h is linear, ``norm(h) = L(h) + β``. A head's share is ``u·L(c)``, with c what it writes to the
    stream, and the rest is ``u·L(h − Σc) + u·β + b``. Logits are those before any softcap. What a head does by way of
    later layers is not in it: see `mlxsteer.function_vectors.indirect_effects`. Elhage et al. 2021 (above); Wang et
    al. 2022, Interpretability in the Wild, arXiv 2211.00593.

    Args:
        model: the model.
        prompts: texts, lists of token ids, or chats.
        answers: for each prompt a text whose first token is the answer.
        others: for each prompt a text whose first token it is compared with.

    Raises:
        TypeError: no model, or no lists of texts.
        ValueError: the lists differ in length; an answer and its other are the same token; the model's final norm is
            neither an RMS norm nor a layer norm, or its blocks add something else to the stream.
    """
    check_model(model)
    texts = encode_texts(model, prompts, "prompts")
    pairs = [_compared(model, i, a, b) for i, (a, b) in enumerate(_matched(texts, answers, others))]
    sites = layers_with_heads(model)
    most = max(int(site.heads or 0) for site in sites.values())
    grid = np.full((len(texts), len(model.layers), most), np.nan)
    rest, total = np.zeros(len(texts)), np.zeros(len(texts))
    for row, (text, pair) in enumerate(zip(texts, pairs, strict=True)):
        with model.trace(text.tokens) as trace:
            final = alias_last(trace, f"layers.{len(model.layers) - 1}")
            written = {layer: _written(model, layer, trace, check=row == 0) for layer in sites}
        norm = FrozenNorm(model._sites.resolve("norm").module, final)
        u, b = _readout(model, pair, final.shape[-1])
        left = final
        for layer, parts in written.items():
            grid[row, layer, : parts.shape[0]] = np.array(norm(parts) @ u, np.float64)
            left = left - parts.sum(axis=0)
        rest[row] = float(np.array((norm(left) + norm.bias) @ u)) + b
        total[row] = float(np.array((norm(final) + norm.bias) @ u)) + b
    record = {"model": model.identity, "prompts": len(texts), "answers": list(answers), "others": list(others)}
    return HeadAttribution(grid, rest, total, record)


def alias_last(trace: Trace, key: str) -> mx.array:
    """The activation at the last token of a trace of one prompt, float32."""
    return trace.last(key)[0].astype(mx.float32)


def _matched(texts: Sequence[Text], answers: Any, others: Any) -> list[tuple[str, str]]:
    for name, given in (("answers", answers), ("others", others)):
        if isinstance(given, str) or not isinstance(given, (list, tuple)):
            raise TypeError(f"{name} are a list of texts, one for each prompt, not {given!r:.80}.")
        if len(given) != len(texts):
            raise ValueError(f"there are {len(texts)} prompts and {len(given)} {name}: give one for each.")
    return list(zip(answers, others, strict=True))


def _compared(model: InterpretableModel, number: int, answer: str, other: str) -> tuple[int, int]:
    a, b = (first_token(model, text, f"prompt {number}") for text in (answer, other))
    if a == b:
        raise ValueError(f"prompt {number}: {answer!r} and {other!r} begin with the same token: nothing is compared.")
    return a, b


def first_token(model: InterpretableModel, text: Any, what: str) -> int:
    """The first token of a text that goes on from a prompt; texts such as ``" cold"`` begin with their space.

    Raises:
        TypeError: it is no text.
        ValueError: it is empty.
    """
    if not isinstance(text, str):
        raise TypeError(f"{what}: an answer is a text such as ' cold', not {text!r}.")
    ids = model._needed_tokenizer("an answer").encode(text, add_special_tokens=False)
    if not ids:
        raise ValueError(f"{what}: an answer has at least one token, and {text!r} has none.")
    return int(ids[0])


def _written(model: InterpretableModel, layer: int, trace: Trace, check: bool) -> mx.array:
    """What each head of a layer writes to the residual stream at the last token, (heads, D); and, of a first prompt,
    whether the stream takes it as it is."""
    attn = model._sites.resolve(f"layers.{layer}.attn")
    parts = contributions(model, layer, trace.last(f"layers.{layer}.attn.heads")[0]).astype(mx.float32)
    whole = alias_last(trace, attn.key)
    written = into_stream(model, layer, parts, whole)
    if check:
        _check_adds(model, layer, trace, into_stream(model, layer, whole[None], whole)[0])
    return written


def _check_adds(model: InterpretableModel, layer: int, trace: Trace, expected: mx.array) -> None:
    """Refuse a block that does something else with its attention's output than add it to the stream.

    Raises:
        ValueError: with its MLP silenced, the block adds something else.
    """
    sites = model._sites
    with suppress(UnknownKey):
        mlp, block = sites.resolve(f"layers.{layer}.mlp"), sites.resolve(f"layers.{layer}")
        entered = alias_last(trace, f"layers.{layer}.input")
        given = {sites.resolve(f"layers.{i}"): trace.whole(sites.resolve(f"layers.{i}")) for i in range(layer)}
        if not sites.family.replay:
            return
        count = trace.tokens.shape[1]
        tokens = Tokens([0], [count], count, [Prompt(count, whole=True)])
        plan = Plan(sites, [block], [(mlp, zero_out())], given, tokens, stop=block)
        with detached(), attached(plan), suppress(Stopped):
            model.model(trace.tokens)
        added = activation(plan.captured[block], block)[0, -1].astype(mx.float32) - entered
        size = mx.max(mx.abs(expected)) + 0.01 * mx.max(mx.abs(entered))
        if (mx.max(mx.abs(added - expected)) > 0.02 * size).item():
            raise ValueError(
                f"block {layer} of this {sites.model_type} model does more with its attention's output than add it "
                "to the residual stream: what its heads add can't be told apart."
            )


def _readout(model: InterpretableModel, pair: tuple[int, int], width: int) -> tuple[mx.array, float]:
    """How a logit difference is read off the final norm's output, before any softcap: a direction, and a number."""
    norm = model._sites.resolve("norm")
    tokens = Tokens([0], [1], 1, [Prompt(1, whole=True)])

    def difference(n: mx.array) -> mx.array:
        plan = Plan(model._sites, edits=[(norm, Function(lambda _: n[None, None]))], tokens=tokens)
        with detached(), attached(plan):
            logits = model.model(mx.zeros((1, 1), dtype=mx.int32))[0, -1]
        return logits[pair[0]] - logits[pair[1]]

    # A softcap is the identity to first order at 0, where only the head's own bias is left.
    value, direction = mx.value_and_grad(difference)(mx.zeros(width))
    return direction.astype(mx.float32), float(np.array(value.astype(mx.float32)))
