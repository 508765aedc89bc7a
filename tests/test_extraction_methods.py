"""What extraction reads and keeps, whatever the way: against bare forwards, hooks by hand, NumPy and scikit-learn."""

from __future__ import annotations

import functools
import re
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from test_extraction import PAIRS, close, directions, ids, tokenizer
from test_extraction import streams as bare_streams

from mlxsteer import (
    ContrastPair,
    InterpretableModel,
    SteeringVector,
    UnknownKey,
    VectorMismatchWarning,
    activations,
    after,
    datasets,
    estimate,
    extract,
    mean_activations,
    moments,
    separation,
    to_mean_norm,
)
from mlxsteer import interventions as iv
from mlxsteer import reading as room
from mlxsteer.extraction import auroc
from mlxsteer.pairs import in_split

BUDGETS = [1, 30, 4096]
SHARING = [
    ContrastPair("the food was", " good", " bad"),
    ContrastPair("rain again and again", " is fine.", " is awful!"),
    ContrastPair("we went to the", "re", " shop"),
]
"""Pairs that have more tokens in common than the tiny models' windows are wide."""


@pytest.fixture(scope="module")
def llama() -> InterpretableModel:
    return InterpretableModel(tiny.build("llama"), tokenizer())


@pytest.fixture(scope="module")
def hybrid() -> InterpretableModel:
    return InterpretableModel(tiny.build("qwen3_next"), tokenizer())


@functools.cache
def _once(model: InterpretableModel, tokens: tuple[int, ...]) -> np.ndarray:
    return bare_streams(model, tokens)


def streams(model: InterpretableModel, tokens: Sequence[int]) -> np.ndarray:
    """The residual stream after every block, (layers, tokens, D) in float64, of a bare forward; each text runs once."""
    return _once(model, tuple(tokens))


@pytest.fixture(autouse=True, scope="module")
def _forget() -> Iterator[None]:
    yield
    _once.cache_clear()


def size_of(model: InterpretableModel) -> float:
    return np.linalg.norm(streams(model, ids("the food was good"))[:, -1], axis=-1).min()


def sides(model: InterpretableModel, pairs: Sequence[ContrastPair]) -> tuple[np.ndarray, np.ndarray]:
    """Both sides' rows at their last tokens, (n, layers, D), pairs in the order that the package keeps."""
    texts = [(ids(p.prompt + p.positive), ids(p.prompt + p.negative)) for p in pairs]
    rows = [[streams(model, side)[:, -1] for side in both] for both in sorted(texts, key=sorted)]
    return np.array([a for a, _ in rows]), np.array([b for _, b in rows])


def cosine(a: np.ndarray, b: np.ndarray) -> Any:
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@contextmanager
def watched(module: nn.Module) -> Iterator[list[mx.array]]:
    """What enters a module, call by call."""
    seen: list[mx.array] = []
    cls: Any = type(module)

    class Watched(cls):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            seen.append(args[0] if args else kwargs["inputs"])  # gptj names what it gives
            return super().__call__(*args, **kwargs)

    module.__class__ = Watched
    try:
        yield seen
    finally:
        module.__class__ = cls


class Ran(Exception):
    """A module ran that had no business to."""


@contextmanager
def forbidden(*modules: nn.Module) -> Iterator[None]:
    """Modules that must not run."""
    classes = [type(module) for module in modules]

    def refuse(*_: Any, **__: Any) -> Any:
        raise Ran

    for module, cls in zip(modules, classes, strict=True):
        module.__class__ = type(cls.__name__, (cls,), {"__call__": refuse})
    try:
        yield
    finally:
        for module, cls in zip(modules, classes, strict=True):
            module.__class__ = cls


# -- the beginning that two sides share --------------------------------------------------------------------------------

KINDS: dict[str, tuple[mx.Dtype, int | None, float]] = {
    "float32": (mx.float32, None, 1e-5), "4-bit": (mx.float32, 4, 1e-5), "bfloat16": (mx.bfloat16, None, 2e-2),
    "float16": (mx.float16, None, 4e-3),
}  # fmt: skip
SOME = ("llama", "gemma3_text", "gpt2", "gpt_neox", "mamba2", "gemma4_text")
CASES = [(family, kind) for family in tiny.FAMILIES for kind in KINDS if not kind.endswith("float16") or family in SOME]


