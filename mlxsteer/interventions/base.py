"""What an intervention is, and how it composes."""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from mlxsteer.positions import Position, Tokens

_COMMON = ("at", "schedule", "exclude")
"""Fields that every intervention has."""


@dataclass(eq=False, slots=True)  # not frozen: one is made at every place of every step, in half the time
class Where:
    """Where an intervention finds itself: which tokens, which place, how strongly.

    Attributes:
        tokens: the tokens of this forward.
        key: the site's key, for messages.
        layer: the block it lies in, None outside the blocks.
        strength: a multiplier on the intervention's own strength (a named steering's).
        rows: which rows of the batch it acts on; None for all.
        steering: a number of the steering that it is part of, so that gates read what their own steering kept.
    """

    tokens: Tokens
    key: str = ""
    layer: int | None = None
    strength: float = 1.0
    rows: tuple[bool, ...] | None = None
    steering: int | None = None


def settled(x: mx.array) -> bool:
    """Evaluate a constant, so that any thread may use it; False where `x` is a placeholder of a transformation."""
    try:
        mx.eval(x)
    except (ValueError, RuntimeError):  # inside mx.compile or mx.vmap nothing can be evaluated
        return False
    return True


def tensor(value: Any, what: str) -> mx.array:
    """A constant of an intervention: float32, finite, evaluated.

    Raises:
        TypeError: it holds something else than numbers.
        ValueError: it is empty, or holds a NaN or an infinity.
    """
    if value is None or isinstance(value, (str, bytes)):
        raise TypeError(f"{what} is an array of numbers, not {value!r}.")
    try:
        x = mx.array(value)
    except ValueError as error:  # MLX's words name neither what is made nor of what
        raise ValueError(f"{what} is an array of numbers, not {value!r:.80} ({error}).") from error
    if x.dtype == mx.complex64:
        raise ValueError(f"{what} is complex; an activation is real.")
    x = x.astype(mx.float32)
    if x.ndim == 0 or x.size == 0:
        raise ValueError(f"{what} is a tensor of one or more dimensions, not of shape {x.shape}.")
    bad: Any = (~mx.isfinite(x)).sum().item() if settled(x) else 0
    if bad:
        raise ValueError(f"{what} holds {bad} NaN or infinite value{'s' * (bad > 1)} of {x.size}.")
    return x


def number(value: Any, what: str) -> float:
    """A finite number, as a float.

    Raises:
        TypeError: it is no number.
        ValueError: it is NaN or infinite.
    """
    if isinstance(value, (np.ndarray, mx.array)) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{what} is a number, not {value!r}.")
    try:
        value = float(value)
    except OverflowError:
        value = float("inf")
    if not np.isfinite(value):
        raise ValueError(f"{what} is a finite number, not {value}.")
    return float(value)


def whole(value: Any, what: str, least: int) -> int:
    """A whole number, as an int.

    Raises:
        ValueError: it is none, or below `least`.
    """
    try:
        count = operator.index(value)
    except TypeError:
        count = least - 1
    if isinstance(value, bool) or count < least:
        raise ValueError(f"{what} is a whole number from {least} on, not {value!r}.")
    return count


def _strength(value: Any, what: str) -> float | tuple[float, ...] | mx.array:
    if isinstance(value, mx.array):
        if value.ndim > 1:
            raise ValueError(f"{what}: a strength is a number or one per row, not an array of shape {value.shape}.")
        if settled(value) and not mx.isfinite(value).all().item():
            raise ValueError(f"{what}: a strength is a finite number.")
        return value
    if isinstance(value, (list, tuple, np.ndarray)) and np.ndim(value) == 1:
        if not len(value):
            raise ValueError(f"{what}: a strength is a finite number, not {value!r}.")
        return tuple(number(v, f"{what}: a strength") for v in value)
    if not isinstance(value, (int, float, np.number)):
        raise TypeError(f"{what}: a strength is a number or one per row of the batch, not {value!r}.")
    return number(value, f"{what}: a strength")


