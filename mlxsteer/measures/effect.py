"""How a vector steers: the dose–response of every prompt, and how many go the wrong way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxsteer.measures.uncertainty import Interval, bootstrap, paired_difference


@dataclass(frozen=True, eq=False)
class Steerability:
    """Dose–response of prompts.

    Attributes:
        slopes: effect per unit of strength by least squares, (prompts,).
        fits: R² of each line, (prompts,): 1 where the effect is a line in the strength.
        rank_correlations: Spearman's, of strength and effect, (prompts,): 1 where more strength is always more effect.
        anti_steerable: share of prompts with a slope below 0, which are steered against the vector.
        mean_slope: the mean of the slopes, with its interval over prompts.
        mean_curve: mean effect over prompts at each strength, (strengths,).
        strengths: (strengths,), in the order given.
        effect: the effect itself, (strengths, prompts).
    """

    slopes: np.ndarray[Any, Any]
    fits: np.ndarray[Any, Any]
    rank_correlations: np.ndarray[Any, Any]
    anti_steerable: float
    mean_slope: Interval
    mean_curve: np.ndarray[Any, Any]
    strengths: np.ndarray[Any, Any]
    effect: np.ndarray[Any, Any]

    def changes(self, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> list[Interval]:
        """For each strength the mean change from strength 0 with its interval over prompts, as `changes` gives it."""
        return changes(self.effect, self.strengths.tolist(), level=level, resamples=resamples, seed=seed)

    def __str__(self) -> str:
        return (
            f"slope {self.mean_slope}, R² {self.fits.mean():.2f}, rank correlation {self.rank_correlations.mean():+.2f}"
            f", {self.anti_steerable:.0%} of {len(self.slopes)} prompts anti-steerable"
        )


def steerability(
    effect: Any, strengths: Sequence[float], *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Steerability:
    """Slopes, fits and rank correlations of the effect in the strength, prompt by prompt.

    ``slope_p = Σ_s (s − s̄)(e_sp − ē_p) / Σ_s (s − s̄)²``: the steerability of Tan et al. 2024, arXiv 2407.12404, who
    find that a good mean hides prompts that are steered the other way. A prompt whose effect is the same at all
    strengths isn't steered at all: its slope, R² and rank correlation are 0, and it isn't anti-steerable.

    Args:
        effect: strengths × prompts; of a sweep, one layer: ``sweep.effect[i]``.
        strengths: those of the first axis: ``sweep.strengths``.
        level, resamples, seed: of the interval of the mean slope, as in `bootstrap`.

    Raises:
        ValueError: the shapes don't fit; fewer than 2 different strengths, or 2 prompts; a NaN or an infinity.
    """
    e, s = np.asarray(effect, np.float64), np.asarray(strengths, np.float64)
    if e.ndim != 2:
        raise ValueError(
            f"effect is strengths × prompts, such as sweep.effect[i] of one layer, not of shape {e.shape}."
        )
    if s.shape != e.shape[:1]:
        raise ValueError(
            f"the effect has {e.shape[0]} strengths on its first axis, and strengths is of shape {s.shape}."
        )
    if not np.isfinite(s).all():
        raise ValueError("strengths: a strength is a finite number.")
    if len(set(s.tolist())) < 2:
        raise ValueError("a slope needs 2 different strengths or more.")
    if bad := int((~np.isfinite(e)).any(axis=0).sum()):
        raise ValueError(f"effect: {bad} of {e.shape[1]} prompts have a NaN or an infinity; was the sweep interrupted?")
    flat = np.ptp(e, axis=0) == 0  # rounding in the mean must not give it a sign
    slopes, correlations = _line(s, e)
    _, rank_correlations = _line(_ranks(s[:, None])[:, 0], _ranks(e))
    slopes[flat] = correlations[flat] = rank_correlations[flat] = 0
    return Steerability(
        slopes,
        correlations**2,
        rank_correlations,
        float(np.mean(slopes < 0)),
        bootstrap(slopes, level=level, resamples=resamples, seed=seed),
        e.mean(axis=1),
        s,
        e,
    )


def changes(
    effect: Any, strengths: Sequence[float], *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> list[Interval]:
    """The mean change from strength 0 at each strength, with its interval over prompts.

    Prompt by prompt, by `paired_difference`: how much prompts differ from each other without steering widens nothing.
    Where strength 0 isn't among them, the mean itself with its interval.

    Args:
        effect: strengths × prompts.
        strengths: those of the first axis.
        level, resamples, seed: as in `bootstrap`.

    Raises:
        ValueError: the shapes don't fit, there are fewer than 2 prompts, or there is a NaN or an infinity.
    """
    e = np.asarray(effect, np.float64)
    given = list(strengths)
    if e.ndim != 2 or len(e) != len(given):
        raise ValueError(f"effect is strengths × prompts, and of shape {e.shape} for {len(given)} strengths.")
    base = e[given.index(0)] if 0 in given else np.zeros(e.shape[1])
    return [paired_difference(row, base, level=level, resamples=resamples, seed=seed) for row in e]


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation of two lists of numbers, ties averaged; NaN with fewer than two, or without spread.

    Raises:
        ValueError: they differ in length.
    """
    if len(a) != len(b):
        raise ValueError(f"a rank correlation is of two lists of one length, not of {len(a)} and {len(b)} numbers.")
    ranks = [_ranks(np.asarray(x, np.float64)[:, None])[:, 0] for x in (a, b)]
    if min((float(np.ptp(rank)) for rank in ranks if len(rank) > 1), default=0.0) == 0.0:
        return float("nan")
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _line(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Slope and correlation of every column of y, (n, columns), in x, (n,)."""
    x, y = x - x.mean(), y - y.mean(axis=0)
    along = x @ y
    lengths = np.sqrt(np.sum(x * x) * np.sum(y * y, axis=0))
    return along / np.sum(x * x), np.clip(along / np.where(lengths, lengths, 1), -1, 1)


def _ranks(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Ranks down each column, equal values with the mean of their ranks."""
    below = np.sum(x[None] < x[:, None], axis=1)
    equal = np.sum(x[None] == x[:, None], axis=1)
    ranks: np.ndarray[Any, Any] = below + (equal + 1) / 2
    return ranks
