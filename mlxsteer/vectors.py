"""`SteeringVector`: one direction per layer, where it came from, and its arithmetic and file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxsteer.interventions import AddVector
from mlxsteer.interventions.base import number, tensor
from mlxsteer.interventions.files import read_tensors, write_whole
from mlxsteer.positions import At

FORMAT = "mlxsteer.vector"
VERSION = 1


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """Directions in the activations of several layers.

    Attributes:
        directions: layer → direction, (D,) float32.
        site: the key they belong to, with ``{layer}`` in place of the number.
        residual_norms: layer → median norm of the activation there, over real tokens without BOS.
        info: where they come from: model, architecture, hidden size, method, and so on.
    """

    directions: Mapping[int, mx.array]
    site: str = "layers.{layer}"
    residual_norms: Mapping[int, float] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)

    __array_ufunc__ = None  # NumPy numbers leave arithmetic to us: np.float64(2) * vector

    def __post_init__(self) -> None:
        if not self.directions:
            raise ValueError("a steering vector has a direction for at least one layer.")
        try:
            named = "{layer}" in self.site and self.site.format(layer=0) != self.site
        except (KeyError, IndexError, ValueError):
            named = False
        if not named:
            raise ValueError(
                f"a vector's site is a key with {{layer}} in it, such as 'layers.{{layer}}', not {self.site!r}."
            )
        made = {
            int(layer): tensor(direction, f"the direction of layer {layer}")
            for layer, direction in sorted(self.directions.items())
        }
        if len(shapes := {direction.shape for direction in made.values()}) > 1 or len(next(iter(shapes))) != 1:
            raise ValueError(f"the directions have shapes {sorted(shapes)}; all are (D,) with one D.")
        object.__setattr__(self, "directions", made)

    def __getitem__(self, layer: int) -> mx.array:
        if layer not in self.directions:
            raise KeyError(f"the vector has no direction for layer {layer}; it has {self.layers}")
        return self.directions[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self.directions)

    def __len__(self) -> int:
        return len(self.directions)

    @property
    def layers(self) -> list[int]:
        """The layers that have a direction."""
        return list(self.directions)

    @property
    def width(self) -> int:
        """D, the number of features."""
        return int(next(iter(self.directions.values())).shape[0])

    def __repr__(self) -> str:
        first, last = self.layers[0], self.layers[-1]
        origin = f" from {self.info['model']}" if "model" in self.info else ""
        return f"SteeringVector({len(self)} layers, {first} to {last}, of width {self.width}{origin})"

    # -- steering --------------------------------------------------------------------------------------------------

    def at(
        self,
        layers: int | Sequence[int] | Mapping[int, float],
        strength: float | Sequence[float] = 1.0,
        at: At = "all",
    ) -> dict[str, AddVector]:
        """A key dict that adds the vector.

        Args:
            layers: a layer, several, or layer → strength.
            strength: multiplies them all; a number, or one per row of a batch.
            at: which tokens.
        """
        if isinstance(layers, Mapping):
            strengths = dict(layers)
        else:
            chosen = [layers] if hasattr(layers, "__index__") and not hasattr(layers, "__len__") else layers
            strengths = dict.fromkeys(chosen, 1.0)  # type: ignore[arg-type]
        rows = [number(s, "a strength") for s in strength] if isinstance(strength, (list, tuple)) else None
        base = number(strength, "a strength") if rows is None else 0.0
        return {
            self.site.format(layer=int(layer)): AddVector(
                self[int(layer)], base * own if rows is None else [row * own for row in rows], at=at
            )
            for layer, own in strengths.items()
        }

    # -- arithmetic ------------------------------------------------------------------------------------------------

    def _map(self, change: Callable[[int, mx.array], mx.array]) -> SteeringVector:
        directions = {layer: change(layer, direction) for layer, direction in self.directions.items()}
        return SteeringVector(directions, self.site, self.residual_norms, self.info)

    def _with(self, other: SteeringVector, change: Callable[[mx.array, mx.array], mx.array]) -> SteeringVector:
        if not isinstance(other, SteeringVector):
            return NotImplemented
        if (other.site, other.layers, other.width) != (self.site, self.layers, self.width):
            raise ValueError(f"{self} and {other} don't fit together: sites, layers and widths must be the same.")
        return self._map(lambda layer, direction: change(direction, other[layer]))

    def __add__(self, other: SteeringVector) -> SteeringVector:
        return self._with(other, lambda a, b: a + b)

    def __radd__(self, other: Any) -> SteeringVector:
        return self if isinstance(other, int) and other == 0 else NotImplemented  # sum([v, w]) begins with 0

    def __sub__(self, other: SteeringVector) -> SteeringVector:
        return self._with(other, lambda a, b: a - b)

    def __mul__(self, factor: float) -> SteeringVector:
        return self._map(lambda _, direction: direction * factor)

    __rmul__ = __mul__

    def __truediv__(self, factor: float) -> SteeringVector:
        return self._map(lambda _, direction: direction / factor)

    def __neg__(self) -> SteeringVector:
        return self._map(lambda _, direction: -direction)

    def normalized(self) -> SteeringVector:
        """Every direction scaled to length 1."""
        return self._map(lambda _, direction: direction / mx.linalg.norm(direction))

    def orthogonal_to(self, other: SteeringVector) -> SteeringVector:
        """What is left of every direction without its component along the other's: ``v − ⟨v, ŵ⟩ŵ``."""
        unit = other.normalized()
        return self._with(unit, lambda a, b: a - mx.sum(a * b) * b)

    def cosine(self, other: SteeringVector) -> dict[int, float]:
        """Layer → cosine of the angle between the two directions."""
        product = self.normalized()._with(other.normalized(), lambda a, b: a * b)
        sums: dict[int, Any] = {layer: mx.sum(direction).item() for layer, direction in product.directions.items()}
        return {layer: float(value) for layer, value in sums.items()}

    # -- files -------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, whole or not at all.

        Raises:
            ValueError: the name doesn't end in ``.safetensors``.
        """
        if Path(path).suffix != ".safetensors":
            raise ValueError(f"{path}: a vector is saved as a .safetensors file.")
        data = {
            "version": VERSION,
            "site": self.site,
            "residual_norms": {str(layer): norm for layer, norm in self.residual_norms.items()},
            "info": dict(self.info),
        }
        tensors = {f"layers.{layer}": direction for layer, direction in self.directions.items()}
        return write_whole(path, lambda temporary: mx.save_safetensors(temporary, tensors, {FORMAT: json.dumps(data)}))

    @classmethod
    def load(cls, path: str | Path) -> SteeringVector:
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, foreign, or of a later version.
        """
        tensors, data = read_tensors(path, FORMAT, VERSION)
        try:
            directions = {int(name.removeprefix("layers.")): value for name, value in tensors.items()}
            norms = {int(layer): float(norm) for layer, norm in data["residual_norms"].items()}
            return cls(directions, data["site"], norms, data["info"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: the vector in it is damaged ({error}).") from error
