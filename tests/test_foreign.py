"""Steering under other code's loops: what can't be known of them is asked for, and what is told of them is checked."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

import mlxsteer as ms
from mlxsteer import InterpretableModel, NothingTouched, PositionError, after
from mlxsteer import interventions as iv

PROMPT, MADE = [5, 6, 7, 8, 9], [20, 21, 22]
KEY = "layers.1"


@pytest.fixture(params=["llama", "mamba2"], scope="module")
def model(request: pytest.FixtureRequest, tokenizer: TokenizerWrapper) -> InterpretableModel:
    return InterpretableModel(tiny.build(request.param), tokenizer)


@pytest.fixture(scope="module")
def llama(tokenizer: TokenizerWrapper) -> InterpretableModel:
    return InterpretableModel(tiny.build("llama"), tokenizer)


def vector(seed: int = 3, width: int = 64) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=width).astype(np.float32))


def add(at: Any, strength: float = 3.0, **more: Any) -> dict[str, Any]:
    return {KEY: iv.add_vector(vector(), strength, at=at, **more)}


def whole(model: InterpretableModel, steer: Any, made: list[int] = MADE) -> mx.array:
    with model.trace([*PROMPT, *made], steer, prompt_tokens=len(PROMPT)):
        return model.output[0].save()


# -- loops of one's own --------------------------------------------------------------------------------------------

CHUNKS = [[5], [3, 2], [2, 2, 1], [4, 1], [1] * 5]


@pytest.mark.parametrize("read", [True, False], ids=["read", "unread"])
@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
@pytest.mark.parametrize("at", ["generated", "prompt", "last", -2, after((8,))], ids=str)
def test_a_loop_of_ones_own_is_steered_as_the_prompt_that_it_tells(
    model: InterpretableModel, chunks: list[int], read: bool, at: Any
) -> None:
    ends = list(itertools.accumulate(chunks))
    fed = [PROMPT[end - size : end] for end, size in zip(ends, chunks, strict=True)] + [[token] for token in MADE]
    cache, found = make_prompt_cache(model.model), []
    with model.steer(add(at), prompt_tokens=PROMPT):
        for ids in fed:
            found.append(model.model(mx.array([ids]), cache=cache)[0])
            if read:
                mx.eval([entry.state for entry in cache])
    assert mx.abs(mx.concatenate(found) - whole(model, add(at))).max().item() <= 1e-4


@pytest.mark.parametrize("how", ["otherwise", "unnamed"])
def test_a_cache_that_a_model_calls_otherwise_is_known_for_one(how: str) -> None:
    plain = InterpretableModel(tiny.build("llama"))
    module = tiny.build("llama")
    base = type(module)

    class Otherwise(base):  # type: ignore[misc,valid-type]
        def __call__(self, ids: mx.array, past: Any = None) -> mx.array:
            return base.__call__(self, ids, cache=past)

    class Unnamed(base):  # type: ignore[misc,valid-type]
        def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
            return base.__call__(self, *args, **kwargs)

    object.__setattr__(module, "__class__", Otherwise if how == "otherwise" else Unnamed)
    model = InterpretableModel(module)
    mine, own = make_prompt_cache(module), make_prompt_cache(plain.model)
    with model.steer(add("first")), plain.steer(add("first")):
        for ids in (PROMPT, *([token] for token in MADE)):
            found = module(mx.array([ids]), past=mine) if how == "otherwise" else module(mx.array([ids]), mine)
            assert mx.array_equal(found, plain.model(mx.array([ids]), cache=own))


@pytest.mark.parametrize("at", ["generated", "prompt", "last", slice(1, -1)], ids=str)
def test_where_its_prompt_ends_is_not_guessed(model: InterpretableModel, at: Any) -> None:
    cache = make_prompt_cache(model.model)
    with pytest.raises(PositionError, match="prompt_tokens"), model.steer(add(at)):
        model.model(mx.array([PROMPT]), cache=cache)
        mx.eval([entry.state for entry in cache])
        model.model(mx.array([[20]]), cache=cache)


@pytest.mark.parametrize("at", ["all", "first", [1, 6], slice(2, 7)], ids=str)
def test_positions_that_need_no_prompt_need_none_there(model: InterpretableModel, at: Any) -> None:
    cache, found = make_prompt_cache(model.model), []
    with model.steer(add(at)):
        for ids in (PROMPT[:3], PROMPT[3:], *([token] for token in MADE)):
            found.append(model.model(mx.array([ids]), cache=cache)[0])
            mx.eval([entry.state for entry in cache])
    assert mx.abs(mx.concatenate(found) - whole(model, add(at))).max().item() <= 1e-4


@pytest.mark.parametrize("told", [PROMPT, len(PROMPT)], ids=["ids", "length"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_steering_opened_anew_for_each_step_goes_on(model: InterpretableModel, size: int, told: Any) -> None:
    """Spans and gates go on too."""
    gate = iv.when(iv.projection(vector(4), read="mean") > -1e6, iv.add_vector(vector(4), 2.0, at="last"))
    steer = {KEY: [iv.add_vector(vector(), 3.0, at="generated", exclude=((9,), (21,))), gate]}
    cache, found = make_prompt_cache(model.model), []
    for ids in [PROMPT[i : i + size] for i in range(0, len(PROMPT), size)] + [[token] for token in MADE]:
        with model.steer(steer, prompt_tokens=told):
            found.append(model.model(mx.array([ids]), cache=cache)[0])
    assert mx.abs(mx.concatenate(found) - whole(model, steer)).max().item() <= 1e-4


def test_a_second_turn_with_the_same_prompt_is_a_prompt_again(llama: InterpretableModel) -> None:
    cache = make_prompt_cache(llama.model)
    for _ in range(2):
        with llama.steer(add("last"), prompt_tokens=PROMPT):
            pieces = list(
                mlx_lm.stream_generate(llama.model, llama.tokenizer, PROMPT, max_tokens=2, prompt_cache=cache)
            )
    own = make_prompt_cache(llama.model)
    turns = [list(llama.stream(PROMPT, add("last"), max_tokens=2, prompt_cache=own)) for _ in range(2)]
    assert mx.allclose(pieces[-1].logprobs, turns[1][-1].logprobs, atol=1e-4).item()


def test_what_runs_is_held_against_what_was_told(llama: InterpretableModel) -> None:
    for told in ([1, 2, 3], [[1, 2], [3, 4]]):
        with (
            pytest.raises(ValueError, match=r"fed the tokens \[5, 6, 7, 8\], and no prompt in prompt_tokens="),
            llama.steer(add("last"), prompt_tokens=told),
        ):
            mlx_lm.generate(llama.model, llama.tokenizer, PROMPT, max_tokens=1)
    with (
        pytest.raises(ValueError, match=r"holds 1 prompts, and one more row has begun"),
        llama.steer(add("last"), prompt_tokens=[PROMPT]),
    ):
        mlx_lm.batch_generate(llama.model, llama.tokenizer, [PROMPT, PROMPT], max_tokens=1)


@pytest.mark.parametrize("at", [7, [1, 4, 8], slice(2, 9), "all"], ids=str)
@pytest.mark.parametrize("name", ["llama", "mamba2", "gemma3_text", "qwen3_next"])
@pytest.mark.parametrize(
    ("told", "step"),
    [(True, 2), (False, 2048), *(pytest.param(*other, marks=pytest.mark.full) for other in ((True, 2048), (False, 2)))],
)
def test_rows_of_several_lengths_stand_where_they_do_alone(
    name: str, told: bool, step: int, at: Any, tokenizer: TokenizerWrapper
) -> None:
    """mlx-lm pads the shorter ones at the end of a prefill, and the padding is no token of theirs."""
    model, prompts = InterpretableModel(tiny.build(name), tokenizer), [[5, 6, 11, 8, 9, 9, 9], [10, 11, 12], [4, 3]]
    with model.steer(add(at), prompt_tokens=prompts if told else None):
        found = mlx_lm.batch_generate(model.model, tokenizer, prompts, max_tokens=6, return_token_ids=True,
                                      return_prompt_caches=True, prefill_step_size=step)  # fmt: skip
    assert found.token_ids == [model.generate(prompt, add(at), max_tokens=6).tokens for prompt in prompts]
    assert [cache[0].steering_state.rows[0].seen for cache in found.caches] == [13, 9, 8]


def test_spans_in_padded_rows_need_the_prompts(llama: InterpretableModel, tokenizer: TokenizerWrapper) -> None:
    steer, prompts = add("all", exclude=((8, 9), (12,))), [[5, 6, 11, 8, 9, 9, 9], [10, 8, 9], [4, 8]]
    with llama.steer(steer, prompt_tokens=prompts):
        found = mlx_lm.batch_generate(llama.model, tokenizer, prompts, max_tokens=4, return_token_ids=True)
    assert found.token_ids == [llama.generate(prompt, steer, max_tokens=4).tokens for prompt in prompts]
    with pytest.raises(PositionError, match="nobody says where the padding"), llama.steer(steer):
        mlx_lm.batch_generate(llama.model, tokenizer, prompts, max_tokens=4)


@pytest.mark.parametrize("at", ["last", "generated", after((11,)), -1], ids=str)
@pytest.mark.parametrize(
    "prompts", [[[5, 6, 11, 8], [11], [10, 11, 12]], [[11], [11, 3], [11]], [[4, 11], [4, 11, 5], [11]]], ids=str
)
def test_prompts_of_a_batch_are_known_by_what_is_fed(
    llama: InterpretableModel, tokenizer: TokenizerWrapper, prompts: list[list[int]], at: Any
) -> None:
    """mlx-lm runs prompts of one token before the others."""
    with llama.steer(add(at), prompt_tokens=prompts):
        found = mlx_lm.batch_generate(llama.model, tokenizer, prompts, max_tokens=4, return_token_ids=True)
    assert found.token_ids == [llama.generate(prompt, add(at), max_tokens=4).tokens for prompt in prompts]


@pytest.mark.parametrize("at", ["prompt", "generated", "last", -1], ids=str)
@pytest.mark.parametrize(
    ("prompts", "options"),
    [
        ([[5, 6], *([10 + i, 11] for i in range(7)), [5], [5, 7]], {}),  # more than are taken on together
        ([[5, 6], [5]], {"prefill_batch_size": 1}),
        ([[5, 6, 7], [5]], {"prefill_step_size": 1}),
        ([[7, 6], [7, 6, 6, 5], [7, 6], [6, 5, 6], [7]], {"prefill_step_size": 3, "prefill_batch_size": 2}),
    ],
    ids=["many", "one by one", "token by token", "prefixes"],
)
def test_a_prompt_of_one_token_and_a_chunk_of_one_are_told_apart(
    llama: InterpretableModel, tokenizer: TokenizerWrapper, prompts: list[list[int]], options: dict[str, int], at: Any
) -> None:
    with llama.steer(add(at), prompt_tokens=prompts):
        found = mlx_lm.batch_generate(llama.model, tokenizer, prompts, max_tokens=4, return_token_ids=True,
                                      return_prompt_caches=True, **options)  # fmt: skip
    assert [cache[0].steering_state.rows[0].prompt.tokens for cache in found.caches] == prompts
    assert found.token_ids == [llama.generate(prompt, add(at), max_tokens=4).tokens for prompt in prompts]


TURNS = [
    ([5, 6], [5, 6], 2048), ([5, 6, 7], [6, 7], 2048), ([5, 6, 7], [7], 2048), ([5], [5], 2048),
    ([5, 6, 7], [5, 6, 7], 1), ([5, 6, 7], [8, 9, 10], 2048),
]  # fmt: skip


@pytest.mark.parametrize("at", ["prompt", "generated", "last"])
@pytest.mark.parametrize(("first", "second", "step"), TURNS, ids=str)
@pytest.mark.parametrize("together", [True, False], ids=["one block", "two blocks"])
def test_a_second_turn_is_a_prompt_again(
    llama: InterpretableModel, first: list[int], second: list[int], step: int, at: str, together: bool
) -> None:
    """In one block a prompt of one token can't be told from what was generated."""
    if together and len(second) == 1:
        return
    cache, own = make_prompt_cache(llama.model), make_prompt_cache(llama.model)
    turns = [first, second]
    blocks = [(turns, turns)] if together else [([turn], turn) for turn in turns]
    for run, told in blocks:
        with llama.steer(add(at), prompt_tokens=told):
            for turn in run:
                pieces = list(
                    mlx_lm.stream_generate(
                        llama.model, llama.tokenizer, turn, max_tokens=3, prompt_cache=cache, prefill_step_size=step
                    )
                )
    expected = [list(llama.stream(turn, add(at), max_tokens=3, prompt_cache=own)) for turn in turns][1]
    assert all(mx.allclose(a.logprobs, b.logprobs, atol=1e-4) for a, b in zip(pieces, expected, strict=True))


