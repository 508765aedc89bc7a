"""Reading and writing one forward: lazily, in place, in batches, and with gradients."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import by_hand

from mlxsteer import InterpretableModel, LostWrite, NeverFired, PositionError, UnknownKey
from mlxsteer import interventions as iv
from mlxsteer.places import Place

PROMPT = [7, 31, 52, 18, 77, 23, 9]


@pytest.fixture(params=["llama", "gpt2", "gemma2", "qwen3_next", "gemma4_text", "rwkv7", "mamba2"], scope="module")
def model(request: pytest.FixtureRequest) -> InterpretableModel:
    return InterpretableModel(tiny.build(request.param))


@pytest.fixture(scope="module")
def llama() -> InterpretableModel:
    return InterpretableModel(tiny.build("llama"))


def vector(seed: int = 3, width: int = 64) -> mx.array:
    mx.random.seed(seed)
    return mx.random.normal((width,))


def calls_of(model: InterpretableModel, body: Callable[[], Any]) -> list[int]:
    """Which blocks really run (their class's own code) while `body` does."""
    base = type(model.model.layers[0])
    index = {id(block): i for i, block in enumerate(model.model.layers)}
    seen, original = [], base.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(index[id(self)])
        return original(self, *args, **kwargs)

    base.__call__ = counted
    try:
        body()
    finally:
        base.__call__ = original
    return seen


# -- reading ---------------------------------------------------------------------------------------------------------


def test_every_key_of_a_trace_can_be_read_and_equals_what_the_module_gave(model: InterpretableModel) -> None:
    with model.trace(PROMPT) as trace:
        keys = list(trace.activations)
    assert "logits" in keys
    assert {"layers.0", "layers.3", "embed", "norm"} <= set(keys)
    seen: dict[str, Any] = {}
    hands = []
    for key in keys:
        if "#" in key or key == "logits":
            continue
        module = model._sites.resolve(key).module
        hands.append(by_hand(module, lambda x, key=key: (seen.setdefault(key, x.reshape(x.shape)), x)[1]))
    for hand in hands:
        hand.__enter__()
    logits = model.model(mx.array([PROMPT]))
    for hand in reversed(hands):
        hand.__exit__(None, None, None)
    assert mx.array_equal(trace.activations["logits"], logits)
    for key, value in seen.items():
        assert mx.array_equal(trace.activations[key], value), key


def test_an_input_is_what_enters_the_module(model: InterpretableModel) -> None:
    with model.trace(PROMPT) as trace:
        pass
    for layer in range(1, 4):
        entered, left = trace.activations[f"layers.{layer}.input"], trace.activations[f"layers.{layer - 1}"]
        assert mx.array_equal(entered, left)
    assert mx.array_equal(trace.activations["norm.input"], trace.activations["layers.3"])


def test_reading_a_place_runs_no_block_but_its_own(llama: InterpretableModel) -> None:
    with llama.trace(PROMPT) as trace:
        assert calls_of(llama, lambda: trace.activations["layers.1"]) == [0, 1]
        assert calls_of(llama, lambda: trace.output) == [2, 3]
    assert calls_of(llama, lambda: trace.activations["layers.3.mlp"]) == [3]
    assert calls_of(llama, lambda: trace.activations["layers.2"]) == []
    assert calls_of(llama, lambda: trace.activations["norm"]) == []


def test_reading_goes_on_after_the_block_and_writing_does_not(llama: InterpretableModel) -> None:
    with llama.trace(PROMPT) as trace:
        inside = trace.activations["layers.1"]
    outside = trace.activations["layers.2"]
    assert mx.array_equal(inside, trace.activations["layers.1"])
    assert type(outside + 1.0) is mx.array
    for handle in (inside, outside):
        with pytest.raises(LostWrite, match=r"h = mx\.array\(h\)"):
            handle[:, -1] += 1.0
    own = mx.array(outside)
    own += 1.0  # an array of the reader's own
    assert mx.array_equal(own, trace.activations["layers.2"] + 1.0)


def test_a_key_may_be_spelled_in_many_ways(llama: InterpretableModel) -> None:
    with llama.trace(PROMPT) as trace:
        pass
    value = trace.activations["layers.2"]
    for key in ("model.layers.2", "model.model.layers.2", "layers.-2", "layers.2.output"):
        assert mx.array_equal(trace.activations[key], value)
    assert "layers.2" in trace.activations
    assert "layers.9" not in trace.activations
    with pytest.raises(UnknownKey, match=r"layers\.0 to layers\.3"):
        trace.activations["layers.9"]


def test_a_module_that_runs_twice_needs_the_number_of_the_call(llama: InterpretableModel) -> None:
    with llama.trace(PROMPT) as trace:
        first, second = trace.activations["layers.1.self_attn.rope#0"], trace.activations["layers.1.self_attn.rope#1"]
        assert first.shape != second.shape  # queries have twice the heads of keys
        with pytest.raises(NeverFired, match="more than once"):
            trace.activations["layers.1.self_attn.rope"]
        with pytest.raises(NeverFired, match="fewer times"):
            trace.activations["layers.1.self_attn.rope#2"]


def test_a_module_that_never_runs_is_an_error() -> None:
    model = InterpretableModel(tiny.build("cohere2"))
    with model.trace(PROMPT) as trace, pytest.raises(NeverFired, match=r"layers\.1\.self_attn\.rope"):
        trace.activations["layers.1.self_attn.rope"]
    with pytest.raises(NeverFired), model.trace(PROMPT, interventions={"layers.1.self_attn.rope": lambda x: x}):
        pass


def test_attributes_lead_to_the_same_places(llama: InterpretableModel) -> None:
    with llama.trace(PROMPT) as trace:
        assert mx.array_equal(llama.layers[2].mlp.output, trace.activations["layers.2.mlp"])
        assert mx.array_equal(llama.layers[-1].output, trace.activations["layers.3"])
        assert mx.array_equal(llama.layers[1].self_attn.q_proj.output, trace.activations["layers.1.self_attn.q_proj"])
        assert mx.array_equal(llama.layers[1].attn.heads, trace.activations["layers.1.attn.heads"])
        assert mx.array_equal(llama.layers[1].input, trace.activations["layers.1.input"])
        saved = llama.layers[2].mlp.output.save()
        assert type(saved) is mx.array
    assert len(llama.layers) == 4
    assert llama.layers[1].self_attn.n_heads == 4
    assert [repr(layer) for layer in llama.layers[1:3]] == ["<layers.1>", "<layers.2>"]
    with pytest.raises(AttributeError, match="no part called 'mpl'. Nearest: mlp"):
        llama.layers[2].mpl  # noqa: B018
    with pytest.raises(RuntimeError, match="inside `with model.trace"):
        llama.layers[2].output  # noqa: B018
    with pytest.raises(RuntimeError, match="only inside"):
        llama.output  # noqa: B018


def test_recording_reads_around_other_code_step_by_step(pocket: InterpretableModel) -> None:
    tokens = pocket.encode("The food was")
    with pocket.record("layers.5", "layers.2.attn.heads") as seen:
        text = mlx_lm.generate(pocket.model, pocket.tokenizer, prompt="The food was", max_tokens=4)
    made = pocket.encode(text.strip())
    assert text
    assert made
    shapes = [x.shape for x in seen["layers.5"]]
    assert shapes[0] == (1, len(tokens) - 1, 256)
    assert all(shape == (1, 1, 256) for shape in shapes[1:])
    whole = seen.join("layers.5")
    with pocket.trace(tokens) as trace:
        pass
    n = len(tokens)
    assert mx.allclose(whole[:, :n], trace.activations["layers.5"], atol=1e-4)
    assert list(seen) == ["layers.5", "layers.2.self_attn.heads"]
    with pytest.raises(UnknownKey, match="was not recorded"):
        seen["layers.1"]
    with pytest.raises(NeverFired, match="no forward"), pocket.record("layers.5"):
        pass
    with pytest.raises(UnknownKey, match="layers.5"), pocket.record("layers.5.nothing"):
        pass


# -- writing in place ------------------------------------------------------------------------------------------------

V, W = vector(3), vector(4)
EDITS: list[tuple[str, Callable[[InterpretableModel], None], dict[str, Any]]] = [
    ("whole +=", lambda m: _set(m.layers[1], lambda h: h.__iadd__(V)), {"layers.1": iv.add_vector(V)}),
    ("last token", lambda m: _add(m.layers[1], (slice(None), -1), 2.0 * V), {"layers.1": iv.add_vector(V, 2.0, at=-1)}),
    ("tokens", lambda m: _add(m.layers[2], (slice(None), slice(1, 4)), V),
     {"layers.2": iv.add_vector(V, at=slice(1, 4))}),
    ("scaled", lambda m: _set(m.layers[0], lambda h: h.__imul__(0.5)), {"layers.0": iv.scale(0.5)}),
    ("zeroed", lambda m: _put(m.layers[3], (slice(None), 2), 0.0), {"layers.3": iv.zero_out(at=2)}),
    ("replaced", lambda m: _put(m.layers[3], (slice(None), slice(None)), V), {"layers.3": iv.mean_replace(V)}),
    ("attention", lambda m: _add(m.layers[2].attn, (slice(None), -1), V), {"layers.2.attn": iv.add_vector(V, at=-1)}),
    ("block input", lambda m: _put_input(m.layers[2], V), {"layers.2.input": iv.add_vector(V)}),
    ("two places", lambda m: (_add(m.layers[0], (slice(None), 1), V), _add(m.layers[2], (slice(None), -1), W)),
     {"layers.0": iv.add_vector(V, at=1), "layers.2": iv.add_vector(W, at=-1)}),
    ("two in one block", lambda m: (_add(m.layers[2].attn, (slice(None), 0), V), _add(m.layers[2], (slice(None), -1), W)
     ), {"layers.2.attn": iv.add_vector(V, at=0), "layers.2": iv.add_vector(W, at=-1)}),
    ("twice at one place", lambda m: (_add(m.layers[1], (slice(None), 1), V), _add(m.layers[1], (slice(None), -1), W)),
     {"layers.1": [iv.add_vector(V, at=1), iv.add_vector(W, at=-1)]}),
    ("embedding", lambda m: _double(m, "embed"), {"embed": iv.scale(2.0)}),
]  # fmt: skip


def _set(place: Any, change: Callable[[Any], Any]) -> None:
    place.output = change(place.output)


def _add(place: Any, index: Any, value: Any) -> None:
    place.output[index] += value


def _put(place: Any, index: Any, value: Any) -> None:
    place.output[index] = value


def _put_input(place: Any, value: Any) -> None:
    place.input += value


def _double(model: InterpretableModel, key: str) -> None:
    Place(model._sites, key).output *= 2.0


@pytest.mark.parametrize(("edit", "same"), [(e, s) for _, e, s in EDITS], ids=[n for n, _, _ in EDITS])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
def test_an_inline_edit_is_the_intervention_bit_for_bit(
    edit: Callable[[InterpretableModel], None], same: dict[str, Any], dtype: mx.Dtype
) -> None:
    for name in ("llama", "gpt2", "gemma4_text"):
        model = InterpretableModel(tiny.build(name, dtype))
        with model.trace(PROMPT, interventions=same) as written:
            expected = model.output.save()
        with model.trace(PROMPT) as trace:
            before = trace.activations["logits"].save()
            edit(model)
            edited = model.output.save()
        assert edited.dtype == dtype
        assert mx.array_equal(edited, expected)
        assert not mx.array_equal(edited, before)
        for layer in range(4):
            assert mx.array_equal(trace.activations[f"layers.{layer}"], written.activations[f"layers.{layer}"])


def test_edits_with_reads_in_between(model: InterpretableModel) -> None:
    with model.trace(PROMPT):
        first = model.layers[0].output.save()
        model.layers[1].output[:, -1] += V
        middle = model.layers[2].output.save()
        model.layers[2].output[:, 0, :8] = 0.0
        model.layers[3].output[:, :2] -= W
        logits = model.output.save()
        assert mx.array_equal(model.layers[0].output, first)  # upstream of every edit

    def zero_part(h: mx.array) -> mx.array:
        keep = np.ones(h.shape, bool)
        keep[:, 0, :8] = False
        return mx.where(mx.array(keep), h, 0)

    with model.trace(PROMPT, interventions={
        "layers.1": iv.add_vector(V, at=-1), "layers.2": zero_part, "layers.3": iv.add_vector(W, -1.0, at=[0, 1]),
    }):  # fmt: skip
        assert mx.array_equal(model.output, logits)
    with model.trace(PROMPT, interventions={"layers.1": iv.add_vector(V, at=-1)}) as one:
        assert mx.array_equal(one.activations["layers.2"], middle)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_sequence_of_inline_edits_is_the_same_functions_as_interventions(data: st.DataObject) -> None:
    model = InterpretableModel(tiny.build("llama"))
    places = sorted(data.draw(st.lists(st.sampled_from(range(4)), min_size=1, max_size=4)))
    steps = []
    for place in places:
        start = data.draw(st.integers(0, len(PROMPT) - 1))
        stop = data.draw(st.integers(start + 1, len(PROMPT)))
        channels = slice(0, data.draw(st.integers(1, 64)))
        steps.append((place, (slice(None), slice(start, stop), channels), data.draw(st.floats(-3, 3, width=32))))
    reads = data.draw(st.lists(st.sampled_from(["layers.0", "layers.2.mlp", "layers.3", "logits"]), max_size=3))
    with model.trace(PROMPT) as trace:
        for number, (place, index, value) in enumerate(steps):
            if number < len(reads):
                mx.eval(trace.activations[reads[number]])
            model.layers[place].output[index] += value
        edited = model.output.save()

    def change(h: mx.array, index: Any, value: float) -> mx.array:
        h = mx.array(h)
        h[index] = h[index] + value
        return h

    functions: dict[str, list[Any]] = {}
    for place, index, value in steps:
        functions.setdefault(f"layers.{place}", []).append(lambda h, i=index, v=value: change(h, i, v))
    with model.trace(PROMPT, interventions=functions):
        assert mx.array_equal(model.output, edited)


def test_an_edit_runs_only_what_comes_after_it(llama: InterpretableModel) -> None:
    def edit() -> None:
        llama.layers[2].output[:, -1] += V

    with llama.trace(PROMPT) as trace:
        mx.eval(trace.output)
        assert calls_of(llama, edit) == []
        assert calls_of(llama, lambda: trace.output) == [3]
    with llama.trace(PROMPT) as trace:
        assert calls_of(llama, edit) == [0, 1, 2]
        assert calls_of(llama, lambda: trace.output) == [3]


def test_a_value_read_before_an_edit_stays_what_it_was(llama: InterpretableModel) -> None:
    with llama.trace(PROMPT) as trace:
        downstream = llama.layers[3].output
        before = mx.array(downstream)
        llama.layers[1].output += V
        assert mx.array_equal(downstream, before)
        assert not mx.array_equal(trace.activations["layers.3"], before)
        with pytest.raises(LostWrite, match="read it again"):
            downstream += W


def test_an_edit_upstream_of_an_earlier_one_is_refused(llama: InterpretableModel) -> None:
    with llama.trace(PROMPT):
        llama.layers[2].output += V
        with pytest.raises(LostWrite, match=r"layers\.1 lies upstream of layers\.2"):
            llama.layers[1].output += V
        with pytest.raises(LostWrite, match="upstream"):
            llama.layers[2].mlp.output += V


def test_a_write_that_would_be_lost_shows_the_spelling_that_works(llama: InterpretableModel) -> None:
    with llama.trace(PROMPT), pytest.raises(LostWrite, match=r"output\[0, -1\] \+= v"):
        llama.layers[1].output[0][-1] += V
    with pytest.raises(LostWrite, match="never put back"), llama.trace(PROMPT):
        part = llama.layers[1].output[:, -1]
        part += V
    with llama.trace(PROMPT) as trace:
        handle = trace.activations["layers.1"]
    with pytest.raises(LostWrite, match="is over"):
        handle += V
    with pytest.raises(LostWrite, match="is over"):
        handle[:, -1] = 0.0


def test_the_logits_can_be_written_too(llama: InterpretableModel) -> None:
    with llama.trace(PROMPT) as trace:
        llama.output[:, -1, 5] = 100.0
        assert mx.argmax(llama.output[0, -1]).item() == 5
    assert trace.activations["logits"][0, -1, 5].item() == 100.0
    with llama.trace(PROMPT, interventions={"logits": iv.scale(2.0)}):
        doubled = llama.output.save()
    assert mx.array_equal(doubled, 2 * llama.model(mx.array([PROMPT])))


def test_heads_can_be_written(llama: InterpretableModel) -> None:
    with llama.trace(PROMPT):
        llama.layers[1].attn.heads[:, :, 2] = 0.0
        edited = llama.output.save()

    def silence(x: mx.array) -> mx.array:
        return x * mx.array([1.0, 1.0, 0.0, 1.0])[:, None]

    with llama.trace(PROMPT, interventions={"layers.1.attn.heads": silence}):
        assert mx.array_equal(llama.output, edited)
    block = llama.model.layers[1]
    projection, cls = block.self_attn.o_proj, type(block.self_attn.o_proj)

    class Silenced(cls):  # type: ignore[misc, valid-type]
        def __call__(self, x: mx.array) -> mx.array:
            return super().__call__(x * mx.repeat(mx.array([1.0, 1.0, 0.0, 1.0]), 16))

    projection.__class__ = Silenced
    expected = llama.model(mx.array([PROMPT]))
    projection.__class__ = cls
    assert mx.array_equal(edited, expected)


def test_a_handle_is_an_array_for_everybody(llama: InterpretableModel) -> None:
    with llama.trace(PROMPT):
        handle = llama.layers[1].output
        assert isinstance(handle, mx.array)
        assert type(handle + 1) is mx.array
        assert type(pickle.loads(pickle.dumps(handle))) is mx.array
        assert type(copy.deepcopy(handle)) is mx.array
        assert type(copy.copy(handle[0])) is mx.array
        assert np.array(handle).shape == (1, 7, 64)
        assert type(handle.save()) is mx.array
        assert type(handle[:, -1].save()) is mx.array


# -- batches ---------------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(st.lists(st.lists(st.integers(1, 95), min_size=1, max_size=12), min_size=1, max_size=4), st.integers(0, 5))
def test_a_row_of_a_padded_batch_is_the_prompt_alone(rows: list[list[int]], seed: int) -> None:
    for name in ("llama", "qwen3_next", "mamba2", "gemma3_text", "rwkv7"):
        model = _cached(name)
        v = vector(seed)
        steer = {"layers.1": iv.add_vector(v, 2.0, at="last"), "layers.2.attn": iv.scale(0.5, at=0)}
        with model.trace(rows, interventions=steer) as batch:
            last, logits = batch.last("layers.3"), batch.activations["logits"].save()
        assert batch.lengths == [len(row) for row in rows]
        for i, row in enumerate(rows):
            with model.trace(row, interventions=steer) as alone:
                pass
            n = len(row)
            scale = mx.abs(alone.activations["layers.3"]).max().item()
            assert mx.abs(last[i] - alone.last("layers.3")[0]).max().item() <= 2e-5 * scale
            whole = batch.activations["layers.2.attn"][i, :n] - alone.activations["layers.2.attn"][0]
            assert mx.abs(whole).max().item() <= 2e-5 * max(scale, 1.0)
            assert mx.abs(logits[i, :n] - alone.activations["logits"][0]).max().item() <= 1e-4


_models: dict[str, InterpretableModel] = {}


def _cached(name: str) -> InterpretableModel:
    if name not in _models:
        _models[name] = InterpretableModel(tiny.build(name))
    return _models[name]


def test_rows_of_equal_shape_are_exact_whatever_the_other_rows_hold(llama: InterpretableModel) -> None:
    one, other = tiny.tokens(9, seed=1, rows=1), tiny.tokens(9, seed=2, rows=2)
    results = []
    for partner in (other[:1], other[1:]):
        with llama.trace(mx.concatenate([one, partner])) as trace:
            results.append(trace.activations["logits"][0])
    assert mx.array_equal(*results)


def test_per_row_strengths_in_a_batch(llama: InterpretableModel) -> None:
    rows = [PROMPT, PROMPT[:3], PROMPT[2:]]
    with llama.trace(rows, interventions={"layers.1": iv.add_vector(V, strength=[1.0, 0.0, -2.0])}) as batch:
        pass
    with llama.trace(rows) as plain:
        pass
    assert mx.array_equal(batch.activations["layers.1"][1], plain.activations["layers.1"][1])
    for i, strength in enumerate((1.0, 0.0, -2.0)):
        moved = batch.activations["layers.1"][i, : len(rows[i])] - plain.activations["layers.1"][i, : len(rows[i])]
        assert mx.allclose(moved, mx.broadcast_to(strength * V, moved.shape), atol=1e-5)
    with pytest.raises(ValueError, match="2 strengths for 3 rows"), llama.trace(
        rows, interventions={"layers.1": iv.add_vector(V, strength=[1.0, 2.0])}
    ):  # fmt: skip
        pass


def test_a_token_index_that_is_padding_in_some_row_is_refused(llama: InterpretableModel) -> None:
    with llama.trace([PROMPT, PROMPT[:3]]) as trace:
        for index in (-1, 5, slice(-2, None)):
            with pytest.raises(PositionError, match=r"7, 3 tokens"):
                trace.activations["layers.1"][:, index]
            with pytest.raises(PositionError, match="at='last'"):
                llama.layers[1].output[:, index] += V
        llama.layers[1].output[:, 1:] += V
        edited = llama.output.save()
    with llama.trace([PROMPT, PROMPT[:3]], interventions={"layers.1": iv.add_vector(V, at=slice(1, None))}):
        assert mx.array_equal(edited[0], llama.output[0])
        assert mx.array_equal(edited[1, :3], llama.output[1, :3])


def test_an_index_outside_an_activation_is_refused(llama: InterpretableModel) -> None:
    with llama.trace(PROMPT):
        with pytest.raises(IndexError, match=r"layers\.1\.self_attn\.heads has shape \(1, 7, 4, 16\): index 7"):
            llama.layers[1].attn.heads[:, :, 7] = 0.0
        with pytest.raises(IndexError, match="index 40 lies outside"):
            llama.layers[1].output[:, 40] += V
        with pytest.raises(ValueError, match=r"the value of shape \(8,\) doesn't fit"):
            llama.layers[1].output[:, -1] += mx.ones((8,))
        with pytest.raises(ValueError, match=r"doesn't fit layers\.1, of shape"):
            llama.layers[1].output[:, -1] = mx.ones((8,))
    with llama.edit() as edited:
        edited.layers[1].attn.heads[:, :, 7] = 0.0
    with pytest.raises(IndexError, match="index 7 lies outside"):
        edited.model(mx.array([PROMPT]))


def test_padding_is_marked(llama: InterpretableModel) -> None:
    with llama.trace([PROMPT, PROMPT[:3]]) as trace:
        pass
    assert trace.mask.tolist() == [[True] * 7, [True] * 3 + [False] * 4]
    assert trace.tokens.shape == (2, 7)


# -- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [None, 4])
def test_gradients_flow_to_a_steering_vector(bits: int | None) -> None:
    model = InterpretableModel(tiny.build("llama", bits=bits))
    mask = mx.array([[0.0] * 6 + [1.0]])[..., None]

    def through_intervention(v: mx.array) -> mx.array:
        with model.trace(PROMPT, interventions={"layers.1": iv.add_vector(v, 2.0, at="last")}):
            return model.output[0, -1].square().sum()

    def through_inline(v: mx.array) -> mx.array:
        with model.trace(PROMPT):
            model.layers[1].output[:, -1] += 2.0 * v
            return model.output[0, -1].square().sum()

    def by_hand_(v: mx.array) -> mx.array:
        with by_hand(model.model.layers[1], lambda h: h + 2.0 * v * mask):
            return model.model(mx.array([PROMPT]))[0, -1].square().sum()

    expected = mx.grad(by_hand_)(V)
    assert mx.abs(expected).max().item() > 1e-3
    scale = mx.abs(expected).max().item()
    assert mx.abs(mx.grad(through_intervention)(V) - expected).max().item() <= 1e-5 * scale
    assert mx.abs(mx.grad(through_inline)(V) - expected).max().item() <= 1e-5 * scale


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("generated", "every token of a trace"),
        (7, "behind the prompt, which has 7 tokens"),
        (-8, "before the prompt, which has 7 tokens"),
        ("everywhere", "the names are all, prompt"),
        (iv.after((1, 2, 3)), "no such tokens"),
        (iv.after("text"), "tokenizer"),
    ],
)
def test_positions_that_mean_nothing_are_refused(llama: InterpretableModel, at: Any, message: str) -> None:
    with pytest.raises(PositionError, match=message), llama.trace(
        PROMPT, interventions={"layers.1": iv.add_vector(V, at=at)}
    ):  # fmt: skip
        pass


