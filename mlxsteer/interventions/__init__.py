"""Interventions: what is done to an activation, as small immutable objects, and the registry that knows them by name.

Every intervention is one pure call ``(x, where) -> x'`` with the shape and dtype of ``x``. Strength 0 is the
identity, bit for bit; strength 1 is the textbook form. ``a | b`` does a, then b.
"""

import difflib

from mlxsteer.interventions.base import Compose, Function, Intervention, compose
from mlxsteer.interventions.files import load, save
from mlxsteer.interventions.operators import (
    Ablate,
    AddSequence,
    AddVector,
    Clamp,
    MeanReplace,
    Noise,
    ReplaceWith,
    Scale,
    ZeroOut,
    ablate,
    add_sequence,
    add_vector,
    clamp,
    mean_replace,
    noise,
    replace_with,
    scale,
    zero_out,
)
from mlxsteer.interventions.registry import available, create, describe, register
from mlxsteer.positions import after


def __getattr__(name: str) -> object:
    near = difflib.get_close_matches(name, __all__, n=3)
    hint = f" Nearest: {', '.join(near)}." if near else ""
    raise AttributeError(f"mlxsteer.interventions has no {name!r}.{hint}")


__all__ = [
    "Ablate",
    "AddSequence",
    "AddVector",
    "Clamp",
    "Compose",
    "Function",
    "Intervention",
    "MeanReplace",
    "Noise",
    "ReplaceWith",
    "Scale",
    "ZeroOut",
    "ablate",
    "add_sequence",
    "add_vector",
    "after",
    "available",
    "clamp",
    "compose",
    "create",
    "describe",
    "load",
    "mean_replace",
    "noise",
    "register",
    "replace_with",
    "save",
    "scale",
    "zero_out",
]
