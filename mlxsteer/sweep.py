"""Layer × strength grids: one clean pass, and from each layer on only what the edit changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from rich.console import Console
from rich.table import Table

from mlxsteer.hooks import activation, alias, attached, with_activation
from mlxsteer.interventions import AddVector
from mlxsteer.interventions.base import Where, number
from mlxsteer.model import InterpretableModel
from mlxsteer.pairs import ContrastPair, checked
from mlxsteer.plans import Plan
from mlxsteer.positions import At, Prompt, Tokens
from mlxsteer.reading import encode_side
from mlxsteer.sites import Site
from mlxsteer.vectors import SteeringVector


@dataclass(frozen=True, eq=False)
class Sweep:
    """The effect of a steering vector on contrast pairs, over layers and strengths.

    Attributes:
        effect: ``log P(positive | prompt) − log P(negative | prompt)`` in nats, summed over the completion's tokens;
            layers × strengths × pairs.
        layers: the layers of the first axis.
        strengths: the strengths of the second axis.
    """

    effect: np.ndarray
    layers: list[int]
    strengths: list[float]

    def __repr__(self) -> str:
        layers, strengths, pairs = self.effect.shape
        return f"Sweep({layers} layers × {strengths} strengths × {pairs} pairs)"

    def table(self) -> str:
        """The mean effect over pairs as a table in plain text; layers down, strengths across."""
        console = Console(width=100, no_color=True, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()

    def __rich__(self) -> Table:
        """The same for a terminal that shows colours."""
        mean = self.effect.mean(axis=2)
        table = Table(title="log P(positive) − log P(negative), mean over pairs, in nats")
        table.add_column("layer", justify="right")
        for strength in self.strengths:
            table.add_column(f"{strength:+g}" if strength else "0", justify="right")
        low, high = mean.min(), mean.max()
        for layer, row in zip(self.layers, mean, strict=True):
            cells = [f"[{_colour(value, low, high)}]{value:+.2f}[/]" for value in row]
            table.add_row(str(layer), *cells)
        return table

    def best(self) -> tuple[int, float]:
        """The layer and strength s that move the effect most in both directions, at +s and at −s.

        Raises:
            ValueError: no strength was swept together with its negative and 0.
        """
        mean = self.effect.mean(axis=2)
        at = {strength: i for i, strength in enumerate(self.strengths)}
        both = [s for s in self.strengths if s > 0 and -s in at and 0.0 in at]
        if not both:
            raise ValueError("best() needs a strength together with its negative and 0 in the sweep.")
        moved = {
            (layer, s): min(row[at[s]] - row[at[0.0]], row[at[0.0]] - row[at[-s]])
            for layer, row in zip(self.layers, mean, strict=True)
            for s in both
        }
        return max(moved, key=lambda choice: moved[choice])


def _colour(value: float, low: float, high: float) -> str:
    """Blue for low, orange for high, plain between: told apart by every kind of sight."""
    share = (value - low) / max(high - low, 1e-9)
    if share < 0.25:
        return "blue"
    return "dark_orange" if share > 0.75 else "default"


def _rows(model: InterpretableModel, pairs: Sequence[ContrastPair]) -> tuple[list[list[int]], list[int]]:
    """Token ids of prompt + side, positives first, and how many of them are prompt.

    Raises:
        ValueError: a pair's sides are prompts themselves, so that there is no completion to score.
    """
    encoded = [encode_side(model, pair, side) for side in ("positive", "negative") for pair in pairs]
    if any(len(tokens) == prompt for tokens, prompt in encoded):
        raise ValueError("these pairs are two prompts each: a sweep measures completions, and there are none to score.")
    return [tokens for tokens, _ in encoded], [prompt for _, prompt in encoded]


def _effect(logits: mx.array, rows: Sequence[Sequence[int]], prompts: Sequence[int], copies: int) -> mx.array:
    """Log-probability difference of the two sides, (copies, pairs), from logits (copies · rows, tokens, V)."""
    width = logits.shape[1]
    targets = mx.array([[*row[1:], *[0] * (width - len(row) + 1)][:width] for row in rows])
    counted = mx.array(
        [[prompt - 1 <= t < len(row) - 1 for t in range(width)] for row, prompt in zip(rows, prompts, strict=True)]
    )
    logits = logits.astype(mx.float32)
    targets, counted = mx.tile(targets, (copies, 1)), mx.tile(counted, (copies, 1))
    chosen = mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - mx.logsumexp(logits, axis=-1)
    sums = mx.sum(mx.where(counted, chosen, 0.0), axis=1).reshape(copies, 2, -1)
    return sums[:, 0] - sums[:, 1]


def sweep(
    model: InterpretableModel,
    vector: SteeringVector,
    pairs: Iterable[ContrastPair],
    *,
    layers: str | int | Sequence[int] = "all",
    strengths: float | Sequence[float] = (-2.0, -1.0, 0.0, 1.0, 2.0),
    at: At = -1,
    progress: Callable[[int, int], None] | None = None,
) -> Sweep:
    """Add a vector at each layer with each strength, and measure what it does to the pairs' completions.

    One clean pass; then every layer goes on from the clean outputs of the blocks before it, which aren't run again,
    with the strengths as rows of the batch. Strength 0 is the clean pass. Where a family's blocks can't be replayed,
    every layer is a pass of its own.

    Args:
        model: the model.
        vector: one direction per layer.
        pairs: contrast pairs, all in one batch per layer.
        layers: which layers, or ``"all"`` that the vector has.
        strengths: multiples of the vector.
        at: which tokens; the pair's prompt is the prompt, its completion counts as generated.
        progress: called with the number of layers done and the number of layers.

    Returns:
        A `Sweep`.

    Raises:
        ValueError: there are no pairs or no strengths, or the vector lacks a layer.
    """
    chosen = checked(pairs)
    strengths = [number(s, "a strength") for s in np.atleast_1d(np.asarray(strengths))]
    if not strengths:
        raise ValueError("a sweep needs at least one strength.")
    if isinstance(layers, str) and layers != "all":
        raise ValueError(f"layers are 'all', a layer, or a list of layers, not {layers!r}.")
    wanted = list(vector) if isinstance(layers, str) else [int(layer) for layer in np.atleast_1d(np.asarray(layers))]
    for layer in wanted:
        vector.at(layer)  # refuse a missing layer before anything runs
    rows, prompts = _rows(model, chosen)
    scan = _Scan(model, rows, prompts)
    moving = [s for s in strengths if s]
    effect = np.zeros((len(wanted), len(strengths), len(chosen)))
    for i, layer in enumerate(wanted):
        moved = iter(scan.edited(vector, layer, moving, at) if moving else [])
        for j, strength in enumerate(strengths):
            effect[i, j] = next(moved) if strength else scan.clean
        if progress is not None:
            progress(i + 1, len(wanted))
    return Sweep(effect, wanted, strengths)


class _Scan:
    """The clean pass over all rows, and continuations from it."""

    def __init__(self, model: InterpretableModel, rows: list[list[int]], prompts: list[int]) -> None:
        self.model, self.rows, self.prompts = model, rows, prompts
        with model.trace(rows, prompt_tokens=prompts) as trace:
            self.blocks = [model._sites.resolve(f"layers.{i}") for i in range(len(model.layers))]
            self.whole = {block: trace.whole(block) for block in self.blocks}
            clean = _effect(trace.output.save(), rows, prompts, 1)
        mx.eval(clean, self.whole)
        self.clean = np.array(clean)[0]
        self.inputs = trace.tokens

    def edited(self, vector: SteeringVector, layer: int, strengths: Sequence[float], at: At) -> np.ndarray:
        """The effect at one layer, (strengths, pairs)."""
        copies, sites = len(strengths), self.model._sites
        tiled = [strength for strength in strengths for _ in self.rows]
        site = sites.resolve(vector.site.format(layer=layer))
        intervention = AddVector(vector[layer], tiled, at=at)
        lengths = [len(row) for row in self.rows] * copies
        known = [
            Prompt(count, row[:count], self.model.tokenizer.decode if self.model.tokenizer else None)
            for row, count in zip(self.rows, self.prompts, strict=True)
        ] * copies
        tokens = Tokens([0] * len(lengths), lengths, self.inputs.shape[1], known)
        replay: dict[Site, Any] = {}
        edits = [(site, intervention)]
        if sites.family.replay:
            replay = {block: _tiled(self.whole[block], copies) for block in self.blocks[:layer]}
            block = self.blocks[layer]
            if site == block:
                whole = _tiled(self.whole[block], copies)
                moved = intervention(activation(whole, site), Where(tokens, site.key, layer))
                replay[block], edits = with_activation(whole, moved), []
        plan = Plan(sites, edits=edits, replay=replay, tokens=tokens)
        with attached(plan):
            logits = self.model.model(mx.tile(self.inputs, (copies, 1)))
        return np.array(_effect(logits, self.rows, self.prompts, copies))


def _tiled(output: Any, copies: int) -> Any:
    """What a block gave, with every batch-first array of it repeated along the batch."""
    if isinstance(output, mx.array):
        return mx.tile(output, (copies, *(1,) * (output.ndim - 1))) if output.ndim else output
    if isinstance(output, (tuple, list)):
        return type(output)(_tiled(part, copies) for part in output)
    return {k: _tiled(v, copies) for k, v in output.items()} if isinstance(output, Mapping) else alias(output)
