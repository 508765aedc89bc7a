"""The command line `mlxsteer`, whose errors are one sentence."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console

from mlxsteer.cli.chat import chat
from mlxsteer.cli.contents import inspect
from mlxsteer.cli.contrast_sets import datasets
from mlxsteer.cli.demo import demo
from mlxsteer.cli.generate import generate
from mlxsteer.cli.screen import hush, of_output, sentence
from mlxsteer.cli.take_away import bake, export
from mlxsteer.cli.workflow import evaluate, extract, select, sweep

app = typer.Typer(
    name="mlxsteer",
    help="Read, steer and measure language models on MLX.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _help(text: str | None) -> str:
    """A docstring with one line for each paragraph: the terminal's width breaks them."""
    return "\n\n".join(" ".join(part.split()) for part in (text or "").split("\n\n"))


for command in (demo, datasets, extract, sweep, select, evaluate, generate, chat, bake, export, inspect):
    app.command(help=_help(command.__doc__))(command)


def _version(asked: bool) -> None:
    if asked:
        from mlxsteer import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Read, steer and measure language models on MLX."""


@contextmanager
def _ended_politely() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # no other one is told of signals
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> None:
    """Run the command line; an error is one sentence and exit code 1, Ctrl-C is exit code 130.

    A polite kill (SIGTERM) ends it like an exit from within: what is half written is cleaned up.
    """
    hush()
    try:
        with _ended_politely():
            app()
    except KeyboardInterrupt:
        Console(stderr=True).print("[bold]stopped[/]: nothing was left behind.")
        sys.exit(130)
    except (ValueError, KeyError, TypeError, OSError, RuntimeError) as error:
        if "--debug" in sys.argv[1:]:
            raise
        said = sentence(error)
        if isinstance(error, OSError) and of_output(error):
            said = f"can't write the output: {error.strerror}."
        Console(stderr=True).print(f"error: {said}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)
