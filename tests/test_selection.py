"""Choosing layer and strength: watched once on the bundled model, and measured anew on a tiny one."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
from test_divergence import counted
from test_extraction import tokenizer

from mlxsteer import (
    Choice,
    ContrastPair,
    InterpretableModel,
    PairSet,
    SteeringVector,
    datasets,
    evaluate,
    extract,
    select,
)
from mlxsteer import selection as room
from mlxsteer.measures import divergence as divergence_room
from mlxsteer.measures import kl, preference_shift, random_like, shuffled_labels
from mlxsteer.measures.preference import Preferences
from mlxsteer.measures.uncertainty import generator

SIZES = {"train": 16, "choose": 8, "report": 8}
QUICK: dict[str, Any] = {"tokens": 8, "nulls": 4, "progress": False}


def some_of(name: str) -> PairSet:
    pairs = datasets.load(name)
    return PairSet([pair for split, n in SIZES.items() for pair in pairs.split(split)[:n]], name=name)


@dataclass
class Watched:
    """A choice, and what was seen while it was made."""

    choice: Choice
    used: list[tuple[str, set[str | None]]] = field(default_factory=list)
    ran: dict[str, int] = field(default_factory=dict)
    total: int = 0
    steps: list[tuple[int, int]] = field(default_factory=list)
    looked: list[ContrastPair] = field(default_factory=list)


def watch(model: InterpretableModel, pairs: Any, **options: Any) -> Watched:
    """Choose, while every block counts its tokens, and what asks for pairs says of which splits they are."""
    used: list[tuple[str, set[str | None]]] = []
    ran: dict[str, int] = {}
    steps: list[tuple[int, int]] = []
    looked: list[ContrastPair] = []
    with counted(model) as seen, pytest.MonkeyPatch.context() as patch:

        def spied(place: Any, name: str, pairs_at: int | None) -> None:
            original = getattr(place, name)

            def call(*args: Any, **kwargs: Any) -> Any:
                if pairs_at is not None:
                    used.append((name, {pair.split for pair in args[pairs_at]}))
                if name == "separation":
                    looked.extend(args[2])
                before = sum(seen)
                made = original(*args, **kwargs)
                ran[name] = ran.get(name, 0) + sum(seen) - before
                return made

            patch.setattr(place, name, call)

        spied(room, "extract", 1)
        spied(room, "separation", 2)
        spied(room, "Preferences", 1)
        spied(room, "_evidence", 4)
        spied(divergence_room, "continued", None)
        options["progress"] = lambda done, total: steps.append((done, total))
        choice = select(model, pairs, **options)
        return Watched(choice, used, ran, sum(seen), steps, looked)


@pytest.fixture(scope="module")
def chosen(pocket: InterpretableModel) -> Watched:
    return watch(pocket, some_of("pocket/sentiment"), neutral=datasets.neutral(pocket)[:6],
                 layers=[1, 5, 6], **QUICK)  # fmt: skip


# -- on the bundled model ----------------------------------------------------------------------------------------------


@pytest.mark.full  # on tiny models the same is measured anew below
def test_a_layer_is_chosen_whose_effect_and_cost_a_measurement_confirms(
    pocket: InterpretableModel, chosen: Watched
) -> None:
    choice, report = chosen.choice, some_of("pocket/sentiment").split("report")
    assert choice.layer >= 2
    found = choice.evidence
    assert found.shift.value > 4
    assert found.shift.excludes(0)
    assert found.opposite.value < -4
    moved = preference_shift(pocket, choice.interventions, report)
    assert moved.mean() == pytest.approx(found.shift.value, abs=5e-3)
    assert found.shift.low < moved.mean() < found.shift.high
    spent = kl(pocket, choice.interventions, datasets.neutral(pocket)[:6], tokens=8)
    assert spent.mean == pytest.approx(found.divergence.mean, rel=1e-2)
    assert spent.mean <= 0.3 * 1.06
    assert choice.budget == ("kl_mean", 0.3)
    assert found.pairs == len(report) == 8
    assert found.curve.strengths.tolist() == [-1, -0.5, 0, 0.5, 1]
    times = found.curve.strengths
    steered = [
        choice.vector.at({n: s * x for n, s in choice.strengths.items()}, at=-1, unit="residual") for x in times if x
    ]
    shifts = [preference_shift(pocket, one, report) for one in steered]
    slopes = np.polyfit(times, [*shifts[:2], np.zeros(8), *shifts[2:]], 1)[0]
    assert found.curve.anti_steerable == (slopes < 0).mean() < 0.5
    seed = int(generator(0, room._NULLS, 0).integers(2**62))
    random = random_like(choice.vector, seed=seed).at(choice.strengths, at=-1, unit="residual")
    assert preference_shift(pocket, random, report).mean() == pytest.approx(found.nulls[0], abs=5e-3)
    assert len(found.nulls) == 4
    assert found.p_value == (1 + sum(null >= found.shift.value for null in found.nulls)) / 5


def test_the_choice_steers_generation(pocket: InterpretableModel, chosen: Watched) -> None:
    plain, steered = (
        pocket.generate(["The movie was"], steering, max_tokens=4)[0]
        for steering in (None, chosen.choice.interventions)
    )
    assert any(steered.touched)
    assert str(plain) != str(steered)


def test_every_split_has_its_own_use(chosen: Watched) -> None:
    assert chosen.used[0] == ("extract", {"train"})
    assert ("_evidence", {"report"}) in chosen.used
    before = chosen.used[1 : chosen.used.index(("_evidence", {"report"}))]
    assert {name for name, _ in before} == {"separation", "Preferences"}
    assert all(splits == {"choose"} for _, splits in before)
    assert all(splits == {"report"} for _, splits in chosen.used[-2:])
    assert chosen.choice.record["pairs"] == SIZES
    assert chosen.choice.vector.info["pairs"] == 16
    assert chosen.steps == [(i, 5) for i in range(6)]


def accounted(model: InterpretableModel, found: Watched) -> None:
    """What choosing cost is what ran but for the clean continuations; of the separation it says what it would be
    without a beginning that both sides share."""
    each = [model.encode(pair.prompt + side) for pair in found.looked for side in (pair.positive, pair.negative)]
    said = sum(map(len, each)) * (1 + found.choice.vector.layers[-1])
    separated = found.ran["separation"]
    assert 0.4 * said < separated <= said
    outside = sum(found.ran.get(name, 0) for name in ("extract", "separation", "_evidence", "continued"))
    assert found.choice.block_tokens - said == found.total - outside
    assert found.ran["_evidence"] > 0
    assert found.ran["continued"] < found.choice.block_tokens


def test_the_account_is_what_ran(pocket: InterpretableModel, chosen: Watched) -> None:
    accounted(pocket, chosen)


def no_constant(name: str) -> Any:
    raise AssertionError(f"{name} is no JSON")


def test_a_choice_is_shown_saved_and_drawn(chosen: Watched, tmp_path: Path) -> None:
    choice = chosen.choice
    table = choice.table()
    for said in ("layer", "AUROC", "measured", "tried", "kl_mean 0.3 (± 5 %)", "8 held-out pairs", "4 random vectors"):
        assert said in table, said
    assert repr(choice).startswith(f"Choice(layer {choice.layer} × {choice.strength:.3g}, shift +")
    text = choice.to_json(tmp_path / "choice.json")
    assert (tmp_path / "choice.json").read_text(encoding="utf-8") == text
    data = json.loads(text, parse_constant=no_constant)
    assert data["strengths"] == {str(choice.layer): choice.strength}
    assert data["evidence"]["shift"]["value"] == choice.evidence.shift.value
    assert len(data["candidates"]) == len(choice.candidates) >= 3
    assert {"model", "seed", "data", "mlxsteer", "mlx"} <= set(data["record"])
    figure = choice.plot(tmp_path / "choice.png")
    assert (tmp_path / "choice.png").read_bytes()[:4] == b"\x89PNG"
    layers, dose = figure.axes
    assert f"at kl_mean ≤ {choice.budget[1]:g}" in layers.get_title()
    assert "8 held-out pairs" in dose.get_title()
    np.testing.assert_allclose(dose.lines[1].get_ydata(), choice.evidence.curve.mean_curve)
    assert dose.get_legend().get_title().get_text() == "band: 95 % interval, 8 pairs"
    assert len(dose.collections) == 1
    base = choice.evidence.base
    np.testing.assert_allclose(dose.lines[2].get_ydata(), base + np.array(choice.evidence.nulls), atol=1e-9)
    with pytest.raises(ValueError, match=r"\.png, \.pdf or \.svg"):
        choice.plot(tmp_path / "choice.txt")


def test_few_pairs_and_few_nulls_are_said_in_words(chosen: Watched) -> None:
    said = "\n".join(chosen.choice.warnings)
    assert "made of 16 pairs; from 80 on" in said
    assert "the report split has 8 pairs" in said
    assert "4 random vectors can't tell whether the direction matters: take 20" in said
    assert "no evidence" not in said
    assert all(f"Warning: {warning}" in chosen.choice.summary() for warning in chosen.choice.warnings)


def test_labels_that_mean_nothing_give_no_evidence(pocket: InterpretableModel) -> None:
    few = some_of("pocket/sentiment")
    pairs = shuffled_labels([*few.split("train")[:10], *few.split("choose")[:2], *few.split("report")[:4]], seed=1)
    choice = select(
        pocket, pairs, layers=[5], neutral=datasets.neutral(pocket)[:2], **{**QUICK, "tokens": 2, "nulls": 2}
    )
    assert choice.layer == 5
    assert any("no evidence" in warning for warning in choice.warnings)
    assert any("hardly agree" in warning for warning in choice.warnings)
    assert "no evidence" in choice.table()


# -- on a tiny one -----------------------------------------------------------------------------------------------------

NEUTRAL = ["the food was", "rain again", "a", "we."]
_PROMPTS = ["the food was", "rain again", "tea", "i", "you", "we", "they", "no one", "all of it"]
PLAIN = PairSet(
    [ContrastPair(prompt, f" good{end}", f" bad{end}") for prompt in _PROMPTS for end in (".", "!")], name="tiny"
)
PAIRS = PLAIN.with_splits(seed=1)
TINY: dict[str, Any] = {"neutral": NEUTRAL, "tokens": 3, "nulls": 2, "progress": False, "budget": {"kl_mean": 0.02}}


@pytest.fixture(scope="module")
def llama() -> InterpretableModel:
    return InterpretableModel(tiny.build("llama"), tokenizer())


@pytest.fixture(scope="module")
def vector(llama: InterpretableModel) -> SteeringVector:
    return extract(llama, PAIRS, progress=False)


@pytest.fixture(scope="module")
def every(llama: InterpretableModel, vector: SteeringVector) -> Watched:
    return watch(llama, PAIRS, vector=vector, screen=False, **TINY)


def test_without_screening_every_layer_is_measured(
    llama: InterpretableModel, vector: SteeringVector, every: Watched
) -> None:
    single = [one for one in every.choice.candidates if len(one.strengths) == 1]
    assert sorted(layer for one in single for layer in one.strengths) == [0, 1, 2, 3]
    choose = PAIRS.split("choose")
    for one in every.choice.candidates:
        assert one.stage == "measured"
        steering = vector.at(one.strengths, at=-1, unit="residual")
        assert preference_shift(llama, steering, choose).mean() == pytest.approx(one.effect, abs=1e-4)
        assert kl(llama, steering, NEUTRAL, tokens=3).mean == pytest.approx(one.spent, rel=1e-3)
        assert one.spent <= 0.02 * 1.05 + 1e-9
        assert max(one.strengths.values()) <= room.STRONGEST * (1 + 1e-9)
    best = every.choice.candidates[0]
    assert best.effect == max(one.effect for one in every.choice.candidates)
    effects = [one.effect for one in every.choice.candidates]
    assert effects == sorted(effects, reverse=True)
    ordered = sorted(single, key=lambda one: -one.effect)
    (together,) = (one for one in every.choice.candidates if len(one.strengths) == 2)
    assert set(together.strengths) == {*ordered[0].strengths, *ordered[1].strengths}
    wins = together.effect > 1.05 * abs(ordered[0].effect)
    assert every.choice.strengths == (together if wins else ordered[0]).strengths
    for one in single:
        (layer,) = one.strengths
        assert one.agreement == vector.agreement[layer]
        assert 0 <= one.separation <= 1
    assert every.ran.get("extract") is None
    assert all(name != "extract" for name, _ in every.used)


def test_the_account_of_a_tiny_choice_is_what_ran(
    llama: InterpretableModel, vector: SteeringVector, every: Watched
) -> None:
    accounted(llama, every)
    for more in ({}, {"leave": {"other": PAIRS.split("train")[:2]}}):
        accounted(llama, watch(llama, PAIRS, vector=vector, **TINY, **more))


def test_several_layers_are_a_choice_too(every: Watched, tmp_path: Path) -> None:
    choice = replace(every.choice, strengths={2: 1.5, 1: 0.5})
    assert (choice.layer, choice.strength) == (2, 1.5)
    assert list(choice.interventions) == ["layers.2", "layers.1"]
    assert "1.5 residual norms at layer 2 and 0.5 residual norms at layer 1" in choice.summary()
    assert "layer 2 × 1.5 + layer 1 × 0.5" in repr(choice)
    choice.plot(tmp_path / "several.svg")
    assert b"<svg" in (tmp_path / "several.svg").read_bytes()
    json.loads(choice.to_json(), parse_constant=no_constant)


def test_without_screening_separation_decides_nothing(
    llama: InterpretableModel, vector: SteeringVector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "separation", lambda *_, **__: {1: 0.5, 2: 1.0})
    choice = select(llama, PAIRS, vector=vector, layers=[1, 2], screen=False, combine=False, **TINY)
    assert [one.stage for one in choice.candidates] == ["measured"] * 2


def test_no_layer_is_steered_beyond_the_strongest(llama: InterpretableModel, vector: SteeringVector) -> None:
    options: dict[str, Any] = {**TINY, "budget": {"kl_mean": 9.0}}
    choice = select(llama, PAIRS, vector=vector, layers=[2, 3], screen=False, **options)
    (together,) = (one for one in choice.candidates if len(one.strengths) == 2)
    assert max(together.strengths.values()) == pytest.approx(room.STRONGEST)


def test_two_layers_that_do_more_together_are_chosen(
    llama: InterpretableModel, vector: SteeringVector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best two of single layers whose measured effects are made up: alone 1 each, together 1.04 or 1.06."""
    effect: dict[int, float] = {1: 1.0, 2: 1.04}
    monkeypatch.setattr(room._Bench, "effect", lambda _, strengths: effect[len(strengths)])
    arguments: dict[str, Any] = {**TINY, "layers": [1, 2], "screen": False, "vector": vector}
    assert len(select(llama, PAIRS, **arguments).strengths) == 1
    effect[2] = 1.06
    assert set(select(llama, PAIRS, **arguments).strengths) == {1, 2}
    assert len(select(llama, PAIRS, combine=False, **arguments).strengths) == 1


