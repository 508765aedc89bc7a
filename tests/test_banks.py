"""Vectors of a batch's rows, added in one go: the bits are those of adding them one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlxsteer import InterpretableModel, hooks
from mlxsteer import interventions as iv
from mlxsteer.banks import Bank, banked
from mlxsteer.interventions.base import Where
from mlxsteer.positions import Prompt, Tokens
from mlxsteer.sites import Site
from mlxsteer.steering import Row, Steering

LAYER, KEY = 1, "layers.1"
SMALL = {"num_hidden_layers": 3, "n_layer": 3}
PROMPTS = [[7, 31, 52], [18, 77, 23, 9, 64, 5, 8], [40], [3, 88, 61, 12], [95, 70]]
AWKWARD = [-0.0, 0.0, 0.0, 0.0, 1e-7, 6e4, float("inf"), float("nan")]  # added to 0 a vector shows all its bits


@pytest.fixture(scope="module")
def llama(tokenizer: TokenizerWrapper) -> InterpretableModel:
    return InterpretableModel(tiny.build("llama", **SMALL), tokenizer)


def vector(seed: int = 3, width: int = 64) -> mx.array:
    mx.random.seed(seed)
    return 2 * mx.random.normal((width,))


W = vector(4)


def bits(x: mx.array) -> np.ndarray:
    return np.array(x.view(mx.uint32 if x.dtype == mx.float32 else mx.uint16))


def one_by_one(edits: Any, rows: Any) -> list[Any]:
    """In place of `banked`: the edits as they are, each of which edits the whole batch."""
    return list(edits)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each bank that is made adds a vector to."""
    made: list[int] = []

    def counting(edits: Any, rows: Any) -> list[Any]:
        found = banked(edits, rows)
        made.extend(sum(v is not None for v in one.vectors) for _, one, _ in found if isinstance(one, Bank))
        return found

    monkeypatch.setattr(hooks, "banked", counting)
    return made


def same(a: list[Any], b: list[Any]) -> bool:
    return all(x.tokens == y.tokens and mx.array_equal(x.logprobs, y.logprobs) for x, y in zip(a, b, strict=True))


# -- on an activation --------------------------------------------------------------------------------------------------


@given(st.data(), st.sampled_from([mx.float32, mx.bfloat16, mx.float16]), st.booleans())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_bank_has_the_bits_of_its_vectors_one_by_one(data: st.DataObject, dtype: mx.Dtype, heads: bool) -> None:
    """Rows with vectors, strengths and positions of their own, some twice, some plain, some padded."""
    count = data.draw(st.integers(2, 5), label="rows")
    ats = st.sampled_from(["all", "all", "last", "generated", "prompt", -1, 3, slice(1, None, 2)])
    site = Site("layers.3", object())  # type: ignore[arg-type]
    rows = [Row(()) for _ in range(count)]
    carrying = data.draw(st.permutations([*range(count), *range(count)]), label="rows in the order of what steers them")
    steerings = []
    for number, row in enumerate(carrying[: data.draw(st.integers(2, 2 * count), label="steerings")]):
        vector = mx.array(np.random.default_rng(number).normal(size=8).astype(np.float32))
        strength = data.draw(st.sampled_from([1.0, -0.5, 0.3, 0.0]), label="strength")
        made = Steering(((site, iv.add_vector(vector, strength, at=data.draw(ats, label="at"))),))
        made.strength = data.draw(st.sampled_from([1.0, 0.7, 0.7, 0.0]), label="multiplier")
        steerings.append(made)
        for own in {row, data.draw(st.sampled_from([row, row, (row + 1) % count]), label="and of")}:
            rows[own].steerings = (*(rows[own].steerings or ()), made)
    width = data.draw(st.integers(1, 4), label="width")
    starts = [data.draw(st.integers(0, 5), label="start") for _ in rows]
    lengths = [data.draw(st.sampled_from([width, width, 0, 1]), label="length") for _ in rows]
    tokens = Tokens(starts, lengths, width, [Prompt(4) for _ in rows])
    shape = (count, width, 2, 8) if heads else (count, width, 8)
    x = mx.array(np.broadcast_to(AWKWARD, shape)).astype(dtype)
    edits = [(site, edit, steering) for steering in steerings for _, edit in steering.edits]

    def run(all_edits: Any) -> mx.array:
        y = x
        for _, edit, steering in all_edits:
            if steering is None:
                y = edit(y, Where(tokens, "layers.3", 3))
                continue
            own = tuple(any(s is steering for s in row.steerings or ()) for row in rows)
            y = edit(y, Where(tokens, "layers.3", 3, steering.strength, own)) if any(own) else y
        return y

    together = banked(edits, rows)
    np.testing.assert_array_equal(bits(run(together)), bits(run(edits)))
    assert len(together) <= len(edits)


