"""Interventions on some attention heads."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlxsteer.interventions.base import Intervention, Where, as_intervention
from mlxsteer.interventions.gates import gates
from mlxsteer.interventions.registry import register
from mlxsteer.positions import Position


def head_numbers(given: Any, what: str) -> tuple[int, ...]:
    """Numbers of heads, each once, from 0 on.

    Raises:
        TypeError: they are no whole numbers.
        ValueError: there are none, one is negative, or one is there twice.
    """
    listed = list(given) if isinstance(given, (list, tuple, range, np.ndarray)) else [given]
    try:
        numbers = tuple(operator.index(number) for number in listed)
    except TypeError:
        raise TypeError(f"{what}: heads are whole numbers such as [3, 7], not {given!r}.") from None
    if any(isinstance(number, bool) for number in listed):
        raise TypeError(f"{what}: heads are whole numbers such as [3, 7], not {given!r}.")
    if not numbers:
        raise ValueError(f"{what}: there are no heads: give at least one, such as [3, 7].")
    if min(numbers) < 0:
        raise ValueError(f"{what}: heads count from 0, and {min(numbers)} is none.")
    if len(set(numbers)) < len(numbers):
        twice = next(number for number in numbers if numbers.count(number) > 1)
        raise ValueError(f"{what}: head {twice} is there twice.")
    return numbers


@register("heads")
@dataclass(frozen=True, eq=False, repr=False)
class Heads(Intervention):
    """Act on some attention heads: ``x'_j = f(x)_j`` for each head j listed, ``x'_j = x_j`` bit for bit elsewhere.

    For the place ``layers.5.attn.heads``, the input of an attention's output projection as (batch, tokens, heads,
    head_dim). What is done inside sees the listed heads only, (batch, tokens, k, head_dim), in the order listed: its
    constants are (head_dim,) for all of them, or (k, head_dim) for each its own. Li et al. 2023, Inference-time
    intervention, arXiv 2306.03341; Todd et al. 2023, Function vectors, arXiv 2310.15213.

    Args:
        heads: the numbers of the heads, from 0 on; one number for one head.
        then: what is done to them: an intervention, or a list of them, with their own strengths and positions.
        strength: a multiplier on theirs.
    """

    heads: Any
    then: Any
    strength: Any = 1.0

    def __post_init__(self) -> None:
        self._set(heads=head_numbers(self.heads, "heads"), then=as_intervention(self.then))
        super().__post_init__()
        if any(True for _ in gates(self.then)):
            raise ValueError(
                "heads: a gate reads whole activations: put the heads into it, when(condition, heads(...))."
            )
        if any(True for _ in heads_in(self.then)):
            raise ValueError("heads: there are heads inside these heads already: list them once.")
        if self.at != Position.of("all") or self.schedule is not None or self.exclude is not None:
            raise ValueError("heads act where and when what is inside says: give at=, schedule= and exclude= to that.")
        if not isinstance(self.strength, float):
            raise ValueError("the strength of heads is one number, which multiplies that of what is inside.")

    @property
    def steps(self) -> tuple[Intervention, ...]:
        """What is inside, for who walks through interventions."""
        return (self.then,)

    def __call__(self, x: mx.array, where: Where) -> mx.array:
        self.check_heads(x.shape[2] if x.ndim == 4 else None, where.key)
        index = mx.array(self.heads)
        part = x[:, :, index]
        y = self.then(part, replace(where, strength=where.strength * self.strength))
        if y is part:
            return x
        whole = mx.array(x)
        whole[:, :, index] = y
        return whole

    def check_heads(self, count: int | None, key: str) -> None:
        """Refuse a place without heads, and a head that it doesn't have.

        Args:
            count: how many heads there are; None where the place is no ``attn.heads``.
            key: the place.

        Raises:
            ValueError: with the place, and what there is.
        """
        if count is None:
            raise ValueError(f"heads at {key}: there are no heads here; the place is layers.<number>.attn.heads.")
        if max(self.heads) >= count:
            raise ValueError(f"heads at {key}: there are {count} heads, 0 to {count - 1}, and no {max(self.heads)}.")

    def check(self, width: int, key: str) -> None:
        self.then.check(width, key)

    def bound(self, encode: Callable[[str], list[int]] | None) -> Intervention:
        then = self.then.bound(encode)
        return self if then is self.then else replace(self, then=then)

    def parts(self) -> tuple[Intervention, ...]:
        return tuple(self.then.parts())

    def row(self, index: int) -> Intervention:
        then = self.then.row(index)
        return self if then is self.then else replace(self, then=then)


def heads_in(intervention: Intervention) -> Iterator[Heads]:
    """What acts on single heads in an intervention, gates included."""
    if isinstance(intervention, Heads):
        yield intervention
    then = getattr(intervention, "then", None)
    for step in (then,) if isinstance(then, Intervention) else getattr(intervention, "steps", ()):
        yield from heads_in(step)


heads = Heads
