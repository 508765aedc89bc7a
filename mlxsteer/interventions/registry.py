"""The registry that knows interventions by name, and interventions as data."""

from __future__ import annotations

import difflib
import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

import mlx.core as mx

from mlxsteer.interventions import conditions
from mlxsteer.interventions.base import Compose, Intervention
from mlxsteer.interventions.schedules import SAVED, Schedule
from mlxsteer.positions import Position, after

ENTRY_POINTS = "mlxsteer.interventions"
"""Entry-point group through which other packages add interventions of their own."""

_registry: dict[str, type[Intervention]] = {"compose": Compose}
_T = TypeVar("_T", bound=type)


def register(name: str) -> Callable[[_T], _T]:
    """Enter an intervention class in the registry, so that it can be created by name, saved and loaded.

    Args:
        name: what it is called in files and in `create`.

    Returns:
        A decorator for a subclass of `Intervention`; it becomes a frozen dataclass if it isn't one.

    Raises:
        ValueError: the name is taken.
        TypeError: the class is no `Intervention`.
    """

    if not isinstance(name, str) or not name:
        raise TypeError("an intervention is registered by a name: @register('name').")

    def enter(cls: _T) -> _T:
        if not isinstance(cls, type) or not issubclass(cls, Intervention):
            raise TypeError(f"{getattr(cls, '__name__', cls)} is no subclass of interventions.Intervention.")
        known = _registry.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"an intervention called {name!r} is registered already: {known.__name__}.")
        if "__dataclass_fields__" not in cls.__dict__ or not is_dataclass(cls):
            cls = dataclass(frozen=True, eq=False, repr=False)(cls)  # type: ignore[assignment]
        cls.name = name
        _registry[name] = cls
        return cls

    return enter


def registered() -> dict[str, type[Intervention]]:
    """Name → class of every intervention, those of other packages included."""
    for point in _entry_points():
        if point.name not in _registry:
            try:
                register(point.name)(point.load())
            except Exception as error:  # noqa: BLE001 - another package's import may fail in any way; ours goes on
                warnings.warn(f"the intervention {point.name!r} could not be loaded: {error}", stacklevel=3)
    return _registry


@functools.cache
def _entry_points() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=ENTRY_POINTS))


def available() -> list[str]:
    """The names of all registered interventions."""
    return sorted(registered())


def _known(name: str) -> type[Intervention]:
    found = registered().get(name)
    if found is None:
        near = difflib.get_close_matches(name, available(), n=3) or available()
        raise ValueError(f"no intervention called {name!r}. Nearest: {', '.join(near)}.")
    return found


def create(name: str, **parameters: Any) -> Intervention:
    """Make a registered intervention by name.

    Raises:
        ValueError: there is none of that name, or a parameter it doesn't have was given.
    """
    cls = _known(name)
    accepted = [f.name for f in fields(cls) if f.init]
    if unknown := [p for p in parameters if p not in accepted]:
        raise ValueError(f"{name} has no parameter {unknown[0]!r}; it has {', '.join(accepted)}.")
    return cls(**parameters)


def describe(name: str) -> str:
    """What a registered intervention does: signature, formula, shapes, source."""
    cls = _known(name)
    arguments = ", ".join(
        str(p).split(":")[0] + (f"={p.default!r}" if p.default is not p.empty else "")
        for p in inspect.signature(cls).parameters.values()
    )
    return f"{name}({arguments})\n\n{inspect.getdoc(cls)}\n\n{_COMMON}"


_COMMON = """Every intervention takes:
    at: which tokens: "all", "prompt", "generated", "last", "first", after(text), an int, list, slice or callable.
    schedule: a factor on the strength over generated tokens: decay(half_life), ramp(tokens), window(start, stop), or a
        function.
    exclude: the two markers of spans to leave alone, such as ("<think>", "</think>")."""


# -- data ----------------------------------------------------------------------------------------------------------


def encode(value: Any, tensors: dict[str, mx.array], path: str = "") -> Any:
    """An intervention, or a part of one, as a JSON value; its tensors are entered in `tensors` by name.

    Raises:
        ValueError: it holds something that can't be data.
    """
    if isinstance(value, Intervention):
        if not value.saveable or registered().get(value.name) is not type(value):
            raise ValueError(
                f"{value.name or type(value).__name__} can't be saved: only registered interventions can "
                "(see interventions.register)."
            )
        own = {f.name: getattr(value, f.name) for f in fields(value) if f.init}
        for later in ("schedule", "exclude"):  # left out, so that files and fingerprints from before them stay good
            if own.get(later) is None:
                own.pop(later, None)
        return {
            "intervention": value.name,
            "parameters": {k: encode(v, tensors, f"{path}{k}") for k, v in own.items()},
        }
    if isinstance(value, Position):
        return _position(value)
    if isinstance(value, Schedule):
        return _schedule(value)
    if type(value) in conditions.SAVED.values():
        parts = {f.name: getattr(value, f.name) for f in fields(value) if f.init}
        return {
            "condition": next(name for name, kind in conditions.SAVED.items() if kind is type(value)),
            "parameters": {k: encode(v, tensors, f"{path}.{k}") for k, v in parts.items()},
        }
    if isinstance(value, mx.array):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, (list, tuple)):
        return [encode(v, tensors, f"{path}.{i}.") for i, v in enumerate(value)]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise ValueError(f"{value!r} can't be saved as data.")


def _position(position: Position) -> Any:
    if position.kind == "call":
        raise ValueError("an intervention whose at= is a callable can't be saved; give the positions as a list.")
    if position.kind == "name":
        return position.value
    value = position.value
    return {position.kind: value if isinstance(value, str) else list(value)}


def _schedule(schedule: Schedule) -> Any:
    name = type(schedule).__name__
    if SAVED.get(name) is not type(schedule):
        raise ValueError("an intervention whose schedule= is a function can't be saved; use decay, ramp or window.")
    return {"schedule": name, "values": [getattr(schedule, f.name) for f in fields(schedule) if f.init]}


def decode(value: Any, tensors: dict[str, mx.array]) -> Any:
    """What `encode` made data of."""
    if isinstance(value, dict):
        if "intervention" in value:
            parameters = {k: decode(v, tensors) for k, v in value.get("parameters", {}).items()}
            return create(value["intervention"], **parameters)
        if "condition" in value:
            made = {k: decode(v, tensors) for k, v in value["parameters"].items()}
            return conditions.SAVED[value["condition"]](**made)
        if "tensor" in value:
            return tensors[value["tensor"]]
        if "after" in value:
            text = value["after"]
            if not isinstance(text, str) and not all(isinstance(t, int) for t in text):
                raise ValueError(f"unknown data {value!r} in an intervention.")
            return after(text if isinstance(text, str) else tuple(text))
        if "schedule" in value:
            return SAVED[value["schedule"]](*value["values"])
        if "slice" in value:
            return slice(*value["slice"])
        if "ints" in value:
            return list(value["ints"])
        raise ValueError(f"unknown data {value!r} in an intervention.")
    return tuple(decode(v, tensors) for v in value) if isinstance(value, list) else value
