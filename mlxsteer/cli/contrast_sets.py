"""`mlxsteer datasets`: the contrast sets there are, what one holds, and whether a file's pairs are good."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from mlxsteer import datasets as sets
from mlxsteer.cli.options import Json, pairs_of, said
from mlxsteer.cli.screen import in_shell_words, literal
from mlxsteer.pairs import PairSet, counted


def datasets(
    name: Annotated[
        str | None, typer.Argument(help="A contrast set, or a file of pairs; all sets unless told.")
    ] = None,
    check: Annotated[bool, typer.Option(help="Say whether these are good contrast pairs.")] = False,
    show: Annotated[int, typer.Option(min=0, help="How many pairs to print.")] = 3,
    as_json: Json = False,
) -> None:
    """List the contrast sets, or look into one."""
    if name is None:
        if check:
            raise ValueError("--check: name a set or a file.")
        _all(as_json)
        return
    data = pairs_of(name, "" if name in sets.available() else "pocket")
    report = data.check() if check else None
    shown = [{key: value for key, value in asdict(pair).items() if value} for pair in data[:show]]
    if as_json:
        found = {"findings": [asdict(one) for one in report.findings]} if report is not None else {}
        said({"name": data.name, **_counts(data), "shown": shown, **found})
        return
    screen = Console()
    if data.name in sets.available() and report is None:
        screen.print(Markdown(sets.card(data.name)), width=min(80, screen.width))
        if (own := f"pocket/{data.name}") in sets.available():
            told = f"\n--model pocket has a set of its own by this name: mlxsteer datasets {own}\n"
            screen.print(literal(told), soft_wrap=True)
    else:
        screen.print(literal(f"{data.name}: {counted(len(data), 'pair')}"))
    for pair in shown:
        screen.print(literal("\n".join(f"{key}: {value}" for key, value in pair.items()) + "\n"), soft_wrap=True)
    if report is not None:
        screen.print(literal(in_shell_words(str(report))))


def _counts(data: PairSet) -> dict[str, object]:
    return {"pairs": len(data), "splits": {name or "none": len(data.split(name)) for name in data.splits if name}}


def _all(as_json: bool) -> None:
    loaded = [sets.load(name) for name in sets.available()]
    if as_json:
        said([{"name": name, **_counts(data)} for name, data in zip(sets.available(), loaded, strict=True)])
        return
    table = Table(title="Contrast sets: mlxsteer datasets NAME shows one")
    table.add_column("name", no_wrap=True)
    table.add_column("pairs", justify="right")
    table.add_column("an example's two sides", no_wrap=True)
    for name, data in zip(sets.available(), loaded, strict=True):
        first = data[0]
        sides = " / ".join(_short(side) for side in (first.positive, first.negative))
        table.add_row(literal(name), str(len(data)), literal(sides))
    Console().print(table)


def _short(text: str, width: int = 19) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"
