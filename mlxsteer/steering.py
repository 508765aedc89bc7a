"""What a running sequence carries: its steering, and where it stands. It rides in the prompt cache.

mlx-lm's generators keep the state of each row in a list of caches, and merge, extend, filter, extract, pad, trim and
copy those caches as rows join, leave and move. So the state of a steered row rides on the first of them: that one
object is given a generated subclass of its own class, which does to the rows of `SteeringState` what is done to the
rows of the cache. The list keeps its length, its order and its types. A cache filled under steering knows by which,
and refuses to be read by a model that isn't steered so.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx

from mlxsteer.interventions.base import Intervention, as_intervention, number
from mlxsteer.positions import Prompt, Tokens
from mlxsteer.sites import Site, SiteMap


class SteeredCacheError(ValueError):
    """A prompt cache filled under one steering was given to a model that isn't steered so."""


@dataclass(eq=False)
class Steering:
    """Interventions at their places, and one strength for all of them.

    Attributes:
        edits: (site, intervention), in the order in which they act.
        strength: a multiplier on every intervention's strength; may change while the steering is open.
        name: what it is called in a `with model.steer(name=...)`.
    """

    edits: tuple[tuple[Site, Intervention], ...]
    strength: float = 1.0
    name: str = ""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, number(value, "a strength") if name == "strength" else value)

    @classmethod
    def of(cls, sites: SiteMap, interventions: Mapping[str, Any], name: str = "") -> Steering:
        """Resolve a key dict, refusing unknown keys and constants that can't fit, before anything runs.

        Raises:
            TypeError: it is no key dict, or a value is no intervention.
            UnknownKey: a key names no place.
            ValueError: a constant doesn't fit the place.
        """
        if hasattr(interventions, "directions") and hasattr(interventions, "at"):
            raise TypeError("a SteeringVector says where and how strongly it acts by vector.at(layer, strength=...).")
        if not isinstance(interventions, Mapping):
            raise TypeError(
                "interventions are a dict from keys to interventions, such as {'layers.5': add_vector(v)}, not "
                f"{type(interventions).__name__}."
            )
        if not interventions:
            raise ValueError("an empty dict of interventions would do nothing; leave it out for plain generation.")
        edits: list[tuple[Site, Intervention]] = []
        for key, value in interventions.items():
            if not isinstance(key, str):
                raise TypeError(f"a key is a string such as 'layers.5.mlp', not {key!r}.")
            intervention = as_intervention(value)
            for site in sites.expand(key):
                width = sites.width(site)
                if width is not None:
                    intervention.check(width, site.key)
                edits.append((site, intervention))
        return cls(tuple(edits), name=name)

    @functools.cached_property
    def fingerprint(self) -> tuple[tuple[str, str], ...]:
        """What it does, as (key, intervention's fingerprint) pairs: equal for steerings that do the same."""
        return tuple((site.key, intervention.fingerprint) for site, intervention in self.edits)

    def row(self, index: int) -> Steering:
        """What it does to one row of a batch."""
        if all(intervention.row(index) is intervention for _, intervention in self.edits):
            return self
        return Steering(tuple((s, i.row(index)) for s, i in self.edits), self.strength, self.name)

    def positions(self) -> Iterator[Any]:
        """Every position it acts at."""
        for _, intervention in self.edits:
            for part in intervention.parts():
                yield part.at


@dataclass(eq=False)
class Row:
    """One sequence: what steers it and where it stands.

    Attributes:
        steerings: its steerings, outermost first; None until the first forward gives it the context's.
        seen: number of its tokens that the model has seen.
        prompt: what is known of its prompt.
        told: somebody told us the prompt's length (else it is inferred from how the cache is read).
        read: the cache's state was read since the last forward, as generators do after each chunk of a prompt
            and never after a decoding step.
        begun: a forward has seen it.
        single: how many forwards of one token in a row were followed by such a read. A generator's prompt ends with
            at most one; a loop that evaluates its cache at every step makes more.
        width: number of tokens of the last forward.
    """

    steerings: tuple[Steering, ...] | None = None
    seen: int = 0
    prompt: Prompt = field(default_factory=Prompt)
    told: bool = False
    read: bool = False
    begun: bool = False
    single: int = 0
    width: int = 0

    def copy(self) -> Row:
        return replace(self)


