"""The sides of contrast pairs in the two directions of largest spread, layer by layer: a picture without labels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from mlxsteer.contrast import Contrast, places
from mlxsteer.extraction import batches_of, read_the_same, said_of
from mlxsteer.model import InterpretableModel
from mlxsteer.pairs import ContrastPair, PairSet, check_switch, checked, counted
from mlxsteer.reading import (
    Read,
    Reader,
    bos_of,
    check_budget,
    check_completions,
    check_finite,
    check_model,
    check_read,
    encode_pairs,
    reading,
)

Array: TypeAlias = "npt.NDArray[Any]"


@dataclass(frozen=True, eq=False)
class PairComponents:
    """Contrast pairs on their first two principal components, by layer.

    Attributes:
        points: layer → where each side of each pair lies, (2, pairs, 2), positives first. The first component points
            from the negatives' mean to the positives'.
        explained: layer → the share of the variance that each of the two takes up.
        cosine: layer → how far the first component is the mean difference: the cosine between them, 0 to 1; NaN where
            the sides have one mean.
        record: model, place, read and data.
    """

    points: dict[int, Array]
    explained: dict[int, tuple[float, float]]
    cosine: dict[int, float]
    record: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        first = next(iter(self.points.values()))
        return f"PairComponents({counted(first.shape[1], 'pair')} at {counted(len(self.points), 'layer')})"

    def plot(self, path: str | Path | None = None) -> Any:
        """Both sides of the pairs in a panel for each layer, at most twelve of them; a matplotlib figure.

        Args:
            path: also write it there, as PNG, PDF or SVG by suffix.
        """
        from mlxsteer.plots import plot_pairs

        return plot_pairs(self, path)


def pair_components(
    model: InterpretableModel,
    pairs: Iterable[ContrastPair],
    *,
    layers: Any = "all",
    site: str = "residual",
    read: Read = "last",
    chat: bool = False,
    batch_tokens: int = 4096,
) -> PairComponents:
    """Where the sides of contrast pairs lie in the two directions of largest spread, layer by layer.

    With H the activations of all sides, (2·pairs, D), less their mean, and ``H = U·S·Vᵀ``, a side lies at the first two
    entries of ``U·S``. No label is used: where the sides fall apart along the first component, the behaviour is the
    main difference between the texts, and its cosine with the mean difference is near 1. Give held-out pairs, and more
    than a few: with fewer texts than features something always spreads. Marks & Tegmark 2023, The Geometry of Truth,
    arXiv 2310.06824, draw such pictures.

    Args:
        model: the model.
        pairs: contrast pairs; all of them are used.
        layers: ``"all"``, a layer, or several.
        site: ``"residual"``, ``"attn"``, ``"mlp"``, or a key with ``{layer}`` in it.
        read, chat, batch_tokens: as in `extract`.

    Raises:
        TypeError: no model, no contrast pairs.
        ValueError: fewer than two pairs; no such layers; nothing to read, or both sides of every pair read the same;
            activations are NaN.
        UnknownKey: the model has no such site.
    """
    check_model(model)
    check_read(read)
    check_switch("chat", chat)
    check_budget(batch_tokens)
    template, numbers, sites = places(model, site, layers)
    given = checked(pairs)
    if len(given) < 2:
        raise ValueError("components need two pairs at least, and there is one.")
    check_completions(read, given, given)
    texts = [text for side in zip(*encode_pairs(model, given, given, chat), strict=True) for text in side]
    n = len(given)
    sides = Contrast(texts, n, [(i, i + n) for i in range(n)])
    bos = bos_of(model)
    weights = [reading(read, text, bos) for text in texts]
    if read_the_same(sides, weights):
        raise ValueError(
            f"both sides of every pair read the same: read={said_of(read)!r} lies in what they share; read='last' lies "
            "behind it."
        )
    reader, parts = Reader(model, sites), {}
    for batch in batches_of(sides, weights, batch_tokens):
        taken = np.array(reader(texts, weights, batch)[0])
        parts.update({number: taken[:, i] for i, number in enumerate(batch.texts)})
    rows = np.stack([parts[number] for number in range(2 * n)], axis=1).astype(np.float64)
    check_finite(sites, [np.isfinite(one).all() for one in rows])
    points: dict[int, Array] = {}
    explained: dict[int, tuple[float, float]] = {}
    cosine: dict[int, float] = {}
    for layer, one in zip(numbers, rows, strict=True):
        points[layer], explained[layer], cosine[layer] = _components(one, n)
    record = {
        "model": model.identity, "site": template, "read": said_of(read), "pairs": n, "chat": chat,
        "data": PairSet(given).fingerprint,
    }  # fmt: skip
    return PairComponents(points, explained, cosine, record)


def _components(rows: Array, n: int) -> tuple[Array, tuple[float, float], float]:
    """Points, shares of the variance and the cosine of one layer, from (2·n, D), positives first."""
    centred = rows - rows.mean(axis=0)
    _, spread, lines = np.linalg.svd(centred, full_matrices=False)
    difference = rows[:n].mean(axis=0) - rows[n:].mean(axis=0)
    length = float(np.linalg.norm(difference))
    along = float(lines[0] @ difference) / length if length else float("nan")
    lines[0] *= -1.0 if along < 0 else 1.0
    shares = np.square(spread[:2]) / max(float(np.square(spread).sum()), 1e-300)
    return (centred @ lines[:2].T).reshape(2, n, 2), (float(shares[0]), float(shares[1])), abs(along)
