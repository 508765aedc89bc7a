"""What commands say: texts as they stand, errors and warnings as sentences, progress with the time that remains."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

_SIGNS = {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"} | dict.fromkeys(range(127, 160), "�")


def literal(text: str, style: str = "") -> Text:
    """A text as it stands: no markup, and control characters as signs, so that no model commands the terminal."""
    return Text(text.translate(_SIGNS), style=style)


def sentence(error: Exception) -> str:
    """What an error says, on one line."""
    said = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    return " ".join(said.split()) or type(error).__name__


@contextmanager
def remarks(aside: Console) -> Iterator[None]:
    """Say warnings as sentences, once each."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        finally:
            for said in dict.fromkeys(" ".join(str(warning.message).split()) for warning in heard):
                aside.print(literal(f"note: {said}", "yellow"), soft_wrap=True)


@contextmanager
def bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar with remaining time, on the error stream; none where that is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
