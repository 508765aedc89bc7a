"""Sweeps of texts against one generation at a time, and against a recompute of the whole sequence without a cache."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tiny import by_hand, logprobs

from mlxsteer import (
    InterpretableModel,
    NeverFired,
    NothingTouched,
    PositionError,
    SteeringVector,
    after,
    datasets,
    extract,
)
from mlxsteer import interventions as iv
from mlxsteer.decoding import Draws
from mlxsteer.generation_sweep import GenerationSweep, generation_sweep

PROMPTS = [[7, 31, 52, 18, 77, 23, 9, 64, 40, 41, 12], [55, 66, 31, 18, 77, 5, 8]]
LAYER, STRENGTHS, STEPS = 2, [-1.5, 0.0, 2.0], 4
# With how many tokens of each prompt run once: those before the first edited one, and never the last.
ATS: dict[str, tuple[Any, list[int]]] = {
    "-1": (-1, [10, 6]),
    "all": ("all", [0, 0]),
    "generated": ("generated", [10, 6]),
    "last": ("last", [10, 6]),
    "after": (after((18, 77)), [5, 5]),
    "slice": (slice(4, None, 2), [4, 4]),
}
MORE_ATS: dict[str, tuple[Any, list[int]]] = {
    "-2": (-2, [9, 5]),
    "slice-3": (slice(-3, None), [8, 4]),
    "prompt": ("prompt", [0, 0]),
    "callable": (lambda ids: [i for i, t in enumerate(ids) if t > 60], [4, 0]),  # one clean token is no forward's worth
}


@pytest.fixture(params=["llama", "qwen3", "gemma3_text", "gpt2", "mamba2", "gemma2"], scope="module")
def model(request: pytest.FixtureRequest, tokenizer: TokenizerWrapper) -> InterpretableModel:
    return InterpretableModel(tiny.build(request.param), tokenizer)


@pytest.fixture(scope="module")
def llama(tokenizer: TokenizerWrapper) -> InterpretableModel:
    return InterpretableModel(tiny.build("llama"), tokenizer)


def steering_vector(layers: int = 4) -> SteeringVector:
    mx.random.seed(3)
    return SteeringVector(
        {i: mx.random.normal((64,)) for i in range(layers)}, residual_norms=dict.fromkeys(range(4), 16)
    )


@contextmanager
def counted(model: InterpretableModel) -> Iterator[list[tuple[int, int]]]:
    """Rows and tokens, padding included, of every forward through block 0."""
    seen: list[tuple[int, int]] = []

    def note(h: mx.array) -> mx.array:
        seen.append((h.shape[0], h.shape[1]))
        return h

    with by_hand(model.model.layers[0], note):
        yield seen


def total(seen: list[tuple[int, int]]) -> int:
    return sum(rows * width for rows, width in seen)


def recompute(model: InterpretableModel, prompt: list[int], made: list[int], v: mx.array, touched: list[bool]) -> Any:
    """Log-probability of each generated token from the whole sequence, without a cache."""
    found = []
    for step, token in enumerate(made):
        ids = prompt + made[:step]
        mask = mx.array(touched[: len(ids)])[None, :, None]
        with by_hand(model.model.layers[LAYER], lambda h, mask=mask: mx.where(mask, h + v, h)):
            found.append(logprobs(model.model(mx.array([ids]))[0, -1])[token].item())
    return np.array(found)


# -- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ATS)
def test_every_text_is_that_of_one_generation_alone(model: InterpretableModel, name: str) -> None:
    compare_with_one_alone(model, *ATS[name])


@pytest.mark.parametrize("name", MORE_ATS)
def test_every_text_is_that_of_one_generation_alone_at_rarer_positions(llama: InterpretableModel, name: str) -> None:
    compare_with_one_alone(llama, *MORE_ATS[name])


def compare_with_one_alone(model: InterpretableModel, at: Any, shared: list[int]) -> None:
    vector = steering_vector()
    with counted(model) as seen:
        found = generation_sweep(
            model, vector, PROMPTS, layers=LAYER, strengths=STRENGTHS, at=at, max_tokens=STEPS, logprobs=True
        )
    if model._sites.family.batch:  # all rows run together there, and a forward of one row is a shared one
        assert [width for rows, width in seen if rows == 1] == [n for n in shared if n]
    assert found.texts.shape == (1, 3, 2, 1)
    for j, strength in enumerate(STRENGTHS):
        steer = vector.at(LAYER, strength, at, unit="residual")
        for k, prompt in enumerate(PROMPTS):
            text = found.texts[0, j, k, 0]
            if at != -1 and strength != (2.0, -1.5)[k]:
                continue  # every row once, and then one of each prompt: generating alone takes its time
            alone = model.generate(prompt, steer if strength else None, max_tokens=STEPS, logprobs=True)
            assert (text, text.tokens, text.prompt_tokens) == (alone, alone.tokens, prompt)
            assert text.touched == (alone.touched if strength else [False] * (len(prompt) + STEPS))
            assert text.finish_reason == "length"
            assert mx.abs(text.logprobs - alone.logprobs).max().item() <= 1e-4


@pytest.mark.parametrize("at", [-2, slice(-3, None), slice(4, 6), after((9, 64))], ids=str)
def test_positions_count_from_the_beginning_of_the_prompt_though_that_ran_before(
    model: InterpretableModel, at: Any
) -> None:
    """Against a recompute without a cache, with the touched tokens written out; off by the shared tokens it differs."""
    vector, prompt = steering_vector(), PROMPTS[0]
    touched = {
        "-2": [9], "slice(-3, None, None)": range(8, 99), "slice(4, 6, None)": [4, 5],
        "after(text=(9, 64))": range(8, 99),
    }[str(at)]  # fmt: skip
    found = generation_sweep(
        model, vector, [prompt], layers=LAYER, strengths=[3.0], at=at, unit="raw", max_tokens=STEPS, temp=1.0,
        logprobs=True,
    ).texts[0, 0, 0, 0]  # fmt: skip
    marks = [i in touched for i in range(len(prompt) + STEPS)]
    assert found.touched == marks
    for off in (0, 1):
        moved = [i + off in touched for i in range(len(prompt) + STEPS)]
        apart = np.abs(np.array(found.logprobs) - recompute(model, prompt, found.tokens, 3 * vector[LAYER], moved))
        assert apart.max() <= 1e-4 if off == 0 else apart.max() > 1e-3


def test_strength_zero_is_plain_generation_and_decoded_once_for_all_layers(llama: InterpretableModel) -> None:
    plain = [list(mlx_lm.stream_generate(llama.model, llama.tokenizer, p, max_tokens=STEPS)) for p in PROMPTS]
    with counted(llama) as seen:
        found = generation_sweep(
            llama, steering_vector(), PROMPTS, layers="all", strengths=[0.0, -0.0], max_tokens=STEPS, logprobs=True
        )
    assert total(seen) == 10 + 6 + 2 * (STEPS + 1)  # mlx-lm stages one forward more than there are tokens
    assert found.texts.shape == (4, 2, 2, 1)
    for k, pieces in enumerate(plain):
        assert all(text is found.texts[0, 0, k, 0] for text in found.texts[:, :, k].reshape(-1))
        text = found.texts[0, 0, k, 0]
        assert text.tokens == [p.token for p in pieces]
        expected = mx.stack([p.logprobs[p.token] for p in pieces])
        assert mx.abs(text.logprobs - expected).max().item() <= 1e-5  # a batch of two


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma2"])
def test_one_plain_row_is_mlx_lms_own_bit_for_bit(name: str, tokenizer: TokenizerWrapper) -> None:
    model = InterpretableModel(tiny.build(name), tokenizer)
    plain = model.generate(PROMPTS[0], max_tokens=STEPS, logprobs=True)
    found = generation_sweep(
        model, steering_vector(), PROMPTS[:1], layers=0, strengths=0.0, max_tokens=STEPS, logprobs=True
    ).texts[0, 0, 0, 0]
    assert found.tokens == plain.tokens
    assert mx.array_equal(found.logprobs, plain.logprobs)


# -- what runs once --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("at", "shared"), [(-1, [10, 6]), ("generated", [10, 6]), (-2, [9, 5]), ("all", [0, 0])])
def test_the_tokens_before_the_first_edited_one_run_once(llama: InterpretableModel, at: Any, shared: list[int]) -> None:
    strengths = [-1.0, -0.5, 0.0, 0.5, 1.0]
    with counted(llama) as seen:
        generation_sweep(llama, steering_vector(), PROMPTS, layers=[1, 2], strengths=strengths, at=at, max_tokens=3,
                         batch_size=1)  # fmt: skip
    rows = 9  # four strengths at two layers, and 0 once
    assert total(seen) == sum(shared) + sum(rows * (len(p) - n - 1 + 4) for p, n in zip(PROMPTS, shared, strict=True))


def test_rows_that_differ_by_their_sample_share_their_steered_prompt(llama: InterpretableModel) -> None:
    vector, prompt = steering_vector(), PROMPTS[0]
    options: dict[str, Any] = {"layers": LAYER, "strengths": [1.0], "at": "all", "temp": 1.0, "max_tokens": 4}
    with counted(llama) as seen:
        found = generation_sweep(llama, vector, [prompt], samples=6, logprobs=True, **options).texts[0, 0, 0]
    assert total(seen) == 10 + 6 * 5
    assert len(set(map(tuple, (text.tokens for text in found)))) > 1
    for text in found:
        v = vector[LAYER] * 16 / mx.linalg.norm(vector[LAYER])
        expected = recompute(llama, prompt, text.tokens, v, [True] * 20)
        assert np.abs(np.array(text.logprobs) - expected).max() <= 1e-4


def test_no_more_rows_decode_at_once_than_the_batch_holds(llama: InterpretableModel) -> None:
    whole = generation_sweep(llama, steering_vector(), PROMPTS * 2, layers=[1, 2], max_tokens=4)
    with counted(llama) as seen:
        found = generation_sweep(llama, steering_vector(), PROMPTS * 2, layers=[1, 2], max_tokens=4, batch_size=3)
    assert max(rows for rows, _ in seen) == 3
    assert [width for _, width in seen[:2]] == [10, 1]  # the second prompt isn't run before its first row joins
    assert [t.tokens for t in found.texts.reshape(-1)] == [t.tokens for t in whole.texts.reshape(-1)]


def test_a_cache_that_cannot_be_copied_is_filled_for_every_row(
    llama: InterpretableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    vector, options = steering_vector(), {"layers": LAYER, "strengths": STRENGTHS, "max_tokens": 4, "logprobs": True}
    shared = generation_sweep(llama, vector, PROMPTS, **options)  # type: ignore[arg-type]
    monkeypatch.setattr(sys.modules["mlxsteer.decoding"], "forkable", lambda _: False)
    with counted(llama) as seen:
        alone = generation_sweep(llama, vector, PROMPTS, batch_size=1, **options)  # type: ignore[arg-type]
    assert total(seen) == 3 * (11 + 7 + 2 * 4)
    for a, b in zip(shared.texts.reshape(-1), alone.texts.reshape(-1), strict=True):
        assert a.tokens == b.tokens
        assert mx.abs(a.logprobs - b.logprobs).max().item() <= 1e-5


# -- other ways to steer ---------------------------------------------------------------------------------------------


def test_other_interventions_by_name_and_by_a_callable(llama: InterpretableModel) -> None:
    vector = steering_vector()
    options: dict[str, Any] = {"layers": LAYER, "strengths": [1.0], "at": "all", "max_tokens": 4, "logprobs": True}
    named = generation_sweep(llama, vector, PROMPTS, intervention="ablate", **options)
    called = generation_sweep(llama, vector, PROMPTS, intervention=iv.ablate, **options)
    assert named.unit == called.unit == "raw"
    for k, prompt in enumerate(PROMPTS):
        alone = llama.generate(prompt, {f"layers.{LAYER}": iv.ablate(vector[LAYER])}, max_tokens=4, logprobs=True)
        assert named.texts[0, 0, k, 0].tokens == called.texts[0, 0, k, 0].tokens == alone.tokens
        assert mx.abs(named.texts[0, 0, k, 0].logprobs - alone.logprobs).max().item() <= 1e-4
    with pytest.raises(ValueError, match=r"acts at='all', and at=-1 was asked for"):
        generation_sweep(llama, vector, PROMPTS, intervention=iv.ablate, **options | {"at": -1})


def test_a_steering_around_it_and_an_edited_model_act_too(llama: InterpretableModel) -> None:
    vector, outer = steering_vector(), {"layers.1": iv.add_vector(steering_vector()[0] * 3, at=slice(2, None))}
    options: dict[str, Any] = {"layers": LAYER, "strengths": [0.0, 2.0], "max_tokens": 4, "logprobs": True}
    with llama.steer(outer, prompt_tokens=PROMPTS[0]):
        around = generation_sweep(llama, vector, PROMPTS[:1], **options)
    edited = generation_sweep(llama.edit(outer), vector, PROMPTS[:1], **options)
    for j, strength in enumerate((0.0, 2.0)):
        both = {**outer, **vector.at(LAYER, strength, -1, unit="residual")}
        alone = llama.generate(PROMPTS[0], both, max_tokens=4, logprobs=True)
        for found in (around, edited):
            assert mx.abs(found.texts[0, j, 0, 0].logprobs - alone.logprobs).max().item() <= 1e-4


def test_a_scorer_runs_outside_of_the_steering_and_the_model_is_left_plain(llama: InterpretableModel) -> None:
    bare = llama.model(mx.array(PROMPTS[:1]))
    before, steps = tiny.classes(llama.model), []

    def scorer(text: str) -> float:
        assert mx.array_equal(llama.model(mx.array(PROMPTS[:1])), bare)
        assert tiny.classes(llama.model) == before
        return float(len(text))

    found = generation_sweep(
        llama, steering_vector(), PROMPTS, layers=[1, 2], max_tokens=3, scorer=scorer, batch_size=4,
        progress=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    assert steps == [(n + 1, 18) for n in range(18)]
    assert found.scored is not None
    np.testing.assert_array_equal(found.scored, found.scores(len))
    np.testing.assert_array_equal(found.scores(), found.scored)
    assert found.scores(lambda t: t.tokens[0]).shape == (2, 5, 2, 1)  # type: ignore[attr-defined]

    def broken(text: str) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generation_sweep(llama, steering_vector(), PROMPTS, layers=1, max_tokens=3, scorer=broken)
    assert tiny.classes(llama.model) == before


def test_logits_processors_see_the_whole_prompt(llama: InterpretableModel) -> None:
    contexts: list[list[int]] = []

    def processor(tokens: mx.array, logits: mx.array) -> mx.array:
        contexts.append(tokens.tolist())  # type: ignore[arg-type]
        return logits

    generation_sweep(llama, steering_vector(), PROMPTS[:1], layers=1, strengths=[1.0], max_tokens=2,
                     logits_processors=[processor])  # fmt: skip
    assert contexts[0] == PROMPTS[0]


def test_what_acts_nowhere_is_told(llama: InterpretableModel, tokenizer: TokenizerWrapper) -> None:
    with pytest.warns(NothingTouched, match="at=50 lies nowhere in 13 tokens"):
        generation_sweep(llama, steering_vector(), PROMPTS[:1], layers=1, strengths=[1.0], at=50, max_tokens=2)
    model = InterpretableModel(tiny.build("cohere2"), tokenizer)
    rope = SteeringVector({1: mx.ones((16,))}, site="layers.{layer}.self_attn.rope")
    with pytest.raises(NeverFired, match=r"layers\.1\.self_attn\.rope"):
        generation_sweep(model, rope, PROMPTS, layers=1, unit="raw", max_tokens=2)


# -- sampling --------------------------------------------------------------------------------------------------------


def tokens_of(found: GenerationSweep) -> list[Any]:
    return [text.tokens for text in found.texts.reshape(-1)]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_draws_depend_on_the_seed_the_prompt_and_the_sample_alone(name: str, tokenizer: TokenizerWrapper) -> None:
    model, vector = InterpretableModel(tiny.build(name), tokenizer), steering_vector()
    options: dict[str, Any] = {"layers": [2], "strengths": [0.0, 0.7], "temp": 1.0, "samples": 2, "max_tokens": 4}
    options |= {"layers": [1, 2]} if name == "llama" else {}
    whole = generation_sweep(model, vector, PROMPTS, **options)
    mx.random.seed(77)
    assert tokens_of(generation_sweep(model, vector, PROMPTS, **options)) == tokens_of(whole)
    assert tokens_of(generation_sweep(model, vector, PROMPTS, **options | {"batch_size": 3})) == tokens_of(whole)
    assert tokens_of(generation_sweep(model, vector, PROMPTS, **options | {"seed": 1})) != tokens_of(whole)
    part = generation_sweep(model, vector, PROMPTS[:1], **options | {"layers": 2, "strengths": [0.7], "max_tokens": 3})
    assert tokens_of(part) == [t.tokens[:3] for t in whole.texts[-1, 1, 0]]
    for axis in (2, 3):  # prompts and samples draw apart
        first, second = (whole.texts.take(i, axis).reshape(-1) for i in (0, 1))
        assert all(a.tokens != b.tokens for a, b in zip(first, second, strict=True))
    tiny_push = generation_sweep(model, vector, PROMPTS, **options | {"strengths": [0.0, 1e-6]})
    np.testing.assert_array_equal([t.tokens for t in tiny_push.texts[:, 0].reshape(-1)],
                                  [t.tokens for t in tiny_push.texts[:, 1].reshape(-1)])  # fmt: skip


def test_draws_follow_the_distribution() -> None:
    logits = mx.array([[0.0, 1.0, 2.0, -1.0, 0.5]])
    for knobs, kept in (({}, range(5)), ({"top_k": 2}, (1, 2)), ({"min_p": 0.3}, (1, 2)), ({"top_p": 0.7}, (1, 2))):
        expected = np.array([np.exp(x / 0.8) if i in kept else 0.0 for i, x in enumerate(logits[0].tolist())])  # type: ignore[arg-type]
        expected /= expected.sum()
        at_once = Draws((0, 0, 0), 0.8, knobs)(mx.tile(logprobs(logits), (4000, 1)))
        one_by_one = mx.concatenate([Draws((0, k, 0), 0.8, knobs)(logprobs(logits)) for k in range(150)])
        for draws in (at_once, one_by_one):
            counts = np.bincount(np.array(draws), minlength=5)
            assert np.abs(counts / len(draws) - expected).max() < 4 * np.sqrt(0.25 / len(draws)), knobs


# -- the result ------------------------------------------------------------------------------------------------------


def test_a_sweep_is_shown_and_saved(llama: InterpretableModel, tmp_path: Path) -> None:
    found = generation_sweep(llama, steering_vector(), PROMPTS, layers=[1, 2], strengths=[1.0, 0.0], max_tokens=3,
                             temp=0.5, samples=2, logprobs=True, scorer=len)  # fmt: skip
    assert repr(found) == "GenerationSweep(2 layers × 2 strengths × 2 prompts × 2 samples)"
    table = found.table(width=80)
    assert all(word in table for word in ("layer", "strength", "sample", "score", "+1", "residual norms"))
    assert max(map(len, table.splitlines())) <= 80
    assert table.count(" 0 ") >= 8
    long = GenerationSweep(np.array([[[["[bold]x[/bold]\n" + "y" * 500]]]], object), [3], [0.5], ["[red]?"])
    assert "[bold]x[/bold]⏎yyy" in long.table(width=60)
    assert "[red]?" in long.table()
    assert (long.table().count("y"), long.table(characters=900).count("y")) == (225, 501)  # an y in the unit's line
    path = tmp_path / "texts.json"
    found.to_json(path)
    back = GenerationSweep.from_json(path)
    assert back.table(width=80) == table
    assert (back.layers, back.strengths, back.prompts, back.unit) == ([1, 2], [1.0, 0.0], found.prompts, "residual")
    assert dict(back.record) == dict(found.record)
    assert back.record["versions"]["mlx-lm"] == mlx_lm.__version__
    np.testing.assert_array_equal(back.scored, found.scored)
    for a, b in zip(found.texts.reshape(-1), back.texts.reshape(-1), strict=True):
        assert (a, a.tokens, a.prompt_tokens, a.finish_reason, a.touched) == (
            b, b.tokens, b.prompt_tokens, b.finish_reason, b.touched)  # fmt: skip
        assert mx.array_equal(a.logprobs, b.logprobs)
    figure = back.plot(tmp_path / "texts.png")
    assert (tmp_path / "texts.png").read_bytes()[:4] == b"\x89PNG"
    score, length, distinct, repeat = figure.axes
    assert [axes.get_ylabel().split(" ")[0] for axes in figure.axes] == ["score", "length", "distinct", "longest"]
    assert {axes.get_xlabel() for axes in figure.axes} == {"strength (residual norms)"}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["layer 1", "layer 2"]
    assert found.scored is not None
    np.testing.assert_allclose(score.lines[1].get_ydata(), found.scored[1].mean(axis=(1, 2))[::-1])  # by strength
    np.testing.assert_allclose(length.lines[0].get_ydata(), [3, 3])
    pairs = [[len(set(pairwise(t.tokens))) / 2 for t in found.texts[0, j].reshape(-1)] for j in (1, 0)]
    np.testing.assert_allclose(distinct.lines[0].get_ydata(), np.mean(pairs, axis=1))
    assert repeat.get_ylim()[0] == length.get_ylim()[0] == 0
    assert "2 prompts, 2 samples of each; bars: 95 % intervals" in figure.get_suptitle()
    brief = replace(back, texts=back.texts[:, :1, :1, :1], strengths=[1.0], prompts=back.prompts[:1], scored=None)
    brief.texts[0, 0, 0, 0].tokens[:] = [7]  # no pair of tokens
    assert len([axes for axes in brief.plot().axes if axes.get_visible()]) == 3
    data = json.loads(path.read_text())
    for name, value in (("prompts", ["one"]), ("unit", "sigma"), ("texts", []), ("layers", [1])):
        path.write_text(json.dumps({**data, name: value}))
        with pytest.raises(ValueError, match="holds no sweep of texts"):
            GenerationSweep.from_json(path)
    with pytest.raises(ValueError, match="score by what"):
        long.scores()
    with pytest.raises(TypeError, match="one number for a text, not 'good'"):
        long.scores(lambda _: "good")  # type: ignore[arg-type, return-value]


def test_bad_sweeps_are_refused_before_anything_runs(
    llama: InterpretableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["mlxsteer.decoding"], "attached", lambda *_: pytest.fail("it ran"))
    refused: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "at least one prompt", {"prompts": []}),
        (TypeError, "one prompt is", {"prompts": "The food was"}),
        (TypeError, "one prompt's token ids", {"prompts": [1, 2]}),
        (TypeError, "a list of one chat", {"prompts": [{"role": "user", "content": "Hi"}]}),
        (ValueError, "prompt 1: the prompt is empty", {"prompts": [[1], []]}),
        (ValueError, "at least one strength", {"strengths": []}),
        (ValueError, "a finite number, not nan", {"strengths": [0.0, float("nan")]}),
        (TypeError, "a strength is a number", {"strengths": ["big"]}),
        (TypeError, "a strength is a number, not '1'", {"strengths": "1"}),
        (TypeError, r"logits_processors .* one is \[f\]", {"logits_processors": lambda _, x: x}),
        (KeyError, "no direction for layer 9", {"layers": [9]}),
        (ValueError, "layers are 'all'", {"layers": []}),
        (ValueError, "layers are 'all'", {"layers": "middle"}),
        (ValueError, "unit is 'raw' or 'residual'", {"unit": "sigma"}),
        (ValueError, "needs the layers' norms", {"vector": SteeringVector({0: mx.ones(64)}), "layers": 0}),
        (ValueError, "another model's", {"vector": SteeringVector({0: mx.ones(32)}), "layers": 0}),
        (TypeError, "a SteeringVector or a dict", {"vector": 3}),
        (ValueError, "max_tokens is a whole number from 1 on, not 0", {"max_tokens": 0}),
        (ValueError, "samples is a whole number from 1 on, not 0", {"samples": 0}),
        (ValueError, "samples=3 with temp=0 is 3 times the same text", {"samples": 3}),
        (ValueError, "batch_size is a whole number from 1 on, not True", {"batch_size": True}),
        (ValueError, "temp=-1.0", {"temp": -1.0}),
        (ValueError, "temp=0 draws nothing", {"top_p": 0.9}),
        (ValueError, "top_p is a probability", {"top_p": 1.5, "temp": 1.0}),
        (ValueError, "top_k is a whole number from 1 on", {"top_k": 0, "temp": 1.0}),
        (ValueError, "seed is a whole number", {"seed": -1}),
        (TypeError, "no option 'temperature'.*Nearest: temp", {"temperature": 1.0}),
        (TypeError, "no option 'sampler'.*draws for itself", {"sampler": None}),
        (TypeError, "a scorer is a function", {"scorer": "length"}),
        (PositionError, "the names are all", {"at": "end"}),
        (PositionError, "prompt 1: at=-9 lies before the prompt", {"at": -9}),
        (PositionError, r"prompt 0: at=after\(\[1, 2\]\)", {"at": after((1, 2))}),
        (ValueError, "no intervention called|unknown|no intervention", {"intervention": "ablat"}),
    ]
    for kind, message, changed in refused:
        arguments: dict[str, Any] = {"vector": steering_vector(), "prompts": PROMPTS, "layers": [0], **changed}
        with pytest.raises(kind, match=message):
            generation_sweep(llama, arguments.pop("vector"), arguments.pop("prompts"), **arguments)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        generation_sweep(InterpretableModel(llama.model), steering_vector(), PROMPTS, layers=0)


def test_texts_end_where_learned_positions_do(tokenizer: TokenizerWrapper) -> None:
    model = InterpretableModel(tiny.build("gpt2", n_positions=16), tokenizer)
    options: dict[str, Any] = {"layers": 1, "strengths": [0.0, 1.0], "at": "generated"}
    found = generation_sweep(model, steering_vector(), PROMPTS, max_tokens=9, **options)
    assert [[len(text.tokens) for text in row] for row in found.texts[0, :, :, 0]] == [[5, 9]] * 2
    alone = model.generate(PROMPTS[0], steering_vector().at(1, 1.0, "generated", unit="residual"), max_tokens=9)
    assert found.texts[0, 1, 0, 0].tokens == alone.tokens
    with pytest.raises(ValueError, match="prompt 1: the prompt has 16 tokens, and the model has 16 learned positions"):
        generation_sweep(model, steering_vector(), [PROMPTS[0], [5] * 16], max_tokens=9, **options)


# -- the pocket model ------------------------------------------------------------------------------------------------


def test_the_pocket_model_speaks_as_it_does_alone(pocket: InterpretableModel) -> None:
    pairs = [p for p in datasets.load("pocket/sentiment") if p.split == "train"][:6]
    vector, prompts = extract(pocket, pairs, progress=False), ["The food was", "The room at the hotel was"]
    found = generation_sweep(pocket, vector, prompts, layers=5, strengths=[-0.6, 0.0, 0.6], at="last", max_tokens=8,
                             logprobs=True)  # fmt: skip
    assert found.prompts == prompts
    for j, strength in enumerate(found.strengths):
        for k, prompt in enumerate(prompts):
            steer = vector.at(5, strength, "last", unit="residual")
            alone = pocket.generate(prompt, steer, max_tokens=8, logprobs=True)
            text = found.texts[0, j, k, 0]
            assert (text, text.finish_reason) == (alone, alone.finish_reason)
            np.testing.assert_allclose(np.array(text.logprobs), np.array(alone.logprobs), atol=1e-3)
    assert len({str(text) for text in found.texts[0, :, 0, 0]}) > 1
    chat = generation_sweep(pocket, vector, ["How was it?"], layers=5, strengths=0.0, max_tokens=4, chat=True)
    asked = [{"role": "user", "content": "How was it?"}]
    assert chat.texts[0, 0, 0, 0] == pocket.generate(asked, max_tokens=4)
    assert chat.prompts == ["How was it?"]