def test_what_is_banked_and_what_is_not() -> None:
    """Neighbours that add one vector each to different rows; everything else stays what and where it was."""
    site, other = (Site(key, object()) for key in ("layers.3", "layers.3.mlp"))  # type: ignore[arg-type]
    plain = [iv.add_vector(mx.ones(4) * i) for i in range(1, 4)]

    def made(*edits: tuple[Any, list[int]], at: Site = site) -> list[Any]:
        rows = [Row(()) for _ in range(4)]
        steerings = []
        for edit, own in edits:
            steerings.append(Steering(((at, edit),)))
            for row in own:
                rows[row].steerings = (*(rows[row].steerings or ()), steerings[-1])
        return banked([(at, s.edits[0][1], s) for s in steerings], rows)

    (one,) = made((plain[0], [0]), (plain[1], [1, 3]))
    assert [v and v[0] for v in one[1].vectors] == [plain[0], plain[1], None, plain[1]]
    assert [type(e) for _, e, _ in made((plain[0], [0]), (plain[1], [0, 1]), (plain[2], [2]))] == [iv.AddVector, Bank]
    assert [type(e) for _, e, _ in made((plain[0], [0]), (iv.zero_out(), [1]), (plain[2], [2]))] == [
        iv.AddVector, iv.ZeroOut, iv.AddVector,
    ]  # fmt: skip
    assert [e for _, e, _ in made((plain[0], [0]), (plain[1], []))] == [plain[0]]  # nobody carries it here
    for not_plain in (
        iv.add_vector(mx.ones(4), schedule=iv.decay(2)), iv.add_vector(mx.ones(4), exclude=(1, 2)),
        iv.add_vector(mx.ones(4), preserve_norm=True), iv.add_vector(mx.ones((2, 4))),
        iv.add_vector(mx.ones(4), mx.array(0.5)), iv.when(iv.cosine(mx.ones(4)) > 0, plain[0]),
        iv.add_vector(mx.ones(4), (1.0,)),
    ):  # fmt: skip
        assert [e for _, e, _ in made((plain[0], [0]), (not_plain, [1]))] == [plain[0], not_plain]
    assert [e for _, e, _ in banked([(site, plain[0], None), (site, plain[1], None)], [Row(())])] == plain[:2]
    rows, steerings = [Row(()), Row(())], [Steering(((s, plain[0]),)) for s in (site, other)]
    for row, steering in zip(rows, steerings, strict=True):
        row.steerings = (steering,)
    assert all(type(e) is iv.AddVector for _, e, _ in banked([(s.edits[0][0], plain[0], s) for s in steerings], rows))


def test_a_bank_refuses_what_its_vectors_would(llama: InterpretableModel) -> None:
    tokens = Tokens([0, 0], [3, 3], 3, [Prompt(3)] * 2)
    bank = Bank([(iv.add_vector(mx.ones(4)), 1.0), (iv.add_vector(mx.ones(4)), 1.0)])
    with pytest.raises(ValueError, match=r"experts has shape \(6, 4\), which doesn't begin with \(batch, tokens\)"):
        bank(mx.ones((6, 4)), Where(tokens, "experts"))
    with pytest.raises(ValueError, match="its vector has width 4, the activation has 5"):
        bank(mx.ones((2, 3, 5)), Where(tokens, "layers.3"))
    with pytest.raises(ValueError, match="its vector has width 3, the activation has 64"):
        llama.generate(PROMPTS[:2], [{KEY: iv.add_vector(W)}, {KEY: iv.add_vector(mx.ones(3))}], max_tokens=1)


def test_positions_of_rows_are_not_taken_for_a_position_of_all() -> None:
    """Three rows, of which two are left alone, read like (position, rows, schedule): one must not hide the other."""
    last = iv.add_vector(W, at="last").at
    expected = {"each": [[False, True], [False, False], [False, False]], "whole": [[False, True]] * 3}
    for order in (("each", "whole"), ("whole", "each")):
        tokens = Tokens([2, 2, 2], [2, 2, 2], 2, [Prompt(4)] * 3)
        for name in order:
            found = tokens.touched_each((last, None, None)) if name == "each" else tokens.touched(last)
            assert np.array(found).tolist() == expected[name]