@dataclass(frozen=True, eq=False, repr=False)
class Intervention:
    """An edit of one activation.

    Subclasses are frozen dataclasses with a `formula`; everything common (positions, strengths, padding, dtype) is
    done here, once.

    Attributes:
        strength: 0 is the identity (bit for bit, by not doing it), 1 the textbook form; one number, or one per row.
        at: which tokens; see `mlxsteer.positions`.
        schedule: a factor on the strength that depends on how many generated tokens the model has read: `decay`,
            `ramp`, `window`, or a function; None for 1 throughout. See `mlxsteer.interventions.schedules`.
        exclude: a span that is left alone, such as a model's thinking: its two markers, or `inside(opening, closing)`.
    """

    at: Any = field(default="all", kw_only=True)
    schedule: Any = field(default=None, kw_only=True)
    exclude: Any = field(default=None, kw_only=True)
    _cache: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    name: ClassVar[str] = ""
    saveable: ClassVar[bool] = True
    per_token: ClassVar[tuple[str, ...]] = ()
    """Constants that every token gets, whole."""
    strength = 1.0  # a field of every subclass, last of the positional ones, which a field here would come before

    def __post_init__(self) -> None:
        self._set(strength=_strength(self.strength, self.name), at=Position.of(self.at))
        if self.schedule is not None:
            from mlxsteer.interventions.schedules import Schedule

            self._set(schedule=Schedule.of(self.schedule))
        if self.exclude is not None:
            from mlxsteer.interventions.conditions import span

            self._set(exclude=span(self.exclude))

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        def short(value: Any) -> str:
            if isinstance(value, mx.array):
                return f"<{'×'.join(map(str, value.shape))}>" if value.ndim else f"{value.item():g}"
            if isinstance(value, float):
                return repr(float(f"{value:.6g}"))
            return repr(value.written() if isinstance(value, Position) else value)

        own = {f.name: getattr(self, f.name) for f in fields(self) if f.init and f.name not in _COMMON}
        shown = [f"{name}={short(value)}" for name, value in own.items()]
        if self.at != Position.of("all"):
            shown.append(f"at={short(self.at)}")
        if self.schedule is not None:
            shown.append(f"schedule={self.schedule}")
        if self.exclude is not None:
            shown.append(f"exclude={self.exclude}")
        return f"{type(self).__name__}({', '.join(shown)})"

    # -- what subclasses say -----------------------------------------------------------------------------------

    def formula(self, x: mx.array, strength: float | mx.array, where: Where) -> mx.array:
        """The edit of every token of `x`, (rows, tokens, ...), at a strength that broadcasts against it."""
        raise NotImplementedError(f"{type(self).__name__} has no formula(self, x, strength, where).")

    # -- what all have in common -------------------------------------------------------------------------------

    def __call__(self, x: mx.array, where: Where) -> mx.array:
        """The edited activation: same shape, same dtype, untouched tokens bit for bit.

        Args:
            x: (rows, tokens, ...).
            where: which tokens these are, and how strongly to act.

        Raises:
            ValueError: a constant doesn't fit `x`, or the strengths don't fit its rows.
            PositionError: `at` or `schedule` needs the prompt, and it is unknown.
        """
        strength, rows = self._resolve_strength(x, where)
        excluded = self.exclude.marks(where.tokens) if self.exclude is not None else None
        touched = where.tokens.touched(self.at, rows, self.schedule)
        if touched is False:
            return x
        if excluded is not None:
            touched = ~excluded if touched is True else touched & ~excluded
        if self.schedule is not None:
            strength = self._scheduled(strength, x, where, rows)
        shape = x.shape
        if not self.fits(shape):
            self.check(shape[-1], where.key)
            self._check_axes(shape[2:], where.key)
            self._cache["fits"] = shape[2:]
        y = self.formula(x, strength, where)
        if y is x:
            return x  # nothing was done, and whoever watches for that finds out
        if not isinstance(y, mx.array):
            raise TypeError(
                f"the formula of {self.name or type(self).__name__} gave {type(y).__name__}, not an mx.array."
            )
        if y.shape != shape:
            raise ValueError(f"{self.name} at {where.key} made shape {y.shape} of {shape}: an edit keeps the shape.")
        return self._select(x, y if y.dtype == x.dtype else y.astype(x.dtype), touched, where)

    @property
    def adds(self) -> bool:
        """Whether it adds the same to every token, whatever the token's activation: then `addition` says what."""
        return False

    def addition(self, dtype: mx.Dtype, axes: int, multiplier: float) -> mx.array | None:
        """What it adds to every token of an activation with `axes` axes; None for nothing, bit for bit.

        Args:
            dtype: the activation's.
            axes: how many it has, rows and tokens included.
            multiplier: on the intervention's own strength.
        """
        raise NotImplementedError(f"{self.name} adds nothing that is the same for every token.")

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether its constants were found to fit an activation of this shape, up to rows and tokens."""
        return bool(self._cache.get("fits") == shape[2:])

    def _select(self, x: mx.array, y: mx.array, touched: bool | mx.array, where: Where) -> mx.array:
        if touched is True:
            return y
        assert isinstance(touched, mx.array)
        self._check_tokens(x, touched.shape, where)
        return mx.where(touched.reshape(*touched.shape, *(1,) * (x.ndim - 2)), y, x)

    def _resolve_strength(self, x: mx.array, where: Where) -> tuple[float | mx.array, tuple[bool, ...] | None]:
        """The strength that broadcasts against `x`, and the rows it leaves to act on."""
        own: Any = self.strength
        rows = where.rows
        if isinstance(own, mx.array):
            if own.ndim and len(own) != len(where.tokens):
                raise ValueError(f"{self.name} at {where.key}: {len(own)} strengths for {len(where.tokens)} rows.")
            own = own * where.strength
            return (own.reshape(-1, *(1,) * (x.ndim - 1)) if own.ndim else own), rows
        if isinstance(own, float):
            own *= where.strength
            return own, rows if own else (False,) * len(where.tokens)
        if len(own) != len(where.tokens):
            raise ValueError(f"{self.name} at {where.key}: {len(own)} strengths for {len(where.tokens)} rows.")
        own = tuple(s * where.strength for s in own)
        if not all(own):
            rows = tuple(bool(s) and (rows is None or rows[i]) for i, s in enumerate(own))
        return mx.array(own).reshape(-1, *(1,) * (x.ndim - 1)), rows

    def _scheduled(
        self, strength: float | mx.array, x: mx.array, where: Where, rows: tuple[bool, ...] | None
    ) -> float | mx.array:
        """The strength times the schedule's factors.

        An array, even where it is one number: `cast` would evaluate a constant for every new float, and wait for it.
        """
        factors = where.tokens.strengths(rows, self.schedule)
        if factors is None:
            return strength
        if factors.size > 1:
            self._check_tokens(x, (len(where.tokens), where.tokens.width), where)
        factors = factors.reshape(*factors.shape, *(1,) * (x.ndim - 2))
        return mx.array(strength * factors) if isinstance(strength, float) else strength * mx.array(factors)

    @staticmethod
    def _check_tokens(x: mx.array, shape: tuple[int, ...], where: Where) -> None:
        if x.shape[:2] != shape:
            raise ValueError(
                f"{where.key} has shape {x.shape}, which doesn't begin with (batch, tokens) = {shape}: only at='all' "
                "with one strength for all tokens can be used there."
            )

    def check(self, width: int, key: str) -> None:
        """Refuse constants that don't fit an activation of `width` features.

        Raises:
            ValueError: with both widths and the key.
        """
        for name, value in self._tensors().items():
            if value.shape[-1] != width:
                raise ValueError(
                    f"{self.name} at {key}: its {name} has width {value.shape[-1]}, the activation has {width}."
                )

    def _check_axes(self, shape: tuple[int, ...], key: str) -> None:
        """Refuse a constant that would be laid along the tokens, or is of more heads than the activation of `shape`."""
        axes = len(shape)
        for name in self.per_token:
            value = getattr(self, name)
            if value is not None and value.ndim > 1 and value.ndim == axes and value.shape[0] not in (1, shape[0]):
                raise ValueError(
                    f"{self.name} at {key}: its {name} is of {value.shape[0]} heads, and here {shape[0]} are edited."
                )
            if value is not None and value.ndim > axes:
                raise ValueError(
                    f"{self.name} at {key}: its {name} has shape {value.shape}; here it is one for every token, "
                    f"of {axes} ax{'e' if axes > 1 else 'i'}s."
                )

    def _tensors(self) -> dict[str, mx.array]:
        """The constants whose last axis runs over the activation's features."""
        return {
            f.name: value
            for f in fields(self)
            if f.name not in ("strength", "at", "_cache") and isinstance(value := getattr(self, f.name), mx.array)
        }

    def cast(self, name: Any, dtype: mx.Dtype, make: Callable[[], mx.array]) -> mx.array:
        """A constant in the activation's dtype, made anew when `name` changes, evaluated for every thread."""
        kept = self._cache.get(dtype)
        if kept is not None and kept[0] == name:
            return kept[1]
        made = make().astype(dtype)
        if settled(made):
            self._cache[dtype] = (name, made)  # the newest only: strengths may change at every step
        return made

    def parts(self) -> tuple[Intervention, ...]:
        """The elementary interventions in it, in the order in which they act."""
        return (self,)

    def reach(self, prompt: int, axes: int) -> range | None:
        """The positions that it can touch whatever its `at` says, where it is laid along the prompt; None for all.

        Args:
            prompt: the prompt's length.
            axes: how many axes an activation has behind its tokens.
        """
        return None

    def bound(self, encode: Callable[[str], list[int]] | None) -> Intervention:
        """The same with the texts of spans as token ids.

        Raises:
            ValueError: there are such texts, and no tokenizer.
        """
        span = self.exclude.bound(encode) if self.exclude is not None else None
        return self if span is self.exclude else replace(self, exclude=span)

    def row(self, index: int) -> Intervention:
        """What it does to one row of a batch, with that row's strength."""
        own: Any = self.strength
        if self.strengths is None:
            return self
        changed: dict[str, Any] = {"strength": own[index]}
        return replace(self, **changed)

    @property
    def strengths(self) -> int | None:
        """For how many rows it has a strength each; None where one strength is for all."""
        own: Any = self.strength
        if isinstance(own, mx.array):
            return len(own) if own.ndim else None
        return None if isinstance(own, float) else len(own)

    def __or__(self, other: Any) -> Compose:
        return Compose((self, as_intervention(other)))

    def __ror__(self, other: Any) -> Compose:
        return Compose((as_intervention(other), self))

    # -- as data -------------------------------------------------------------------------------------------------

    def to_spec(self) -> tuple[dict[str, Any], dict[str, mx.array]]:
        """The intervention as data: a JSON value and the tensors it refers to by name.

        Raises:
            ValueError: it holds something that can't be data (a plain function, a callable position).
        """
        from mlxsteer.interventions.registry import encode

        tensors: dict[str, mx.array] = {}
        return encode(self, tensors), tensors

    @staticmethod
    def from_spec(spec: dict[str, Any], tensors: dict[str, mx.array]) -> Intervention:
        """Make an intervention from its data again."""
        from mlxsteer.interventions.registry import decode

        found = decode(spec, tensors)
        if not isinstance(found, Intervention):
            raise ValueError(f"this is no intervention's data: {spec!r}.")
        return found

    @property
    def fingerprint(self) -> str:
        """A hash of the content: equal for interventions that do the same thing."""
        found = self._cache.get("fingerprint")
        if found is None:
            found = self._cache["fingerprint"] = self._hash()
        return str(found)

    def _hash(self) -> str:
        try:
            return digest(*self.to_spec())
        except ValueError:
            return f"unsaved-{type(self).__module__}.{type(self).__qualname__}({', '.join(self._contents())})"

    def _contents(self) -> Iterator[str]:
        """What is in it, one by one."""
        for value in (getattr(self, f.name) for f in fields(self) if f.init):
            yield value.fingerprint if isinstance(value, Intervention) else likeness(value)


