"""Every method against a reference of its own: NumPy and scikit-learn, on activations that a bare forward gave."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from test_extraction import close, directions, ids, tokenizer
from test_extraction import streams as bare_streams

from mlxsteer import ContrastPair, InterpretableModel, SteeringVector, estimate, extract, separation
from mlxsteer import directions as methods
from mlxsteer.directions import Readings

PAIRS = [
    ContrastPair("the food was", " good", " bad"),
    ContrastPair("i", " like it very much, thanks", " do not"),
    ContrastPair("", "yes", "a long answer that goes on and on"),
    ContrastPair("what a day", "!", ""),
    ContrastPair("rain again and again", " is fine.", " is awful!"),
    ContrastPair("we saw a film, it was", " great", " grim"),
    ContrastPair("the man", " laughs", " cries"),
]
TURNED = [ContrastPair(p.prompt, p.negative, p.positive) for p in PAIRS]
BACKGROUND = ["a bus came by", "tea", "the sky is blue today", "two and two"]
UNMATCHED = (["so good", "i like it", "thanks a lot, really"], ["no", "a bad day", "this is awful", "oh", "rain, rain"])


@pytest.fixture(scope="module", params=["llama", "gpt2", "mamba2", "gemma2"])
def model(request: pytest.FixtureRequest) -> InterpretableModel:
    return InterpretableModel(tiny.build(request.param), tokenizer())


@pytest.fixture(scope="module")
def llama() -> InterpretableModel:
    return InterpretableModel(tiny.build("llama"), tokenizer())


@functools.cache
def _once(model: InterpretableModel, tokens: tuple[int, ...]) -> np.ndarray:
    return bare_streams(model, tokens)


def streams(model: InterpretableModel, tokens: Sequence[int]) -> np.ndarray:
    """The residual stream after every block, (layers, tokens, D) in float64, of a bare forward; each text runs once."""
    return _once(model, tuple(tokens))


@pytest.fixture(autouse=True, scope="module")
def _forget() -> Iterator[None]:
    yield
    _once.cache_clear()


# -- the references: rows are (n, layers, D) in float64 ----------------------------------------------------------------


def last_rows(model: InterpretableModel, texts: Sequence[str]) -> np.ndarray:
    """The residual stream at each text's last token, of bare forwards."""
    return np.stack([streams(model, ids(text))[:, -1] for text in texts])


def sides(model: InterpretableModel, pairs: Sequence[ContrastPair]) -> tuple[np.ndarray, np.ndarray]:
    """Both sides' rows, in the order the package keeps: by the token ids of a pair's lesser side, then its greater."""
    ordered = sorted(pairs, key=lambda p: sorted([ids(p.prompt + p.positive), ids(p.prompt + p.negative)]))
    return (
        last_rows(model, [p.prompt + p.positive for p in ordered]),
        last_rows(model, [p.prompt + p.negative for p in ordered]),
    )


def component(difference: np.ndarray, lines: list[np.ndarray]) -> np.ndarray:
    """``⟨d, û⟩û`` in each layer."""
    units = [line / np.linalg.norm(line) for line in lines]
    return np.stack([(d @ u) * u for d, u in zip(difference, units, strict=True)])


