"""Conditions that a gate asks: what an activation says of a token or a prompt, and which tokens lie inside a span.

Everything here is computed on the device and staged with the forward: nothing waits for an array. What has to be
remembered from one forward to the next (whether a span is open) is kept with each row, and moves with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import mlx.core as mx
import numpy as np

from mlxsteer.interventions.base import number, settled, tensor
from mlxsteer.positions import Tokens


class Condition:
    """Something that holds or doesn't: of each token, or of each prompt. ``a & b``, ``a | b`` and ``~a`` combine."""

    def __and__(self, other: Any) -> Condition:
        return Combined("and", self, _condition(other))

    def __or__(self, other: Any) -> Condition:
        return Combined("or", self, _condition(other))

    def __invert__(self) -> Condition:
        return Negated(self)

    def __bool__(self) -> bool:
        raise TypeError(
            "a condition has no truth value before a model runs: write a & b, a | b and ~a, with each comparison in "
            "brackets, in place of and, or, not, and in place of 0.1 < cosine(v) < 0.3."
        )

    def holds(self, value: Callable[[Reading], mx.array], tokens: Tokens) -> mx.array:
        """Where it holds, given the value of each reading."""
        raise NotImplementedError

    def leaves(self) -> Iterator[Compared | Inside]:
        """The comparisons and spans in it."""
        raise NotImplementedError

    def bound(self, encode: Callable[[str], list[int]] | None) -> Condition:
        """The same with the texts of spans as token ids."""
        return self


def _condition(value: Any) -> Condition:
    if isinstance(value, Condition):
        return value
    if isinstance(value, Reading):
        raise TypeError(f"{value} is a number of each token: compare it, such as {value} > 0.3.")
    raise TypeError(f"a condition is made of comparisons such as cosine(v) > 0.3, not {value!r}.")


# -- readings ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class Reading:
    """A number that an activation gives: of each token, or of a prompt.

    Args:
        vector: v, (D,), of any length.
        key: the place to read, which runs before the one that is steered; None for the very activation that is
            edited, as it comes to the gate.
        read: what a prompt's number is: the reading of its last token (``"last"``), or of the mean activation of its
            tokens (``"mean"``; those that a prompt cache holds already aren't among them).
    """

    vector: Any
    key: str | None = field(default=None, kw_only=True)
    read: Literal["last", "mean"] = field(default="last", kw_only=True)
    unit: mx.array = field(init=False)

    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        vector = tensor(self.vector, f"{self.name}: the vector")
        if vector.ndim != 1:
            raise ValueError(f"{self.name}: the vector is one direction, (D,), not {vector.shape}.")
        length = mx.linalg.norm(vector)
        if settled(length) and not length.item():
            raise ValueError(f"{self.name}: the vector is zero: a direction has a length.")
        unit = vector / length
        settled(unit)
        if self.read not in ("last", "mean"):
            raise ValueError(f"{self.name}: read is 'last' or 'mean', not {self.read!r}.")
        if self.key is not None and not isinstance(self.key, str):
            raise TypeError(f"{self.name}: a key is a string such as 'layers.5', not {self.key!r}.")
        object.__setattr__(self, "vector", vector)
        object.__setattr__(self, "unit", unit)

    def __repr__(self) -> str:
        more = (f", key={self.key!r}" if self.key else "") + (", read='mean'" if self.read == "mean" else "")
        return f"{self.name}(<{self.vector.size}>{more})"

    def of(self, x: mx.array) -> mx.array:
        """The reading of activations (..., D): (...), float32."""
        raise NotImplementedError

    def __gt__(self, value: float) -> Compared:
        return Compared(self, ">", value)

    def __ge__(self, value: float) -> Compared:
        return Compared(self, ">=", value)

    def __lt__(self, value: float) -> Compared:
        return Compared(self, "<", value)

    def __le__(self, value: float) -> Compared:
        return Compared(self, "<=", value)

    def __bool__(self) -> bool:
        raise TypeError(f"{self} is a number of each token: compare it, such as {self} > 0.3.")


@dataclass(frozen=True, eq=False, repr=False)
class cosine(Reading):  # noqa: N801 - reads as a word: when(cosine(v) > 0.3, ...)
    """The cosine of the angle between an activation and a vector: ``⟨x, v⟩ / (‖x‖·‖v‖)``, in float32; of 0, it is 0.

    Lee et al. 2024, Conditional activation steering, arXiv 2409.05907, compare the cosine of x and of its projection on
    v (through a tanh), which has no sign; here it keeps its sign.
    """

    name: ClassVar[str] = "cosine"

    def of(self, x: mx.array) -> mx.array:
        wide = x.astype(mx.float32)
        along = mx.sum(wide * self.unit, axis=-1)
        return along / mx.maximum(mx.linalg.norm(wide, axis=-1), 1e-30)


