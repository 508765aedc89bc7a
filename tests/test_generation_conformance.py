"""Whatever is steered, however it is cached, chunked and batched: the same as a forward over the whole text.

`model.trace(text, interventions, prompt_tokens=n)` runs a whole text without a cache. What operators, positions,
schedules, spans and gates mean there is held against NumPy, plain automata and edits made by hand in test_exactness,
test_generation, test_schedules, test_spans and test_gates; here it is the reference for all of them together.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tiny import logprobs

from mlxsteer import InterpretableModel, NothingTouched, SteeredCacheError, after
from mlxsteer import interventions as iv
from mlxsteer.hooks import active
from mlxsteer.interventions.conditions import Compared
from mlxsteer.positions import Tokens
from mlxsteer.steering import SteeringState

FAMILIES = ["llama", "qwen3", "gemma2", "gemma3", "gpt2", "mamba2"]
WIDTH = 32
SMALL = {
    "num_hidden_layers": 3, "hidden_size": WIDTH, "intermediate_size": 64, "num_attention_heads": 2,
    "num_key_value_heads": 1, "n_layer": 3, "n_embd": WIDTH, "n_head": 2, "num_heads": 4,
}  # fmt: skip
WORDS = 7  # prompts and texts are made of so few tokens that markers of spans come often
pytestmark = pytest.mark.filterwarnings("ignore::mlxsteer.NothingTouched")
_built: dict[str, InterpretableModel] = {}


def built(name: str, tokenizer: TokenizerWrapper) -> InterpretableModel:
    if name not in _built:
        inner = {"text_config": tiny.CONFIGS["gemma3"]["text_config"] | SMALL}
        _built[name] = InterpretableModel(tiny.build(name, **(inner if name == "gemma3" else SMALL)), tokenizer)
    return _built[name]


@pytest.fixture(scope="module", autouse=True)
def _forget() -> Iterator[None]:
    yield
    _built.clear()


def vector(seed: int, width: int = WIDTH) -> mx.array:
    mx.random.seed(seed)
    return 2 * mx.random.normal((width,))


def few(logits: mx.array) -> mx.array:
    return mx.random.categorical(logits[..., :WORDS])


# -- everything that can be asked for ----------------------------------------------------------------------------------

V, W, U = (vector(seed) for seed in (3, 4, 5))
OPERATORS: dict[str, Callable[..., iv.Intervention]] = {
    "add_vector": lambda s, **more: iv.add_vector(W, s, **more),
    "norm kept": lambda s, **more: iv.add_vector(W, s, preserve_norm=True, **more),
    "add_sequence": lambda s, **more: iv.add_sequence(mx.stack([V, W, U]), s, **more),
    "ablate": lambda s, **more: iv.ablate(W, s, **more),
    "ablate a plane": lambda s, **more: iv.ablate(mx.stack([V, W]), s, **more),
    "mean_replace": lambda s, **more: iv.mean_replace(W, None, 0.5 * s, **more),
    "mean along": lambda s, **more: iv.mean_replace(V, W, s, **more),
    "zero_out": lambda s, **more: iv.zero_out(0.4 * s, **more),
    "replace_with": lambda s, **more: iv.replace_with(W, strength=0.5 * s, **more),
    "patch": lambda s, **more: iv.replace_with(mx.stack([V, W])[None], strength=0.5 * s, **more),
    "scale": lambda s, **more: iv.scale(1.5, s, **more),
    "clamp": lambda s, **more: iv.clamp(-0.5, 0.5, strength=s, **more),
    "clamp along": lambda s, **more: iv.clamp(low=0.2, along=W, strength=s, **more),
    "cap": lambda s, **more: iv.cap(W, -0.3, "above", s, **more),
    "affine": lambda s, **more: iv.affine(1 + V / 10, W / 4, s, **more),
    "rotate": lambda s, **more: iv.rotate(V, W, 50, s, relative=True, **more),
    "slerp": lambda s, **more: iv.slerp(W, 0.2 * s, **more),
    "low_rank": lambda s, **more: iv.low_rank(mx.eye(32)[:2], mx.eye(32)[2:4] / 2, mx.ones(2), s, **more),
    "sae_latent": lambda s, **more: iv.SaeLatent(
        mx.stack([V, W]) / 8, [2.0, 0.5], "clamp", mx.stack([W, U]) / 8, mx.ones(2), U / 4, strength=s, **more
    ),
    "noise": lambda s, **more: iv.noise(0.5, 7, s, **more),
    "function": lambda s, **more: iv.Function(halved, s, **more),
}


def halved(x: mx.array) -> mx.array:
    return x * 0.5


def late(n: int) -> float:
    return 0.5 * n - 1


def third(ids: list[int]) -> list[int]:
    return [i for i, token in enumerate(ids) if token % 3 == 1]


SCHEDULES: list[Any] = [None, None, iv.decay(2), iv.ramp(3), iv.window(0, 2), iv.window(1), iv.window(2, 4), late]
SPANS: list[Any] = [None, None, (1, 2), (5, (6,)), ((1, 2), 3), ((4, 1), (2, 1))]
KEYS = ["layers.0", "layers.1", "layers.2", "layers.1.attn", "layers.1.input", "embed", "norm"]


def test_every_operator_is_among_them() -> None:
    tried = {part.name for make in OPERATORS.values() for part in make(1.0).parts()}
    assert tried >= set(iv.available()) - {"compose", "heads", "when"}


@st.composite
def positions(draw: st.DrawFn, prompt: list[int]) -> Any:
    """Every form of `at=`, where it means something for a prompt."""
    n = len(prompt)
    index = st.integers(-n, n + 4)
    forms = [
        st.sampled_from(["all", "prompt", "generated", "last", "first"]), index, st.lists(index, max_size=4),
        st.builds(slice, st.none() | index, st.none() | index, st.none() | st.integers(1, 3)),
        st.just(third), st.sampled_from(prompt).map(lambda token: after((token,))),
    ]  # fmt: skip
    return draw(st.one_of(*forms))


@st.composite
def conditions(draw: st.DrawFn, key: str, per: str, depth: int = 2) -> iv.Condition:
    if depth and draw(st.booleans()):
        left, right = (draw(conditions(key, per, depth - 1)) for _ in range(2))
        return draw(st.sampled_from([left & right, left | right, ~left]))
    if per == "token" and draw(st.booleans()):
        return iv.inside(*draw(st.sampled_from([span for span in SPANS if span is not None])))
    earlier = [None, "embed", *(["layers.0"] if key in ("layers.1", "layers.2", "norm") else [])]
    kind = draw(st.sampled_from([iv.cosine, iv.projection]))
    read = draw(st.sampled_from(["last", "mean"])) if per == "prompt" else "last"
    reading = kind(draw(st.sampled_from([V, W])), key=draw(st.sampled_from(earlier)), read=read)
    threshold = draw(st.sampled_from([-0.15, -0.05, 0.0, 0.05, 0.15])) * (1 if kind is iv.cosine else 10)
    return reading > threshold if draw(st.booleans()) else reading <= threshold


@st.composite
def edits(draw: st.DrawFn, key: str, prompt: list[int], depth: int = 2) -> iv.Intervention:
    what = draw(st.sampled_from(["one", "one", "one", "gate", "gate", "both"])) if depth else "one"
    if what == "gate":
        per = draw(st.sampled_from(["prompt", "token"]))
        then = draw(edits(key, prompt, depth - 1))
        return iv.when(draw(conditions(key, per)), then, draw(st.sampled_from([1.0, 0.5])), per=per)  # type: ignore[arg-type]
    if what == "both":
        return iv.Compose((draw(edits(key, prompt, depth - 1)), draw(edits(key, prompt, depth - 1))))
    make, strength = draw(st.sampled_from(list(OPERATORS.values()))), draw(st.sampled_from([1.0, 1.0, -0.7, 0.0]))
    return make(
        strength, at=draw(positions(prompt)), schedule=draw(st.sampled_from(SCHEDULES)),
        exclude=draw(st.sampled_from(SPANS)),
    )  # fmt: skip


@st.composite
def steered_prompts(draw: st.DrawFn, most: int = 300) -> tuple[list[int], dict[str, iv.Intervention] | None, int]:
    """A prompt, what steers it (or nothing), and how many tokens are made."""
    # most are short, so that chunks, prompts' ends and spans meet; some are as long as 300 tokens
    length = min(most, draw(st.one_of(*[st.integers(1, 12)] * 2, st.integers(13, 70), st.integers(71, 300))))
    seed = draw(st.integers(0, 99))
    prompt = np.random.default_rng(seed).integers(1, WORDS, length).tolist()
    keys = draw(st.lists(st.sampled_from(KEYS), max_size=2, unique=True))
    steer = {key: draw(edits(key, prompt)) for key in keys}
    return prompt, steer or None, draw(st.integers(1, 6))


# -- the reference -----------------------------------------------------------------------------------------------------


class Margins:
    """How near any reading came to its threshold: what a gate decides by less is not held against anything."""

    def __init__(self) -> None:
        self.least = 1.0

    def __enter__(self) -> Margins:
        self._holds, margins = Compared.holds, self

        def holds(condition: Compared, value: Any, tokens: Tokens) -> mx.array:
            readings = value(condition.reading)
            size = 1.0 if condition.reading.name == "cosine" else 10.0
            margins.least = min(margins.least, mx.abs(readings - condition.threshold).min().item() / size)
            return self._holds(condition, value, tokens)

        Compared.holds = holds  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: Any) -> None:
        Compared.holds = self._holds  # type: ignore[method-assign]


def whole(model: InterpretableModel, prompt: list[int], steer: Any, made: list[int]) -> mx.array:
    """Log-probabilities of every step, (steps, vocabulary), from one forward over the whole text without a cache."""
    with model.trace([*prompt, *made[:-1]], interventions=steer, prompt_tokens=len(prompt)):
        return logprobs(model.output[0, len(prompt) - 1 :])


def test_one_forward_over_the_whole_text_is_one_for_every_step(tokenizer: TokenizerWrapper) -> None:
    """No token sees a later one, so that the whole text need not be run anew for each step."""
    prompt, made = [1, 2, 3, 4, 5, 1, 2], [3, 1, 2, 6, 5]
    gate = iv.when(iv.cosine(V, read="mean") > -2, iv.noise(0.5, at="generated"))
    steer = {"layers.1": [gate, iv.add_vector(W, at=after((4,)), exclude=(1, 2), schedule=iv.decay(2))]}
    for name in FAMILIES:
        model = built(name, tokenizer)
        once = whole(model, prompt, steer, made)
        each = [whole(model, prompt, steer, made[: step + 1])[-1] for step in range(len(made))]
        assert mx.abs(once - mx.stack(each)).max().item() <= 1e-5


def farthest(model: InterpretableModel, prompt: list[int], steer: Any, made: list[int], found: Any) -> float:
    """The largest difference of a run's log-probabilities from the reference: of all tokens, or of those chosen."""
    expected = whole(model, prompt, steer, made)
    if isinstance(found, list):
        return mx.abs(mx.stack(found) - expected).max().item()
    return mx.abs(found - mx.take_along_axis(expected, mx.array(made)[:, None], axis=1)[:, 0]).max().item()