def test_layers_that_are_left_out_are_not_looked_at(llama: InterpretableModel, vector: SteeringVector) -> None:
    for layers, expected in ((2, {2}), ([-1, 1], {1, 3}), (range(2), {0, 1})):
        choice = select(llama, PAIRS, vector=vector, layers=layers, combine=False, **TINY)  # type: ignore[arg-type]
        assert {layer for one in choice.candidates for layer in one.strengths} == expected
    alone = select(llama, PAIRS, layers=-1, **TINY)
    assert alone.layer == 3
    assert alone.vector.layers == [3]
    assert np.isnan(alone.rank_correlation)
    assert "nan" not in alone.table()
    for wrong in ("middle", [], [1.5], [-5], [-1, 3]):
        with pytest.raises(ValueError, match=r"layer"):
            select(llama, PAIRS, vector=vector, layers=wrong, **TINY)  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="no direction for layer 4"):
        select(llama, PAIRS, vector=vector, layers=[4], **TINY)
    with pytest.raises(ValueError, match="there is no layer 4"):
        select(llama, PAIRS, layers=[4], **TINY)


def test_layers_that_separate_nothing_are_only_read(llama: InterpretableModel, vector: SteeringVector) -> None:
    noise = random_like(vector, seed=2)
    mixed = SteeringVector({**vector.directions, 1: noise[1], 2: noise[2]}, residual_norms=vector.residual_norms)
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(room, "separation", lambda *_, **__: {0: 1.0, 1: 0.5, 2: 0.69, 3: 0.9})
        choice = select(llama, PAIRS, vector=mixed, **TINY)
    stages = {layer: one.stage for one in choice.candidates if len(one.strengths) == 1 for layer in one.strengths}
    assert stages[1] == stages[2] == "read"
    assert stages[0] == stages[3] == "measured"
    data = json.loads(choice.to_json(), parse_constant=no_constant)
    (read,) = (one for one in data["candidates"] if list(one["strengths"]) == ["1"])
    assert (read["strengths"]["1"], read["effect"], read["spent"], read["agreement"]) == (None, None, None, None)
    assert "nan" not in choice.table()
    assert "made of" not in "".join(choice.warnings)  # nothing is known of its pairs


