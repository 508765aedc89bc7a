"""Our own vector file: safetensors, one tensor ``layers.N`` for each layer, everything else as JSON in the metadata."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxsteer.interventions.files import read_tensors, write_whole
from mlxsteer.vectors import FORMAT, VERSION, SteeringVector

RESIDUAL = "layers.{layer}"
LAYER = "(0|-?[1-9][0-9]{0,8})"
"""A layer's number in a name: one spelling for each, so that two names can't mean the same layer."""


def to_json(vector: SteeringVector) -> str:
    """Everything of a vector but its directions.

    Raises:
        TypeError: its info holds what JSON can't.
    """
    for name, value in vector.info.items():
        try:
            json.dumps({name: value})
        except (TypeError, ValueError, RecursionError) as error:  # another type, a circle, a depth
            raise TypeError(
                f"info[{name!r}] is {type(value).__name__}, and a file holds what JSON holds: texts, numbers, truths, "
                f"lists and dicts of them ({error})."
            ) from error
    return json.dumps(
        {
            "version": VERSION,
            "site": vector.site,
            "residual_norms": {str(layer): norm for layer, norm in vector.residual_norms.items()},
            "info": dict(vector.info),
        }
    )


def build(directions: Mapping[int, Any], data: Any) -> SteeringVector:
    """A vector from its directions and what `to_json` said of it.

    Raises:
        ValueError: either is damaged.
    """
    try:
        norms = {int(layer): norm for layer, norm in data["residual_norms"].items()}
        return SteeringVector(directions, data["site"], norms, data["info"])
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(f"the vector in it is damaged ({str(error).rstrip('.')}).") from error


def write(vector: SteeringVector, path: str | Path) -> Path:
    """Write a vector as one safetensors file, whole or not at all."""
    tensors, text = {f"layers.{layer}": direction for layer, direction in vector.directions.items()}, to_json(vector)
    return write_whole(path, lambda temporary: mx.save_safetensors(temporary, tensors, {FORMAT: text}))


def read(path: str | Path) -> SteeringVector:
    """Read what `write` wrote; directions in float16 or bfloat16 become float32.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, foreign, or of a later version.
    """
    tensors, data = read_tensors(path, FORMAT, VERSION)
    size = Path(path).stat().st_size
    directions: dict[int, mx.array] = {}
    for name, value in tensors.items():
        found = re.fullmatch(rf"layers\.{LAYER}", name)
        # MLX compares lengths modulo 2⁶⁴: a forged shape gets through, and crashes the process once computed on.
        forged = min(value.shape, default=0) < 1 or math.prod(value.shape) * value.itemsize > size
        if found is None or forged:
            what = f"its tensor {name!r} is of shape {value.shape}" if forged else f"its tensor {name!r} is no layers.N"
            raise ValueError(f"{path}: the vector in it is damaged ({what}).")
        directions[int(found[1])] = value
    try:
        return build(directions, data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