def each_layer(
    positive: np.ndarray, negative: np.ndarray, line: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> np.ndarray:
    """The component of the mean difference along a line that is made of each layer's rows."""
    lines = [line(positive[:, layer], negative[:, layer]) for layer in range(positive.shape[1])]
    return component(positive.mean(0) - negative.mean(0), lines)


def first_component(rows: np.ndarray) -> np.ndarray:
    """scikit-learn's, which centres."""
    return PCA(1, svd_solver="full").fit(rows).components_[0]


def by_differences(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    d = a - b
    return first_component(np.concatenate([d, -d]))  # their mean is 0: centring takes nothing away


def by_centre(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The leading eigenvector of the second moment about the middle between the sides' means."""
    rows = np.concatenate([a, b]) - (a.mean(0) + b.mean(0)) / 2
    return np.linalg.eigh(rows.T @ rows)[1][:, -1]


def by_random_pairs(a: np.ndarray, b: np.ndarray, seed: int = 0) -> np.ndarray:
    rows = np.concatenate([a, b])
    order = np.random.default_rng(seed).permutation(len(rows))
    count = len(rows) // 2
    units = []
    for i, j in zip(order[:count], order[count : 2 * count], strict=True):
        apart = rows[i] - rows[j]
        units.append(apart / np.sqrt(apart @ apart))
    return np.linalg.eigh(np.array(units).T @ np.array(units))[1][:, -1]


def by_probe(a: np.ndarray, b: np.ndarray, C: float = 1.0) -> np.ndarray:
    rows = np.concatenate([a, b])
    rows = rows - rows.mean(0)
    scaled = rows / np.sqrt((rows**2).mean())
    labels = [True] * len(a) + [False] * len(b)
    return LogisticRegression(C=C, solver="newton-cg", tol=1e-11, max_iter=1000).fit(scaled, labels).coef_[0]


def by_discriminant(a: np.ndarray, b: np.ndarray, shrinkage: float = 0.1) -> np.ndarray:
    fitted = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage)
    return fitted.fit(np.concatenate([a, b]), [1] * len(a) + [0] * len(b)).coef_[0]


LINES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "pca_difference": by_differences, "pca_centre": by_centre, "lat": by_random_pairs, "probe": by_probe,
    "whitened": by_discriminant,
}  # fmt: skip
ODD = ["mean_difference", "pca_difference", "pca_centre", "probe", "whitened", "single"]
"""Methods whose formula changes its sign when the sides are exchanged. mean_centred has one side; lat draws its pairs
from both sides in their order."""


def size_of(model: InterpretableModel) -> float:
    return np.linalg.norm(streams(model, ids("the food was good"))[:, -1], axis=-1).min()


def background(method: str) -> dict[str, Any]:
    return {"background": BACKGROUND} if method == "mean_centred" else {}


# -- methods are their references --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", LINES)
def test_a_line_becomes_the_component_of_the_mean_difference_along_it(model: InterpretableModel, method: str) -> None:
    positive, negative = sides(model, PAIRS)
    expected = each_layer(positive, negative, LINES[method])
    found = directions(extract(model, PAIRS, method=method))
    close(found, expected, size_of(model))
    assert np.linalg.norm(expected, axis=-1).min() > 1e-3 * size_of(model)
    # Strength 1 moves the mean of one side to the other's, along the vector.
    np.testing.assert_allclose((found * (positive.mean(0) - negative.mean(0))).sum(-1), (found**2).sum(-1), rtol=1e-3)


@pytest.mark.parametrize("method", ["mean_difference", *LINES])
def test_sides_that_do_not_come_in_pairs(llama: InterpretableModel, method: str) -> None:
    good, bad = (last_rows(llama, sorted(side, key=ids)) for side in UNMATCHED)
    given = {"positive": UNMATCHED[0], "negative": UNMATCHED[1], "method": method}
    if method == "pca_difference":
        with pytest.raises(ValueError, match="pca_difference needs matched pairs"):
            extract(llama, **given)
        return
    expected = good.mean(0) - bad.mean(0) if method == "mean_difference" else each_layer(good, bad, LINES[method])
    vector = extract(llama, **given)
    close(directions(vector), expected, size_of(llama))
    assert (vector.info["positive"], vector.info["negative"]) == (3, 5)
    assert "pairs" not in vector.info


def test_mean_centring_takes_the_mean_of_the_background_away_and_leaves_the_negative_side_unused(
    model: InterpretableModel,
) -> None:
    positive = last_rows(model, [p.prompt + p.positive for p in PAIRS]).mean(0)
    expected = positive - last_rows(model, BACKGROUND).mean(0)
    for pairs in (PAIRS, [ContrastPair(p.prompt, p.positive, " other") for p in PAIRS]):
        vector = extract(model, pairs, method="mean_centred", background=iter(BACKGROUND))
        close(directions(vector), expected, size_of(model))


def test_a_background_set_is_needed_by_one_method_and_refused_by_the_others(llama: InterpretableModel) -> None:
    with pytest.raises(ValueError, match=r"mean_centred needs a background set: background=\[\.\.\.\]"):
        extract(llama, PAIRS, method="mean_centred")
    with pytest.raises(ValueError, match="mean_difference takes no background set"):
        extract(llama, PAIRS, background=BACKGROUND)
    with pytest.raises(ValueError, match="background= is empty"):
        extract(llama, PAIRS, method="mean_centred", background=[])


@pytest.mark.parametrize("read", ["last", "mean", "first", "all", -2])
def test_what_is_read_of_a_completion_is_read_of_a_whole_background_text(llama: InterpretableModel, read: Any) -> None:
    pairs = [PAIRS[0], PAIRS[4]]

    def of(tokens: list[int], prompt: int) -> np.ndarray:
        h = streams(llama, tokens)
        return {
            "last": h[:, -1], "mean": h[:, prompt:].mean(1), "first": h[:, min(prompt, len(tokens) - 1)],
            "all": h[:, 1:].mean(1), -2: h[:, -2],
        }[read]  # fmt: skip

    positive = np.mean([of(ids(p.prompt + p.positive), len(ids(p.prompt))) for p in pairs], axis=0)
    whole = np.mean([of(ids(text), 1) if read != "first" else streams(llama, ids(text))[:, 1:].mean(1)
                     for text in BACKGROUND], axis=0)  # fmt: skip
    found = directions(extract(llama, pairs, method="mean_centred", background=BACKGROUND, read=read))
    close(found, positive - whole, size_of(llama))


@pytest.mark.parametrize("method", ["mean_difference", "mean_centred", *LINES])
def test_order_and_batches_do_not_matter(llama: InterpretableModel, method: str) -> None:
    first = extract(llama, PAIRS, method=method, **background(method))
    for order, budget in (((3, 1, 6, 0, 5, 2, 4), 4096), (range(6, -1, -1), 30), (range(7), 1)):
        pairs = [PAIRS[i] for i in order]
        found = extract(llama, pairs, method=method, batch_tokens=budget, **background(method))
        close(directions(found), directions(first), size_of(llama))
        assert found.info["data"] == first.info["data"]


@pytest.mark.parametrize("method", ODD)
def test_exchanged_sides_give_the_negated_vector(llama: InterpretableModel, method: str) -> None:
    one = 1 if method == "single" else None
    found = directions(extract(llama, TURNED[:one], method=method))
    expected = directions(extract(llama, PAIRS[:one], method=method))
    assert np.abs(found + expected).max() <= 1e-5 * size_of(llama)
    assert np.abs(expected).max() > 1e-2


def test_lat_draws_by_its_seed(llama: InterpretableModel) -> None:
    positive, negative = sides(llama, PAIRS)
    made = []
    for seed in (0, 7):
        expected = each_layer(positive, negative, functools.partial(by_random_pairs, seed=seed))
        made.append(directions(extract(llama, PAIRS, method="lat", seed=seed)))
        close(made[-1], expected, size_of(llama))
    assert np.linalg.norm(made[0] - made[1], axis=-1).min() > 1e-2 * size_of(llama)


def test_no_two_methods_are_the_same(llama: InterpretableModel) -> None:
    """steering-lite found its mean-centring byte-identical to its mean difference."""
    names = [name for name in methods.available() if name != "single"]
    made = {name: directions(extract(llama, PAIRS, method=name, **background(name))) for name in names}
    assert len(made) == 7
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            apart = np.linalg.norm(made[one] - made[other], axis=-1) / np.linalg.norm(made[one], axis=-1)
            assert apart.min() > 1e-2, (one, other)


def test_options_of_a_method_are_given_by_a_partial_of_it(llama: InterpretableModel) -> None:
    positive, negative = sides(llama, PAIRS)
    for name, line in (
        ("probe", functools.partial(by_probe, C=0.01)),
        ("whitened", functools.partial(by_discriminant, shrinkage=0.7)),
    ):
        method = functools.partial(getattr(methods, name), **line.keywords)
        vector = extract(llama, PAIRS, method=method)
        close(directions(vector), each_layer(positive, negative, line), size_of(llama))
        assert vector.info["method"] == name
        plain = directions(extract(llama, PAIRS, method=name))
        assert np.linalg.norm(directions(vector) - plain, axis=-1).max() > 1e-3 * size_of(llama)


# -- what sets the methods apart -------------------------------------------------------------------------------------


def readings(positive: Any, negative: Any, **more: Any) -> Readings:
    """`Readings` of one layer, from two arrays of rows (n, D)."""
    a, b = np.asarray(positive, np.float64)[:, None], np.asarray(negative, np.float64)[:, None]
    return Readings(a.mean(0) - b.mean(0), np.stack([a.mean(0), b.mean(0)]), a, b, **more)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(abs(a @ b) / np.linalg.norm(a) / np.linalg.norm(b))


AXES = np.eye(6)
DRAWN = np.random.default_rng(3)
# The differences share a step of 3 along the first axis and vary by 2 along the second, where their mean is 0.
CONTEXTS = DRAWN.normal(size=(40, 6))
SPREAD = np.tile([2.0, -2.0], 20)[:, None]
SHARED_STEP = readings(CONTEXTS + 3 * AXES[0] + SPREAD * AXES[1], CONTEXTS)


def test_pca_of_differences_is_not_centred() -> None:
    positive, negative = (side[:, 0] for side in SHARED_STEP.rows)
    found = methods.pca_difference(SHARED_STEP)[0]
    assert cosine(found, AXES[0]) > 0.999
    np.testing.assert_allclose(found, 3 * AXES[0], atol=1e-9)
    centred = first_component(positive - negative)  # scikit-learn's way: the shared step is gone
    assert cosine(centred, AXES[0]) < 1e-6
    assert cosine(centred, AXES[1]) > 0.999
    assert cosine(centred, found) < 1e-6


def test_pca_of_differences_follows_the_larger_second_moment() -> None:
    wide = readings(CONTEXTS + AXES[0] + SPREAD * AXES[1] + 0.1 * AXES[1], CONTEXTS)  # a step of 1, a spread of 2
    found = methods.pca_difference(wide)[0]
    assert cosine(found, AXES[1]) > 0.99
    assert found @ AXES[1] > 0  # the sign is that of the mean step, 0.1, though half of the pairs say the other
    np.testing.assert_allclose(methods.mean_difference(wide)[0], AXES[0] + 0.1 * AXES[1], atol=1e-9)


def test_contexts_that_vary_mislead_the_pca_about_the_centre_and_not_the_one_of_differences() -> None:
    contexts = 10 * DRAWN.normal(size=(40, 1)) * AXES[2] + 0.1 * DRAWN.normal(size=(40, 6))
    given = readings(contexts + AXES[0], contexts + 0.1 * AXES[3])
    assert cosine(methods.pca_difference(given)[0], AXES[0] - 0.1 * AXES[3]) > 0.999
    centre = methods.pca_centre(given)[0]
    assert cosine(centre, AXES[2]) > 0.99
    assert np.linalg.norm(centre) < 0.1  # so that there is next to nothing of the mean difference along it
    quiet = readings(0.1 * CONTEXTS + 3 * AXES[0], 0.1 * CONTEXTS[::-1])
    assert cosine(methods.pca_centre(quiet)[0], AXES[0]) > 0.99


def test_the_centre_is_the_middle_between_the_sides_and_not_the_mean_of_all_rows() -> None:
    few, many = DRAWN.normal(size=(3, 6)) + 2 * AXES[0], DRAWN.normal(size=(30, 6))
    found = methods.pca_centre(readings(few, many, matched=False))[0]
    assert cosine(found, by_centre(few, many)) > 1 - 1e-9
    assert cosine(found, first_component(np.concatenate([few, many]))) < 0.99


def test_lat_lets_no_single_pair_outweigh_the_others() -> None:
    rows = DRAWN.normal(size=(40, 6)) * [2, 0.1, 0.1, 0.1, 0.1, 0.1]
    rows[0] += 500 * AXES[1]
    given = readings(rows[:20] + 2 * AXES[0], rows[20:])
    assert cosine(methods.lat(given)[0], AXES[0]) > 0.99
    assert cosine(by_centre(given.rows[0][:, 0], given.rows[1][:, 0]), AXES[1]) > 0.99  # one row decides there


def test_whitening_turns_away_from_what_varies_within_a_side() -> None:
    noise = DRAWN.normal(size=(400, 2)) * [5, 0.5]
    given = readings(noise[:200] + np.ones(2), noise[200:])
    found, plain = methods.whitened(given)[0], methods.mean_difference(given)[0]
    assert found[1] / found[0] > 2 * plain[1] / plain[0]
    np.testing.assert_allclose(methods.whitened(given, shrinkage=1.0)[0], plain, rtol=1e-9)
    within = np.concatenate([side[:, 0] - side[:, 0].mean(0) for side in given.rows])
    covariance = within.T @ within / 400
    for shrinkage in (0.1, 0.5):
        shrunk = (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / 2 * np.eye(2)
        assert cosine(methods.whitened(given, shrinkage)[0], np.linalg.solve(shrunk, plain)) > 1 - 1e-12


@pytest.mark.parametrize("shrinkage", [0, -0.1, 1.01, float("nan")])
def test_a_shrinkage_outside_its_range_is_refused(shrinkage: float) -> None:
    with pytest.raises(ValueError, match="whitened: the shrinkage lies above 0 and at most at 1"):
        methods.whitened(SHARED_STEP, shrinkage)


def test_whitening_needs_rows_that_vary(llama: InterpretableModel) -> None:
    with pytest.raises(ValueError, match="whitened: no row differs from its side's mean"):
        extract(llama, PAIRS[:1], method="whitened")


LINE_METHODS = {name: getattr(methods, name) for name in LINES}


@given(seed=st.integers(0, 99), factor=st.sampled_from([1e-3, 0.5, 40.0]), name=st.sampled_from(sorted(LINES)))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_a_method_scales_turns_and_changes_sign_with_its_rows(seed: int, factor: float, name: str) -> None:
    """No method knows the axes, the unit, or which way is up."""
    rng = np.random.default_rng(seed)
    positive, negative = rng.normal(size=(2, 9, 6)) * [3, 2, 1, 1, 1, 1]
    positive = positive + 2 * AXES[0]
    turn = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    method = LINE_METHODS[name]
    plain = method(readings(positive, negative))[0]
    length = np.linalg.norm(plain)
    scaled = method(readings(factor * positive, factor * negative))[0]
    turned = method(readings(positive @ turn, negative @ turn))[0]
    opposite = method(readings(-positive, -negative))[0]
    moved = method(readings(positive + 100.0, negative + 100.0))[0]
    assert np.linalg.norm(scaled - factor * plain) <= 1e-4 * factor * length
    assert np.linalg.norm(turned - plain @ turn) <= 1e-4 * length
    assert np.linalg.norm(opposite + plain) <= 1e-4 * length
    assert np.linalg.norm(moved - plain) <= 1e-4 * length


@pytest.mark.parametrize("name", sorted(set(LINES) - {"whitened"}))
def test_sides_that_are_the_same_give_a_direction_of_zeros(name: str) -> None:
    rows = np.ones((3, 6))
    np.testing.assert_array_equal(LINE_METHODS[name](readings(rows, rows)), np.zeros((1, 6)))


# -- the registry ----------------------------------------------------------------------------------------------------


@pytest.fixture
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "_METHODS", dict(methods._METHODS))


def test_the_methods_there_are_describe_themselves_with_their_source() -> None:
    assert methods.available() == [
        "lat", "mean_centred", "mean_difference", "pca_centre", "pca_difference", "probe", "single", "whitened",
    ]  # fmt: skip
    sources = {
        "mean_difference": "2312.06681", "mean_centred": "2312.03813", "pca_difference": "2310.01405",
        "pca_centre": "2310.01405", "lat": "2310.01405", "probe": "1610.01644", "whitened": "2310.06824",
        "single": "2308.10248",
    }  # fmt: skip
    for name in methods.available():
        assert sources[name] in methods.describe(name)
    assert "h_p(positive) − h_p(negative)" in methods.describe("single")
    assert "centring takes the mean difference away" in methods.describe("pca_difference")


@pytest.mark.usefixtures("_registry")
def test_a_registered_method_is_extracted_with_by_name(llama: InterpretableModel) -> None:
    @methods.register("medians")
    def medians(given: Readings) -> np.ndarray:
        """Difference of the sides' medians."""
        positive, negative = given.rows
        return np.median(positive, axis=0) - np.median(negative, axis=0)

    assert "medians" in methods.available()
    assert methods.describe("medians") == "Difference of the sides' medians."
    positive, negative = sides(llama, PAIRS)
    expected = np.median(positive, axis=0) - np.median(negative, axis=0)
    for method in ("medians", medians):
        vector = extract(llama, PAIRS, method=method)
        close(directions(vector), expected, size_of(llama))
        assert vector.info["method"] == "medians"
    for name in ("medians", "single", "probe"):
        with pytest.raises(ValueError, match=f"there is a method called '{name}' already"):
            methods.register(name)(medians)
    methods.register("silent")(lambda given: given.difference)
    assert methods.describe("silent").startswith("silent: ")


@pytest.mark.usefixtures("_registry")
def test_what_a_method_says_that_it_needs_is_what_it_gets(llama: InterpretableModel) -> None:
    seen: dict[str, Readings] = {}

    @methods.register("flat", rows=False)
    def flat(given: Readings) -> np.ndarray:
        seen["flat"] = given
        return given.difference

    @methods.register("both", matched=True, background=True)
    def both(given: Readings) -> np.ndarray:
        seen["both"] = given
        return given.difference

    extract(llama, PAIRS, method="flat", seed=5)
    assert seen["flat"].positive is None
    assert seen["flat"].negative is None
    assert seen["flat"].background is None
    assert (seen["flat"].seed, seen["flat"].matched) == (5, True)
    with pytest.raises(ValueError, match="registered with rows=False"):
        _ = seen["flat"].rows
    extract(llama, PAIRS, method="both", background=BACKGROUND)
    given = seen["both"]
    size = size_of(llama)
    positive, negative = sides(llama, PAIRS)
    for found, expected in (
        (given.difference, positive.mean(0) - negative.mean(0)), (given.means[0], positive.mean(0)),
        (given.means[1], negative.mean(0)), (given.background, last_rows(llama, BACKGROUND).mean(0)),
        (given.rows[0], positive), (given.rows[1], negative),
    ):  # fmt: skip
        assert found.dtype == np.float64
        assert found.shape == expected.shape
        close(found, expected, size)
    with pytest.raises(ValueError, match="both needs matched pairs"):
        extract(llama, positive=["a"], negative=["b"], method="both", background=["c"])
    with pytest.raises(ValueError, match="both needs a background set"):
        extract(llama, PAIRS, method="both")


def test_any_callable_is_a_method_and_gets_every_row(llama: InterpretableModel) -> None:
    class Halved:
        def __call__(self, given: Readings) -> list[np.ndarray]:
            assert given.rows[0].shape == given.rows[1].shape == (7, 4, 64)
            return list(given.difference / 2)  # anything that NumPy takes

    half = directions(extract(llama, PAIRS)) / 2
    for method, name in (
        (Halved(), "Halved"), (lambda given: given.difference / 2, "<lambda>"),
        (functools.partial(lambda given, by: mx.array((given.difference / by).astype(np.float32)), by=2), "<lambda>"),
    ):  # fmt: skip
        vector = extract(llama, PAIRS, method=method)
        np.testing.assert_allclose(directions(vector), half, rtol=1e-6)
        assert vector.info["method"] == name


def test_what_is_no_direction_is_refused(llama: InterpretableModel) -> None:
    for shape, wrong in (
        (r"\(64,\)", lambda given: given.difference[0]), (r"\(4, 32\)", lambda given: given.difference[:, :32]),
        (r"\(7, 4, 64\)", lambda given: given.rows[0]), (r"\(\)", lambda given: 0.0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"<lambda> gave shape {shape}; directions are .* of shape \(4, 64\)"):
            extract(llama, PAIRS, method=wrong)
    with pytest.raises(ValueError, match="the direction of layer 0 holds 64 NaN"):
        extract(llama, PAIRS, method=lambda given: given.difference * np.nan)


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("mean_diference", "Nearest: mean_difference"),
        ("pca", "Nearest: .*pca_centre"),
        ("Probe", "Nearest: probe"),
        ("zzz", "There are lat, mean_centred"),
    ],
)
def test_a_wrong_name_lists_the_nearest(llama: InterpretableModel, wrong: str, nearest: str) -> None:
    for attempt in (lambda: extract(llama, PAIRS, method=wrong), lambda: methods.describe(wrong)):
        with pytest.raises(ValueError, match=f"no method is called '{wrong}'. {nearest}"):
            attempt()


