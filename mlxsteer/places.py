"""Places as attributes: ``model.layers[5].mlp.output``.

Inside a trace, ``output`` and ``input`` are the real arrays of that forward. Inside ``model.edit()`` there is no
forward to show, so they record what is written in place, to be done in every forward of the edited model.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlxsteer.interventions.base import Intervention, Where, tensor
from mlxsteer.sites import SiteMap
from mlxsteer.trace import LostWrite, check_index, innermost


class Place:
    """A module of a model, by its key; its sub-modules are attributes."""

    def __init__(self, sites: SiteMap, key: str) -> None:
        self._sites, self._key = sites, key

    @property
    def output(self) -> Any:
        """What the module gives, in the open trace; in an edit block, a record of what is written to it."""
        return _value(self._sites, self._key)

    @output.setter
    def output(self, value: Any) -> None:
        _assign(self._sites, self._key, value)

    @property
    def input(self) -> Any:
        """What enters the module, likewise."""
        return _value(self._sites, f"{self._key}.input")

    @input.setter
    def input(self, value: Any) -> None:
        _assign(self._sites, f"{self._key}.input", value)

    @property
    def heads(self) -> Any:
        """The input of an attention's output projection, (batch, tokens, heads, head_dim)."""
        return _value(self._sites, f"{self._key}.heads")

    @heads.setter
    def heads(self, value: Any) -> None:
        _assign(self._sites, f"{self._key}.heads", value)

    @property
    def module(self) -> nn.Module:
        """The module itself."""
        return self._sites.resolve(self._key).module

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        key = f"{self._key}.{name}"
        if name in ("attn", "mlp") or any(k == key or k.startswith(key + ".") for k in self._sites.modules):
            return Place(self._sites, key)
        module = self.module
        if hasattr(module, name):
            return getattr(module, name)
        near = difflib.get_close_matches(name, self.__dir__(), n=3) or self._parts()[:3]
        raise AttributeError(f"{self._key} has no part called {name!r}. Nearest: {', '.join(near) or 'none'}.")

    def __getitem__(self, index: int) -> Place:
        return Place(self._sites, f"{self._key}.{index}")

    def _parts(self) -> list[str]:
        """The names of the sub-modules, role names of a block among them."""
        begin = self._key + "."
        names = [key[len(begin) :].split(".")[0] for key in self._sites.modules if key.startswith(begin)]
        return list(dict.fromkeys([*(["attn", "mlp"] if self._key.count(".") == 1 else []), *names]))

    def __dir__(self) -> list[str]:
        return ["output", "input", "heads", "module", *self._parts()]

    def __repr__(self) -> str:
        return f"<{self._key}>"


class Places:
    """The blocks of a model: ``len(model.layers)``, ``model.layers[5]``."""

    def __init__(self, sites: SiteMap) -> None:
        self._sites = sites

    def __len__(self) -> int:
        self._sites._follow()
        return len(self._sites.blocks)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return Place(self._sites, self._sites.resolve(f"layers.{int(index)}").key)

    def __iter__(self) -> Iterator[Place]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"<{len(self)} layers>"


def _value(sites: SiteMap, key: str) -> Any:
    site = sites.resolve(key)
    for writing in reversed(_writing.get()):
        if writing.sites is sites:
            return Record(writing, site.key)
    trace = innermost(sites)
    if trace is None:
        raise RuntimeError(
            f"{key} has a value only while a forward is traced: use it inside `with model.trace(prompt):` (or, to edit "
            "every forward, inside `with model.edit() as edited:`, on `edited`)."
        )
    return trace.read(site)


def _assign(sites: SiteMap, key: str, value: Any) -> None:
    current = _value(sites, key)
    if value is not current and not isinstance(value, Record):
        current[...] = value


# -- writes that hold for every forward ------------------------------------------------------------------------------

_OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda x, v: x + v,
    "sub": lambda x, v: x - v,
    "mul": lambda x, v: x * v,
    "truediv": lambda x, v: x / v,
    "set": lambda x, v: mx.broadcast_to(mx.array(v), x.shape),
}


@dataclass(frozen=True, eq=False, repr=False)
class Write(Intervention):
    """A write in place, ``x[:, at, channels] (op)= value``, as an intervention.

    Args:
        operation: ``"add"``, ``"sub"``, ``"mul"``, ``"truediv"`` or ``"set"``.
        value: a number or an array that broadcasts to the part written to.
        channels: index behind the token axis.
        strength: as for every intervention.
    """

    operation: str
    value: Any
    channels: tuple[Any, ...] = ()
    strength: Any = 1.0
    name: ClassVar[str] = "write"
    saveable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.value, mx.array):
            self._set(value=tensor(self.value, "the value written"))
        super().__post_init__()

    def check(self, width: int, key: str) -> None:
        """The value needs to fit the part written to, which the write itself finds out."""

    def formula(self, x: mx.array, strength: float | mx.array, where: Where) -> mx.array:
        index = (slice(None), slice(None), *self.channels)
        check_index(index, x.shape, where.key)
        part = x[index]
        value = self.value.astype(x.dtype) if isinstance(self.value, mx.array) else self.value
        new = _OPERATIONS[self.operation](part, value).astype(x.dtype)
        y = mx.array(x)
        y[index] = new if isinstance(strength, float) and strength == 1.0 else part + strength * (new - part)
        return y


