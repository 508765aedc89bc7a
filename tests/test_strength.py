"""Solving for a strength: against curves whose answer is known, and on models against a measurement of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_extraction import PAIRS, tokenizer

from mlxsteer import InterpretableModel, SteeringVector, Strength, datasets, extract, strength_for
from mlxsteer.measures import Divergence, kl, perplexity
from mlxsteer.strength import BUDGETS, measured, solved, target_of

Curve = Callable[[float], float]


def kept_promises(curve: Curve, found: Strength, target: float, tolerance: float = 0.05) -> None:
    """What holds of every answer, whatever the curve."""
    assert 1 <= len(found.trials) <= 8
    assert (found.value, found.reached) in found.trials
    assert found.maximum == max(reached for _, reached in found.trials)
    assert found.hit == (abs(found.reached - target) <= tolerance * target)
    assert all(np.isfinite(strength) and 0 < strength <= 64 for strength, _ in found.trials)
    if found.reached > target * (1 + tolerance):  # nothing below was tried, and this is the nearest
        assert found.reached == min(reached for _, reached in found.trials)
    elif not found.hit:
        assert found.reached == max(reached for _, reached in found.trials if reached <= target * (1 + tolerance))


# A divergence in the strength c of a steering begins as a·c² and ends at a plateau m: where the model says something
# else altogether. At strengths in residual norms a is from a few hundredths to a few nats, m some nats, and budgets are
# a small part of m. In between it saturates smoothly, or gives way at some strength c₀ as a sigmoid in log-log.
scale = st.floats(0.05, 10)
plateau = st.floats(3, 12)
target = st.floats(0.02, 0.8)


@given(a=scale, target=target)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_square_is_solved_in_four(a: float, target: float) -> None:
    found = solved(lambda c: a * c**2, "kl_mean", target)
    assert found.hit
    assert len(found.trials) <= 4
    assert found.value == pytest.approx(np.sqrt(target / a), rel=0.026)


SATURATING: dict[str, Callable[[float, float, float], float]] = {
    "exponential": lambda a, m, c: m * (1 - np.exp(-a * c**2 / m)),
    "rational": lambda a, m, c: a * c**2 / (1 + a * c**2 / m),
    "hyperbolic tangent": lambda a, m, c: m * np.tanh(a * c**2 / m),
}


@pytest.mark.parametrize("name", SATURATING)
@given(a=scale, m=plateau, target=target)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_a_saturating_square_is_solved_in_five(name: str, a: float, m: float, target: float) -> None:
    def curve(c: float) -> float:
        return float(SATURATING[name](a, m, c))

    found = solved(curve, "kl_mean", target)
    kept_promises(curve, found, target)
    assert found.hit
    assert len(found.trials) <= 5


@given(k=st.floats(1.5, 2.6), middle=st.floats(0.5, 5), m=plateau, target=target)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_a_sigmoid_in_logarithms_is_solved(k: float, middle: float, m: float, target: float) -> None:
    def curve(c: float) -> float:
        return m * (c / middle) ** k / (1 + (c / middle) ** k)

    found = solved(curve, "kl_mean", target)
    kept_promises(curve, found, target)
    assert found.hit
    assert len(found.trials) <= 6
    ratio = target / (m - target)
    assert found.value == pytest.approx(middle * ratio ** (1 / k), rel=0.06)


def test_most_curves_take_five() -> None:
    rng, counts = np.random.default_rng(0), []
    for _ in range(300):
        a, m, goal = np.exp(rng.uniform(np.log([0.05, 3, 0.02]), np.log([10, 12, 0.8])))
        k, middle = rng.uniform(2, 4), np.exp(rng.uniform(np.log(0.5), np.log(5)))
        curves: list[Curve] = [
            lambda c, k=k, middle=middle, m=m: m * (c / middle) ** k / (1 + (c / middle) ** k),  # type: ignore[misc]
            lambda c, a=a, k=k, middle=middle, m=m: (
                min(a, 0.5) * c**2 + m * (c / middle) ** k / (1 + (c / middle) ** k)
            ),  # type: ignore[misc]
        ]
        counts += [len(found.trials) for curve in curves if (found := solved(curve, "kl_mean", goal)).hit]
    assert len(counts) >= 0.99 * 600
    assert np.mean(np.array(counts) <= 5) >= 0.95
    assert np.mean(counts) < 3.9  # a bisection from 0 to 10 takes about 8


@given(
    a=scale, m=plateau, goal=st.floats(0.005, 2), noise=st.floats(0, 0.3), waves=st.floats(0, 0.9),
    seed=st.integers(0, 999), first=st.one_of(st.none(), st.floats(1e-4, 60)),
)  # fmt: skip
@example(a=1.0, m=5.0, goal=0.1, noise=0.0, waves=0.0, seed=0, first=1e-4)
@example(a=1.0, m=5.0, goal=0.1, noise=0.0, waves=0.9, seed=0, first=60.0)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_promises_are_kept_on_noisy_and_wavy_curves_from_anywhere(
    a: float, m: float, goal: float, noise: float, waves: float, seed: int, first: float | None
) -> None:
    rng = np.random.default_rng(seed)

    def curve(c: float) -> float:
        smooth = m * (1 - np.exp(-a * c**2 / m)) * (1 + waves * np.sin(5 * c))
        return float(smooth * np.exp(noise * rng.standard_normal()))

    kept_promises(curve, solved(curve, "kl_mean", goal, first=first), goal)


@pytest.mark.parametrize("first", [0.02, 0.1, 3.0, 30.0])
def test_a_first_guess_far_off_costs_a_few_more(first: float) -> None:
    def curve(c: float) -> float:
        return 6 * (1 - np.exp(-0.8 * c**2 / 6))

    found = solved(curve, "kl_mean", 0.3, first=first)
    assert found.trials[0][0] == first
    assert found.hit
    assert len(found.trials) <= 6


@given(m=st.floats(0.001, 0.9), a=st.floats(0.05, 10))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_target_out_of_reach_is_said_with_the_maximum(m: float, a: float) -> None:
    found = solved(lambda c: m * (1 - np.exp(-a * c**2)), "kl_mean", 1.0)
    assert not found.hit
    assert found.reached == found.maximum <= m < 1
    assert found.maximum >= 0.9 * m
    assert f"1 is out of reach, the maximum found was {found.maximum:.3g}" in str(found)
    assert str(found).startswith(f"{found.value:.4g} residual norms: kl_mean {found.reached:.3g}; ")


def test_nothing_stronger_than_allowed_is_tried() -> None:
    tried: list[float] = []
    found = solved(lambda c: tried.append(c) or 0.01 * c**2, "kl_mean", 1.0, strongest=4.0)  # type: ignore[func-returns-value]
    assert max(tried) == found.value == pytest.approx(4.0)
    assert not found.hit
    assert "the maximum found was 0.16" in str(found)
    flat = solved(lambda c: 0.0, "kl_mean", 0.5)
    assert (flat.hit, flat.reached, flat.maximum) == (False, 0.0, 0.0)
    assert len(flat.trials) <= 4  # that it does nothing is seen soon


def test_where_everything_exceeds_the_target_the_least_is_given() -> None:
    found = solved(lambda c: 9.0 + c, "kl_mean", 0.1)
    assert not found.hit
    assert found.reached == min(reached for _, reached in found.trials) < found.trials[0][1]
    assert "0.1 was not met in 8 evaluations" in str(found)
    assert "out of reach" not in str(found)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_model_that_overflows_has_given_way(broken: float) -> None:
    for edge in (0.1, 0.25, 0.35, 2.0):

        def curve(c: float, edge: float = edge) -> float:
            return c**2 if c < edge else broken

        found = solved(curve, "kl_mean", 0.1)
        assert found.reached <= 0.105  # never what broke
        assert found.hit == (edge > 0.32)
        assert np.isfinite(found.value)
    assert not solved(lambda c: broken, "kl_mean", 0.1).hit


def test_a_perplexity_ratio_counts_from_one() -> None:
    found = solved(lambda c: 1 + 0.4 * c**2, "perplexity_ratio", 1.3)
    assert found.hit
    assert found.reached == pytest.approx(1.3, rel=0.05)
    assert len(found.trials) <= 4


def test_a_strength_is_a_number_and_says_how_it_came_about() -> None:
    found = Strength(0.8, "kl_mean", 0.1, 0.098, True, ((0.5, 0.04), (0.8, 0.098)))
    assert float(found) == 0.8
    assert found.maximum == 0.098
    assert str(found) == "0.8 residual norms: kl_mean 0.098, in 2 evaluations"
    assert "vectors" in str(Strength(0.8, "kl_mean", 0.1, 0.098, True, ((0.8, 0.098),), "raw"))


# -- on models ---------------------------------------------------------------------------------------------------------

PROMPTS = ["the food was", "a", "rain again", "we."]


@pytest.fixture(scope="module")
def llama() -> InterpretableModel:
    return InterpretableModel(tiny.build("llama"), tokenizer())


@pytest.fixture(scope="module")
def vector(llama: InterpretableModel) -> SteeringVector:
    return extract(llama, PAIRS, progress=False)


@pytest.mark.full
def test_the_bundled_model_is_steered_at_a_divergence_that_a_measurement_confirms(pocket: InterpretableModel) -> None:
    pairs = [pair for pair in datasets.load("pocket/sentiment") if pair.split == "train"][:8]
    vector, prompts = extract(pocket, pairs, layers=[4, 5], progress=False), datasets.neutral(pocket)[:4]
    found = strength_for(pocket, vector, 5, kl=0.1, neutral=prompts, tokens=8)
    assert found.hit
    assert len(found.trials) <= 5
    assert (found.measure, found.target, found.unit) == ("kl_mean", 0.1, "residual")
    confirmed = kl(pocket, vector.at(5, found.value, -1, unit="residual"), prompts, tokens=8)
    assert confirmed.mean == pytest.approx(0.1, rel=0.051)
    assert confirmed.mean == pytest.approx(found.reached, rel=1e-3)


@pytest.mark.parametrize(
    ("given", "steering"),
    [
        ({"kl": 0.02}, lambda v, s: v.at(1, s, -1, unit="residual")),
        ({"kl": 0.02, "at": "all"}, lambda v, s: v.at(1, s, "all", unit="residual")),
        ({"budget": {"kl_p95": 0.1}, "at": "last"}, lambda v, s: v.at(1, s, "last", unit="residual")),
        ({"budget": {"kl_mean": 0.02}, "unit": "raw"}, lambda v, s: v.at(1, s, -1)),
        ({"kl": 0.03, "layers": [1, 2]}, lambda v, s: v.at([1, 2], s, -1, unit="residual")),
        ({"kl": 0.03, "layers": {0: 1.0, 2: 0.5}}, lambda v, s: v.at({0: s, 2: 0.5 * s}, at=-1, unit="residual")),
    ],
    ids=["kl", "all", "p95", "raw", "two layers", "relative"],
)
def test_the_strength_spends_its_budget(
    llama: InterpretableModel, vector: SteeringVector, given: dict[str, Any], steering: Any
) -> None:
    arguments = {"layers": 1, "neutral": PROMPTS, "tokens": 3, **given}
    found = strength_for(llama, vector, arguments.pop("layers"), **arguments)
    assert found.hit, str(found)
    spent = measured(kl(llama, steering(vector, found.value), PROMPTS, tokens=3), found.measure)
    assert spent == pytest.approx(found.target, rel=0.051)
    assert found.unit == given.get("unit", "residual")


def test_the_other_side_has_its_own_strength(llama: InterpretableModel, vector: SteeringVector) -> None:
    there, back = (strength_for(llama, v, 1, kl=0.02, neutral=PROMPTS, tokens=3) for v in (vector, -vector))
    assert there.hit
    assert back.hit
    assert there.value != back.value
    spent = kl(llama, vector.at(1, -back.value, -1, unit="residual"), PROMPTS, tokens=3)
    assert spent.mean == pytest.approx(back.reached, rel=1e-3)


def test_tolerance_evaluations_and_the_strongest_are_kept(llama: InterpretableModel, vector: SteeringVector) -> None:
    arguments: dict[str, Any] = {"kl": 0.02, "neutral": PROMPTS, "tokens": 3}
    close = strength_for(llama, vector, 1, tolerance=0.001, **arguments)
    assert close.reached == pytest.approx(0.02, rel=0.001)
    assert len(strength_for(llama, vector, 1, tolerance=1e-9, evaluations=2, **arguments).trials) == 2
    weak = strength_for(llama, vector, 1, strongest=0.05, **arguments)
    assert max(strength for strength, _ in weak.trials) == pytest.approx(0.05)
    assert not weak.hit
    assert "out of reach, the maximum found was" in str(weak)


def test_chats_are_measured_as_chats(pocket: InterpretableModel) -> None:
    vector = SteeringVector({4: mx.array(np.random.default_rng(0).standard_normal(256).astype(np.float32))},
                            residual_norms={4: 200.0})  # fmt: skip
    arguments: dict[str, Any] = {"tokens": 2, "evaluations": 1}
    asked = ["Hello!"]
    chats = [[{"role": "user", "content": text}] for text in asked]
    for budget in ({"kl_mean": 0.5}, {"perplexity_ratio": 1.5}):
        as_chats = strength_for(pocket, vector, 4, budget=budget, neutral=chats, **arguments)
        told = strength_for(pocket, vector, 4, budget=budget, neutral=asked, chat=True, **arguments)
        np.testing.assert_allclose(told.trials, as_chats.trials, rtol=1e-4)
        plain = strength_for(pocket, vector, 4, budget=budget, neutral=asked, **arguments)
        assert plain.trials[0][1] != pytest.approx(told.trials[0][1], rel=1e-3)


def test_a_perplexity_is_that_of_texts_generated_with_one_seed(
    llama: InterpretableModel, vector: SteeringVector
) -> None:
    found = strength_for(llama, vector, 1, budget={"perplexity_ratio": 1.2}, neutral=PROMPTS, tokens=4, seed=3,
                         evaluations=3)  # fmt: skip
    sampled: dict[str, Any] = {"max_tokens": 4, "temp": 1.0, "seed": 3}
    base = perplexity(llama, llama.generate(PROMPTS, **sampled))
    for strength, ratio in found.trials:
        steering = vector.at(1, strength, -1, unit="residual")
        assert perplexity(llama, llama.generate(PROMPTS, steering, **sampled)) / base == pytest.approx(ratio, rel=1e-4)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "none": ({"kl": None}, ValueError, "a budget is one of kl_mean, kl_p95, perplexity_ratio .* not nothing"),
    "an empty one": ({"kl": None, "budget": {}}, ValueError, "not nothing"),
    "two": ({"kl": None, "budget": {"kl_mean": 1, "kl_p95": 1}}, ValueError, "not kl_mean=1, kl_p95=1"),
    "both ways": ({"budget": {"kl_p95": 1}}, ValueError, "not kl_mean=0.1, kl_p95=1"),
    "the same twice": ({"budget": {"kl_mean": 1}}, ValueError, "not kl_mean=1"),
    "unknown": ({"kl": None, "budget": {"kl_median": 1}}, ValueError, "not kl_median=1"),
    "zero": ({"kl": 0}, ValueError, "the budget of kl_mean is above 0, not 0"),
    "negative": ({"kl": -0.1}, ValueError, "above 0, not -0.1"),
    "no loss": ({"kl": None, "budget": {"perplexity_ratio": 1.0}}, ValueError, "perplexity_ratio is above 1, not 1"),
    "nan": ({"kl": float("nan")}, ValueError, "the budget of kl_mean is a finite number"),
    "infinite": ({"kl": float("inf")}, ValueError, "the budget of kl_mean is a finite number"),
    "a word": ({"kl": "low"}, TypeError, "the budget of kl_mean is a number, not 'low'"),
    "truth": ({"kl": True}, TypeError, "the budget of kl_mean is a number, not True"),
    "no vector": ({"vector": {1: [0.0] * 64}}, TypeError, "strength_for takes a SteeringVector"),
    "another model's": ({"vector": SteeringVector({1: mx.ones(32)})}, ValueError, "another model's"),
    "no norms": ({"vector": SteeringVector({1: mx.ones(64)})}, ValueError, "needs the vector's residual norm"),
    "no layer": ({"layers": 7}, KeyError, "no direction for layer 7"),
    "a unit": ({"unit": "sigma"}, ValueError, "unit is 'raw' or 'residual'"),
    "one prompt": ({"neutral": "the food"}, TypeError, r"one prompt is \[prompt\]"),
    "one prompt to continue": (
        {"neutral": "the food", "kl": None, "budget": {"perplexity_ratio": 1.2}}, TypeError, r"is \[prompt\]"),
    "no prompts": ({"neutral": []}, ValueError, "no neutral prompts"),
    "no evaluations": ({"evaluations": 0}, ValueError, "evaluations is above 0, not 0"),
    "no tolerance": ({"tolerance": 0.0}, ValueError, "tolerance is above 0"),
    "the other side": ({"strongest": -1.0}, ValueError, "strongest is above 0"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "kind", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_can_not_be_solved_is_refused_before_anything_runs(
    llama: InterpretableModel, vector: SteeringVector, given: dict[str, Any], kind: type[Exception], sentence: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(type(llama.model), "__call__", lambda *_, **__: pytest.fail("it ran"))
    arguments = {"vector": vector, "layers": 1, "kl": 0.1, "neutral": PROMPTS, **given}
    with pytest.raises(kind, match=sentence):
        strength_for(llama, arguments.pop("vector"), arguments.pop("layers"), **arguments)


def test_the_number_that_a_budget_limits() -> None:
    found = Divergence.of(np.linspace(0, 1, 101) ** 2)
    assert measured(found, "kl_mean") == found.mean == pytest.approx(0.335)
    assert measured(found, "kl_p95") == found.p95 == pytest.approx(0.9025)
    assert target_of(0.5, None) == ("kl_mean", 0.5)
    for name in BUDGETS:
        assert target_of(None, {name: 1.5}) == (name, 1.5)


def test_a_curve_that_saturates_is_met_soon() -> None:
    """As measured at an early layer of the bundled model: a steep way up, and a plateau behind the target."""
    strengths, spent = [0.5, 1.0, 1.13, 1.26, 1.5, 1.9, 2.12, 10.0], [0.02, 0.101, 0.162, 0.232, 0.30, 0.40, 0.42, 0.6]

    def curve(s: float) -> float:
        return float(np.exp(np.interp(np.log(s), np.log(strengths), np.log(spent))))

    found = solved(curve, "kl_mean", 0.3, first=2.12)
    assert found.hit
    assert len(found.trials) <= 5