@pytest.mark.parametrize(
    ("family", "kind"),
    [pytest.param(*case, marks=[] if case[0] in SOME else pytest.mark.full) for case in CASES],
    ids=[" ".join(case) for case in CASES],
)
def test_running_the_shared_beginning_once_changes_nothing(
    family: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype, bits, tolerance = KINDS[kind]
    model = InterpretableModel(tiny.build(family, dtype, bits=bits), tokenizer())
    made, tokens = [], []
    for shortest in (room.SHORTEST_SHARED, 10**6):
        monkeypatch.setattr(room, "SHORTEST_SHARED", shortest)
        with watched(model.model.layers[0]) as seen:
            made.append(extract(model, SHARING))
        tokens.append(sum(x.shape[0] * x.shape[1] for x in seen))
    once, twice = made
    norms = np.array(list(once.residual_norms.values()))
    assert (np.linalg.norm(directions(once) - directions(twice), axis=-1) / norms).max() <= tolerance
    np.testing.assert_allclose(norms, list(twice.residual_norms.values()), rtol=1e-5 if tolerance < 1e-4 else 2e-2)
    if not model._sites.family.batch:  # its rows are run one at a time
        assert tokens[0] == tokens[1]
    else:
        assert tokens[0] < 0.7 * tokens[1]
    positive, negative = sides(model, SHARING)
    expected = (positive - negative).mean(0)
    assert (np.linalg.norm(directions(once) - expected, axis=-1) / norms).max() <= tolerance
    assert np.linalg.norm(expected[0]) > 1e-2 * norms[0]


@pytest.mark.parametrize("method", ["mean_difference", "pca_difference", "whitened"])
@pytest.mark.parametrize("read", ["last", "mean", "all", 3])
def test_a_shared_beginning_that_is_read_too(
    llama: InterpretableModel, method: str, read: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [*SHARING, *PAIRS] if read != 3 else PAIRS  # what all sides share, read, would be no contrast
    pairs = [pair for pair in given if pair.positive and pair.negative]
    once = extract(llama, pairs, method=method, read=read)
    monkeypatch.setattr(room, "SHORTEST_SHARED", 10**6)
    twice = extract(llama, pairs, method=method, read=read)
    close(directions(once), directions(twice), size_of(llama))


def test_the_bundled_models_shared_beginnings(pocket: InterpretableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = in_split(datasets.load("pocket/sentiment"), "train")[:3]
    once = extract(pocket, pairs)
    monkeypatch.setattr(room, "SHORTEST_SHARED", 10**6)
    close(directions(once), directions(extract(pocket, pairs)), min(once.residual_norms.values()))


# -- layers and places -------------------------------------------------------------------------------------------------


def test_some_layers_are_the_same_rows_as_all(llama: InterpretableModel) -> None:
    whole = extract(llama, PAIRS)
    for layers, expected in ((2, [2]), ([1, 3], [1, 3]), ([-1, 0, 0], [0, 3]), (np.int64(1), [1]), (range(2), [0, 1])):
        part = extract(llama, PAIRS, layers=layers, batch_tokens=40)
        assert part.layers == expected
        close(directions(part), directions(whole)[expected], size_of(llama))
        for told in ("residual_norms", "agreement", "reliability"):
            whole_told = {layer: getattr(whole, told)[layer] for layer in expected}
            assert getattr(part, told) == pytest.approx(whole_told, rel=1e-4, abs=1e-5)


SITES = ["residual", "attn", "mlp", "layers.{layer}.mlp.down_proj.input", "layers.{layer}.input"]


@pytest.mark.parametrize(
    ("site", "method"),
    [
        *((site, "mean_difference") for site in SITES),
        ("residual", "single"),
        ("mlp", "single"),
        ("attn", "mean_centred"),
    ],
)
def test_nothing_behind_the_highest_layer_runs(llama: InterpretableModel, site: str, method: str) -> None:
    inner, blocks = llama.model, llama.model.layers
    pairs = [ContrastPair("", "so", "no")] if method == "single" else [*PAIRS[:2], *SHARING[:2]]
    more: dict[str, Any] = {"background": ["a bus", "tea"]} if method == "mean_centred" else {}
    plain = directions(extract(llama, pairs, layers=[0, 2], site=site, method=method, **more))
    with forbidden(blocks[3], inner.model.norm, inner.lm_head):
        found = directions(extract(llama, pairs, layers=[2, 0], site=site, method=method, **more))
    np.testing.assert_array_equal(found, plain)
    with forbidden(inner.model.norm, inner.lm_head):
        extract(llama, pairs, site=site, method=method, **more)
        activations(llama, ["a bus"], ["layers.3.mlp", "layers.1"])
        separation(llama, extract(llama, PAIRS[:2], layers=3, site=site), PAIRS[:2])
    with forbidden(blocks[2]), pytest.raises(Ran):  # the watch works
        extract(llama, pairs, layers=2, site=site, method=method, **more)


def test_every_block_below_runs_once_for_each_batch(llama: InterpretableModel) -> None:
    batches = estimate(llama, PAIRS, layers=2, batch_tokens=60).batches
    with watched(llama.model.layers[0]) as first, watched(llama.model.layers[2]) as last:
        extract(llama, PAIRS, layers=2, batch_tokens=60)
    assert len(first) == len(last)
    assert batches <= len(first) <= 2 * batches  # a shared beginning runs before its two ends


def inside(model: InterpretableModel, find: Callable[[nn.Module], nn.Module], layers: Sequence[int], enters: bool
           ) -> Callable[[str], np.ndarray]:  # fmt: skip
    """What a module of some blocks takes or gives at the last token of a text, (layers, features), by hand."""

    def read(text: str) -> np.ndarray:
        seen: list[mx.array] = []
        with ExitStack() as stack:
            if enters:
                lists = [stack.enter_context(watched(find(model.model.layers[layer]))) for layer in layers]
            else:
                lists = [seen]
                for layer in layers:
                    module = find(model.model.layers[layer])
                    stack.enter_context(tiny.by_hand(module, lambda x: seen.append(x) or x))  # type: ignore[func-returns-value]
            model.model(mx.array([ids(text)]))
        return np.array([np.array(x[0, -1], np.float64) for one in lists for x in one])

    return read


PLACES: dict[str, tuple[str, str, Callable[[Any], nn.Module], bool]] = {
    "mlp": ("llama", "mlp", lambda b: b.mlp, False),
    "attn": ("llama", "attn", lambda b: b.self_attn, False),
    "into the down projection": ("llama", "layers.{layer}.mlp.down_proj.input", lambda b: b.mlp.down_proj, True),
    "out of the up projection": ("llama", "layers.{layer}.mlp.up_proj", lambda b: b.mlp.up_proj, False),
    "into the block": ("llama", "layers.{layer}.input", lambda b: b, True),
    "the raw name": ("llama", "model.layers.{layer}.self_attn.o_proj", lambda b: b.self_attn.o_proj, False),
    "a mixer": ("mamba2", "attn", lambda b: b.mixer, False),
    "gpt2": ("gpt2", "attn", lambda b: b.attn, False),
}


@pytest.mark.parametrize(("family", "site", "find", "enters"), PLACES.values(), ids=PLACES)
def test_other_places_than_the_residual_stream(family: str, site: str, find: Any, enters: bool) -> None:
    model = InterpretableModel(tiny.build(family), tokenizer())
    read = inside(model, find, range(4), enters)
    apart = [read(p.prompt + p.positive) - read(p.prompt + p.negative) for p in PAIRS]
    expected = np.mean(apart, axis=0)
    vector = extract(model, PAIRS, site=site)
    size = np.linalg.norm(read("the food was good"), axis=-1).min()
    close(directions(vector), expected, max(size, 1.0))
    assert np.linalg.norm(expected, axis=-1).max() > 1e-2
    assert vector.layers == [0, 1, 2, 3]
    shorts = {"attn": "layers.{layer}.attn", "mlp": "layers.{layer}.mlp"}
    assert vector.site == shorts.get(site, site)
    with model.trace("no", vector.at(2, 2.0)):  # where it was read it can be added
        pass


def test_a_hybrids_place_is_read_in_the_layers_that_have_it(hybrid: InterpretableModel) -> None:
    for name, layers in (("self_attn", [1, 3]), ("linear_attn", [0, 2])):
        read = inside(hybrid, lambda b, name=name: getattr(b, name), layers, False)
        expected = np.mean([read(p.prompt + p.positive) - read(p.prompt + p.negative) for p in PAIRS], axis=0)
        vector = extract(hybrid, PAIRS, site=f"layers.{{layer}}.{name}")
        assert vector.layers == layers
        close(directions(vector), expected, 1.0)
        assert list(vector.residual_norms) == layers
    assert extract(hybrid, PAIRS[:2], site="attn").layers == [0, 1, 2, 3]
    with pytest.raises(UnknownKey, match=r"no place called 'layers\.1\.linear_attn'"):
        extract(hybrid, PAIRS, site="layers.{layer}.linear_attn", layers=[0, 1])
    with pytest.raises(UnknownKey, match=r"no place called 'layers\.0\.lin_attn'"):
        extract(hybrid, PAIRS, site="layers.{layer}.lin_attn")


WRONG_PLACES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no layer in it": ({"site": "layers.3"}, ValueError, r"site is 'residual', 'attn', 'mlp' or a key with \{layer\}"),
    "no such place": ({"site": "layers.{layer}.mpl"}, UnknownKey, r"no place called 'layers\.0\.mpl'.*layers\.0\.mlp"),
    "heads": ({"site": "layers.{layer}.attn.heads"}, ValueError, r"shape .*activations are \(batch, tokens, features"),
    "no such layer": ({"layers": 4}, ValueError, "there is no layer 4: the model has 4, from 0 to 3"),
    "none such from the end": ({"layers": [0, -5]}, ValueError, "there is no layer -5"),
    "no layers": ({"layers": []}, ValueError, r"layers are 'all', a layer, or a list of layers such as .*, not \[\]"),
    "a word": ({"layers": "last"}, ValueError, "not 'last'"),
    "a half": ({"layers": [1.5]}, ValueError, r"not \[1\.5\]"),
    "truth": ({"layers": [True]}, ValueError, r"not \[True\]"),
    "a range in words": ({"layers": "1-3"}, ValueError, r"such as \[1, 2, 3\], not '1-3'"),
    "a list in words": ({"layers": "1, 3"}, ValueError, r"such as \[1, 3\], not '1, 3'"),
    "a fraction": ({"layers": 1.5}, ValueError, r"not 1\.5"),
    "nothing": ({"layers": None}, ValueError, "not None"),
    "a slice": ({"layers": slice(1, 3)}, ValueError, "not slice"),
    "no site": ({"site": None}, ValueError, "site is 'residual'.*not None"),
    "a number for a site": ({"site": 3}, ValueError, "site is 'residual'.*not 3"),
    "a slip": ({"site": "mpl"}, ValueError, r"not 'mpl'\. Nearest: mlp"),
    "another": ({"site": "atn"}, ValueError, r"not 'atn'\. Nearest: attn"),
    "a short one": ({"site": "resid"}, ValueError, r"not 'resid'\. Nearest: residual"),
    "more to fill in": ({"site": "layers.{layer}.{part}"}, ValueError, "site is 'residual'"),
}


@pytest.mark.parametrize(("given", "kind", "sentence"), WRONG_PLACES.values(), ids=WRONG_PLACES)
def test_places_that_are_not_there_are_refused(
    llama: InterpretableModel, given: dict[str, Any], kind: type[Exception], sentence: str
) -> None:
    with pytest.raises(kind, match=sentence):
        extract(llama, PAIRS, **given)
    before = tiny.classes(llama.model)
    assert not [path for path, cls in before.items() if hasattr(cls, "_hooked")]


# -- which token is read -----------------------------------------------------------------------------------------------

FULL = [*(p for p in PAIRS if p.prompt and p.positive and p.negative), ContrastPair("what a day", "!", ".")]
"""Pairs with a prompt and two completions."""
o = ids("o")[1]
READS: dict[str, tuple[Any, Callable[[list[int], int], list[int]]]] = {
    "last": ("last", lambda tokens, prompt: [-1]),
    "first": ("first", lambda tokens, prompt: [prompt]),
    "mean": ("mean", lambda tokens, prompt: list(range(prompt, len(tokens)))),
    "all": ("all", lambda tokens, prompt: list(range(1, len(tokens)))),
    "the letter in (A)": (-2, lambda tokens, prompt: [-2]),
    "NumPy's number": (np.int32(-1), lambda tokens, prompt: [-1]),
    "one index": (lambda tokens: len(tokens) // 2, lambda tokens, prompt: [len(tokens) // 2]),
    "several": (lambda tokens: [-1, 3, 5], lambda tokens, prompt: [-1, 3, 5]),
    "one twice": (lambda tokens: [-1, -1, 4], lambda tokens, prompt: [-1, -1, 4]),
    "a range": (lambda tokens: range(2, len(tokens), 2), lambda tokens, prompt: list(range(2, len(tokens), 2))),
    "a mask": (
        lambda tokens: [token != o for token in tokens],
        lambda tokens, prompt: [i for i, token in enumerate(tokens) if token != o],
    ),
    "an array": (lambda tokens: np.array([1, -1]), lambda tokens, prompt: [1, -1]),
}  # fmt: skip


@pytest.mark.parametrize(("read", "chosen"), READS.values(), ids=READS)
def test_the_token_that_is_read(llama: InterpretableModel, read: Any, chosen: Any) -> None:
    expected = np.zeros((4, 64))
    for pair in FULL:
        prompt = len(ids(pair.prompt))
        for text, sign in ((pair.positive, 1), (pair.negative, -1)):
            tokens = ids(pair.prompt + text)
            expected += sign * streams(llama, tokens)[:, chosen(tokens, prompt)].mean(1) / len(FULL)
    for budget in BUDGETS:
        vector = extract(llama, FULL, read=read, batch_tokens=budget)
        close(directions(vector), expected, size_of(llama))
    if not isinstance(read, np.integer):
        assert vector.info["read"] == ("<lambda>" if callable(read) else read)


WRONG_READS: dict[str, tuple[Any, str]] = {
    "word": ("frist", "read is 'last', 'first', 'mean', 'all', the index of a token, or a callable.*not 'frist'"),
    "truth": (True, "not True"),
    "fraction": (1.0, r"not 1\.0"),
    "list": ([-1], r"not \[-1\]"),
    "nothing": (None, "not None"),
    "behind the end": (40, r"read=40: a text has only \d+ tokens"),
    "before the beginning": (-40, r"read=-40: a text has only \d+ tokens"),
    "callable behind the end": (lambda tokens: [0, len(tokens)], r"read= gave index \d+, and a text has only"),
    "a slip": ("lsat", "not 'lsat'. Nearest: last"),
    "capitals": ("Last", "not 'Last'. Nearest: last"),
    "callable that chooses none": (lambda tokens: [], r"the callable gave \[\] for a text of \d+ tokens; it gives one"),
    "callable that masks all": (lambda tokens: [False] * len(tokens), "it gives one index or several"),
    "callable of fractions": (lambda tokens: 0.5, r"the callable gave 0\.5"),
    "callable of words": (lambda tokens: "last", "the callable gave"),
}


@pytest.mark.parametrize(("read", "sentence"), WRONG_READS.values(), ids=WRONG_READS)
def test_a_read_that_names_no_token_is_refused(llama: InterpretableModel, read: Any, sentence: str) -> None:
    for attempt in (
        lambda: extract(llama, FULL, read=read),
        lambda: activations(llama, ["the food"], "layers.0", read=read),
        lambda: separation(llama, SteeringVector({0: mx.ones(64)}), FULL, read=read),
    ):
        with pytest.raises(ValueError, match=sentence):
            attempt()


def test_where_there_is_no_completion_none_can_be_read(llama: InterpretableModel) -> None:
    for read, verb in (("mean", "averages over"), ("first", "reads the first token of")):
        for attempt in (
            lambda read=read: extract(llama, positive=["a b"], negative=["c d"], read=read),
            lambda read=read: activations(llama, ["a b"], "layers.0", read=read),
        ):
            instead = {"mean": "read='all' averages over all", "first": "read='last' reads the last token"}[read]
            with pytest.raises(ValueError, match=f"read='{read}' {verb} a completion, and these texts .*: {instead}"):
                attempt()
        for pairs, number, side in (
            ([PAIRS[0], ContrastPair("what a day", "!", "")], 1, "negative"),
            ([ContrastPair("what a day", "", "!")], 0, "positive"),
        ):
            for attempt in (
                lambda read=read, pairs=pairs: extract(llama, pairs, read=read),
                lambda read=read, pairs=pairs: estimate(llama, pairs, read=read),
                lambda read=read, pairs=pairs: separation(llama, SteeringVector({0: mx.ones(64)}), pairs, read=read),
            ):
                with pytest.raises(ValueError, match=f"pair {number}: read='{read}' {verb}.*its {side} one is empty"):
                    attempt()
    assert extract(llama, [ContrastPair("", "yes", "no")], read="mean").layers == [0, 1, 2, 3]
    split = [replace(PAIRS[0], split="train"), replace(PAIRS[3], split="report")]
    assert extract(llama, split, read="mean").info["pairs"] == 1


def test_chat_makes_prompts_a_users_messages(pocket: InterpretableModel) -> None:
    pairs = [ContrastPair("How was it?", "Great.", "Awful."), ContrastPair("And the room?", "So nice.", "Too small.")]
    template = pocket.tokenizer.apply_chat_template
    for read, chosen in (("last", lambda n, prompt: [-1]), ("mean", lambda n, prompt: list(range(prompt, n)))):
        expected = np.zeros((2, 256))
        for pair in pairs:
            said = list(template([{"role": "user", "content": pair.prompt}], add_generation_prompt=True))
            for text, sign in ((pair.positive, 1), (pair.negative, -1)):
                tokens = [*said, *pocket.tokenizer.encode(text, add_special_tokens=False)]
                taken = streams(pocket, tokens)[[1, 6]][:, chosen(len(tokens), len(said))]
                expected += sign * taken.mean(1) / 2
        marked = [replace(pair, chat=True) for pair in pairs]
        talks = [
            ContrastPair("", p.positive, p.negative, messages=({"role": "user", "content": p.prompt},)) for p in pairs
        ]
        ways: list[Any] = [(pairs, {"chat": True}), (marked, {}), (talks, {})]
        for way, more in ways if read == "mean" else ways[:1]:
            found = extract(pocket, way, layers=[1, 6], read=read, **more)
            assert np.linalg.norm(directions(found) - expected, axis=-1).max() <= 1e-4
            assert isinstance(found.info["chat_template"], str)
    plain = extract(pocket, pairs, layers=[1, 6])
    assert np.linalg.norm(directions(plain) - expected, axis=-1).min() > 1e-2


# -- in which way the texts come ---------------------------------------------------------------------------------------

GOOD, BAD = ["so good", "i like it", "thanks a lot"], ["no", "a bad day", "this is awful", "oh", "rain"]


def test_two_lists_and_labelled_texts_are_the_same(llama: InterpretableModel) -> None:
    last = [[streams(llama, ids(text))[:, -1] for text in side] for side in (GOOD, BAD)]
    expected = np.mean(last[0], axis=0) - np.mean(last[1], axis=0)
    mixed = [("oh", 0), ("i like it", 1), ("no", False), ("rain", 0.0), ("so good", True), ("a bad day", np.bool_(0)),
             ("thanks a lot", np.int64(1)), ("this is awful", 0)]  # fmt: skip
    ways: list[dict[str, Any]] = [
        {"positive": GOOD, "negative": BAD},
        {"positive": (text for text in GOOD), "negative": tuple(BAD[::-1])},
        {"positive": [ids(text) for text in GOOD], "negative": [mx.array(ids(text)) for text in BAD]},
        {"texts": [text for text, _ in mixed], "labels": [label for _, label in mixed]},
        {"texts": iter([*GOOD, *BAD]), "labels": np.array([1] * 3 + [0] * 5)},
    ]
    for way in ways:
        for budget in BUDGETS:
            if budget != 4096 and not isinstance(next(iter(way.values())), list):
                continue  # an iterator is good for one run
            vector = extract(llama, **way, batch_tokens=budget)
            close(directions(vector), expected, size_of(llama))
        assert (vector.info["positive"], vector.info["negative"]) == (3, 5)
        assert vector.agreement == {}
        assert set(vector.reliability) == {0, 1, 2, 3}


def test_chats_are_texts_too(pocket: InterpretableModel) -> None:
    def asked(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}]

    talks = extract(pocket, positive=[asked("Praise it."), asked("Love it.")], negative=[asked("Hate it.")], layers=2)
    marked = extract(pocket, positive=["Praise it.", "Love it."], negative=["Hate it."], layers=2, chat=True)
    rows = [streams(pocket, pocket.encode(asked(text)))[2, -1] for text in ("Praise it.", "Love it.", "Hate it.")]
    for vector in (talks, marked):
        close(directions(vector), ((rows[0] + rows[1]) / 2 - rows[2])[None], np.linalg.norm(rows[0]))


WRONG_TEXTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "nothing": ({}, TypeError, "pairs, or positive= and negative=, or texts= and labels=: one of the three"),
    "two ways": ({"pairs": PAIRS, "positive": GOOD, "negative": BAD}, TypeError, "one of the three"),
    "half": ({"positive": GOOD}, TypeError, "takes positive= and negative= together"),
    "the other half": ({"labels": [1]}, TypeError, "takes texts= and labels= together"),
    "a text": ({"positive": "good", "negative": BAD}, TypeError, r"positive= is a list of texts, not one str"),
    "empty": ({"positive": GOOD, "negative": []}, ValueError, "negative= is empty"),
    "one side": ({"texts": GOOD, "labels": [1, 1, 1]}, ValueError, "no label is False or 0: .* negative side"),
    "the other side": ({"texts": GOOD, "labels": [0, 0, 0]}, ValueError, "no label is True or 1: .* positive side"),
    "lengths": ({"texts": GOOD, "labels": [1, 0]}, ValueError, "there are 3 texts and 2 labels"),
    "label": ({"texts": GOOD, "labels": [1, 0, 2]}, ValueError, "not 2"),
    "word": ({"texts": GOOD, "labels": ["yes", "no", "no"]}, ValueError, "not 'yes'"),
    "no pairs": ({"pairs": []}, ValueError, "no contrast pairs"),
    "a name": ({"pairs": "pocket/sentiment"}, TypeError, r"datasets\.load\('pocket/sentiment'\)"),
    "tuples": ({"pairs": [("a", "b", "c")]}, TypeError, "list of ContrastPair"),
    "same tokens": ({"pairs": [ContrastPair("a", "§", "¶")]}, ValueError, "the same tokens: there is no contrast"),
    "an empty text": ({"positive": ["a", ""], "negative": BAD}, ValueError, "positive=, text 1: the prompt is empty"),
    "no text": ({"positive": ["a", 3], "negative": BAD}, TypeError, "positive=, text 1: a prompt is a string"),
    "an empty background": (
        {"pairs": PAIRS, "background": [""], "method": "mean_centred"},
        ValueError,
        "background=, text 0: the prompt",
    ),
    "a background of one text": (
        {"pairs": PAIRS, "background": "a", "method": "mean_centred"},
        TypeError,
        "background= is a list of texts",
    ),
    "no list": ({"positive": 3, "negative": BAD}, TypeError, "positive= is a list of texts, not 3"),
    "one pair": ({"pairs": PAIRS[0]}, TypeError, r"contrast pairs are a list of ContrastPair; one pair is \[pair\]"),
    "no pairs at all": ({"pairs": 3}, TypeError, "contrast pairs are a list of ContrastPair.*, not 3"),
    "memory": (
        {"pairs": PAIRS, "memory": "1GB"},
        ValueError,
        r"memory is a number of bytes, such as 8_000_000_000, not '1GB'",
    ),
    "a seed": ({"pairs": PAIRS, "seed": "a"}, ValueError, "a seed is a whole number from 0 on, not 'a'"),
    "a negative seed": ({"pairs": PAIRS, "seed": -1}, ValueError, "a seed is a whole number from 0 on, not -1"),
    "chat": ({"pairs": PAIRS, "chat": "yes"}, TypeError, "chat is True or False, not 'yes'"),
    "progress": ({"pairs": PAIRS, "progress": "yes"}, TypeError, "progress is True, False or a function, not 'yes'"),
    "budget": ({"pairs": PAIRS, "batch_tokens": 0}, ValueError, "batch_tokens is a number of tokens from 1 on, not 0"),
    "half a token": ({"pairs": PAIRS, "batch_tokens": 1.5}, ValueError, r"from 1 on, not 1\.5"),
}


@pytest.mark.parametrize(("given", "kind", "sentence"), WRONG_TEXTS.values(), ids=WRONG_TEXTS)
def test_what_is_no_contrast_is_refused(
    llama: InterpretableModel, given: dict[str, Any], kind: type[Exception], sentence: str
) -> None:
    with pytest.raises(kind, match=sentence):
        extract(llama, **given)


# -- agreement and reliability -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", BUDGETS)
def test_agreement_is_the_mean_cosine_of_two_pairs_differences(llama: InterpretableModel, budget: int) -> None:
    positive, negative = sides(llama, PAIRS)
    apart = positive - negative
    cosines = [cosine(apart[i], apart[j]) for i in range(5) for j in range(5) if i != j]
    found = extract(llama, PAIRS, batch_tokens=budget, method="pca_difference").agreement
    assert found == pytest.approx(dict(enumerate(np.mean(cosines, axis=0))), abs=1e-5)
    assert extract(llama, PAIRS[:1]).agreement == {}


def test_agreement_of_pairs_that_say_the_same_is_1_and_of_opposite_ones_negative(llama: InterpretableModel) -> None:
    pair = SHARING[0]
    assert extract(llama, [pair] * 3).agreement == pytest.approx(dict.fromkeys(range(4), 1.0), abs=1e-5)
    opposite = ContrastPair(pair.prompt, pair.negative, pair.positive)
    found = extract(llama, [pair, pair, opposite]).agreement  # of three couples, one agrees and two oppose
    assert found == pytest.approx(dict.fromkeys(range(4), -1 / 3), abs=1e-5)


def test_agreement_of_differences_that_are_zero_is_zero(llama: InterpretableModel) -> None:
    vector = extract(llama, [SHARING[0], SHARING[2], PAIRS[2]], read=3)  # of the first two, 3 lies in the shared prompt
    assert vector.agreement == dict.fromkeys(range(4), 0.0)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_sides_that_read_the_same_are_refused_before_anything_runs(family: str) -> None:
    model = InterpretableModel(tiny.build(family), tokenizer())
    with forbidden(*model.model.layers):
        for read in (0, 1, lambda tokens: [1, 3]):
            with pytest.raises(ValueError, match=r"both sides of every pair read the same.*lies in what they share"):
                extract(model, SHARING, read=read)


def test_a_direction_that_is_zero_everywhere_is_refused(llama: InterpretableModel) -> None:
    opposite = ContrastPair(SHARING[0].prompt, SHARING[0].negative, SHARING[0].positive)
    for sides in ({"pairs": [SHARING[0], opposite]}, {"positive": ["a b"], "negative": ["a b", "a b"]}):
        with pytest.raises(ValueError, match="zero at every layer: both sides read the same on average"):
            extract(llama, **sides)
    none = SteeringVector({1: mx.ones(64), 2: mx.zeros(64)})
    with pytest.raises(ValueError, match="the direction of layer 2 is zero: it tells nothing apart"):
        separation(llama, none, PAIRS)


def halves_by_hand(positive: np.ndarray, negative: np.ndarray, matched: bool, seed: int) -> np.ndarray:
    """Mean over 8 halvings of the cosine between the two halves' mean differences."""
    rng = np.random.default_rng(seed)
    chosen = [
        [rng.permutation(len(rows)) < len(rows) // 2 for _ in range(8)]
        for rows in ([positive] if matched else [positive, negative])
    ]
    cosines = []
    for k in range(8):
        a, b = chosen[0][k], chosen[-1][k]
        cosines.append(
            cosine(positive[a].mean(0) - negative[b].mean(0), positive[~a].mean(0) - negative[~b].mean(0))
        )  # fmt: skip
    return np.mean(cosines, axis=0)


@pytest.mark.parametrize("seed", [0, 3])
def test_reliability_is_the_mean_cosine_of_random_halves(llama: InterpretableModel, seed: int) -> None:
    pairs = [*PAIRS, *SHARING]
    expected = halves_by_hand(*sides(llama, pairs), True, seed)
    for budget in BUDGETS:
        found = extract(llama, pairs[::-1], seed=seed, batch_tokens=budget, method="pca_centre").reliability
        assert found == pytest.approx(dict(enumerate(expected)), abs=1e-5)
    good, bad = (np.array([streams(llama, row)[:, -1] for row in sorted(map(ids, side))]) for side in (GOOD, BAD))
    found = extract(llama, positive=GOOD, negative=BAD, seed=seed).reliability
    assert found == pytest.approx(dict(enumerate(halves_by_hand(good, bad, False, seed))), abs=1e-5)


def test_reliability_needs_two_texts_a_side(llama: InterpretableModel) -> None:
    assert extract(llama, PAIRS[:1]).reliability == {}
    assert extract(llama, positive=GOOD, negative=BAD[:1]).reliability == {}
    two = extract(llama, [SHARING[0]] * 2)
    assert two.reliability == pytest.approx(dict.fromkeys(range(4), 1.0), abs=1e-5)


# -- steered extraction ------------------------------------------------------------------------------------------------

PUSH = np.random.default_rng(9).normal(size=64)


def pushed(model: InterpretableModel, pairs: Sequence[ContrastPair], chosen: Callable[[int], slice]) -> np.ndarray:
    """The mean difference while a vector is added behind block 1, by hand."""
    total = 0
    for pair in pairs:
        for text, sign in ((pair.positive, 1), (pair.negative, -1)):
            tokens = ids(pair.prompt + text)
            added = np.zeros((len(tokens), 64), np.float32)
            added[chosen(len(tokens))] = 2 * PUSH
            with tiny.by_hand(model.model.layers[1], lambda h, added=added: h + mx.array(added)):
                total = total + sign * bare_streams(model, tokens)[:, -1]
    return np.asarray(total) / len(pairs)


@pytest.mark.parametrize(("family", "budget"), [("llama", 30), ("llama", 4096), ("mamba2", 4096), ("gemma2", 4096)])
def test_extraction_inside_a_steering_or_of_an_edited_model_is_steered(family: str, budget: int) -> None:
    model = InterpretableModel(tiny.build(family), tokenizer())
    pairs, before = [*PAIRS[:2], *SHARING[:2]], tiny.classes(model.model)
    plain = extract(model, pairs)
    for at, chosen in (("all", lambda n: slice(None)), (3, lambda n: slice(3, 4))):
        push = {"layers.1": iv.add_vector(PUSH, 2.0, at=at)}
        expected = pushed(model, pairs, chosen)
        with model.steer(push):  # leaving it would say so if nothing had been steered
            inside = extract(model, pairs, batch_tokens=budget)
            low = extract(
                model, pairs, layers=0, batch_tokens=budget
            )  # the steered block lies behind the last one read
        edited = model.edit(push)
        size = np.linalg.norm(expected, axis=-1).max() + size_of(model)
        for found in (inside, extract(edited, pairs, batch_tokens=budget)):
            close(directions(found), expected, size)
        close(directions(low), expected[:1], size)
        assert np.linalg.norm(directions(inside)[3] - directions(plain)[3]) > 1e-2 * np.linalg.norm(PUSH)
        with edited.steer({"layers.2": iv.add_vector(PUSH, 1.0, at=1)}):
            extract(edited, pairs[:2])
    assert tiny.classes(model.model) == before
    np.testing.assert_array_equal(directions(extract(model, pairs)), directions(plain))


@pytest.mark.parametrize("at", ["last", -10, after("to"), [2, 3]], ids=str)
def test_a_steering_is_told_each_sides_own_prompt(pocket: InterpretableModel, at: Any) -> None:
    """Where the sides are messages, they share a beginning and yet have prompts of their own."""
    pair = ContrastPair("", "Go to the city now.", "Go to the city now, and then to the sea too.", chat=True)
    added = iv.add_vector(np.random.default_rng(1).normal(size=256), 3.0, at=at)
    rows = []
    for text in (pair.positive, pair.negative):
        with pocket.trace([{"role": "user", "content": text}], {"layers.2": added}) as trace:
            pass
        rows.append(np.array(trace.activations["layers.7"][0, -1], np.float64))
    with pocket.steer({"layers.2": added}):
        found = extract(pocket, [pair], layers=7)
    for vector in (found, extract(pocket.edit({"layers.2": added}), [pair], layers=7)):
        close(directions(vector), (rows[0] - rows[1])[None], np.linalg.norm(rows[0]))


def test_the_models_classes_come_back_even_after_an_error(llama: InterpretableModel) -> None:
    before = tiny.classes(llama.model)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    for method in ("mean_difference", "mean_centred", "lat"):
        more: dict[str, Any] = {"background": ["a"]} if method == "mean_centred" else {}
        with pytest.raises(KeyboardInterrupt):
            extract(llama, PAIRS, method=method, progress=stop, **more)
        assert tiny.classes(llama.model) == before
    extract(llama, PAIRS[:1], method="single", site="mlp")
    activations(llama, ["a b"], "layers.*")
    estimate(llama, PAIRS)
    assert tiny.classes(llama.model) == before


def test_extraction_inside_a_trace_a_record_or_another_thread(llama: InterpretableModel) -> None:
    plain = directions(extract(llama, PAIRS[:2]))
    with llama.trace("no") as trace:
        np.testing.assert_array_equal(directions(extract(llama, PAIRS[:2])), plain)
    assert trace.activations["layers.3"].shape == (1, 3, 64)
    with llama.record("layers.1") as seen:
        llama.model(mx.array([[1, 2]]))
        np.testing.assert_array_equal(directions(extract(llama, PAIRS[:2])), plain)
    assert [h.shape for h in seen["layers.1"]] == [(1, 2, 64)]  # the extraction's own forwards are not seen
    with ThreadPoolExecutor(1) as pool, llama.steer({"layers.0": iv.add_vector(PUSH, 9.0)}):
        llama.model(mx.array([[1, 2]]))
        found = pool.submit(lambda: directions(extract(llama, PAIRS[:2]))).result()  # a steering is its thread's own
    np.testing.assert_array_equal(found, plain)


# -- memory ------------------------------------------------------------------------------------------------------------


def test_an_estimate_counts_texts_tokens_and_batches(llama: InterpretableModel) -> None:
    pairs = [ContrastPair("abcdefgh", " x", " yz"), ContrastPair("hgfedcba", " zy", " x")]
    found = estimate(llama, pairs)  # 10 tokens shared with BOS and the space, then one or two for each side
    assert (found.texts, found.tokens, found.batches) == (4, 2 * (10 + 1 + 2), 1)
    apart = estimate(llama, positive=["abc", "de"], negative=["f"])
    assert (apart.texts, apart.tokens, apart.batches) == (3, 4 + 3 + 2, 1)
    few = estimate(llama, [*pairs, ContrastPair("", "a", "bc")], batch_tokens=1)
    assert (few.texts, few.tokens, few.batches) == (6, 26 + 2 + 3, 3)
    assert few.batch_bytes < found.batch_bytes
    # The shared beginning ends before the first token that is read.
    late = estimate(llama, [*pairs, ContrastPair("", "abcdefg", "gfedcba")], read=5)
    assert late.tokens == 4 * 12 - 2 - 2 * 5 + 2 * 8
    assert str(found).startswith("4 texts, 26 tokens in 1 batches; about ")


def test_an_estimate_grows_with_rows_kept_and_layers_and_runs_nothing(llama: InterpretableModel) -> None:
    with forbidden(llama.model.model.embed_tokens, *llama.model.layers):
        sums, rows = estimate(llama, PAIRS), estimate(llama, PAIRS, method="pca_difference")
        more, half = estimate(llama, PAIRS * 9, method="pca_difference"), estimate(llama, PAIRS, layers=[0, 1])
    kept = 4 * 4 * 64 * 2 * len(PAIRS)  # float32, layers, width, texts
    assert rows.kept_bytes - sums.kept_bytes >= kept
    assert more.kept_bytes - rows.kept_bytes >= 8 * kept
    assert estimate(llama, PAIRS * 9).kept_bytes == sums.kept_bytes  # sums stay as they are, however many pairs
    assert half.kept_bytes == sums.kept_bytes // 2
    assert half.batch_bytes < sums.batch_bytes


@pytest.mark.parametrize(("name", "read"), [("llama", "last"), ("llama", "all"), ("qwen3", "last"), ("pocket", "last")])
def test_a_batch_takes_no_more_than_estimated(name: str, read: str, pocket: InterpretableModel) -> None:
    model = pocket if name == "pocket" else InterpretableModel(tiny.build(name), tokenizer())
    pairs = list(datasets.load("pocket/sentiment")[:4]) if name == "pocket" else [*SHARING, *PAIRS]
    found = estimate(model, pairs, read=read)
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    extract(model, pairs, read=read)
    taken = mx.get_peak_memory() - before
    assert taken <= found.batch_bytes + found.kept_bytes <= 10 * taken


def test_a_run_that_does_not_fit_names_the_batch_that_does(llama: InterpretableModel) -> None:
    pairs = [ContrastPair(f"a {letter} was", " so", " no") for letter in "abcdefghijklmnop"]
    whole = estimate(llama, pairs)
    memory = (whole.batch_bytes + whole.kept_bytes) // 3
    with forbidden(*llama.model.layers), pytest.raises(MemoryError, match=r"batch_tokens=4096 would take .* fits") as e:
        extract(llama, pairs, memory=memory)
    named = int(re.search(r"batch_tokens=(\d+) fits", str(e.value))[1])  # type: ignore[index]
    assert named == estimate(llama, pairs, memory=memory).largest_budget
    found = extract(llama, pairs, memory=memory, batch_tokens=named)
    close(directions(found), directions(extract(llama, pairs)), size_of(llama))
    assert estimate(llama, pairs, batch_tokens=named).batches > 1
    with pytest.raises(MemoryError, match="not even one pair fits"):
        extract(llama, pairs, memory=whole.kept_bytes + 1000)
    with pytest.raises(MemoryError, match=r"what the method keeps does not fit: .* or method='mean_difference'"):
        extract(llama, pairs, memory=1000)


# -- vectors -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vector(llama: InterpretableModel) -> SteeringVector:
    return extract(llama, PAIRS)


def test_a_vector_describes_itself(vector: SteeringVector) -> None:
    lines = vector.describe().splitlines()
    told = dict(line.split(": ", 1) for line in lines if ": " in line)
    assert told["site"] == "layers.{layer}"
    assert (told["model"], told["method"], told["pairs"], told["read"]) == ("llama", "mean_difference", "5", "last")
    table = lines[len(told) :]
    assert re.split(r"  +", table[0].strip()) == ["layer", "length", "residual norm", "agreement", "reliability"]
    assert len(table) == 5
    for layer, line in enumerate(table[1:]):
        columns = (vector.norms, vector.residual_norms, vector.agreement, vector.reliability)
        assert line.split() == [str(layer), *(f"{column[layer]:.3g}" for column in columns)]
    assert len({len(line) for line in table}) == 1
    bare = SteeringVector({3: mx.array([3.0, 4.0])}).describe().splitlines()
    assert [line.split() for line in bare[1:]] == [["layer", "length"], ["3", "5"]]


def test_the_origin_of_a_vector(llama: InterpretableModel, vector: SteeringVector) -> None:
    info = vector.info
    assert {"model", "architecture", "quantization", "hidden_size", "layers", "method", "read", "data"} <= set(info)
    assert (info["quantization"], info["hidden_size"], info["layers"]) == (None, 64, 4)
    assert info["data"] == extract(llama, PAIRS[::-1], layers=1, method="lat").info["data"]
    assert info["data"] != extract(llama, PAIRS[1:], layers=1).info["data"]
    turned = [ContrastPair(p.prompt, p.negative, p.positive) for p in PAIRS]
    assert info["data"] != extract(llama, turned, layers=1).info["data"]
    four = InterpretableModel(tiny.build("llama", bits=4), tokenizer())
    assert extract(four, PAIRS, layers=1).info["quantization"] == "4-bit, group 32"


def test_a_vector_knows_its_model(llama: InterpretableModel, vector: SteeringVector, tmp_path: Path) -> None:
    vector.check(llama)
    vector.check(InterpretableModel(tiny.build("llama", seed=7), tokenizer()))  # a warning would be an error
    SteeringVector({1: mx.ones(64)}).check(llama)
    four = InterpretableModel(tiny.build("llama", bits=4), tokenizer())
    with pytest.warns(VectorMismatchWarning, match="quantization None and not '4-bit, group 32'"):
        vector.check(four)
    with pytest.warns(VectorMismatchWarning, match="architecture 'llama' and not 'qwen2'"):
        vector.check(InterpretableModel(tiny.build("qwen2"), tokenizer()))
    other = replace(vector, info={**vector.info, "model": "mlx-community/another"})
    with pytest.warns(VectorMismatchWarning, match="model 'mlx-community/another' and not 'llama'") as seen:
        other.check(llama)
    assert seen[0].filename == __file__
    vector.save(tmp_path / "own.safetensors")
    assert SteeringVector.load(tmp_path / "own.safetensors", model=llama).layers == vector.layers
    with pytest.warns(VectorMismatchWarning, match="quantization None and not '4-bit, group 32'") as seen:
        SteeringVector.load(tmp_path / "own.safetensors", model=four)
    assert seen[0].filename == __file__
    narrow = InterpretableModel(tiny.build("llama", hidden_size=32), tokenizer())
    with pytest.raises(ValueError, match=r"of width 64, and layers\.0 of llama of width 32"):
        SteeringVector.load(tmp_path / "own.safetensors", model=narrow)
    for changes, sentence in (
        ({"num_hidden_layers": 3}, "the vector has 4 layers and llama has 3"),
        ({"num_hidden_layers": 5}, "the vector has 4 layers and llama has 5"),
        ({"hidden_size": 32}, r"of width 64, and layers\.0 of llama of width 32"),
    ):
        with pytest.raises(ValueError, match=f"{sentence}.*another model's"):
            vector.check(InterpretableModel(tiny.build("llama", **changes), tokenizer()))
    with pytest.raises(ValueError, match="the vector has a direction for layer 9 and llama has 4 layers"):
        SteeringVector({9: mx.ones(64)}).check(llama)
    with pytest.raises(UnknownKey, match=r"layers\.0\.mlp"):
        SteeringVector({0: mx.ones(64)}, "layers.{layer}.mlp").check(
            InterpretableModel(tiny.build("mamba2"), tokenizer())
        )


def test_the_bundled_model_is_told_from_another_quantization(pocket: InterpretableModel) -> None:
    found = extract(pocket, [ContrastPair("It was", " good", " bad")], layers=[2, 3])
    found.check(pocket)
    assert found.info["quantization"] == "4-bit, group 64"
    with pytest.warns(VectorMismatchWarning, match="quantization '8-bit, group 64' and not '4-bit, group 64'"):
        replace(found, info={**found.info, "quantization": "8-bit, group 64"}).check(pocket)


def test_residual_units_make_every_layer_as_long_as_its_norm(llama: InterpretableModel, vector: SteeringVector) -> None:
    rows, norms = directions(vector), vector.residual_norms
    made = vector.at([0, 2, 3], 0.25, unit="residual")
    for layer in (0, 2, 3):
        expected = norms[layer] * rows[layer] / np.linalg.norm(rows[layer])
        added = made[f"layers.{layer}"]
        np.testing.assert_allclose(added.strength * np.array(added.vector), 0.25 * expected, rtol=1e-5)
    h = streams(llama, ids("a good day"))
    with llama.trace("a good day", vector.at({2: -0.5}, 3.0, unit="residual")) as trace:
        pass
    expected = h[2] - 1.5 * norms[2] * rows[2] / np.linalg.norm(rows[2])
    np.testing.assert_allclose(np.array(trace.activations["layers.2"][0]), expected, atol=1e-5 * norms[2])
    with llama.trace(["a b", "a b"], vector.at(2, [0.0, 2.0], unit="residual")) as trace:
        pass
    first, second = np.array(trace.activations["layers.2"])
    np.testing.assert_allclose(np.linalg.norm(second - first, axis=-1), 2 * norms[2], rtol=1e-4)


def test_residual_units_need_a_norm_and_a_direction(vector: SteeringVector) -> None:
    with pytest.raises(ValueError, match=r"unit is 'raw' or 'residual', not 'norm'"):
        vector.at(1, unit="norm")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs the vector's residual norm at layer 1, and it is unknown"):
        SteeringVector({1: mx.ones(3)}, residual_norms={0: 2.0}).at(1, unit="residual")
    with pytest.raises(ValueError, match="direction of layer 1 is zero"):
        SteeringVector({1: mx.zeros(3)}, residual_norms={1: 2.0}).at(1, unit="residual")
    for wrong in ("a", None, True, float("nan")):
        with pytest.raises((TypeError, ValueError), match="a strength is a"):
            vector.at(1, wrong)  # type: ignore[arg-type]


def test_vectors_of_mean_length(vector: SteeringVector) -> None:
    others = [vector, 3 * vector, -0.5 * vector]
    made = to_mean_norm(iter(others))
    mean = np.mean([np.linalg.norm(directions(v), axis=-1) for v in others], axis=0)
    for before, now in zip(others, made, strict=True):
        np.testing.assert_allclose(np.linalg.norm(directions(now), axis=-1), mean, rtol=1e-5)
        np.testing.assert_allclose(cosine(directions(now), directions(before)), 1.0, rtol=1e-6)
        assert (now.info, now.residual_norms, now.site) == (before.info, before.residual_norms, before.site)
    assert mean.max() > 1.2 * mean.min()  # layers keep their own lengths
    np.testing.assert_allclose(directions(to_mean_norm([vector])[0]), directions(vector), rtol=1e-5)
    with pytest.raises(ValueError, match="there are none"):
        to_mean_norm([])
    for misfit in (SteeringVector({0: mx.ones(64)}), replace(vector, site="layers.{layer}.mlp")):
        with pytest.raises(ValueError, match="don't fit together"):
            to_mean_norm([vector, misfit])
    with pytest.raises(ValueError, match="direction of layer 0 is zero"):
        to_mean_norm([vector, vector - vector])


def test_how_reliable_a_vector_is_is_not_said_of_what_is_made_of_two(
    llama: InterpretableModel, vector: SteeringVector
) -> None:
    other = extract(llama, SHARING)
    assert set(vector.agreement) == set(other.reliability) == {0, 1, 2, 3}
    for made in (vector + other, vector - other, sum([vector, other]), vector.orthogonal_to(other)):
        assert (made.agreement, made.reliability) == ({}, {})
        assert not {"agreement", "reliability", "data", "pairs"} & set(made.info)
        assert (made.info["model"], made.info["method"]) == ("llama", "mean_difference")
        assert made.residual_norms == vector.residual_norms
    for made in (2 * vector, vector / 3, vector.normalized()):
        assert (made.agreement, made.reliability) == (vector.agreement, vector.reliability)
    np.testing.assert_allclose(directions(sum([vector, other])), directions(vector) + directions(other), rtol=1e-6)
    assert (vector.positions, SteeringVector({0: mx.ones((5, 3))}).positions) == (None, 5)


# -- activations -------------------------------------------------------------------------------------------------------

TEXTS = ["the food was good", "no", "rain again, and again", "a b", "x", "oh no, not again!"]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("family", ["llama", "mamba2", "gemma2"])
def test_activations_are_those_of_a_plain_loop_in_the_order_of_the_texts(family: str, budget: int) -> None:
    model = InterpretableModel(tiny.build(family), tokenizer())
    found = activations(model, iter(TEXTS), "layers.*", batch_tokens=budget)
    assert list(found) == [f"layers.{i}" for i in range(4)]
    for layer, rows in enumerate(found.values()):
        assert rows.dtype == mx.float32
        expected = np.array([streams(model, ids(text))[layer, -1] for text in TEXTS])
        close(np.array(rows, np.float64), expected, size_of(model))


@pytest.mark.parametrize("budget", [30, 4096])
def test_activations_of_places_of_several_widths(llama: InterpretableModel, budget: int) -> None:
    keys = ["embed", "layers.1", "layers.2.mlp.down_proj.input", "norm", "logits"]
    found = activations(llama, TEXTS, keys, batch_tokens=budget)
    assert {key: rows.shape for key, rows in found.items()} == {
        "embed": (6, 64), "layers.1": (6, 64), "layers.2.mlp.down_proj.input": (6, 128), "norm": (6, 64),
        "logits": (6, 96),
    }  # fmt: skip
    table = np.array(llama.model.model.embed_tokens.weight)
    np.testing.assert_allclose(np.array(found["embed"]), table[[ids(text)[-1] for text in TEXTS]], atol=1e-6)
    logits = np.array([np.array(llama.model(mx.array([ids(text)]))[0, -1]) for text in TEXTS])
    np.testing.assert_allclose(np.array(found["logits"]), logits, atol=1e-4)


def test_activations_are_read_where_told_of_any_texts(llama: InterpretableModel, pocket: InterpretableModel) -> None:
    for read, chosen in (("all", slice(1, None)), (-2, slice(-2, -1)), (lambda tokens: [0, -1], [0, -1])):
        expected = np.array([streams(llama, ids(text))[1, chosen].mean(0) for text in TEXTS])
        for texts in (TEXTS, [ids(text) for text in TEXTS], [mx.array(ids(text)) for text in TEXTS]):
            found = activations(llama, texts, ["layers.1"], read=read)["layers.1"]
            close(np.array(found, np.float64), expected, size_of(llama))
    asked = ["Go on.", "Stop it now."]
    expected = np.array([streams(pocket, pocket.encode([{"role": "user", "content": t}]))[3, -1] for t in asked])
    talks = [[{"role": "user", "content": text}] for text in asked]
    for found in (activations(pocket, asked, "layers.3", chat=True), activations(pocket, talks, "layers.3")):
        close(np.array(found["layers.3"], np.float64), expected, np.linalg.norm(expected, axis=-1).min())


def test_activations_that_can_not_be_are_refused_and_progress_is_told(llama: InterpretableModel) -> None:
    with pytest.raises(TypeError, match=r"texts= is a list of texts, not one str: one text is \[text\]"):
        activations(llama, "a text", "layers.1")
    with pytest.raises(ValueError, match="there are no texts"):
        activations(llama, [], "layers.1")
    with pytest.raises(UnknownKey, match=r"'layers\.1\.mpl'"):
        activations(llama, TEXTS, "layers.1.mpl")
    with pytest.raises(ValueError, match=r"activations are \(batch, tokens, features\)"):
        activations(llama, TEXTS, "layers.1.attn.heads")
    seen: list[tuple[int, int]] = []
    activations(llama, TEXTS, "layers.0", batch_tokens=20, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (6, 6)
    assert len(seen) > 2


def test_activations_inside_a_steering_are_steered(llama: InterpretableModel) -> None:
    with llama.steer({"layers.1": iv.add_vector(PUSH, 2.0)}):
        found = np.array(activations(llama, TEXTS, "layers.1")["layers.1"])
    expected = np.array([streams(llama, ids(text))[1, -1] for text in TEXTS]) + 2 * PUSH
    np.testing.assert_allclose(found, expected, atol=1e-5)


# -- separation --------------------------------------------------------------------------------------------------------

scores = st.lists(st.integers(-3, 3), min_size=1, max_size=12)


@given(positive=scores, negative=scores)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_auroc_is_that_of_scikit_learn_ties_and_all(positive: list[int], negative: list[int]) -> None:
    labels = [1] * len(positive) + [0] * len(negative)
    assert auroc(positive, negative) == pytest.approx(roc_auc_score(labels, positive + negative), abs=1e-12)
    assert auroc(positive, negative) + auroc(negative, positive) == pytest.approx(1)


def test_auroc_of_the_plain_cases() -> None:
    assert auroc([2, 3], [0, 1]) == 1
    assert auroc([0], [1, 2]) == 0
    assert auroc([1, 1], [1]) == 0.5
    assert auroc(np.array([1.0, 5.0]), [3]) == 0.5


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("read", ["last", "mean"])
def test_separation_is_the_auroc_of_projections(llama: InterpretableModel, budget: int, read: str) -> None:
    vector = extract(llama, FULL, read=read, layers=[1, 3])
    pairs = [*SHARING, FULL[0], *(ContrastPair("a day", a, b) for a, b in ((" so", " no"), (" x.", " y"), ("!", ",")))]
    labels, projections = [], []
    for pair in pairs:
        prompt = len(ids(pair.prompt))
        for text, label in ((pair.positive, 1), (pair.negative, 0)):
            h = streams(llama, ids(pair.prompt + text))
            h = h[:, -1] if read == "last" else h[:, prompt:].mean(1)
            projections.append([h[layer] @ np.array(vector[layer], np.float64) for layer in (1, 3)])
            labels.append(label)
    expected = {layer: roc_auc_score(labels, np.array(projections)[:, i]) for i, layer in enumerate((1, 3))}
    found = separation(llama, vector, pairs, read=read, batch_tokens=budget)
    assert found == pytest.approx(expected, abs=1e-9)
    assert separation(llama, -vector, pairs, read=read) == pytest.approx({k: 1 - v for k, v in expected.items()})
    assert 0 < min(expected.values()) < 1


def test_separation_uses_the_pairs_it_is_given_at_the_vectors_place(llama: InterpretableModel) -> None:
    vector = extract(llama, SHARING, site="mlp", layers=2)
    found = separation(llama, vector, [replace(pair, split="report") for pair in PAIRS])
    read = inside(llama, lambda b: b.mlp, [2], False)
    good, bad = ([float(read(p.prompt + getattr(p, side))[0] @ np.array(vector[2], np.float64)) for p in PAIRS]
                 for side in ("positive", "negative"))  # fmt: skip
    assert found == pytest.approx({2: roc_auc_score([1] * 5 + [0] * 5, good + bad)})
    with pytest.raises(ValueError, match="no contrast pairs"):
        separation(llama, vector, [])


@pytest.mark.parametrize(
    "behaviour", ["sentiment", *(pytest.param(name, marks=pytest.mark.full) for name in ("formality", "certainty"))]
)
def test_held_out_pairs_of_every_behaviour_of_the_bundled_model_are_told_apart(
    pocket: InterpretableModel, behaviour: str
) -> None:
    pairs = datasets.load(f"pocket/{behaviour}")
    vector = extract(pocket, in_split(pairs, "train")[:8], layers=[0, 6])
    found = separation(pocket, vector, in_split(pairs, "report")[:8])
    assert list(found) == [0, 6]
    assert found[6] >= 0.95
    if behaviour == "sentiment":
        listed = pocket.lens.tokens(vector[6], k=20)
        praise, blame = {" loved", " enjoyed", " praised", " admired"}, {" hated", " loathed", " despised", " awful"}
        assert len(praise & {token for token, _ in listed.boosted}) >= 2
        assert len(blame & {token for token, _ in listed.suppressed}) >= 1
        assert not praise & {token for token, _ in listed.suppressed}
        assert not blame & {token for token, _ in listed.boosted}


def test_a_median_norm_of_many_tokens_is_that_of_every_second(
    llama: InterpretableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = extract(llama, [*PAIRS, *SHARING], batch_tokens=30)
    monkeypatch.setattr(moments, "NORMS", 20)
    kept: list[int] = []
    add = moments.Moments.add

    def counted(self: moments.Moments, *args: Any) -> None:
        add(self, *args)
        kept.append(sum(part.shape[1] for part in self.norms))

    monkeypatch.setattr(moments.Moments, "add", counted)
    part = extract(llama, [*PAIRS, *SHARING], batch_tokens=30)
    assert max(kept) <= 40
    close(directions(part), directions(whole), size_of(llama))
    np.testing.assert_allclose(list(part.residual_norms.values()), list(whole.residual_norms.values()), rtol=0.15)


# -- what goes in ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["pocket", None, PAIRS, "a module"], ids=["name", "none", "pairs", "module"])
def test_only_a_model_is_a_model(llama: InterpretableModel, vector: SteeringVector, wrong: Any) -> None:
    wrong = llama.model if wrong == "a module" else wrong
    for attempt in (
        lambda: extract(wrong, PAIRS),
        lambda: extract(wrong, llama),
        lambda: estimate(wrong, PAIRS),
        lambda: separation(wrong, vector, PAIRS),
        lambda: activations(wrong, ["a"], "layers.0"),
        lambda: mean_activations(wrong, ["a"], "layers.0"),
    ):
        with pytest.raises(
            TypeError, match=r"model is an InterpretableModel, such as InterpretableModel\('pocket'\), not"
        ):
            attempt()


def test_separation_takes_a_vector_of_the_model(llama: InterpretableModel, vector: SteeringVector) -> None:
    for wrong in (vector[1], PAIRS, None):
        with pytest.raises(TypeError, match="separation takes a SteeringVector, not"):
            separation(llama, wrong, PAIRS)  # type: ignore[arg-type]
    with (
        forbidden(*llama.model.layers),
        pytest.raises(ValueError, match=r"of width 32, and layers\.1 of llama of width 64"),
    ):
        separation(llama, SteeringVector({1: mx.ones(32)}), PAIRS)
    with pytest.warns(VectorMismatchWarning, match="model 'another'") as seen:
        separation(llama, replace(vector, info={**vector.info, "model": "another"}), PAIRS)
    assert seen[0].filename == __file__


def test_activations_take_keys_texts_and_switches(llama: InterpretableModel) -> None:
    for read in (activations, mean_activations):
        with pytest.raises(ValueError, match=r"no keys: give at least one, such as 'layers\.5'"):
            read(llama, ["a"], [])
        for wrong in (2, None, [2]):
            with pytest.raises(TypeError, match=r"keys are a key such as 'layers\.5', or a list of keys, not "):
                read(llama, ["a"], wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"one text is \[text\]"):
            read(llama, "a b", "layers.1")
        with pytest.raises(ValueError, match="there are no texts: give at least one"):
            read(llama, [], "layers.1")
        with pytest.raises(TypeError, match="a list of texts, not 3"):
            read(llama, 3, "layers.1")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="batch_tokens is a number of tokens from 1 on, not 'a'"):
            read(llama, ["a"], "layers.1", batch_tokens="a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="texts=, text 1: the prompt is empty"):
        activations(llama, ["a", ""], "layers.1")
    with pytest.raises(TypeError, match="chat is True or False, not 'yes'"):
        activations(llama, ["a"], "layers.1", chat="yes")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="skip_bos is True or False, not 1"):
        mean_activations(llama, ["a"], "layers.1", skip_bos=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at='first' chooses no token .*skip_bos=False"):
        mean_activations(llama, ["a"], "layers.1", at="first")


def test_an_estimate_takes_what_extract_takes(llama: InterpretableModel) -> None:
    sides = {"positive": ["abc", "de"], "negative": ["f"]}
    apart = estimate(llama, **sides)
    marked = estimate(llama, texts=["f", "abc", "de"], labels=[0, 1, 1], seed=3)
    assert (marked.texts, marked.tokens, marked.batches) == (apart.texts, apart.tokens, apart.batches)
    with_background = estimate(llama, **sides, background=["abcdefgh", "x"], method="mean_centred")
    assert (with_background.texts, with_background.tokens, with_background.batches) == (5, 9 + 9 + 2, 2)
    assert with_background.batch_bytes > apart.batch_bytes
    with pytest.raises(ValueError, match="mean_difference takes no background set"):
        estimate(llama, **sides, background=["a"])
    with pytest.raises(ValueError, match="pca_difference needs matched pairs"):
        estimate(llama, **sides, method="pca_difference")
    with pytest.raises(ValueError, match="memory is a number of bytes"):
        estimate(llama, **sides, memory="1GB")  # type: ignore[arg-type]


# -- numbers that are none -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken() -> InterpretableModel:
    """A model whose layers give NaN from layer 2 on."""
    made = tiny.build("llama")
    projection = made.layers[2].mlp.down_proj
    projection.weight = projection.weight * float("nan")
    return InterpretableModel(made, tokenizer())


@pytest.mark.parametrize(
    "method", ["mean_difference", "pca_difference", "pca_centre", "probe", "lat", "whitened", "single"]
)
def test_activations_that_are_nan_are_refused_with_their_place(broken: InterpretableModel, method: str) -> None:
    said = r"the activations at layers\.2 hold NaN or infinite values"
    with pytest.raises(ValueError, match=said):
        extract(broken, PAIRS[:1] if method == "single" else PAIRS, method=method)
    assert extract(broken, PAIRS, layers=[0, 1]).layers == [0, 1]


def test_activations_that_are_nan_tell_nothing_apart(broken: InterpretableModel) -> None:
    with pytest.raises(ValueError, match=r"the activations at layers\.3 hold NaN"):
        separation(broken, SteeringVector({1: mx.ones(64), 3: mx.ones(64)}), PAIRS)
    with pytest.raises(ValueError, match=r"the activations at layers\.2 hold NaN"):
        extract(broken, positive=["a"], background=["b"], method="mean_centred")


@pytest.mark.parametrize(
    ("give", "sentence"),
    [
        (lambda d: d * (1 + 2j), "complex128"),
        (lambda d: [[1], [1, 2]], "list"),
        (lambda d: None, "NoneType"),
        (lambda d: "x", "str"),
    ],
    ids=["complex", "ragged", "nothing", "a text"],
)
def test_a_method_gives_real_numbers(llama: InterpretableModel, give: Callable[[Any], Any], sentence: str) -> None:
    def odd(readings: Any) -> Any:
        return give(readings.difference)

    with pytest.raises((TypeError, ValueError), match=rf"odd gave .*{sentence}.*; directions are .*\(4, 64\)"):
        extract(llama, PAIRS, method=odd)


def test_a_method_may_give_an_array_of_mlx(llama: InterpretableModel) -> None:
    made = extract(llama, PAIRS, method=lambda r: mx.array(r.difference, dtype=mx.bfloat16))
    assert made.cosine(extract(llama, PAIRS))[2] > 0.999


def test_places_of_several_widths_make_no_vector() -> None:
    wrapped = InterpretableModel(tiny.build("gemma4_text", global_head_dim=32), tokenizer())
    said = r"layers\.0\.self_attn\.q_proj has 64 features and layers\.1\.self_attn\.q_proj 128"
    for attempt in (extract, estimate):
        with pytest.raises(ValueError, match=said + ".*: extract layers of one width at a time"):
            attempt(wrapped, PAIRS, site="layers.{layer}.self_attn.q_proj")
    assert extract(wrapped, PAIRS, site="layers.{layer}.self_attn.q_proj", layers=[1, 3]).width == 128
    vector = SteeringVector(dict.fromkeys(range(3), mx.ones(64)), "layers.{layer}.self_attn.q_proj")
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj of gemma4_text of width 128"):
        vector.check(wrapped)


def test_a_width_that_only_a_forward_knows_is_looked_at(llama: InterpretableModel) -> None:
    with pytest.raises(ValueError, match=r"the vector is of width 8, and layers\.0\.self_attn of width 64"):
        separation(llama, SteeringVector({0: mx.ones(8)}, "layers.{layer}.self_attn"), PAIRS)


def test_the_area_under_the_curve_takes_no_matrix_of_all_pairs() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 50, 30_000) + 3, rng.integers(0, 50, 20_000)
    tracemalloc.start()
    found = auroc(a, b)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
    assert found == pytest.approx(roc_auc_score([1] * len(a) + [0] * len(b), [*a, *b]), abs=1e-12)


def test_norms_and_lengths_of_a_vector_by_position() -> None:
    """Its length is its longest row's, and what is scaled keeps its rows' proportions: a row of zeros stays zero."""
    rows = np.array([[0, 0, 0], [3, 4, 0], [0, 0, 10]])
    v = SteeringVector({2: mx.array(rows)}, residual_norms={2: 8.0})
    assert v.norms == {2: 10.0}
    np.testing.assert_allclose(np.array(v.normalized()[2]), rows / 10, rtol=1e-6)
    assert v.normalized().norms == {2: pytest.approx(1)}
    (added,) = v.at(2, 0.5, unit="residual").values()
    np.testing.assert_allclose(0.5 * np.array(added.vectors), rows / 10 * 4, rtol=1e-6)
    w = SteeringVector({2: mx.array(rows[::-1].copy())})
    assert v.cosine(w)[2] == pytest.approx((rows * rows[::-1]).sum() / (rows**2).sum())
    left = np.array(v.orthogonal_to(w)[2], np.float64)
    assert (left * rows[::-1]).sum() == pytest.approx(0, abs=1e-5)
    half, same = to_mean_norm([v, 3 * v])
    np.testing.assert_allclose(np.array(half[2]), 2 * rows, rtol=1e-6)
    np.testing.assert_allclose(np.array(same[2]), 2 * rows, rtol=1e-6)
