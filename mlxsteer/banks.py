"""One addition for a whole batch, in place of one for every row that adds a vector of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlxsteer.interventions.base import Intervention, Where
from mlxsteer.interventions.operators import AddVector
from mlxsteer.plans import Edit
from mlxsteer.positions import Position
from mlxsteer.sites import Site
from mlxsteer.steering import Row


@dataclass(eq=False)
class Bank:
    """Add each row's own vector to it: the bits are those of adding them one after the other.

    Attributes:
        vectors: what each row adds and how strongly; None for rows that nothing is added to.
    """

    vectors: list[tuple[AddVector, float] | None]
    _stacked: dict[tuple[mx.Dtype, int], mx.array] = field(default_factory=dict)

    def __call__(self, x: mx.array, where: Where) -> mx.array:
        touched = where.tokens.touched_each(self._positions)
        if touched is False:
            return x
        Intervention._check_tokens(x, (len(where.tokens), where.tokens.width), where)
        y = x + self._added(x, where)
        if touched is True:
            return y
        return mx.where(touched.reshape(*touched.shape, *(1,) * (x.ndim - 2)), y, x)

    def __post_init__(self) -> None:
        self.members = {id(one[0]) for one in self.vectors if one is not None}
        self._positions: tuple[Position | None, ...] = tuple(
            one[0].at if one is not None and one[1] else None for one in self.vectors
        )

    def _added(self, x: mx.array, where: Where) -> mx.array:
        """(rows, 1, ..., D) in the activation's dtype."""
        stacked = self._stacked.get((x.dtype, x.ndim))
        if stacked is None:
            for one in self.vectors:
                if one is not None:
                    one[0].check(x.shape[-1], where.key)
            rows = [
                mx.zeros(x.shape[-1:], x.dtype) if one is None else (one[1] * one[0].vector).astype(x.dtype)
                for one in self.vectors
            ]
            stacked = mx.stack(rows).reshape(len(rows), *(1,) * (x.ndim - 2), x.shape[-1])
            self._stacked[x.dtype, x.ndim] = stacked
        return stacked


def banked(edits: Sequence[Edit], rows: Sequence[Row]) -> list[tuple[Site, Intervention | Bank, Any]]:
    """The edits of one place, in order, with neighbours that add vectors to different rows made one.

    Args:
        edits: what is done there.
        rows: the rows of this batch, with what steers them.
    """
    made: list[tuple[Site, Intervention | Bank, Any]] = []
    run: list[Edit] = []
    taken: set[int] = set()
    for edit in edits:
        own = _rows(edit, rows)
        if own is None or (run and (run[0][0] is not edit[0] and run[0][0] != edit[0])) or taken & own:
            made += _closed(run, rows)
            run, taken = [], set()
        if own is None:
            made.append(edit)
        elif own:
            run.append(edit)
            taken |= own
    return made + _closed(run, rows)


def _rows(edit: Edit, rows: Sequence[Row]) -> set[int] | None:
    """The rows that an edit adds a vector to; None where it is something else than such an addition."""
    _, intervention, steering = edit
    if type(intervention) is not AddVector or steering is None:
        return None
    plain = intervention.schedule is None and intervention.exclude is None and not intervention.preserve_norm
    if not plain or intervention.vector.ndim != 1 or not isinstance(intervention.strength, float):
        return None
    return {i for i, row in enumerate(rows) if any(s is steering for s in row.steerings or ())}


def _closed(run: list[Edit], rows: Sequence[Row]) -> list[tuple[Site, Intervention | Bank, Any]]:
    if len(run) < 2:
        return list(run)
    vectors: list[tuple[AddVector, float] | None] = [None] * len(rows)
    for edit in run:
        _, intervention, steering = edit
        assert isinstance(intervention, AddVector)
        assert steering is not None
        for row in _rows(edit, rows) or ():
            vectors[row] = intervention, intervention.strength * steering.strength
    return [(run[0][0], Bank(vectors), None)]