def test_what_is_no_name_and_no_callable_is_refused(llama: InterpretableModel) -> None:
    with pytest.raises(TypeError, match="a method is a name or a callable, not 3"):
        extract(llama, PAIRS, method=3)  # type: ignore[arg-type]


# -- activation addition, position by position -----------------------------------------------------------------------

LONG = ContrastPair("", "love it so", "hate")  # the negative side is padded, by 6 spaces
SHORT = ContrastPair("", "no", "yes!")  # the positive one


def single_by_hand(model: InterpretableModel, pair: ContrastPair) -> np.ndarray:
    """(layers, positions, D)."""
    texts = [pair.prompt + pair.positive, pair.prompt + pair.negative]
    length = max(map(len, texts))
    a, b = (streams(model, ids(text + " " * (length - len(text)))) for text in texts)
    return a - b


@pytest.mark.parametrize("pair", [LONG, SHORT], ids=["negative shorter", "positive shorter"])
def test_single_is_the_difference_at_each_position_with_spaces_behind_the_shorter_text(
    model: InterpretableModel, pair: ContrastPair
) -> None:
    vector = extract(model, [pair], method="single")
    expected = single_by_hand(model, pair)
    assert vector.positions == expected.shape[1] > 3
    assert (vector.width, vector.layers, vector.site) == (64, [0, 1, 2, 3], "layers.{layer}")
    found = np.stack([np.array(vector[layer], np.float64) for layer in vector])
    assert np.linalg.norm(found - expected, axis=-1).max() <= 1e-5 * size_of(model)
    assert np.linalg.norm(expected[:, 0], axis=-1).max() == 0  # both begin with BOS
    assert np.linalg.norm(expected[:, -1], axis=-1).min() > 0.1
    assert (vector.info["method"], vector.info["pairs"]) == ("single", 1)
    assert f"one for each of {vector.positions} positions" in repr(vector)


