"""`SteeringVector`: one direction per layer, where it came from, and its arithmetic and file."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NoReturn

import mlx.core as mx
import numpy as np

from mlxsteer.display import Displayed, Shown
from mlxsteer.interventions import AddSequence, AddVector
from mlxsteer.interventions.base import Intervention, number, settled, tensor
from mlxsteer.model import InterpretableModel
from mlxsteer.pairs import PAIR_HASHES, hint
from mlxsteer.positions import At
from mlxsteer.reading import check_model

FORMAT = "mlxsteer.vector"
VERSION = 1
_MEASURED = ("agreement", "reliability")
_OF_THE_DATA = (*_MEASURED, "data", "pairs", "positive", "negative", "background")
_MISFITS = (
    "one is at {}, the other at {}",
    "one has layers {}, the other {}",
    "one is of width {}, the other of {}",
    "one has a direction for {}, the other for {}",
)
_TEMPLATE = re.compile(r"([^{}]+\.)?\{layer\}([.#][^{}]*)?")
_PARALLEL = 1e-6
"""Less than this share of a direction's length is what rounding leaves of it."""


class VectorMismatchWarning(UserWarning):
    """A vector is used on another model, or under another quantization, than it was computed on."""


def _whole(layer: Any) -> bool:
    """Whether it is a layer's number; True and 1.0 are none."""
    return isinstance(layer, (int, np.integer)) and not isinstance(layer, bool)


def is_template(site: Any) -> bool:
    """Whether it is a key in which ``{layer}`` stands once, as a segment of its own, and no other brace."""
    return isinstance(site, str) and _TEMPLATE.fullmatch(site) is not None


def _length(direction: mx.array) -> float:
    """The length of a direction; of one per position, the longest one's."""
    return float(np.linalg.norm(np.array(direction, np.float64), axis=-1).max())


def _times(direction: mx.array, factor: float) -> mx.array:
    """In float64 up to the product: a factor may be too large or small for float32 where the product isn't."""
    return mx.array((np.array(direction, np.float64) * factor).astype(np.float32))


