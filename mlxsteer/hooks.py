"""The one way into a model: class swap, and one forward under the active plans.

Python looks ``__call__`` up on the type, so a module is hooked by giving that one instance a generated subclass of its
class, and unhooked by giving the class back. The module tree, parameters and attributes stay as they are. What the
hooks do is said by plans on a stack that belongs to the context (thread or task): a call from anywhere else is plain.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import inspect
import itertools
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import _BaseCache

from mlxsteer.banks import Bank, banked
from mlxsteer.interventions.base import Intervention, Where, settled
from mlxsteer.interventions.gates import looks_back
from mlxsteer.plans import MISSING, Hook, NeverFired, Plan, Stopped
from mlxsteer.positions import PositionError, Prompt, Tokens, next_turn
from mlxsteer.sites import Site
from mlxsteer.steering import Opened, Row, SteeredCacheError, Steering, SteeringState, carrier, fresh_rows, ride
from mlxsteer.told import ToldPrompts, stage

# -- which plans are active ----------------------------------------------------------------------------------------

_stack: ContextVar[tuple[Plan, ...]] = ContextVar("mlxsteer_plans", default=())
_forward: ContextVar[Forward | None] = ContextVar("mlxsteer_forward", default=None)
_copying: ContextVar[bool] = ContextVar("mlxsteer_copying", default=False)
_apart: ContextVar[bool] = ContextVar("mlxsteer_apart", default=False)  # what is part of a model doesn't act here
_RESIDENT = "_mlxsteer_resident"  # attribute of an edited model's root: its plans, seen by every thread


class _Enabled(threading.local):
    """Plans enabled without a block: a notebook's cells each run in a context of their own, but in one thread."""

    def __init__(self) -> None:
        self.plans: tuple[Plan, ...] = ()


_enabled = _Enabled()


def active(model: nn.Module) -> list[Plan]:
    """The plans that a call of `model` from here would follow, outermost first."""
    plans = (*residents(model), *_enabled.plans, *_stack.get())
    return [plan for plan in plans if plan.owners and plan.sites.model is model]


def residents(model: nn.Module) -> tuple[Plan, ...]:
    """The plans that are part of an edited model; none for any other."""
    return () if _apart.get() else tuple(model.__dict__.get(_RESIDENT, ()))


def surrounding(model: nn.Module) -> list[Plan]:
    """The plans active for `model` here, without those that are part of the model itself."""
    return [plan for plan in active(model) if all(plan is not own for own in residents(model))]


# -- class swap ----------------------------------------------------------------------------------------------------

_lock = threading.RLock()
_owners: dict[int, set[int]] = {}
_edited: dict[int, weakref.ref[nn.Module]] = {}  # id of a module with an edit that is part of a model → that model
_numbers = itertools.count()


def _swap(modules: Iterable[nn.Module], owner: int) -> None:
    with _lock:
        for module in modules:
            _owners.setdefault(id(module), set()).add(owner)
            cls: Any = type(module)
            if not hasattr(cls, "_hooked"):
                object.__setattr__(module, "__class__", _hooked_class(cls))


def _give_back(modules: Iterable[nn.Module], owner: int) -> None:
    """Give modules their class back where nobody else holds them; doing it twice does no harm."""
    with _lock:
        for module in modules:
            owners = _owners.get(id(module))
            if owners is None:
                continue
            owners.discard(owner)
            if not owners:
                if original := getattr(type(module), "_hooked", None):
                    object.__setattr__(module, "__class__", original)
                _owners.pop(id(module), None)


def new_owner() -> int:
    """A number under which modules and plans are held."""
    return next(_numbers)


def _begin(plans: Sequence[Plan], owner: int) -> None:
    for plan in plans:
        plan.owners.add(owner)
        _swap(plan.modules, owner)


def _end(plans: Sequence[Plan], owner: int) -> None:
    for plan in plans:
        plan.owners.discard(owner)
        _give_back(plan.modules, owner)
    _stack.set(tuple(plan for plan in _stack.get() if plan.owners))


