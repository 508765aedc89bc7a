"""Schedules: steered generation equals a recompute in which every token has its factor, and nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tiny import by_hand, logprobs

from mlxsteer import InterpretableModel, PositionError
from mlxsteer import interventions as iv
from mlxsteer.interventions.base import Where
from mlxsteer.positions import Position, Prompt, Tokens

PROMPT = [7, 31, 52, 18, 77, 23, 9, 64]
LAYER = 2
KEY = f"layers.{LAYER}"
hypothesis_settings = settings(max_examples=80, deadline=None, derandomize=True)

# Every form of `schedule=` with its meaning written out: the factor when n generated tokens have been read.
FORMS: dict[str, tuple[Any, Callable[[int], float]]] = {
    "decay": (iv.decay(1.5), lambda n: 0.5 ** (n / 1.5)),
    "ramp": (iv.ramp(4), lambda n: [0.25, 0.5, 0.75][n] if n < 3 else 1.0),
    "window": (iv.window(2, 4), lambda n: 1.0 if n in (2, 3) else 0.0),
    "window open": (iv.window(1), lambda n: 1.0 if n else 0.0),
    "function": (lambda n: 1.5 - n, lambda n: 1.5 - n),
}


@pytest.fixture(params=["llama", "gemma3_text", "gpt2", "mamba2"], scope="module")
def model(request: pytest.FixtureRequest, tokenizer: TokenizerWrapper) -> InterpretableModel:
    return InterpretableModel(tiny.build(request.param), tokenizer)


@pytest.fixture(scope="module")
def llama(tokenizer: TokenizerWrapper) -> InterpretableModel:
    return InterpretableModel(tiny.build("llama"), tokenizer)


def vector(seed: int = 3) -> mx.array:
    mx.random.seed(seed)
    return 2 * mx.random.normal((64,))


# -- the reference ---------------------------------------------------------------------------------------------------


def read(position: int, prompt: int) -> int:
    """How many generated tokens the model has read when it sees this position."""
    return 0 if position < prompt else position - prompt + 1


def recompute(
    bare: nn.Module, prompt: Sequence[int], made: Sequence[int], v: mx.array, factor: Callable[[int, int], float]
) -> list[mx.array]:
    """Log-probabilities at each step from the whole sequence, without a cache; `factor` is of position and prompt."""
    rows = []
    for step in range(len(made)):
        ids = [*prompt, *made[:step]]
        factors = mx.array([factor(i, len(prompt)) for i in range(len(ids))])[None, :, None]
        with by_hand(bare.layers[LAYER], lambda h, factors=factors: h + factors * v):
            rows.append(logprobs(bare(mx.array([ids]))[0, -1]))
    mx.eval(rows)
    return rows


def distance(a: list[mx.array], b: list[mx.array]) -> float:
    assert len(a) == len(b) > 0
    return max(mx.abs(x - y).max().item() for x, y in zip(a, b, strict=True))


def run(pieces: Iterator[Any]) -> tuple[list[int], list[mx.array]]:
    seen = list(pieces)
    return [p.token for p in seen], [p.logprobs for p in seen]


def chosen_distance(row: Any, steps: list[mx.array]) -> float:
    """How far a `Generation`'s log-probabilities lie from the recompute's."""
    expected = mx.stack([s[t] for s, t in zip(steps, row.tokens, strict=True)])
    return mx.abs(row.logprobs - expected).max().item()


# -- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefill_step_size", [3, 2048])
@pytest.mark.parametrize(("schedule", "factor"), FORMS.values(), ids=FORMS)
def test_scheduled_generation_is_the_recompute(
    model: InterpretableModel, schedule: Any, factor: Callable[[int], float], prefill_step_size: int
) -> None:
    v = vector()
    steer = {KEY: iv.add_vector(v, schedule=schedule)}
    made, steps = run(model.stream(PROMPT, steer, max_tokens=6, temp=1.0, seed=1, prefill_step_size=prefill_step_size))
    assert distance(steps, recompute(model.model, PROMPT, made, v, lambda i, n: factor(read(i, n)))) <= 1e-4


def test_a_factor_one_token_off_is_caught(model: InterpretableModel) -> None:
    v = vector()
    for schedule, factor in FORMS.values():
        made, steps = run(model.stream(PROMPT, {KEY: iv.add_vector(v, schedule=schedule)}, max_tokens=6))
        for wrong in (
            lambda i, n, factor=factor: factor(max(0, i - n)),
            lambda i, n, factor=factor: factor(max(0, i - n + 2)),
        ):
            assert distance(steps, recompute(model.model, PROMPT, made, v, wrong)) > 1e-2


@pytest.mark.parametrize("at", ["last", "generated", "prompt", [0, -1, 10]], ids=str)
def test_positions_and_schedules_act_together(llama: InterpretableModel, at: Any) -> None:
    touches: dict[str, Callable[[int, int], bool]] = {
        "last": lambda i, n: i >= n - 1, "generated": lambda i, n: i >= n, "prompt": lambda i, n: i < n,
        "[0, -1, 10]": lambda i, n: i in (0, n - 1, 10),
    }  # fmt: skip
    v = vector()
    for schedule, factor in FORMS.values():
        steer = {KEY: iv.add_vector(v, 0.8, at=at, schedule=schedule)}
        made, steps = run(llama.stream(PROMPT, steer, max_tokens=6, prefill_step_size=3))
        expected = recompute(
            llama.model, PROMPT, made, 0.8 * v, lambda i, n, f=factor: f(read(i, n)) * touches[str(at)](i, n)
        )
        assert distance(steps, expected) <= 1e-4


@pytest.mark.parametrize("prefill_step_size", [3, 2048])
def test_rows_of_a_batch_have_each_their_own_count(model: InterpretableModel, prefill_step_size: int) -> None:
    prompts = [PROMPT[:5], PROMPT * 3, [9], PROMPT[2:], [55, 66]]
    limits, forms = [5, 8, 3, 7, 6], list(FORMS.values())
    steers = [{KEY: iv.add_vector(vector(i), schedule=schedule)} for i, (schedule, _) in enumerate(forms)]
    rows = model.generate(
        prompts, steers, max_tokens=limits, prefill_step_size=prefill_step_size, logprobs=True, prefill_batch_size=2,
        completion_batch_size=3,
    )  # fmt: skip
    for i, row in enumerate(rows):
        factor = forms[i][1]
        steps = recompute(model.model, prompts[i], row.tokens, vector(i), lambda i, n, f=factor: f(read(i, n)))
        assert len(row.tokens) == limits[i]
        assert chosen_distance(row, steps) <= 1e-4


@pytest.mark.parametrize("name", ["decay", "window"])
def test_a_schedule_multiplies_the_strength_of_each_row(model: InterpretableModel, name: str) -> None:
    schedule, factor = FORMS[name]
    prompts, strengths = [PROMPT, PROMPT[:3], PROMPT[1:]], (1.0, 0.0, -2.0)
    for strength in (strengths, mx.array(strengths)):
        steer = {KEY: iv.add_vector(vector(), strength, schedule=schedule)}
        rows = model.generate(prompts, steer, max_tokens=5, logprobs=True)
        for prompt, own, row in zip(prompts, strengths, rows, strict=True):
            steps = recompute(model.model, prompt, row.tokens, vector(), lambda i, n, own=own: own * factor(read(i, n)))
            assert chosen_distance(row, steps) <= 1e-4


def test_steps_of_a_composition_keep_their_schedules(llama: InterpretableModel) -> None:
    v, w = vector(3), vector(4)
    composed = iv.add_vector(v, schedule=iv.decay(2)) | iv.add_vector(w, schedule=iv.window(2, 5))
    made, steps = run(llama.stream(PROMPT, {KEY: iv.Compose((composed,), strength=0.5)}, max_tokens=7))

    def factors(i: int, n: int) -> tuple[float, float]:
        return 0.5 * 0.5 ** (read(i, n) / 2), 0.5 * (2 <= read(i, n) < 5)

    rows = []
    for step in range(len(made)):
        ids = PROMPT + made[:step]
        added = mx.stack([a * v + b * w for a, b in (factors(i, len(PROMPT)) for i in range(len(ids)))])
        with by_hand(llama.model.layers[LAYER], lambda h, added=added: h + added):
            rows.append(logprobs(llama.model(mx.array([ids]))[0, -1]))
    assert distance(steps, rows) <= 1e-4


def test_a_named_steerings_strength_multiplies_too(llama: InterpretableModel) -> None:
    v = vector()
    with llama.steer(mood={KEY: iv.add_vector(v, schedule=iv.decay(2))}, prompt_tokens=PROMPT) as steering:
        steering["mood"].strength = -0.5
        made, steps = run(mlx_lm.stream_generate(llama.model, llama.tokenizer, PROMPT, max_tokens=5))
    expected = recompute(llama.model, PROMPT, made, v, lambda i, n: -0.5 * 0.5 ** (read(i, n) / 2))
    assert distance(steps, expected) <= 1e-4


def test_speculative_decoding_counts_the_tokens_that_were_kept(tokenizer: TokenizerWrapper) -> None:
    model, draft, v = InterpretableModel(tiny.build("llama"), tokenizer), tiny.build("llama", seed=9), vector()
    for schedule, factor in FORMS.values():
        steer = {KEY: iv.add_vector(v, schedule=schedule)}
        made, steps = run(model.stream(PROMPT, steer, max_tokens=8, draft_model=draft, num_draft_tokens=3))
        expected = recompute(model.model, PROMPT, made, v, lambda i, n, f=factor: f(read(i, n)))
        assert distance(steps, expected) <= 1e-4


def test_the_next_turn_on_a_cache_counts_from_its_own_prompt(llama: InterpretableModel) -> None:
    v, cache, rest = vector(), make_prompt_cache(llama.model), [33, 44]
    steer = {KEY: iv.add_vector(v, schedule=iv.decay(2))}
    first = llama.generate(PROMPT, steer, max_tokens=4, prompt_cache=cache)
    made, steps = run(llama.stream(rest, steer, max_tokens=4, prompt_cache=cache))
    turn, n = len(PROMPT) + 4, len(PROMPT)  # where the second prompt begins

    def factor(i: int, end: int) -> float:
        return 0.5 ** ((read(i, n) if i < turn else read(i, end)) / 2)

    assert distance(steps, recompute(llama.model, PROMPT + first.tokens + rest, made, v, factor)) <= 1e-4


# -- where the prompt is unknown, or all there is --------------------------------------------------------------------


def test_foreign_generation_needs_the_prompt(llama: InterpretableModel) -> None:
    v = vector()
    steer = {KEY: iv.add_vector(v, schedule=iv.decay(2))}
    sentence = r"^schedule=decay\(half_life=2.0\) needs the prompt.*prompt_tokens"
    with pytest.raises(PositionError, match=sentence), llama.steer(steer):
        mlx_lm.generate(llama.model, llama.tokenizer, PROMPT, max_tokens=3)
    with llama.steer(steer, prompt_tokens=len(PROMPT)):
        made, steps = run(
            mlx_lm.stream_generate(llama.model, llama.tokenizer, PROMPT, max_tokens=6, prefill_step_size=3)
        )
    expected = recompute(llama.model, PROMPT, made, v, lambda i, n: 0.5 ** (read(i, n) / 2))
    assert distance(steps, expected) <= 1e-4


def test_in_a_trace_every_token_is_prompt(llama: InterpretableModel) -> None:
    v = vector()

    def logits(intervention: iv.Intervention, **more: Any) -> mx.array:
        with llama.trace(PROMPT, interventions={KEY: intervention}, **more):
            return llama.output.save()

    assert mx.array_equal(logits(iv.add_vector(v, schedule=iv.decay(2))), logits(iv.add_vector(v)))
    assert mx.array_equal(logits(iv.add_vector(v, schedule=iv.window(0, 1))), logits(iv.add_vector(v)))
    assert mx.allclose(logits(iv.add_vector(v, schedule=iv.ramp(4))), logits(iv.add_vector(v, 0.25)), atol=1e-5)
    with pytest.raises(PositionError, match=r"schedule=window\(start=1, stop=None\) is 0 in the prompt, and every"):
        logits(iv.add_vector(v, schedule=iv.window(1)))


def test_a_loop_without_a_cache_is_scheduled_by_the_prompt_it_is_told(llama: InterpretableModel) -> None:
    v, made = vector(), [5, 80, 13]
    with llama.steer({KEY: iv.add_vector(v, schedule=iv.decay(2))}, prompt_tokens=len(PROMPT)):
        steps = [logprobs(llama.model(mx.array([PROMPT + made[:step]]))[0, -1]) for step in range(3)]
    expected = recompute(llama.model, PROMPT, made, v, lambda i, n: 0.5 ** (read(i, n) / 2))
    assert distance(steps, expected) <= 1e-4


# -- which tokens, and how strongly: on the host ---------------------------------------------------------------------


@given(st.data(), st.sampled_from(list(FORMS)))
@hypothesis_settings
def test_in_any_chunking_and_padding_the_factors_are_those_of_the_whole_sequence(
    data: st.DataObject, name: str
) -> None:
    schedule, factor = iv.Schedule.of(FORMS[name][0]), FORMS[name][1]
    assert schedule is not None
    lengths = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3), label="prompts")
    totals = [n + data.draw(st.integers(0, 5), label="generated") for n in lengths]
    acting = tuple(data.draw(st.booleans(), label="acting") for _ in lengths)
    known, seen = [Prompt(n) if act else Prompt() for n, act in zip(lengths, acting, strict=True)], [0] * len(lengths)
    while seen != totals:
        left = [total - start for total, start in zip(totals, seen, strict=True)]
        real = [data.draw(st.integers(0, most), label="real") for most in left]
        real = real if any(real) else left  # so that the loop ends
        width = max(real) + data.draw(st.integers(0, 3), label="padding")
        tokens = Tokens(seen, real, width, known)
        expected = np.array(
            [[factor(read(s + i, n)) for i in range(width)] for s, n in zip(seen, lengths, strict=True)]
        )
        there = np.array([[act and i < r for i in range(width)] for r, act in zip(real, acting, strict=True)])
        mask = np.broadcast_to(np.array(tokens.touched(Position.of("all"), acting, schedule)), there.shape)
        np.testing.assert_array_equal(mask, there & (expected != 0))
        found = tokens.strengths(acting, schedule)
        spread = np.broadcast_to(1.0 if found is None else found, there.shape)
        np.testing.assert_allclose(spread[mask], expected[mask], rtol=1e-6)
        seen = [start + r for start, r in zip(seen, real, strict=True)]


def bits(x: mx.array) -> np.ndarray:
    return np.array(x.view(mx.uint32 if x.dtype == mx.float32 else mx.uint16))


def somewhere(x: mx.array, start: int = 4, prompt: int = 6, **more: Any) -> Where:
    """Tokens on both sides of a prompt's end: with these defaults n is 0, 0, 1, 2, …"""
    rows, width = x.shape[:2]
    return Where(Tokens([start] * rows, [width] * rows, width, [Prompt(prompt)] * rows), "layers.3", 3, **more)


