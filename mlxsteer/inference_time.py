"""Inference-time intervention: the heads whose values tell two sides apart, shifted along what tells them apart.

Li et al. 2023, Inference-Time Intervention: Eliciting Truthful Answers from a Language Model, arXiv 2306.03341.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxsteer.directions import check_scikit_learn, logistic
from mlxsteer.display import written_table
from mlxsteer.heads import layers_with_heads, ranked, values_of
from mlxsteer.interventions import AddVector, Heads
from mlxsteer.interventions.base import Intervention, number
from mlxsteer.interventions.files import as_json
from mlxsteer.measures.uncertainty import generator
from mlxsteer.model import InterpretableModel
from mlxsteer.pairs import ContrastPair, PairSet, check_seed, check_switch, checked
from mlxsteer.positions import At, Position
from mlxsteer.questions import check_count
from mlxsteer.reading import check_budget, check_model, encode_pairs

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class HeadShift:
    """Heads that tell two sides apart, and how far each is to be shifted.

    Attributes:
        heads: (layer, head, accuracy) of the chosen heads, the most accurate first.
        accuracies: held-out accuracy of a probe on each head, (layers, heads); NaN in layers without heads.
        shifts: layer → (its chosen heads, ``σ·θ̂`` of each, (k, head_dim)).
        strength: α, how many standard deviations.
        at: which tokens are shifted.
        warnings: what speaks against relying on it, in words.
        record: model, data, settings.
    """

    heads: tuple[tuple[int, int, float], ...]
    accuracies: Array
    shifts: dict[int, tuple[tuple[int, ...], mx.array]]
    strength: float
    at: At
    warnings: tuple[str, ...] = ()
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def interventions(self) -> dict[str, Intervention]:
        """The key dict that shifts the heads: ``a_j' = a_j + α·σ_j·θ̂_j``."""
        return self._adding({layer: shift for layer, (_, shift) in self.shifts.items()})

    def random(self, seed: int = 0) -> dict[str, Intervention]:
        """The same heads shifted as far in directions drawn by chance: the null to compare with.

        Args:
            seed: the same seed gives the same directions.
        """
        check_seed(seed)
        drawn = {}
        for layer, (_, shift) in self.shifts.items():
            length = np.linalg.norm(np.array(shift), axis=-1, keepdims=True)
            noise = generator(seed, layer).standard_normal(shift.shape)
            drawn[layer] = mx.array((noise * length / np.linalg.norm(noise, axis=-1, keepdims=True)).astype(np.float32))
        return self._adding(drawn)

    def _adding(self, shifts: dict[int, mx.array]) -> dict[str, Intervention]:
        return {
            f"layers.{layer}.attn.heads": Heads(self.shifts[layer][0], AddVector(shift, self.strength, at=self.at))
            for layer, shift in shifts.items()
        }

    def __repr__(self) -> str:
        accuracies = [accuracy for *_, accuracy in self.heads]
        warned = f", {len(self.warnings)} warnings" if self.warnings else ""
        return (
            f"HeadShift({len(self.heads)} heads, accuracy {min(accuracies):.2f} to {max(accuracies):.2f}, "
            f"strength {self.strength:g}{warned})"
        )

    def table(self) -> str:
        """The heads and the warnings, in plain text."""
        rows = [(str(layer), str(head), f"{accuracy:.3f}") for layer, head, accuracy in self.heads]
        table = written_table("probes on heads, held-out pairs", ("layer", "head", "accuracy"), rows)
        return "\n".join([table, *(f"Warning: {warning}" for warning in self.warnings)])

    def to_json(self, path: str | Path | None = None) -> str:
        """Everything but the shifts as JSON; with a path, also written there, whole or not at all."""
        data = {"heads": [list(one) for one in self.heads], "accuracies": self.accuracies.tolist(),
                "strength": self.strength, "at": repr(self.at), "warnings": list(self.warnings),
                "record": self.record}  # fmt: skip
        return as_json(data, path)

    def plot(self, path: str | Path | None = None) -> Any:
        """The accuracies above chance as a heat map, chosen heads framed; a matplotlib figure.

        Args:
            path: also write it there, as PNG, PDF or SVG by suffix.
        """
        from mlxsteer.plots import plot_heads

        framed = [(layer, head) for layer, head, _ in self.heads]
        return plot_heads(self.accuracies - 0.5, "probes on heads", "accuracy above chance", framed, path)