@contextmanager
def attached(*plans: Plan) -> Iterator[None]:
    """Make plans active, after those active here already, for the time of a block.

    Whatever ends the block, Ctrl-C included, the modules get their classes back.
    """
    owner = new_owner()
    try:
        try:
            _begin(plans, owner)
            _stack.set((*_stack.get(), *plans))
            yield
        finally:
            _end(plans, owner)
    finally:  # once more, for a Ctrl-C in the midst of cleaning up; the second time does no harm
        _end(plans, owner)


@contextmanager
def installed(plan: Plan) -> Iterator[None]:
    """Hook a plan's modules for the time of a block; outside `Resumed` they are plain."""
    owner = new_owner()
    try:
        try:
            _begin([plan], owner)
            yield
        finally:
            _end([plan], owner)
    finally:  # see `attached`
        _end([plan], owner)


class Resumed:
    """Make an installed plan active for the time of a block: all that a step of a generation needs.

    `attached` at every step would swap the classes of all hooked modules there and back, a hundredth of a small model's
    step. A Ctrl-C that this block doesn't see is cleaned up after by `installed`.
    """

    __slots__ = ("_before", "_plan")

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def __enter__(self) -> None:
        self._before = _stack.get()
        _stack.set((*self._before, self._plan))

    def __exit__(self, *_: object) -> None:
        _stack.set(self._before)


@contextmanager
def detached(*, residents: bool = False) -> Iterator[None]:
    """Forget the plans active here, for the time of a block; with `residents` those that are part of a model too."""
    enabled, stack, apart = _enabled.plans, _stack.get(), _apart.get()
    _enabled.plans = ()
    _stack.set(())
    _apart.set(apart or residents)
    try:
        yield
    finally:
        _enabled.plans = enabled
        _stack.set(stack)
        _apart.set(apart)


def enable(plan: Plan, owner: int) -> None:
    """Make a plan active in this thread until `disable` is called with the same owner."""
    _begin([plan], owner)
    _enabled.plans = (*_enabled.plans, plan)


def disable(plan: Plan, owner: int) -> None:
    """Undo `enable`, whole or broken off; doing it twice does no harm."""
    _end([plan], owner)
    _enabled.plans = tuple(p for p in _enabled.plans if p.owners)


@contextmanager
def copying() -> Iterator[None]:
    """Let an edited model be copied without its edits, by whoever settles them anew on the copy."""
    token = _copying.set(True)
    try:
        yield
    finally:
        _copying.reset(token)


def settle(plan: Plan) -> None:
    """Make a plan part of its model, in every thread, for as long as the model lives."""
    root = plan.sites.model
    _begin([plan], new_owner())
    # past nn.Module's own __setattr__, which would enter a list among the parameters
    object.__setattr__(root, _RESIDENT, (*residents(root), plan))
    with _lock:
        _edited.update((id(module), weakref.ref(root)) for module in plan.modules)
    weakref.finalize(root, _forget, [id(module) for module in plan.modules])


def whole_of(part: nn.Module) -> nn.Module | None:
    """The edited model that a module is a part of; None where it is no part of one, or is one itself."""
    held = (_edited[id(module)]() for module in part.modules() if id(module) in _edited)
    return next((root for root in held if root is not None and root is not part), None)


def _forget(ids: list[int]) -> None:
    with _lock:
        for number in ids:
            _owners.pop(number, None)
            _edited.pop(number, None)