def test_single_takes_layers_and_places_and_leaves_splits_aside(llama: InterpretableModel) -> None:
    whole = single_by_hand(llama, LONG)
    held_out = ContrastPair(LONG.prompt, LONG.positive, LONG.negative, split="report")
    vector = extract(llama, [held_out], method="single", layers=[2, -1])
    assert vector.layers == [2, 3]
    np.testing.assert_allclose(np.array(vector[3]), whole[3], atol=1e-5 * size_of(llama))
    inner = extract(llama, [LONG], method="single", site="mlp", layers=1)
    with llama.trace(ids("love it so")) as a, llama.trace(ids("hate      ")) as b:
        pass
    expected = a.activations["layers.1.mlp"] - b.activations["layers.1.mlp"]
    np.testing.assert_allclose(np.array(inner[1]), np.array(expected[0]), atol=1e-5)


def test_single_of_a_chat_pair_goes_through_the_template(pocket: InterpretableModel) -> None:
    pair = ContrastPair("", "Praise it!", "Blame it, and go on.")
    vector = extract(pocket, [pair], method="single", layers=2, chat=True)
    asked = [pocket.encode([{"role": "user", "content": text}]) for text in (pair.positive, pair.negative)]
    space = pocket.encode(" ")[-1]
    length = max(map(len, asked))
    a, b = (streams(pocket, row + [space] * (length - len(row)))[2] for row in asked)
    assert vector.positions == length
    np.testing.assert_allclose(np.array(vector[2]), a - b, atol=1e-4 * np.linalg.norm(a, axis=-1).max())