def test_a_few_are_tried_and_the_best_measured(llama: InterpretableModel, vector: SteeringVector) -> None:
    choice = select(llama, PAIRS, vector=vector, **TINY)
    stages = [one.stage for one in choice.candidates]
    assert stages == sorted(stages, key=["measured", "tried", "read"].index)
    single = [one for one in choice.candidates if len(one.strengths) == 1]
    assert 1 <= [one.stage for one in single].count("measured") <= 2  # a second best only where it looks nearly as good
    tried = [one for one in single if one.stage == "tried"]
    assert tried
    for one in tried:
        assert math.isnan(one.spent)
        assert np.isfinite(one.effect)
    assert choice.strengths in [one.strengths for one in choice.candidates if one.stage == "measured"]


def test_what_other_behaviours_are_moved_by_is_subtracted(llama: InterpretableModel, vector: SteeringVector) -> None:
    others = {
        "questions": [
            ContrastPair("do you", " like it", " hate it"),
            ContrastPair("so", " yes", " no", split="report"),
        ],
        "rain": [ContrastPair("the rain", "!", ".")],
    }
    choice = select(llama, PAIRS, vector=vector, leave=others, layers=[1, 2], screen=False, combine=False, **TINY)
    for one in choice.candidates:
        steering = vector.at(one.strengths, at=-1, unit="residual")
        moved = preference_shift(llama, steering, PAIRS.split("choose")).mean()
        beside = [abs(preference_shift(llama, steering, pairs).mean()) for pairs in others.values()]
        assert min(beside) > 1e-3
        assert one.effect == pytest.approx(moved - sum(beside), abs=1e-4)
    steering = choice.interventions
    shift = preference_shift(llama, steering, PAIRS.split("report")).mean()
    assert choice.evidence.shift.value == pytest.approx(shift, abs=1e-4)  # what is reported is the behaviour itself


