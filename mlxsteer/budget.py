"""How much memory an extraction takes, before it runs."""

from __future__ import annotations

import numbers
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxsteer.directions import Method, single
from mlxsteer.model import InterpretableModel
from mlxsteer.moments import HALVES
from mlxsteer.reading import Batch, Text
from mlxsteer.sites import Site


@dataclass(frozen=True)
class Estimate:
    """What an extraction takes, before it runs.

    Attributes:
        texts: number of texts, those of a background set included.
        tokens: tokens that go through the blocks, without padding and with shared beginnings counted once.
        batches: number of batches.
        batch_bytes: memory of the largest batch, roughly and rather too much.
        kept_bytes: memory of what is kept until the end: sums, and every row where the method needs them.
        largest_budget: the largest `batch_tokens` with which the largest batch still fits into the memory there is,
            beside what is kept. A batch is at least one pair, or one text of those that don't come in pairs, so a run
            whose longest pair has more tokens doesn't fit at all; ``"single"`` is one batch, whatever the budget.
    """

    texts: int
    tokens: int
    batches: int
    batch_bytes: int
    kept_bytes: int
    largest_budget: int

    def __str__(self) -> str:
        return (
            f"{self.texts} texts, {self.tokens} tokens in {self.batches} batches; about {_size(self.batch_bytes)} for "
            f"the largest batch and {_size(self.kept_bytes)} kept"
        )


def check_limit(memory: Any) -> None:
    """Refuse what is no number of bytes.

    Raises:
        ValueError: it is no number from 0 on.
    """
    number = isinstance(memory, numbers.Real) and not isinstance(memory, bool)
    if memory is not None and not (number and 0 <= memory < float("inf")):
        raise ValueError(f"memory is a number of bytes, such as 8_000_000_000, not {memory!r}.")


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _free_memory() -> int:
    """Bytes that MLX may still take: the device's recommended working set, or the machine's memory."""
    device: dict[str, Any] = mx.device_info()
    total = device.get("max_recommended_working_set_size") or device.get("memory_size")
    if not total:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(int(total) - mx.get_active_memory(), 0)


def _token_bytes(model: InterpretableModel, layers: int) -> int:
    """Memory of one token of a batch: the widest block's intermediates, and the keys and values of the blocks."""
    blocks = model._sites.blocks
    widths = [m.weight.shape[-2] for m in blocks[0].modules() if "weight" in m and m.weight.ndim >= 2]
    hidden = model._sites.width(model._sites.resolve("layers.0")) or max(widths, default=1)
    # Quantized weights are integers; the activations have the dtype of the scales and norms.
    floats = [x.dtype.size for x in _arrays(blocks[0]) if mx.issubdtype(x.dtype, mx.floating)]
    item = max(floats, default=4)
    return item * (12 * hidden + 2 * sum(widths)) + 8 * hidden + layers * 2 * hidden * item


def _arrays(module: Any) -> list[mx.array]:
    return [array for _, array in tree_flatten(module.parameters())]


def estimated(
    model: InterpretableModel,
    texts: Sequence[Text],
    batches: Sequence[Batch],
    sites: Sequence[Site],
    method: Method,
    rows: int,
    memory: int | None,
) -> Estimate:
    """What the batches of some texts take; `rows` texts are contrasted, and kept where the method asks for rows."""
    depth = max((site.layer for site in sites if site.layer is not None), default=len(model.layers) - 1) + 1
    width = model._sites.width(sites[0]) or model._sites.width(model._sites.resolve("layers.0")) or 0
    per_token = _token_bytes(model, depth)
    held = [len(b.texts) * max(len(texts[i].tokens) for i in b.texts) for b in batches]
    run = sum(sum(len(texts[i].tokens) for i in b.texts) - b.shared * len(b.texts) // 2 for b in batches)
    each = 2 * HALVES + 4 + (3 * rows if method.rows else 0)
    if method.compute is single:
        each = 3 * len(texts[0].tokens)  # both sides' positions and their difference
    kept = 4 * len(sites) * width * each
    free = (_free_memory() if memory is None else int(memory)) - kept
    return Estimate(len(texts), run, len(batches), max(held) * per_token, kept, max(free // per_token, 0))


def check_memory(found: Estimate, method: Method, batch_tokens: int, memory: int | None) -> None:
    """Refuse a run that wouldn't fit.

    Raises:
        MemoryError: with the budget that fits.
    """
    free = _free_memory() if memory is None else int(memory)
    if found.batch_bytes + found.kept_bytes <= free:
        return
    remedy = f"batch_tokens={found.largest_budget} fits" if found.largest_budget >= 16 else "not even one pair fits"
    if found.kept_bytes > free:
        remedy = "what the method keeps does not fit: take fewer layers or texts, or method='mean_difference'"
    what = f"batch_tokens={batch_tokens}"
    if method.compute is single:
        what, remedy = method.name, "take fewer layers or a shorter pair"
    raise MemoryError(
        f"{what} would take about {_size(found.batch_bytes + found.kept_bytes)}, and {_size(free)} are free: {remedy}."
    )