class SteeringState:
    """The rows of one cache; every method mirrors the cache's method of that name.

    Args:
        rows: one `Row` per sequence, in the cache's order.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)
        self._lengths: list[int] | None = None  # real tokens still to come, during a right-padded prefill

    def __deepcopy__(self, memo: dict[int, Any]) -> SteeringState:
        copied = SteeringState([row.copy() for row in self.rows])  # steerings are shared, never copied
        copied._lengths = list(self._lengths) if self._lengths is not None else None
        return copied

    def __copy__(self) -> SteeringState:
        return self.__deepcopy__({})

    def begin(self, width: int) -> Tokens:
        """The tokens of a forward that is about to run."""
        for row in self.rows:
            if row.told or not row.begun or row.prompt.mixed:
                continue
            if row.single > 1 and width == 1:
                row.prompt = Prompt(mixed=True)
            elif not row.read:
                # A forward that follows one whose state nobody read: one token is a decoding step, and what came
                # before is the prompt; several are the next turn's prompt.
                length = row.prompt.length if row.prompt.length is not None else row.seen
                row.prompt = Prompt(length if width == 1 else None, row.prompt.tokens, row.prompt.decode)
        return Tokens([r.seen for r in self.rows], self._real(width), width, [r.prompt for r in self.rows])

    def end(self, width: int) -> None:
        """A forward of `width` tokens has run."""
        for row, real in zip(self.rows, self._real(width), strict=True):
            row.seen += real
            row.read, row.begun = False, True
            row.width = width
        if self._lengths is not None:
            self._lengths = [max(0, n - width) for n in self._lengths]

    def _real(self, width: int) -> list[int]:
        return [width] * len(self.rows) if self._lengths is None else [min(width, n) for n in self._lengths]

    def was_read(self) -> None:
        for row in self.rows:
            if row.begun and not row.read:
                row.single = row.single + 1 if row.width == 1 else 0
            row.read = True

    def extend(self, other: SteeringState) -> None:
        self.rows += other.rows

    def filter(self, keep: Sequence[int]) -> None:
        self.rows = [self.rows[int(i)] for i in keep]
        if self._lengths is not None:
            self._lengths = [self._lengths[int(i)] for i in keep]

    def extract(self, index: int) -> SteeringState:
        return SteeringState([self.rows[index].copy()])

    def prepare(self, lengths: Sequence[int] | None = None, **_: Any) -> None:
        self._lengths = [int(n) for n in lengths] if lengths is not None else None

    def finalize(self) -> None:
        self._lengths = None

    def trim(self, count: int) -> None:
        for row in self.rows:
            row.seen -= count
            if not row.told and not row.read and row.prompt.length is None:
                row.prompt = Prompt(mixed=True)  # drafts were verified together with the prompt's last token


# -- on a cache ----------------------------------------------------------------------------------------------------


def carrier(cache: Sequence[Any] | None) -> Any:
    """The cache object that carries, or would carry, the state: the first one there is."""
    return next((c for c in cache or () if c is not None), None)


def state_of(cache: Sequence[Any] | None) -> SteeringState | None:
    """The steering state that rides in a prompt cache, or None."""
    return getattr(carrier(cache), "steering_state", None)


def ride(cache: Any, state: SteeringState) -> Any:
    """Put a state on one cache object; its class becomes a generated subclass of its own."""
    if not hasattr(type(cache), "_carried"):
        cls: Any = type(cache)
        cache.__class__ = _carrier_class(cls)
    cache.steering_state, cache._open = state, False
    return cache


@contextmanager
def opened(cache: Any) -> Iterator[None]:
    """Let a model read a steered cache: done by the hooked model, for the time of one forward."""
    before, cache._open = cache._open, True
    try:
        yield
    finally:
        cache._open = before


def fresh_rows(cache: Sequence[Any], count: int) -> list[Row]:
    """Rows for a cache that carries no state yet, empty or filled without steering.

    Raises:
        SteeredCacheError: it has been filled, and doesn't say with how many tokens (a state-space model's).
    """
    entries = [c for c in cache if c is not None]
    offset = next((c.offset for c in entries if hasattr(c, "offset")), None)
    if offset is None:
        if any(not c.empty() for c in entries):
            raise SteeredCacheError(
                "this prompt cache was filled before, and a state-space cache doesn't say with how many tokens: start "
                "a new cache under the steering."
            )
        offset = 0
    offsets: Any = offset.reshape(-1).tolist() if isinstance(offset, mx.array) else [offset] * count
    # an offset below 0 counts left padding: position 0 is the first real token, and padding lies before it
    return [Row(seen=int(n), begun=n > 0) for n in offsets]


def _other_state(cache: Any) -> SteeringState:
    """The state of a cache that joins one with a state; one without becomes rows to be given the context's steering."""
    found = getattr(cache, "steering_state", None)
    if found is not None:
        return found
    padding = getattr(cache, "left_padding", None)
    return SteeringState(fresh_rows([cache], len(padding) if padding is not None else 1))


