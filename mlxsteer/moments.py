"""What an extraction keeps of the rows that it reads: sums on the device, so that memory stays flat."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from mlxsteer.contrast import Contrast
from mlxsteer.directions import Readings
from mlxsteer.reading import Batch

HALVES = 8
"""Random halvings of the pairs, for the split-half reliability."""

NORMS = 100_000
"""Tokens whose norms are kept, about: beyond twice as many, the median is that of every second, fourth, … token."""


class Moments:
    """What is kept of the rows read, on the device: sums, sums over random halves, rows where they are asked for."""

    def __init__(self, contrast: Contrast, *, rows: bool, seed: int) -> None:
        self.contrast = contrast
        n = contrast.positives
        self.counts = np.array([n, len(contrast.texts) - n])
        rng = np.random.default_rng(seed)
        own = np.stack([rng.permutation(n) < n // 2 for _ in range(HALVES)])
        if contrast.partners is None:
            other = np.stack([rng.permutation(self.counts[1]) < self.counts[1] // 2 for _ in range(HALVES)])
        else:
            other = own
        self.half = np.concatenate([own, other], axis=1).astype(np.float32)  # (halvings, texts)
        self.rows: np.ndarray[Any, Any] | None = None
        self.keep_rows = rows
        self.sums: list[mx.array] = []
        self.norms: list[np.ndarray[Any, Any]] = []
        self.stride = 1

    def add(self, batch: Batch, taken: mx.array, norms: mx.array | None) -> None:
        """Take in the rows of a batch, (places, rows, D)."""
        numbers = np.array(batch.texts)
        positive = numbers < self.contrast.positives
        sides = mx.array(np.stack([positive, ~positive]).astype(np.float32))
        halves = mx.array(np.concatenate([self.half[:, numbers] * positive, self.half[:, numbers] * ~positive]))
        parts = [sides @ taken, halves @ taken]  # (places, 2, D), (places, 2·halvings, D)
        if self.contrast.partners is not None:  # pairs come whole, all positives first
            count = len(numbers) // 2
            apart = taken[:, :count] - taken[:, count:]
            unit = apart / mx.maximum(mx.sqrt(mx.sum(apart * apart, axis=-1, keepdims=True)), 1e-30)
            parts += [mx.sum(apart, axis=1), mx.sum(unit, axis=1), mx.sum(unit * unit, axis=(1, 2))]
        self.sums = [a + b for a, b in zip(self.sums, parts, strict=True)] if self.sums else parts
        mx.eval(self.sums, taken, [] if norms is None else norms)
        if norms is not None:
            self.norms.append(np.array(norms)[:, :: self.stride])
            if sum(part.shape[1] for part in self.norms) > 2 * NORMS:
                self.norms = [np.ascontiguousarray(np.concatenate(self.norms, axis=1)[:, ::2])]
                self.stride *= 2
        if self.keep_rows:
            if self.rows is None:
                self.rows = np.zeros((len(self.contrast.texts), taken.shape[0], taken.shape[2]), np.float32)
            self.rows[numbers] = np.array(taken).transpose(1, 0, 2)

    def finite(self) -> np.ndarray[Any, Any]:
        """Whether all that was taken in is finite, (places,)."""
        sound: np.ndarray[Any, Any] = np.isfinite(self._sum(0)).all(axis=(1, 2))
        for part in self.norms:
            sound = sound & np.isfinite(part).all(axis=1)
        return sound

    def _sum(self, index: int) -> np.ndarray[Any, Any]:
        return np.array(self.sums[index], np.float64)

    def readings(self, background: np.ndarray[Any, Any] | None, seed: int) -> Readings:
        """The sums as means."""
        n = self.contrast.positives
        means = (self._sum(0) / np.maximum(self.counts, 1)[:, None]).transpose(1, 0, 2)
        if background is not None and not self.counts[1]:
            means[1] = background  # it stands in for the side that there isn't
        matched = self.contrast.partners is not None
        difference = self._sum(2) / n if matched else means[0] - means[1]
        if self.rows is None:
            return Readings(difference, means, background=background, matched=matched, seed=seed)
        rows = self.rows.astype(np.float64)
        return Readings(difference, means, rows[:n], rows[n:], background, matched, seed)

    def agreement(self) -> np.ndarray[Any, Any] | None:
        """Mean cosine between the differences of two pairs, (places,); None without pairs, or with one.

        A difference of length 0 has cosine 0 with every other.
        """
        n = self.contrast.positives
        if self.contrast.partners is None or n < 2:
            return None
        squares = np.sum(self._sum(3) ** 2, axis=-1)
        agreement: np.ndarray[Any, Any] = (squares - self._sum(4)) / (n * (n - 1))
        return agreement

    def reliability(self) -> np.ndarray[Any, Any] | None:
        """Mean cosine between the vectors of two random halves, (places,); None with fewer than two texts a side."""
        if self.counts.min() < 2:
            return None
        whole, half = self._sum(0), self._sum(1)
        some = self.half[:, : self.contrast.positives].sum(1), self.half[:, self.contrast.positives :].sum(1)
        found = []
        for k in range(HALVES):
            here = half[:, k] / some[0][k] - half[:, HALVES + k] / some[1][k]
            there = (whole[:, 0] - half[:, k]) / (self.counts[0] - some[0][k]) - (whole[:, 1] - half[:, HALVES + k]) / (
                self.counts[1] - some[1][k]
            )
            lengths = np.linalg.norm(here, axis=-1) * np.linalg.norm(there, axis=-1)
            found.append(np.sum(here * there, axis=-1) / np.maximum(lengths, 1e-30))
        mean: np.ndarray[Any, Any] = np.mean(found, axis=0)
        return mean

    def median_norms(self) -> np.ndarray[Any, Any]:
        """(places,)"""
        median: np.ndarray[Any, Any] = np.median(np.concatenate(self.norms, axis=1), axis=1)
        return median
