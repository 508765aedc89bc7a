"""Divergence, preference and likelihood against plain forwards, changed by hand, and NumPy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr  # type: ignore[import-untyped]
from test_extraction import ids, tokenizer

from mlxsteer import ContrastPair, InterpretableModel, UnknownKey, after, datasets, lens
from mlxsteer import interventions as iv
from mlxsteer.continuation import Continuation
from mlxsteer.generation import Generation
from mlxsteer.measures import Divergence, Preferences, Reference, kl, perplexity, preference_shift
from mlxsteer.measures.divergence import edits_of, log_likelihood
from mlxsteer.measures.effect import rank_correlation
from mlxsteer.pairs import in_split
from mlxsteer.positions import Position
from mlxsteer.reading import Text, encode_side

PROMPTS = ["the food was", "a", "we go."]
TOKENS = 3
SOME = ["llama", "gemma2", "gemma3_text", "gpt2", "mamba2", "qwen3_next", "gemma4_text", "rwkv7"]
FEW = ["llama", "gemma2", "qwen3_next", "gemma4_text"]
_RNG = np.random.default_rng(5)
V, W = (mx.array(_RNG.standard_normal(64).astype(np.float32)) for _ in range(2))
WIDE = mx.array(_RNG.standard_normal(128).astype(np.float32))
UNIT = W / mx.linalg.norm(W)


@functools.cache
def tiny_model(family: str, bits: int | None = None) -> InterpretableModel:
    return InterpretableModel(tiny.build(family, bits=bits), tokenizer())


@pytest.fixture(autouse=True, scope="module")
def _forget() -> Iterator[None]:
    yield
    for cached in (tiny_model, bare, continued):
        cached.cache_clear()


@pytest.fixture
def llama() -> InterpretableModel:
    return tiny_model("llama")


# -- the plain way -----------------------------------------------------------------------------------------------------


@dataclass
class Edit:
    """One intervention, and the same by hand: which module, input or output, what becomes of it, which tokens."""

    key: str
    intervention: Any
    module: Callable[[Any], nn.Module]
    change: Callable[[mx.array], mx.array]
    at: Callable[[int, int], Sequence[int]]
    enters: bool = False


def everywhere(_: int, length: int) -> Sequence[int]:
    return range(length)


def at_last(prompt: int, _: int) -> Sequence[int]:
    return [prompt - 1]


def from_last(prompt: int, length: int) -> Sequence[int]:
    return range(prompt - 1, length)


def generated(prompt: int, length: int) -> Sequence[int]:
    return range(prompt, length)


PLACES: list[tuple[Any, Callable[[int, int], Sequence[int]]]] = [
    ("all", everywhere), (-1, at_last), ("last", from_last), ("generated", generated),
]  # fmt: skip


@contextmanager
def changed(module: nn.Module, change: Callable[[mx.array], mx.array], enters: bool) -> Iterator[None]:
    """What a module takes or gives, changed by a subclass written on the spot."""
    if not enters:
        with tiny.by_hand(module, change):
            yield
        return
    cls: Any = type(module)

    class Changed(cls):
        def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(change(x), *args, **kwargs)

    module.__class__ = Changed
    try:
        yield
    finally:
        module.__class__ = cls


def log_softmax(logits: mx.array) -> np.ndarray:
    x = np.array(logits.astype(mx.float32), np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@functools.cache
def bare(model: InterpretableModel, tokens: tuple[int, ...]) -> np.ndarray:
    return log_softmax(model.model(mx.array([list(tokens)]))[0])


def run(model: InterpretableModel, tokens: Sequence[int], prompt: int, edits: Sequence[Edit] = ()) -> np.ndarray:
    """Log-probabilities of a plain forward of one text, (tokens, vocabulary) in float64."""
    if not edits:
        return bare(model, tuple(tokens))
    with ExitStack() as stack:
        for edit in reversed(edits):  # what is entered last changes last
            mask = np.zeros((1, len(tokens), 1), bool)
            mask[0, [p for p in edit.at(prompt, len(tokens)) if p < len(tokens)]] = True

            def change(x: mx.array, edit: Edit = edit, mask: np.ndarray = mask) -> mx.array:
                return mx.where(mx.array(mask), edit.change(x).astype(x.dtype), x)

            stack.enter_context(changed(edit.module(model.model), change, edit.enters))
        return log_softmax(model.model(mx.array([list(tokens)]))[0])


@functools.cache
def continued(model: InterpretableModel, prompt: tuple[int, ...], count: int) -> list[int]:
    """Greedy, the whole text anew for every token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(run(model, tokens, len(prompt))[-1].argmax()))
    return tokens


