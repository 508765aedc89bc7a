"""One tensor from a ``.pt`` file of PyTorch, without PyTorch and without unpickling.

``torch.save`` writes a zip file: ``data.pkl`` says by a pickle how the tensor is put together, ``data/0`` holds its
numbers. A pickle is a program, and Python's reader runs whatever it names; here the few instructions that a tensor
takes are followed by hand, and the few names it uses are compared, never looked up.

Source: ``torch/serialization.py`` and ``torch/_utils.py`` of pytorch/pytorch.
"""

from __future__ import annotations

import math
import pickletools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxsteer.formats.archive import members

_DTYPES = {
    "torch FloatStorage": "<f4",
    "torch DoubleStorage": "<f8",
    "torch HalfStorage": "<f2",
    "torch BFloat16Storage": "<u2",  # the upper half of a float32
}
_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
_HOOKS = "collections OrderedDict"
_LONGEST = 1 << 16
"""Bytes of a pickle: that of a tensor has some 400."""
_ALLOWED = {*_DTYPES, _TENSOR, _PARAMETER, _HOOKS}


@dataclass(frozen=True)
class _Name:
    """A global that the pickle names; never looked up."""

    text: str


class _Mark:
    """Where a tuple on the stack begins."""


def read_tensor(path: str | Path) -> np.ndarray:
    """The tensor in a ``.pt`` file, in float32.

    Raises:
        ValueError: the file holds anything but one tensor of floats, or is of the old kind, a bare pickle.
    """
    with open(path, "rb") as file:
        start = file.read(2)
    if start != b"PK":
        kind = (
            "a bare pickle, as before PyTorch 1.6, which is not opened" if start[:1] == b"\x80" else "no PyTorch file"
        )
        raise ValueError(f"{path} is {kind}: it takes the zip file that torch.save writes.")
    contents = members(path)
    try:
        roots = [name.removesuffix("data.pkl") for name in contents if name.split("/")[-1] == "data.pkl"]
        if len(roots) != 1:
            raise ValueError("it is a zip file, but none of PyTorch's.")
        if contents.get(f"{roots[0]}byteorder", b"little") != b"little":
            raise ValueError("its numbers are big-endian, which is not read.")
        return _Program(contents, roots[0]).run()
    except (LookupError, TypeError, AttributeError, OverflowError) as error:  # a program that a tensor doesn't take
        raise ValueError(f"{path}: it holds something else than a tensor, or a damaged one.") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class _Program:
    """The instructions of a pickle that a saved tensor takes."""

    def __init__(self, contents: dict[str, bytes], root: str) -> None:
        self.contents, self.root = contents, root
        self.stack: list[Any] = []
        self.made: set[str] = set()
        self.memo: dict[int, Any] = {}

    def run(self) -> np.ndarray:
        program = self.contents[f"{self.root}data.pkl"]
        if len(program) > _LONGEST:
            raise ValueError(f"it holds something else than a tensor: its pickle has {len(program)} bytes.")
        for code, argument, _ in pickletools.genops(program):
            self.step(code.name, argument)
        if len(self.stack) != 1 or not isinstance(self.stack[0], np.ndarray):
            raise ValueError("it holds something else than a tensor.")
        return self.stack[0]

    def step(self, code: str, argument: Any) -> None:
        stack = self.stack
        match code:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "NEWTRUE" | "NEWFALSE" | "NONE":
                stack.append({"NEWTRUE": True, "NEWFALSE": False, "NONE": None}[code])
            case "MARK":
                stack.append(_Mark())
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self.tuple(len(stack) - int(code[-1]))
            case "TUPLE":
                mark = [i for i, value in enumerate(stack) if isinstance(value, _Mark)][-1]
                self.tuple(mark + 1)
                del stack[mark]
            case "GLOBAL":
                stack.append(self.name(argument))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(self.name(module + " " + name))
            case "BINPERSID":
                stack.append(self.storage(*stack.pop()))
            case "REDUCE":
                arguments, called = stack.pop(), stack.pop()
                stack.append(self.call(called.text, arguments))
            case _:
                raise ValueError(f"it holds something else than a tensor: its pickle says {code}.")

    def tuple(self, start: int) -> None:
        if start < 0:
            raise IndexError(start)
        self.stack[start:] = [tuple(self.stack[start:])]

    def name(self, text: str) -> _Name:
        if text not in _ALLOWED:
            raise ValueError(f"it names {'.'.join(text.split(' '))[:80]!r}, which no tensor takes: it is not opened.")
        return _Name(text)

    def once(self, what: str) -> None:
        """A tensor is one storage, rebuilt once; a pickle that does either again would take any time and memory."""
        if what in self.made:
            raise ValueError(f"it holds something else than a tensor: its pickle makes a second {what}.")
        self.made.add(what)

    def call(self, name: str, arguments: Any) -> Any:
        if name == _TENSOR:
            self.once("tensor")
            return _tensor(*arguments[:4])
        if name == _PARAMETER:
            return arguments[0]
        if name == _HOOKS and type(arguments) is tuple and not arguments:
            return None
        raise TypeError(name)

    def storage(self, kind: Any, dtype: Any, key: Any, _location: Any, count: Any) -> np.ndarray:
        self.once("storage")
        data = self.contents[f"{self.root}data/{key}"] if isinstance(key, str) else b""
        values = np.frombuffer(data, _DTYPES[dtype.text])
        if not isinstance(kind, str) or kind != "storage" or _whole(count) != len(values):
            raise ValueError(f"its numbers are {len(values)}, and it says otherwise.")
        if dtype.text == "torch BFloat16Storage":
            return (values.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite, and is refused as such
            return values.astype(np.float32)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> np.ndarray:
    """The part of a storage that a tensor is: ``x[i, j] = storage[offset + i·strides[0] + j·strides[1]]``."""
    shape, strides = [_whole(n) for n in shape], [_whole(n) for n in strides]
    if not isinstance(storage, np.ndarray) or len(shape) != len(strides) or not 0 < len(shape) < 3:
        raise ValueError("its tensor is neither a vector nor a matrix.")
    last = _whole(offset) + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if min(shape) < 1 or last >= len(storage) or math.prod(shape) > len(storage):
        raise ValueError(f"its tensor says that it is of shape {tuple(shape)}, and there are {len(storage)} numbers.")
    steps = [step * storage.itemsize for step in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps).copy()


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError("a length is no number")
    return value