def test_bad_values_are_refused_before_anything_is_computed(llama: InterpretableModel) -> None:
    with pytest.raises(ValueError, match=r"layers\.1: its vector has width 8, the activation has 64"):
        llama.trace(PROMPT, interventions={"layers.1": iv.add_vector(mx.ones((8,)))})
    with pytest.raises(ValueError, match="width 8"), llama.trace(
        PROMPT, interventions={"layers.1.mlp": iv.add_vector(mx.ones((8,)))}
    ):  # fmt: skip
        pass
    with pytest.raises(UnknownKey, match=r"layers\.2\.mlp"):
        llama.trace(PROMPT, interventions={"layers.2.mpl": iv.zero_out()})
    with pytest.raises(TypeError, match="dict from keys"):
        llama.trace(PROMPT, interventions=iv.zero_out())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not int"):
        llama.trace(PROMPT, interventions={"layers.2": 3})
    with pytest.raises(ValueError, match="empty dict"):
        llama.trace(PROMPT, interventions={})
    with pytest.raises(ValueError, match="keeps the shape"), llama.trace(
        PROMPT, interventions={"layers.2": lambda x: x[:, -1]}
    ):  # fmt: skip
        pass
    with pytest.raises(TypeError, match="returned NoneType"), llama.trace(
        PROMPT, interventions={"layers.2": lambda x: None}
    ):  # fmt: skip
        pass
