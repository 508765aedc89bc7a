"""Extraction against the plain way: bare mlx-lm, one prompt at a time, a hook written by hand, sums in float64."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mlxsteer import (
    ContextLengthWarning,
    ContrastPair,
    InterpretableModel,
    PositionError,
    SteeringVector,
    UnknownKey,
    activations,
    after,
    datasets,
    extract,
    mean_activations,
    separation,
    sweep,
)
from mlxsteer import interventions as iv
from mlxsteer.pairs import in_split
from mlxsteer.reading import encode_side, single_batches

LETTERS = "abcdefghijklmnopqrstuvwxyz .,!"
BOS = 1


def tokenizer(*, bos: bool = True) -> PreTrainedTokenizerFast:
    """One token for each letter, with BOS in front where asked for."""
    vocabulary = {"<unk>": 0, "<s>": BOS} | {letter: i + 2 for i, letter in enumerate(LETTERS)}
    made = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    special = {"bos_token": "<s>"} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", **special)


def ids(text: str, *, bos: bool = True) -> list[int]:
    return [BOS] * bos + [LETTERS.index(letter) + 2 for letter in text]


@pytest.fixture(scope="module", params=["llama", "gpt2", "mamba2"])
def model(request: pytest.FixtureRequest) -> InterpretableModel:
    return InterpretableModel(tiny.build(request.param), tokenizer())


@pytest.fixture(scope="module")
def llama() -> InterpretableModel:
    return InterpretableModel(tiny.build("llama"), tokenizer())


# -- the plain way ---------------------------------------------------------------------------------------------------


def streams(model: InterpretableModel, tokens: Sequence[int]) -> np.ndarray:
    """The residual stream after every block, (layers, tokens, D) in float64, of a bare forward of one prompt."""
    seen: list[mx.array] = []

    def look(h: mx.array) -> mx.array:
        seen.append(h)
        return h

    with ExitStack() as stack:
        for block in model.model.layers:
            stack.enter_context(tiny.by_hand(block, look))
        model.model(mx.array([tokens]))
    return np.stack([np.array(h[0].astype(mx.float32), np.float64) for h in seen])


def differences(model: InterpretableModel, pairs: Iterable[ContrastPair]) -> np.ndarray:
    """(layers, D): the mean difference of the two sides at their last tokens."""
    found = [
        streams(model, ids(p.prompt + p.positive))[:, -1] - streams(model, ids(p.prompt + p.negative))[:, -1]
        for p in pairs
    ]
    return np.mean(found, axis=0)


PAIRS = [
    ContrastPair("the food was", " good", " bad"),
    ContrastPair("i", " like it very much, thanks", " do not"),
    ContrastPair("", "yes", "a long answer that goes on and on"),
    ContrastPair("what a day", "!", ""),
    ContrastPair("rain again and again", " is fine.", " is awful!"),
]


def directions(vector: Any) -> np.ndarray:
    return np.stack([np.array(vector[layer], np.float64) for layer in vector])


def close(found: np.ndarray, expected: np.ndarray, size: float) -> None:
    """To 10⁻⁵ of the activations' norm."""
    assert np.linalg.norm(found - expected, axis=-1).max() <= 1e-5 * size


# -- extract ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 30, 64, 4096])
def test_extract_is_the_plain_loop_whatever_the_batches(model: InterpretableModel, budget: int) -> None:
    expected = differences(model, PAIRS)
    vector = extract(model, PAIRS, batch_tokens=budget)
    assert vector.layers == [0, 1, 2, 3]
    assert all(vector[layer].dtype == mx.float32 for layer in vector)
    size = np.linalg.norm(streams(model, ids("the food was good"))[:, -1], axis=-1).min()
    close(directions(vector), expected, size)
    assert np.linalg.norm(expected, axis=-1).min() > 1e-2 * size  # there is something to find


@given(order=st.permutations(PAIRS), budget=st.integers(1, 200))
@settings(max_examples=12, deadline=None, derandomize=True)
def test_extract_does_not_depend_on_the_order_of_the_pairs(
    llama: InterpretableModel, order: list[ContrastPair], budget: int
) -> None:
    first, second = directions(extract(llama, PAIRS)), directions(extract(llama, order, batch_tokens=budget))
    close(second, first, np.linalg.norm(streams(llama, ids("the food was good"))[:, -1], axis=-1).min())