def plain_kl(
    model: InterpretableModel, prompts: Sequence[Sequence[int]], edits: Sequence[Edit], count: int = TOKENS
) -> np.ndarray:
    """KL(base ‖ steered) token by token, by NumPy, in the order of the prompts."""
    found = []
    for prompt in prompts:
        tokens = continued(model, tuple(prompt), count)
        base, steered = run(model, tokens, len(prompt)), run(model, tokens, len(prompt), edits)
        each = (np.exp(base) * (base - steered)).sum(-1)
        found += list(each[(len(prompt) - 1 if count else 0) : len(tokens) - 1])
    return np.array(found)


def same(found: np.ndarray, expected: np.ndarray, within: float = 3e-6) -> None:
    """Equal as a bag: batches put texts of similar length together."""
    assert found.shape == expected.shape
    np.testing.assert_allclose(np.sort(found), np.sort(expected), rtol=1e-3, atol=within)


def per_token(model: InterpretableModel, edits: Sequence[Edit], prompts: Any = PROMPTS, **options: Any) -> np.ndarray:
    made = edits_of(model, {edit.key: edit.intervention for edit in edits})
    at = [part.at for _, one in made for part in one.parts()]
    return Reference(model, prompts, at=at, **{"tokens": TOKENS, **options}).per_token(made)


def block(i: int) -> Callable[[Any], nn.Module]:
    return lambda model: model.layers[i]


def add(layer: int, at: Any, where: Callable[[int, int], Sequence[int]], strength: float = 1.5) -> Edit:
    return Edit(f"layers.{layer}", iv.add_vector(V, strength, at=at), block(layer), lambda x: x + strength * V, where)


# -- KL ----------------------------------------------------------------------------------------------------------------


CASES = [(family, at, where) for family in [*SOME, "llama 4-bit"] for at, where in PLACES
         if family in ("llama", "gemma2") or at == -1 or (at == "all" and family != "rwkv7")]  # fmt: skip


@pytest.mark.parametrize(("family", "at", "where"), CASES, ids=[f"{family} {at}" for family, at, _ in CASES])
def test_divergence_is_that_of_two_plain_forwards(family: str, at: Any, where: Any) -> None:
    model = tiny_model(family.split(maxsplit=1)[0], 4 if "4-bit" in family else None)
    edits = [add(1, at, where)]
    expected = plain_kl(model, [ids(p) for p in PROMPTS], edits)
    found = per_token(model, edits)
    same(found, expected)
    assert expected.max() > 1e-3
    summary = kl(model, {"layers.1": edits[0].intervention}, PROMPTS, tokens=TOKENS)
    assert summary.tokens == len(expected) == TOKENS * len(PROMPTS)
    told = (summary.mean, summary.p50, summary.p95, summary.largest)
    wanted = (expected.mean(), np.median(expected), np.quantile(expected, 0.95), expected.max())
    assert told == pytest.approx(wanted, rel=1e-3, abs=3e-6)


def ablated(x: mx.array) -> mx.array:
    return x - mx.sum(x * UNIT, axis=-1, keepdims=True) * UNIT


def kept_low(x: mx.array) -> mx.array:
    along = mx.sum(x * UNIT, axis=-1, keepdims=True)
    return x + (mx.minimum(along, -2.0) - along) * UNIT