some = settings(max_examples=7, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck])


@pytest.mark.parametrize("name", FAMILIES)
@given(case=steered_prompts(), size=st.sampled_from([3, 64, 2048]), foreign=st.booleans())
@some
def test_a_stream_is_the_whole_text(
    name: str, tokenizer: TokenizerWrapper, case: Any, size: int, foreign: bool
) -> None:
    model, (prompt, steer, count) = built(name, tokenizer), case
    size = 64 if size == 3 and len(prompt) > 100 else size  # a hundred forwards show no more than twenty
    options = {"max_tokens": count, "prefill_step_size": size, "sampler": few}
    mx.random.seed(1)
    if foreign and steer is not None:  # mlx-lm's own function in a context, which is told the prompt
        with model.steer(steer, prompt_tokens=prompt):
            pieces = list(mlx_lm.stream_generate(model.model, tokenizer, prompt, **options))
    else:
        pieces = list(model.stream(prompt, steer, **options))
    with Margins() as margins:
        far = farthest(model, prompt, steer, [p.token for p in pieces], [p.logprobs for p in pieces])
    assume(margins.least > 1e-4)
    assert far <= 1e-4


@pytest.mark.parametrize("name", FAMILIES)
@given(cases=st.lists(steered_prompts(), min_size=2, max_size=4), size=st.sampled_from([3, 64, 2048]),
       together=st.integers(1, 3), around=st.none() | edits("layers.1", [1, 2, 3], 0))  # fmt: skip