def _direction(value: Any, layer: int) -> mx.array:
    what = f"the direction of layer {layer}"
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":  # MLX takes no foreign byte order
        with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused as such
            value = value.astype(np.float32)
    try:
        value = mx.array(value)
    except (RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{what} is an array or list of numbers, not {type(value).__name__}.") from error
    return tensor(value, what)


_UNTOLD = ("agreement", "reliability", PAIR_HASHES)
"""What `describe` has a column for, or nobody reads."""


@dataclass(frozen=True, eq=False)
class SteeringVector(Displayed):
    """Directions in the activations of several layers.

    Attributes:
        directions: layer → direction, (D,) float32; or one per position at the front of a prompt, (tokens, D), whose
            length is the longest one's: what is scaled keeps their proportions, and zeros where the texts were the
            same. Layers count from 0.
        site: the key they belong to, with ``{layer}`` in place of the number.
        residual_norms: layer → median norm of the activation there, over real tokens without BOS; above 0.
        info: where they come from: model, architecture, hidden size, method, and so on.
    """

    directions: Mapping[int, mx.array]
    site: str = "layers.{layer}"
    residual_norms: Mapping[int, float] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)

    __array_ufunc__ = None  # NumPy numbers leave arithmetic to us: np.float64(2) * vector

    def __post_init__(self) -> None:
        if not isinstance(self.directions, Mapping):
            raise TypeError(
                "directions are a dict from layers to directions, such as {5: direction}, not "
                f"{type(self.directions).__name__}."
            )
        if wrong := [layer for layer in self.directions if not _whole(layer) or layer < 0]:
            raise ValueError(f"a layer is a whole number from 0 on, not {wrong[0]!r}.")
        if not self.directions:
            raise ValueError("a steering vector has a direction for at least one layer.")
        if not is_template(self.site):
            raise ValueError(
                "a vector's site is a key with {layer} in it, between dots, such as 'layers.{layer}', not "
                f"{self.site!r}."
            )
        made = {int(layer): _direction(direction, layer) for layer, direction in sorted(self.directions.items())}
        if len(shapes := {direction.shape for direction in made.values()}) > 1 or len(next(iter(shapes))) not in (1, 2):
            raise ValueError(f"the directions have shapes {sorted(shapes)}; all are (D,), or all (tokens, D).")
        object.__setattr__(self, "directions", made)
        object.__setattr__(self, "residual_norms", _norms(self.residual_norms))
        object.__setattr__(self, "info", _origin(self.info))

    def __getitem__(self, layer: int) -> mx.array:
        if not _whole(layer):
            raise TypeError(
                f"vector[layer] is one layer's direction, not {layer!r}'s; vector.only([4, 5]) is a vector of fewer "
                "layers."
            )
        if layer not in self.directions:
            counted = ", and layers count from 0" if layer < 0 else ""
            raise KeyError(f"the vector has no direction for layer {layer}; it has {self.layers}{counted}")
        return self.directions[layer]

    def __mlx_array__(self) -> NoReturn:
        raise TypeError(
            "a SteeringVector has several layers, and an array is asked for here: vector[layer] is one layer's "
            "direction; to multiply by an array's number, put the vector first."
        )

    def __iter__(self) -> Iterator[int]:
        return iter(self.directions)

    def __len__(self) -> int:
        return len(self.directions)

    @property
    def layers(self) -> list[int]:
        """The layers that have a direction."""
        return list(self.directions)

    def only(self, layers: int | Sequence[int] | Literal["all"]) -> SteeringVector:
        """The same vector at fewer layers, with what is known of these.

        Args:
            layers: a layer, several, or ``"all"``.

        Raises:
            KeyError: the vector lacks a layer.
            ValueError: they are no layers, or none.
        """
        kept = {layer: self[layer] for layer in self._chosen(layers)}
        norms = {layer: norm for layer, norm in self.residual_norms.items() if layer in kept}
        measured = {
            name: {layer: value for layer, value in self.info[name].items() if int(layer) in kept}
            for name in _MEASURED
            if name in self.info
        }
        return SteeringVector(kept, self.site, norms, {**self.info, **measured})

    def _chosen(self, layers: Any) -> list[int]:
        """The layers that are asked for, each of which has a direction."""
        if isinstance(layers, str) and layers == "all":
            return self.layers
        if isinstance(layers, (np.ndarray, mx.array)):
            layers = layers.tolist()
        several = isinstance(layers, Iterable) and not isinstance(layers, str)
        chosen = list(layers) if several else [layers]
        if any(not _whole(layer) for layer in chosen):
            raise ValueError(
                f"layers are 'all', a layer, a list of layers such as {self.layers[:3]}, or a dict from layers to "
                f"strengths, not {layers!r}."
            )
        if not chosen:
            raise ValueError(f"{layers!r} names no layer, which would do nothing; there are {self.layers}.")
        for layer in chosen:
            self[layer]
        return [int(layer) for layer in chosen]

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
        """Layer → length of the direction; where there is one per position, of the longest of them."""
        return {layer: _length(direction) for layer, direction in self.directions.items()}

    def key(self, layer: int) -> str:
        """The key of the vector's place in a layer, such as ``"layers.5"``."""
        return self.site.replace("{layer}", str(layer))

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the SHA-256 of the place and the directions: equal for vectors that do the same."""
        digest = hashlib.sha256(self.site.encode())
        for layer, direction in self.directions.items():
            digest.update(f"{layer} {direction.shape}".encode() + np.array(direction).tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def _zeros(self) -> frozenset[int]:
        """The layers whose direction is zero, found once; none inside a transformation, where nothing can be read."""
        some = mx.stack([direction.any() for direction in self.directions.values()])
        found: Any = some.tolist() if settled(some) else [True] * len(self)
        return frozenset(layer for layer, any_of_it in zip(self.directions, found, strict=True) if not any_of_it)

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
        place = f", at {self.site}" if self.site != "layers.{layer}" else ""
        return f"SteeringVector({len(self)} layers, {first} to {last}, of width {self.width}{place}{each}{origin})"

    def describe(self) -> str:
        """Where the vector comes from, and a table of its layers: length, residual norm, agreement, reliability."""
        shown = self._shown()
        rows = [shown.columns, *shown.rows]
        lines = ["  ".join(str(cell).rjust(len(name)) for cell, name in zip(row, shown.columns, strict=True))
                 for row in rows]  # fmt: skip
        return "\n".join([shown.foot, *lines])

    def _shown(self) -> Shown:
        told = {"site": self.site, **self.info}
        columns = [self.norms, self.residual_norms, self.agreement, self.reliability]
        names = ["length", "residual norm", "agreement", "reliability"]
        known = [(name, column) for name, column in zip(names, columns, strict=True) if column]
        return Shown(
            repr(self),
            ("layer", *(name for name, _ in known)),
            [
                (str(layer), *(f"{column[layer]:.3g}" if layer in column else "" for _, column in known))
                for layer in self.layers
            ],
            foot="\n".join(f"{name}: {value}" for name, value in told.items() if name not in _UNTOLD),
        )

    def check(self, model: InterpretableModel) -> None:
        """Whether the vector belongs to a model.

        Args:
            model: the model.

        Raises:
            TypeError: it is no model.
            ValueError: the model has fewer layers, or another width at the vector's site.
            UnknownKey: the model has no such site.

        Warns:
            VectorMismatchWarning: the vector was computed on another model, or under another quantization.
        """
        self._check(model, stacklevel=3)

    def _check(self, model: InterpretableModel, stacklevel: int, what: str = "the vector") -> None:
        check_model(model)
        count = len(model.layers)
        if (own := self.info.get("layers", count)) != count:
            raise ValueError(f"{what} has {own} layers and {model.name} has {count}: it is another model's.")
        if self.layers[-1] >= count:
            raise ValueError(
                f"{what} has a direction for layer {self.layers[-1]} and {model.name} has {count} layers, from 0 "
                f"to {count - 1}: it is another model's."
            )
        for layer in self.layers:
            width = model._sites.width(model._sites.resolve(self.key(layer)))
            if width is not None and width != self.width:
                raise ValueError(
                    f"{what} is of width {self.width}, and {self.key(layer)} of {model.name} of width {width}: it "
                    "is another model's."
                )
        told, here = self.info, model.identity
        said = [
            f"{name} {told[name]!r} and not {here[name]!r}"
            for name in here
            if name in told and told[name] != here[name]
        ]
        if said:
            warnings.warn(
                f"{what} was computed on {', '.join(said)}: what it does here is to be measured anew.",
                VectorMismatchWarning,
                stacklevel=stacklevel,
            )

    # -- steering --------------------------------------------------------------------------------------------------

    def at(
        self,
        layers: int | Sequence[int] | Mapping[int, float] | Literal["all"],
        strength: float | Sequence[float] = 1.0,
        at: At = "all",
        *,
        unit: Literal["raw", "residual"] = "raw",
        schedule: Any = None,
        exclude: Any = None,
    ) -> dict[str, Intervention]:
        """A key dict that adds the vector.

        Args:
            layers: a layer, several, layer → strength, or ``"all"`` that the vector has.
            strength: multiplies them all; a number, or one per row of a batch.
            at: which tokens. A vector that has a direction per position is added at the front of the prompt, and takes
                no other place.
            unit: ``"raw"`` adds ``s·v``; ``"residual"`` adds ``s·r·v/‖v‖``, with r the layer's median norm, so that a
                strength means the same at every layer and in every model. Of a vector that has a direction per
                position, ‖v‖ is the longest one's length.
            schedule: how the strength changes over generated tokens: ``decay(20)``, ``ramp(5)``, ``window(0, 30)``.
            exclude: spans to leave alone, such as ``("<think>", "</think>")``.

        Raises:
            KeyError: the vector lacks a layer.
            TypeError: a strength is no number.
            ValueError: they are no layers, or none; a direction is zero; the vector's residual norms are unknown and
                the unit is ``"residual"``.
        """
        if unit not in ("raw", "residual"):
            raise ValueError(f"unit is 'raw' or 'residual', not {unit!r}.{hint(unit, ('raw', 'residual'))}")
        strengths = dict.fromkeys(self._chosen(layers), 1.0)
        if isinstance(layers, Mapping):
            strengths = {int(layer): self._strength(layer, own) for layer, own in layers.items()}
        rows = [number(s, "a strength") for s in strength] if isinstance(strength, (list, tuple)) else None
        base = number(strength, "a strength") if rows is None else 0.0
        made: dict[str, Intervention] = {}
        for layer, own in strengths.items():
            if layer in self._zeros:
                raise ValueError(f"the direction of layer {layer} is zero: it adds nothing.")
            direction = self[layer] if unit == "raw" else self._in_residual_units(layer)
            strong = base * own if rows is None else [row * own for row in rows]
            if self.positions is None:
                made[self.key(layer)] = AddVector(direction, strong, at=at, schedule=schedule, exclude=exclude)
                continue
            if at not in ("all", "first") or schedule is not None or exclude is not None:
                raise ValueError(
                    f"this vector has a direction for each of the first {self.positions} positions: no at=, schedule= "
                    "or exclude=."
                )
            made[self.key(layer)] = AddSequence(direction, strong)
        for intervention in made.values():  # so that an evaluation on the same pairs can say so
            intervention._cache[PAIR_HASHES] = self.info.get(PAIR_HASHES)
        return made

    @staticmethod
    def _strength(layer: int, strength: Any) -> float:
        if isinstance(strength, (list, tuple)):
            raise TypeError(
                f"the strength of layer {layer} is a number; one for each row is strength={list(strength)!r}."
            )
        return number(strength, f"the strength of layer {layer}")

    def _in_residual_units(self, layer: int) -> mx.array:
        """The direction with the length of the layer's median norm."""
        direction, norm = self[layer], self.residual_norms.get(layer)
        if norm is None:
            raise ValueError(f"unit='residual' needs the vector's residual norm at layer {layer}, and it is unknown.")
        length = _length(direction)
        if not length:
            raise ValueError(f"the direction of layer {layer} is zero: it has no unit of length.")
        return _times(direction, norm / length)

    # -- arithmetic ------------------------------------------------------------------------------------------------

    def _map(self, change: Callable[[int, mx.array], mx.array]) -> SteeringVector:
        directions = {layer: change(layer, direction) for layer, direction in self.directions.items()}
        return SteeringVector(directions, self.site, self.residual_norms, self.info)

    def _with(self, other: SteeringVector, change: Callable[[mx.array, mx.array], mx.array]) -> SteeringVector:
        if not isinstance(other, SteeringVector):
            return NotImplemented
        told = [
            (v.site, v.layers, v.width, f"each of {v.positions} positions" if v.positions else "all positions")
            for v in (self, other)
        ]
        misfits = [
            say.format(mine, theirs) for say, mine, theirs in zip(_MISFITS, *told, strict=True) if mine != theirs
        ]
        if misfits:
            raise ValueError(f"the vectors don't fit together: {'; '.join(misfits)}.")
        made = self._map(lambda layer, direction: change(direction, other[layer]))
        # What both say of themselves is true of what they make together; what is said of their data is not.
        kept = {
            name: value
            for name, value in self.info.items()
            if name not in _OF_THE_DATA and (not other.info or other.info.get(name) == value)
        }
        return SteeringVector(made.directions, self.site, self.residual_norms, kept)

    def __add__(self, other: SteeringVector) -> SteeringVector:
        return self._with(other, lambda a, b: a + b)

    def __radd__(self, other: Any) -> SteeringVector:
        return self if isinstance(other, int) and other == 0 else NotImplemented  # sum([v, w]) begins with 0

    def __sub__(self, other: SteeringVector) -> SteeringVector:
        return self._with(other, lambda a, b: a - b)

    def __mul__(self, factor: float) -> SteeringVector:
        by = _factor(factor)
        return self._map(lambda _, direction: direction * by)

    __rmul__ = __mul__

    def __truediv__(self, factor: float) -> SteeringVector:
        by = _factor(factor)
        return self._map(lambda _, direction: direction / by)

    def __neg__(self) -> SteeringVector:
        return self._map(lambda _, direction: -direction)

    def normalized(self) -> SteeringVector:
        """Every direction scaled to length 1; of directions per position, the longest is.

        Raises:
            ValueError: a direction is zero, at all positions.
        """
        for layer, length in self.norms.items():
            if not length:
                raise ValueError(f"the direction of layer {layer} is zero: it can't be scaled to length 1.")
        return self._map(lambda _, direction: _times(direction, 1 / _length(direction)))

    def orthogonal_to(self, other: SteeringVector) -> SteeringVector:
        """What is left of every direction without its component along the other's: ``v − ⟨v, ŵ⟩ŵ``.

        Of a parallel direction nothing is left: what rounding leaves, below 10⁻⁶ of its length, is zero. Directions
        per position count together, as one long direction.

        Raises:
            TypeError: the other is no vector.
            ValueError: they don't fit together, or a direction of the other is zero.
        """
        _needed("orthogonal_to", other)

        def without(a: mx.array, b: mx.array) -> mx.array:
            v, w = np.array(a, np.float64), np.array(b, np.float64)
            w /= np.linalg.norm(w)
            left = v - np.sum(v * w) * w
            kept = np.linalg.norm(left) > _PARALLEL * np.linalg.norm(v)
            return mx.array((left * kept).astype(np.float32))

        return self._with(other.normalized(), without)

    def cosine(self, other: SteeringVector) -> dict[int, float]:
        """Layer → cosine of the angle between the two directions; those per position count together, as one long one.

        Raises:
            TypeError: the other is no vector.
            ValueError: they don't fit together, or a direction is zero.
        """
        _needed("cosine", other)
        ours, theirs = self.normalized(), other.normalized()
        ours._with(theirs, lambda a, b: a)  # refuses what doesn't fit together
        cosines = {}
        for layer in self.layers:
            a, b = np.array(ours[layer], np.float64), np.array(theirs[layer], np.float64)
            cosines[layer] = float(np.sum(a * b) / (np.linalg.norm(a) * np.linalg.norm(b)))
        return cosines

    # -- files -------------------------------------------------------------------------------------------------------

    def save(
        self,
        path: str | Path,
        *,
        strengths: int | Sequence[int] | Mapping[int, float] | Literal["all"] | None = None,
        unit: Literal["raw", "residual"] = "raw",
    ) -> Path:
        """Write the vector as one file, whole or not at all, in the format that the path's suffix says.

        - ``.safetensors`` holds everything.
        - ``.gguf`` is a control vector for llama.cpp and repeng: of the residual stream, without layer 0. Its
          ``direction.N`` is our layer N, and ``--control-vector-scaled FILE:s`` does what ``at(layers, strength=s)``
          does: x' = x + s·v at every token.
        - ``.npz`` and ``.npy`` hold the directions alone: an array for each layer, or a matrix with a row for each.
          What is read back has no residual norms, so that ``unit="residual"`` is refused, and no info, so that it isn't
          checked whether it is another model's, but for its layers and width.

        Args:
            path: a file name.
            strengths: fold strengths in: layer → strength, or the layers to keep at strength 1, as `at` takes them.
                The file then holds s·v for these layers alone, which is what ``at(strengths, unit=unit)`` adds. None
                for the vector as it is.
            unit: ``"raw"``, or ``"residual"``: the strengths count in the layers' residual norms. Given with strengths.

        Returns:
            the path.

        Raises:
            TypeError: the path is no path.
            KeyError: the vector lacks a layer that the strengths name.
            ValueError: nothing is written under this suffix, it is a folder, or its format can't hold the vector; the
                strengths are no strengths, or all 0.
            FileNotFoundError: there is no such folder.

        Warns:
            UserWarning: a ``.gguf`` file has no place for the direction of layer 0.
        """
        from mlxsteer import formats

        return formats.save(self if strengths is None and unit == "raw" else self._folded(strengths, unit), path)

    def _folded(self, strengths: Any, unit: Literal["raw", "residual"]) -> SteeringVector:
        """What `at` adds at these strengths, as a vector to add at strength 1."""
        if strengths is None:
            raise ValueError(f"unit={unit!r} says in what strengths count, and there are none: give strengths=.")
        made: Any = self.at(strengths, unit=unit)
        by_key = {self.key(layer): layer for layer in self.layers}
        folded = {
            by_key[key]: _times(one.vector if self.positions is None else one.vectors, float(one.strength))
            for key, one in made.items()
            if one.strength
        }
        if not folded:
            raise ValueError(f"strengths={strengths!r} are all 0: there is nothing to save.")
        kept = self.only(list(folded))
        told = {str(by_key[key]): float(one.strength) for key, one in made.items() if one.strength}
        return SteeringVector(folded, self.site, kept.residual_norms, {**kept.info, "folded": told, "unit": unit})

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        model: InterpretableModel | None = None,
        revision: str | None = None,
        filename: str | None = None,
        token: str | None = None,
    ) -> SteeringVector:
        """Read a vector from a file, a folder, or a repository of the Hugging Face Hub. Nothing is unpickled.

        Besides what `save` writes, it takes repeng's and llama.cpp's ``.gguf``, rotalabs-steer's ``.json`` with ``.pt``
        and folders of them, and other ``.npz`` files with arrays named by layer.

        Args:
            path: what exists here always comes first; else ``"user/repo"`` names a repository, where no folder here is
                called ``user`` or a revision is named.
            model: the model that it is for, to `check` that it belongs to it.
            revision: a repository's branch, tag or commit.
            filename: which file of a folder or repository; by default ``vector.safetensors``, or the only vector in it.
            token: of a user who may read a repository; None for the one that is logged in.

        Raises:
            TypeError: the path is no path, or the model no model.
            FileNotFoundError: there is no such file, folder or repository.
            ConnectionError: the Hub can't be reached.
            ValueError: the file is damaged, foreign, of a later version, or one of several; or of another model than
                the one given.

        Warns:
            VectorMismatchWarning: the vector was computed on another model, or under another quantization.
        """
        from mlxsteer import formats

        if model is not None:
            check_model(model)
        vector = formats.load(path, revision=revision, filename=filename, token=token)
        if model is not None:
            vector._check(model, stacklevel=3)
        return vector

    def push_to_hub(
        self,
        repository: str,
        *,
        private: bool = False,
        revision: str | None = None,
        token: str | None = None,
        commit_message: str = "Add a steering vector",
        licence: str | None = None,
        measured: str | None = None,
    ) -> str:
        """Write the vector and a model card into a repository of the Hugging Face Hub, made if it isn't there.

        `mlxsteer.push_to_hub` also takes files, baked folders, adapters, and what `select` chose.

        Args:
            repository: ``"user/repo"``. Its ``vector.safetensors`` and ``README.md`` are written anew.
            private: whether a repository that is made is private.
            revision: a branch, made if it isn't there; None for the main one.
            token: of a user who may write there; None for the one that is logged in.
            commit_message: what the commit says.
            licence: an identifier for the card, such as ``"mit"``.
            measured: what the vector was measured to do, in words, for the card.

        Returns:
            the repository's address.

        Raises:
            PermissionError: nobody is logged in, or who is may not write there.
            FileNotFoundError: there is no such user or organization.
            ConnectionError: the Hub can't be reached, or refuses.
        """
        from mlxsteer import formats

        return formats.push(
            self, repository, private=private, revision=revision, token=token, commit_message=commit_message,
            licence=licence, measured=measured,
        )  # fmt: skip