EDITS: dict[str, list[Edit]] = {
    "two blocks, two places": [add(0, -1, at_last), add(2, "all", everywhere, -0.8)],
    "the later one first": [add(3, "generated", generated), add(1, "last", from_last)],
    "a block and inside the same": [
        Edit("layers.2.mlp", iv.add_vector(V, 2.0), lambda m: m.layers[2].mlp, lambda x: x + 2 * V, everywhere),
        add(2, -1, at_last),
    ],
    "inside a block and a lower block": [
        Edit("layers.3.attn", iv.scale(-1.0, at="last"), lambda m: m.layers[3].self_attn, lambda x: -x, from_last),
        add(1, -1, at_last),
    ],
    "into a projection": [
        Edit("layers.1.mlp.down_proj.input", iv.add_vector(WIDE, at=-1), lambda m: m.layers[1].mlp.down_proj,
             lambda x: x + WIDE, at_last, True),
    ],
    "into a block": [Edit("layers.2.input", iv.add_vector(V, at=-1), block(2), lambda x: x + V, at_last, True)],
    "into and out of a block": [
        Edit("layers.2.input", iv.add_vector(V), block(2), lambda x: x + V, everywhere, True),
        Edit("layers.2", iv.scale(0.5, at=-1), block(2), lambda x: x * 0.5, at_last),
    ],
    "before the blocks": [Edit("embed", iv.add_vector(V), lambda m: m.model.embed_tokens, lambda x: x + V, everywhere)],
    "behind the blocks": [
        Edit("norm", iv.add_vector(V, at="last"), lambda m: m.model.norm, lambda x: x + V, from_last)],
    "the logits": [Edit("logits", iv.scale(0.5), lambda m: m.lm_head, lambda x: x * 0.5, everywhere)],
    "before, in and behind": [
        Edit("embed", iv.add_vector(V, 0.5, at=-1), lambda m: m.model.embed_tokens, lambda x: x + 0.5 * V, at_last),
        add(2, "generated", generated),
        Edit("norm", iv.scale(1.3), lambda m: m.model.norm, lambda x: x * 1.3, everywhere),
    ],
    "ablate": [Edit("layers.1", iv.ablate(W), block(1), ablated, everywhere)],
    "clamp": [Edit("layers.2", iv.clamp(high=-2.0, along=W, at="last"), block(2), kept_low, from_last)],
    "scale": [Edit("layers.0.mlp", iv.scale(3.0), lambda m: m.layers[0].mlp, lambda x: 3 * x, everywhere)],
    "a plain function": [Edit("layers.1", mx.tanh, block(1), mx.tanh, everywhere)],
    "one after the other": [
        Edit("layers.1", [iv.scale(2.0, at=-1), iv.add_vector(V, at=-1)], block(1), lambda x: 2 * x + V, at_last)],
    "a slice": [Edit("layers.1", iv.add_vector(V, at=slice(1, 3)), block(1), lambda x: x + V,
                     lambda prompt, length: range(1, 3))],
    "a callable": [Edit("layers.1", iv.add_vector(V, at=lambda tokens: [len(tokens) // 2]), block(1), lambda x: x + V,
                        lambda prompt, length: [prompt // 2])],
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_divergence_of_edits_of_all_kinds_and_places(llama: InterpretableModel, name: str) -> None:
    edits = EDITS[name]
    steering = {edit.key: edit.intervention for edit in edits}
    expected = plain_kl(llama, [ids(p) for p in PROMPTS], edits)
    assert expected.max() > 1e-3
    summary = kl(llama, steering, PROMPTS, tokens=TOKENS)
    assert (summary.mean, summary.largest) == pytest.approx((expected.mean(), expected.max()), rel=1e-3, abs=3e-6)
    for plain in {True, all(edit.key.startswith("layers") for edit in edits) is False}:
        same(per_token(llama, edits, plain=plain), expected)


def test_divergence_on_the_tokens_of_the_prompts_themselves(llama: InterpretableModel) -> None:
    for edits in ([add(1, "all", everywhere)], [add(1, 1, lambda *_: [1])], EDITS["before, in and behind"]):
        plain = edits is EDITS["before, in and behind"]
        expected = plain_kl(llama, [ids(p) for p in PROMPTS], edits, 0)
        assert len(expected) == sum(len(p) for p in PROMPTS)  # BOS for the first letter
        same(per_token(llama, edits, tokens=0, plain=plain), expected)
    with pytest.raises(ValueError, match="of one token each"):
        Reference(llama, [[3], [4]], tokens=0)


def test_prompts_are_texts_or_token_ids_or_chats(llama: InterpretableModel, pocket: InterpretableModel) -> None:
    edits = [add(1, -1, at_last)]
    whole = per_token(llama, edits)
    np.testing.assert_array_equal(per_token(llama, edits, [ids(p) for p in PROMPTS]), whole)
    direction = mx.array(np.random.default_rng(1).standard_normal(256).astype(np.float32))
    asked = ["Hello!", "Go."]
    said = [pocket.encode([{"role": "user", "content": text}]) for text in asked]
    steering = [Edit("layers.4", iv.add_vector(direction, 8.0, at="last"), block(4), lambda x: x + 8.0 * direction,
                     from_last)]  # fmt: skip
    expected = plain_kl(pocket, said, steering, 2)
    assert expected.max() > 0.01
    same(per_token(pocket, steering, asked, tokens=2, chat=True), expected, 1e-4)
    chats = [[{"role": "user", "content": text}] for text in asked]
    same(per_token(pocket, steering, chats, tokens=2), expected, 1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_results_do_not_depend_on_batches(family: str) -> None:
    model = tiny_model(family)
    for edits in ([add(1, -1, at_last)], [add(2, "all", everywhere), add(1, "generated", generated)]):
        whole = per_token(model, edits)
        for budget in (1, 25):
            same(per_token(model, edits, batch_tokens=budget), whole)
    assert Reference(model, PROMPTS, tokens=2, batch_tokens=25).texts == Reference(model, PROMPTS, tokens=2).texts


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma4_text"])
def test_no_strength_is_no_divergence(family: str) -> None:
    model = tiny_model(family)
    for at in (-1, "all"):
        reference = Reference(model, PROMPTS, tokens=TOKENS, at=at)
        nothing = reference.divergence({"layers.1": iv.add_vector(V, 3.0, at=at)}, 0.0)
        assert (nothing.mean, nothing.largest) == (0.0, 0.0)
        assert kl(model, {"layers.1": iv.add_vector(V, 0.0, at=at)}, PROMPTS, tokens=TOKENS).largest == 0.0


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_next"])
def test_doses_are_the_single_runs(family: str) -> None:
    model = tiny_model(family)
    for at, variants in ((-1, 3), ("all", 1)):
        reference = Reference(model, PROMPTS, tokens=TOKENS, at=at, variants=variants)
        site = model._sites.resolve("layers.1")

        def make(rows: list[float], site: Any = site, at: Any = at) -> Any:
            return [(site, iv.add_vector(V, rows, at=at))]

        found = reference.dose(make, [-1.0, 0.0, 2.0])
        assert found.shape == (3, TOKENS * len(PROMPTS))
        assert np.abs(found[1]).max() <= 1e-6
        for row, strength in zip(found, (-1.0, 0.0, 2.0), strict=True):
            single = reference.per_token([(site, iv.add_vector(V, strength, at=at))])
            np.testing.assert_allclose(row, single, rtol=1e-3, atol=3e-6)
        halved = reference.divergence({"layers.1": iv.add_vector(V, 4.0, at=at)}, 0.5)
        assert halved.mean == pytest.approx(found[2].mean(), rel=1e-3)


@contextmanager
def counted(model: InterpretableModel) -> Iterator[list[int]]:
    """Tokens that each block really ran on; the head alone, which is staged through all blocks, is not counted."""
    seen = [0] * len(model.layers)
    with ExitStack() as stack:
        for i, module in enumerate(model.model.layers):
            cls: Any = type(module)

            def call(self: Any, x: mx.array, *args: Any, i: int = i, cls: Any = cls, **kwargs: Any) -> Any:
                seen[i] += x.shape[0] * x.shape[1]
                return cls.__call__(self, x, *args, **kwargs)

            module.__class__ = type(cls.__name__, (cls,), {"__call__": call})
            stack.callback(setattr, module, "__class__", cls)
        patch = pytest.MonkeyPatch()
        stack.callback(patch.undo)
        head = lens.through_head

        def alone(*args: Any) -> mx.array:
            before = list(seen)
            logits = head(*args)
            seen[:] = before
            return logits

        patch.setattr("mlxsteer.continuation.through_head", alone)
        yield seen


def test_the_clean_prefix_runs_once_and_so_do_the_blocks_below(llama: InterpretableModel) -> None:
    """By hand: prompts of 13, 9 and 9 tokens with 4 more, of which the last isn't run."""
    prompts = ["the food was", "rain now", "we agree"]
    with counted(llama) as seen:
        Reference(llama, prompts, tokens=0, at=-2)
        assert seen[0] == 3 * 12  # the last token predicts nothing that is measured
    clean = Reference(llama, prompts, tokens=4, at=-1)
    with counted(llama) as seen:
        built = Reference(llama, prompts, tokens=4, at=-1)
        generation = list(seen)
        assert len(set(generation)) == 1
        seen[:] = [0] * 4
        built.per_token([(llama._sites.resolve("layers.2"), iv.add_vector(V, at=-1))])
        # Each row goes on from its own prompt's last token for 4: the long one in a batch of its own.
        assert seen == [0, 0, 0, 3 * 4]
        seen[:] = [0] * 4
        built.per_token([(llama._sites.resolve("layers.1.mlp"), iv.add_vector(V, at=-1))])
        assert seen == [0, 3 * 4, 3 * 4, 3 * 4]
        assert built.block_tokens - clean.block_tokens == 3 * 4 + 3 * 3 * 4
        seen[:] = [0] * 4
        built.dose(lambda rows: [(llama._sites.resolve("layers.0"), iv.add_vector(V, rows, at=-1))], [1.0, 2.0])
        assert seen == [0, *[2 * 3 * 4] * 3]
    assert clean.block_tokens == 4 * (2 * 8 + 12 + 3 * 4)  # the prefix and what follows, one clean pass
    plain = Reference(llama, prompts, tokens=4, at=-1, plain=True)
    assert plain.block_tokens == 4 * 3 * 16


def test_edits_that_a_pass_was_not_made_for_are_refused(llama: InterpretableModel) -> None:
    reference = Reference(llama, PROMPTS, tokens=2, at=-1)
    with pytest.raises(ValueError, match=r"layers\.2: at='all' touches tokens before"):
        reference.divergence({"layers.2": iv.add_vector(V)})
    reference.divergence({"layers.2": iv.add_vector(V, at="generated")})
    for steering in ({"embed": iv.add_vector(V), "layers.2": iv.add_vector(V, 0.1)}, {"norm": iv.add_vector(V)}):
        with pytest.raises(ValueError, match="lies before the blocks or behind them"):
            Reference(llama, PROMPTS, tokens=2).divergence(steering)


def test_what_can_not_be_measured_is_refused(llama: InterpretableModel) -> None:
    steering = {"layers.1": iv.add_vector(V)}
    with pytest.raises(ValueError, match="no neutral prompts"):
        kl(llama, steering, [])
    with pytest.raises(TypeError, match=r"one prompt is \[prompt\]"):
        kl(llama, steering, "the food")
    with pytest.raises(UnknownKey, match="layers"):
        kl(llama, {"layers.9": iv.add_vector(V)}, PROMPTS)
    for tokens in (-1, 1.5, True):
        with pytest.raises(ValueError, match="tokens is how many tokens to add"):
            kl(llama, steering, PROMPTS, tokens=tokens)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="all empty"):
        perplexity(llama, [Generation("", [], [1, 2], None, None, [])])


def test_a_summary_is_in_nats_and_words() -> None:
    values = np.array([0.1, 0.4, 0.0, 0.3, 2.0])
    found = Divergence.of(values)
    assert found.mean == pytest.approx(0.56)
    assert (found.p50, found.largest, found.tokens) == (0.3, 2.0, 5)
    assert found.p95 == pytest.approx(0.4 + 0.8 * 1.6)  # a line between the two largest
    assert str(found) == "KL 0.56 nats a token on average (median 0.3, 95th percentile 1.68)"


# -- likelihood --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "mamba2"])
@pytest.mark.parametrize("budget", [30, 4096])
def test_likelihood_and_perplexity_are_those_of_a_plain_forward(family: str, budget: int) -> None:
    model = tiny_model(family)
    texts = [Text(ids("the food"), 4), Text(ids("rain"), 5), Text(ids("a b c"), 1), Text(ids("we."), 2)]
    expected = []
    for text in texts:
        logp = run(model, text.tokens, text.prompt)
        expected.append(sum(logp[p - 1, text.tokens[p]] for p in range(text.prompt, len(text.tokens))))
    assert expected[1] == 0.0
    assert log_likelihood(model, texts, budget) == pytest.approx(expected, abs=1e-4)
    made = [Generation("", t.tokens[t.prompt :], t.tokens[: t.prompt], None, None, []) for t in texts]
    count = sum(len(one.tokens) for one in made)
    assert perplexity(model, made, budget) == pytest.approx(np.exp(-sum(expected) / count), rel=1e-5)


# -- preference --------------------------------------------------------------------------------------------------------

PAIRS = [
    ContrastPair("the food was", " good", " bad"),
    ContrastPair("i", " like it", " do not"),
    ContrastPair("", "yes", "a long answer"),
    ContrastPair("rain again", " is fine.", " is awful!"),
]


def preference(
    model: InterpretableModel, pair: ContrastPair, edits: Sequence[Edit] = (), *, per: bool = False,
    encode: Callable[[str], list[int]] = ids,
) -> float:  # fmt: skip
    """log P(positive) − log P(negative) of plain forwards, one text at a time."""
    sums = []
    for side in (pair.positive, pair.negative):
        tokens = encode(pair.prompt + side)
        prompt = len(encode(pair.prompt)) if pair.prompt else 1
        logp = run(model, tokens, prompt, edits)
        each = [logp[p - 1, tokens[p]] for p in range(prompt, len(tokens))]
        sums.append(np.mean(each) if per else np.sum(each))
    return float(sums[0] - sums[1])


@pytest.mark.parametrize("family", ["llama 4-bit", *FEW[1:], "mamba2"])
def test_preferences_are_those_of_plain_forwards(family: str) -> None:
    model = tiny_model(family.split(maxsplit=1)[0], 4 if "4-bit" in family else None)
    edits = [add(1, -1, at_last, 2.0), add(3, "all", everywhere, -1.0)]
    for normalize in (None, "token"):
        base, steered = ([preference(model, pair, some, per=bool(normalize)) for pair in PAIRS] for some in ((), edits))
        moved = np.array(steered) - base
        assert np.abs(moved).max() > 0.05
        steering = {edit.key: edit.intervention for edit in edits}
        for budget in (1, 4096) if family == "llama 4-bit" else (4096,):
            found = preference_shift(model, steering, PAIRS, normalize=normalize, batch_tokens=budget)
            np.testing.assert_allclose(found, moved, atol=2e-4)
        made = edits_of(model, steering)
        at = [part.at for _, one in made for part in one.parts()]
        preferences = Preferences(model, PAIRS, at=at, normalize=normalize)
        np.testing.assert_allclose(preferences.base, base, atol=2e-4)
        np.testing.assert_allclose(preferences.under(made), steered, atol=2e-4)
        np.testing.assert_allclose(preferences.shift(steering), moved, atol=2e-4)
        np.testing.assert_allclose(preferences.shift(steering, 0.0), 0, atol=1e-12)
        halves = [add(1, -1, at_last, 1.0), add(3, "all", everywhere, -0.5)]
        expected = [preference(model, pair, halves, per=bool(normalize)) for pair in PAIRS]
        np.testing.assert_allclose(preferences.shift(steering, 0.5) + base, expected, atol=2e-4)


@pytest.mark.parametrize("name", ["before, in and behind", "into and out of a block", "clamp", "a plain function"])
def test_preferences_under_edits_of_all_kinds(llama: InterpretableModel, name: str) -> None:
    edits = EDITS[name]
    moved = [preference(llama, pair, edits) - preference(llama, pair) for pair in PAIRS]
    found = preference_shift(llama, {edit.key: edit.intervention for edit in edits}, PAIRS)
    np.testing.assert_allclose(found, moved, atol=2e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("at", [-1, "all"])
def test_doses_of_preferences_are_the_single_runs(family: str, at: Any) -> None:
    model, where = tiny_model(family), at_last if at == -1 else everywhere
    site = model._sites.resolve("layers.2")
    preferences = Preferences(model, PAIRS, at=at, variants=3)
    found = preferences.dose(lambda rows: [(site, iv.add_vector(V, rows, at=at))], [-1.0, 0.0, 2.0])
    for row, strength in zip(found, (-1.0, 0.0, 2.0), strict=True):
        expected = [preference(model, pair, [add(2, at, where, strength)]) for pair in PAIRS]
        np.testing.assert_allclose(row, expected, atol=2e-4)
    np.testing.assert_allclose(found[1], preferences.base, atol=2e-4)


def test_the_bundled_models_preferences_move_as_plain_forwards_say(pocket: InterpretableModel) -> None:
    pairs = in_split(datasets.load("pocket/sentiment"), "report")[:3]
    direction = mx.array(np.random.default_rng(2).standard_normal(256).astype(np.float32))
    edit = Edit("layers.5", iv.add_vector(direction, 4.0, at=-1), block(5), lambda x: x + 4.0 * direction, at_last)
    expected = [
        preference(pocket, pair, [edit], encode=pocket.encode) - preference(pocket, pair, encode=pocket.encode)
        for pair in pairs
    ]
    assert np.abs(expected).max() > 0.02
    np.testing.assert_allclose(preference_shift(pocket, {edit.key: edit.intervention}, pairs), expected, atol=2e-3)


def test_what_surrounds_a_measurement_is_its_base(llama: InterpretableModel) -> None:
    """What surrounds it acts on every block and behind them, where a pass of its own would end."""
    around = [add(2, "all", everywhere, 0.7),
              Edit("norm", iv.scale(1.5), lambda m: m.model.norm, lambda x: x * 1.5, everywhere)]  # fmt: skip
    edits, outer = [add(1, -1, at_last), add(3, "last", from_last, 0.5)], {e.key: e.intervention for e in around}
    steering = {edit.key: edit.intervention for edit in edits}
    base = [preference(llama, pair, around) for pair in PAIRS]
    moved = np.array([preference(llama, pair, [*around, *edits]) for pair in PAIRS]) - base
    unsurrounded = [preference(llama, pair, edits) - preference(llama, pair) for pair in PAIRS]
    assert np.abs(moved - unsurrounded).max() > 1e-3
    edited = llama.edit(outer)
    with llama.steer(outer):
        inside = Preferences(llama, PAIRS, at=[Position.of(-1), Position.of("last")])
        np.testing.assert_allclose(inside.base, base, atol=2e-4)
        np.testing.assert_allclose(inside.shift(steering), moved, atol=2e-4)
        np.testing.assert_allclose(preference_shift(llama, steering, PAIRS), moved, atol=2e-4)
        surrounded = kl(llama, steering, PROMPTS, tokens=TOKENS)
    np.testing.assert_allclose(preference_shift(edited, steering, PAIRS), moved, atol=2e-4)
    np.testing.assert_allclose(preference_shift(llama, steering, PAIRS), unsurrounded, atol=2e-4)
    bare.cache_clear()
    continued.cache_clear()
    with (
        tiny.by_hand(llama.model.layers[2], lambda x: x + 0.7 * V),
        tiny.by_hand(llama.model.model.norm, lambda x: x * 1.5),
    ):
        expected = plain_kl(llama, [ids(p) for p in PROMPTS], edits)
    bare.cache_clear()
    continued.cache_clear()
    assert abs(expected.mean() - plain_kl(llama, [ids(p) for p in PROMPTS], edits).mean()) > 1e-5
    for found in (surrounded, kl(edited, steering, PROMPTS, tokens=TOKENS)):
        assert (found.mean, found.largest) == pytest.approx((expected.mean(), expected.max()), rel=1e-3, abs=3e-6)


def test_pairs_that_can_not_be_measured_are_refused(llama: InterpretableModel) -> None:
    steering = {"layers.1": iv.add_vector(V)}
    with pytest.raises(ValueError, match="no contrast pairs"):
        preference_shift(llama, steering, [])
    with pytest.raises(ValueError, match="normalize is 'token' or None, not 'mean'"):
        preference_shift(llama, steering, PAIRS, normalize="mean")
    with pytest.raises(UnknownKey):
        preference_shift(llama, {"layers.1.mpl": iv.add_vector(V)}, PAIRS)
    with pytest.raises(ValueError, match="no such text"):
        preference_shift(llama, {"layers.1": iv.add_vector(V, at=after("zebra"))}, PAIRS)


def moved_along_w(strength: float, x: mx.array) -> mx.array:
    return x + strength * W


# -- several edits of one pass -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "mamba2"])
def test_a_continuation_takes_several_edits_for_several_copies(family: str, plain: bool) -> None:
    model = tiny_model(family)
    rows = [ids("the food was"), ids("a day or so")]
    texts, needed = [Text(row, 5) for row in rows], [range(4, len(row) - 1) for row in rows]
    one = Continuation(model, texts, needed, [Position.of("generated"), Position.of(-1)], plain=plain)
    strengths = [s for s in (0.5, 2.0) for _ in rows]
    made = [("layers.2", iv.add_vector(V, strengths, at="generated")), ("layers.1", iv.add_vector(W, strengths, at=-1))]
    found = one.divergences([(model._sites.resolve(key), edit) for key, edit in made], 2)
    expected: list[list[float]] = []
    for strength in (0.5, 2.0):
        expected.append([])
        for row in rows:
            second = Edit("", None, block(1), functools.partial(moved_along_w, strength), at_last)
            base, steered = (run(model, row, 5, edits) for edits in ((), [add(2, "all", generated, strength), second]))
            expected[-1] += list((np.exp(base) * (base - steered)).sum(-1)[4 : len(row) - 1])
    assert found.shape == (2, sum(map(len, needed)))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=3e-6)


# -- rank correlation --------------------------------------------------------------------------------------------------


@given(pairs=st.lists(st.tuples(st.integers(-4, 4), st.floats(-9, 9, allow_subnormal=False)), min_size=2, max_size=15))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_rank_correlation_is_that_of_scipy(pairs: list[tuple[int, float]]) -> None:
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    if len(set(a)) < 2 or len(set(b)) < 2:
        assert np.isnan(rank_correlation(a, b))
    else:
        assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)


def test_rank_correlation_of_the_plain_cases() -> None:
    assert rank_correlation([1, 2, 3], [10, 20, 90]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3.0, 2.5, -1]) == pytest.approx(-1)
    assert np.isnan(rank_correlation([], []))
    assert np.isnan(rank_correlation([1], [2]))
    with pytest.raises(ValueError, match="of two lists of one length, not of 2 and 3 numbers"):
        rank_correlation([1, 2], [1, 2, 3])


@pytest.mark.parametrize("at", [-1, "all"])
@pytest.mark.parametrize("name", ["llama", "mamba2"])  # one is replayed, the other isn't
def test_a_look_at_the_first_tokens_is_that_of_all_as_far_as_it_goes(name: str, at: Any) -> None:
    model = tiny_model(name)
    edits = [(model._sites.resolve("layers.1"), iv.add_vector(V, at=at))]
    reference = Reference(model, ["the food was"], tokens=6, at=at)
    short = reference.shortened(2)
    every = reference.per_token(edits)
    np.testing.assert_allclose(short.per_token(edits), every[:2], rtol=1e-4, atol=1e-6)
    assert len(every) > 2
    assert short.block_tokens < reference.block_tokens
    pairs = [ContrastPair("the food was", " so good we go.", " bad."), ContrastPair("we", " go", " the food was.")]
    look = Preferences(model, pairs, at=at).shortened(2)
    for found, steer in ((look.base, None), (look.under(edits), {"layers.1": edits[0][1]})):
        expected = []
        for pair in pairs:
            sums = []
            for side in ("positive", "negative"):
                tokens, prompt = encode_side(model, pair, side)
                with model.trace(tokens, interventions=steer, prompt_tokens=prompt):
                    logits = np.array(model.output[0], np.float64)
                logs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
                sums.append(sum(logs[i - 1, tokens[i]] for i in range(prompt, min(prompt + 2, len(tokens)))))
            expected.append(sums[0] - sums[1])
        np.testing.assert_allclose(found, expected, atol=1e-4)
