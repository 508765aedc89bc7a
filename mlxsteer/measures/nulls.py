"""What chance does: vectors and labels that mean nothing, and p-values against them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlxsteer.interventions.base import number
from mlxsteer.measures.uncertainty import generator
from mlxsteer.pairs import SPLITS, ContrastPair, PairSet, checked
from mlxsteer.vectors import SteeringVector

_OF_THE_MODEL = ("model", "architecture", "quantization", "hidden_size", "layers")


def random_like(vector: SteeringVector, *, seed: int) -> SteeringVector:
    """A matched-norm random vector: ``‖v_l‖ g/‖g‖`` with g ~ N(0, I), drawn for each layer l on its own.

    What a vector does beyond such ones is due to its direction, and not to how far it pushes. One draw is an anecdote:
    take 20 or more, and `null_p_value`.

    Args:
        vector: whose layers, site, lengths and residual norms the random one has; each position's length, where it has
            a direction per position.
        seed: the same seed gives the same vector, and a layer the same line whichever others there are.

    Returns:
        A vector that says ``"random"`` for its method, and what the given one says of its model; nothing of its data.

    Raises:
        TypeError, ValueError: no vector, or no seed.
    """

    def draw(rng: np.random.Generator, v: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return rng.standard_normal(v.shape)

    return _drawn(vector, seed, "random", draw)


def orthogonal_complement(vector: SteeringVector, *, seed: int) -> SteeringVector:
    """A random vector at right angles to the given one in every layer, as long as it.

    ``‖v_l‖ u/‖u‖`` with ``u = g − ⟨g, v̂_l⟩ v̂_l``, g ~ N(0, I): the null without the little of v that a random direction
    has in it by chance, about ``1/√D`` of its length.

    Args:
        vector, seed: as in `random_like`.

    Returns:
        A vector that says ``"orthogonal"`` for its method, otherwise as of `random_like`.

    Raises:
        TypeError, ValueError: no vector, or no seed; a width of 1, where nothing is orthogonal.
    """
    if isinstance(vector, SteeringVector) and vector.width < 2:
        raise ValueError("a vector of width 1 has nothing orthogonal to it.")

    def draw(rng: np.random.Generator, v: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        drawn = rng.standard_normal(v.shape)
        unit = v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-300)
        for _ in range(2):  # once more, for what rounding left of it
            drawn = drawn - np.sum(drawn * unit, axis=-1, keepdims=True) * unit
        return drawn

    return _drawn(vector, seed, "orthogonal", draw)


def _drawn(
    vector: SteeringVector,
    seed: int,
    method: str,
    draw: Callable[[np.random.Generator, np.ndarray[Any, Any]], np.ndarray[Any, Any]],
) -> SteeringVector:
    if not isinstance(vector, SteeringVector):
        raise TypeError(f"a null vector is drawn like a SteeringVector, not like {vector!r:.60}.")
    made = {}
    for layer in vector:
        own = np.array(vector[layer], np.float64)
        drawn = draw(generator(seed, layer), own)
        lengths = [np.linalg.norm(x, axis=-1, keepdims=True) for x in (own, drawn)]
        made[layer] = mx.array((drawn * (lengths[0] / lengths[1])).astype(np.float32))
    kept = {name: vector.info[name] for name in _OF_THE_MODEL if name in vector.info}
    return SteeringVector(made, vector.site, vector.residual_norms, {**kept, "method": method, "seed": int(seed)})


def shuffled_labels(pairs: Iterable[ContrastPair], *, seed: int) -> PairSet:
    """The same pairs with positive and negative swapped in a random half, so that the labels mean nothing.

    A vector of such pairs has what texts of this kind add to any vector, and no consistent direction of the behaviour:
    with exactly half of them swapped, what all pairs have in common cancels. In every split half of its pairs are
    swapped, of an odd number the smaller half, so a single pair stays as it is.

    Args:
        pairs: contrast pairs.
        seed: the same seed swaps the same pairs.

    Returns:
        A new set in the same order, with the same prompts, splits and name.

    Raises:
        TypeError: they aren't contrast pairs, or the seed is no number.
        ValueError: there are none.
    """
    chosen = checked(pairs)
    swapped: set[int] = set()
    for i, split in enumerate((None, *SPLITS)):
        rows = [row for row, pair in enumerate(chosen) if pair.split == split]
        swapped.update(generator(seed, i).permutation(rows)[: len(rows) // 2].tolist())
    return PairSet(
        [
            replace(pair, positive=pair.negative, negative=pair.positive) if row in swapped else pair
            for row, pair in enumerate(chosen)
        ],
        name=pairs.name if isinstance(pairs, PairSet) else "",
    )


def null_p_value(observed: float, nulls: Sequence[float]) -> float:
    """How likely chance alone does as much, one-sided: ``p = (1 + #{null ≥ observed}) / (1 + n)``.

    The one more is what was observed itself, so p is never 0, and never smaller than the draws allow (Phipson & Smyth
    2010, Statistical Applications in Genetics and Molecular Biology 9, 39): p < 0.05 needs 20 draws or more.

    Args:
        observed: what the vector does, such as its mean slope; for an effect below 0, negate both.
        nulls: what each null vector does, measured in the same way.

    Raises:
        ValueError: there are no nulls, or a NaN or an infinity.
    """
    drawn = _finite(nulls, "nulls")
    if drawn.ndim != 1 or not drawn.size:
        raise ValueError(f"nulls: one number per draw, (n,), not an array of shape {drawn.shape}.")
    return float((1 + np.sum(drawn >= number(observed, "observed"))) / (1 + len(drawn)))


def max_statistic_p_values(observed: Any, nulls: Any) -> np.ndarray[Any, Any]:
    """p-values of several looks, such as layers × strengths, corrected for having looked so often.

    ``p_j = (1 + #{draws: max_k null_k ≥ observed_j}) / (1 + draws)``: each look is held against the best that chance
    found in any of them, so that some p_j < 0.05 comes about by chance in no more than 5 of 100 studies (Westfall &
    Young 1993, Resampling-Based Multiple Testing). Looks that vary more by chance set the bar for all: give
    numbers on one scale, such as t-statistics, where the looks' scales differ.

    Args:
        observed: what the vector does at each look, (looks,).
        nulls: what each null vector does at each look, (draws, looks); a row is one null vector.

    Returns:
        One p-value per look, (looks,).

    Raises:
        ValueError: the shapes don't fit, there are no looks or no draws, or there is a NaN or an infinity.
    """
    found, drawn = _finite(observed, "observed"), _finite(nulls, "nulls")
    if found.ndim != 1 or drawn.ndim != 2 or drawn.shape[1] != len(found) or not drawn.size:
        raise ValueError(
            f"observed is (looks,) and nulls (draws, looks), with 1 or more of each; these are {found.shape} and "
            f"{drawn.shape}."
        )
    above = drawn.max(axis=1)[:, None] >= found
    p: np.ndarray[Any, Any] = (1 + above.sum(axis=0)) / (1 + len(drawn))
    return p


def _finite(values: Any, what: str) -> np.ndarray[Any, Any]:
    x = np.asarray(values, np.float64)
    if bad := int((~np.isfinite(x)).sum()):
        raise ValueError(f"{what}: {bad} of {x.size} {'is' if bad == 1 else 'are'} NaN or infinite.")
    return x