def test_turned_pairs_give_the_turned_vector(llama: InterpretableModel) -> None:
    turned = [ContrastPair(p.prompt, p.negative, p.positive) for p in PAIRS]
    np.testing.assert_array_equal(directions(extract(llama, turned)), -directions(extract(llama, PAIRS)))


def test_extract_takes_any_iterable_and_leaves_the_model_as_it_was(llama: InterpretableModel) -> None:
    before, plain = tiny.classes(llama.model), llama.model(mx.array([[1, 2, 3]]))
    vector = extract(llama, iter(PAIRS))
    assert tiny.classes(llama.model) == before
    assert mx.array_equal(llama.model(mx.array([[1, 2, 3]])), plain)
    np.testing.assert_array_equal(directions(vector), directions(extract(llama, tuple(PAIRS))))


def test_extract_uses_the_training_pairs_only(llama: InterpretableModel) -> None:
    pairs = [
        ContrastPair(p.prompt, p.positive, p.negative, split)
        for p, split in zip(PAIRS, ("train", "choose", "train", "report", "choose"), strict=True)
    ]
    vector = extract(llama, pairs)
    np.testing.assert_array_equal(directions(vector), directions(extract(llama, [PAIRS[0], PAIRS[2]])))
    assert vector.info["pairs"] == 2
    with pytest.raises(ValueError, match="no pair is in the split 'train'"):
        extract(llama, [p for p in pairs if p.split != "train"])


def test_the_vector_says_where_it_comes_from(llama: InterpretableModel) -> None:
    expected = {
        "model": "llama", "architecture": "llama", "hidden_size": 64, "layers": 4, "method": "mean_difference",
        "read": "last", "pairs": 5,
    }  # fmt: skip
    vector = extract(llama, PAIRS)
    assert {key: vector.info[key] for key in expected} == expected
    assert vector.site == "layers.{layer}"


@pytest.mark.parametrize("budget", [30, 4096])
def test_residual_norms_are_medians_over_all_real_tokens_but_bos(llama: InterpretableModel, budget: int) -> None:
    norms = [
        np.linalg.norm(streams(llama, ids(p.prompt + side))[:, 1:], axis=-1)
        for p in PAIRS
        for side in (p.positive, p.negative)
    ]
    expected = np.median(np.concatenate(norms, axis=1), axis=1)
    found = extract(llama, PAIRS, batch_tokens=budget).residual_norms
    assert list(found) == [0, 1, 2, 3]
    np.testing.assert_allclose(list(found.values()), expected, rtol=1e-4)