def test_single_is_of_one_pair(llama: InterpretableModel) -> None:
    with pytest.raises(ValueError, match="made of one pair, and these are 7"):
        extract(llama, PAIRS, method="single")
    with pytest.raises(TypeError, match="takes one contrast pair"):
        extract(llama, positive=["a"], negative=["b"], method="single")
    with pytest.raises(ValueError, match="same tokens: there is no contrast"):
        extract(llama, [ContrastPair("a", "§", "¶")], method="single")  # two letters the tokenizer doesn't know


def with_front_added(model: InterpretableModel, tokens: list[int], layer: int, front: np.ndarray) -> np.ndarray:
    """The logits of one row, (tokens, vocabulary), with rows of `front` added behind a block at the first positions."""
    padded = np.zeros((len(tokens), front.shape[-1]), np.float32)
    padded[: len(front)] = front[: len(tokens)]
    with tiny.by_hand(model.model.layers[layer], lambda h: h + mx.array(padded)):
        return np.array(model.model(mx.array([tokens]))[0], np.float64)


@pytest.mark.parametrize("strength", [1.0, -2.5])
@pytest.mark.parametrize("text", ["oh", "the sky is blue today"], ids=["shorter prompt", "longer prompt"])
def test_steering_by_single_adds_at_the_front_as_by_hand(model: InterpretableModel, text: str, strength: float) -> None:
    vector = extract(model, [LONG], method="single")
    expected = with_front_added(model, ids(text), 1, strength * single_by_hand(model, LONG)[1])
    with model.trace(text, vector.at(1, strength)) as trace:
        pass
    size = np.abs(expected).max()
    np.testing.assert_allclose(np.array(trace.activations["logits"][0]), expected, atol=1e-4 * size)
    plain = np.array(model.model(mx.array([ids(text)]))[0])
    assert np.abs(expected - plain).max() > 1e-2 * size


