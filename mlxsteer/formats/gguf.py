"""GGUF control vectors, as llama.cpp steers with them and repeng writes them.

``direction.N`` belongs to the output of block N, counted from 0 as everywhere in this package: it is our ``layers.N``,
with nothing added or taken away. At scale s (``--control-vector-scaled FILE:s``; 1 for ``--control-vector``) llama.cpp
computes x' = x + s·direction.N there, at every token of prompt and answer: ``vector.at(layers, strength=s)``. Several
files add up. Unless ``--control-vector-layer-range A B`` (both inclusive, same numbers) says otherwise, all blocks that
have a direction are steered. Read in their sources:

- llama.cpp (ggml-org/llama.cpp): `common_control_vector_load_one` in ``common/common.cpp`` lays ``direction.N`` at
  ``n_embd · (N − 1)``, `llama_adapter_cvec::apply` in ``src/llama-adapter.cpp`` gives block ``il`` what lies at
  ``n_embd · (il − 1)``, and the models' graphs add it to the sum behind the feed-forward, right before it is called
  ``l_out-il``: the two −1 cancel. Nothing is ever added at block 0, and ``direction.0`` makes the loader refuse the
  file, as does any other tensor, one that is not F32, or one with two dimensions. No key is read, so further keys are
  allowed; the loader lets several directions of one layer add up.
- repeng (vgel/repeng, ``repeng/extract.py``): the direction of layer N comes from ``hidden_states[N + 1]``, the output
  of block N, and is written as ``direction.N``. ``controlvector.layer_count`` is the number of directions, and
  ``controlvector.model_hint``, the model type, is required on import; other keys and tensors are skipped.

llama.cpp's own cvector-generator writes what it measured at the output of block N as ``direction.(N + 1)``: such a file
is read as llama.cpp steers with it. ``controlvector.layer_count`` means the model's layers for some writers and the
directions for others, and no reader looks at it; nor is it here.

The container (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) is little-endian: magic, version, counts, keys
with typed values, tensor infos, and, from a multiple of 32 on, the data, each tensor padded to a multiple of 32.
"""

from __future__ import annotations

import json
import math
import mmap
import re
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from mlxsteer.formats.own import LAYER, RESIDUAL, build, to_json
from mlxsteer.interventions.files import write_whole
from mlxsteer.vectors import FORMAT, VERSION, SteeringVector

ARCHITECTURE = "general.architecture"
CONTROL_VECTOR = "controlvector"
HINT = "controlvector.model_hint"
COUNT = "controlvector.layer_count"
ALIGNMENT = "general.alignment"
_UINT32, _STRING, _ARRAY = 4, 8, 9
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, _UINT32: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value of each type of fixed width."""
_FLOATS: dict[int, np.dtype[Any]] = {0: np.dtype("<f4"), 1: np.dtype("<f2"), 28: np.dtype("<f8")}
_UNKNOWN = "unknown"


# -- writing ---------------------------------------------------------------------------------------------------------


def write(vector: SteeringVector, path: str | Path) -> Path:
    """Write a control vector that llama.cpp and repeng load, whole or not at all.

    Its info and residual norms ride along as JSON under the key ``mlxsteer.vector``, which both programs skip.

    Args:
        vector: one direction for each layer, at the residual stream.
        path: a file name ending in ``.gguf``.

    Raises:
        ValueError: the vector belongs elsewhere than to the residual stream, has a direction for each position, or has
            none but at layer 0.

    Warns:
        UserWarning: the direction of layer 0 is left out: llama.cpp steers no block 0, and refuses such a file.
    """
    if vector.site != RESIDUAL:
        raise ValueError(
            f"{path}: a GGUF control vector steers the residual stream, {RESIDUAL!r}, and this vector belongs to "
            f"{vector.site!r}: save it as .safetensors."
        )
    if any(direction.ndim != 1 for direction in vector.directions.values()):
        raise ValueError(
            f"{path}: a GGUF control vector has one direction for each layer, and this vector one for each position: "
            "save it as .safetensors or .npz."
        )
    rows = {layer: np.array(direction, "<f4") for layer, direction in vector.directions.items() if layer > 0}
    if not rows:
        raise ValueError(f"{path}: a GGUF control vector holds layers from 1 on, and this vector has {vector.layers}.")
    if 0 in vector.directions:
        warnings.warn(
            f"{path}: the direction of layer 0 is left out, because llama.cpp steers no block 0 and refuses a file "
            "that has it.",
            UserWarning,
            stacklevel=4,  # whoever called SteeringVector.save
        )
    hint = str(vector.info.get("architecture") or _UNKNOWN)
    keys: list[tuple[str, str | int]] = [
        (ARCHITECTURE, CONTROL_VECTOR),
        (HINT, hint),
        (COUNT, len(rows)),
        (FORMAT, to_json(vector)),
    ]
    infos, data = b"", b""
    for layer, row in rows.items():
        infos += _string(f"direction.{layer}") + struct.pack("<IQIQ", 1, row.size, 0, len(data))
        data += _padded(row.tobytes())
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(rows), len(keys)) + b"".join(_key(*key) for key in keys) + infos
    return write_whole(path, lambda temporary: Path(temporary).write_bytes(_padded(head) + data))


def _string(text: str) -> bytes:
    encoded = text.encode("utf-8", "replace")
    return struct.pack("<Q", len(encoded)) + encoded


def _key(name: str, value: str | int) -> bytes:
    typed = (
        struct.pack("<II", _UINT32, value) if isinstance(value, int) else struct.pack("<I", _STRING) + _string(value)
    )
    return _string(name) + typed


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 32)


# -- reading ---------------------------------------------------------------------------------------------------------


def read(path: str | Path) -> SteeringVector:
    """Read a control vector of llama.cpp, repeng or ours.

    What llama.cpp takes is taken, and besides it ``direction.0``, which repeng may write, and float16 or float64.

    Raises:
        ValueError: the file is damaged, or holds something else.
    """
    try:
        with open(path, "rb") as file:
            if not file.read(1):
                raise ValueError("this is no GGUF file.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:  # it may be a whole model
                return _vector(_Cursor(data))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class _Cursor:
    """A place in the file, which moves on over what exists and refuses to go further."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, length: int) -> bytes:
        start = self.skip(length)
        return self.data[start : self.at]

    def skip(self, length: int) -> int:
        if length > len(self.data) - self.at:
            raise ValueError(f"the file ends early: it says {length} more bytes from {self.at} of {len(self.data)} on.")
        self.at += length
        return self.at - length

    def unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def string(self) -> str:
        return self.take(*self.unpack("<Q")).decode()

    def value(self, key: str) -> Any:
        """The value that follows a key: a text, an unsigned integer, or None for what no key of ours has."""
        (kind,) = self.unpack("<I")
        if kind == _STRING:
            return self.string()
        if kind == _UINT32:
            return self.unpack("<I")[0]
        inner, count = self.unpack("<IQ") if kind == _ARRAY else (kind, 1)
        if inner == _STRING:
            for _ in range(count):  # each is 8 bytes at least: a forged count soon meets the end of the file
                self.skip(*self.unpack("<Q"))
        elif inner in _WIDTHS:
            self.skip(count * _WIDTHS[inner])
        else:
            raise ValueError(f"its key {key!r} has a value of the unknown type {inner}.")
        return None