def test_progress_counts_every_text_up_to_all_of_them(llama: InterpretableModel) -> None:
    seen: list[tuple[int, int]] = []
    extract(llama, PAIRS, batch_tokens=40, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (10, 10)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert len(seen) > 1


def test_no_pairs_are_refused(llama: InterpretableModel) -> None:
    with pytest.raises(ValueError, match="no contrast pairs"):
        extract(llama, [])


def test_a_model_without_a_tokenizer_can_not_read_texts(llama: InterpretableModel) -> None:
    with pytest.raises(ValueError, match="needs a tokenizer"):
        extract(InterpretableModel(llama.model), PAIRS)


@pytest.mark.full
def test_extract_on_the_bundled_model_separates_the_pairs_it_was_not_made_from(pocket: InterpretableModel) -> None:
    pairs = datasets.load("pocket/sentiment")
    vector = extract(pocket, in_split(pairs, "train")[:10])
    right = []
    for pair in in_split(pairs, "report")[:5]:
        with pocket.trace([pair.prompt + pair.positive, pair.prompt + pair.negative]) as trace:
            pass
        good, bad = np.array(trace.last("layers.5").astype(mx.float32)) @ np.array(vector[5])
        right.append(good > bad)
    assert sum(right) >= 4


# -- batches ---------------------------------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(1, 40), max_size=30), budget=st.integers(1, 120))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_batches_hold_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = list(single_batches(lengths, budget))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


# -- mean activations ------------------------------------------------------------------------------------------------

PROMPTS = ["the food was good", "no", "rain again, and again, and again.", "a b", "x"]


@pytest.mark.parametrize("budget", [1, 40, 4096])
@pytest.mark.parametrize("skip_bos", [True, False])
def test_mean_activations_are_the_plain_loop_without_bos(
    model: InterpretableModel, budget: int, skip_bos: bool
) -> None:
    expected = np.concatenate([streams(model, ids(p))[:, skip_bos:] for p in PROMPTS], axis=1)
    found = mean_activations(model, PROMPTS, "layers.*", skip_bos=skip_bos, batch_tokens=budget)
    assert list(found) == [f"layers.{i}" for i in range(4)]
    assert all(mean.shape == (64,) and mean.dtype == mx.float32 for mean in found.values())
    means = np.stack([np.array(mean, np.float64) for mean in found.values()])
    close(means, expected.mean(1), np.linalg.norm(expected, axis=-1).mean())
    other = np.concatenate([streams(model, ids(p))[:, 1 - skip_bos :] for p in PROMPTS], axis=1).mean(1)
    assert np.linalg.norm(means - other) > 1e-3  # BOS matters


POSITIONS: list[tuple[Any, Any]] = [
    ("last", lambda n: [n - 1]), (-2, lambda n: [n - 2]), ([1, -1], lambda n: {1, n - 1}), ("first", lambda n: [0]),
    (slice(1, 3), lambda n: range(1, min(3, n))),
    (lambda t: [i for i, x in enumerate(t) if x == ids("o")[1]] or [0], None),
]  # fmt: skip


@pytest.mark.parametrize(("at", "chosen"), POSITIONS, ids=[str(at)[:20] for at, _ in POSITIONS])
def test_mean_activations_take_the_tokens_asked_for(llama: InterpretableModel, at: Any, chosen: Any) -> None:
    rows = []
    for prompt in PROMPTS:
        tokens = ids(prompt)
        index = sorted(chosen(len(tokens)) if chosen else at(tokens))
        rows.append(streams(llama, tokens)[:, index])
    expected = np.concatenate(rows, axis=1).mean(1)
    found = mean_activations(llama, PROMPTS, ["layers.1", "layers.3"], at=at, skip_bos=False)
    close(np.stack([np.array(m) for m in found.values()]), expected[[1, 3]], np.linalg.norm(expected, axis=-1).min())


def test_bos_is_left_out_only_where_it_stands_first_and_only_if_it_is_there(llama: InterpretableModel) -> None:
    rows = [[5, BOS, 6], [BOS, 7], [8]]
    kept = np.concatenate([streams(llama, rows[0]), streams(llama, rows[1])[:, 1:], streams(llama, rows[2])], axis=1)
    found = mean_activations(llama, rows, "layers.2")["layers.2"]
    close(np.array(found)[None], kept[2:3].mean(1), np.linalg.norm(kept[2], axis=-1).mean())
    for plain in (InterpretableModel(llama.model), InterpretableModel(llama.model, tokenizer(bos=False))):
        whole = np.concatenate([streams(llama, row) for row in rows], axis=1)[2]
        mean = np.array(mean_activations(plain, rows, "layers.2")["layers.2"])
        close(mean[None], whole.mean(0)[None], np.linalg.norm(whole, axis=-1).mean())


def test_mean_activations_of_any_place_have_its_shape(llama: InterpretableModel) -> None:
    keys = ["embed", "layers.0.input", "layers.1.mlp", "layers.1.attn.heads", "logits"]
    found = mean_activations(llama, PROMPTS, keys)
    assert {key: value.shape for key, value in found.items()} == {
        "embed": (64,), "layers.0.input": (64,), "layers.1.mlp": (64,), "layers.1.attn.heads": (4, 16), "logits": (96,),
    }  # fmt: skip
    rows = [i for p in PROMPTS for i in ids(p)[1:]]
    embedding = np.array(llama.model.model.embed_tokens.weight, np.float64)[rows].mean(0)
    np.testing.assert_allclose(np.array(found["embed"]), embedding, atol=1e-6)
    np.testing.assert_allclose(np.array(found["layers.0.input"]), embedding, atol=1e-6)


def test_a_mean_replaces_what_it_is_the_mean_of(llama: InterpretableModel) -> None:
    mean = mean_activations(llama, PROMPTS, "layers.1.attn.heads")["layers.1.attn.heads"]
    with llama.trace("no", interventions={"layers.1.attn.heads": iv.mean_replace(mean, at="last")}) as trace:
        pass
    assert mx.array_equal(trace.activations["layers.1.attn.heads"][0, -1], mean)


def test_keys_are_kept_as_written_and_patterns_give_canonical_ones(llama: InterpretableModel) -> None:
    found = mean_activations(llama, ["no"], ["model.layers.1", "layers.-1", "layers.1-2.mlp", "layers.*.attn"])
    patterns = ["layers.1.mlp", "layers.2.mlp", *(f"layers.{i}.self_attn" for i in range(4))]
    assert list(found) == ["model.layers.1", "layers.-1", *patterns]
    assert mx.array_equal(found["model.layers.1"], mean_activations(llama, ["no"], "layers.1")["layers.1"])


def test_a_range_of_one_layer_gives_its_canonical_key(llama: InterpretableModel) -> None:
    assert list(mean_activations(llama, ["no"], "layers.1-1")) == ["layers.1"]


def test_what_can_not_be_averaged_is_refused(llama: InterpretableModel) -> None:
    with pytest.raises(UnknownKey, match=r"no place called 'layers\.1\.mpl'"):
        mean_activations(llama, ["no"], ["layers.1", "layers.1.mpl"])
    with pytest.raises(ValueError, match="there are no texts"):
        mean_activations(llama, [], "layers.1")
    with pytest.raises(ValueError, match=r"at='first' chooses no token of these prompts"):
        mean_activations(llama, PROMPTS, "layers.1", at="first")
    with pytest.raises(ValueError, match="chooses no token"):
        mean_activations(llama, PROMPTS, "layers.1", at=[])
    with pytest.raises(PositionError, match="trace"):
        mean_activations(llama, PROMPTS, "layers.1", at="generated")
    with pytest.raises(PositionError, match="no such text"):
        mean_activations(llama, PROMPTS, "layers.1", at=after("q"))


# -- chats, and what is read ------------------------------------------------------------------------------------------


def test_a_chat_pair_goes_through_the_template(pocket: InterpretableModel) -> None:
    template = pocket.tokenizer.apply_chat_template
    pair = ContrastPair("How was it?", "Great.", "Awful.", chat=True)
    said = list(template([{"role": "user", "content": "How was it?"}], add_generation_prompt=True))
    answer = pocket.tokenizer.encode("Great.", add_special_tokens=False)
    assert encode_side(pocket, pair, "positive") == ([*said, *answer], len(said))
    requests = ContrastPair("", "Hurt my neighbor.", "Help my neighbor.", chat=True)
    asked = list(template([{"role": "user", "content": "Help my neighbor."}], add_generation_prompt=True))
    assert encode_side(pocket, requests, "negative") == (asked, len(asked))
    talk = ContrastPair("", "Yes.", "No.", messages=({"role": "user", "content": "Is it?"},))
    assert encode_side(pocket, talk, "positive")[1] == len(
        template([{"role": "user", "content": "Is it?"}], add_generation_prompt=True)
    )
    with pytest.raises(ValueError, match="only completions can be scored"):
        sweep(pocket, extract(pocket, [requests]), [requests], layers=[0])
    with pytest.raises(ValueError, match="these texts are all prompt"):
        extract(pocket, [requests], read="mean")
    with pytest.raises(ValueError, match="not both"):
        ContrastPair("a", "b", "c", messages=({"role": "user", "content": "d"},))
    with pytest.raises(ValueError, match="one is empty"):
        ContrastPair("a", "b", "", chat=True)


@pytest.mark.parametrize("read", ["last", "mean", -2, 5])
def test_what_is_read_is_what_a_loop_reads(pocket: InterpretableModel, read: str | int) -> None:
    pairs = [
        ContrastPair("The soup was", " really great.", " bad."),
        ContrastPair("Our room", " was lovely", " was awful."),
    ]
    vector = extract(pocket, pairs, read=read)
    total = mx.zeros((256,))
    for pair in pairs:
        for text, sign in ((pair.positive, 1), (pair.negative, -1)):
            prompt, tokens = pocket.encode(pair.prompt), pocket.encode(pair.prompt + text)
            with pocket.trace(tokens) as trace:
                h = trace.activations["layers.3"][0]
            taken = h[len(prompt) :].mean(axis=0) if read == "mean" else h[-1 if read == "last" else read]
            total = total + sign * taken
    assert mx.abs(vector[3] - total / 2).max().item() <= 1e-4
    with pytest.raises(ValueError, match="only"):
        extract(pocket, pairs, read=40)
    with pytest.raises(ValueError, match="read is .last."):
        extract(pocket, pairs, read="middle")


# -- where a completion begins, and where a context ends -------------------------------------------------------------


@pytest.mark.parametrize("bos", [True, False])
def test_a_completion_without_a_prompt_begins_behind_bos_and_nowhere_else(bos: bool) -> None:
    wrapped = InterpretableModel(tiny.build("llama"), tokenizer(bos=bos))
    pair, start = ContrastPair("", "yes", "nah"), int(bos)
    sides = [streams(wrapped, ids(side, bos=bos))[:, start:] for side in ("yes", "nah")]
    size = np.linalg.norm(sides[0], axis=-1).min()
    for read, rows in (("first", [side[:, 0] for side in sides]), ("mean", [side.mean(axis=1) for side in sides])):
        close(directions(extract(wrapped, [pair], read=read)), rows[0] - rows[1], size)


def test_a_prompt_that_its_completion_melts_into_is_read_with_it_and_still_scored() -> None:
    """A merge over the end of the prompt: the token holds the completion's beginning, and has none before it."""
    vocabulary = {"<unk>": 0, "<s>": BOS, "a": 2, "b": 3, "c": 4, "ab": 5, "ac": 6}
    made = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("a", "c")], unk_token="<unk>"))
    wrapped = InterpretableModel(tiny.build("llama"), PreTrainedTokenizerFast(tokenizer_object=made))
    pair = ContrastPair("a", "bb", "cc")
    h = [streams(wrapped, tokens) for tokens in ([5, 3], [6, 4])]
    found = directions(extract(wrapped, [pair], read="mean"))
    close(found, h[0].mean(axis=1) - h[1].mean(axis=1), np.linalg.norm(h[0], axis=-1).min())
    assert encode_side(wrapped, pair, "positive") == ([5, 3], 1)  # a score needs a token before the one it scores