def _norms(norms: Any) -> dict[int, float]:
    """Layer → residual norm, as plain numbers."""
    if not isinstance(norms, Mapping):
        raise TypeError(f"residual norms are a dict from layers to norms, such as {{5: 20.0}}, not {norms!r:.80}.")
    if wrong := [layer for layer in norms if not _whole(layer) or layer < 0]:
        raise ValueError(f"a layer is a whole number from 0 on, not {wrong[0]!r}: so are those of the residual norms.")
    made = {int(layer): number(norm, f"the residual norm of layer {layer}") for layer, norm in norms.items()}
    for layer, norm in made.items():
        if norm <= 0:
            raise ValueError(f"the residual norm of layer {layer} is above 0, not {norm}.")
    return made


def _origin(info: Any) -> dict[str, Any]:
    """A copy of a vector's info, in which what was measured of the data is numbers."""
    if not isinstance(info, Mapping):
        raise TypeError(f"info is a dict, not {type(info).__name__}.")
    for name in _MEASURED:
        try:
            for layer, value in info[name].items() if name in info else ():
                number(value, f"{name} of layer {int(layer)}")
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"the {name} in info is a dict from layers to numbers, not {info[name]!r:.80}.") from error
    return dict(info)


def _needed(what: str, other: Any) -> None:
    if not isinstance(other, SteeringVector):
        raise TypeError(f"{what} goes with a SteeringVector, not with {type(other).__name__}.")