@pytest.mark.parametrize("family", ["gemma2"])
def test_other_families_are_chosen_for_as_well(family: str) -> None:
    model = InterpretableModel(tiny.build(family), tokenizer())
    choice = select(model, PAIRS, layers=[1, 2], at="all", **TINY)
    report = PAIRS.split("report")
    moved = preference_shift(model, choice.interventions, report).mean()
    assert choice.evidence.shift.value == pytest.approx(moved, abs=2e-4)
    back = {layer: -strength for layer, strength in choice.strengths.items()}
    opposite = preference_shift(model, choice.vector.at(back, at="all", unit="residual"), report).mean()
    assert choice.evidence.opposite.value == pytest.approx(opposite, abs=2e-4)
    assert choice.evidence.base == pytest.approx(Preferences(model, report).base.mean(), abs=1e-4)
    assert kl(model, choice.interventions, NEUTRAL, tokens=3).mean == pytest.approx(
        choice.evidence.divergence.mean, rel=1e-3
    )


def test_pairs_without_splits_get_them(llama: InterpretableModel) -> None:
    found = watch(llama, PLAIN, seed=3, layers=[1, 2], **TINY)
    expected = PLAIN.with_splits(seed=3)
    assert found.choice.record["pairs"] == expected.splits
    assert found.used[0] == ("extract", {"train"})
    assert found.choice.record["seed"] == 3
    again = select(llama, list(PLAIN), seed=3, layers=[1, 2], **TINY)
    assert again.strengths == found.choice.strengths
    assert again.evidence.nulls == found.choice.evidence.nulls
    assert again.record["data"] == found.choice.record["data"] == PLAIN.fingerprint