@functools.cache
def _hooked_class(base: type[nn.Module]) -> type[nn.Module]:
    """The generated subclass: it asks the forward in progress, and is its base class to everybody else."""

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward = _forward.get()
        if forward is not None and self is not forward.root and (hooks := forward.hooks.get(id(self))) is not None:
            return forward.call(hooks, self, base, args, kwargs)
        if plans := active(self):
            return Forward(self, plans).run(base, args, kwargs)
        if forward is None:
            _refuse_alone(self)
        return base.__call__(self, *args, **kwargs)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        if _RESIDENT in self.__dict__ and not _copying.get():
            raise TypeError("an edited model can't be copied or pickled: copy the original, and edit the copy.")
        made = list(super(hooked, self).__reduce_ex__(protocol))  # a copy or pickle is of the model's own class
        if made[0] is copyreg.__newobj__:  # type: ignore[attr-defined]  # which a pickler refuses for a class that isn't the object's own
            made[:2] = _new, tuple(base if argument is hooked else argument for argument in made[1])
        if isinstance(made[2], dict):
            made[2] = {name: value for name, value in made[2].items() if name != _RESIDENT}
        return tuple(made)

    members = {
        "__call__": functools.wraps(base.__call__)(__call__),
        "__reduce_ex__": __reduce_ex__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_hooked": base,
    }
    hooked: Any = type(base.__name__, (base,), members)
    return hooked


def _refuse_alone(module: nn.Module) -> None:
    """Refuse to run a steered module by itself: nobody knows which tokens it sees.

    Raises:
        RuntimeError: an active steering would act in this module, or an edit of the model that it is part of.
    """
    root = edited() if (edited := _edited.get(id(module))) is not None else None
    for plan in (*(residents(root) if root is not None else ()), *_enabled.plans, *_stack.get()):
        hook = plan.hooks.get(id(module)) if plan.owners else None
        if hook is not None and (hook.input_edits or hook.output_edits):
            raise RuntimeError(
                f"{hook.sites[0].key} is steered and was called by itself, outside a forward of its model: its tokens "
                "are unknown. Call the whole model."
            )


def _new(cls: Any, *args: Any) -> Any:
    return cls.__new__(cls, *args)


@functools.cache
def _parameters(base: type) -> list[str]:
    return list(inspect.signature(base.__call__).parameters)[1:]


def _argument(base: type, args: tuple[Any, ...], kwargs: dict[str, Any], index: int, name: str = "") -> Any:
    """An argument of a module's call, given by position or by keyword; None where it wasn't given."""
    names = _parameters(base)
    if name:
        if name in kwargs or name not in names:
            return kwargs.get(name)
        index = names.index(name)
    if index < len(args):
        return args[index]
    return kwargs.get(names[index]) if index < len(names) else None


def _is_cache(given: Any) -> bool:
    return isinstance(given, (list, tuple)) and any(isinstance(entry, _BaseCache) for entry in given)


# -- activations in what modules take and give -----------------------------------------------------------------------


def alias(x: Any) -> Any:
    """The same value as an object of its own: no copy, gradients flow, and a write in place to one spares the other."""
    if isinstance(x, mx.array):
        return x.reshape(x.shape)
    if isinstance(x, (tuple, list)):
        return type(x)(*map(alias, x)) if hasattr(x, "_fields") else type(x)(map(alias, x))
    return x


def activation(output: Any, site: Site) -> mx.array:
    """The activation in what a module gave: the output itself, the first of several, or what is called logits."""
    x = _first(output)
    if not isinstance(x, mx.array):
        raise TypeError(f"{site.key} is no activation: its module gives {type(output).__name__}.")
    if site.heads:
        return x.reshape(*x.shape[:-1], site.heads, -1)
    return x


def with_activation(output: Any, x: mx.array) -> Any:
    """What a module gave, with another activation in it (a view as heads is undone)."""
    first = _first(output)
    x = x if x.shape == first.shape else x.reshape(first.shape)
    if isinstance(output, (tuple, list)):
        return type(output)(x, *output[1:]) if hasattr(output, "_fields") else type(output)((x, *output[1:]))
    if first is not output:
        output = copy.copy(output)
        output.logits = x
        return output
    return x


def _first(output: Any) -> Any:
    if isinstance(output, (tuple, list)) and output:
        return output[0]
    return output if isinstance(output, mx.array) else getattr(output, "logits", output)  # mlx-vlm's models


# -- one forward ---------------------------------------------------------------------------------------------------


_Hooks: TypeAlias = "Sequence[tuple[Plan, Hook]]"
_PLAIN = nullcontext()