def _factor(value: Any) -> float:
    """A number to multiply by; whether it is finite, the directions say."""
    if isinstance(value, (np.ndarray, mx.array)) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        given = repr(value) if isinstance(value, (str, bool)) or value is None else type(value).__name__
        raise TypeError(f"a steering vector is multiplied or divided by a number, not by {given}.")
    return float(value)


def to_mean_norm(vectors: Sequence[SteeringVector]) -> list[SteeringVector]:
    """Vectors of several behaviours at equal lengths: at each layer every one is scaled to their mean length.

    So that one strength compares behaviours, as in contrastive activation addition (Rimsky et al. 2024, arXiv
    2312.06681). Layers keep their own scales: the residual stream grows with depth.

    Args:
        vectors: two or more, with the same site, layers and width.

    Raises:
        TypeError: they are no list of vectors.
        ValueError: they don't fit together, or a direction is zero.
    """
    if isinstance(vectors, (SteeringVector, Mapping, str)) or not isinstance(vectors, Iterable):
        raise TypeError(f"to_mean_norm takes a list of vectors, not {type(vectors).__name__}.")
    given = list(vectors)
    if wrong := [vector for vector in given if not isinstance(vector, SteeringVector)]:
        raise TypeError(f"to_mean_norm takes a list of vectors, and one of them is {type(wrong[0]).__name__}.")
    if not given:
        raise ValueError("to_mean_norm takes several vectors, and there are none.")
    for vector in given[1:]:
        given[0]._with(vector, lambda a, b: a)  # refuses what doesn't fit together
    mean = {layer: sum(vector.norms[layer] for vector in given) / len(given) for layer in given[0]}
    return [v.normalized()._map(lambda layer, unit: unit * mean[layer]) for v in given]
