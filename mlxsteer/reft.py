"""What was learned from contrast pairs: the edits, and what they do on held-out pairs, as words and data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxsteer.display import written_table
from mlxsteer.interventions import AddVector, LowRank
from mlxsteer.interventions.base import Intervention
from mlxsteer.interventions.files import as_json, save
from mlxsteer.learning import random_basis
from mlxsteer.measures.divergence import Divergence
from mlxsteer.measures.uncertainty import Interval, generator
from mlxsteer.pairs import PAIR_HASHES, check_seed, counted
from mlxsteer.vectors import SteeringVector


@dataclass(frozen=True, eq=False)
class Reft:
    """What was learned, and what it does on held-out pairs.

    Attributes:
        method: ``"loreft"`` or ``"reft_r1"``.
        edits: layer → the intervention at strength 1: `low_rank`, or `add_vector` by the gate's mean.
        strength: what they are multiplied by: 1, or what spends the budget.
        losses: mean loss of each epoch, while it was learned from the train pairs.
        choose_losses: loss on the choosing pairs, before the first epoch and after each.
        epoch: after which of them learning was ended; the rest was thrown away.
        shift: mean shift of ``log P(positive) − log P(negative)`` on the report pairs, in nats, with its interval.
        base: the unsteered mean.
        nulls: mean shifts by the same edits in subspaces (or directions) drawn by chance; see `random`.
        p_value: of the shift against them, one-sided; NaN without nulls.
        divergence: KL(base ‖ steered) on neutral text.
        separation: layer → AUROC on the report pairs of projections on the direction; empty for ``"loreft"``.
        warnings: what speaks against relying on it, in words.
        record: model, data, settings, versions.
    """

    method: str
    edits: dict[int, Intervention]
    strength: float
    losses: tuple[float, ...]
    choose_losses: tuple[float, ...]
    epoch: int
    shift: Interval
    base: float
    nulls: tuple[float, ...]
    p_value: float
    divergence: Divergence
    separation: dict[int, float]
    warnings: tuple[str, ...]
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def interventions(self) -> dict[str, Intervention]:
        """The key dict that steers so; `evaluate` knows by it which pairs were learned from."""
        return at_strength(self.edits, self.strength, self.record.get(PAIR_HASHES))

    @property
    def vector(self) -> SteeringVector:
        """The directions of ReFT-r1, each as long as it is added, as a vector: for detection, plots and arithmetic.

        Raises:
            ValueError: these are LoReFT's edits, which are no directions.
        """
        if self.method != "reft_r1":
            raise ValueError("LoReFT learns a map, not a direction; method='reft_r1' learns one.")
        return vector_of(self.edits, self.strength, self.record)

    def random(self, seed: int = 0) -> dict[str, Intervention]:
        """The null to compare with: every token is moved as far as by `interventions`, but elsewhere.

        LoReFT's ``Rᵀ(W·x + b − R·x)`` becomes ``Qᵀ(W·x + b − R·x)`` with orthonormal rows Q drawn by chance; a
        direction becomes another one of its length.

        Args:
            seed: the same seed gives the same draw.
        """
        check_seed(seed)
        drawn = {layer: elsewhere(edit, generator(seed, layer)) for layer, edit in self.edits.items()}
        return at_strength(drawn, self.strength)

    def __repr__(self) -> str:
        where = " + ".join(f"layer {layer}" for layer in self.edits)
        warned = f", {counted(len(self.warnings), 'warning')}" if self.warnings else ""
        return f"Reft({self.method} at {where}, shift {self.shift} nats, {self.divergence}{warned})"

    def table(self) -> str:
        """The losses, what it does on the report pairs, and the warnings, in plain text."""
        losses = ["", *(f"{loss:.3f}" for loss in self.losses)]
        rows = [
            (f"{i}{' *' if i == self.epoch else ''}", loss, f"{held:.3f}")
            for i, (loss, held) in enumerate(zip(losses, self.choose_losses, strict=True))
        ]
        return "\n".join([written_table(f"loss of {self.method}", ("epoch", "train", "choose"), rows), self.summary()])

    def summary(self) -> str:
        """What it does and what it costs, in words."""
        kept, found = self.record, []
        where = " and ".join(map(str, self.edits))
        found.append(
            f"Learned from {counted(kept['train'], 'train pair')} at layer {where}, at={kept['at']}, ended after epoch "
            f"{self.epoch} by {counted(kept['choose'], 'choosing pair')}; strength {self.strength:.3g}."
        )
        found.append(
            f"On {counted(kept['report'], 'held-out pair')}: log P(positive) − log P(negative) moves by {self.shift} "
            f"nats from {self.base:+.2f}."
        )
        if self.nulls:
            found.append(
                f"{counted(len(self.nulls), 'random edit')} of the same size: {np.mean(self.nulls):+.2f} on average, "
                f"{max(self.nulls):+.2f} at most; p = {self.p_value:.3f}."
            )
        if self.separation:
            each = ", ".join(f"{value:.2f} at layer {layer}" for layer, value in self.separation.items())
            found.append(f"The direction tells held-out sides apart with an AUROC of {each}.")
        found.append(f"On neutral text: {self.divergence}.")
        return "\n".join([*found, *(f"Warning: {warning}" for warning in self.warnings)])

    def save(self, path: str | Path) -> Path:
        """Save the interventions, as `interventions.save` does; `interventions.load` reads them back."""
        return save(self.interventions, path)

    def to_json(self, path: str | Path | None = None) -> str:
        """Everything but the tensors as JSON; with a path, also written there, whole or not at all."""
        data = {
            "method": self.method, "layers": list(self.edits), "strength": self.strength, "losses": self.losses,
            "choose_losses": self.choose_losses, "epoch": self.epoch, "shift": asdict(self.shift), "base": self.base,
            "nulls": self.nulls, "p_value": self.p_value, "divergence": asdict(self.divergence),
            "separation": self.separation, "warnings": self.warnings, "record": self.record,
        }  # fmt: skip
        return as_json(data, path)


def at_strength(edits: Mapping[int, Intervention], strength: float, hashes: Any = None) -> dict[str, Intervention]:
    """Edits by layer as a key dict, all of them times a strength; it carries which pairs they were learned from."""
    made = {}
    for layer, edit in edits.items():
        changed: dict[str, Any] = {"strength": strength * edit.strength}
        made[f"layers.{layer}"] = replace(edit, **changed)
    for edit in made.values():
        edit._cache[PAIR_HASHES] = hashes  # goes with the object, into no file
    return made


def vector_of(edits: Mapping[int, Intervention], strength: float, record: Mapping[str, Any]) -> SteeringVector:
    """The directions of ReFT-r1's edits, each as long as it is added."""
    info = {**record["model"], "method": "reft_r1", "pairs": record["train"]}
    if hashes := record.get(PAIR_HASHES):
        info[PAIR_HASHES] = hashes
    directions = {layer: strength * edit.strength * edit.vector for layer, edit in edits.items()}  # type: ignore[attr-defined]
    return SteeringVector(directions, info=info)


def elsewhere(edit: Intervention, rng: np.random.Generator) -> Intervention:
    """The same edit in a subspace or direction drawn by chance."""
    if isinstance(edit, LowRank):
        basis = mx.array(random_basis(edit.basis.shape[0], edit.basis.shape[1], rng))
        return replace(edit, basis=basis, weight=edit.weight - edit.basis + basis)
    assert isinstance(edit, AddVector)
    drawn = rng.standard_normal(edit.vector.shape)
    length = float(np.linalg.norm(np.array(edit.vector, np.float64)))
    return replace(edit, vector=mx.array((length * drawn / np.linalg.norm(drawn)).astype(np.float32)))
