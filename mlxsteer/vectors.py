"""`SteeringVector`: one direction per layer, where it came from, and its arithmetic and file."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from mlxsteer.interventions import AddSequence, AddVector
from mlxsteer.interventions.base import Intervention, number, tensor
from mlxsteer.positions import At

FORMAT = "mlxsteer.vector"
VERSION = 1
_MEASURED = ("agreement", "reliability", "data")


class VectorMismatchWarning(UserWarning):
    """A vector is used on another model, or under another quantization, than it was computed on."""


def _length(direction: mx.array) -> mx.array:
    return mx.sqrt(mx.sum(direction * direction))


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """Directions in the activations of several layers.

    Attributes:
        directions: layer → direction, (D,) float32; or one per position at the front of a prompt, (tokens, D).
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
        if len(shapes := {direction.shape for direction in made.values()}) > 1 or len(next(iter(shapes))) not in (1, 2):
            raise ValueError(f"the directions have shapes {sorted(shapes)}; all are (D,), or all (tokens, D).")
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
        return int(next(iter(self.directions.values())).shape[-1])

    @property
    def positions(self) -> int | None:
        """Number of positions at the front of a prompt that have a direction each; None for one direction for all."""
        shape = next(iter(self.directions.values())).shape
        return shape[0] if len(shape) == 2 else None

    @property
    def norms(self) -> dict[int, float]:
        """Layer → length of the direction."""
        lengths: dict[int, Any] = {layer: _length(direction).item() for layer, direction in self.directions.items()}
        return {layer: float(length) for layer, length in lengths.items()}

    @property
    def agreement(self) -> dict[int, float]:
        """Layer → mean cosine between the differences of two pairs; empty where there were no pairs.

        Near 0 the pairs pull in unrelated directions, and steering with their mean is not to be relied on: Braun et al.
        2025, arXiv 2505.22637, find that it predicts steerability.
        """
        return {int(layer): float(value) for layer, value in dict(self.info.get("agreement", {})).items()}

    @property
    def reliability(self) -> dict[int, float]:
        """Layer → mean cosine between the vectors of two random halves of the data; empty where there were too few.

        Of the mean difference, whichever method was used. Below about 0.9, more data would give another vector.
        """
        return {int(layer): float(value) for layer, value in dict(self.info.get("reliability", {})).items()}

    def __repr__(self) -> str:
        first, last = self.layers[0], self.layers[-1]
        origin = f" from {self.info['model']}" if "model" in self.info else ""
        each = f", one for each of {self.positions} positions" if self.positions is not None else ""
        return f"SteeringVector({len(self)} layers, {first} to {last}, of width {self.width}{each}{origin})"

    def describe(self) -> str:
        """Where the vector comes from, and a table of its layers: length, residual norm, agreement, reliability."""
        told = {"site": self.site, **self.info}
        lines = [f"{name}: {value}" for name, value in told.items() if name not in ("agreement", "reliability")]
        columns = [self.norms, self.residual_norms, self.agreement, self.reliability]
        names = ["layer", "length", "residual norm", "agreement", "reliability"]
        shown = [(name, column) for name, column in zip(names[1:], columns, strict=True) if column]
        lines.append("  ".join([names[0], *(name for name, _ in shown)]))
        for layer in self.layers:
            cells = [f"{column[layer]:.3g}".rjust(len(name)) if layer in column else " " * len(name)
                     for name, column in shown]  # fmt: skip
            lines.append("  ".join([str(layer).rjust(len(names[0])), *cells]))
        return "\n".join(lines)

    def check(self, model: Any) -> None:
        """Whether the vector belongs to a model.

        Args:
            model: an `InterpretableModel`.

        Raises:
            ValueError: the model has fewer layers, or another width at the vector's site.
            UnknownKey: the model has no such site.

        Warns:
            VectorMismatchWarning: the vector was computed on another model, or under another quantization.
        """
        self._check(model, stacklevel=3)

    def _check(self, model: Any, stacklevel: int) -> None:
        count = len(model.layers)
        if self.layers[-1] >= count or self.info.get("layers", count) != count:
            own = self.info.get("layers", f"directions up to layer {self.layers[-1]}")
            raise ValueError(f"the vector has {own} layers and {model.name} has {count}: it is another model's.")
        for layer in (self.layers[0], self.layers[-1]):
            width = model._sites.width(model._sites.resolve(self.site.format(layer=layer)))
            if width is not None and width != self.width:
                raise ValueError(
                    f"the vector is of width {self.width}, and {self.site.format(layer=layer)} of {model.name} of "
                    f"width {width}: it is another model's."
                )
        own, here = self.info, model.identity
        said = [
            f"{name} {own[name]!r} and not {here[name]!r}" for name in here if name in own and own[name] != here[name]
        ]
        if said:
            warnings.warn(
                f"the vector was computed on {', '.join(said)}: what it does here is to be measured anew.",
                VectorMismatchWarning,
                stacklevel=stacklevel,
            )

    # -- steering --------------------------------------------------------------------------------------------------

    def at(
        self,
        layers: int | Sequence[int] | Mapping[int, float],
        strength: float | Sequence[float] = 1.0,
        at: At = "all",
        *,
        unit: Literal["raw", "residual"] = "raw",
    ) -> dict[str, Intervention]:
        """A key dict that adds the vector.

        Args:
            layers: a layer, several, or layer → strength.
            strength: multiplies them all; a number, or one per row of a batch.
            at: which tokens. A vector that has a direction per position is added at the front of the prompt, and takes
                no other place.
            unit: ``"raw"`` adds ``s·v``; ``"residual"`` adds ``s·r·v/‖v‖``, with r the layer's median norm, so that a
                strength means the same at every layer and in every model.

        Raises:
            KeyError: the vector lacks a layer.
            ValueError: its residual norms are unknown and the unit is ``"residual"``.
        """
        if unit not in ("raw", "residual"):
            raise ValueError(f"unit is 'raw' or 'residual', not {unit!r}.")
        if isinstance(layers, Mapping):
            strengths = dict(layers)
        else:
            chosen = [layers] if hasattr(layers, "__index__") and not hasattr(layers, "__len__") else layers
            strengths = dict.fromkeys(chosen, 1.0)  # type: ignore[arg-type]
        rows = [number(s, "a strength") for s in strength] if isinstance(strength, (list, tuple)) else None
        base = number(strength, "a strength") if rows is None else 0.0
        made: dict[str, Intervention] = {}
        for layer, own in strengths.items():
            direction = self[int(layer)] if unit == "raw" else self._in_residual_units(int(layer))
            strong = base * own if rows is None else [row * own for row in rows]
            if self.positions is None:
                made[self.site.format(layer=int(layer))] = AddVector(direction, strong, at=at)
                continue
            if at not in ("all", "first"):
                raise ValueError(
                    f"this vector has a direction for each of the first {self.positions} positions: no at=."
                )
            made[self.site.format(layer=int(layer))] = AddSequence(direction, strong)
        return made

    def _in_residual_units(self, layer: int) -> mx.array:
        """The direction with the length of the layer's median norm."""
        direction, norm = self[layer], self.residual_norms.get(layer)
        if norm is None:
            raise ValueError(f"unit='residual' needs the vector's residual norm at layer {layer}, and it is unknown.")
        length = _length(direction)
        if not length.item():
            raise ValueError(f"the direction of layer {layer} is zero: it has no unit of length.")
        return direction * (norm / length)

    # -- arithmetic ------------------------------------------------------------------------------------------------

    def _map(self, change: Callable[[int, mx.array], mx.array]) -> SteeringVector:
        directions = {layer: change(layer, direction) for layer, direction in self.directions.items()}
        return SteeringVector(directions, self.site, self.residual_norms, self.info)

    def _with(self, other: SteeringVector, change: Callable[[mx.array, mx.array], mx.array]) -> SteeringVector:
        if not isinstance(other, SteeringVector):
            return NotImplemented
        if (other.site, other.layers, other.width) != (self.site, self.layers, self.width):
            raise ValueError(f"{self} and {other} don't fit together: sites, layers and widths must be the same.")
        made = self._map(lambda layer, direction: change(direction, other[layer]))
        # What both say of themselves is true of what they make together; how reliable they were is not.
        kept = {k: v for k, v in self.info.items() if k not in _MEASURED and other.info.get(k, v) == v}
        return SteeringVector(made.directions, self.site, self.residual_norms, kept)

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
        return self._map(lambda layer, direction: direction / self._settled_length(layer))

    def _settled_length(self, layer: int) -> mx.array:
        length = _length(self[layer])
        if not length.item():
            raise ValueError(f"the direction of layer {layer} is zero: it can't be scaled to length 1.")
        return length

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
        """Write the vector as one file, whole or not at all, in the format that the path's suffix says.

        - ``.safetensors`` holds everything.
        - ``.gguf`` is a control vector for llama.cpp and repeng: of the residual stream, without layer 0.
        - ``.npz`` and ``.npy`` hold the directions alone: an array for each layer, or a matrix with a row for each.

        Returns:
            the path.

        Raises:
            ValueError: nothing is written under this suffix, or its format can't hold the vector.
            FileNotFoundError: there is no such folder.

        Warns:
            UserWarning: a ``.gguf`` file has no place for the direction of layer 0.
        """
        from mlxsteer import formats

        return formats.save(self, path)

    @classmethod
    def load(
        cls, path: str | Path, *, model: Any = None, revision: str | None = None, filename: str | None = None
    ) -> SteeringVector:
        """Read a vector from a file, a folder, or a repository of the Hugging Face Hub. Nothing is unpickled.

        Besides what `save` writes, it takes repeng's and llama.cpp's ``.gguf``, rotalabs-steer's ``.json`` with ``.pt``
        and folders of them, and other ``.npz`` files with arrays named by layer.

        Args:
            path: what exists here always comes first; else ``"user/repo"`` names a repository.
            model: the model that it is for, to `check` that it belongs to it.
            revision: a repository's branch, tag or commit.
            filename: which file of a folder or repository; by default ``vector.safetensors``, or the only vector in it.

        Raises:
            FileNotFoundError: there is no such file, folder or repository.
            ConnectionError: the Hub can't be reached.
            ValueError: the file is damaged, foreign, of a later version, or one of several; or of another model than
                the one given.

        Warns:
            VectorMismatchWarning: the vector was computed on another model, or under another quantization.
        """
        from mlxsteer import formats

        vector = formats.load(path, revision=revision, filename=filename)
        if model is not None:
            vector._check(model, stacklevel=3)
        return vector

    def push_to_hub(
        self, repository: str, *, private: bool = False, commit_message: str = "Add a steering vector"
    ) -> str:
        """Write the vector and a model card into a repository of the Hugging Face Hub, made if it isn't there.

        Args:
            repository: ``"user/repo"``. Its ``vector.safetensors`` and ``README.md`` are written anew.
            private: whether a repository that is made is private.
            commit_message: what the commit says.

        Returns:
            the repository's address.

        Raises:
            FileNotFoundError: there is no such user or organization, or you may not write there.
            ConnectionError: the Hub can't be reached, or refuses.
        """
        from mlxsteer import formats

        return formats.push(self, repository, private=private, commit_message=commit_message)


def to_mean_norm(vectors: Sequence[SteeringVector]) -> list[SteeringVector]:
    """Vectors of several behaviours at equal lengths: at each layer every one is scaled to their mean length.

    So that one strength compares behaviours, as in contrastive activation addition (Rimsky et al. 2024, arXiv
    2312.06681). Layers keep their own scales: the residual stream grows with depth.

    Args:
        vectors: two or more, with the same site, layers and width.

    Raises:
        ValueError: they don't fit together, or a direction is zero.
    """
    given = list(vectors)
    if not given:
        raise ValueError("to_mean_norm takes several vectors, and there are none.")
    for vector in given[1:]:
        given[0]._with(vector, lambda a, b: a)  # refuses what doesn't fit together
    mean = {layer: sum(vector.norms[layer] for vector in given) / len(given) for layer in given[0]}
    return [v.normalized()._map(lambda layer, unit: unit * mean[layer]) for v in given]