@dataclass(frozen=True, eq=False, repr=False)
class projection(Reading):  # noqa: N801
    """The length of an activation's projection on a vector: ``⟨x, v⟩ / ‖v‖``, in float32."""

    name: ClassVar[str] = "projection"

    def of(self, x: mx.array) -> mx.array:
        return mx.sum(x.astype(mx.float32) * self.unit, axis=-1)


_COMPARE: dict[str, Callable[[mx.array, float], mx.array]] = {
    ">": mx.greater, ">=": mx.greater_equal, "<": mx.less, "<=": mx.less_equal,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Compared(Condition):
    """A reading compared with a threshold."""

    reading: Reading
    sign: str
    threshold: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", number(self.threshold, f"{self.reading.name}: the threshold"))
        if self.sign not in _COMPARE:
            raise ValueError(f"a comparison is one of {', '.join(_COMPARE)}, not {self.sign!r}.")

    def __repr__(self) -> str:
        return f"({self.reading} {self.sign} {self.threshold:g})"

    def holds(self, value: Callable[[Reading], mx.array], tokens: Tokens) -> mx.array:
        return _COMPARE[self.sign](value(self.reading), self.threshold)

    def leaves(self) -> Iterator[Compared | Inside]:
        yield self


@dataclass(frozen=True, eq=False)
class Combined(Condition):
    """Both conditions, or either."""

    how: str
    left: Condition
    right: Condition

    def __repr__(self) -> str:
        return f"({self.left} {'&' if self.how == 'and' else '|'} {self.right})"

    def holds(self, value: Callable[[Reading], mx.array], tokens: Tokens) -> mx.array:
        left, right = self.left.holds(value, tokens), self.right.holds(value, tokens)
        return left & right if self.how == "and" else left | right

    def leaves(self) -> Iterator[Compared | Inside]:
        yield from self.left.leaves()
        yield from self.right.leaves()

    def bound(self, encode: Callable[[str], list[int]] | None) -> Condition:
        left, right = self.left.bound(encode), self.right.bound(encode)
        return self if left is self.left and right is self.right else Combined(self.how, left, right)


@dataclass(frozen=True, eq=False)
class Negated(Condition):
    """Not the condition."""

    condition: Condition

    def __repr__(self) -> str:
        return f"~{self.condition}"

    def holds(self, value: Callable[[Reading], mx.array], tokens: Tokens) -> mx.array:
        return ~self.condition.holds(value, tokens)

    def leaves(self) -> Iterator[Compared | Inside]:
        yield from self.condition.leaves()

    def bound(self, encode: Callable[[str], list[int]] | None) -> Condition:
        bound = self.condition.bound(encode)
        return self if bound is self.condition else Negated(bound)


# -- spans of tokens -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class inside(Condition):  # noqa: N801 - reads as a word: when(~inside("<think>", "</think>"), ...)
    """Tokens between two markers, such as a model's thinking or a tool call; prompt and generated ones alike.

    The markers belong to the span; one of several tokens counts from its last token on. A span ends at the first
    closing marker; one that is never closed goes on. Tokens that a prompt cache was filled with unsteered aren't looked
    at.

    Args:
        opening: the text that opens a span, best one special token; or its token ids.
        closing: the one that closes it.
    """

    opening: str | tuple[int, ...]
    closing: str | tuple[int, ...]
    said: ClassVar[tuple[tuple[str, tuple[int, ...]], ...]] = ()
    """Of markers that were given as texts: the text, and the tokens that it was taken for."""

    def __post_init__(self) -> None:
        for name in ("opening", "closing"):
            object.__setattr__(self, name, _marker(getattr(self, name)))
        if self.opening == self.closing:
            raise ValueError(f"inside: one marker, {self.opening!r}, can't both open and close a span.")

    def bound(self, encode: Callable[[str], list[int]] | None) -> inside:
        if not isinstance(self.opening, str) and not isinstance(self.closing, str):
            return self
        if encode is None:
            raise ValueError(f"{self} needs a tokenizer; this model has none. Give token ids in place of texts.")
        found = [tuple(encode(m)) if isinstance(m, str) else m for m in (self.opening, self.closing)]
        bound = inside(found[0], found[1])
        texts = zip((self.opening, self.closing), found, strict=True)
        object.__setattr__(bound, "said", tuple((text, ids) for text, ids in texts if isinstance(text, str)))
        return bound

    def holds(self, value: Callable[[Reading], mx.array], tokens: Tokens) -> mx.array:
        return self.marks(tokens)

    def leaves(self) -> Iterator[Compared | Inside]:
        yield self

    def marks(self, tokens: Tokens) -> mx.array:
        """Which tokens of a forward lie in a span, (rows, tokens) of bool; found once for all places of the model."""
        if isinstance(self.opening, str) or isinstance(self.closing, str):
            raise ValueError(f"{self} holds texts, and no tokenizer is at hand here: give token ids.")
        name: Any = ("inside", self.opening, self.closing)
        if name not in tokens.found:
            tokens.found[name] = self._follow(tokens, name)
        found: mx.array = tokens.found[name]
        return found

    def _follow(self, tokens: Tokens, name: Any) -> mx.array:
        ids = tokens.ids(f"{self}").astype(mx.int32)  # other code's are unsigned here and there
        if min(tokens.starts) < 0:  # left padding, which is no token
            ids = mx.where(tokens.positions() >= 0, ids, -1)
        opens, closes = (_ends(ids, name[i], tokens, (*name, i)) for i in (1, 2))
        before = tokens.recalled(name, mx.array(False))
        if tokens.width == 1:
            marks = opens | before[:, None]
            states = marks & ~closes
        else:
            count = mx.arange(1, tokens.width + 1)
            opened, closed = (mx.cummax(mx.where(ends, count, 0), axis=1) for ends in (opens, closes))
            # the marker that closes a span is its last token
            passed = mx.concatenate([mx.zeros_like(closed[:, :1]), closed[:, :-1]], axis=1)
            marks = mx.where(mx.maximum(opened, passed) == 0, before[:, None], opened > passed)
            states = mx.where(mx.maximum(opened, closed) == 0, before[:, None], opened > closed)
        tokens.remember_trail(name, tokens.at_end(states, before), lambda n: states[:, n - 1] if n else before)
        return marks


Inside = inside


def _marker(value: Any) -> str | tuple[int, ...]:
    if isinstance(value, str) and value:
        return value
    ids = [value] if isinstance(value, (int, np.integer)) and not isinstance(value, bool) else value
    whole = isinstance(ids, Sequence) and ids and all(isinstance(i, (int, np.integer)) and i >= 0 for i in ids)
    if isinstance(ids, str) or not whole:
        raise ValueError(f"inside: a marker is a text or token ids, not {value!r}.")
    return tuple(int(i) for i in ids)


def _ends(ids: mx.array, marker: tuple[int, ...], tokens: Tokens, name: Any) -> mx.array:
    """Where a marker's last token stands, (rows, tokens); its first ones may lie in forwards before this one."""
    before = len(marker) - 1
    if not before:
        return ids == marker[0]
    earlier = tokens.recalled(name, mx.full((before,), -1, dtype=ids.dtype))
    joined = mx.concatenate([earlier, ids], axis=1)
    # of each row the ids before its last real token and that one
    starts = mx.array([[length] for length in tokens.lengths])
    latest = mx.take_along_axis(joined, starts + mx.arange(before)[None], axis=1)
    tokens.remember_trail(name, latest, lambda n: joined[:, n : n + before])
    found = joined[:, before:] == marker[-1]
    for i, token in enumerate(marker[:-1]):
        found = found & (joined[:, i : i + tokens.width] == token)
    return found


# -- as data -------------------------------------------------------------------------------------------------------

SAVED: dict[str, type] = {
    "cosine": cosine, "projection": projection, "compared": Compared, "combined": Combined, "negated": Negated,
    "inside": inside,
}  # fmt: skip
"""What conditions are made of, by name."""


def span(value: Any) -> inside | None:
    """Read an `exclude=`: ``inside(opening, closing)``, or the pair of markers.

    Raises:
        TypeError: it is neither.
    """
    if value is None or isinstance(value, inside):
        return value
    if isinstance(value, (tuple, list)) and len(value) == 2:
        return inside(*value)
    raise TypeError(f"exclude={value!r} is no span: give its two markers, such as ('<think>', '</think>').")


__all__ = ["SAVED", "Combined", "Compared", "Condition", "Negated", "Reading", "cosine", "inside", "projection", "span"]