def test_a_span_stays_open_through_the_turns(llama: InterpretableModel) -> None:
    steer, turns = add("all", exclude=((6,), (94,))), [[5, 6, 7], [8, 9]]  # it opens at 6, and never closes
    own, foreign = make_prompt_cache(llama.model), make_prompt_cache(llama.model)
    made: list[int] = []
    for turn in turns:
        found = llama.generate(turn, steer, max_tokens=2, prompt_cache=own, logprobs=True)
        with llama.steer(steer, prompt_tokens=turn):
            pieces = list(
                mlx_lm.stream_generate(llama.model, llama.tokenizer, turn, max_tokens=2, prompt_cache=foreign)
            )
        made += [*turn, *found.tokens]
    assert not any(found.touched)
    with llama.trace(made[:-2], steer):
        expected = llama.output[0, -1] - mx.logsumexp(llama.output[0, -1])
    assert abs(found.logprobs[0].item() - expected[found.tokens[0]].item()) <= 1e-4
    assert mx.allclose(pieces[0].logprobs, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ([5, 6, 7], "tells of 3 tokens, and the prompt that runs has more"),
        (3, "tells of 3 tokens, and the prompt that runs has more"),
        ([5, 6, 7, 8, 9, 1], "tells of 6 tokens, and the prompt that runs has 5"),
        (50, "tells of 50 tokens, and the prompt that runs has 5"),
        ([5, 6, 1, 1, 1], "fed the tokens"),
    ],
)
def test_a_prompt_that_is_told_wrong_is_found_out_and_the_cache_stays_usable(
    model: InterpretableModel, told: Any, said: str
) -> None:
    cache = make_prompt_cache(model.model)
    with pytest.raises(ValueError, match=said), model.steer(add("last"), prompt_tokens=told):
        list(
            mlx_lm.stream_generate(
                model.model, model.tokenizer, PROMPT, max_tokens=2, prefill_step_size=2, prompt_cache=cache
            )
        )
    cache = make_prompt_cache(model.model)
    with pytest.raises(ValueError, match="fed the tokens"), model.steer(add("last"), prompt_tokens=[1, 2]):
        list(mlx_lm.stream_generate(model.model, model.tokenizer, PROMPT, max_tokens=2, prompt_cache=cache))
    assert model.generate(PROMPT, max_tokens=3, prompt_cache=cache) == model.generate(PROMPT, max_tokens=3)


