"""Progress of long work: a bar with the remaining time where somebody sees it, or the caller's own function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Step: TypeAlias = Callable[[int, int], None]
"""Called with what is done and what there is in all."""


@contextmanager
def reporting(progress: bool | Step | None, label: str) -> Iterator[Step]:
    """What to call after each step.

    Args:
        progress: True for a bar on a terminal (nothing elsewhere), False or None for nothing, or a function.
        label: what is being done.
    """
    if callable(progress):
        yield progress
        return
    console = Console(stderr=True)
    if not progress or not console.is_terminal:
        yield _nothing
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _nothing(done: int, total: int) -> None:
    pass