AWKWARD = [-0.0, 0.0, 6e4, -6e4, 1e-7, 3.14159, float("inf"), float("nan")]
INTERVENTIONS: dict[str, Callable[..., iv.Intervention]] = {
    "add_vector": lambda **more: iv.add_vector(mx.ones(8), 0.7, **more),
    "norm kept": lambda **more: iv.add_vector(mx.ones(8), 0.7, preserve_norm=True, **more),
    "ablate": lambda **more: iv.ablate(mx.ones(8), **more),
    "mean_replace": lambda **more: iv.mean_replace(mx.ones(8), **more),
    "zero_out": iv.zero_out,
    "replace_with": lambda **more: iv.replace_with(mx.ones(8), **more),
    "patch": lambda **more: iv.replace_with(mx.ones((6, 8)), align="start", **more),
    "sequence": lambda **more: iv.add_sequence(mx.ones((6, 8)), **more),
    "scale": lambda **more: iv.scale(3.0, **more),
    "clamp": lambda **more: iv.clamp(-1.0, 1.0, **more),
    "cap": lambda **more: iv.cap(mx.ones(8), 9.0, **more),
    "affine": lambda **more: iv.affine(mx.ones(8), mx.ones(8), **more),
    "rotate": lambda **more: iv.rotate(mx.ones(8), mx.arange(8), 70, **more),
    "slerp": lambda **more: iv.slerp(mx.ones(8), 0.3, **more),
    "noise": lambda **more: iv.noise(1.0, **more),
    "function": lambda **more: iv.Function(mx.tanh, **more),
}
every_intervention = pytest.mark.parametrize("made", INTERVENTIONS.values(), ids=INTERVENTIONS)


