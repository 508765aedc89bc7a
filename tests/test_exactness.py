"""A trace is the bare model, bit for bit; an addition is the sum written by hand, on every family tried."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_lm.models.cache import make_prompt_cache
from tiny import by_hand, tokens

from mlxsteer import InterpretableModel, SteeringVector
from mlxsteer import interventions as iv

# MLX's CPU backend multiplies dense experts in float32 only: mixtures are tried in bfloat16 with quantized experts.
MIXTURES = ("mixtral", "gpt_oss", "qwen3_next")
VARIANTS = [
    pytest.param((name, dtype, bits), id=f"{name}-{label}")
    for name in tiny.FAMILIES
    for label, dtype, bits in (
        ("float32", mx.float32, None),
        ("bfloat16", mx.bfloat16, 4 if name in MIXTURES else None),
        ("4bit", mx.float32, 4),
    )
]


@pytest.fixture(params=VARIANTS, scope="module")
def built(request: pytest.FixtureRequest) -> tuple[InterpretableModel, mx.array, mx.array]:
    """A wrapped tiny model, a prompt, and the bare model's logits on it."""
    name, dtype, bits = request.param
    bare = tiny.build(name, dtype, bits=bits)
    prompt = tokens(11)
    logits = bare(prompt)
    mx.eval(logits)
    return InterpretableModel(bare), prompt, logits


def ids(prompt: mx.array) -> list[int]:
    return np.array(prompt)[0].tolist()


def vector(seed: int = 5) -> mx.array:
    mx.random.seed(seed)
    return mx.random.normal((64,))


def test_a_trace_without_interventions_is_the_bare_model(built: tuple[InterpretableModel, mx.array, mx.array]) -> None:
    model, prompt, bare = built
    with model.trace(ids(prompt)) as trace:
        logits = model.output.save()
    assert logits.dtype == bare.dtype
    assert mx.array_equal(logits, bare)
    assert mx.array_equal(trace.activations["logits"], bare)


def test_a_trace_that_captures_everything_is_the_bare_model(
    built: tuple[InterpretableModel, mx.array, mx.array],
) -> None:
    model, prompt, bare = built
    with model.trace(ids(prompt)) as trace:
        values = {key: trace.activations[key] for key in model.sites("layers.*")}
        for key in list(trace.activations)[::7]:
            values[key] = trace.activations[key]
        logits = model.output.save()
    assert mx.array_equal(logits, bare)
    for key in model.sites("layers.*"):
        assert values[key].dtype == bare.dtype
        assert values[key].shape == (1, 11, 64)


def test_strength_zero_is_the_bare_model(built: tuple[InterpretableModel, mx.array, mx.array]) -> None:
    model, prompt, bare = built
    everything = {
        "layers.*": [iv.add_vector(vector(), 0.0), iv.ablate(vector(), strength=0.0), iv.noise(1.0, strength=0.0)],
        "layers.0": iv.scale(3.0, strength=0.0) | iv.zero_out(strength=0),
        "layers.1": iv.mean_replace(vector(), strength=0.0) | iv.clamp(-1, 1, strength=0.0),
    }
    with model.trace(ids(prompt), interventions=everything):
        logits = model.output.save()
    assert mx.array_equal(logits, bare)


@pytest.mark.parametrize("layer", range(4))
def test_adding_a_vector_is_the_sum_written_by_hand(
    built: tuple[InterpretableModel, mx.array, mx.array], layer: int
) -> None:
    model, prompt, bare = built
    v = vector()
    with model.trace(ids(prompt), interventions={f"layers.{layer}": iv.add_vector(v, 2.0)}) as trace:
        steered = model.output.save()
    with by_hand(model.model.layers[layer], lambda h: h + (2.0 * v).astype(h.dtype)):
        expected = model.model(prompt)
    assert mx.array_equal(steered, expected)
    assert not mx.array_equal(steered, bare)
    assert steered.dtype == bare.dtype
    assert all(trace.activations[f"layers.{i}"].dtype == bare.dtype for i in range(4))


def test_adding_at_every_layer_at_once_is_the_sums_written_by_hand(
    built: tuple[InterpretableModel, mx.array, mx.array],
) -> None:
    model, prompt, _ = built
    steering = SteeringVector({i: vector(i) for i in range(4)})
    with model.trace(ids(prompt), interventions=steering.at(range(4), 0.5)):
        steered = model.output.save()
    cls = type(model.model.layers[0])
    hands = [by_hand(block, lambda h, i=i: h + (0.5 * vector(i)).astype(h.dtype)) for i, block in
             enumerate(model.model.layers)]  # fmt: skip
    for hand in hands:
        hand.__enter__()
    expected = model.model(prompt)
    for hand in reversed(hands):
        hand.__exit__(None, None, None)
    assert type(model.model.layers[0]) is cls
    assert mx.array_equal(steered, expected)


def test_the_cache_keeps_the_bare_models_dtype(built: tuple[InterpretableModel, mx.array, mx.array]) -> None:
    model, prompt, bare = built
    caches = []
    for steered in (False, True):
        cache = make_prompt_cache(model.model)
        if steered:
            with model.steer({"layers.1": iv.add_vector(vector())}):
                logits = model.model(prompt, cache=cache)
        else:
            logits = model.model(prompt, cache=cache)
        assert logits.dtype == bare.dtype
        caches.append([x.dtype for c in cache for x in _arrays(c.state)])
    assert caches[0] == caches[1]


def _arrays(state: object) -> list[mx.array]:
    if isinstance(state, mx.array):
        return [state]
    return [x for part in state for x in _arrays(part)] if isinstance(state, (list, tuple)) else []


def test_an_inline_edit_is_the_intervention(built: tuple[InterpretableModel, mx.array, mx.array]) -> None:
    model, prompt, bare = built
    v, w = vector(), vector(6)
    with model.trace(ids(prompt), interventions={
        "layers.1": iv.add_vector(v, 2.0, at="last"), "layers.2.mlp" if "layers.2.mlp" in _roles(model) else
        "layers.2.attn": iv.add_vector(w, 1.5), "layers.3": iv.scale(0.5),
    }):  # fmt: skip
        expected = model.output.save()
    with model.trace(ids(prompt)):
        model.layers[1].output[:, -1, :] += 2.0 * v
        part = model.layers[2].mlp if "layers.2.mlp" in _roles(model) else model.layers[2].attn
        part.output += 1.5 * w
        model.layers[3].output *= 0.5
        edited = model.output.save()
    assert mx.array_equal(edited, expected)
    assert not mx.array_equal(edited, bare)


def _roles(model: InterpretableModel) -> list[str]:
    return [] if "mamba" in model.name else ["layers.2.mlp"]
