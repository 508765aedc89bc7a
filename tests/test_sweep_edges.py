"""What once went wrong in sweeps, measures and choices, each seen failing before its mend."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
from test_extraction import ids, tokenizer

from mlxsteer import ContrastPair, InterpretableModel, SteeringVector, Sweep, extract, measures, select, sweep
from mlxsteer import interventions as iv
from mlxsteer.display import written_table
from mlxsteer.gating import GateFit
from mlxsteer.strength import solved
from mlxsteer.sweep import chosen_layers

PAIRS = [ContrastPair("the", " x", " yes"), ContrastPair("abcde", " good", " bad")]


def vector_for(model: InterpretableModel, seed: int = 0) -> SteeringVector:
    mx.random.seed(seed)
    layers = range(len(model.layers))
    return SteeringVector({i: mx.random.normal((64,)) for i in layers}, residual_norms=dict.fromkeys(layers, 5.0))


@pytest.fixture(scope="module")
def llama() -> InterpretableModel:
    return InterpretableModel(tiny.build("llama"), tokenizer())


def completion(model: InterpretableModel, prompt: str, text: str) -> float:
    """log P(text | prompt) by a bare forward."""
    tokens, start = ids(prompt + text), len(ids(prompt))
    scores = tiny.logprobs(model.model(mx.array([tokens]))[0].astype(mx.float32))
    return float(sum(float(scores[i - 1, tokens[i]].item()) for i in range(start, len(tokens))))


@pytest.mark.parametrize("family", ["gemma2", "rwkv7", "llama"])
def test_pairs_are_scored_against_their_own_tokens_where_rows_run_alone(family: str) -> None:
    model = InterpretableModel(tiny.build(family), tokenizer())
    found = sweep(model, vector_for(model), PAIRS, layers=[1], strengths=[0, 1], progress=None).effect[0]
    bare = [completion(model, p.prompt, p.positive) - completion(model, p.prompt, p.negative) for p in PAIRS]
    np.testing.assert_allclose(found[0], bare, atol=1e-3)
    shift = measures.preference_shift(model, vector_for(model).at(1, 1, at=-1, unit="residual"), PAIRS)
    np.testing.assert_allclose(found[1] - found[0], shift, atol=1e-4)
    assert np.abs(shift).max() > 1e-3


def test_a_checkpoint_of_another_sweep_is_refused(llama: InterpretableModel, tmp_path: Path) -> None:
    kept, vector = tmp_path / "kept.json", vector_for(llama)
    arguments: dict[str, Any] = {"layers": [1], "strengths": [0, 1], "checkpoint": kept, "progress": None}
    first = sweep(llama, vector, PAIRS, **arguments)
    again = sweep(llama, vector, PAIRS, **arguments)
    np.testing.assert_array_equal(first.effect, again.effect)
    other = InterpretableModel(tiny.build("llama", seed=9), tokenizer())
    longer = SteeringVector(vector.directions, residual_norms=dict.fromkeys(vector, 6.0))
    for model, own in ((other, vector), (llama, longer), (llama, vector_for(llama, 1))):
        with pytest.raises(ValueError, match="keeps another sweep"):
            sweep(model, own, PAIRS, **arguments)
    with pytest.raises(ValueError, match="steered already"):
        sweep(llama.edit(vector.at(0)), vector, PAIRS, **arguments)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        sweep(llama, vector, PAIRS, **{**arguments, "checkpoint": tmp_path / "no" / "kept.json"})


def test_callables_are_told_apart_by_their_code(llama: InterpretableModel, tmp_path: Path) -> None:
    vector = vector_for(llama)
    arguments: dict[str, Any] = {"layers": [1], "strengths": [0, 1], "checkpoint": tmp_path / "c", "progress": None}
    sweep(llama, vector, ["abc"], metric=lambda logits: logits[:, 5], **arguments)
    sweep(llama, vector, ["abc"], metric=lambda logits: logits[:, 5], **arguments)
    with pytest.raises(ValueError, match="keeps another sweep"):
        sweep(llama, vector, ["abc"], metric=lambda logits: logits[:, 9], **arguments)
    column = 5
    with pytest.raises(ValueError, match="captures values"):
        sweep(llama, vector, ["abc"], metric=lambda logits: logits[:, column], **arguments)


def test_what_is_unfinished_is_left_out_of_means(tmp_path: Path) -> None:
    effect = np.array([[[0.0, np.nan], [1.0, np.nan], [-1.0, np.nan]], [[0.0, np.nan], [3.0, np.nan], [-3.0, np.nan]]])
    found = Sweep(effect, [1, 2], [0.0, 1.0, -1.0])
    assert found.best() == (2, 1.0)
    assert found.finished.tolist() == [True, False]
    assert "+3.00" in found.table()
    with pytest.raises(ValueError, match="no prompt of this sweep is finished"):
        Sweep(np.full((1, 1, 1), np.nan), [0], [1.0]).table()


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"effect": [[[1]]], "layers": null, "strengths": [1], "unit": "raw", "metric": "m", "record": {}}',
        '{"effect": [[[1]]], "layers": [0], "strengths": ["a"], "unit": "raw", "metric": "m", "record": {}}',
        '{"effect": [[[1]]], "layers": [0], "strengths": [1], "unit": "ell", "metric": "m", "record": {}}',
        '{"effect": [[[1]]], "layers": [0], "strengths": [1], "unit": "raw", "metric": "m", "record": null}',
        json.dumps(
            {"effect": [[[10**400]]], "layers": [0], "strengths": [1], "unit": "raw", "metric": "", "record": {}}
        ),
    ],
    ids=["deep", "no layers", "no strength", "no unit", "no record", "huge"],
)
def test_what_holds_no_sweep_says_so(tmp_path: Path, text: str) -> None:
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(ValueError, match="holds no sweep"):
        Sweep.from_json(tmp_path / "sweep.json")


def test_positions_that_lie_in_no_text_are_refused(llama: InterpretableModel) -> None:
    vector = vector_for(llama)
    with pytest.raises(ValueError, match="at=50 lies in none of these 4 texts"):
        sweep(llama, vector, PAIRS, layers=[1], at=50)
    with pytest.raises(ValueError, match="lies in none of these 4 texts"):
        measures.preference_shift(llama, vector.at(1, at=slice(400, 500)), PAIRS)
    with pytest.raises(ValueError, match="lies in none of these 1 texts"):
        measures.kl(llama, vector.at(1, at=500), ["abc"], tokens=3)


def test_measures_take_one_strength_for_all_texts(llama: InterpretableModel) -> None:
    for measure in (measures.preference_shift, measures.kl):
        with pytest.raises(ValueError, match="one strength for all texts"):
            measure(llama, {"layers.1": iv.add_vector(mx.ones(64), strength=[1.0, 0.0], at=-1)}, PAIRS[:1])


def test_a_side_without_a_completion_and_a_pair_without_a_beginning_are_refused(llama: InterpretableModel) -> None:
    with pytest.raises(ValueError, match="pair 0: one side is empty"):
        measures.preference_shift(llama, {"layers.1": iv.scale(2.0)}, [ContrastPair("abc", "", " x")])
    bare = InterpretableModel(tiny.build("llama"), tokenizer(bos=False))
    with pytest.raises(ValueError, match="pair 0 has no prompt"):
        sweep(bare, vector_for(bare), [ContrastPair("", "ab", "cd")], layers=[1], at="all")


def test_layers_and_strengths_are_named_once(llama: InterpretableModel) -> None:
    for layers in ([2.5], [], [1, 1], True, None, "1"):
        with pytest.raises(ValueError, match="layers are 'all', a layer, or a list"):
            sweep(llama, vector_for(llama), PAIRS, layers=layers)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="each of them once"):
        sweep(llama, vector_for(llama), PAIRS, strengths=[1, 1])
    with pytest.raises(ValueError, match="'clamp' isn't made of one direction; ablate, add_vector"):
        sweep(llama, vector_for(llama), PAIRS, intervention="clamp")


def test_negative_layers_count_from_the_model_s_last(llama: InterpretableModel) -> None:
    vector = vector_for(llama).only([1, 2, 3])
    for given, numbers in ((-1, [3]), ([-1, 1], [3, 1]), (np.array([2, -3]), [2, 1]), (mx.array([-2]), [2])):
        assert chosen_layers(llama, vector, given) == numbers
    found = sweep(llama, vector, PAIRS, layers=[-1], strengths=[0, 1], progress=None)
    expected = sweep(llama, vector, PAIRS, layers=[3], strengths=[0, 1], progress=None)
    assert found.layers == [3]
    np.testing.assert_array_equal(found.effect, expected.effect)
    for wrong, kind, message in (
        ([3, -1], ValueError, "a list of different layers"), (-5, ValueError, "there is no layer -5: the model has 4"),
        (-4, KeyError, "no direction for layer 0"),
    ):  # fmt: skip
        with pytest.raises(kind, match=message):
            chosen_layers(llama, vector, wrong)


def test_a_sweep_over_pairs_of_the_vector_itself_says_so(llama: InterpretableModel) -> None:
    pairs = [*PAIRS, ContrastPair("to", " see", " be")]
    vector = extract(llama, PAIRS, progress=None)
    found = sweep(llama, vector, iter(pairs), layers=[1], strengths=[1], progress=None)
    said = "the vector was computed from 2 of the 3 pairs"
    assert found.record["pairs_seen"] == 2
    assert found.warnings[0].startswith(said)
    assert f"Warning: {said}" in found.table()
    assert sweep(llama, vector, pairs[2:], layers=[1], strengths=[1], progress=None).warnings == []
    unknown = replace(vector, info={})
    assert sweep(llama, unknown, PAIRS, layers=[1], strengths=[1], progress=None).warnings == []
    assert sweep(llama, vector, ["to see"], metric=["e"], layers=[1], strengths=[1], progress=None).warnings == []


def test_a_sweep_is_drawn_with_intervals_of_the_layers_that_reach_furthest() -> None:
    rng = np.random.default_rng(2)
    strengths = [1.0, 0.0, -1.0]
    slopes = np.array([0.1, 3.0, 0.2, 2.0, 1.0])[:, None, None]
    base = 5 * rng.standard_normal(9)
    effect = base + slopes * np.array(strengths)[:, None] * (1 + 0.1 * rng.standard_normal((5, 3, 9)))
    effect[:, :, 8] = np.nan  # not finished
    heat, lines, _ = Sweep(effect, [4, 5, 6, 7, 9], strengths, "residual").plot().axes
    assert (heat.get_xlabel(), lines.get_xlabel()) == ("strength (residual norms)",) * 2
    assert lines.get_ylabel().endswith("(nats)")
    legend = lines.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["2 other layers", "layer 5", "layer 7", "layer 9"]
    assert legend.get_title().get_text() == "band: 95 % interval, 8 prompts"
    assert len(lines.collections) == 1  # of layer 5 alone: bands over each other can't be told apart
    corners = lines.collections[0].get_paths()[0].vertices
    for strength, row in zip(strengths, effect[1, :, :8], strict=True):
        change = measures.paired_difference(row, base[:8])
        heights = corners[corners[:, 0] == strength, 1]
        expected = base[:8].mean() + np.array([change.low, change.high])
        np.testing.assert_allclose([heights.min(), heights.max()], expected, atol=1e-9)
    one = Sweep(effect[:1, :1, :1], [4], [0.5], metric="P(' a')").plot().axes[1]  # neither a band nor a 0
    assert (one.get_legend().get_title().get_text(), one.get_ylabel()) == ("1 prompt: no interval", "P(' a')")


def test_a_forward_holds_no_more_tokens_than_the_budget(llama: InterpretableModel) -> None:
    pairs = [ContrastPair("long beginning " * 6, f" {a}", f" {b}") for a, b in zip("abcdefgh", "ijklmnop", strict=True)]
    seen: list[int] = []

    def watch(x: mx.array) -> mx.array:
        seen.append(x.shape[0] * x.shape[1])
        return x

    with tiny.by_hand(llama.model.layers[0], watch):
        sweep(llama, vector_for(llama), pairs, layers=[1, 2], strengths=[-1, 0, 1], batch_tokens=300, progress=None)
    assert max(seen) <= 300


def test_a_null_is_never_the_vector_itself(llama: InterpretableModel) -> None:
    vector = measures.random_like(vector_for(llama), seed=0)
    splits = ("train", "choose", "choose", "report", "report")
    pairs = [ContrastPair(f"{split} {i} ", "aa", "bb", split) for i, split in enumerate(splits)]
    found = select(llama, pairs, vector=vector, layers=[1], neutral=["abc"], tokens=3, nulls=5, progress=None)
    assert min(abs(null - found.evidence.shift.value) for null in found.evidence.nulls) > 1e-4


def test_brackets_in_positions_are_no_markup(llama: InterpretableModel) -> None:
    splits = ("train", "choose", "choose", "report", "report")
    pairs = [ContrastPair(f"the {i}", "aa", "bb", split) for i, split in enumerate(splits)]
    arguments: dict[str, Any] = {"layers": [1], "neutral": ["abc"], "tokens": 3, "nulls": 2, "progress": None}
    found = select(llama, pairs, vector=vector_for(llama), **arguments)
    assert "[/INST]" in replace(found, at=iv.after("[/INST]")).table()


def test_a_perplexity_budget_near_1_is_not_met_by_doing_nothing() -> None:
    found = solved(lambda s: 1 + 0.1 * s, "perplexity_ratio", 1.02)
    assert found.hit
    assert abs(found.reached - 1.02) <= 0.05 * 0.02 + 1e-9


def test_tables_are_text_in_a_notebook_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a notebook rich would show a table where it is made, and `print` would have nothing left to print."""
    fit = GateFit(iv.cosine(mx.ones((4,))) > 0, 0, 0.0, 1.0, 1.0, 1.0, ((2, 0.5, 1.0, 0.9),), ((2, 2), (2, 2)))
    tables = (
        Sweep(np.array([[[3.0]]]), [0], [1.0]).table,
        fit.table,
        lambda: written_table("heads", ("layer",), [("5",)]),
    )
    plain = [table() for table in tables]
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert [table() for table in tables] == plain
    assert all("│" in table for table in plain)