@every_intervention
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_a_factor_of_zero_keeps_every_bit_and_one_is_the_plain_intervention(
    made: Callable[..., iv.Intervention], dtype: mx.Dtype
) -> None:
    x = mx.array(np.tile(AWKWARD, (2, 5, 1))).astype(dtype)
    y, plain = made(schedule=iv.window(0, 2))(x, somewhere(x)), made()(x, somewhere(x))
    np.testing.assert_array_equal(bits(y)[:, 3:], bits(x)[:, 3:])
    np.testing.assert_array_equal(bits(y)[:, :3], bits(plain)[:, :3])


@pytest.mark.parametrize(
    ("name", "heads"),
    [(name, heads) for name in INTERVENTIONS for heads in ((), (2,)) if not heads or name not in ("patch", "sequence")],
)
def test_every_token_is_edited_with_its_strength(name: str, heads: tuple[int, ...]) -> None:
    made = INTERVENTIONS[name]
    x = mx.array(np.random.default_rng(1).normal(size=(2, 5, *heads, 8)).astype(np.float32))
    y = made(schedule=iv.decay(2))(x, somewhere(x))
    assert y.dtype == x.dtype
    for i, n in enumerate((0, 0, 1, 2, 3)):
        alone = made()(x[:, i : i + 1], somewhere(x[:, i : i + 1], 4 + i, strength=0.5 ** (n / 2)))
        np.testing.assert_allclose(np.array(y[:, i : i + 1]), np.array(alone), atol=1e-5)


