"""Steered generation with a cache equals a recompute of the whole sequence without one, at every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
import tiny
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tiny import by_hand, logprobs

from mlxsteer import InterpretableModel, NeverFired, NothingTouched, PositionError, SteeredCacheError, after
from mlxsteer import interventions as iv

PROMPT = [7, 31, 52, 18, 77, 23, 9, 64]
LAYER = 2

# Every form of `at=` with its meaning written out: does it touch position i of a sequence whose prompt has n tokens?
FORMS: list[tuple[Any, Callable[[int, int], bool]]] = [
    ("all", lambda i, n: True),
    ("prompt", lambda i, n: i < n),
    ("generated", lambda i, n: i >= n),
    ("last", lambda i, n: i >= n - 1),
    ("first", lambda i, n: i == 0),
    (after((18, 77)), lambda i, n: i >= 5),
    (2, lambda i, n: i == 2),
    (-2, lambda i, n: i == n - 2),
    ([0, -1, 10], lambda i, n: i in (0, n - 1, 10)),
    (slice(1, 4), lambda i, n: 1 <= i < 4),
    (slice(-3, None), lambda i, n: i >= n - 3),
    (slice(1, None, 2), lambda i, n: i % 2 == 1),
    (lambda ids: [i for i, t in enumerate(ids) if t > 50], lambda i, n: i < n and PROMPT[i] > 50),
]
NAMES = [str(at) if not callable(at) else "callable" for at, _ in FORMS]


@pytest.fixture(params=["llama", "qwen3", "gemma3_text", "gpt2", "mamba2"], scope="module")
def model(request: pytest.FixtureRequest, tokenizer: TokenizerWrapper) -> InterpretableModel:
    return InterpretableModel(tiny.build(request.param), tokenizer)


@pytest.fixture(scope="module")
def llama(tokenizer: TokenizerWrapper) -> InterpretableModel:
    return InterpretableModel(tiny.build("llama"), tokenizer)


def vector(seed: int = 3) -> mx.array:
    mx.random.seed(seed)
    return 2 * mx.random.normal((64,))


def recompute(
    bare: nn.Module, prompt: list[int], made: list[int], v: mx.array, touches: Callable[[int, int], bool]
) -> list[mx.array]:
    """Log-probabilities at each step from the whole sequence, without a cache, teacher-forced on `made`."""
    rows = []
    for step in range(len(made)):
        ids = prompt + made[:step]
        mask = mx.array([touches(i, len(prompt)) for i in range(len(ids))])[None, :, None]
        with by_hand(bare.layers[LAYER], lambda h, mask=mask: mx.where(mask, h + v, h)):
            rows.append(logprobs(bare(mx.array([ids]))[0, -1]))
    mx.eval(rows)
    return rows


def distance(a: list[mx.array], b: list[mx.array]) -> float:
    assert len(a) == len(b) > 0
    return max(mx.abs(x - y).max().item() for x, y in zip(a, b, strict=True))


def run(pieces: Iterator[Any]) -> tuple[list[int], list[mx.array]]:
    seen = list(pieces)
    return [p.token for p in seen], [p.logprobs for p in seen]


@pytest.mark.parametrize("prefill_step_size", [3, 2048])
@pytest.mark.parametrize(("at", "touches"), FORMS, ids=NAMES)
def test_steered_generation_is_the_recompute(
    model: InterpretableModel, at: Any, touches: Callable[[int, int], bool], prefill_step_size: int
) -> None:
    v = vector()
    steer = {f"layers.{LAYER}": iv.add_vector(v, at=at)}
    made, steps = run(model.stream(PROMPT, steer, max_tokens=6, temp=1.0, seed=1, prefill_step_size=prefill_step_size))
    assert len(made) == 6
    assert distance(steps, recompute(model.model, PROMPT, made, v, touches)) <= 1e-4


def test_a_placement_one_token_off_is_caught(model: InterpretableModel) -> None:
    v = vector()
    made, steps = run(model.stream(PROMPT, {f"layers.{LAYER}": iv.add_vector(v, at="last")}, max_tokens=6))
    for wrong in (lambda i, n: i >= n, lambda i, n: i >= n - 2, lambda i, n: i == n - 1):
        assert distance(steps, recompute(model.model, PROMPT, made, v, wrong)) > 1e-2


@pytest.mark.parametrize("length", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("at", ["last", "generated", "prompt", "first"])
def test_short_prompts_in_short_chunks(llama: InterpretableModel, length: int, at: str) -> None:
    touches = dict(zip(NAMES, [t for _, t in FORMS], strict=True))[at]
    v, prompt = vector(), (PROMPT * 2)[:length]
    made, steps = run(
        llama.stream(prompt, {f"layers.{LAYER}": iv.add_vector(v, at=at)}, max_tokens=5, prefill_step_size=3)
    )
    assert distance(steps, recompute(llama.model, prompt, made, v, touches)) <= 1e-4


def test_generation_without_interventions_and_at_strength_zero_is_mlx_lms_own(model: InterpretableModel) -> None:
    plain = run(mlx_lm.stream_generate(model.model, model.tokenizer, PROMPT, max_tokens=12))
    ours = run(model.stream(PROMPT, max_tokens=12))
    zero = run(model.stream(PROMPT, {"layers.*": iv.add_vector(vector(), 0.0)}, max_tokens=12))
    assert plain[0] == ours[0] == zero[0]
    assert all(
        mx.array_equal(a, b) and mx.array_equal(a, c) for a, b, c in zip(plain[1], ours[1], zero[1], strict=True)
    )


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_every_family_generates_as_its_recompute(name: str, tokenizer: TokenizerWrapper) -> None:
    model, v = InterpretableModel(tiny.build(name), tokenizer), vector()
    made, steps = run(model.stream(PROMPT, {f"layers.{LAYER}": iv.add_vector(v, at="last")}, max_tokens=4,
                                   prefill_step_size=3))  # fmt: skip
    assert distance(steps, recompute(model.model, PROMPT, made, v, lambda i, n: i >= n - 1)) <= 1e-4


def test_a_loop_without_a_cache_is_steered_by_the_prompt_it_is_told(llama: InterpretableModel) -> None:
    v, ids = vector(), list(PROMPT)
    with llama.steer({f"layers.{LAYER}": iv.add_vector(v, at="generated")}, prompt_tokens=len(PROMPT)):
        steps = []
        for _ in range(4):
            steps.append(logprobs(llama.model(mx.array([ids]))[0, -1]))
            ids.append(int(mx.argmax(steps[-1]).item()))
    assert distance(steps, recompute(llama.model, PROMPT, ids[len(PROMPT) :], v, lambda i, n: i >= n)) == 0.0
    with pytest.raises(PositionError, match="prompt_tokens"), llama.steer({"layers.1": iv.zero_out(at="generated")}):
        llama.model(mx.array([ids]))


def test_a_stream_is_generate(llama: InterpretableModel) -> None:
    steer = {f"layers.{LAYER}": iv.add_vector(vector(), at="last")}
    pieces = list(llama.stream(PROMPT, steer, max_tokens=7))
    whole = llama.generate(PROMPT, steer, max_tokens=7, logprobs=True)
    assert whole == "".join(p.text for p in pieces)
    assert whole.tokens == [p.token for p in pieces]
    assert whole.prompt_tokens == PROMPT
    assert whole.finish_reason == "length"
    assert mx.array_equal(whole.logprobs, mx.stack([p.logprobs[p.token] for p in pieces]))
    assert whole.touched == [False] * 7 + [True] * 8


def test_tokens_that_a_schedule_leaves_alone_are_not_called_touched(llama: InterpretableModel) -> None:
    steer = {f"layers.{LAYER}": iv.add_vector(vector(), schedule=iv.window(2, 4))}
    made = llama.generate(PROMPT, steer, max_tokens=6)
    assert made.touched == [False] * 9 + [True] * 2 + [False] * 3
    assert llama.generate([PROMPT[:3]], steer, max_tokens=4)[0].touched == [False] * 4 + [True] * 2 + [False]
    late = {f"layers.{LAYER}": iv.add_vector(vector(), schedule=iv.window(50))}
    with pytest.warns(NothingTouched, match=r"at='all' with schedule=window\(start=50, stop=None\) lies nowhere in 11"):
        llama.generate(PROMPT, late, max_tokens=3)


def test_an_intervention_that_touched_no_token_is_warned_of(llama: InterpretableModel) -> None:
    with pytest.warns(
        NothingTouched, match=r"add_vector at layers\.2 touched no token: at=50 lies nowhere in 11 tokens"
    ):
        llama.generate(PROMPT, {f"layers.{LAYER}": iv.add_vector(vector(), at=50)}, max_tokens=3)


def test_unknown_options_are_refused_with_the_nearest(llama: InterpretableModel) -> None:
    with pytest.raises(TypeError, match="'temperature'. Nearest: temp"):
        llama.generate(PROMPT, temperature=0.5)
    with pytest.raises(TypeError, match="'max_token'. Nearest: max_tokens"):
        llama.stream(PROMPT, max_token=2)
    with pytest.raises(TypeError, match="for a list of prompts"):
        llama.generate([PROMPT], kv_bits=4)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_tokens": "5"}, "max_tokens is a whole number from 1 on, or -1 for no limit, not '5'"),
        ({"max_tokens": 5.5}, "no limit, not 5.5"),
        ({"max_tokens": None}, "no limit, not None"),
        ({"max_tokens": True}, "no limit, not True"),
        ({"max_tokens": 0}, "no limit, not 0"),
        ({"max_tokens": -2}, "no limit, not -2"),
        ({"max_tokens": [2]}, r"no limit, not \[2\]"),
        ({"top_p": 0.9}, "top_p shapes what is drawn, and temp=0 draws nothing: give temp= above 0"),
        ({"top_k": 3, "min_p": 0.1, "temp": 0}, "top_k, min_p shapes what is drawn"),
        ({"temp": 1, "top_p": 0}, "top_p is a probability above 0, up to 1, not 0"),
        ({"temp": 1, "top_p": 1.5}, "top_p is a probability"),
        ({"temp": 1, "min_p": -0.1}, "min_p is a probability, from 0 to 1"),
        ({"temp": 1, "top_k": 0}, "top_k is a whole number from 1 on, not 0"),
        ({"temp": 1, "top_k": 2.5}, "top_k is a whole number"),
        ({"temp": 1, "top_p": "0.9"}, "top_p is a number, not '0.9'"),
        ({"temp": "hot"}, "temp is a number, not 'hot'"),
        ({"temp": float("inf")}, "temp is a finite number"),
        ({"temp": -1.0}, "a temperature is 0"),
        ({"temp": 1, "seed": -1}, "seed is a whole number from 0 on, not -1"),
        ({"temp": 1, "seed": 1.5}, "seed is a whole number from 0 on, not 1.5"),
        ({"temp": 1, "seed": 2**64}, "seed is a whole number below"),
        ({"sampler": "greedy"}, "a sampler is a function"),
        ({"stop": ["."]}, "no generation option 'stop': a text ends with the model's end token"),
        ({"stop_strings": ["."]}, "leave a loop over model.stream"),
        ({"logits_processors": lambda _, x: x}, r"one is \[f\]"),
        ({"logits_processors": [3]}, "are functions of tokens and logits, not 3"),
        ({"prefill_step_size": 0}, "prefill_step_size is a whole number from 1 on, not 0"),
        ({"prompt_cache": "c.safetensors"}, "load_prompt_cache reads one from a file"),
        ({"prompt_cache": []}, "prompt_cache= is empty"),
        ({"prompt_cache": [1, 2]}, "prompt_cache= is a list of mlx-lm's caches"),
        ({"draft_model": "small"}, r"draft_model is a model, not 'small': load one by name, mlx_lm.load\(name\)\[0\]"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_runs(
    llama: InterpretableModel, options: dict[str, Any], sentence: str
) -> None:
    for verb in (llama.generate, llama.stream):  # a stream that was never begun has run nothing
        with pytest.raises((TypeError, ValueError), match=sentence):
            verb(PROMPT, **options)


@pytest.mark.parametrize(
    ("max_tokens", "sentence"),
    [
        ([2], "max_tokens has 1 numbers for 2 prompts: give one for all, or one each"),
        (np.array([2, 3, 4]), "max_tokens has 3 numbers for 2 prompts"),
        ([2, 0], "max_tokens of prompt 1 is a whole number from 1 on, or -1 for no limit, not 0"),
        ([2, "3"], "max_tokens of prompt 1"),
        ("22", "no limit, not '22'"),
    ],
)
def test_limits_of_a_batch_are_one_for_all_or_one_each(
    llama: InterpretableModel, max_tokens: Any, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        llama.generate([PROMPT, PROMPT[:3]], max_tokens=max_tokens)


def test_limits_may_be_none_at_all_and_of_any_kind_of_whole_number(tokenizer: TokenizerWrapper) -> None:
    model = InterpretableModel(tiny.build("gpt2", n_positions=16), tokenizer)
    prompts = [PROMPT, PROMPT[:3]]
    assert len(model.generate(PROMPT, max_tokens=np.int64(3)).tokens) == 3
    assert [len(row.tokens) for row in model.generate(prompts, max_tokens=np.array([2, 4]))] == [2, 4]
    # without a limit of their own, texts end with the learned positions
    assert len(model.generate(PROMPT, max_tokens=-1).tokens) == 16 - len(PROMPT)
    assert [len(row.tokens) for row in model.generate(prompts, max_tokens=[-1, 4])] == [16 - len(PROMPT), 4]


@pytest.mark.parametrize("prompt", [PROMPT, [PROMPT, PROMPT]])
def test_without_a_limit_a_text_goes_on_until_the_model_ends_it(pocket: InterpretableModel, prompt: Any) -> None:
    assert pocket.tokenizer is not None
    bare, wrapped = tiny.build("llama"), TokenizerWrapper(pocket.tokenizer._tokenizer)
    wrapped._eos_token_ids = {10**6}
    model = InterpretableModel(bare, wrapped)
    last = model.generate(PROMPT, max_tokens=6).tokens[5]
    wrapped._eos_token_ids = {last}
    made = model.generate(prompt, max_tokens=-1)
    for text in made if isinstance(prompt[0], list) else [made]:
        assert text.finish_reason == "stop"
        assert len(text.tokens) <= 5


# -- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "gpt2", "mamba2", "gemma2"])
def test_rows_of_a_batch_keep_their_own_steering_as_they_join_and_leave(name: str, tokenizer: TokenizerWrapper) -> None:
    model = InterpretableModel(tiny.build(name), tokenizer)
    prompts = [PROMPT[:5], PROMPT * 3, [9], PROMPT[2:], [*PROMPT, 40, 41, 42], [55, 66]]
    ats: list[Any] = ["last", "generated", "all", None, -1, "prompt"]
    limits = [5, 9, 3, 7, 12, 6]
    steers = [None if at is None else {f"layers.{LAYER}": iv.add_vector(vector(i), at=at)} for i, at in enumerate(ats)]
    batching = {} if not model._sites.family.batch else {"prefill_batch_size": 2, "completion_batch_size": 3}
    rows = model.generate(prompts, steers, max_tokens=limits, prefill_step_size=4, logprobs=True, **batching)
    meaning: dict[Any, Callable[[int, int], bool]] = {
        "last": lambda i, n: i >= n - 1, "generated": lambda i, n: i >= n, "all": lambda i, n: True,
        None: lambda i, n: False, -1: lambda i, n: i == n - 1, "prompt": lambda i, n: i < n,
    }  # fmt: skip
    for i, row in enumerate(rows):
        assert len(row.tokens) == limits[i]
        steps = recompute(model.model, prompts[i], row.tokens, vector(i), meaning[ats[i]])
        expected = mx.stack([s[t] for s, t in zip(steps, row.tokens, strict=True)])
        assert mx.abs(row.logprobs - expected).max().item() <= 1e-4


def test_per_row_strengths_follow_their_row(llama: InterpretableModel) -> None:
    prompts = [PROMPT, PROMPT[:3], PROMPT[1:]]
    v = vector()
    together = llama.generate(
        prompts, {f"layers.{LAYER}": iv.add_vector(v, strength=[1.0, 0.0, -2.0])}, max_tokens=6, logprobs=True
    )
    for prompt, strength, row in zip(prompts, (1.0, 0.0, -2.0), together, strict=True):
        steps = recompute(llama.model, prompt, row.tokens, strength * v, lambda i, n: True)
        expected = mx.stack([s[t] for s, t in zip(steps, row.tokens, strict=True)])
        assert mx.abs(row.logprobs - expected).max().item() <= 1e-4


# -- other code's generation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefill_step_size", [3, 2048])
@pytest.mark.parametrize("at", ["all", "prompt", "generated", "first", 2])
def test_foreign_generation_is_steered_without_knowing_the_prompt(
    model: InterpretableModel, at: Any, prefill_step_size: int
) -> None:
    touches = dict(zip(NAMES, [t for _, t in FORMS], strict=True))[str(at)]
    v = vector()
    with model.steer({f"layers.{LAYER}": iv.add_vector(v, at=at)}):
        made, steps = run(
            mlx_lm.stream_generate(
                model.model, model.tokenizer, PROMPT, max_tokens=6, prefill_step_size=prefill_step_size
            )
        )
    assert distance(steps, recompute(model.model, PROMPT, made, v, touches)) <= 1e-4


@pytest.mark.parametrize("at", ["last", after((18, 77)), -2])
def test_foreign_generation_needs_the_prompt_for_some_positions(llama: InterpretableModel, at: Any) -> None:
    v = vector()
    steer = {f"layers.{LAYER}": iv.add_vector(v, at=at)}
    with pytest.raises(PositionError, match="prompt_tokens"), llama.steer(steer):
        mlx_lm.generate(llama.model, llama.tokenizer, PROMPT, max_tokens=3)
    touches = dict(zip(NAMES, [t for _, t in FORMS], strict=True))[str(at)]
    with llama.steer(steer, prompt_tokens=PROMPT):
        made, steps = run(mlx_lm.stream_generate(llama.model, llama.tokenizer, PROMPT, max_tokens=6))
    assert distance(steps, recompute(llama.model, PROMPT, made, v, touches)) <= 1e-4


def test_generate_inside_a_steering_knows_the_prompt_and_adds_its_own(llama: InterpretableModel) -> None:
    v, w = vector(3), vector(4)
    with llama.steer(outer={f"layers.{LAYER}": iv.add_vector(v, at="last")}):
        made, steps = run(llama.stream(PROMPT, {f"layers.{LAYER}": iv.add_vector(w, at="last")}, max_tokens=5))
    assert distance(steps, recompute(llama.model, PROMPT, made, v + w, lambda i, n: i >= n - 1)) <= 1e-4


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_foreign_batches_are_steered(name: str, tokenizer: TokenizerWrapper) -> None:
    model = InterpretableModel(tiny.build(name), tokenizer)
    prompts = [PROMPT[:5], PROMPT * 2, [9], PROMPT[2:]]
    v = vector()
    made: dict[int, list[int]] = {}
    chosen: dict[int, list[float]] = {}
    with model.steer({f"layers.{LAYER}": iv.add_vector(v, at="generated")}):
        generator = BatchGenerator(
            model.model, stop_tokens=[[10**6]], prefill_step_size=4, prefill_batch_size=2, completion_batch_size=3
        )
        uids = generator.insert(prompts, max_tokens=[5, 8, 3, 6])
        while responses := generator.next_generated():
            for response in responses:
                made.setdefault(response.uid, []).append(response.token)
                chosen.setdefault(response.uid, []).append(response.logprobs[response.token].item())
    for uid, prompt in zip(uids, prompts, strict=True):
        steps = recompute(model.model, prompt, made[uid], v, lambda i, n: i >= n)
        expected = [s[t].item() for s, t in zip(steps, made[uid], strict=True)]
        assert np.allclose(chosen[uid], expected, atol=1e-4)


@pytest.mark.parametrize(
    "told", [np.int64(8), mx.array(8), np.array(PROMPT), mx.array(PROMPT), tuple(PROMPT), [np.array(PROMPT)]]
)
def test_a_prompt_is_told_as_a_number_or_as_ids_of_any_kind(llama: InterpretableModel, told: Any) -> None:
    steer = {f"layers.{LAYER}": iv.add_vector(vector(), at="last")}
    with llama.steer(steer, prompt_tokens=told):
        text = mlx_lm.generate(llama.model, llama.tokenizer, PROMPT, max_tokens=4)
    assert text == llama.generate(PROMPT, steer, max_tokens=4)


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        (5.0, "a number of tokens, a list of token ids .*, or a list of such lists, not 5.0"),
        ("The food", "not 'The food'"),
        (["The food"], "a number of tokens"),
        ([1.5, 2.5], "a number of tokens"),
        ([PROMPT, 3], "a number of tokens"),
        (True, "not True"),
        (0, "a prompt has at least one token"),
        ([], "a prompt has at least one token"),
        ([PROMPT, []], "a prompt has at least one token"),
    ],
)
def test_what_tells_no_prompt_is_refused(llama: InterpretableModel, told: Any, sentence: str) -> None:
    with pytest.raises((TypeError, ValueError), match=sentence):
        llama.steer({"layers.1": iv.zero_out(at="last")}, prompt_tokens=told)


@pytest.mark.parametrize("prompt_tokens", [5.0, True, "5", [5.0], [0]])
def test_a_traces_prompt_is_a_whole_number_of_tokens(llama: InterpretableModel, prompt_tokens: Any) -> None:
    with pytest.raises(ValueError, match="prompt_tokens is a whole number from 1 on"):
        llama.trace(PROMPT, prompt_tokens=prompt_tokens)


def test_a_strength_per_row_needs_rows_of_ours(llama: InterpretableModel) -> None:
    each = {"layers.1": iv.add_vector(vector(), [1.0, -1.0])}
    sentence = (
        r"add_vector at layers\.1: it has 2 strengths, one per row, which work in model.generate\(\[...\]\) and in"
    )
    with pytest.raises(ValueError, match=sentence):
        llama.steer(each, prompt_tokens=[PROMPT, PROMPT[:3]])
    with pytest.raises(ValueError, match=sentence):
        llama.edit(each)


def test_of_an_open_steering_only_the_strength_changes(llama: InterpretableModel) -> None:
    made = llama.steer(mood={"layers.1": iv.zero_out()}, tone={"layers.2": iv.zero_out()})
    with made as steering:
        for wrong in ("2", True, None):
            with pytest.raises(TypeError, match="a strength is a number"):
                steering.strength = wrong
            with pytest.raises(TypeError, match="a strength is a number"):
                steering["mood"].strength = wrong
        with pytest.raises(AttributeError, match=r"'strenth' can't be set: .* only the strength changes"):
            steering["mood"].strenth = 2
        with pytest.raises(AttributeError, match="only the strength changes"):
            steering["mood"].edits = ()
        with pytest.raises(AttributeError, match="'strenght' can't be set"):
            steering.strenght = 2
        with pytest.raises(AttributeError, match=r"\.strength, or \[\"mood\"\]\.strength"):
            steering.mood = 2
        assert steering.strength == 1.0
        steering.strength = np.float32(0.5)
        assert steering["tone"].strength == 0.5
        assert repr(steering["mood"]) == "<steering mood ×0.5 at layers.1>"
        llama.model(mx.array([PROMPT]))
    with pytest.raises(ValueError, match="two are called 'steering'"):
        llama.steer({"layers.1": iv.zero_out()}, steering={"layers.2": iv.zero_out()})


def test_mlx_lms_own_batch_function_is_steered(llama: InterpretableModel) -> None:
    steer = {f"layers.{LAYER}": iv.add_vector(vector(), at="generated")}
    with llama.steer(steer):
        together = mlx_lm.batch_generate(llama.model, llama.tokenizer, [PROMPT, PROMPT[:3]], max_tokens=6).texts
    alone = [llama.generate(prompt, steer, max_tokens=6) for prompt in (PROMPT, PROMPT[:3])]
    assert together == [llama.decode(text.tokens) for text in alone]


def test_a_strength_changed_while_open_takes_effect_from_the_token_after_the_next(llama: InterpretableModel) -> None:
    v = vector()
    steer = {f"layers.{LAYER}": iv.add_vector(v, at="all")}
    steps, made = [], []
    with llama.steer(mood=steer, prompt_tokens=PROMPT) as steering:
        for n, piece in enumerate(mlx_lm.stream_generate(llama.model, llama.tokenizer, PROMPT, max_tokens=6)):
            made.append(piece.token)
            steps.append(piece.logprobs)
            if n == 1:
                steering["mood"].strength = 0.0
    # when piece 1 was handed out, the forward that reads its token (position n + 1) was staged already
    last = len(PROMPT) + 1
    assert distance(steps, recompute(llama.model, PROMPT, made, v, lambda i, n: i <= last)) <= 1e-4


def test_speculative_decoding_steers_the_target_exactly(tokenizer: TokenizerWrapper) -> None:
    model = InterpretableModel(tiny.build("llama"), tokenizer)
    draft = tiny.build("llama", seed=9)
    v = vector()
    for at, touches in FORMS[:6]:
        steer = {f"layers.{LAYER}": iv.add_vector(v, at=at)}
        made, steps = run(model.stream(PROMPT, steer, max_tokens=9, draft_model=draft, num_draft_tokens=3))
        assert made == model.generate(PROMPT, steer, max_tokens=9).tokens
        assert distance(steps, recompute(model.model, PROMPT, made, v, touches)) <= 1e-4


def test_a_draft_model_may_come_wrapped(llama: InterpretableModel) -> None:
    draft = InterpretableModel(tiny.build("llama", seed=9))
    options: dict[str, Any] = {"max_tokens": 5, "num_draft_tokens": 2}
    made = llama.generate(PROMPT, draft_model=draft, **options)
    assert made.tokens == llama.generate(PROMPT, draft_model=draft.model, **options).tokens


def test_foreign_speculative_decoding_needs_the_prompt(tokenizer: TokenizerWrapper) -> None:
    model = InterpretableModel(tiny.build("llama"), tokenizer)
    draft = tiny.build("llama", seed=9)
    v = vector()
    steer = {f"layers.{LAYER}": iv.add_vector(v, at="generated")}
    with pytest.raises(PositionError, match="draft model"), model.steer(steer):
        list(mlx_lm.stream_generate(model.model, tokenizer, PROMPT, max_tokens=9, draft_model=draft))
    with model.steer(steer, prompt_tokens=PROMPT):
        made, steps = run(mlx_lm.stream_generate(model.model, tokenizer, PROMPT, max_tokens=9, draft_model=draft))
    assert distance(steps, recompute(model.model, PROMPT, made, v, lambda i, n: i >= n)) <= 1e-4


# -- caches ----------------------------------------------------------------------------------------------------------


def test_a_quantized_cache_carries_the_steering_on(tokenizer: TokenizerWrapper) -> None:
    bare = tiny.build("llama", head_dim=64)  # a quantized cache comes in groups of 64
    model, v = InterpretableModel(bare, tokenizer), vector()
    steer = {f"layers.{LAYER}": iv.add_vector(v, at="last")}
    made, steps = run(model.stream(PROMPT, steer, max_tokens=6, kv_bits=8, quantized_kv_start=4, prefill_step_size=3))
    assert distance(steps, recompute(bare, PROMPT, made, v, lambda i, n: i >= n - 1)) <= 0.02
    assert distance(steps, recompute(bare, PROMPT, made, v, lambda i, n: i >= n)) > 0.05


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_max_kv_size_still_works(name: str, tokenizer: TokenizerWrapper) -> None:
    model = InterpretableModel(tiny.build(name), tokenizer)
    limited = {"max_tokens": 20, "max_kv_size": 16}
    plain = run(mlx_lm.stream_generate(model.model, tokenizer, PROMPT * 3, **limited))
    unbounded = run(mlx_lm.stream_generate(model.model, tokenizer, PROMPT * 3, max_tokens=20))
    zero = {"layers.1": iv.add_vector(vector(), at="last")}
    with model.steer(mood=zero, prompt_tokens=PROMPT * 3) as steering:
        steering.strength = 0.0
        foreign = run(mlx_lm.stream_generate(model.model, tokenizer, PROMPT * 3, **limited))
    ours = run(model.stream(PROMPT * 3, {"layers.1": iv.add_vector(vector(), 0.0)}, **limited))
    assert all(mx.array_equal(a, b) for a, b in zip(plain[1], foreign[1], strict=True))
    assert all(mx.array_equal(a, b) for a, b in zip(plain[1], ours[1], strict=True))
    assert not mx.array_equal(plain[1][-1], unbounded[1][-1])


def test_a_cache_goes_on_under_the_same_steering_and_is_refused_under_another(llama: InterpretableModel) -> None:
    v = vector()
    steer = {f"layers.{LAYER}": iv.add_vector(v, at="all")}
    cache = make_prompt_cache(llama.model)
    first = llama.generate(PROMPT, steer, max_tokens=4, prompt_cache=cache)
    same = {f"layers.{LAYER}": iv.add_vector(v, at="all")}
    rest = [33, 44]
    second, steps = run(llama.stream(rest, same, max_tokens=4, prompt_cache=cache))
    sequence = PROMPT + first.tokens + rest  # mlx-lm feeds the last generated token too
    assert distance(steps, recompute(llama.model, sequence, second, v, lambda i, n: True)) <= 1e-4
    with pytest.raises(SteeredCacheError, match="another steering"):
        llama.generate(rest, {"layers.1": iv.add_vector(v)}, max_tokens=2, prompt_cache=cache)
    with pytest.raises(SteeredCacheError, match="filled under steering"):
        llama.generate(rest, max_tokens=2, prompt_cache=cache)
    with pytest.raises(SteeredCacheError, match="filled under steering"):
        llama.model(mx.array([rest]), cache=cache)
    with pytest.raises(SteeredCacheError, match="another steering"), llama.steer({"layers.1": iv.add_vector(v)}):
        llama.model(mx.array([rest]), cache=cache)


def test_a_clean_cache_may_be_steered_from_here_on(llama: InterpretableModel) -> None:
    v = vector()
    cache = make_prompt_cache(llama.model)
    mx.eval(llama.model(mx.array([PROMPT[:5]]), cache=cache))
    steer = {f"layers.{LAYER}": iv.add_vector(v, at="all")}
    made, steps = run(llama.stream(PROMPT[5:], steer, max_tokens=4, prompt_cache=cache))
    assert distance(steps, recompute(llama.model, PROMPT, made, v, lambda i, n: i >= 5)) <= 1e-4


def test_a_plain_call_between_two_tokens_is_plain(llama: InterpretableModel) -> None:
    bare = llama.model(mx.array([PROMPT]))
    before = tiny.classes(llama.model)
    stream = llama.stream(PROMPT, {"layers.*": iv.add_vector(vector())}, max_tokens=5)
    for _ in range(3):
        next(stream)
        assert mx.array_equal(llama.model(mx.array([PROMPT])), bare)
    stream.close()
    assert tiny.classes(llama.model) == before
    assert mx.array_equal(llama.model(mx.array([PROMPT])), bare)


def test_a_place_that_never_runs_is_an_error(tokenizer: TokenizerWrapper) -> None:
    model = InterpretableModel(tiny.build("cohere2"), tokenizer)
    with pytest.raises(NeverFired, match=r"layers\.1\.self_attn\.rope"):
        model.generate(PROMPT, {"layers.1.self_attn.rope": lambda x: x}, max_tokens=3)


def test_bad_knobs_are_refused(llama: InterpretableModel) -> None:
    with pytest.raises(ValueError, match="not both"):
        llama.generate(PROMPT, max_tokens=2, temp=1.0, sampler=lambda x: mx.argmax(x, axis=-1))
    with pytest.raises(ValueError, match="temperature"):
        llama.generate(PROMPT, max_tokens=2, temp=-1.0)
    with pytest.raises(ValueError, match="one prompt"):
        llama.stream([PROMPT, PROMPT])
    with pytest.raises(ValueError, match="2 key dicts for 1 prompts"):
        llama.generate([PROMPT], [None, None])
    with pytest.raises(ValueError, match="3 strengths for 2 rows"):
        llama.generate([PROMPT, PROMPT], {"layers.1": iv.add_vector(vector(), strength=[1, 2, 3])})