def test_the_hash_of_the_data_knows_where_the_completions_begin(llama: InterpretableModel) -> None:
    pairs = ContrastPair("ab", "cd", "ef"), ContrastPair("", "abcd", "abef")
    found = [extract(llama, [pair], read="mean") for pair in pairs]
    assert not mx.allclose(found[0][3], found[1][3], rtol=1e-3)
    assert found[0].info["data"] != found[1].info["data"]


LONG = "a" * 560


@pytest.mark.parametrize("bits", [None, 4])
def test_a_text_beyond_a_table_of_positions_is_refused_with_its_number_and_lengths(bits: int | None) -> None:
    wrapped = InterpretableModel(tiny.build("gpt2", bits=bits), tokenizer())
    vector, pairs = SteeringVector({1: mx.ones(64)}), [PAIRS[0], ContrastPair("", LONG, "b")]
    said = r"561 tokens, and the model has 512 learned positions, behind which there is nothing to read"
    attempts: dict[str, Any] = {
        r"positive=, text 1: the prompt has ": lambda: extract(wrapped, positive=["a", LONG], negative=["b"]),
        r"pair 1: the prompt has ": lambda: extract(wrapped, pairs),
        r"pair 1, positive side: the prompt has ": lambda: separation(wrapped, vector, pairs),
        r"texts=, text 0: the prompt has ": lambda: activations(wrapped, [LONG], "layers.1"),
        r"prompt 1: the prompt has ": lambda: mean_activations(wrapped, ["a", LONG], "layers.1"),
        r"^the prompt has ": lambda: wrapped.trace(LONG),
    }
    for place, attempt in attempts.items():
        with pytest.raises(ValueError, match=place.replace("pair 1: ", "pair 1, positive side: ") + said):
            attempt()
    assert extract(wrapped, positive=["a" * 511], negative=["b" * 511]).layers == [0, 1, 2, 3]


