"""Copies of a filled prompt cache: what many rows have in common runs once, and each goes on from a copy."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

# Caches whose every array has the batch in front, so that a filled one can be copied for further rows.
_KNOWN = {"KVCache", "RotatingKVCache", "ArraysCache", "MambaCache", "CacheList"}


def forkable(cache: Sequence[Any]) -> bool:
    """Whether every entry of a prompt cache is of a kind that can be copied for further rows."""
    return all(type(e).__name__ in _KNOWN and forkable(getattr(e, "caches", None) or ()) for e in cache)


def forked(cache: Sequence[Any], rows: int, copies: int) -> list[Any]:
    """A prompt cache for `copies` times its rows, one whole copy after the other; the given one stays as it is.

    Args:
        cache: a prompt cache of `rows` rows, see `forkable`.
        rows: the rows in it.
        copies: how many of each; 1 for a cache that may be filled further without touching the given one.
    """
    return [_copied(entry, rows, copies) for entry in cache]


def _copied(entry: Any, rows: int, copies: int) -> Any:
    def tiled(value: Any) -> Any:
        if isinstance(value, mx.array):
            # With one copy an object of its own, since caches write in place.
            several = copies > 1 and value.ndim and value.shape[0] == rows
            return mx.concatenate([value] * copies) if several else value.reshape(value.shape)
        if isinstance(value, (list, tuple)):
            return type(value)(map(tiled, value))
        return _copied(value, rows, copies) if type(value).__name__ in _KNOWN else value

    made = copy.copy(entry)
    for name, value in vars(entry).items():
        setattr(made, name, tiled(value))
    return made