@some
def test_rows_that_join_and_leave_are_each_the_whole_text(
    name: str, tokenizer: TokenizerWrapper, cases: Any, size: int, together: int, around: Any
) -> None:
    """Plain and steered rows in any order, finishing and joining at different times, within a steering or not."""
    model = built(name, tokenizer)
    prompts, steers, counts = ([*part] for part in zip(*cases, strict=True))
    assume(sum(map(len, prompts)) < 350)
    options: dict[str, Any] = {"prefill_step_size": 64 if max(map(len, prompts)) > 60 else size}
    if model._sites.family.batch:
        options |= {"prefill_batch_size": together, "completion_batch_size": together}
    if around is not None:
        around = iv.add_vector(U, 0.5, at="last", exclude=around.exclude, schedule=around.schedule)
        with model.steer({"layers.1": around}):
            rows = model.generate(prompts, steers, max_tokens=counts, logprobs=True, seed=1, sampler=few, **options)
    else:
        rows = model.generate(prompts, steers, max_tokens=counts, logprobs=True, seed=1, sampler=few, **options)
    with Margins() as margins:
        far = []
        for row, prompt, steer in zip(rows, prompts, steers, strict=True):
            if around is not None:  # what is around acts first, on what its own steering finds
                with model.steer({"layers.1": around}, prompt_tokens=len(prompt)):
                    far.append(farthest(model, prompt, steer, row.tokens, row.logprobs))
            else:
                far.append(farthest(model, prompt, steer, row.tokens, row.logprobs))
    assume(margins.least > 1e-4)
    assert max(far) <= 1e-4
    assert [len(row.tokens) for row in rows] == counts