def test_a_forward_without_a_cache_is_held_against_what_was_told_too(llama: InterpretableModel) -> None:
    for told, ids in (([5, 6, 7], [[9] * 5]), ([5, 6, 7], [[5, 6]]), ([[5, 6, 7], [8, 9]], [[8, 9, 1], [5, 6, 7]])):
        with pytest.raises(ValueError, match="fed the tokens"), llama.steer(add("last"), prompt_tokens=told):
            llama.model(mx.array(ids))


def test_a_steering_enabled_anew_is_asked_anew(llama: InterpretableModel) -> None:
    steering = llama.steer(add([3])).enable()
    mlx_lm.generate(llama.model, llama.tokenizer, PROMPT, max_tokens=2)
    steering.disable()
    steering.enable()
    with pytest.warns(UserWarning, match="no forward of this model ran"):
        steering.disable()


# -- caches --------------------------------------------------------------------------------------------------------


def test_a_quantized_copy_of_a_cache_goes_its_own_way(tokenizer: TokenizerWrapper) -> None:
    small = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64}
    model = InterpretableModel(tiny.build("llama", **small), tokenizer)
    steer = {KEY: iv.add_vector(vector(3, 128), 3.0, at=[5, 7, 8])}

    def filled() -> list[Any]:
        cache = make_prompt_cache(model.model)
        model.generate(PROMPT, steer, max_tokens=1, prompt_cache=cache)
        return cache

    alone = model.generate([10, 11, 12], steer, max_tokens=3, prompt_cache=filled(), logprobs=True)
    cache = filled()
    copied = [entry.to_quantized(group_size=32, bits=8) for entry in cache]
    model.generate([20, 21, 22, 23], steer, max_tokens=4, prompt_cache=copied)
    found = model.generate([10, 11, 12], steer, max_tokens=3, prompt_cache=cache, logprobs=True)
    assert mx.array_equal(found.logprobs, alone.logprobs)
    # one that is quantized in the midst of a turn knows its tokens still
    cache = make_prompt_cache(model.model)
    options: dict[str, Any] = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0, "prompt_cache": cache}
    first = model.generate(PROMPT, steer, max_tokens=4, **options)
    assert type(cache[0]).__name__ == "SteeredQuantizedKVCache"
    assert cache[0].steering_state.rows[0].known() == [*PROMPT, *first.tokens][: cache[0].offset]