def _guard(base: type, name: str) -> Callable[..., Any]:
    """A method that a model reads a cache by, refused outside a forward that is steered as the cache is."""
    method = getattr(base, name)

    @functools.wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self._open:
            raise SteeredCacheError(
                "this prompt cache was filled under steering, and the model that reads it now is not steered so: "
                "use it with the same interventions, or start a new cache."
            )
        return method(self, *args, **kwargs)

    return guarded


def _mirror(base: type, name: str) -> Callable[..., Any]:
    """A method that moves a cache's rows, done to the state's rows too."""
    method, own = getattr(base, name), getattr(SteeringState, name)

    @functools.wraps(method)
    def mirrored(self: Any, *args: Any, **kwargs: Any) -> Any:
        with opened(self):
            done = method(self, *args, **kwargs)
        if name == "trim":
            args = (done,)  # a cache may trim less than it was asked to
        if name == "extend":
            args = (_other_state(args[0]),)
        own(self.steering_state, *args, **kwargs)
        return done

    return mirrored


@functools.cache
def _carrier_class(base: type) -> type:
    """A subclass of a cache class that keeps a `SteeringState` in step with it."""

    def merge(cls: type, caches: Sequence[Any]) -> Any:
        states = [_other_state(c) for c in caches]
        before = [getattr(c, "_open", False) for c in caches]
        try:
            for c in caches:
                c._open = True
            merged = base.merge(caches)  # type: ignore[attr-defined]
        finally:
            for c, was in zip(caches, before, strict=True):
                c._open = was
        rows = [row.copy() for state in states for row in state.rows]
        if hasattr(type(merged), "_carried"):
            merged.__class__ = type(merged)._carried
        return ride(merged, SteeringState(rows))

    def duplicate(self: Any) -> Any:
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        copied.steering_state = copy.copy(self.steering_state)
        return copied

    def extract(self: Any, index: int) -> Any:
        with opened(self):
            taken = base.extract(self, index)  # type: ignore[attr-defined]
        return ride(taken, self.steering_state.extract(index))

    def to_quantized(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ride(base.to_quantized(self, *args, **kwargs), self.steering_state)  # type: ignore[attr-defined]

    def get_state(self: Any) -> Any:
        self.steering_state.was_read()
        with opened(self):
            return base.state.fget(self)  # type: ignore[attr-defined]

    def set_state(self: Any, value: Any) -> None:
        with opened(self):
            base.state.fset(self, value)  # type: ignore[attr-defined]

    members: dict[str, Any] = {"_carried": base, "__module__": base.__module__, "__qualname__": base.__qualname__}
    members["state"] = property(get_state, set_state)
    members["__copy__"] = duplicate
    for name in ("update_and_fetch", "make_mask", "__getitem__", "__setitem__", "size"):  # plain merges ask for size
        if hasattr(base, name):
            members[name] = _guard(base, name)
    for name in ("extend", "filter", "prepare", "finalize", "trim"):
        if hasattr(base, name):
            members[name] = _mirror(base, name)
    for name, method in (("merge", classmethod(merge)), ("extract", extract), ("to_quantized", to_quantized)):
        if hasattr(base, name):
            members[name] = method
    return type(base.__name__, (base,), members)
