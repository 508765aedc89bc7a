"""Results as tables: one description of each, shown by rich in a terminal and as HTML in a notebook."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any, TypeAlias

import numpy as np
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from mlxsteer import coloured

Array = np.ndarray[Any, Any]
Cell: TypeAlias = "str | Sequence[tuple[str, str]]"
"""What a cell says; or pieces of it, each with what it says under the mouse."""


@dataclass(frozen=True, eq=False)
class Shown:
    """What a result looks like; all of it is text, and nothing in it markup.

    Attributes:
        title: above the table; may be empty.
        columns: their names.
        rows: of each row its cells.
        texts: numbers of the columns that hold words, aligned left; the others hold numbers, aligned right.
        heat: a background for each cell but those of the first column, (rows, columns − 1), from −1 (blue) to 1
            (orange); NaN for none.
        styles: number of a row → ``"bold"`` or ``"dim"``.
        foot: below the table; may be empty.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    texts: Collection[int] = ()
    heat: Array | None = None
    styles: Mapping[int, str] = field(default_factory=dict)
    foot: str = ""

    def _table(self, some: Sequence[int]) -> Table:
        """Columns, for a terminal."""
        made = Table()
        for j in some:
            words = j in self.texts
            made.add_column(
                Text(self.columns[j]),
                justify="left" if words else "right",
                overflow="fold" if words else "ellipsis",
                no_wrap=words and not j,  # names of rows are the last to be folded
            )
        for i, row in enumerate(self.rows):
            cells = (Text(_words(row[j]), coloured.terminal_style(self._heat(i, j))) for j in some)
            made.add_row(*cells, style=self.styles.get(i))
        return made

    def plain(self, width: int = 100, *, foot: bool = False) -> str:
        """The table in plain text, without colours, also where rich believes itself in a notebook."""
        return plain(self if foot else replace(self, foot=""), width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        if self.title:  # a line of its own: as the table's, it would be folded to a narrow table's width
            yield Text(self.title, "table.title")
        for some in self._blocks(options.max_width):
            yield self._table(some)
        if self.foot:
            yield Text(self.foot)

    def _blocks(self, width: int) -> list[list[int]]:
        """The columns, in as many tables below each other as a wide grid needs, each with the first column."""
        every = list(range(len(self.columns)))
        if self.heat is None:  # words are wrapped
            return [every]
        cells = zip(self.columns, *self.rows, strict=True)
        sizes = [3 + max(cell_len(line) for cell in one for line in _words(cell).split("\n")) for one in cells]
        blocks, left = [[0]], width - 1 - sizes[0]
        for j in every[1:]:
            if sizes[j] > left and len(blocks[-1]) > 1:
                blocks.append([0])
                left = width - 1 - sizes[0]
            blocks[-1].append(j)
            left -= sizes[j]
        return blocks

    def html(self) -> str:
        """The same as HTML that needs nothing beside it, readable on light and on dark."""
        sides = ["left" if j in self.texts else "right" for j in range(len(self.columns))]
        heads = "".join(
            f'<th scope="col" style="text-align:{side};white-space:pre-line">{escape(head)}</th>'
            for head, side in zip(self.columns, sides, strict=True)
        )
        rows = []
        for i, row in enumerate(self.rows):
            cells = []
            for j, cell in enumerate(row):
                tag, more = ("td", "") if j else ('th scope="row"', ";font-weight:inherit")
                style = f"text-align:{sides[j]};white-space:pre-wrap{more}{coloured.notebook_style(self._heat(i, j))}"
                cells.append(f'<{tag} style="{style}">{_as_html(cell)}</{tag[:2]}>')
            style = {"bold": "bold", "dim": "normal;opacity:0.6"}.get(self.styles.get(i, ""), "normal")
            rows.append(f'<tr style="font-weight:{style}">{"".join(cells)}</tr>')
        caption = f'<caption style="text-align:left">{escape(self.title)}</caption>' if self.title else ""
        foot = f'<div style="white-space:pre-wrap">{escape(self.foot)}</div>' if self.foot else ""
        table = f"<table>{caption}<thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        return f'<div style="overflow-x:auto">{table}{foot}</div>'

    def _heat(self, row: int, column: int) -> float:
        value = float("nan") if self.heat is None or not column else float(self.heat[row, column - 1])
        return 0.0 if np.isnan(value) else value


class Displayed:
    """An object that shows itself as a table, in a notebook, in IPython and to `rich.print`; its repr is one line."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # IPython would take a class's own __repr__ before what its bases say.
        cls._repr_pretty_ = cls._repr_pretty_  # type: ignore[method-assign]

    def _shown(self) -> Shown:
        raise NotImplementedError

    def __rich__(self) -> RenderableType:
        return self._shown()

    def _repr_html_(self) -> str:
        return self._shown().html()

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """IPython's plain text: a table; within a list or a dict, where there is no room for one, the repr."""
        within = cycle or len(getattr(printer, "stack", ())) > 1
        width = shutil.get_terminal_size((80, 24)).columns
        printer.text(repr(self) if within else plain(self.__rich__(), width))


def plain(what: RenderableType, width: int) -> str:
    """What rich shows, in plain text."""
    console = Console(width=width, no_color=True, force_terminal=False, force_jupyter=False)
    with console.capture() as capture:
        console.print(what)
    return capture.get().rstrip()


def written_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in plain text."""
    return Shown(title, heads, rows).plain()


def heat(grid: Array, rest: Any = 0.0) -> Array:
    """Backgrounds for a grid of numbers: 0 where they are `rest`, −1 or 1 where they are furthest from it."""
    with np.errstate(all="ignore"):
        away = np.asarray(grid, np.float64) - rest
        reach = np.abs(away[np.isfinite(away)]).max(initial=0.0)
        found: Array = np.clip(away / (reach or 1.0), -1, 1)
    return found


def furthest(grid: Array, rest: float, rows: int, columns: int) -> tuple[Array, Array]:
    """The rows and the columns of a grid that lie furthest from `rest`, so many at most, in their order."""
    size = np.nan_to_num(np.abs(grid - rest))
    first, second = (
        np.sort(np.argsort(-size.max(axis=1 - axis), kind="stable")[:most]) for axis, most in enumerate((rows, columns))
    )
    return first, second


def _words(cell: Cell) -> str:
    return cell if isinstance(cell, str) else "".join(piece for piece, _ in cell)


def _as_html(cell: Cell) -> str:
    """A cell as HTML; pieces of text have a faint background in turns, so that their ends can be seen."""
    if isinstance(cell, str):
        return escape(cell)
    shades = ("", ' style="background:rgba(128,128,128,0.2)"')
    return "".join(
        f'<span title="{escape(title)}"{shades[i % 2]}>{escape(piece)}</span>' for i, (piece, title) in enumerate(cell)
    )