@pytest.mark.parametrize("fill", [True, False], ids=["filled", "empty"])
def test_a_cache_is_as_it_was_where_nothing_ran(model: InterpretableModel, fill: bool) -> None:
    cache = ms.fill_prompt_cache(model, PROMPT) if fill else make_prompt_cache(model.model)
    plain = model.generate([10], max_tokens=3, prompt_cache=copy.deepcopy(cache))

    def stop(*_: Any) -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        model.generate([10], add("all"), prompt_cache=cache, prompt_progress_callback=stop)
    assert model.generate([10], max_tokens=3, prompt_cache=cache) == plain


@pytest.mark.parametrize("more", [{"at": lambda ids: [len(ids) - 1]}, {"schedule": lambda n: 1.0 + n}],
                         ids=["position", "schedule"])  # fmt: skip
def test_a_function_is_known_again_in_another_intervention(llama: InterpretableModel, more: dict[str, Any]) -> None:
    cache, other = make_prompt_cache(llama.model), make_prompt_cache(llama.model)
    one = add("all") | {KEY: iv.add_vector(vector(), 3.0, **more)}
    for strength in (3.0, 3.0, 1.5):
        steer = {KEY: iv.add_vector(vector(), strength, **more)}
        found = llama.generate([10], steer, max_tokens=2, prompt_cache=cache, logprobs=True)
    with llama.steer(one) as steering:
        for strength in (1.0, 1.0, 0.5):
            steering.strength = strength
            expected = llama.generate([10], max_tokens=2, prompt_cache=other, logprobs=True)
    assert mx.allclose(found.logprobs, expected.logprobs, atol=1e-4).item()
    with pytest.raises(ms.SteeredCacheError, match="another steering"):
        llama.generate([10], {KEY: iv.add_vector(vector(), at=lambda ids: [0])}, prompt_cache=cache)