class Writing:
    """An edit block that is open: the writes recorded so far, by key."""

    def __init__(self, sites: SiteMap) -> None:
        self.sites = sites
        self.writes: dict[str, list[Write]] = {}
        self.pending: list[Record] = []  # slices that were written to and not put back yet

    def __enter__(self) -> Writing:
        _writing.set((*_writing.get(), self))
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        _writing.set(tuple(w for w in _writing.get() if w is not self))
        if error is None and self.pending:
            key = self.pending[0]._key
            raise LostWrite(f"a slice of {key} was written to and never put back: write output[:, -1] += v in one go.")


_writing: ContextVar[tuple[Writing, ...]] = ContextVar("mlxsteer_writing", default=())


class Record:
    """What stands for an activation in an edit block: it takes writes in place, and nothing else."""

    def __init__(self, writing: Writing, key: str, whole: bool = True) -> None:
        self._writing, self._key, self._whole = writing, key, whole
        self._done: list[tuple[str, Any]] = []

    def __getitem__(self, index: Any) -> Record:
        if not self._whole:
            raise LostWrite("write with one index: output[:, -1, :8] += v instead of output[:, -1][:8] += v.")
        return Record(self._writing, self._key, whole=False)

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(value, Record):
            self._writing.pending = [r for r in self._writing.pending if r is not value]
            for operation, operand in value._done:
                self._commit(index, operation, operand)
        else:
            self._commit(index, "set", value)

    def _commit(self, index: Any, operation: str, value: Any) -> None:
        at, channels = _split(index)
        write = Write(operation, value, channels, at=at)
        self._writing.writes.setdefault(self._key, []).append(write)

    def _in_place(self, operation: str, value: Any) -> Record:
        if isinstance(value, Record):
            value._refuse()
        if self._whole:
            self._commit(..., operation, value)
        else:
            self._done.append((operation, value))
            self._writing.pending = [*(r for r in self._writing.pending if r is not self), self]
        return self

    def __iadd__(self, value: Any) -> Record:  # type: ignore[misc]
        return self._in_place("add", value)

    def __isub__(self, value: Any) -> Record:  # type: ignore[misc]
        return self._in_place("sub", value)

    def __imul__(self, value: Any) -> Record:  # type: ignore[misc]
        return self._in_place("mul", value)

    def __itruediv__(self, value: Any) -> Record:  # type: ignore[misc]
        return self._in_place("truediv", value)

    def _refuse(self, *_: Any) -> Any:
        raise TypeError(
            f"in an edit block {self._key} has no value to compute with; it takes +=, -=, *=, /= and assignment. For "
            f"an edit that depends on the activation, give a function: model.edit({{'{self._key}': lambda x: ...}})."
        )

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse
    __matmul__ = __rmatmul__ = __neg__ = __pow__ = __iter__ = __len__ = __array__ = __float__ = _refuse
    __bool__ = __eq__ = __lt__ = __gt__ = __le__ = __ge__ = _refuse  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]

    @property
    def shape(self) -> Any:
        """An edit block has no forward, and so no shapes."""
        return self._refuse()


def _split(index: Any) -> tuple[Any, tuple[Any, ...]]:
    """From an index (batch, token, channels…) to a position and the channels."""
    parts = index if isinstance(index, tuple) else (index,)
    if parts and parts[0] is Ellipsis:
        if len(parts) > 2:
            raise IndexError("an edit is written output[:, token, channel].")
        return "all", ((..., parts[1]) if len(parts) == 2 else ())
    if parts and parts[0] != slice(None):
        raise IndexError("an edit holds for every row of every batch: write output[:, token, channel].")
    token = parts[1] if len(parts) > 1 else slice(None)
    if token == slice(None) or token is Ellipsis:
        at: Any = "all"
    else:
        at = "last" if token == -1 else token  # the newest token: the prompt's last, then each generated one
    channels = tuple(p for p in parts[2:])
    if any(isinstance(c, (int,)) for c in channels):
        channels = tuple(slice(c, c + 1 or None) if isinstance(c, int) else c for c in channels)  # keep the axes
    return at, channels