def test_rows_of_different_lengths_have_each_their_own_factors() -> None:
    x = mx.zeros((3, 2, 4))
    tokens = Tokens([4, 9, 0], [2, 2, 1], 2, [Prompt(4), Prompt(8), Prompt(3)])
    made = iv.add_vector(mx.ones(4), (1.0, 10.0, 100.0), schedule=lambda n: n + 0.5)
    y = np.array(made(x, Where(tokens)))[:, :, 0]
    np.testing.assert_allclose(y, [[1.5, 2.5], [25, 35], [50, 0]])


def test_gradients_flow_to_a_scheduled_strength() -> None:
    x = mx.zeros((1, 5, 4))
    gradient = mx.grad(lambda s: iv.add_vector(mx.ones(4), s, schedule=iv.decay(1))(x, somewhere(x)).sum())
    assert gradient(mx.array(0.3)).item() == pytest.approx(4 * (1 + 1 + 0.5 + 0.25 + 0.125))


def test_a_function_is_asked_once_for_every_count() -> None:
    asked: list[int] = []

    def factor(n: int) -> float:
        asked.append(n)
        return 1.0 / (1 + n)

    made, x = iv.add_vector(mx.ones(4), schedule=factor), mx.zeros((1, 5, 4))
    for _ in range(3):
        made(x, somewhere(x))
    assert sorted(asked) == [0, 1, 2, 3]