@given(case=steered_prompts(40), drafts=st.integers(1, 4))
@some
def test_speculative_decoding_is_the_whole_text(tokenizer: TokenizerWrapper, case: Any, drafts: int) -> None:
    """A draft model that guesses wrong most of the time: what it drafted leaves no mark."""
    (prompt, steer, count), model = case, built("llama", tokenizer)
    draft = built("qwen3", tokenizer).model
    mx.random.seed(1)
    pieces = list(
        model.stream(
            prompt, steer, max_tokens=count + 4, draft_model=draft, num_draft_tokens=drafts, sampler=few,
            prefill_step_size=7,
        )
    )  # fmt: skip
    with Margins() as margins:
        far = farthest(model, prompt, steer, [p.token for p in pieces], [p.logprobs for p in pieces])
    assume(margins.least > 1e-4)
    assert far <= 1e-4


AT = ["prompt", "generated", "last", "first", 2, -2, [0, -1, 9], slice(1, 4), slice(-3, None), after((3,)), third]


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_placement_one_token_off_is_caught(
    shift: int, tokenizer: TokenizerWrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every position, schedule, span and gate: were a forward taken for the next one, the above would fail."""
    begin = SteeringState.begin

    def shifted(self: SteeringState, width: int) -> Tokens:
        tokens = begin(self, width)
        tokens.starts = [start + shift for start in tokens.starts]
        return tokens

    model, prompt = built("llama", tokenizer), [1, 2, 5, 3, 4, 1, 6, 2]
    with model.trace(prompt) as trace:
        asked = float(np.array(trace.activations["layers.1"][0, -1]) @ np.array(V) / np.linalg.norm(np.array(V)))
    reading = iv.projection(V)
    made: dict[str, Any] = {f"at={at}": iv.add_vector(W, at=at) for at in AT}
    made |= {f"{s}": iv.add_vector(W, schedule=s) for s in (iv.decay(1), iv.ramp(3), iv.window(2, 4))}
    made["gate"] = iv.when((reading > asked - 1e-3) & (reading < asked + 1e-3), iv.add_vector(W))
    made["noise"] = iv.noise(3.0)
    made["patch"] = iv.replace_with(mx.stack([V, W]))
    monkeypatch.setattr(SteeringState, "begin", shifted)
    for what, edit in made.items():
        mx.random.seed(1)
        pieces = list(model.stream(prompt, {"layers.1": edit}, max_tokens=3, sampler=few, prefill_step_size=3))
        far = farthest(model, prompt, {"layers.1": edit}, [p.token for p in pieces], [p.logprobs for p in pieces])
        assert far > 5e-3, what


# -- without steering, mlx-lm's own ------------------------------------------------------------------------------------


def plain_batch(model: InterpretableModel, prompts: list[list[int]], count: int, **options: Any) -> list[Any]:
    """mlx-lm's own batch, with the log-probabilities of what was chosen."""
    assert model.tokenizer is not None
    made: dict[int, list[int]] = {}
    chosen: dict[int, list[mx.array]] = {}
    generator = BatchGenerator(model.model, stop_tokens=[[t] for t in model.tokenizer.eos_token_ids], **options)
    with closing(generator):
        uids = generator.insert(prompts, max_tokens=[count] * len(prompts))
        while responses := generator.next_generated():
            for response in responses:
                if response.finish_reason != "stop":
                    made.setdefault(response.uid, []).append(response.token)
                    chosen.setdefault(response.uid, []).append(response.logprobs[response.token])
    return [(made[uid], mx.stack(chosen[uid])) for uid in uids]


def nothing(width: int) -> dict[str, Any]:
    """Everything at strength 0."""
    v = vector(3, width)
    gate = iv.when(iv.cosine(v, read="mean") > -2, iv.add_vector(v, 0.0))
    return {
        "layers.0": [iv.add_vector(v, 0.0), iv.ablate(v, 0.0, at="last"), gate], "embed": iv.scale(3.0, 0.0),
        "layers.1": iv.when(iv.cosine(v, key="layers.0") > 0, iv.zero_out(exclude=(1, 2)), 0.0, per="token"),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["pocket", *(name for name in FAMILIES if name != "gemma2")])
def test_at_strength_0_and_outside_every_context_tokens_are_mlx_lms_own(
    name: str, tokenizer: TokenizerWrapper, pocket: InterpretableModel
) -> None:
    """Ten prompts of 64 tokens, bit for bit; of 24 with the larger bundled model."""
    length = 24 if name == "pocket" else 64
    model = InterpretableModel(pocket.model, tokenizer) if name == "pocket" else built(name, tokenizer)
    size = 400 if name == "pocket" else tiny.VOCABULARY
    rng = np.random.default_rng(2)
    prompts = [rng.integers(1, size, length).tolist() for length in (1, 2, 3, 5, 8, 12, 4, 7, 9, 6)]
    expected = plain_batch(model, prompts, length)
    v = vector(3, 256 if name == "pocket" else WIDTH)
    with model.steer({"layers.1": iv.add_vector(v)}):  # and this is over
        mx.eval(model.model(mx.array([prompts[3]])))
    zero = nothing(v.size)
    rows = model.generate(prompts, [None, zero] * 5, max_tokens=length, logprobs=True)
    for (made, chosen), row in zip(expected, rows, strict=True):
        assert made == row.tokens
        assert len(made) == length
        assert mx.array_equal(chosen, row.logprobs)


@pytest.mark.parametrize(("name", "most"), [("gemma2", None), ("qwen3", 8)])
def test_one_prompt_at_strength_0_is_mlx_lms_own_in_any_cache(
    name: str, most: int | None, tokenizer: TokenizerWrapper
) -> None:
    model, prompt = built(name, tokenizer), [7, 31, 52, 18, 77, 23, 9, 64, 5, 80]
    options: dict[str, Any] = {"max_tokens": 10, "prefill_step_size": 4, "max_kv_size": most}
    plain = list(mlx_lm.stream_generate(model.model, tokenizer, prompt, **options))
    gate = {"layers.1": iv.when(iv.cosine(V) > -2, iv.add_vector(W))}
    with model.steer(gate, prompt_tokens=prompt) as steering:
        steering.strength = 0.0
        foreign = list(mlx_lm.stream_generate(model.model, tokenizer, prompt, **options))
    ours, zero = (list(model.stream(prompt, steer, **options)) for steer in (None, nothing(WIDTH)))
    for pieces in (ours, zero, foreign):
        assert [p.token for p in pieces] == [p.token for p in plain]
        assert all(mx.array_equal(a.logprobs, b.logprobs) for a, b in zip(pieces, plain, strict=True))
    unbounded = list(mlx_lm.stream_generate(model.model, tokenizer, prompt, **options | {"max_kv_size": None}))
    assert mx.array_equal(plain[-1].logprobs, unbounded[-1].logprobs) == (most is None)


# -- a step never waits ------------------------------------------------------------------------------------------------


WAITING = ("item", "tolist", "__bool__", "__float__", "__int__", "__array__", "__iter__", "__len__", "__buffer__")


def test_no_operator_and_no_gate_waits_for_an_array_in_a_decoding_step(
    tokenizer: TokenizerWrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mlx-lm stages the next step before it looks at this one; whoever evaluates something in it makes it wait.

    Watched in two ways: what evaluates by name is counted, and the step is traced by `mx.compile`, in which there is no
    value to be had, so that any other way to one fails.
    """
    model, waited = built("llama", tokenizer), []
    everything = [make(0.7, schedule=schedule) for make in OPERATORS.values() for schedule in (None, iv.decay(3))]
    everything += [make(0.7, at="last", exclude=(1, (2, 3))) for make in OPERATORS.values()]
    for per, read in (("token", "last"), ("prompt", "last"), ("prompt", "mean")):
        asked = (iv.cosine(V, read=read) > -1) & ~(iv.projection(W, key="layers.0", read=read) > 99)  # type: ignore[arg-type]
        everything.append(iv.when(asked if per == "prompt" else asked & ~iv.inside(1, 2), iv.add_vector(W), per=per))  # type: ignore[arg-type]
    everything.append(iv.when(iv.cosine(V) > -1, iv.when(~iv.inside((1, 2), 3), iv.scale(1.1), per="token")))
    steer = {"layers.1": everything}
    caches = {rows: make_prompt_cache(model.model) for rows in (1, 2)}
    with model.steer(steer, prompt_tokens=4):
        for rows, cache in caches.items():
            for ids in ([[1, 2, 3, 4]], [[5]]):
                mx.eval(model.model(mx.array(ids * rows), cache=cache), [entry.state for entry in cache])
        with monkeypatch.context() as patched:
            for name in ("eval", "synchronize"):
                patched.setattr(mx, name, lambda *_, name=name: waited.append(name))
            for cache in caches.values():
                for token in (1, 2, 3):
                    cache[0].steering_state.rows[0].read = False
                    rows = len(cache[0].steering_state.rows)
                    staged = [model.model(mx.array([[token]] * rows), cache=cache)]
        assert not waited
        mx.eval(staged)
        cache = caches[1]

        def step(ids: mx.array) -> mx.array:
            logits = model.model(ids, cache=cache)
            return logits

        tokens = mx.array([[6]])
        with pytest.raises(Exception, match="eval|transform"):  # the watch watches
            mx.compile(lambda ids: ids if ids.sum().item() else ids + 1)(tokens)
        mx.compile(step)(tokens)


# -- broken off --------------------------------------------------------------------------------------------------------


PROMPT = [7, 31, 52, 18, 77, 23, 9, 64]
STEER = {"layers.1": [iv.when(iv.cosine(V, key="layers.0", read="mean") > -2, iv.add_vector(W)),
                      iv.add_vector(U, exclude=(1, 2))]}  # fmt: skip


class Enough(Exception):
    pass


@pytest.mark.parametrize("name", ["llama", "mamba2"])
@pytest.mark.parametrize("how", ["closed", "sampler", "interrupted sampler", "processor"])
def test_a_stream_broken_off_leaves_a_plain_model_and_a_cache_that_goes_on(
    name: str, how: str, tokenizer: TokenizerWrapper
) -> None:
    model = built(name, tokenizer)
    bare, classes = model.model(mx.array([PROMPT])), tiny.classes(model.model)
    for count in (1, 3):
        cache, made = make_prompt_cache(model.model), []

        def breaking(logits: mx.array, made: list[int] = made, count: int = count) -> None:
            if len(made) >= count and how != "closed":
                raise KeyboardInterrupt if "interrupted" in how else Enough

        def sampler(logits: mx.array, breaking: Any = breaking) -> mx.array:
            breaking(logits)
            return mx.argmax(logits, axis=-1)

        def processor(_: mx.array, logits: mx.array, breaking: Any = breaking) -> mx.array:
            breaking(logits)
            return logits

        options: Any = {"logits_processors": [processor]} if how == "processor" else {"sampler": sampler}
        pieces: Any = model.stream(PROMPT, STEER, max_tokens=8, prompt_cache=cache, prefill_step_size=3, **options)
        try:
            for piece in pieces:
                made.append(piece.token)
                if how == "closed" and len(made) == count:
                    pieces.close()
        except (Enough, KeyboardInterrupt):
            pass
        assert tiny.classes(model.model) == classes
        assert active(model.model) == []
        assert mx.array_equal(model.model(mx.array([PROMPT])), bare)
        # The row knows where its cache stands: at tokens that were handed out, and one more that was staged already.
        seen = cache[0].steering_state.rows[0].seen
        held = [*PROMPT, *made, int(mx.argmax(whole(model, PROMPT, STEER, [*made, 0])[-1]).item())][:seen]
        assert len(held) == seen == getattr(cache[0], "offset", seen)
        found = [p.logprobs for p in model.stream([5, 6], STEER, max_tokens=1, prompt_cache=cache)]
        fresh = make_prompt_cache(model.model)
        with model.steer(STEER, prompt_tokens=PROMPT):
            mx.eval(model.model(mx.array([held]), cache=fresh))
        expected = [p.logprobs for p in model.stream([5, 6], STEER, max_tokens=1, prompt_cache=fresh)]
        assert mx.abs(found[0] - expected[0]).max().item() <= 1e-4


@pytest.mark.parametrize("name", ["llama", "mamba2"])
def test_a_forward_broken_off_in_the_midst_leaves_a_cache_that_says_so(name: str, tokenizer: TokenizerWrapper) -> None:
    """Some layers' caches hold its tokens, others not: whoever goes on from it would get nonsense in silence."""
    model = built(name, tokenizer)

    def breaking(x: mx.array) -> mx.array:
        if calls.append(1) or len(calls) == 3:
            raise KeyboardInterrupt
        return x

    calls: list[int] = []
    steer, cache = {"layers.1": breaking}, make_prompt_cache(model.model)
    with pytest.raises(KeyboardInterrupt):
        list(model.stream(PROMPT, steer, max_tokens=4, prompt_cache=cache, prefill_step_size=3))
    assert active(model.model) == []
    for attempt in (
        lambda: list(model.stream([5], steer, max_tokens=1, prompt_cache=cache)),
        lambda: list(mlx_lm.stream_generate(model.model, tokenizer, [5], max_tokens=1, prompt_cache=cache)),
    ):
        with pytest.raises(SteeredCacheError):
            attempt()
    with pytest.raises(SteeredCacheError, match="broken off halfway, and left it damaged"), model.steer(steer):
        model.model(mx.array([[5]]), cache=cache)
    calls.clear()
    assert len(list(model.stream(PROMPT, {"layers.1": halved}, max_tokens=2))) == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it may fall into a destructor
def test_ctrl_c_in_a_stream_and_in_a_batch_leaves_the_model_plain(tokenizer: TokenizerWrapper) -> None:
    """A real SIGINT from a timer, again and again, wherever it falls."""
    model = built("llama", tokenizer)
    before, bare = tiny.classes(model.model), model.model(mx.array([PROMPT]))
    mx.eval(bare)
    fell = 0
    for step in range(24):
        cache = make_prompt_cache(model.model)
        previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.001 + 0.0015 * step)
            if step % 2:
                model.generate([PROMPT, PROMPT[:3]], [STEER, None], max_tokens=200)
            else:
                for _ in model.stream(PROMPT, STEER, max_tokens=200, prompt_cache=cache):
                    pass
        except KeyboardInterrupt:
            fell += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        assert tiny.classes(model.model) == before
        assert active(model.model) == []
        assert mx.array_equal(model.model(mx.array([PROMPT])), bare)
        if not step % 2 and hasattr(cache[0], "steering_state"):
            row = cache[0].steering_state.rows[0]
            assert row.broken or row.seen == cache[0].offset
    assert fell > 12


def test_nothing_touched_is_said_only_where_nothing_could_be(tokenizer: TokenizerWrapper) -> None:
    model = built("llama", tokenizer)
    with pytest.warns(NothingTouched, match="at=90 lies nowhere"):
        model.generate(PROMPT, {"layers.1": iv.when(iv.cosine(V) > -2, iv.add_vector(W, at=90))}, max_tokens=2)