def shift_heads(
    model: InterpretableModel,
    pairs: Iterable[ContrastPair],
    *,
    top: int = 48,
    strength: float = 15.0,
    at: At = "last",
    chat: bool = False,
    seed: int = 0,
    batch_tokens: int = 4096,
) -> HeadShift:
    """Inference-time intervention: choose heads by probes, shift each along its mean difference.

    A logistic probe on each head's value at the last token is fitted to the train pairs, and the `top` most accurate on
    the choose pairs are taken. θ is the mean difference of a head's values between the sides (the mass mean shift,
    which does better than the probe's own weights), σ the standard deviation of all its values along θ̂, both of the
    train pairs; ``a' = a + α·σ·θ̂``. Li et al. 2023, arXiv 2306.03341: 48 of 1,024 heads, α = 15, each newest token.

    Args:
        model: the model.
        pairs: contrast pairs; those of the report split stay unseen. Without splits they are put into some by `seed`.
        top: how many heads.
        strength: α, in standard deviations.
        at: which tokens are shifted; the newest one, at every step.
        chat: prompts are a user's messages.
        seed: of the splits, where there are none.
        batch_tokens: the most tokens in one batch, padding included.

    Raises:
        ImportError: there is no scikit-learn, whose logistic regression the probe is.
        TypeError: no model, no pairs.
        ValueError: there are fewer heads, or a side has fewer than two pairs to fit or one to choose on.
    """
    check_scikit_learn("shift_heads")
    check_model(model)
    check_count(top, "top", 1)
    check_switch("chat", chat)
    check_seed(seed)
    check_budget(batch_tokens)
    strength = number(strength, "strength")
    Position.of(at)
    sites = layers_with_heads(model)
    total = sum(int(site.heads or 0) for site in sites.values())
    if top > total:
        raise ValueError(f"top={top}: the model has {total} heads.")
    given = PairSet(checked(pairs))
    given = given if given.splits else given.with_splits(seed=seed)
    parts = [given.split(name) for name in ("train", "choose")]
    if len(parts[0]) < 2:
        raise ValueError(f"probes need at least 2 train pairs, and there are {len(parts[0])}.")
    train, choose = (_values(model, given, part, chat, batch_tokens) for part in parts)
    grid = np.full((len(model.layers), max(int(site.heads or 0) for site in sites.values())), np.nan)
    for layer in sites:
        for head in range(train[layer].shape[1]):
            rows, others = train[layer][:, head], choose[layer][:, head]
            weights, intercept = logistic(rows[: len(rows) // 2], rows[len(rows) // 2 :])
            grid[layer, head] = np.mean(
                (others @ weights + intercept > 0) == (np.arange(len(others)) < len(others) // 2)
            )
    chosen = ranked(grid, top)
    shifts = {}
    for layer in sorted({layer for layer, *_ in chosen}):
        heads = tuple(head for one, head, _ in chosen if one == layer)
        shifts[layer] = heads, mx.array(np.stack([mass_mean_shift(train[layer][:, head]) for head in heads]))
    mx.eval([shift for _, shift in shifts.values()])
    record = {"model": model.identity, "train": len(parts[0]), "choose": len(parts[1]), "top": top, "chat": chat,
              "data": given.fingerprint, "seed": seed}  # fmt: skip
    return HeadShift(tuple(chosen), grid, shifts, strength, at, tuple(_doubts(chosen, len(parts[1]))), record)


def _values(
    model: InterpretableModel, pairs: PairSet, chosen: PairSet, chat: bool, batch_tokens: int
) -> dict[int, Array]:
    """layer → the values of both sides, positives first, (2·pairs, heads, head_dim) float64."""
    encoded = encode_pairs(model, pairs, chosen, chat)
    texts = [pair[side] for side in (0, 1) for pair in encoded]
    return {layer: np.array(rows, np.float64) for layer, rows in values_of(model, texts, batch_tokens).items()}


def mass_mean_shift(values: Array) -> Array:
    """``σ·θ̂`` of one head: the unit mean difference of its values, times their standard deviation along it.

    Args:
        values: (2·n, head_dim), positives first.

    Returns:
        (head_dim,) float32; zeros where both sides have one mean.
    """
    half = len(values) // 2
    theta = values[:half].mean(axis=0) - values[half:].mean(axis=0)
    unit = theta / max(float(np.linalg.norm(theta)), 1e-30)
    found: Array = (np.std(values @ unit) * unit).astype(np.float32)
    return found


def _doubts(chosen: list[tuple[int, int, float]], held: int) -> list[str]:
    said = []
    if chosen[0][2] < 0.6:
        said.append(f"no head tells the sides apart: the best probe is right on {chosen[0][2]:.0%} of held-out texts.")
    elif chosen[-1][2] < 0.6:
        weak = sum(accuracy < 0.6 for *_, accuracy in chosen)
        said.append(f"{weak} of the {len(chosen)} heads hardly tell the sides apart: take fewer.")
    if held < 16:
        said.append(f"heads were chosen on {held} pairs, where accuracies differ by chance.")
    return said