def test_steering_by_single_in_a_padded_batch_and_at_several_layers(model: InterpretableModel) -> None:
    vector = extract(model, [LONG], method="single")
    texts = ["oh", "the sky is blue today", "a bus"]
    front = single_by_hand(model, LONG)
    with model.trace(texts, vector.at({0: 0.5, 2: -1.0})) as trace:
        pass
    for row, text in enumerate(texts):
        tokens = ids(text)
        pieces = np.zeros((2, len(tokens), 64), np.float32)
        for piece, layer, strength in ((0, 0, 0.5), (1, 2, -1.0)):
            pieces[piece, : len(front[layer])] = strength * front[layer][: len(tokens)]
        with ExitStack() as stack:
            for piece, layer in ((0, 0), (1, 2)):
                change = functools.partial(lambda h, added: h + added, added=mx.array(pieces[piece]))
                stack.enter_context(tiny.by_hand(model.model.layers[layer], change))
            expected = np.array(model.model(mx.array([tokens]))[0])
        found = np.array(trace.activations["logits"][row, : len(tokens)])
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def continued(model: InterpretableModel, text: str, front: np.ndarray, count: int) -> tuple[list[int], np.ndarray]:
    """Greedy decoding without a cache, the vectors added at the front of the prompt and nowhere else: the tokens, and
    the log-probability of each."""
    tokens, seen = ids(text), []
    prompt = len(tokens)
    for _ in range(count):
        logits = with_front_added(model, tokens, 1, front[:prompt])[-1]
        tokens.append(int(logits.argmax()))
        seen.append(logits.max() - np.log(np.exp(logits).sum()))
    return tokens[prompt:], np.array(seen)


