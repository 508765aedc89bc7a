"""One forward, staged: read any activation, edit it in place, and the rest of the model is staged again.

MLX is lazy, so staging a forward costs no arithmetic: what nobody looks at is never computed. A trace keeps the blocks'
staged outputs; reading another place stages its block once more, with the blocks before it replayed, and so does an
edit. What a trace hands out are true arrays (`Activation`), which tell their trace when they are written to.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import mlx.core as mx
import numpy as np

from mlxsteer.display import Displayed, Shown
from mlxsteer.hooks import activation, alias, attached, detached, residents, surrounding, with_activation
from mlxsteer.interventions.base import Function
from mlxsteer.plans import NeverFired, Plan, Stopped
from mlxsteer.positions import Position, PositionError, Prompt, Tokens
from mlxsteer.sites import Site, SiteMap, UnknownKey
from mlxsteer.steering import Steering


class LostWrite(RuntimeError):
    """A write that would reach no model, with the spelling that does."""


_PROMPTS, _TOKENS = 20, 200
"""The most prompts that are shown of a trace, and the most tokens of each."""

_open: ContextVar[tuple[Trace, ...]] = ContextVar("mlxsteer_traces", default=())
_traces: weakref.WeakValueDictionary[int, Trace] = weakref.WeakValueDictionary()  # id(handle) → its trace


# -- arrays that know their trace ----------------------------------------------------------------------------------


def check_index(index: Any, shape: tuple[int, ...], key: str) -> None:
    """Refuse an index that lies outside an activation, which MLX would clip or wrap in silence.

    Raises:
        IndexError: with the key and the shape.
    """
    parts = index if isinstance(index, tuple) else (index,)
    if Ellipsis in [p for p in parts if p is Ellipsis]:
        cut = next(i for i, p in enumerate(parts) if p is Ellipsis)
        parts = (*parts[:cut], *(slice(None),) * (len(shape) - len(parts) + 1), *parts[cut + 1 :])
    if any(p is None or isinstance(p, (mx.array, np.ndarray, list, bool)) for p in parts):
        return
    if len(parts) > len(shape):
        raise IndexError(f"{key} has shape {shape}: an index of {len(parts)} axes is too long.")
    for part, size in zip(parts, shape, strict=False):
        single = isinstance(part, slice) and part.start is not None and part.stop in (part.start + 1, None)
        number = part.start if single else part
        if isinstance(number, int) and not -size <= number < size:
            raise IndexError(f"{key} has shape {shape}: index {number} lies outside an axis of {size}.")


def _plain(x: mx.array) -> mx.array:
    return x


def _trace_of(handle: mx.array) -> Trace:
    trace = _traces.get(id(handle))
    if trace is None or trace.closed:
        raise LostWrite(
            "the trace this activation came from is over, so a write to it would reach no model. Write inside the "
            "`with model.trace(...)` block, or take an array of your own: h = mx.array(h)."
        )
    return trace


class Activation(mx.array):
    """An activation of an open trace: an `mx.array` for every operation; a write to it is an edit of the forward."""

    __slots__ = ()

    def save(self) -> mx.array:
        """The value as a plain array of its own, which later edits don't touch."""
        return alias(self)

    def __getitem__(self, index: Any) -> mx.array:
        trace = _traces.get(id(self))
        if trace is not None:
            trace.check_index(self, index)
        part = super().__getitem__(index)
        if trace is not None and not trace.closed:
            part = _handle(part, ActivationSlice)
            trace.keep_slice(part)
        return part

    def __setitem__(self, index: Any, value: Any) -> None:
        trace = _trace_of(self)
        trace.before_write(self)
        trace.check_index(self, index)
        if isinstance(value, mx.array):
            trace.pending.pop(id(value), None)
            value = alias(value).astype(self.dtype)
        with trace.shapes_of(self, value):
            super().__setitem__(index, value)
        trace.written(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _plain, (mx.array(self),)  # a pickle or a copy is a plain array


class ActivationSlice(mx.array):
    """A part of an activation. MLX's slices are copies: only ``activation[part] += v`` writes back to the model."""

    __slots__ = ()

    def save(self) -> mx.array:
        """The value as a plain array of its own."""
        return alias(self)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise LostWrite(
            "a write to a slice of a slice is lost, because a slice is a copy. Write with one index: "
            "output[0, -1] += v instead of output[0][-1] += v."
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _plain, (mx.array(self),)


def _in_place(name: str) -> Callable[[Any, Any], Any]:
    plain = getattr(mx.array, name)

    def operator(self: Any, other: Any) -> Any:
        trace = _trace_of(self)
        if isinstance(self, Activation):
            trace.before_write(self)
        if isinstance(other, mx.array):
            trace.pending.pop(id(other), None)
            other = alias(other).astype(self.dtype)  # an activation keeps its dtype, as it does in an intervention
        with trace.shapes_of(self, other):
            plain(self, other)
        if isinstance(self, Activation):
            trace.written(self)
        else:
            trace.pending[id(self)] = self
        return self

    operator.__name__ = name
    return operator


for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
):
    setattr(Activation, f"__i{_name}__", _in_place(f"__i{_name}__"))
    setattr(ActivationSlice, f"__i{_name}__", _in_place(f"__i{_name}__"))


def _handle(x: mx.array, cls: type) -> Any:
    """`x` as an object of its own of an array subclass (a constructor would copy the buffer)."""
    handle = x.reshape(x.shape)
    handle.__class__ = cls
    return handle


# -- the trace -----------------------------------------------------------------------------------------------------


class Activations(Mapping[str, mx.array]):
    """Every activation of a trace by key; a value is staged when it is looked at."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def __getitem__(self, key: str) -> mx.array:
        return self._trace.read(self._trace.sites.resolve(key))

    def __contains__(self, key: object) -> bool:
        try:
            self._trace.sites.resolve(key)  # type: ignore[arg-type]
        except (UnknownKey, TypeError):
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(self._trace.fired_keys())

    def __len__(self) -> int:
        return len(self._trace.fired_keys())

    def __repr__(self) -> str:
        return f"<activations of {len(self)} places: {', '.join(list(self)[:4])}, …>"


class Trace(Displayed):
    """One staged forward over one prompt, or several in a right-padded batch.

    Attributes:
        activations: key → activation, (batch, tokens, ...), after every intervention and edit at that place.
        tokens: the token ids, (batch, tokens); rows shorter than the longest are padded at the end.
        lengths: number of real tokens in each row.
        closed: whether the block is over. Reading goes on, editing doesn't.
    """

    def __init__(
        self,
        sites: SiteMap,
        prompts: Sequence[Sequence[int]],
        decode: Callable[[list[int]], str] | None = None,
        steering: Steering | None = None,
        prompt_lengths: Sequence[int] | None = None,
    ) -> None:
        self.sites = sites
        self.lengths = [len(prompt) for prompt in prompts]
        width = max(self.lengths)
        self.tokens = mx.array([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts])
        self.activations = Activations(self)
        self.closed = False
        self.pending: dict[int, mx.array] = {}
        if prompt_lengths is None:
            known = [Prompt(len(prompt), list(prompt), decode, whole=True) for prompt in prompts]
        else:
            pieces = zip(prompts, prompt_lengths, strict=True)
            known = [Prompt(count, list(prompt[:count]), decode) for prompt, count in pieces]
        self._tokens = Tokens([0] * len(prompts), self.lengths, width, known)
        self._edits = steering.edits if steering is not None else ()
        self._outer: list[tuple[Plan, Plan]] = []  # plans around the trace, and what they were when it began
        self._count = len(sites.blocks)
        # where a block runs never or several times, none is replayed and each forward runs whole
        self._blocks = [sites.resolve(f"layers.{i}") for i in range(self._count)] if sites.regular else []
        self._logits = sites.resolve("logits")
        self._whole: dict[Site, Any] = {}  # site → what its module gave, for blocks, logits and places read
        self._handles: dict[Site, Activation] = {}
        self._given: list[Activation] = []  # every handle ever given, so that none of their ids is used again
        self._pins: dict[Site, mx.array] = {}  # places edited inline → their value
        self._keys: list[str] | None = None

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        return f"<trace of {len(self.lengths)} prompts, {sum(self.lengths)} tokens; {state}>"

    def _shown(self) -> Shown:
        """The first prompts, or as much of them as fits; nothing is staged, and no handle given."""
        ids: Any = self.tokens.tolist()
        decode, rows = self._tokens.prompts[0].decode, []
        for row, (tokens, count) in enumerate(zip(ids[:_PROMPTS], self.lengths, strict=False)):
            pieces = [
                (f"{token} " if decode is None else decode([token]), f"{i}, or {i - count}: token {token}")
                for i, token in enumerate(tokens[: min(count, _TOKENS)])
            ]
            pieces += [("…", f"{count - _TOKENS} more tokens")] * (count > _TOKENS)
            rows.append((str(row), str(count), pieces))
        foot = f"… and {len(ids) - _PROMPTS} more prompts" if len(ids) > _PROMPTS else ""
        return Shown(repr(self), ("row", "tokens", "prompt"), rows, texts=(2,), foot=foot)

    # -- the block -------------------------------------------------------------------------------------------------

    def __enter__(self) -> Trace:
        around = surrounding(self.sites.model)
        self._watchers = [plan for plan in around if plan.keep is not None]
        self._outer = [(plan, frozen(plan)) for plan in around if plan.keep is None]
        if self._edits or self._outer:  # refuse at once what doesn't fit or never runs
            self._stage([self._logits])
        _open.set((*_open.get(), self))
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        _open.set(tuple(trace for trace in _open.get() if trace is not self))
        self.closed = True
        if error is None and self.pending:
            raise LostWrite(
                "a slice of an activation was written to and never put back, because a slice is a copy. Write "
                "through the activation, model.layers[5].output[:, -1] += v, or make a value of your own: h = h + v."
            )
        if error is None and self._watchers:  # a recording around the trace sees the forward as it is in the end
            plan = self._plan([], 0, self._count, replay=False)
            self._run(plan, self._watchers)

    # -- reading ---------------------------------------------------------------------------------------------------

    @property
    def output(self) -> Any:
        """The logits, (batch, tokens, vocabulary), after any softcap."""
        return self.read(self._logits)

    @output.setter
    def output(self, value: Any) -> None:
        self.write(self._logits, value)

    def read(self, site: Site) -> Any:
        """The activation at a place; writing to it is an edit while the trace is open, and refused afterwards.

        Raises:
            NeverFired: the place's module doesn't run in this model's forward.
        """
        if site not in self._whole:
            self._stage([site])
        if site not in self._handles:
            handle = self._handles[site] = _handle(activation(self._whole[site], site), Activation)
            self._given.append(handle)
            _traces[id(handle)] = self
        return self._handles[site]

    def whole(self, site: Site) -> Any:
        """All that the module at a place gave, where that is more than the activation."""
        self.read(site)
        return alias(self._whole[site])

    def last(self, key: str) -> mx.array:
        """The activation at each row's last real token, (batch, ...)."""
        value = alias(self.activations[key])
        return value[mx.arange(len(self.lengths)), mx.array(self.lengths) - 1]

    def marks(self, row: int, position: Position) -> np.ndarray:
        """Which tokens of a row a position means, (tokens,) of bool; never padding."""
        return self._tokens.marks(row, position)

    @property
    def mask(self) -> mx.array:
        """Which tokens are real, (batch, tokens) of bool."""
        return mx.arange(self.tokens.shape[1])[None] < mx.array(self.lengths)[:, None]

    def fired_keys(self) -> list[str]:
        """The keys of all places that this forward goes through, in the order in which it does."""
        if self._keys is None:
            plan = self._dry([self.sites.resolve(f"{key}#0") for key in self.sites.modules] + [self._logits])
            self._keys = []
            for site, value in plan.captured.items():
                if isinstance(value[0] if isinstance(value, (tuple, list)) and value else value, mx.array):
                    key, calls = site.key.removesuffix("#0"), plan.calls[id(site.module)]
                    self._keys += [key] if calls == 1 else [f"{key}#{n}" for n in range(calls)]
        return self._keys

    # -- writing -----------------------------------------------------------------------------------------------------

    def write(self, site: Site, value: Any) -> None:
        """Put a value at a place: anything that broadcasts to its shape."""
        handle = self.read(site)
        if value is not handle:
            handle[...] = value

    def check_index(self, handle: Activation, index: Any) -> None:
        """Refuse an index outside the activation, and one that would mean padding in some row.

        Raises:
            IndexError: it lies outside an axis.
            PositionError: rows have different lengths, and a single or negative token index is padding in some.
        """
        key = next((s.key for s, h in self._handles.items() if h is handle), "this activation")
        check_index(index, handle.shape, key)
        if min(self.lengths) == max(self.lengths) or handle.ndim < 2 or not isinstance(index, tuple) or len(index) < 2:
            return
        token = index[1]
        negative = isinstance(token, slice) and any(p is not None and p < 0 for p in (token.start, token.stop))
        if negative or (isinstance(token, int) and not 0 <= token < min(self.lengths)):
            raise PositionError(
                f"the rows have {', '.join(map(str, self.lengths))} tokens, so token index {token} is padding in some: "
                "trace.last(key) reads each row's last token, and an intervention with at='last' writes there."
            )

    @contextmanager
    def shapes_of(self, handle: mx.array, value: Any) -> Iterator[None]:
        """Say where it was when a value doesn't fit an activation."""
        try:
            yield
        except ValueError as error:
            key = next((s.key for s, h in self._handles.items() if h is handle), "a part of an activation")
            given = value.shape if isinstance(value, mx.array) else value
            raise ValueError(f"the value of shape {given} doesn't fit {key}, of shape {handle.shape}.") from error

    def keep_slice(self, part: ActivationSlice) -> None:
        """Remember whose slice this is."""
        _traces[id(part)] = self
        weakref.finalize(part, _traces.pop, id(part), None)

    def before_write(self, handle: Activation) -> None:
        """Refuse a write that would be lost or would contradict an earlier one."""
        site = next((s for s, h in self._handles.items() if h is handle), None)
        if site is None:
            raise LostWrite("this value was read before an edit upstream of it: read it again, then write to it.")
        for pinned in self._pins:
            if pinned != site and not self._before(pinned, site):
                raise LostWrite(
                    f"{site.key} lies upstream of {pinned.key}, which was edited before: edit in the order in which "
                    "the model runs."
                )

    def written(self, handle: Activation) -> None:
        """An activation was written to: what comes after it is staged again when somebody looks."""
        site = next(s for s, h in self._handles.items() if h is handle)
        self._whole[site] = with_activation(self._whole[site], alias(handle))
        self._pins[site] = alias(handle)
        for other in list(self._handles):
            if other != site and self._before(site, other):
                del self._handles[other]  # what was handed out keeps its value; the next read gives the new one
                del self._whole[other]
        if site != self._logits:
            start = self._segment(site) + (site in self._blocks)
            for block in [*self._blocks[start:], self._logits]:
                self._whole.pop(block, None)

    # -- order -------------------------------------------------------------------------------------------------------

    def _dry(self, capture: Sequence[Site]) -> Plan:
        """Stage a plain forward of its own, to learn what fires and in which order. Nothing is evaluated."""
        plan = Plan(self.sites, capture=capture, tokens=self._tokens)
        with detached(), attached(plan):
            self.sites.model(self.tokens)
        return plan

    def _segment(self, site: Site) -> int:
        """How many blocks run wholly before a place: those that can be replayed."""
        if site.layer is not None:
            return site.layer
        if site == self._logits or site.key.startswith("norm"):
            return self._count
        segments = self.sites.segments
        if site.key not in segments:
            plan = self._dry([*self._blocks, site])
            plan.check_fired()
            order = list(plan.captured)
            segments[site.key] = sum(block in self._blocks for block in order[: order.index(site)])
        return segments[site.key]

    def _before(self, first: Site, second: Site) -> bool:
        """Whether one place lies before another in the forward."""
        a, b = self._segment(first), self._segment(second)
        if a != b and self.sites.regular:
            return a < b
        order = list(self._dry([first, second]).captured)
        return order.index(first) < order.index(second)

    # -- staging -----------------------------------------------------------------------------------------------------

    def _run(self, plan: Plan, watchers: Sequence[Plan] = ()) -> None:
        """One forward under a plan, within what surrounds the trace."""
        with detached(), attached(*(frozen for _, frozen in self._outer), *watchers, plan), suppress(Stopped):
            self.sites.model(self.tokens)
        for plan_around, frozen in self._outer:
            plan_around.ran |= frozen.ran
            plan_around.forwards += 1
        plan.check_fired()

    def _stage(self, capture: Sequence[Site]) -> None:
        """Stage the forward as far as these places. What is known is replayed, what was handed out stays."""
        known = next((i for i, block in enumerate(self._blocks) if block not in self._whole), len(self._blocks))
        segments = [self._segment(site) for site in capture]
        start, end = min([known, *segments]), max(segments)
        # Reading alone needs no block behind the last place read; edits and surrounding contexts must see them all.
        early = end < len(self._blocks) - 1 and self.sites.family.replay and not (self._edits or self._outer)
        early = early and not residents(self.sites.model)
        wanted = [*self._blocks[start : end + 1 if early else None], *capture, *([] if early else [self._logits])]
        plan = self._plan(list(dict.fromkeys(wanted)), start, end if early else self._count)
        plan.stop = self._blocks[end] if early else None
        self._run(plan)
        # Where something downstream was handed out already, it may have been computed: the staged values behind it
        # are worth more than these. Where nothing was, take these, so that the place just read is not run twice.
        fresh = not any(self._segment(site) >= start for site in self._handles)
        for site, value in plan.captured.items():
            if site not in self._whole or site in capture or fresh:
                self._whole[site] = value

    def _plan(self, capture: Sequence[Site], start: int, end: int, *, replay: bool = True) -> Plan:
        """A plan that runs the blocks from `start` to `end`, replaying those before, with every edit in force."""
        replayable = replay and self.sites.family.replay and self.sites.regular
        given = {block: self._whole[block] for block in self._blocks[:start]} if replayable else {}
        edited = [site for site in self._pins if (site != self._logits or not replay) and self._segment(site) <= end]
        ahead = [site for site in edited if not given or self._segment(site) >= start]
        for site in ahead:
            looked_into = any(inner.key.startswith(f"{site.key}.") for inner in capture)
            if replayable and site.port == "output" and site.layer is not None and not looked_into:
                given[site] = self._whole[site]
        pins = [(site, Function(_constant(self._pins[site]))) for site in ahead if site not in given]
        edits = [
            (site, intervention)
            for site, intervention in self._edits
            if site not in given and (site.layer is None or not given or self._blocks[site.layer] not in given)
        ]
        return Plan(self.sites, capture, [*edits, *pins], given, self._tokens)


def _constant(value: mx.array) -> Callable[[mx.array], mx.array]:
    return lambda x: value


def frozen(plan: Plan) -> Plan:
    """A plan around a trace as it was when the trace began: strengths that change later don't reach into it."""
    steerings = [s.copy() for s in plan.steerings]
    return Plan(plan.sites, edits=plan.edits, replay=plan.replay, steerings=steerings, adopt=plan.adopt)


def innermost(sites: SiteMap) -> Trace | None:
    """The innermost open trace of a model, here."""
    return next((trace for trace in reversed(_open.get()) if trace.sites is sites), None)


class Recording(Mapping[str, list[mx.array]]):
    """What `record` saw: for each key one activation per forward, in order."""

    def __init__(self, sites: SiteMap, keys: Iterable[Site]) -> None:
        self._sites = sites
        self._seen: dict[str, list[mx.array]] = {site.key: [] for site in keys}

    def keep(self, captured: dict[Site, Any], _: Tokens) -> None:
        """Take in the captures of one forward."""
        for site, value in captured.items():
            self._seen[site.key].append(alias(activation(value, site)))

    def __getitem__(self, key: str) -> list[mx.array]:
        site = self._sites.resolve(key)
        if site.key not in self._seen:
            raise UnknownKey(f"{key!r} was not recorded; recorded are {', '.join(self._seen)}.")
        return self._seen[site.key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._seen)

    def __repr__(self) -> str:
        return f"<recording of {', '.join(f'{key}: {len(steps)} forwards' for key, steps in self._seen.items())}>"

    def __len__(self) -> int:
        return len(self._seen)

    def join(self, key: str) -> mx.array:
        """All forwards of a key side by side, (batch, all tokens, ...)."""
        steps = self[key]
        if not steps:
            raise NeverFired(f"nothing was recorded at {key!r}: no forward has run.")
        return mx.concatenate(steps, axis=1)