def _vector(file: _Cursor) -> SteeringVector:
    if len(file.data) < 4 or file.take(4) != b"GGUF":
        raise ValueError("this is no GGUF file.")
    (version,) = file.unpack("<I")
    if version not in (2, 3):
        kind = "big-endian" if version & 0xFFFF == 0 else f"of version {version}"
        raise ValueError(f"this GGUF file is {kind}; little-endian files of versions 2 and 3 are read.")
    tensors, count = file.unpack("<QQ")
    keys: dict[str, Any] = {}
    for _ in range(count):
        name = file.string()
        if name in keys:
            raise ValueError(f"the key {name!r} is in it twice.")
        keys[name] = file.value(name)
        if name == ARCHITECTURE and keys[name] != CONTROL_VECTOR:
            raise ValueError(f"it holds the architecture {keys[name]!r}, not a control vector.")
    directions = _directions(file, tensors, keys.get(ALIGNMENT, 32))
    hint = keys.get(HINT)
    data = {"site": RESIDUAL, "residual_norms": {}, "info": {"architecture": hint} if hint else {}}
    return build(directions, _ours(keys[FORMAT]) if FORMAT in keys else data)


def _ours(text: Any) -> Any:
    """What our own writer said of the vector."""
    try:
        data = json.loads(text)
        version, site = int(data["version"]), data["site"]
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"the value of its key {FORMAT!r} is damaged.") from error
    if version > VERSION:
        raise ValueError(f"it is of {FORMAT} version {version}; this mlxsteer reads up to {VERSION}.")
    if site != RESIDUAL:
        raise ValueError(f"its key {FORMAT!r} names the site {site!r}; a control vector belongs to {RESIDUAL!r}.")
    return data


def _directions(file: _Cursor, count: int, alignment: Any) -> dict[int, np.ndarray]:
    infos = []
    for _ in range(count):
        name, (axes,) = file.string(), file.unpack("<I")
        if axes > 4:
            raise ValueError(f"its tensor {name!r} has {axes} dimensions, and GGUF no more than 4.")
        infos.append((name, *_size(name, file.unpack(f"<{axes}Q")), *file.unpack("<IQ")))
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"its alignment is {alignment!r}, not a power of 2.")
    file.skip(-file.at % alignment)
    start = end = file.at
    directions: dict[int, np.ndarray] = {}
    for name, layer, size, kind, offset in infos:
        if kind not in _FLOATS:
            raise ValueError(f"its tensor {name!r} is of ggml type {kind}; directions are floats of 16, 32 or 64 bits.")
        end += -end % alignment
        if offset != end - start:
            raise ValueError(f"its tensor {name!r} lies at {offset}, not at {end - start} behind the one before.")
        if layer in directions:
            raise ValueError(f"its tensor {name!r} is in it twice.")
        file.at = end
        values = np.frombuffer(file.take(size * _FLOATS[kind].itemsize), _FLOATS[kind])
        with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite, and is refused as such
            directions[layer] = values.astype(np.float32)
        end = file.at
    return directions


def _size(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """The layer of a tensor and its length, which may be followed by dimensions of 1, as in llama.cpp."""
    found = re.fullmatch(rf"direction\.{LAYER}", name)
    if found is None or int(found[1]) < 0:
        raise ValueError(f"its tensor {name!r} is no direction.N, and a control vector has no other.")
    if math.prod(shape[1:]) != 1 or not shape:
        raise ValueError(f"its tensor {name!r} is of shape {shape}; a direction has one dimension.")
    return int(found[1]), shape[0]
