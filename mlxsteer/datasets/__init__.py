"""Contrast sets that come with the package, and readers of other files.

Each set is one JSONL file, with a card in the `.md` file beside it.
Those under ``pocket/`` are made of the bundled model's own language; the others are for real models.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from mlxsteer.datasets.readers import read, read_texts, write
from mlxsteer.pairs import PairSet

__all__ = ["available", "card", "load", "neutral", "read", "read_texts", "write"]

_FOLDER = Path(__file__).parent


def available() -> list[str]:
    """The names of the contrast sets."""
    return sorted(path.relative_to(_FOLDER).with_suffix("").as_posix() for path in _FOLDER.rglob("*.jsonl"))


def card(name: str) -> str:
    """What a contrast set holds: the behaviour, how its pairs are matched, how many there are, and its limits.

    Raises:
        ValueError: there is no set of that name, or it has no card.
    """
    if name not in available():
        load(name)
    path = _FOLDER / f"{name}.md"
    if not path.is_file():
        raise ValueError(f"{name} has no card.")
    return path.read_text(encoding="utf-8")


def load(name: str, split: str | None = None) -> PairSet:
    """A contrast set by name.

    Args:
        name: one of `available()`.
        split: only the pairs of ``"train"``, ``"choose"`` or ``"report"``; None for all.

    Raises:
        ValueError: there is no set of that name, or no such split in it.
    """
    if name not in available():
        near = difflib.get_close_matches(name, available(), n=3) or available()
        raise ValueError(f"no contrast set called {name!r}. Nearest: {', '.join(near)}.")
    pairs = read(_FOLDER / f"{name}.jsonl", format="jsonl", name=name)
    chosen = [pair for pair in pairs if split in (None, pair.split)]
    if not chosen:
        raise ValueError(f"{name} has no split {split!r}; it has {sorted({p.split or 'none' for p in pairs})}.")
    return PairSet(chosen, name=name)


def neutral(model: Any = None) -> list[str]:
    """Prompts that have nothing to do with any behaviour, to measure side effects on.

    Args:
        model: the model that they are for: the bundled one knows only its own language; others get everyday English.
    """
    folder = _FOLDER / "pocket" if getattr(model, "name", None) == "pocket" else _FOLDER
    return (folder / "neutral.txt").read_text(encoding="utf-8").splitlines()
