"""From what was read of two sides to one direction per layer: the methods, and a registry of them.

Every method but the plain differences gives a line, û; it becomes a steering vector by the same rule: the component of
the mean difference along it, ``v = ⟨μ₊ − μ₋, û⟩ û``. That fixes the sign by uncentred projections, and makes strength 1
of every method move the mean of one side to the mean of the other along its own direction.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from mlxsteer.pairs import nearest

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"


@dataclass(frozen=True)
class Readings:
    """What was read of the two sides of a contrast, float64.

    Attributes:
        difference: μ₊ − μ₋, (layers, D); with matched sides the mean of the pairs' differences.
        means: μ₊ and μ₋, (2, layers, D). Without a negative side, the background's mean stands in for it.
        positive: the positive side's rows, (n, layers, D); None where the method didn't ask for rows.
        negative: the negative side's, likewise; matched sides have equal n, and row i of both is pair i.
        background: mean over the background set, (layers, D); None where there is none.
        matched: whether the sides come in pairs.
        seed: for methods that draw at random.
    """

    difference: Array
    means: Array
    positive: Array | None = None
    negative: Array | None = None
    background: Array | None = None
    matched: bool = True
    seed: int = 0

    @property
    def rows(self) -> tuple[Array, Array]:
        """Both sides' rows.

        Raises:
            ValueError: they weren't kept; the method is registered with ``rows=False``.
        """
        if self.positive is None or self.negative is None:
            raise ValueError("this method reads every row, and is registered with rows=False.")
        return self.positive, self.negative


Compute: TypeAlias = Callable[[Readings], Any]


@dataclass(frozen=True)
class Method:
    """A way to compute directions.

    Attributes:
        name: what it is called in `extract` and in a vector's file.
        compute: `Readings` → directions, (layers, D).
        rows: whether it needs every row, and not only means.
        matched: whether the sides must come in pairs.
        background: whether it needs a background set.
        negative: whether it needs a negative side.
    """

    name: str
    compute: Compute
    rows: bool = True
    matched: bool = False
    background: bool = False
    negative: bool = True


_METHODS: dict[str, Method] = {}
_ELSEWHERE = {
    "caa": "mean_difference", "diffmean": "mean_difference", "difference_in_means": "mean_difference",
    "dim": "mean_difference", "actadd": "single", "activation_addition": "single", "repe": "pca_difference",
    "lda": "whitened", "logistic": "probe", "logistic_regression": "probe",
}  # fmt: skip
"""What other projects and papers call a method of ours."""


def register(
    name: str, *, rows: bool = True, matched: bool = False, background: bool = False, negative: bool = True
) -> Callable[[Compute], Compute]:
    """Enter a method under a name, for ``extract(..., method=name)``.

    Args:
        name: the name.
        rows: it needs every row; where it doesn't, memory stays flat however many pairs there are.
        matched: it needs sides that come in pairs.
        background: it needs ``background=``.
        negative: it needs a negative side; where it doesn't, ``positive=`` may come alone with ``background=``.

    Raises:
        TypeError: the name is no text, or an empty one.
        ValueError: the name is taken.
    """
    if not isinstance(name, str) or not name:
        raise TypeError("a method is registered by a name: @register('name').")
    if name in _METHODS:
        raise ValueError(f"there is a method called {name!r} already.")

    def enter(compute: Compute) -> Compute:
        _METHODS[name] = Method(name, compute, rows, matched, background, negative)
        return compute

    return enter


def available() -> list[str]:
    """The names of the methods."""
    return sorted(_METHODS)


def describe(name: str) -> str:
    """What a method computes, with its formula and source.

    Raises:
        ValueError: there is no such method.
    """
    return inspect.getdoc(find(name).compute) or f"{name}: its author didn't describe it."


def find(method: str | Compute) -> Method:
    """The method of a name; a callable is a method of its own, which needs every row.

    Raises:
        ValueError: there is no such method.
        TypeError: it is no name and no callable.
    """
    if callable(method):
        inner = getattr(method, "func", method)  # a functools.partial of a method goes by the method's name
        for known in _METHODS.values():
            if known.compute is inner:
                return replace(known, compute=method)
        return Method(getattr(inner, "__name__", type(method).__name__), method)
    if not isinstance(method, str):
        raise TypeError(f"a method is a name or a callable, not {method!r}.")
    if method not in _METHODS:
        here = _ELSEWHERE.get(method.casefold())
        hint = f"It is {here} here." if here else nearest(method, available(), "directions.available()")
        raise ValueError(f"no method is called {method!r}. {hint}")
    return _METHODS[method]


# -- from lines to vectors -----------------------------------------------------------------------------------------


def along(difference: Array, line: Array) -> Array:
    """The component of the mean difference along a line, layer by layer: ``⟨d, û⟩ û``, (layers, D)."""
    length = np.linalg.norm(line, axis=-1, keepdims=True)
    unit = line / np.where(length > 0, length, 1.0)
    projection: Array = np.sum(difference * unit, axis=-1, keepdims=True)
    return projection * unit


def principal(rows: Array) -> Array:
    """The direction of the largest mean square of rows, uncentred, layer by layer: (n, layers, D) → (layers, D)."""
    return np.stack([np.linalg.svd(rows[:, layer], full_matrices=False)[2][0] for layer in range(rows.shape[1])])


# -- classifiers, one layer at a time --------------------------------------------------------------------------------


def check_scikit_learn(what: str) -> None:
    """Refuse what needs scikit-learn where there is none, before anything is computed.

    Raises:
        ImportError: with the command that installs it.
    """
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{what} needs scikit-learn: pip install 'mlxsteer[probe]'.") from error


def logistic(positive: Array, negative: Array, C: float = 1.0) -> tuple[Array, float]:  # noqa: N803
    """The weights w and the intercept b of a logistic regression, ``P(positive | x) = σ(w·x + b)``, L2-regularised.

    The penalty is on rows that are centred and scaled by their root mean square, one number for all features.

    Args:
        positive, negative: rows of the two sides, (n, D) and (m, D).
        C: the inverse strength of the penalty, as in scikit-learn.

    Returns:
        (D,) and a number, in the units of the rows; zeros where all rows are equal.
    """
    from sklearn.linear_model import LogisticRegression

    rows = np.concatenate([positive, negative])
    mean = rows.mean(axis=0)
    centred = rows - mean
    # The weights lie in the span of the rows, and the penalty doesn't know the axes: fit in the span.
    _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[sizes > sizes[0] * 1e-10]
    if not len(axes):
        return np.zeros(rows.shape[1]), 0.0
    scale = np.sqrt(np.mean(centred**2))
    labels = np.repeat([1, 0], [len(positive), len(negative)])
    fitted = LogisticRegression(C=C, max_iter=10_000, tol=1e-8).fit(centred @ axes.T / scale, labels)
    weights: Array = fitted.coef_[0] @ axes / scale
    return weights, float(fitted.intercept_[0] - weights @ mean)


def discriminant(positive: Array, negative: Array, difference: Array, shrinkage: float = 0.1) -> Array:
    """``Σ_s⁻¹ (μ₊ − μ₋)`` with ``Σ_s = (1 − s) Σ + s (tr Σ / D) I``, Σ the covariance within the sides, both together.

    Args:
        positive, negative: rows of the two sides, (n, D) and (m, D).
        difference: μ₊ − μ₋, (D,).
        shrinkage: s.

    Returns:
        (D,), in units by which its product with x is a log-odds.

    Raises:
        ValueError: the shrinkage is not above 0 and at most 1, or no side varies.
    """
    if not 0 < shrinkage <= 1:
        raise ValueError(f"whitened: the shrinkage lies above 0 and at most at 1, not at {shrinkage}.")
    within = np.concatenate([side - side.mean(axis=0) for side in (positive, negative)])
    x = within / np.sqrt(len(within))  # Σ = xᵀx
    ridge = shrinkage * np.sum(x**2) / x.shape[1]
    if not ridge:
        raise ValueError("whitened: no row differs from its side's mean: there is no covariance to whiten by.")
    # (ridge·I + (1−s)·xᵀx)⁻¹ d by Woodbury's identity, in n × n instead of D × D
    inner = ridge * np.eye(len(x)) + (1 - shrinkage) * x @ x.T
    solved: Array = (difference - (1 - shrinkage) * x.T @ np.linalg.solve(inner, x @ difference)) / ridge
    return solved


# -- methods -------------------------------------------------------------------------------------------------------


@register("mean_difference", rows=False)
def mean_difference(readings: Readings) -> Array:
    """Contrastive activation addition: ``v = μ₊ − μ₋``, with matched pairs ``mean_i [h(positive_i) − h(negative_i)]``.

    Rimsky et al. 2024, arXiv 2312.06681. The plainest method, and on most benchmarks the best steerer.
    """
    return readings.difference


@register("mean_centred", rows=False, background=True, negative=False)
def mean_centred(readings: Readings) -> Array:
    """Mean-centring: ``v = μ₊ − μ_background``; the negative side isn't used, and need not be given.

    For a behaviour that has no opposite. Jorgensen et al. 2023, arXiv 2312.03813.
    """
    assert readings.background is not None
    centred: Array = readings.means[0] - readings.background
    return centred


@register("pca_difference", matched=True)
def pca_difference(readings: Readings) -> Array:
    """The first principal component of the pairs' differences, uncentred: the û with the largest ``Σ_i ⟨d_i, û⟩²``.

    Uncentred, because centring takes the mean difference away, which is the direction looked for. The same line as the
    PCA of the two sides after each pair's own midpoint is taken from both (repeng's ``pca_center``). The sign is that
    of the mean projection. After Zou et al. 2023, Representation engineering, arXiv 2310.01405.
    """
    positive, negative = readings.rows
    return along(readings.difference, principal(positive - negative))


@register("pca_centre")
def pca_centre(readings: Readings) -> Array:
    """The first principal component of all rows of both sides about their common centre ``(μ₊ + μ₋)/2``.

    For unmatched sets. It finds the behaviour only where that varies more than everything else that the texts differ
    in; with matched pairs `pca_difference` is the better choice. After Zou et al. 2023, arXiv 2310.01405.
    """
    positive, negative = readings.rows
    centre = readings.means.mean(axis=0)
    return along(readings.difference, principal(np.concatenate([positive - centre, negative - centre])))


@register("lat")
def lat(readings: Readings) -> Array:
    """Linear artificial tomography: PCA of the differences of random pairs of rows, each scaled to length 1.

    The rows of both sides are shuffled together and paired; û is the first component of ``(h_i − h_j)/‖h_i − h_j‖``;
    the labels give the sign. Zou et al. 2023, arXiv 2310.01405, in the form of AxBench, arXiv 2501.17148.
    """
    rows = np.concatenate(readings.rows)
    order = np.random.default_rng(readings.seed).permutation(len(rows))
    half = len(rows) // 2
    apart = rows[order[:half]] - rows[order[half : 2 * half]]
    length = np.linalg.norm(apart, axis=-1, keepdims=True)
    return along(readings.difference, principal(apart / np.where(length > 0, length, 1.0)))


@register("probe")
def probe(readings: Readings, C: float = 1.0) -> Array:  # noqa: N803 - scikit-learn's name
    """The weights of a logistic regression that tells the sides apart, L2-regularised with inverse strength C.

    Rows are centred and scaled by their root mean square, one number per layer. A good detector and a poor steerer (Wu
    et al. 2025, AxBench, arXiv 2501.17148): for monitoring. Alain & Bengio 2016, arXiv 1610.01644.
    """
    positive, negative = readings.rows
    pairs = [logistic(positive[:, layer], negative[:, layer], C) for layer in range(positive.shape[1])]
    return along(readings.difference, np.stack([weights for weights, _ in pairs]))


@register("whitened")
def whitened(readings: Readings, shrinkage: float = 0.1) -> Array:
    """Linear discriminant analysis: ``û ∝ Σ_s⁻¹ (μ₊ − μ₋)``, with ``Σ_s = (1 − s) Σ + s (tr Σ / D) I``.

    Σ is the covariance within the sides, both together. Features that vary within a side count less. Fisher 1936; Marks
    & Tegmark 2023, The geometry of truth, arXiv 2310.06824.

    Raises:
        ValueError: the shrinkage is not above 0 and at most 1, or no side varies.
    """
    positive, negative = readings.rows
    layers = range(positive.shape[1])
    rows = [discriminant(positive[:, i], negative[:, i], readings.difference[i], shrinkage) for i in layers]
    return along(readings.difference, np.stack(rows))


@register("single", rows=False, matched=True)
def single(readings: Readings) -> Array:
    """Activation addition: of one pair of texts, ``v_p = h_p(positive) − h_p(negative)`` at each position p.

    The shorter text is padded with spaces at its end; the vector is added position by position at the front of a
    prompt. The one method that isn't a function of `Readings`. Turner et al. 2023, arXiv 2308.10248.

    Raises:
        TypeError: always; `extract` reads the positions.
    """
    raise TypeError("single reads every position of one pair: extract(model, [pair], method='single').")