def seen_by(choice: Choice) -> str:
    return "\n".join(one for one in choice.warnings if "computed from" in one or "split too" in one)


def test_a_vector_that_has_seen_the_held_out_pairs_is_found_out(llama: InterpretableModel) -> None:
    report, choose, train = (PAIRS.split(name) for name in ("report", "choose", "train"))
    turned = replace(report[0], positive=report[0].negative.upper(), negative=report[0].positive, split="train")
    other = replace(report[1], prompt=report[1].prompt + " x", split=None)
    cases: list[tuple[list[ContrastPair], str]] = [
        (train, ""),
        ([turned, *report[1:3], other, *train], f"computed from 3 of the {len(report)} report pairs: what it does"),
        ([*choose[:2], report[0]], f"1 of the {len(report)} report pairs"),
    ]
    quick: dict[str, Any] = {**TINY, "layers": [1], "nulls": 0}
    for pairs, said in cases:
        mixed = extract(llama, iter([replace(pair, split=None) for pair in pairs]), progress=False)
        choice = select(llama, PAIRS, vector=mixed, **quick)
        assert said in seen_by(choice), seen_by(choice)
        assert bool(said) == bool(seen_by(choice))
    assert f"computed from 2 of the {len(choose)} choose pairs and 1 of the" in seen_by(choice)
    assert choice.record["pairs_seen"] == {"choose": 2, "report": 1}
    quicker: dict[str, Any] = {"neutral": ["a"], "tokens": 1, "max_tokens": 1, "nulls": 0, "progress": False}
    assert evaluate(llama, choice.interventions, PAIRS, **quicker).record["pairs_seen"] == 1
    foreign = SteeringVector(mixed.directions, residual_norms=mixed.residual_norms)
    choice = select(llama, PAIRS, vector=foreign, **quick)
    assert seen_by(choice) == ""
    assert choice.record["pairs_seen"] == {"choose": "unknown", "report": "unknown"}