def likeness(value: Any) -> str:
    """A hash of what an intervention holds; a function, also as a position or a schedule, is like itself only."""
    from mlxsteer.interventions.registry import encode

    tensors: dict[str, mx.array] = {}
    try:
        return digest(encode(value, tensors), tensors)
    except ValueError:
        function = getattr(value, "value", getattr(value, "function", value))
        return f"{type(value).__name__} {id(function):x}"


def digest(spec: Any, tensors: dict[str, mx.array]) -> str:
    """Sixteen hexadecimal digits that tell what was encoded apart: equal for equal data and tensors."""
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].shape}".encode())
        digest.update(np.array(tensors[name].astype(mx.float32)).tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True, eq=False, repr=False)
class Compose(Intervention):
    """One intervention after the other: ``x' = f_n(… f_1(x))``.

    Args:
        steps: the interventions, in the order in which they act. Each keeps its own strength, positions and schedule.
    """

    steps: tuple[Intervention, ...]
    strength: Any = 1.0
    name: ClassVar[str] = "compose"

    def __post_init__(self) -> None:
        steps = tuple(as_intervention(step) for step in self.steps)
        if not steps:
            raise ValueError("a composition of no interventions: give at least one.")
        self._set(steps=steps)
        super().__post_init__()
        acts = (self.at, self.schedule, self.exclude) != (Position.of("all"), None, None)
        if acts or not isinstance(self.strength, float):
            raise ValueError(
                "a composition acts where, when and how its steps say: give at=, schedule=, exclude= and per-row "
                "strengths to them; its own strength is one number, which multiplies theirs."
            )

    def __call__(self, x: mx.array, where: Where) -> mx.array:
        inner = replace(where, strength=where.strength * self.strength)
        for step in self.steps:
            x = step(x, inner)
        return x

    def check(self, width: int, key: str) -> None:
        for step in self.steps:
            step.check(width, key)

    def _hash(self) -> str:
        return f"compose×{self.strength}({','.join(step.fingerprint for step in self.steps)})"

    def parts(self) -> tuple[Intervention, ...]:
        return tuple(part for step in self.steps for part in step.parts())

    def bound(self, encode: Callable[[str], list[int]] | None) -> Intervention:
        steps = tuple(step.bound(encode) for step in self.steps)
        return self if all(a is b for a, b in zip(steps, self.steps, strict=True)) else replace(self, steps=steps)

    def row(self, index: int) -> Intervention:
        steps = tuple(step.row(index) for step in self.steps)
        # rows that share a steering share its computation
        return self if all(a is b for a, b in zip(steps, self.steps, strict=True)) else replace(self, steps=steps)


