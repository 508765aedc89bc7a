"""What commands say: texts as they stand, errors and warnings as sentences, progress with the time that remains."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

_SIGNS = {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"} | dict.fromkeys(range(127, 160), "�")


def literal(text: str, style: str = "") -> Text:
    """A text as it stands: no markup, and control characters as signs, so that no model commands the terminal."""
    return Text(text.translate(_SIGNS), style=style)


_OPTION = re.compile(r"\b(at|chat|layers|method|nulls|read|seed|strength|temp|top_p|unit)=(?:'([^' ]*)'|([-\w.:]*\w))?")
_SHELL = {
    "With at='all' it can.": "mlxsteer select --at all makes one that can be; so does a vector with --at all.",
    "ms.bake": "mlxsteer bake",
    "ms.export_adapter": "mlxsteer export",
    "overwrite=True": "--overwrite",
    "datasets.available()": "mlxsteer datasets",
    "datasets.read reads contrast pairs": "--pairs takes files of contrast pairs",
    "SteeringVector.load reads it": "--steer and --vector take it",
    "`with_splits` makes splits.": 'Each line of a file may say "split": "train", "choose" or "report".',
}
"""What is said to who writes Python, in the words of a shell."""


def in_shell_words(text: str) -> str:
    """A message of the package with commands and options in place of functions and arguments."""
    for python, shell in _SHELL.items():
        text = text.replace(python, shell)
    return _OPTION.sub(lambda m: f"--{m[1].replace('_', '-')} {m[2] or m[3] or ''}".rstrip(), text)


def sentence(error: Exception) -> str:
    """What an error says, on one line."""
    said = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    return in_shell_words(" ".join(said.split())) or type(error).__name__


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file that can't be written, where the system's error names none, or one that is written on the way."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # a sentence already
            raise
        raise OSError(f"can't write {path}: {error.strerror}.") from error


def of_output(error: OSError) -> bool:
    """Whether it is the standard output that can't be written; Python is then kept from saying so once more."""
    full = error.filename is None and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO)
    if full:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return full


@contextmanager
def remarks(aside: Console, at_once: bool = False) -> Iterator[None]:
    """Say warnings as sentences, once each: when they come, or at the end, where they don't break into a bar."""
    heard: dict[str, None] = {}

    def hear(message: Warning | str, *_: Any, **__: Any) -> None:
        said = in_shell_words(" ".join(str(message).split()))
        if at_once and said not in heard:
            aside.print(literal(f"note: {said}", "yellow"), soft_wrap=True)
        heard[said] = None

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = hear
        try:
            yield
        finally:
            for said in () if at_once else heard:
                aside.print(literal(f"note: {said}", "yellow"), soft_wrap=True)


def hush() -> None:
    """Keep other packages' logs off the screen: what they warn of, a prompt's length and the network, is said here."""
    for name in ("transformers.tokenization_utils_base", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar with remaining time, on the error stream; none where that is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
