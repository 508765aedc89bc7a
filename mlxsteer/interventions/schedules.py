"""Schedules: how an intervention's strength changes while a text is generated.

A schedule is a factor on the strength that depends on n, the number of generated tokens that the model has read when it
sees a token: 0 at every prompt token, the last one included (it chooses the first generated token), 1 at the first
generated token, and so on. Positions are known on the host, so the factors are too: nothing waits for an array. A token
whose factor is 0 keeps every bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mlxsteer.interventions.base import number
from mlxsteer.positions import handle


@dataclass(frozen=True)
class Schedule:
    """A factor on the strength for every n; each is computed once."""

    _known: dict[int, float] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __call__(self, n: int) -> float:
        """The factor at a token, when the model has read n generated ones."""
        found = self._known.get(n)
        if found is None:
            found = self._known[n] = number(self.factor(n), f"schedule={self}: the factor at n={n}")
        return found

    def factor(self, n: int) -> float:
        """The factor, computed."""
        raise NotImplementedError

    @staticmethod
    def of(value: Any) -> Schedule | None:
        """Read a `schedule=`.

        Raises:
            TypeError: it is none of the accepted forms.
        """
        if value is None or isinstance(value, Schedule):
            return value
        if isinstance(value, type) and issubclass(value, Schedule):
            raise TypeError(f"schedule={value.__name__} is a kind of schedule: call it, {value.__name__}(...).")
        if callable(value) and not isinstance(value, type):
            return Called(value)
        raise TypeError(
            f"schedule={value!r} is no schedule: say decay(half_life), ramp(tokens), window(start, stop), or a "
            "function from the number of generated tokens read to a factor."
        )


@dataclass(frozen=True)
class decay(Schedule):  # noqa: N801 - reads as a word: schedule=decay(20)
    """Halve the strength every so many generated tokens: ``f(n) = 2^(−n/h)``.

    Args:
        half_life: h, in tokens.
    """

    half_life: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "half_life", number(self.half_life, "decay: the half-life"))
        if self.half_life <= 0:
            raise ValueError(f"decay: the half-life is a number of tokens above 0, not {self.half_life:g}.")

    def factor(self, n: int) -> float:
        return float(2.0 ** (-n / self.half_life))


@dataclass(frozen=True)
class ramp(Schedule):  # noqa: N801
    """Come in over the first generated tokens: ``f(n) = min(1, (n + 1)/k)``.

    Args:
        tokens: k; the prompt gets 1/k, and full strength acts from n = k − 1 on.
    """

    tokens: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", _count(self.tokens, "ramp: the number of tokens", 1))

    def factor(self, n: int) -> float:
        return min(1.0, (n + 1) / self.tokens)


@dataclass(frozen=True)
class window(Schedule):  # noqa: N801
    """Act for a while only: ``f(n) = 1 for start ≤ n < stop``, else 0.

    Args:
        start: 0 begins with the prompt, 1 with the first generated token.
        stop: where it ends, None for never.
    """

    start: int
    stop: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", _count(self.start, "window: start", 0))
        if self.stop is not None:
            object.__setattr__(self, "stop", _count(self.stop, "window: stop", 0))
            if self.stop <= self.start:
                raise ValueError(f"window: start {self.start} and stop {self.stop} leave no token between them.")

    def factor(self, n: int) -> float:
        return float(n >= self.start and (self.stop is None or n < self.stop))


@dataclass(frozen=True)
class Called(Schedule):
    """A plain function from n to a factor. It can't be saved."""

    function: Callable[[int], float]

    def __hash__(self) -> int:
        return hash(handle(self.function))

    def factor(self, n: int) -> float:
        return self.function(n)


def _count(value: Any, what: str, least: int) -> int:
    found = number(value, what)
    if not found.is_integer() or found < least:
        raise ValueError(f"{what} is a whole number from {least} on, not {value!r}.")
    return int(found)


SAVED: dict[str, type[Schedule]] = {"decay": decay, "ramp": ramp, "window": window}
"""The schedules that can be data, by name."""