def test_an_activation_without_a_token_axis_takes_one_factor_for_all() -> None:
    x, made = mx.ones((5, 4)), iv.scale(2.0, schedule=iv.decay(1))
    np.testing.assert_allclose(np.array(made(x, Where(Tokens([6], [1], 1, [Prompt(6)]), "experts"))), 1.5)
    with pytest.raises(ValueError, match=r"experts has shape \(5, 4\)"):
        made(x, Where(Tokens([4], [5], 5, [Prompt(6)]), "experts"))


# -- refusals, data --------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "number": (lambda: iv.zero_out(schedule=0.5), TypeError, "schedule=0.5 is no schedule: say decay"),
    "name": (lambda: iv.zero_out(schedule="decay"), TypeError, "schedule='decay' is no schedule"),
    "list": (lambda: iv.zero_out(schedule=[1.0, 0.5]), TypeError, "is no schedule"),
    "kind": (lambda: iv.zero_out(schedule=iv.decay), TypeError, r"call it, decay\(...\)"),
    "other class": (lambda: iv.zero_out(schedule=int), TypeError, "is no schedule"),
    "half-life 0": (lambda: iv.decay(0), ValueError, "above 0, not 0"),
    "half-life nan": (lambda: iv.decay(float("nan")), ValueError, "finite"),
    "half-life as text": (lambda: iv.decay("20"), TypeError, "half-life is a number"),  # type: ignore[arg-type]
    "ramp 0": (lambda: iv.ramp(0), ValueError, "whole number from 1 on, not 0"),
    "ramp 1.5": (lambda: iv.ramp(1.5), ValueError, "whole number from 1 on, not 1.5"),  # type: ignore[arg-type]
    "window below 0": (lambda: iv.window(-1), ValueError, "start is a whole number from 0 on"),
    "window of nothing": (lambda: iv.window(3, 3), ValueError, "start 3 and stop 3 leave no token"),
    "composition": (
        lambda: iv.Compose((iv.zero_out(),), schedule=iv.decay(2)), ValueError, "schedule=, exclude= and per-row"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("attempt", "kind", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_schedule_is_refused_when_it_is_given(
    attempt: Callable[[], Any], kind: type[Exception], sentence: str
) -> None:
    with pytest.raises(kind, match=sentence):
        attempt()


@pytest.mark.parametrize(("factor", "kind"), [(float("nan"), ValueError), (None, TypeError), (True, TypeError)])
def test_a_function_that_gives_no_factor_is_refused(factor: Any, kind: type[Exception]) -> None:
    x = mx.zeros((1, 5, 4))
    with pytest.raises(kind, match="the factor at n=0 is a"):
        iv.add_vector(mx.ones(4), schedule=lambda n: factor)(x, somewhere(x))


SAVED = [iv.decay(20), iv.decay(0.3), iv.ramp(3), iv.window(0, 4), iv.window(2)]


def test_schedules_come_back_from_a_file(tmp_path: Path) -> None:
    v = mx.ones(4)
    examples: dict[str, Any] = {f"layers.{i}": iv.add_vector(v, schedule=schedule) for i, schedule in enumerate(SAVED)}
    examples["norm"] = iv.zero_out(at="last", schedule=iv.decay(3)) | iv.add_vector(v, [0.5, 1], schedule=iv.window(1))
    loaded = iv.load(iv.save(examples, tmp_path / "schedules.safetensors"))
    for key, made in examples.items():
        assert [part.schedule for part in loaded[key].parts()] == [part.schedule for part in made.parts()]
        assert loaded[key].fingerprint == made.fingerprint
    spec, tensors = examples["norm"].to_spec()
    assert iv.Intervention.from_spec(json.loads(json.dumps(spec)), tensors).fingerprint == examples["norm"].fingerprint
    with pytest.raises(ValueError, match=r"schedule= is a function can't be saved; use decay"):
        iv.save({"layers.0": iv.zero_out(schedule=lambda n: 1.0)}, tmp_path / "no.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["schedules.safetensors"]


def test_without_a_schedule_data_and_fingerprints_are_what_they_were_before_there_were_any() -> None:
    spec, _ = iv.zero_out().to_spec()
    assert spec == {"intervention": "zero_out", "parameters": {"at": "all", "strength": 1.0}}
    assert iv.zero_out().fingerprint == "e749cafb899999ac"


def test_fingerprints_tell_schedules_apart() -> None:
    def function(n: int) -> float:
        return 1.0

    made = [iv.zero_out(schedule=schedule) for schedule in (None, *SAVED, function, lambda n: 1.0)]
    made += [iv.Function(mx.tanh, schedule=schedule) for schedule in (None, *SAVED)]
    assert len({one.fingerprint for one in made}) == len(made)
    assert iv.zero_out(schedule=iv.decay(20.0)).fingerprint == iv.zero_out(schedule=iv.decay(20)).fingerprint


@pytest.mark.parametrize(
    "damage",
    [
        {"schedule": "os.system", "values": [1]}, {"schedule": "decay"}, {"schedule": "decay", "values": [-1]},
        {"schedule": ["decay"], "values": [1]}, {"schedule": "ramp", "values": 3},
        {"schedule": "ramp", "values": [1, 2]}, "decay", 3,
    ],
    ids=str,
)  # fmt: skip
def test_damaged_data_of_a_schedule_is_refused(damage: Any) -> None:
    spec, tensors = iv.zero_out(schedule=iv.decay(2)).to_spec()
    spec["parameters"]["schedule"] = damage
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):  # `load` makes a ValueError of each
        iv.Intervention.from_spec(spec, tensors)


def test_the_repr_names_the_schedule() -> None:
    assert repr(iv.zero_out(schedule=iv.window(2))) == "ZeroOut(strength=1.0, schedule=window(start=2, stop=None))"
    assert "schedule" not in repr(iv.zero_out())
    assert "schedule: a factor" in iv.describe("add_vector")