def test_generation_is_steered_in_the_prompt_only_whatever_the_chunks(model: InterpretableModel) -> None:
    vector, front = extract(model, [LONG], method="single"), single_by_hand(model, LONG)[1]
    assert vector.positions == 11
    for text in ("oh", "the sky is blue"):  # in the first, the vector is longer than the prompt
        tokens, logprobs = continued(model, text, 3 * front, 4)
        for chunk in (2, 3, 2048):
            found = model.generate(text, vector.at(1, 3.0), max_tokens=4, prefill_step_size=chunk, logprobs=True)
            assert found.tokens == tokens
            np.testing.assert_allclose(np.array(found.logprobs), logprobs, atol=1e-4)
        plain = model.generate(text, max_tokens=4, logprobs=True)
        assert plain.tokens != tokens or np.abs(np.array(plain.logprobs) - logprobs).max() > 1e-3


def test_generation_of_a_batch_is_that_of_its_rows(llama: InterpretableModel) -> None:
    vector, front = extract(llama, [LONG], method="single"), single_by_hand(llama, LONG)[1]
    texts = ["oh", "the sky is blue today", "a bus came"]
    found = llama.generate(texts, [vector.at(1, 3.0), vector.at(1, -3.0), None], max_tokens=5)
    for text, made, strength in zip(texts, found, (3.0, -3.0, 0.0), strict=True):
        assert made.tokens == continued(llama, text, strength * front, 5)[0]


def test_a_vector_by_position_takes_no_other_place(llama: InterpretableModel) -> None:
    vector = extract(llama, [LONG], method="single")
    for at in ("last", "generated", 3):
        with pytest.raises(ValueError, match="each of the first 11 positions"):
            vector.at(1, at=at)
    assert list(vector.at([1, 2], at="first")) == ["layers.1", "layers.2"]
    with pytest.raises(ValueError, match="needs one direction per layer"):
        separation(llama, vector, PAIRS)
    assert SteeringVector({0: mx.ones(3)}).positions is None


