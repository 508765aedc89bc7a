"""The logit lens against the final norm and head written out in NumPy, from the weights."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
from sklearn.metrics import roc_auc_score
from test_extraction import ids, streams, tokenizer

from mlxsteer import InterpretableModel, SteeringVector, datasets, extract
from mlxsteer import interventions as iv
from mlxsteer.lens import Lens, LensTokens
from mlxsteer.pairs import in_split

STATES = np.random.default_rng(5).normal(size=(3, 64)) * [[1], [30], [0.01]]


def matrix(module: Any) -> np.ndarray:
    """A weight in float64, dequantized where it is quantized."""
    weight = module.weight
    if "scales" in module:
        weight = mx.dequantize(weight, module.scales, module.biases, group_size=module.group_size, bits=module.bits)
    return np.array(weight.astype(mx.float32), np.float64)


def rms_norm(x: np.ndarray, weight: mx.array, eps: float = 1e-5) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * np.array(weight, np.float64)


def layer_norm(x: np.ndarray, weight: mx.array, bias: mx.array, eps: float = 1e-5) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return scaled * np.array(weight, np.float64) + np.array(bias, np.float64)


def by_hand(model: Any, x: np.ndarray) -> np.ndarray:
    """``head(norm(x))`` of a llama, mamba2, gpt2 or gemma2."""
    x = np.asarray(x, np.float64)
    if model.model_type == "gpt2":
        inner = model.model
        return layer_norm(x, inner.ln_f.weight, inner.ln_f.bias) @ matrix(inner.wte).T
    if model.model_type == "gemma2":
        logits = rms_norm(x, 1 + model.model.norm.weight) @ matrix(model.model.embed_tokens).T
        return np.tanh(logits / 30) * 30
    if model.model_type == "mamba2":
        return rms_norm(x, model.backbone.norm_f.weight) @ matrix(model.lm_head).T
    head = model.model.embed_tokens if model.args.tie_word_embeddings else model.lm_head
    return rms_norm(x, model.model.norm.weight) @ matrix(head).T


MODELS: dict[str, dict[str, Any]] = {
    "untied": {"name": "llama"},
    "tied": {"name": "llama", "tie_word_embeddings": True},
    "untied, 4-bit": {"name": "llama", "bits": 4},
    "tied, 4-bit": {"name": "llama", "tie_word_embeddings": True, "bits": 4},
    "layer norm with bias": {"name": "gpt2"},
    "softcap": {"name": "gemma2"},
    "state space": {"name": "mamba2"},
}


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def model(request: pytest.FixtureRequest) -> InterpretableModel:
    return InterpretableModel(tiny.build(**request.param), tokenizer())


@pytest.fixture(scope="module")
def llama() -> InterpretableModel:
    return InterpretableModel(tiny.build("llama"), tokenizer())


def test_logits_are_the_head_of_the_norm(model: InterpretableModel) -> None:
    expected = by_hand(model.model, STATES)
    found = np.array(model.lens.logits(STATES))
    assert found.shape == (3, tiny.VOCABULARY)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    assert np.abs(expected[0] - expected[1]).max() > 0.1


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_last_blocks_own_activation_gives_the_models_own_logits(family: str) -> None:
    wrapped = InterpretableModel(tiny.build(family), tokenizer())
    tokens = ids("a good day")
    last = streams(wrapped, tokens)[-1]
    own = np.array(wrapped.model(mx.array([tokens]))[0])
    np.testing.assert_allclose(np.array(wrapped.lens.logits(last)), own, atol=1e-5 * np.abs(own).max())
    np.testing.assert_allclose(np.array(wrapped.lens.logits(last[4])), own[4], atol=1e-4 * np.abs(own).max())


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_states_are_looked_at_in_the_models_own_precision(dtype: mx.Dtype) -> None:
    wrapped = InterpretableModel(tiny.build("llama", dtype), tokenizer())
    with wrapped.trace("a good day") as trace:
        pass
    logits = wrapped.lens.logits(trace.activations["layers.3"])
    assert logits.dtype == dtype
    assert mx.array_equal(logits, trace.activations["logits"])


def test_states_of_any_leading_shape(llama: InterpretableModel) -> None:
    whole = np.random.default_rng(0).normal(size=(2, 3, 64))
    found = llama.lens.logits(mx.array(whole))
    assert found.shape == (2, 3, 96)
    for x, expected in ((whole[1], found[1]), (whole[1, 2], found[1, 2]), (whole[1, 2].tolist(), found[1, 2])):
        np.testing.assert_allclose(np.array(llama.lens.logits(x)), np.array(expected), atol=1e-5)


def test_every_layer_of_a_trace_can_be_looked_at(llama: InterpretableModel) -> None:
    h = streams(llama, ids("the food"))
    expected = by_hand(llama.model, h[1, -1])
    with llama.trace("the food") as trace:
        pass
    found = np.array(llama.lens.logits(trace.activations["layers.1"][0, -1]))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert int(found.argmax()) == int(expected.argmax())


def shift(model: Any, v: np.ndarray) -> np.ndarray:
    return by_hand(model, v) - by_hand(model, np.zeros_like(v))


@pytest.mark.parametrize("k", [1, 5, 96])
def test_tokens_are_those_whose_logits_move_most(model: InterpretableModel, k: int) -> None:
    v = STATES[0]
    expected = shift(model.model, v)
    found = model.lens.tokens(mx.array(v), k)
    size = np.abs(expected).max()
    for told, ordered in ((found.boosted, np.argsort(-expected)), (found.suppressed, np.argsort(expected))):
        assert len(told) == k
        np.testing.assert_allclose([logit for _, logit in told], expected[ordered[:k]], atol=1e-4 * size)
        assert told[0][0] == model.token_to_str(int(ordered[0]))
    if k == 96:
        assert found.boosted == found.suppressed[::-1]


def test_the_opposite_direction_says_the_opposite_and_length_says_nothing(llama: InterpretableModel) -> None:
    v = mx.array(STATES[0])
    there, back, long = llama.lens.tokens(v, 3), llama.lens.tokens(-v, 3), llama.lens.tokens(1000 * v, 3)
    assert [t for t, _ in there.boosted] == [t for t, _ in back.suppressed] == [t for t, _ in long.boosted]
    for a, b in ((there.boosted, back.suppressed), (there.suppressed, back.boosted)):
        np.testing.assert_allclose([x for _, x in a], [-x for _, x in b], rtol=1e-4)
    np.testing.assert_allclose([x for _, x in long.boosted], [x for _, x in there.boosted], rtol=1e-3)


def test_tokens_without_a_tokenizer_are_numbers_and_the_lists_print(llama: InterpretableModel) -> None:
    expected = shift(llama.model, STATES[0])
    told = InterpretableModel(llama.model).lens.tokens(STATES[0], k=np.int64(2))
    assert [token for token, _ in told.boosted] == [str(i) for i in np.argsort(-expected)[:2]]
    assert str(LensTokens(((" good", 1.5), ("a'", 0.25)), ((" bad", -2.0),))) == (
        "boosted: ' good' +1.50, \"a'\" +0.25\nsuppressed: ' bad' -2.00"
    )
    assert repr(llama.lens).startswith("<the logit lens of InterpretableModel('llama'")


REFUSED: dict[str, tuple[Any, str]] = {
    "width": (lambda lens: lens.logits(mx.ones(65)), r"states have shape \(65,\); the residual stream is of width 64"),
    "width of a direction": (lambda lens: lens.tokens(mx.ones(32)), "of width 64"),
    "nan": (lambda lens: lens.logits([float("nan")] * 64), "the states holds 64 NaN"),
    "empty": (lambda lens: lens.logits(mx.zeros((0, 64))), "one or more dimensions"),
    "two directions": (lambda lens: lens.tokens(mx.ones((2, 64))), r"one direction has shape \(D,\), not \(2, 64\)"),
    "zero": (lambda lens: lens.tokens(mx.zeros(64)), "the direction is zero"),
    "infinite": (lambda lens: lens.tokens([float("inf")] * 64), "the direction holds 64 NaN or infinite"),
    "none of them": (lambda lens: lens.tokens(mx.ones(64), 0), "k is a number of tokens from 1 to 96, not 0"),
    "too many": (lambda lens: lens.tokens(mx.ones(64), 97), "from 1 to 96, not 97"),
    "a truth": (lambda lens: lens.tokens(mx.ones(64), True), "from 1 to 96, not True"),
}


@pytest.mark.parametrize(("look", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_can_not_be_looked_at_is_refused(llama: InterpretableModel, look: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        look(llama.lens)


def test_a_whole_vector_is_no_direction(llama: InterpretableModel) -> None:
    vector = SteeringVector({1: mx.ones(64), 2: mx.ones(64)})
    for look in (llama.lens.tokens, llama.lens.logits):
        with pytest.raises(TypeError, match=r"has several layers, .*vector\[layer\]"):
            look(vector)


def test_steering_around_the_lens_does_not_reach_into_it_and_the_model_stays_as_it_was(
    llama: InterpretableModel,
) -> None:
    before, plain = tiny.classes(llama.model), np.array(llama.lens.logits(STATES))
    push = {"layers.1": iv.add_vector(50 * mx.ones(64)), "layers.3": iv.add_vector(50 * mx.ones(64))}
    with llama.steer(push):
        np.testing.assert_array_equal(np.array(llama.lens.logits(STATES)), plain)
        steered = llama.model(mx.array([[1, 2, 3]]))
    assert tiny.classes(llama.model) == before
    assert not mx.allclose(steered, llama.model(mx.array([[1, 2, 3]])))
    np.testing.assert_array_equal(np.array(Lens(llama.edit(push)).logits(STATES)), plain)


def test_the_lens_runs_inside_a_trace_of_the_same_model(llama: InterpretableModel) -> None:
    plain = np.array(llama.lens.logits(STATES))
    with llama.trace("a good day") as trace:
        inside = np.array(llama.lens.logits(STATES))
    np.testing.assert_array_equal(inside, plain)
    assert trace.activations["layers.3"].shape == (1, 11, 64)


def test_the_bundled_sentiment_vector_speaks_for_words_of_its_side(pocket: InterpretableModel) -> None:
    pairs = datasets.load("pocket/sentiment")
    vector = extract(pocket, in_split(pairs, "train")[:10])
    encode = pocket.tokenizer.encode
    words: dict[int, bool] = {}
    for pair in in_split(pairs, "report"):  # other words than those it was made from, too
        for side, good in ((pair.positive, True), (pair.negative, False)):
            first, *rest = encode(side.split(".")[0], add_special_tokens=False)
            if not rest:
                words[first] = good
    assert min(sum(words.values()), len(words) - sum(words.values())) >= 10
    zero = pocket.lens.logits(mx.zeros(256))
    for layer in (4, 5, 6):
        shifts = np.array(pocket.lens.logits(vector[layer]) - zero)
        assert roc_auc_score(list(words.values()), [shifts[token] for token in words]) > 0.75
    told = pocket.lens.tokens(vector[5], 25)
    good = {" enjoyed", " praised", " admired", " better", " happier", " loved", " smiled", " great", " wonderful"}
    bad = {" hated", " despised", " loathed", " resented", " regretted", " dreadful", " unhappy", " awful", " terrible"}
    assert len(good & {token for token, _ in told.boosted}) >= 2
    assert len(bad & {token for token, _ in told.suppressed}) >= 2
    assert not bad & {token for token, _ in told.boosted}
    assert not good & {token for token, _ in told.suppressed}


def test_only_the_direction_counts_at_any_length(llama: InterpretableModel) -> None:
    v = mx.array(STATES[0])
    plain = llama.lens.tokens(v, 96)
    for factor in (1e-30, 1e-3, 1e30):
        for a, b in zip(plain.boosted, llama.lens.tokens(factor * v, 96).boosted, strict=True):
            assert a[0] == b[0]
            assert a[1] == pytest.approx(b[1], abs=1e-4)


def test_a_long_direction_fits_into_half_precision() -> None:
    wrapped = InterpretableModel(tiny.build("llama", mx.float16), tokenizer())
    short, long = (wrapped.lens.tokens(factor * mx.array(STATES[0])) for factor in (1, 3e4))
    assert short.boosted[0][0] == long.boosted[0][0]
    assert np.isfinite([logit for _, logit in long.boosted + long.suppressed]).all()


def test_logits_that_are_nan_are_refused() -> None:
    made = tiny.build("llama")
    made.model.norm.weight = made.model.norm.weight * float("nan")
    with pytest.raises(ValueError, match="lens: 192 of the logits are NaN or infinite"):
        InterpretableModel(made, tokenizer()).lens.tokens(STATES[0])


@pytest.mark.parametrize("k", [2.5, None, "3", np.float64(2)], ids=repr)
def test_a_number_of_tokens_is_whole(llama: InterpretableModel, k: Any) -> None:
    with pytest.raises(ValueError, match="k is a number of tokens from 1 to 96, not "):
        llama.lens.tokens(mx.ones(64), k)