def test_a_table_is_of_positions_only_where_it_is_as_long_and_as_wide() -> None:
    """Gemma's second embedding is of tokens; a model without a table warns and goes on."""
    changes = {"max_position_embeddings": tiny.VOCABULARY, "hidden_size_per_layer_input": 8}
    wrapped = InterpretableModel(tiny.build("gemma4_text", **changes), tokenizer())
    with pytest.warns(ContextLengthWarning, match="made for 96"):
        assert activations(wrapped, ["a" * 120], "layers.1")["layers.1"].shape == (1, 64)


def test_texts_of_bos_alone_leave_no_norm_to_take(llama: InterpretableModel) -> None:
    with pytest.raises(ValueError, match=r"every text is the token <s> alone"):
        extract(llama, positive=[[BOS]], negative=["<s>", [BOS]])
    assert extract(llama, positive=[[BOS]], negative=["ab"]).residual_norms[0] > 0


# -- what is read and what is not ------------------------------------------------------------------------------------


def test_a_site_is_of_the_layer_that_is_put_in(llama: InterpretableModel) -> None:
    for site in ("layers.-{layer}", "layers.0{layer}", "layers.1#{layer}", "layers.{layer}.{layer}", "embed#{layer}"):
        with pytest.raises(ValueError, match=r"site is .* a key with \{layer\} in it, between dots"):
            extract(llama, PAIRS, site=site, layers=[0])
    made = tiny.build("llama")
    made.layers[0].parts = [nn.Linear(64, 64), nn.Linear(64, 64)]
    with pytest.raises(ValueError, match=r"with layer 1 is a place of another layer, layers\.0\.parts\.1"):
        extract(InterpretableModel(made, tokenizer()), PAIRS, site="layers.0.parts.{layer}", layers=[0, 1])
    assert extract(llama, PAIRS, site="model.layers.{layer}", layers=[1]).at(1).keys() == {"model.layers.1"}