class Forward:
    """One call of a hooked model: which tokens it sees, and what its modules do under the active plans."""

    def __init__(self, root: nn.Module, plans: Sequence[Plan]) -> None:
        self.root = root
        self.plans = plans
        self.hooks = plans[0].alone if len(plans) == 1 else _together(plans)
        self.calls: dict[int, int] = {}
        self.tokens: Tokens | None = None
        self.rows: list[Row] | None = None
        self._carrying: dict[int, Any] = {}
        self._carried: list[Any] | None = None
        self._additions: dict[int, tuple[Intervention, Steering]] = {}

    def run(self, base: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = _argument(base, args, kwargs, 0, "input_embeddings")
        if inputs is None:
            inputs = _argument(base, args, kwargs, 0)
        cache = _argument(base, args, kwargs, 0, "cache")
        if cache is None:  # a model of one's own may call it otherwise, or hand it on without a name
            cache = next((given for given in (*args, *kwargs.values()) if _is_cache(given)), None)
        count, width = inputs.shape[:2]
        for plan in self.plans:
            plan.captured.clear()
            plan.forwards += 1
            plan.calls = self.calls
        state = self._locate(inputs, cache, count, width)
        if self.tokens is not None:
            self.tokens.inputs = inputs
            if state is not None and len(self.plans) == 1 and self.tokens.one_real():
                alone = self.plans[0]
                if all(self._rows(steering) is None for steering in alone.steerings):
                    self._additions = alone.additions
        before = _forward.get()
        try:
            with Opened(carrier(cache)) if state is not None else _PLAIN:
                _forward.set(self)
                output = self.call(self.hooks.get(id(self.root), ()), self.root, base, args, kwargs)
            if state is not None:
                state.end(width)
        except BaseException:
            if state is not None:
                state.break_off()
            raise
        finally:
            _forward.set(before)
        if not any(plan.replay for plan in self.plans):
            self._check_residents()
        for plan in self.plans:
            if plan.keep is not None:
                captured, plan.captured = plan.captured, {}
                assert self.tokens is not None
                plan.keep(captured, self.tokens)
        return output

    def _check_residents(self) -> None:
        """An edited model's edits act in every forward, or it says so: a module may have been exchanged since."""
        for plan in residents(self.root):
            for steering in plan.steerings:
                for site, _ in steering.edits:
                    if self.calls.get(id(site.module), 0) <= (site.call or 0):
                        raise NeverFired(
                            f"nothing happened at {site.key} of this edited model: its module never ran, or another "
                            "one has taken its place since the edit."
                        )

    def _locate(self, inputs: mx.array, cache: Any, count: int, width: int) -> SteeringState | None:
        """Find out which tokens these are, and what steers their rows."""
        told = next((plan.tokens for plan in self.plans if plan.tokens is not None), None)
        steered = any(plan.steerings for plan in self.plans)
        if told is not None:
            self.tokens = told
            return None
        first = carrier(cache)
        state: SteeringState | None = getattr(first, "steering_state", None)
        if first is None or (state is None and not steered):
            for plan in self.plans:
                plan.began |= plan.adopt
            whole = self._told()
            prompts = [
                whole.alone(row, _ids(inputs, row))
                if whole is not None
                else Prompt(width, source=functools.partial(_row_of, inputs, row), whole=True)
                for row in range(count)
            ]
            self.tokens = Tokens([0] * count, [width] * count, width, prompts)
            self.tokens.anonymous = True
            return None
        if state is None:
            state = SteeringState(fresh_rows(cache, count))
            state.prepared(cache)
            ride(first, state)
        self._adopt(state, inputs)
        self.tokens, self.rows = state.begin(width), state.rows
        self.tokens.anonymous = not all(row.told for row in state.rows)
        return state

    def _told(self) -> ToldPrompts | None:
        return next((plan.prompts for plan in self.plans if plan.adopt and plan.prompts is not None), None)

    def _adopt(self, state: SteeringState, inputs: mx.array) -> None:
        """Give rows that carry nothing the context's steering; refuse rows that are steered in another way."""
        alone = self.plans[0] if len(self.plans) == 1 else None
        told = self._told()
        if told is None and alone is not None and all(row.passed is alone for row in state.rows):
            return
        doing = stage() if told is not None else None
        for index, row in enumerate(state.rows):
            try:
                self._adopt_row(row, state, index, inputs, told, doing)
            except ValueError:
                row.free()  # where nothing has run, another steering may come
                raise
            row.passed = alone

    def _adopt_row(
        self, row: Row, state: SteeringState, index: int, inputs: mx.array, told: ToldPrompts | None, doing: str | None
    ) -> None:
        allowed = {id(s) for plan in self.plans for s in plan.steerings}
        default = tuple(s for plan in self.plans if plan.adopt for s in plan.steerings)
        carried = {id(s) for s in row.steerings or ()}
        before, new, fed = row.steerings, row.steerings is None, None
        if not new and (not carried <= allowed or not {id(s) for s in default} <= carried):
            if [s.fingerprint for s in row.steerings or ()] != [s.fingerprint for s in default]:
                raise SteeredCacheError(
                    "this prompt cache was filled under another steering: use it with the same interventions, or "
                    "start a new cache."
                )
            new = True  # the same steering, opened anew
        if told is not None:
            behind = row.prompt.length is not None and row.seen >= row.prompt.length
            # a step behind the prompt feeds what was generated, for which a look would wait
            fed = state.fed(index, inputs) if new or not behind or doing == "prompt" or inputs.shape[1] > 1 else None
            again = behind and row.prompt.told is not None and told.begins_anew(fed, doing)
            if new:
                again = before is None or not row.told or not told.goes_on(row.prompt, row.seen, fed, doing)
            if again:
                padded = state.padding(index) > 0
                row.prompt, row.told = told.next(row.seen, row.known(), fed, doing, padded), True
                state.told(index)
                row.memory = next_turn(row.memory)  # gates ask the prompt that is told now
        elif new and state.padding(index) and any(looks_back(edit) for s in default for _, edit in s.edits):
            raise PositionError(
                "spans and means follow every token, and nobody says where the padding of this batch's rows begins: "
                "pass the prompts as model.steer(..., prompt_tokens=[...]), or use model.generate."
            )
        if new:
            row.steerings = default
            for plan in self.plans:
                plan.began |= plan.adopt and before is None
        if told is not None and fed is not None:
            told.check(row.prompt, row.seen, state.fed(index, inputs), doing)

    def _rows(self, steering: Steering) -> tuple[bool, ...] | None:
        """Which rows carry a steering; None for all of them."""
        if self.rows is None:
            # Without a cache, or with one that a plan knows the tokens of, there are no rows that carry anything. What
            # is meant for some rows of a generation is then not meant for a forward that was called amid of it.
            own = any(plan.adopt or plan.tokens is not None for plan in self.plans if steering in plan.steerings)
            return None if own else (False,)
        carried = tuple(any(s is steering for s in row.steerings or ()) for row in self.rows)
        return None if all(carried) else carried

    def call(
        self, hooks: _Hooks, module: nn.Module, base: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A hooked module's call."""
        number = self.calls.get(id(module), 0)
        self.calls[id(module)] = number + 1
        if not number and (addition := self._additions.get(id(module))) is not None:
            self.plans[0].ran.add((id(module), 0))
            return self._edits_alone(base.__call__(module, *args, **kwargs), hooks, *addition)
        replay, enters = MISSING, False
        for plan, hook in hooks:
            if number and hook.uncounted is not None:
                key = hook.uncounted.key
                raise NeverFired(f"{key} runs more than once in a forward: say which call, {key}#0 or {key}#1.")
            plan.ran.add((id(module), number))
            if hook.replay is not MISSING:
                replay = hook.replay
            enters |= hook.enters
        if replay is not MISSING:
            output = alias(replay)
        else:
            if enters:
                args, kwargs = self._input(hooks, number, base, args, kwargs)
            output = self._edited(base.__call__(module, *args, **kwargs), hooks, number)
        for plan, hook in hooks:
            if hook.output_captures:
                for site in hook.output_captures:
                    if site.call is None or site.call == number:
                        plan.captured[site] = alias(output)
            if plan.stop is not None and plan.stop.module is module:
                raise Stopped
        return output

    def _edited(self, output: Any, hooks: _Hooks, number: int) -> Any:
        """What a module gave, edited as planned."""
        for _, hook in hooks:
            for site, intervention, steering in self._edits(hook, hook.output_edits, "output"):
                if site.call is None or site.call == number:
                    if type(output) is mx.array and not site.heads:
                        output = self._edit(output, site, intervention, steering)
                    else:
                        x = self._edit(activation(output, site), site, intervention, steering)
                        output = with_activation(output, x)
        return output

    def _edits_alone(self, output: Any, hooks: _Hooks, intervention: Intervention, steering: Steering) -> Any:
        """The same where all that is planned is one addition, in a decoding step of one sequence: in half the time."""
        if type(output) is mx.array and intervention.fits(output.shape):
            added = intervention.addition(output.dtype, output.ndim, steering.strength)
            if added is not None:
                steering.waiting.discard(id(intervention))
                return output + added
        return self._edited(output, hooks, 0)

    def _input(
        self, hooks: _Hooks, number: int, base: type, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Edit and capture what enters a module."""
        site = next(site for _, hook in hooks for site in hook.sites if site.port == "input")
        x = _argument(base, args, kwargs, site.stream)
        if not isinstance(x, mx.array):
            raise TypeError(f"{site.key} is no activation: its module takes {type(x).__name__}.")
        stream = site.stream
        for _, hook in hooks:
            for site, intervention, steering in self._edits(hook, hook.input_edits, "input"):
                if site.call is None or site.call == number:
                    x = with_activation(x, self._edit(activation(x, site), site, intervention, steering))
        for plan, hook in hooks:
            for site in hook.input_captures:
                if site.call is None or site.call == number:
                    plan.captured[site] = alias(x)
        if stream < len(args):
            return (*args[:stream], x, *args[stream + 1 :]), kwargs
        return args, {**kwargs, _parameters(base)[stream]: x}

    def _edits(self, hook: Hook, edits: Sequence[Any], port: str) -> Sequence[Any]:
        """What is done at a place: as planned, or with the rows' own vectors in one bank."""
        if len(edits) < 2 or self.rows is None:
            return edits
        if self._carried is None:
            self._carried = [[(id(s), s.strength) for s in row.steerings or ()] for row in self.rows]
        known, made = hook.banks.get(port, (None, []))
        if known != self._carried:
            made = banked(edits, self.rows)
            hook.banks[port] = self._carried, made
        return made

    def _edit(self, x: mx.array, site: Site, intervention: Intervention | Bank, steering: Steering | None) -> mx.array:
        assert self.tokens is not None
        if steering is None:
            if isinstance(intervention, Bank):  # of several steerings at once
                for plan in self.plans:
                    for one in plan.steerings:
                        one.waiting.difference_update(intervention.members)
            return intervention(x, Where(self.tokens, site.key, site.layer))
        rows = self._carrying.get(id(steering), MISSING)
        if rows is MISSING:
            rows = self._carrying[id(steering)] = self._rows(steering)
        if rows is not None and not any(rows):
            return x
        y = intervention(x, Where(self.tokens, site.key, site.layer, steering.strength, rows, id(steering)))
        if steering.waiting and y is not x:
            steering.waiting.discard(id(intervention))
        return y


def _together(plans: Sequence[Plan]) -> dict[int, list[tuple[Plan, Hook]]]:
    """What several plans do at each module, outermost first."""
    found: dict[int, list[tuple[Plan, Hook]]] = {}
    for plan in plans:
        for key, hook in plan.hooks.items():
            found.setdefault(key, []).append((plan, hook))
    return found


def _ids(inputs: mx.array, row: int) -> list[int] | None:
    """The token ids of one row; None where they can't be read."""
    return _row_of(inputs, row) if inputs.ndim == 2 and settled(inputs) else None


def _row_of(inputs: mx.array, row: int) -> list[int]:
    ids: Any = inputs[row].tolist()
    return [int(i) for i in ids]
