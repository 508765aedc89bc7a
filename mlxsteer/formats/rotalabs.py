"""Vectors of rotalabs-steer: ``NAME.json`` and ``NAME.pt`` for one layer, a folder of them for several.

Such a folder holds ``layer_N.json`` and ``layer_N.pt`` for each layer that ``metadata.json`` lists. ``layer_index`` N
is block N, whose output is read and written, so it is our ``layers.N``. Source: rotalabs/rotalabs-steer,
``src/rotalabs_steer/core/vectors.py``, ``hooks.py`` and ``injection.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mlxsteer.formats.torch_tensor import read_tensor
from mlxsteer.vectors import SteeringVector

SET = "metadata.json"


def read(path: str | Path) -> SteeringVector:
    """Read one layer's vector, given either of its two files.

    Raises:
        FileNotFoundError: the other file is missing.
        ValueError: one of them is damaged, or holds something else.
    """
    source = Path(path)
    layer, direction, info = _layer(source)
    return _vector(source, {layer: direction}, info)


def read_set(folder: str | Path) -> SteeringVector:
    """Read the vectors of a set, one for each layer.

    Raises:
        FileNotFoundError: a file of the set is missing.
        ValueError: one is damaged, holds something else, or belongs to another behaviour or layer.
    """
    source = Path(folder) / SET
    told = _json(source)
    layers = told.get("layers")
    if not isinstance(layers, list) or not layers or any(type(n) is not int for n in layers):
        raise ValueError(f"{source}: it lists no layers, as the set of rotalabs-steer that it would be.")
    directions: dict[int, np.ndarray] = {}
    kept: dict[str, Any] = {}
    for layer in layers:
        part = Path(folder) / f"layer_{layer}.json"
        own, directions[layer], info = _layer(part)
        kept = kept or info
        if own != layer or info["behavior"] != told.get("behavior") or info["model"] != kept["model"]:
            raise ValueError(f"{part}: it is of layer {own}, {info['behavior']!r}, {info['model']!r}: not of this set.")
    return _vector(source, directions, {name: value for name, value in kept.items() if name != "metadata"})


def _vector(source: Path, directions: dict[int, np.ndarray], info: dict[str, Any]) -> SteeringVector:
    try:
        return SteeringVector(directions, info=info)  # type: ignore[arg-type]  # arrays become MLX's
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _layer(path: Path) -> tuple[int, np.ndarray, dict[str, Any]]:
    text, tensor = path.with_suffix(".json"), path.with_suffix(".pt")
    told = _json(text) if text.is_file() else {}
    if isinstance(told.get("pairs"), list):
        raise ValueError(f"{text} is no vector's file; datasets.read reads contrast pairs.")
    for file in (text, tensor):
        if not file.is_file():
            raise FileNotFoundError(
                f"there is no file {file}: rotalabs-steer keeps a vector in two, {text.name} and {tensor.name}."
            )
    layer, behaviour, model = told.get("layer_index"), told.get("behavior"), told.get("model_name")
    if type(layer) is not int or layer < 0 or not isinstance(behaviour, str) or not isinstance(model, str):
        raise ValueError(f"{text}: it says no layer_index, behavior and model_name, as a rotalabs-steer vector does.")
    direction = read_tensor(tensor)
    if told.get("vector_shape", list(direction.shape)) != list(direction.shape):
        raise ValueError(f"{tensor}: it is of shape {direction.shape}, and {text.name} says otherwise.")
    if direction.size != direction.shape[-1]:  # (1, D) is added to every token by them, as (D,) is
        raise ValueError(f"{tensor}: it is of shape {direction.shape}, and a vector (D,).")
    info = {"model": model, "method": told.get("extraction_method", "caa"), "behavior": behaviour}
    return layer, direction.reshape(-1), info | ({"metadata": told["metadata"]} if told.get("metadata") else {})


def _json(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no complete JSON file.") from error
    if not isinstance(told, dict):
        raise ValueError(f"{path}: it says nothing of a vector; datasets.read reads contrast pairs.")
    return told