# -- in a model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "mamba2"])
def test_rows_with_vectors_of_their_own_decode_as_without_banks(
    name: str, tokenizer: TokenizerWrapper, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixed positions and strengths, plain rows among them, rows that join and leave: the same batch, bit for bit."""
    model = InterpretableModel(tiny.build(name, **SMALL), tokenizer)
    second = {KEY: iv.add_vector(vector(2), -0.5, at="last"), "layers.2": iv.scale(0.5)}
    third, off = {KEY: iv.add_vector(vector(3), at="generated")}, {KEY: iv.add_vector(vector(5), 0.0)}
    steers = [{KEY: iv.add_vector(vector(1))}, second, None, third, off]

    def run() -> list[Any]:
        return model.generate(
            PROMPTS, steers, max_tokens=[4, 7, 5, 3, 6], logprobs=True, prefill_step_size=3, prefill_batch_size=2,
            completion_batch_size=3,
        )  # fmt: skip

    together = run()
    assert counted
    assert max(counted) > 1
    monkeypatch.setattr(hooks, "banked", one_by_one)
    assert same(together, run())
    for row, prompt, steer, count in zip(together, PROMPTS, steers, [4, 7, 5, 3, 6], strict=True):
        alone = model.generate(prompt, steer, max_tokens=count, logprobs=True)
        assert row.tokens == alone.tokens
        assert mx.abs(row.logprobs - alone.logprobs).max().item() <= 1e-4


def test_a_row_that_is_steered_twice_is_moved_twice(
    llama: InterpretableModel, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    outer = {KEY: iv.add_vector(vector(7), at="last"), "layers.2": iv.add_vector(vector(8), at="last")}
    steers = [{KEY: iv.add_vector(vector(i), 0.0 if i == 1 else 1.0, at="last")} for i in range(2)]

    def run() -> list[Any]:
        with llama.steer(mood=outer) as steering:
            steering["mood"].strength = 0.5
            return llama.generate(PROMPTS[:3], [*steers, None], max_tokens=4, logprobs=True)

    found = run()
    assert max(counted) == 2
    for row, prompt, strength in zip(found, PROMPTS, (1.0, 0.0, 0.0), strict=False):
        both = {KEY: [iv.add_vector(vector(7), 0.5, at="last"), iv.add_vector(vector(0), strength, at="last")],
                "layers.2": iv.add_vector(vector(8), 0.5, at="last")}  # fmt: skip
        alone = llama.generate(prompt, both, max_tokens=4, logprobs=True)
        assert mx.abs(row.logprobs - alone.logprobs).max().item() <= 1e-4
    monkeypatch.setattr(hooks, "banked", one_by_one)
    assert same(found, run())


def decoded(model: InterpretableModel, caches: list[Any], prompts: list[list[int]], then: Callable[[int], None]) -> Any:
    """mlx-lm's own batch over caches that carry steerings already: each row's log-probabilities, step by step."""
    generator = BatchGenerator(model.model, stop_tokens=[[10**6]])
    uids = generator.insert(prompts, max_tokens=[6] * len(prompts), caches=caches)
    steps: dict[int, list[mx.array]] = {uid: [] for uid in uids}
    count = 0
    while responses := generator.next_generated():
        for response in responses:
            steps[response.uid].append(response.logprobs)
        then(count)
        count += 1
    return [steps[uid] for uid in uids]


def test_a_strength_that_changes_midway_changes_the_bank(
    llama: InterpretableModel, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows filled under one of two steerings each, decoded together; one is turned down, off, and up again."""
    prompts = [p[:3] for p in PROMPTS if len(p) >= 3]

    def run() -> Any:
        caches = []
        with llama.steer(a={KEY: iv.add_vector(vector(1))}) as a, llama.steer(b={KEY: iv.add_vector(vector(2))}) as b:
            for i, prompt in enumerate(prompts):
                cache = make_prompt_cache(llama.model)
                mx.eval(llama.model(mx.array([prompt]), cache=cache))
                row = cache[0].steering_state.rows[0]
                row.steerings = row.steerings[i % 2 :][:1]  # as in a batch of rows with a steering each
                caches.append(cache)
        plan = hooks.Plan(llama._sites, steerings=[a["a"], b["b"]])

        def change(step: int) -> None:
            a["a"].strength = {0: 0.5, 1: 0.0, 2: 1.0}.get(step, a["a"].strength)

        with hooks.attached(plan):
            return decoded(llama, caches, [[9], [9], [9]], change)

    together = run()
    assert len(counted) >= 4  # one for each set of strengths
    monkeypatch.setattr(hooks, "banked", one_by_one)
    separately = run()
    for row, other in zip(together, separately, strict=True):
        assert all(mx.array_equal(x, y) for x, y in zip(row, other, strict=True))
    monkeypatch.setattr(hooks, "banked", banked)
    steady = [mx.abs(x - y).max().item() for x, y in zip(together[0], together[2], strict=True)]
    assert max(steady) > 1e-3  # two rows under one steering are still two rows
