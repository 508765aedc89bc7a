"""Contrast sets and sets of word pairs that come with the package, and readers of other files.

Each set is one JSONL file, with a card in the `.md` file beside it.
Those under ``pocket/`` are made of the bundled model's own language; the others are for real models.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from mlxsteer.datasets.readers import read, read_texts, write
from mlxsteer.pairs import SPLITS, PairSet, hint, nearest
from mlxsteer.pocket.grammar import load_tasks

__all__ = ["available", "card", "load", "neutral", "read", "read_texts", "word_sets", "words", "write"]

_FOLDER = Path(__file__).parent
_WORDS = "words"


def available() -> list[str]:
    """The names of the contrast sets."""
    paths = (path.relative_to(_FOLDER) for path in _FOLDER.rglob("*.jsonl"))
    return sorted(path.with_suffix("").as_posix() for path in paths if path.parts[0] != _WORDS)


def card(name: str) -> str:
    """What a set holds: the behaviour or task, how its pairs are matched, how many there are, and its limits.

    Args:
        name: one of `available()`, or one of `word_sets()` behind ``"words/"``.

    Raises:
        TypeError: the name is no text.
        ValueError: there is no set of that name, or it has no card.
    """
    if isinstance(name, str) and name.startswith(f"{_WORDS}/"):
        own = name.removeprefix(f"{_WORDS}/")
        _check_words(own)
        name = "pocket/tasks" if own.startswith("pocket/") else name
    else:
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


def word_sets() -> list[str]:
    """The names of the sets of word pairs; those under ``pocket/`` are tasks of the bundled model."""
    own = [path.stem for path in (_FOLDER / _WORDS).glob("*.jsonl")]
    return sorted([*own, *(f"pocket/{task}" for task in load_tasks())])


def words(name: str, split: str | None = None) -> list[tuple[str, str]]:
    """A set of word pairs by name, for prompts that show examples of a task (`mlxsteer.in_context`).

    Args:
        name: one of `word_sets()`.
        split: only the pairs of ``"train"``, ``"choose"`` or ``"report"``; None for all.

    Returns:
        (input, output) pairs; no input is there twice.

    Raises:
        TypeError: the name is no text.
        ValueError: there is no set of that name, or no such split.
    """
    _check_words(name)
    if split is not None and split not in SPLITS:
        raise ValueError(f"a split is one of {', '.join(SPLITS)}, not {split!r}.{hint(split, SPLITS)}")
    if name.startswith("pocket/"):
        return _pocket_words(name.removeprefix("pocket/"), split)
    rows = map(json.loads, (_FOLDER / _WORDS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())
    return [(row["input"], row["output"]) for row in rows if split in (None, row["split"])]


def _pocket_words(task: str, split: str | None) -> list[tuple[str, str]]:
    """The pairs of one of the bundled model's tasks, in the splits that its training measured with."""
    answers = load_tasks()[task]
    inputs = list(answers)
    if split is not None:
        random.Random(task).shuffle(inputs)
        first, second = len(inputs) * 2 // 3, len(inputs) * 5 // 6
        inputs = {"train": inputs[:first], "choose": inputs[first:second], "report": inputs[second:]}[split]
    return [(word, answers[word]) for word in inputs]


def _check_words(name: Any) -> None:
    if not isinstance(name, str):
        raise TypeError(f"a set of word pairs is named by a text such as 'antonym', not {name!r}.")
    if name not in word_sets():
        raise ValueError(f"no set of word pairs called {name!r}. {nearest(name, word_sets(), 'datasets.word_sets()')}")


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