def test_layers_may_be_an_array_of_them(llama: InterpretableModel) -> None:
    for layers in (np.array(2), mx.array(2), np.array([2]), mx.array([2])):
        assert extract(llama, PAIRS, layers=layers).layers == [2]  # type: ignore[arg-type]
    for wrong in (np.array(2.0), mx.array([[1]]), mx.array([1.5])):
        with pytest.raises(ValueError, match="layers are 'all', a layer, or a list"):
            extract(llama, PAIRS, layers=wrong)  # type: ignore[arg-type]


def test_pairs_without_a_split_beside_others_are_left_out_with_a_word(llama: InterpretableModel) -> None:
    mixed = [replace(PAIRS[0], split="train"), PAIRS[1], PAIRS[2], replace(PAIRS[3], split="report")]
    with pytest.warns(UserWarning, match=r"2 of 4 pairs name no split, and are left out beside those of 'train'"):
        found = extract(llama, mixed)
    assert found.info["pairs"] == 1


def test_the_same_texts_on_both_sides_are_no_contrast(llama: InterpretableModel) -> None:
    with pytest.raises(ValueError, match="the two sides are the same texts: there is no contrast"):
        extract(llama, positive=["abc", "d"], negative=["d", "abc"])


@pytest.mark.parametrize(
    "labels", [np.array([[1, 0], [0, 1]]), {0: 1, 1: 0}, "10", mx.array([[1], [0]]), [1, 2]], ids=str
)
def test_labels_are_a_list_of_truths(llama: InterpretableModel, labels: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"label"):
        extract(llama, texts=["a", "b"], labels=labels)


def test_a_mask_of_tokens_has_one_for_each(llama: InterpretableModel) -> None:
    for wrong in (lambda t: [True], lambda t: True, lambda t: np.zeros((1, 3), int)):
        with pytest.raises(ValueError, match="the callable gave .* for a text of 18 tokens; it gives"):
            extract(llama, PAIRS[:1], read=wrong)
    assert extract(llama, PAIRS, read=np.int64(-2)).info["read"] == -2  # type: ignore[arg-type]


def test_half_a_character_is_refused_with_its_place(llama: InterpretableModel) -> None:
    said = r"half a character \(a lone surrogate\), which no tokenizer reads"
    with pytest.raises(ValueError, match=r"pair 1, negative side: .*" + said):
        extract(llama, [PAIRS[0], ContrastPair("", "a", "\ud800")])
    with pytest.raises(ValueError, match=r"positive=, text 1: .*" + said):
        extract(llama, positive=["a", "b\ud800"], negative=["a"])
