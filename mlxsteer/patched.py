"""What activation patching found: a grid over places and positions, as numbers, a table and a picture."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlxsteer.display import Displayed, Shown, furthest, heat
from mlxsteer.interventions.files import as_json
from mlxsteer.pairs import counted

Array = np.ndarray[Any, Any]

DIRECTIONS = ("denoise", "noise")
_COLUMNS, _ROWS = 12, 40
"""The most columns of a table, and rows and columns of a picture: of more, those where a patch does most."""


@dataclass(frozen=True, eq=False)
class Patching(Displayed):
    """What one run's activations do in another run, place by place and token by token.

    Attributes:
        patched: the metric under each patch, (pairs, places, positions), or (pairs, places, positions, heads) where the
            places are heads; NaN where there is no such head.
        clean: the metric of the clean prompts, (pairs,).
        corrupted: the metric of the corrupted prompts, (pairs,).
        sites: the keys of the places.
        positions: what is patched in each column: the index of a token, counted from the end (negative) where only that
            is the same in all pairs; ``"#0"``, ``"#1"``, ... where neither is; or the `at` whose tokens are patched
            together.
        tokens: the text of each column's token, ``"clean/corrupted"`` where it differs; empty where pairs differ in it.
        direction: ``"denoise"``, clean activations in the corrupted run, or ``"noise"``, the other way round.
        metric: what was measured.
        block_tokens: what it cost: tokens times blocks that ran.
        loop_block_tokens: what a loop, a forward of the whole prompt for each patch, would have cost.
        record: model, prompts and answers.
    """

    patched: Array
    clean: Array
    corrupted: Array
    sites: list[str]
    positions: list[int | str]
    tokens: list[str]
    direction: str = "denoise"
    metric: str = "logit_difference"
    block_tokens: int = 0
    loop_block_tokens: int = 0
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> Array:
        """The metric of the run that is patched, (pairs,)."""
        return self.corrupted if self.direction == "denoise" else self.clean

    @property
    def change(self) -> Array:
        """What the patch changes in the metric, mean over pairs: ``patched − base``, (places, positions[, heads])."""
        found: Array = self.patched.mean(axis=0) - self.base.mean()
        return found

    @property
    def recovery(self) -> Array:
        """``(patched − corrupted) / (clean − corrupted)`` of the means over pairs, (places, positions[, heads]).

        0 is the corrupted run and 1 the clean one, in both directions; it may lie outside. NaN where the two don't
        differ.
        """
        found: Array = _recovered(self.patched.mean(axis=0)[None], self.clean.mean()[None], self.corrupted.mean()[None])
        return found[0]

    @property
    def recoveries(self) -> Array:
        """The same of each pair, (pairs, places, positions[, heads]); NaN in pairs whose two runs don't differ."""
        return _recovered(self.patched, self.clean, self.corrupted)

    def _looked_at(self) -> tuple[Array, str, float]:
        """The grid that is looked at, what it is, and its value where a patch does nothing."""
        if np.isfinite(self.recovery).any():
            return self.recovery, "recovery", float(self.direction == "noise")
        return self.change, f"change of {self.metric}", 0.0

    def top(self, count: int = 10) -> list[tuple[Any, ...]]:
        """The patches that do most, in either direction, as (key, position, recovery), or (key, position, head,
        recovery); the change of the metric in its place where the two runs don't differ."""
        grid, _, rest = self._looked_at()
        order = np.argsort(-np.nan_to_num(np.abs(grid - rest), nan=-1), axis=None, kind="stable")
        cells = [tuple(map(int, np.unravel_index(i, grid.shape))) for i in order if np.isfinite(grid.flat[i])]
        return [(self.sites[c[0]], self.positions[c[1]], *c[2:], float(grid[c])) for c in cells[:count]]

    def __repr__(self) -> str:
        what = (
            f"heads in {counted(len(self.sites), 'layer')}"
            if self.patched.ndim == 4
            else counted(len(self.sites), "place")
        )
        most = f"; most: {', '.join(map(str, found[0][:-1]))} {found[0][-1]:+.2f}" if (found := self.top(1)) else ""
        return (
            f"Patching({self.direction}, {counted(len(self.clean), 'pair')}, {what} × "
            f"{counted(len(self.positions), 'position')}; {self.metric} clean {self.clean.mean():+.2f}, corrupted "
            f"{self.corrupted.mean():+.2f}{most})"
        )

    def axes(self, rows: int, columns: int) -> tuple[Array, list[str], list[str], tuple[str, str]]:
        """The grid on two axes, for a table or a picture: places down, and positions across; of heads at one position
        the heads across; of heads at several positions, heads down.

        Args:
            rows, columns: the most of each; of more, those where a patch does most, in their order.

        Returns:
            The grid, the labels of its rows and of its columns, and what these are, how many of how many included.
        """
        grid, _, rest = self._looked_at()
        layers = "*" in self._places()
        down = [key.split(".")[1] for key in self.sites] if layers else self.sites
        across = [f"{p} {token}".strip() for p, token in zip(self.positions, self.tokens, strict=True)]
        names = ("layer" if layers else "place", "position")
        if grid.ndim == 3 and len(across) == 1:
            grid, across, names = grid[:, 0], [str(head) for head in range(grid.shape[2])], ("layer", "head")
        elif grid.ndim == 3:
            down = [f"{one}.{head}" for one in down for head in range(grid.shape[2])]
            grid, names = grid.transpose(0, 2, 1).reshape(len(down), -1), ("layer.head", "position")
        kept = furthest(grid, rest, rows, columns)
        first, second = (
            name if len(some) == total else f"{name} ({len(some)} of {total})"
            for name, some, total in zip(names, kept, grid.shape, strict=True)
        )
        return grid[np.ix_(*kept)], [down[i] for i in kept[0]], [across[i] for i in kept[1]], (first, second)

    def table(self, columns: int = _COLUMNS) -> str:
        """The grid in plain text: places down, positions (or heads) across.

        Args:
            columns: the most positions; of more, those where a patch does most.
        """
        shown = self._shown(columns)
        return f"{shown.title}\n{replace(shown, title='').plain()}\n{shown.foot}"

    def _shown(self, columns: int = _COLUMNS) -> Shown:
        grid, down, across, names = self.axes(_ROWS, columns)
        share = f", {self.block_tokens / self.loop_block_tokens:.3f} of a loop's" if self.loop_block_tokens else ""
        return Shown(
            f"{self._title()}; by {names[0]} and {names[1]}",
            (names[0].split()[0], *(label.replace(" ", "\n") for label in across)),
            [(name, *("" if np.isnan(x) else _written(x) for x in row)) for name, row in zip(down, grid, strict=True)],
            heat=heat(grid, self._looked_at()[2]),
            foot=f"{self._ends()}; cost {self.block_tokens:,} block-tokens{share}",
        )

    def _title(self) -> str:
        at = f" at {self.positions[0]}" if len(self.positions) == 1 else ""
        return f"{self._places()}{at}: {self._looked_at()[1]}, {self.direction}; {counted(len(self.clean), 'pair')}"

    def _places(self) -> str:
        """The places in few words: a template where they differ in their layer alone."""
        parts = [key.split(".") for key in self.sites]
        if len(parts) > 1 and all(part[0] == "layers" and part[2:] == parts[0][2:] for part in parts):
            return ".".join(["layers", "*", *parts[0][2:]])
        return ", ".join(self.sites[:3]) + ", …" * (len(self.sites) > 3)

    def _ends(self) -> str:
        return f"{self.metric}: clean {self.clean.mean():+.3f}, corrupted {self.corrupted.mean():+.3f}"

    def to_json(self, path: str | Path | None = None) -> str:
        """Everything as JSON; with a path, also written there, whole or not at all."""
        data = {name: getattr(self, name).tolist() for name in _ARRAYS}
        return as_json(data | {name: getattr(self, name) for name in _OTHERS}, path)

    @classmethod
    def from_json(cls, path: str | Path) -> Patching:
        """Read what `to_json` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no patching.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            parts: dict[str, Any] = {name: np.array(data[name], np.float64) for name in _ARRAYS}
            made = cls(**parts, **{name: data[name] for name in _OTHERS})
            shape = (len(made.clean), len(made.sites), len(made.positions))
            if made.patched.shape[:3] != shape or made.patched.ndim not in (3, 4) or made.direction not in DIRECTIONS:
                raise ValueError(f"a grid of shape {made.patched.shape} for {shape}")
            if made.corrupted.shape != made.clean.shape or len(made.tokens) != shape[2]:
                raise ValueError("parts of different lengths")
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path} holds no patching ({error}).") from error
        return made

    def plot(self, path: str | Path | None = None) -> Any:
        """The grid as a heat map, layers upwards, with the tokens' texts; white where a patch does nothing.

        Args:
            path: also write it there, as PNG, PDF or SVG by suffix.

        Returns:
            A matplotlib figure.
        """
        from mlxsteer.plots import plot_grid

        grid, down, across, names = self.axes(_ROWS, _ROWS)
        _, unit, rest = self._looked_at()
        return plot_grid(grid, down, across, names, f"{self._title()}\n{self._ends()}", unit, path, rest=rest)


_ARRAYS = ("patched", "clean", "corrupted")
_OTHERS = ("sites", "positions", "tokens", "direction", "metric", "block_tokens", "loop_block_tokens", "record")


def _recovered(patched: Array, clean: Array, corrupted: Array) -> Array:
    """``(patched − corrupted) / (clean − corrupted)`` of each pair; NaN where rounding is all the difference."""
    apart = np.where(alike(clean, corrupted), np.nan, clean - corrupted)
    found: Array = ((patched.T - corrupted) / apart).T
    return found


def alike(clean: Array, corrupted: Array) -> Array:
    """Where two metrics differ by rounding at most."""
    found: Array = np.abs(clean - corrupted) <= 1e-5 * np.maximum(np.abs(clean), np.abs(corrupted))
    return found


def _written(value: float) -> str:
    return f"{value:+.2f}" if abs(value) >= 0.005 else "0"