# -- the model called amid a generation ------------------------------------------------------------------------------


def test_a_forward_called_amid_a_generation_is_plain_with_a_cache_and_without(model: InterpretableModel) -> None:
    plain, seen = model.model(mx.array([PROMPT])), []

    def looking(tokens: Any, logits: mx.array) -> mx.array:
        own = make_prompt_cache(model.model)
        seen.extend([model.model(mx.array([PROMPT])), model.model(mx.array([PROMPT]), cache=own)])
        return logits

    both = [add("all"), {"layers.2": iv.add_vector(vector(4), 5.0)}]
    model.generate([PROMPT, PROMPT[:3]], both, max_tokens=2, logits_processors=[looking])
    model.generate(PROMPT, both[0], max_tokens=2, logits_processors=[looking])
    assert seen
    assert all(mx.array_equal(output, plain) for output in seen)
    with model.steer(both[1]):  # this one is for every forward
        steered = model.model(mx.array([PROMPT]))
        seen.clear()
        model.generate(PROMPT, both[0], max_tokens=1, logits_processors=[looking])
    assert all(mx.allclose(output, steered, atol=1e-4).item() for output in seen)


def test_rows_with_one_list_of_interventions_share_its_computation(llama: InterpretableModel) -> None:
    calls = []

    def counted(x: mx.array) -> mx.array:
        calls.append(x.shape)
        return x

    for edit in ([iv.scale(1.0), counted], iv.when(iv.cosine(vector()) > -2, [counted, counted])):
        calls.clear()
        llama.generate([PROMPT] * 6, {KEY: edit}, max_tokens=1)
        per_forward = len({id(part) for part in iv.Compose((edit,)).parts() if part.name == "function"})
        assert len(calls) <= 4 * per_forward  # a few forwards, whatever the number of rows


@pytest.mark.parametrize(("edit", "said"), [
    (iv.add_vector(vector(), at=99), "add_vector at layers.1 touched no token: at=99 lay nowhere in what ran"),
    (iv.add_vector(vector(), at=[]), r"at=\[\] lay nowhere"),
    ([iv.add_vector(vector(), at=50), iv.zero_out(at=60)], "add_vector and zero_out at layers.1 .* at=50 and at=60"),
])  # fmt: skip
def test_a_steering_that_touched_nothing_says_so(llama: InterpretableModel, edit: Any, said: str) -> None:
    steer = {KEY: edit}
    with pytest.warns(NothingTouched, match=said), llama.steer(steer):
        mlx_lm.generate(llama.model, llama.tokenizer, PROMPT, max_tokens=2)
    with llama.steer({KEY: [iv.zero_out(), edit]}) as steering:  # one of them does
        mlx_lm.generate(llama.model, llama.tokenizer, PROMPT, max_tokens=2)
        assert not list(steering["steering"].untouched())
    with llama.steer(steer) as steering:
        steering.strength = 0.0  # as it was meant
        mlx_lm.generate(llama.model, llama.tokenizer, PROMPT, max_tokens=2)
    opened = llama.steer(steer).enable()
    mlx_lm.generate(llama.model, llama.tokenizer, PROMPT, max_tokens=2)
    with pytest.warns(NothingTouched, match=said):
        opened.disable()
