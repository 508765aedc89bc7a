"""Contrast sets that come with the package, and readers of other files.

Each set is one JSONL file, with a card in the `.md` file beside it.
Those under ``pocket/`` are made of the bundled model's own language; the others are for real models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlxsteer.datasets.readers import read, read_texts, write
from mlxsteer.pairs import PairSet, hint, nearest

__all__ = ["available", "card", "load", "neutral", "read", "read_texts", "write"]

_FOLDER = Path(__file__).parent


def available() -> list[str]:
    """The names of the contrast sets."""
    return sorted(path.relative_to(_FOLDER).with_suffix("").as_posix() for path in _FOLDER.rglob("*.jsonl"))


def card(name: str) -> str:
    """What a contrast set holds: the behaviour, how its pairs are matched, how many there are, and its limits.

    Raises:
        TypeError: the name is no text.
        ValueError: there is no set of that name, or it has no card.
    """
    _check_name(name)
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
        TypeError: the name is no text.
        ValueError: there is no set of that name, or no such split in it.
    """
    _check_name(name)
    pairs = read(_FOLDER / f"{name}.jsonl", format="jsonl", name=name)
    chosen = [pair for pair in pairs if split in (None, pair.split)]
    if not chosen:
        there = sorted({pair.split or "none" for pair in pairs})
        raise ValueError(f"{name} has no split {split!r}; it has {there}.{hint(split, there)}")
    return PairSet(chosen, name=name)


def _check_name(name: Any) -> None:
    if not isinstance(name, str):
        raise TypeError(f"a contrast set is named by a text such as 'sentiment', not {name!r}.")
    if name not in available():
        raise ValueError(f"no contrast set called {name!r}. {nearest(name, available(), 'datasets.available()')}")


def neutral(model: Any = None) -> list[str]:
    """Prompts that have nothing to do with any behaviour, to measure side effects on.

    Args:
        model: the model that they are for: the bundled one knows only its own language; others get everyday English.
    """
    folder = _FOLDER / "pocket" if getattr(model, "name", None) == "pocket" else _FOLDER
    return (folder / "neutral.txt").read_text(encoding="utf-8").splitlines()