def test_pairs_and_prompts_in_two_splits_are_told(llama: InterpretableModel) -> None:
    train, report = PAIRS.split("train")[0], PAIRS.split("report")[0]
    quick: dict[str, Any] = {**TINY, "layers": [1], "nulls": 0}
    copied = [*PAIRS, replace(train, positive=train.positive.upper(), split="report"), replace(report, split="choose")]
    choice = select(llama, copied, **quick)
    assert "4 pairs of these are in another split too" in seen_by(choice)  # two, and their copies
    assert "2 pairs more have a prompt that is in another split too" in seen_by(choice)
    assert "computed from 1 of the" in seen_by(choice)
    prompts = select(llama, [*PAIRS, replace(train, negative=" ugly", split="choose")], **quick)
    assert "pairs have a prompt that is in another split too" in seen_by(prompts)
    assert "are in another split" not in seen_by(prompts)


def test_where_and_what_is_limited_can_be_said(llama: InterpretableModel, vector: SteeringVector) -> None:
    choice = select(
        llama, PAIRS, vector=vector, layers=[1], at="last", **{**TINY, "budget": {"kl_p95": 0.1}, "nulls": 0}
    )
    steering = vector.at(choice.strengths, at="last", unit="residual")
    assert kl(llama, steering, NEUTRAL, tokens=3).p95 == pytest.approx(0.1, rel=0.051)
    assert "at='last'" in choice.summary()
    assert "No null was drawn." in choice.summary()
    assert choice.evidence.nulls == ()
    json.loads(choice.to_json(), parse_constant=no_constant)
    mx.eval([one.vector for one in choice.interventions.values()])  # type: ignore[attr-defined]
    much = select(llama, PAIRS, vector=vector, layers=[3], **{**TINY, "budget": {"kl_mean": 9.0}})
    assert any("the budget isn't spent: kl_mean reaches" in warning for warning in much.warnings)
    assert max(much.strengths.values()) <= room.STRONGEST


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "two budgets": ({"budget": {"kl_mean": 1, "kl_p95": 1}}, ValueError, "a budget is one of"),
    "an unknown budget": ({"budget": {"kl": 1}}, ValueError, "a budget is one of"),
    "nothing to spend": ({"budget": {"kl_mean": 0}}, ValueError, "above 0"),
    "a perplexity": ({"budget": {"perplexity_ratio": 1.2}}, ValueError, "select compares layers by kl_mean or kl_p95"),
    "no pairs": ({"pairs": []}, ValueError, "no contrast pairs"),
    "texts": ({"pairs": ["a"]}, TypeError, "contrast pairs are a list of ContrastPair"),
    "a split is missing": ({"pairs": [*PAIRS.split("train"), *PAIRS.split("choose")]}, ValueError, "'report'"),
    "one to report on": (
        {"pairs": [*PAIRS.split("train"), *PAIRS.split("choose"), PAIRS.split("report")[0]]}, ValueError,
        "an interval needs 2 pairs or more, and the report split has 1",
    ),
    "one prompt": ({"neutral": "the food"}, TypeError, r"one prompt is \[prompt\]"),
    "another model's": ({"vector": SteeringVector({0: mx.ones(32)})}, ValueError, "another model's"),
    "no norms": ({"vector": SteeringVector({0: mx.ones(64)})}, ValueError, "needs the vector's residual norm"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "kind", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_can_not_be_chosen_is_refused_before_anything_runs(
    llama: InterpretableModel, vector: SteeringVector, given: dict[str, Any], kind: type[Exception], sentence: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(type(llama.model), "__call__", lambda *_, **__: pytest.fail("it ran"))
    arguments = {**TINY, "pairs": PAIRS, "vector": vector, **given}
    with pytest.raises(kind, match=sentence):
        select(llama, arguments.pop("pairs"), **arguments)