@dataclass(frozen=True, eq=False, repr=False)
class Function(Intervention):
    """A plain function ``x → x'`` as an intervention: ``x' = x + s·(f(x) − x)``. It can't be saved.

    Args:
        function: from an array (rows, tokens, ...) to one of the same shape.
    """

    function: Callable[[mx.array], mx.array]
    strength: Any = 1.0
    name: ClassVar[str] = "function"
    saveable: ClassVar[bool] = False

    def formula(self, x: mx.array, strength: float | mx.array, where: Where) -> mx.array:
        y = self.function(x.reshape(x.shape))  # an object of its own: a function may write to it in place
        if not isinstance(y, mx.array):
            raise TypeError(
                f"the function at {where.key} returned {type(y).__name__}, not an mx.array: a function takes an "
                "activation and returns the edited one."
            )
        if y.shape != x.shape:
            raise ValueError(f"the function at {where.key} made shape {y.shape} of {x.shape}: an edit keeps the shape.")
        return y if isinstance(strength, float) and strength == 1.0 else x + strength * (y - x)

    def _hash(self) -> str:
        return f"function-{id(self.function):x}×{self.strength}@{self.at}×{self.schedule}∖{self.exclude}"


def as_intervention(value: Any) -> Intervention:
    """An intervention, a list of them, or a plain function, as an intervention.

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(value, Intervention):
        return value
    if isinstance(value, (list, tuple)):
        return Compose(tuple(as_intervention(v) for v in value))
    if callable(value) and not isinstance(value, type):
        return Function(value)
    if isinstance(value, type) and issubclass(value, Intervention):
        raise TypeError(f"{value.name} is the kind of intervention: call it, {value.name}(...), to make one.")
    if isinstance(value, (mx.array, np.ndarray)):
        raise TypeError("an array is no intervention by itself: wrap it, such as in add_vector(v).")
    raise TypeError(
        f"an intervention is one of mlxsteer.interventions (such as add_vector(v)), a list of them, or a function "
        f"x -> x', not {type(value).__name__}."
    )


class compose:  # noqa: N801 - a word in code: compose().add(f).add(g).build()
    """Build a composition step by step: ``compose().add(f).add(g).build()`` is ``f | g``."""

    def __init__(self, *steps: Any) -> None:
        self._steps: list[Any] = list(steps)

    def add(self, step: Any) -> compose:
        """One more step, acting after those added before."""
        self._steps.append(as_intervention(step))
        return self

    def build(self) -> Compose:
        """The composition."""
        return Compose(tuple(self._steps))
