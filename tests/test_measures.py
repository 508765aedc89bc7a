"""Intervals, dose–response, text statistics and nulls, against SciPy, plain loops and known truths."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mlxsteer import ContrastPair, InterpretableModel, PairSet, SteeringVector, datasets
from mlxsteer.measures import (
    Interval,
    bootstrap,
    max_statistic_p_values,
    null_p_value,
    orthogonal_complement,
    paired_difference,
    random_like,
    shuffled_labels,
    steerability,
    text_statistics,
)
from mlxsteer.measures import uncertainty as room

hypothesis_settings = settings(max_examples=40, deadline=None, derandomize=True)

samples = st.lists(st.floats(-100, 100).map(lambda x: round(x, 2)), min_size=2, max_size=30)


def median(rows: Any) -> Any:
    return np.median(rows, axis=-1)


# -- intervals ---------------------------------------------------------------------------------------------------------

POPULATIONS: dict[str, Callable[[np.random.Generator, int], Any]] = {  # each of mean 0
    "normal": lambda rng, n: rng.normal(0, 1, n),
    "skewed": lambda rng, n: rng.exponential(1, n) - 1,
    "bimodal": lambda rng, n: rng.choice([-2.0, 2.0], n) + rng.normal(0, 0.5, n),
}


@pytest.mark.parametrize("n", [64, pytest.param(128, marks=pytest.mark.full)])
@pytest.mark.parametrize("population", POPULATIONS)
def test_an_interval_holds_the_true_mean_as_often_as_it_says(population: str, n: int) -> None:
    rng = np.random.default_rng(0)
    sets = [POPULATIONS[population](rng, n) for _ in range(1000)]
    held = sum(not bootstrap(x, resamples=400, seed=i).excludes(0) for i, x in enumerate(sets))
    assert 920 <= held <= 970, held


def test_an_interval_of_another_statistic_holds_its_true_value_as_often() -> None:
    rng = np.random.default_rng(0)
    truth = math.log(2)
    sets = [rng.exponential(1, 64) for _ in range(400)]
    held = sum(not bootstrap(x, statistic=median, resamples=400, seed=i).excludes(truth) for i, x in enumerate(sets))
    assert 368 <= held <= 388, held


def test_a_difference_of_prompts_that_share_much_has_a_narrow_interval() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for i in range(400):
        shared = rng.normal(0, 10, 64)
        a, b = shared + rng.exponential(1, 64), shared + rng.normal(0, 1, 64)
        interval = paired_difference(a, b, resamples=400, seed=i)
        assert interval.value == pytest.approx(a.mean() - b.mean())
        assert interval.high - interval.low < 2  # 10·√(2/64)·4 = 7 if they were two sets of prompts
        held += not interval.excludes(1)
    assert 368 <= held <= 388, held
    assert str(paired_difference(a, b, seed=3)) == str(bootstrap(a - b, seed=3))


def test_bca_agrees_with_scipy() -> None:
    x = np.random.default_rng(1).lognormal(0, 1, 12)  # so few that bias and acceleration count
    for statistic in (median, lambda rows: np.mean(rows, axis=-1), lambda rows: np.std(rows, axis=-1)):
        ours = bootstrap(x, statistic=statistic, resamples=20_000, seed=0)
        theirs = stats.bootstrap(
            (x,), lambda rows, axis, of=statistic: of(rows), n_resamples=20_000, random_state=np.random.default_rng(0)
        ).confidence_interval
        np.testing.assert_allclose([ours.low, ours.high], theirs, atol=0.05 * (theirs.high - theirs.low))


def test_the_mean_has_the_bootstrap_t_interval() -> None:
    x = np.random.default_rng(2).exponential(1, 50)
    rng = np.random.default_rng(5)
    again = rng.choice(x, (20_000, 50))
    ts = (again.mean(axis=1) - x.mean()) / (again.std(axis=1, ddof=1) / math.sqrt(50))
    error = x.std(ddof=1) / math.sqrt(50)
    for level in (0.8, 0.95):
        low, high = x.mean() - error * np.quantile(ts, [(1 + level) / 2, (1 - level) / 2])
        ours = bootstrap(x, level=level, resamples=20_000)
        np.testing.assert_allclose([ours.low, ours.high], [low, high], atol=0.03 * (high - low))
        assert ours.level == level
        assert ours.high - x.mean() > x.mean() - ours.low  # towards the long tail


@hypothesis_settings
@given(samples, st.floats(0.1, 10), st.floats(-10, 10), st.integers(0, 2**40))
def test_intervals_move_with_the_values(values: list[float], scale: float, shift: float, seed: int) -> None:
    x = np.array(values)
    made = bootstrap(x, resamples=200, seed=seed)
    assert made.low <= made.high
    assert made.value == pytest.approx(x.mean())
    assert made == bootstrap(values, resamples=200, seed=seed)
    moved = bootstrap(scale * x + shift, resamples=200, seed=seed)
    if len(set(values)) > 3:  # with few values ties decide, and ties are broken by rounding
        np.testing.assert_allclose(
            [moved.low, moved.high], [scale * made.low + shift, scale * made.high + shift], rtol=1e-6, atol=1e-6
        )


def test_a_wider_level_or_another_seed_gives_another_interval() -> None:
    x = np.random.default_rng(0).normal(size=64)
    some = [bootstrap(x, level=level) for level in (0.5, 0.9, 0.99)]
    assert some[0].low > some[1].low > some[2].low
    assert some[0].high < some[1].high < some[2].high
    assert bootstrap(x, seed=1) != bootstrap(x, seed=2)


def test_what_is_drawn_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).exponential(size=100)
    before = [bootstrap(x), bootstrap(x, statistic=median)]
    monkeypatch.setattr(room, "_AT_ONCE", 1000)
    assert [bootstrap(x), bootstrap(x, statistic=median)] == before


@pytest.mark.parametrize("base", [0.0, 0.1, -1e6])
@pytest.mark.parametrize("ones", [1, 2, 3, 48])
def test_values_nearly_all_equal_have_a_finite_interval(ones: int, base: float) -> None:
    made = bootstrap([base + 1.0] * ones + [base] * (49 - ones), resamples=1000)  # means of 49 are rounded
    assert -0.1 <= made.low - base < ones / 49 < made.high - base <= 1.1


@pytest.mark.parametrize("value", [0.0, 0.1, -1e9])
def test_equal_values_have_an_interval_without_width(value: float) -> None:
    for statistic in ("mean", median):
        made = bootstrap([value] * 7, statistic=statistic)  # type: ignore[arg-type]
        assert made.low == made.high == made.value == pytest.approx(value)


def test_an_interval_is_shown_with_the_digits_that_it_supports() -> None:
    assert str(Interval(1.234, 0.98, 1.45)) == "+1.23 [+0.98, +1.45]"
    assert str(Interval(-0.0031, -0.0046, -0.0016)) == "-0.0031 [-0.0046, -0.0016]"
    assert str(Interval(123.4, 90, 160)) == "+123.40 [+90.00, +160.00]"
    assert str(Interval(0, 0, 0)) == "+0.00 [+0.00, +0.00]"
    assert str(Interval(0, -math.inf, 1)) == "+0.00 [-inf, +1.00]"
    made = Interval(1.0, 0.5, 1.5)
    assert [made.excludes(x) for x in (0.4, 0.5, 1.5, 1.6)] == [True, False, False, True]
    with pytest.raises(FrozenInstanceError):
        made.value = 2  # type: ignore[misc]


GOOD = [1.0, 2.0, 3.0]
INTERVAL_REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "none": (lambda: bootstrap([]), ValueError, "values: an interval needs 2 prompts or more, and there are none"),
    "one": (lambda: bootstrap([1.0]), ValueError, "2 prompts or more, and there is 1"),
    "nan": (lambda: bootstrap([1.0, math.nan]), ValueError, "values: 1 of 2 is NaN or infinite"),
    "inf": (lambda: bootstrap([math.inf, 1, math.nan]), ValueError, "values: 2 of 3 are NaN or infinite"),
    "matrix": (lambda: bootstrap(np.ones((3, 4))), ValueError, r"\(n,\), not an array of shape \(3, 4\)"),
    "level": (lambda: bootstrap(GOOD, level=95), ValueError, "level is between 0 and 1, such as 0.95, not 95"),
    "few": (lambda: bootstrap(GOOD, resamples=39), ValueError, "resamples=39 are too few for level 0.95: 40 at least"),
    "half": (lambda: bootstrap(GOOD, resamples=99.5), TypeError, "whole number, not 99.5"),  # type: ignore[arg-type]
    "name": (lambda: bootstrap(GOOD, statistic="median"), ValueError, "'mean' or a callable"),  # type: ignore[arg-type]
    "no function": (lambda: bootstrap(GOOD, statistic=3), TypeError, "'mean' or a callable"),  # type: ignore[arg-type]
    "axis": (lambda: bootstrap(GOOD, statistic=np.median), ValueError, r"gave shape \(\). NumPy's own need axis=-1"),
    "nan out": (lambda: bootstrap(GOOD, statistic=lambda r: r[:, 0] * math.nan), ValueError, "gave a NaN"),
    "seed": (lambda: bootstrap(GOOD, seed=-1), ValueError, "a seed is a whole number from 0 on, not -1"),
    "seed kind": (lambda: bootstrap(GOOD, seed=None), TypeError, "from 0 on, not None"),  # type: ignore[arg-type]
    "unpaired": (lambda: paired_difference(GOOD, [1, 2]), ValueError, r"same prompts, and .* \(3,\) and \(2,\)"),
    "broadcast": (lambda: paired_difference(GOOD, 1.0), ValueError, r"same prompts, and .* \(3,\) and \(\)"),
    "b": (lambda: paired_difference([1, math.inf], [1, math.inf]), ValueError, "a: 1 of 2 is NaN"),
}


@pytest.mark.parametrize("name", INTERVAL_REFUSED)
def test_intervals_refuse_what_has_none(name: str) -> None:
    made, kind, said = INTERVAL_REFUSED[name]
    with pytest.raises(kind, match=said):
        made()


# -- dose–response -----------------------------------------------------------------------------------------------------


@hypothesis_settings
@given(
    st.lists(st.integers(-3, 3), min_size=2, max_size=7).filter(lambda s: len(set(s)) > 1),
    st.integers(2, 5),
    st.integers(0, 2**20),
    st.booleans(),
)
def test_slopes_fits_and_ranks_are_scipys(strengths: list[int], prompts: int, seed: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    effect = (
        rng.integers(-2, 3, (len(strengths), prompts)) * 1.0 if ties else rng.normal(size=(len(strengths), prompts))
    )
    made = steerability(effect, strengths, resamples=100)  # type: ignore[arg-type]
    for p in range(prompts):
        if np.ptp(effect[:, p]) == 0:
            assert made.slopes[p] == made.fits[p] == made.rank_correlations[p] == 0
            continue
        line = stats.linregress(strengths, effect[:, p])
        assert made.slopes[p] == pytest.approx(line.slope, abs=1e-9)
        assert made.fits[p] == pytest.approx(line.rvalue**2, abs=1e-9)
        assert made.rank_correlations[p] == pytest.approx(stats.spearmanr(strengths, effect[:, p])[0], abs=1e-9)


def test_steerability_sums_up_the_prompts() -> None:
    strengths = [-1.0, 0.0, 1.0, 2.0]
    slopes = np.array([2.0, 1.0, 0.0, -0.5])
    effect = np.outer(strengths, slopes) + np.array([5.0, 6.0, 0.1, 8.0])
    made = steerability(effect, strengths)
    np.testing.assert_allclose(made.slopes, slopes, atol=1e-12)
    np.testing.assert_allclose(made.fits, [1, 1, 0, 1])
    np.testing.assert_allclose(made.rank_correlations, [1, 1, 0, -1])
    assert made.anti_steerable == 0.25
    np.testing.assert_allclose(made.mean_curve, effect.mean(axis=1))
    assert made.mean_slope == bootstrap(made.slopes)
    assert steerability(effect, strengths, level=0.5, resamples=50, seed=3).mean_slope == bootstrap(
        made.slopes, level=0.5, resamples=50, seed=3
    )
    assert str(made) == f"slope {made.mean_slope}, R² 0.75, rank correlation +0.25, 25% of 4 prompts anti-steerable"
    backwards = steerability(effect[::-1], strengths[::-1])
    np.testing.assert_allclose(backwards.slopes, slopes, atol=1e-12)
    bent = steerability(np.outer([0.0, 0.0, 0.0, 1.0], [1.0, 2.0]), strengths)
    assert (bent.fits < 0.7).all()  # a step is no line


@pytest.mark.parametrize("constant", [0.0, 0.1, 1 / 3, -7.7])
def test_a_prompt_that_is_not_steered_is_not_anti_steerable(constant: float) -> None:
    made = steerability(np.full((6, 40), constant), [-0.3, 0.1, 0.2, 0.7, 0.8, 1.1])  # rounds to a slope of -1e-33
    assert made.anti_steerable == 0
    assert (made.slopes == 0).all()


STEERABILITY_REFUSED: dict[str, tuple[Any, Any, str]] = {
    "whole sweep": (np.zeros((2, 3, 4)), [0, 1, 2], r"sweep.effect\[i\] of one layer, not of shape \(2, 3, 4\)"),
    "strengths": (np.zeros((3, 4)), [0, 1], r"has 3 strengths on its first axis, and strengths is of shape \(2,\)"),
    "one strength": (np.zeros((2, 4)), [1, 1], "2 different strengths"),
    "interrupted": ([[0, 1, 2], [1, math.nan, math.nan]], [0, 1], "2 of 3 prompts have a NaN or an infinity; was the"),
    "nan strength": (np.zeros((2, 4)), [0, math.nan], "a strength is a finite number"),
    "one prompt": ([[0.0], [1.0]], [0, 1], "2 prompts or more, and there is 1"),
}


@pytest.mark.parametrize("name", STEERABILITY_REFUSED)
def test_steerability_refuses_what_has_no_slopes(name: str) -> None:
    effect, strengths, said = STEERABILITY_REFUSED[name]
    with pytest.raises(ValueError, match=said):
        steerability(effect, strengths)


# -- text --------------------------------------------------------------------------------------------------------------


def plain_longest_repeat(tokens: list[int]) -> int:
    for length in range(len(tokens) - 1, 0, -1):
        seen = Counter(tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1))
        if max(seen.values()) > 1:
            return length
    return 0


@hypothesis_settings
@given(st.lists(st.integers(0, 3), min_size=2, max_size=25))
def test_text_statistics_are_those_of_plain_loops(tokens: list[int]) -> None:
    made = text_statistics([tokens])
    assert made.distinct_1 == len(set(tokens)) / len(tokens)
    assert made.distinct_2 == len(set(pairwise(tokens))) / (len(tokens) - 1)
    assert made.longest_repeat == plain_longest_repeat(tokens)
    assert made.entropy == pytest.approx(stats.entropy(list(Counter(tokens).values())))
    assert made.length == len(tokens)


def test_text_statistics_tell_loops_from_text() -> None:
    assert text_statistics([[7, 1, 2, 1, 2, 1, 2]]).longest_repeat == 4  # as the docstring says
    loop, text = text_statistics([[4, 5, 6] * 20]), text_statistics([list(range(60))])
    assert (loop.longest_repeat, text.longest_repeat) == (57, 0)
    assert (loop.distinct_1, text.distinct_1) == (3 / 60, 1)
    assert (loop.distinct_2, text.distinct_2) == (3 / 59, 1)
    assert loop.entropy == pytest.approx(math.log(3))
    assert text.entropy == pytest.approx(math.log(60))
    assert text_statistics([[9]]).entropy == 0


def test_text_statistics_are_means_over_texts() -> None:
    made = text_statistics([[1, 1, 1, 1], mx.array([1, 2]), np.array([3]), []])  # type: ignore[list-item]
    assert made.distinct_1 == pytest.approx((1 / 4 + 1 + 1) / 3)
    assert made.distinct_2 == pytest.approx((1 / 3 + 1) / 2)
    assert made.longest_repeat == 3 / 4
    assert made.entropy == pytest.approx(math.log(2) / 3)
    assert made.length == 7 / 4
    empty = text_statistics([[]])
    assert (empty.length, empty.longest_repeat) == (0, 0)
    assert all(math.isnan(x) for x in (empty.distinct_1, empty.distinct_2, empty.entropy))


def test_text_statistics_refuse_what_are_no_token_ids() -> None:
    with pytest.raises(ValueError, match="there are no texts"):
        text_statistics([])
    with pytest.raises(TypeError, match="not a text: encode it first"):
        text_statistics("la la")  # type: ignore[arg-type]
    for wrong in (["la la"], [1, 2], [[1.5]], [[[1], [2]]]):
        with pytest.raises(TypeError, match="a text is a list of token ids here, not"):
            text_statistics(wrong)  # type: ignore[arg-type]


# -- null vectors and labels -------------------------------------------------------------------------------------------


def a_vector(layers: tuple[int, ...] = (0, 3, 4), width: int = 48, positions: int | None = None) -> SteeringVector:
    shape = (width,) if positions is None else (positions, width)
    own = {layer: np.random.default_rng(layer).normal(size=shape) * 10.0 ** min(layer, 4) for layer in layers}
    info = {"model": "m", "architecture": "llama", "quantization": None, "layers": 6, "hidden_size": width,
            "method": "pca", "agreement": {"0": 0.3}, "reliability": {"0": 0.9}, "data": "a", "pairs": 12}  # fmt: skip
    directions = {layer: mx.array(direction.astype(np.float32)) for layer, direction in own.items()}
    return SteeringVector(directions, "layers.{layer}.mlp", {layer: layer + 1.0 for layer in layers}, info)


def cosine(a: mx.array, b: mx.array) -> float:
    x, y = np.array(a, np.float64).ravel(), np.array(b, np.float64).ravel()
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


@pytest.mark.parametrize("positions", [None, 3])
@pytest.mark.parametrize("null", [random_like, orthogonal_complement])
def test_null_vectors_are_like_the_vector_but_for_their_direction(null: Any, positions: int | None) -> None:
    v = a_vector(positions=positions)
    made = null(v, seed=5)
    assert (made.layers, made.width, made.positions, made.site) == (v.layers, v.width, v.positions, v.site)
    assert made.residual_norms == v.residual_norms
    name = {random_like: "random", orthogonal_complement: "orthogonal"}[null]
    identity = {"model": "m", "architecture": "llama", "quantization": None, "layers": 6, "hidden_size": 48}
    assert made.info == {**identity, "method": name, "seed": 5}
    for layer in v:
        own, drawn = np.array(v[layer]), np.array(made[layer])
        np.testing.assert_allclose(np.linalg.norm(drawn, axis=-1), np.linalg.norm(own, axis=-1), rtol=1e-6)
        assert abs(cosine(v[layer], made[layer])) < 0.6
        assert mx.array_equal(made[layer], null(v, seed=5)[layer])
        assert abs(cosine(made[layer], null(v, seed=6)[layer])) < 0.6
        if null is orthogonal_complement:
            assert np.abs(np.sum(drawn * own, axis=-1) / np.sum(own * own, axis=-1)).max() < 1e-6
    assert abs(cosine(made[0], made[3])) < 0.6
    assert mx.array_equal(made[3], null(a_vector((3,), positions=positions), seed=5)[3])


def test_random_directions_point_everywhere() -> None:
    v = SteeringVector(dict.fromkeys(range(40), mx.eye(16)[0]))
    cosines = [
        cosine(v[layer], drawn[layer]) for seed in range(10) for drawn in [random_like(v, seed=seed)] for layer in v
    ]
    # ⟨u, w⟩ of uniform u: (cos + 1) / 2 is Beta((D − 1) / 2, (D − 1) / 2)
    assert stats.kstest((np.array(cosines) + 1) / 2, stats.beta(7.5, 7.5).cdf).pvalue > 0.01


def test_a_zero_direction_has_zero_nulls() -> None:
    zero = SteeringVector({0: mx.zeros(4), 1: mx.ones(4)})
    for null in (random_like, orthogonal_complement):
        assert null(zero, seed=0).norms == pytest.approx({0: 0, 1: 2})


def test_null_vectors_belong_to_the_model(pocket: InterpretableModel) -> None:
    width = pocket.model.args.hidden_size
    v = SteeringVector({1: mx.ones(width)}, residual_norms={1: 2.0}, info={**pocket.identity, "hidden_size": width})
    for null in (random_like, orthogonal_complement):
        made = null(v, seed=0)
        made.check(pocket)
        assert made.at(1, 2.0, unit="residual")


def test_null_vectors_refuse_what_they_cannot_be_drawn_like() -> None:
    for null in (random_like, orthogonal_complement):
        with pytest.raises(TypeError, match="like a SteeringVector, not like 'v'"):
            null("v", seed=0)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="a seed is a whole number from 0 on"):
            null(a_vector(), seed=-3)
    with pytest.raises(ValueError, match="nothing orthogonal"):
        orthogonal_complement(SteeringVector({0: mx.ones(1)}), seed=0)


def test_shuffled_labels_swap_half_of_every_split() -> None:
    pairs = datasets.load("refusal")
    made = shuffled_labels(pairs, seed=1)
    assert isinstance(made, PairSet)
    assert (made.name, made.splits, len(made)) == (pairs.name, pairs.splits, len(pairs))
    swapped = []
    for before, after in zip(pairs, made, strict=True):
        swap = replace(before, positive=before.negative, negative=before.positive)
        assert after in (before, swap)
        swapped.append(after == swap)
    for split in pairs.splits:
        rows = [swap for pair, swap in zip(pairs, swapped, strict=True) if pair.split == split]
        assert sum(rows) == len(rows) // 2
    assert made == shuffled_labels(list(pairs), seed=1)
    assert made != shuffled_labels(pairs, seed=2)


def test_shuffled_labels_keep_all_else_of_a_pair() -> None:
    chat = [{"role": "user", "content": "Hi"}]
    pairs = [ContrastPair("p", f"a{i}", f"b{i}", None, True) for i in range(3)]
    pairs += [ContrastPair("", f"c{i}", f"d{i}", "train", False, chat) for i in range(1)]  # type: ignore[arg-type]
    made = shuffled_labels(pairs, seed=0)
    assert sum(a != b for a, b in zip(pairs, made, strict=True)) == 1  # of 3 one, of 1 none
    assert [(p.prompt, p.split, p.chat, p.messages) for p in made] == [
        (p.prompt, p.split, p.chat, p.messages) for p in pairs
    ]
    with pytest.raises(ValueError, match="no contrast pairs"):
        shuffled_labels([], seed=0)
    with pytest.raises(TypeError, match="contrast pairs are a list"):
        shuffled_labels("refusal", seed=0)  # type: ignore[arg-type]


def test_every_pair_is_swapped_in_half_of_the_shuffles() -> None:
    pairs = [ContrastPair("p", f"a{i}", f"b{i}") for i in range(10)]
    swaps = sum(
        np.array([a != b for a, b in zip(pairs, shuffled_labels(pairs, seed=s), strict=True)]) for s in range(400)
    )
    assert (np.abs(swaps - 200) < 45).all()  # 10 is a standard deviation


# -- p-values ----------------------------------------------------------------------------------------------------------


def test_random_vectors_raise_few_false_alarms() -> None:
    """100 studies of a vector that means nothing: the effect is what it has along a readout."""
    v = a_vector(tuple(range(100)), 32)
    readout = np.random.default_rng(3).normal(size=32)
    effects = []
    for seed in range(40):
        drawn = random_like(v, seed=seed)
        effects.append([np.array(drawn[layer]) @ readout for layer in v])
    observed, nulls = np.array(effects[0]), np.array(effects[1:])
    alarms = sum(null_p_value(observed[study], nulls[:, study]) < 0.05 for study in range(100))
    assert 0 < alarms <= 10
    found = [null_p_value(3 * v.norms[layer], nulls[:, layer]) for layer in v]  # and a vector that means something
    assert np.mean(np.array(found) < 0.05) > 0.5


def test_looking_often_raises_few_false_alarms() -> None:
    rng = np.random.default_rng(0)
    plain = corrected = 0
    for _ in range(200):
        draws = rng.normal(size=(100, 20)) + rng.normal(size=(100, 1))
        observed, nulls = draws[0], draws[1:]
        plain += min(null_p_value(x, nulls[:, i]) for i, x in enumerate(observed)) < 0.05
        corrected += max_statistic_p_values(observed, nulls).min() < 0.05
    assert plain > 40
    assert 0 < corrected <= 18
    observed = np.zeros(20)
    observed[7] = 9.0
    assert np.flatnonzero(max_statistic_p_values(observed, nulls) < 0.05).tolist() == [7]


@hypothesis_settings
@given(st.integers(1, 5), st.integers(1, 30), st.integers(0, 2**20))
def test_p_values_count_the_draws_that_do_as_much(looks: int, draws: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    observed, nulls = rng.integers(0, 4, looks), rng.integers(0, 4, (draws, looks))  # with ties
    corrected = max_statistic_p_values(observed, nulls)
    assert corrected.shape == (looks,)
    for j in range(looks):
        best = sum(1 for draw in nulls.tolist() if max(draw) >= observed[j])
        assert corrected[j] == (1 + best) / (1 + draws)
        alone = null_p_value(float(observed[j]), nulls[:, j].tolist())
        assert alone == (1 + sum(x >= observed[j] for x in nulls[:, j])) / (1 + draws)
        assert corrected[j] >= alone


def test_p_values_are_never_zero() -> None:
    assert null_p_value(9, [1, 2, 3]) == 0.25
    assert null_p_value(2, [1, 2, 3]) == 0.75
    assert null_p_value(0, [1, 2, 3]) == 1
    assert null_p_value(1, [0] * 19) == 0.05


P_REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no nulls": (lambda: null_p_value(1, []), r"nulls: one number per draw, \(n,\), not an array of shape \(0,\)"),
    "nan null": (lambda: null_p_value(1, [1, math.nan]), "nulls: 1 of 2 is NaN"),
    "nan": (lambda: null_p_value(math.nan, [1]), "observed is a finite number"),
    "shapes": (lambda: max_statistic_p_values([1, 2], [[1, 2, 3]]), r"these are \(2,\) and \(1, 3\)"),
    "turned": (lambda: max_statistic_p_values([1, 2], [1, 2]), r"these are \(2,\) and \(2,\)"),
    "no draws": (lambda: max_statistic_p_values([1, 2], np.zeros((0, 2))), "1 or more of each"),
    "no looks": (lambda: max_statistic_p_values([], np.zeros((3, 0))), "1 or more of each"),
    "nan look": (lambda: max_statistic_p_values([math.nan], [[1]]), "observed: 1 of 1 is NaN"),
}


@pytest.mark.parametrize("name", P_REFUSED)
def test_p_values_refuse_what_has_none(name: str) -> None:
    made, said = P_REFUSED[name]
    with pytest.raises(ValueError, match=said):
        made()