def test_single_runs_every_block_once_and_reads_norms_of_real_tokens_only(model: InterpretableModel) -> None:
    ran: list[int] = []
    seen: list[tuple[int, int]] = []
    with tiny.by_hand(model.model.layers[0], lambda h: ran.append(h.shape[0]) or h):  # type: ignore[func-returns-value]
        vector = extract(model, [LONG], method="single", progress=lambda done, total: seen.append((done, total)))
    assert ran == ([1, 1] if model.name == "gemma2" else [2])  # whose rows are run one at a time
    assert seen[-1] == (2, 2)
    real = [streams(model, ids(text))[:, 1:] for text in (LONG.positive, LONG.negative)]
    expected = np.median(np.linalg.norm(np.concatenate(real, axis=1), axis=-1), axis=1)
    np.testing.assert_allclose(list(vector.residual_norms.values()), expected, rtol=1e-4)


def test_single_takes_no_read_and_no_more_memory_than_there_is(llama: InterpretableModel) -> None:
    with pytest.raises(ValueError, match="single reads every position: leave read= out"):
        extract(llama, [LONG], method="single", read="mean")
    with pytest.raises(ValueError, match="single takes no background set"):
        extract(llama, [LONG], method="single", background=["a"])
    with pytest.raises(MemoryError, match="single would take about .* fewer layers or a shorter pair"):
        extract(llama, [LONG], method="single", memory=1000)
    found = estimate(llama, [LONG], method="single")
    assert (found.texts, found.tokens, found.batches) == (2, 24 - 2, 1)
    assert found.kept_bytes >= 4 * 4 * 64 * 11
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    extract(llama, [LONG], method="single")
    assert mx.get_peak_memory() - before <= found.batch_bytes + found.kept_bytes


def test_mean_centring_takes_a_positive_side_and_a_background_alone(llama: InterpretableModel) -> None:
    texts = ["so good", "i like it", "thanks a lot"]
    vector = extract(llama, positive=texts, background=BACKGROUND, method="mean_centred")
    close(directions(vector), last_rows(llama, texts).mean(0) - last_rows(llama, BACKGROUND).mean(0), size_of(llama))
    assert (vector.info["positive"], vector.info["background"]) == (3, len(BACKGROUND))
    assert "negative" not in vector.info
    assert (vector.agreement, vector.reliability) == ({}, {})
    whole = extract(llama, positive=texts, negative=["no"], background=BACKGROUND, method="mean_centred")
    close(directions(vector), directions(whole), size_of(llama))
    with pytest.raises(TypeError, match="mean_difference needs a negative side"):
        extract(llama, positive=texts, background=BACKGROUND)
    with pytest.raises(ValueError, match="mean_centred needs a background set"):
        extract(llama, positive=texts, method="mean_centred")
    with pytest.raises(TypeError, match="takes positive= and negative= together"):
        extract(llama, negative=texts, background=BACKGROUND, method="mean_centred")


@pytest.mark.usefixtures("_registry")
def test_a_method_without_a_name_is_not_registered() -> None:
    def bare(given: Readings) -> np.ndarray:
        return given.difference

    for name in (bare, "", None, 3):
        with pytest.raises(TypeError, match=r"a method is registered by a name: @register\('name'\)"):
            methods.register(name)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("elsewhere", "here"),
    [("caa", "mean_difference"), ("DiffMean", "mean_difference"), ("actadd", "single"), ("repe", "pca_difference"),
     ("lda", "whitened"), ("logistic", "probe")],
)  # fmt: skip
def test_names_that_other_projects_use_lead_to_ours(elsewhere: str, here: str) -> None:
    with pytest.raises(ValueError, match=f"no method is called '{elsewhere}'. It is {here} here"):
        methods.find(elsewhere)


def test_single_is_a_method_like_the_others() -> None:
    assert methods.find("single").name == "single"
    with pytest.raises(ValueError, match="no method is called 'singel'. Nearest: single"):
        methods.find("singel")


def test_info_keeps_what_a_partial_sets_and_a_chat(llama: InterpretableModel, pocket: InterpretableModel) -> None:
    vector = extract(llama, PAIRS, method=functools.partial(methods.probe, C=np.float64(0.5)))
    assert (vector.info["method"], vector.info["parameters"]) == ("probe", {"C": 0.5})
    odd = extract(llama, PAIRS, method=functools.partial(lambda given, how: given.difference, how=len))
    assert odd.info["parameters"] == {"how": repr(len)}
    assert "parameters" not in extract(llama, PAIRS).info
    assert "chat" not in extract(llama, PAIRS).info
    asked = extract(pocket, [ContrastPair("How?", "Good.", "Bad.")], layers=2, chat=True)
    assert asked.info["chat"] is True
