"""Prompt caches: kept in files with what steered them, their history, and clean ones that many steerings share."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny
from mlx_lm.models import cache as mlx_lm_caches
from mlx_lm.models.cache import BatchKVCache, KVCache, make_prompt_cache, trim_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tiny import by_hand, logprobs

import mlxsteer as ms
from mlxsteer import InterpretableModel, PartlySteered, PositionError, SteeredCacheError, after
from mlxsteer import interventions as iv
from mlxsteer.caches import KEY

PROMPT = [7, 31, 52, 18, 77, 23, 9, 64]
CLEAN, REST = PROMPT[:5], PROMPT[5:]
LAYER = 2
SITE = f"layers.{LAYER}"


@pytest.fixture(params=["llama", "gpt2", "mamba2", "gemma3_text"], scope="module")
def model(request: pytest.FixtureRequest, tokenizer: TokenizerWrapper) -> InterpretableModel:
    return InterpretableModel(tiny.build(request.param), tokenizer)


@pytest.fixture(scope="module")
def llama(tokenizer: TokenizerWrapper) -> InterpretableModel:
    return InterpretableModel(tiny.build("llama"), tokenizer)


def vector(seed: int = 3) -> mx.array:
    mx.random.seed(seed)
    return 2 * mx.random.normal((64,))


def steer(at: Any = "last", seed: int = 3, strength: float = 1.0, key: str = SITE) -> dict[str, Any]:
    return {key: iv.add_vector(vector(seed), strength, at=at)}


as_mlx_lm: Any = eval("lambda model, ids, cache: model(ids, cache=cache)", {"__name__": "mlx_lm.generate"})
"""A forward as mlx-lm's generators call it: how they read a cache says where a prompt ends."""


def run(pieces: Iterator[Any]) -> tuple[list[int], mx.array]:
    seen = list(pieces)
    return [p.token for p in seen], mx.stack([p.logprobs for p in seen])


def recompute(
    model: InterpretableModel, prompt: list[int], made: list[int], shift: Callable[[int], mx.array]
) -> mx.array:
    """Log-probabilities at each step from the whole sequence without a cache; `shift` is what position i gets."""
    rows = []
    for step in range(len(made)):
        ids = prompt + made[:step]
        added = mx.stack([shift(i) for i in range(len(ids))])[None]
        with by_hand(model.model.layers[LAYER], lambda h, added=added: h + added):
            rows.append(logprobs(model.model(mx.array([ids]))[0, -1]))
    return mx.stack(rows)


def filled(model: InterpretableModel, tokens: list[int] = CLEAN) -> list[Any]:
    """A cache that mlx-lm filled clean."""
    cache: list[Any] = make_prompt_cache(model.model)
    mx.eval(model.model(mx.array([tokens]), cache=cache), [c.state for c in cache])
    return cache


# -- files -----------------------------------------------------------------------------------------------------------


def test_a_loaded_cache_goes_on_bit_for_bit(model: InterpretableModel, tmp_path: Path) -> None:
    cache, path = make_prompt_cache(model.model), tmp_path / "cache.safetensors"
    model.generate(PROMPT, steer(), max_tokens=4, prompt_cache=cache)
    ms.save_prompt_cache(path, cache, {"topic": "villa", "a.b": "c"})
    loaded, metadata = ms.load_prompt_cache(path, return_metadata=True)
    path.write_bytes(bytes(path.stat().st_size))  # what was loaded stays, whatever becomes of the file
    assert metadata == {"topic": "villa", "a.b": "c"}
    assert ms.cache_history(loaded) == ms.cache_history(cache)
    one, two = (run(model.stream(REST, steer(after((18, 77))) | steer(), max_tokens=4, prompt_cache=c))
                for c in (cache, loaded))  # fmt: skip
    assert one[0] == two[0]
    assert mx.array_equal(one[1], two[1])


@pytest.mark.parametrize("at", ["last", "generated", -1, after((18, 77)), after("text")])
def test_other_code_goes_on_from_a_loaded_cache_in_the_midst_of_a_text(
    llama: InterpretableModel, tmp_path: Path, at: Any
) -> None:
    if at == after("text"):  # random ids have a text too
        at = after(llama.decode(PROMPT[2:4]))
    cache, path = make_prompt_cache(llama.model), tmp_path / "cache.safetensors"
    llama.generate(PROMPT, steer(at), max_tokens=2, prompt_cache=cache)
    ms.save_prompt_cache(path, cache)
    loaded = ms.load_prompt_cache(path)
    ms.save_prompt_cache(path, loaded)  # once more, as it came
    again = ms.load_prompt_cache(path)
    ids = mx.array([[5]])
    with llama.steer(steer(at)):
        expected = [llama.model(ids, cache=cache) for _ in range(3)]
        for other in (loaded, again):
            assert all(mx.array_equal(e, llama.model(ids, cache=other)) for e in expected)
    assert ms.cache_history(loaded) == ms.cache_history(cache)


@pytest.mark.parametrize("at", ["last", -2, after((23, 9)), after("text")])
def test_a_prompt_read_in_part_goes_on_from_a_file(llama: InterpretableModel, tmp_path: Path, at: Any) -> None:
    if at == after("text"):
        at = after(llama.decode(PROMPT[5:7]))
    cache, path = make_prompt_cache(llama.model), tmp_path / "cache.safetensors"
    with llama.steer(steer(at), prompt_tokens=PROMPT):
        llama.model(mx.array([CLEAN]), cache=cache)
    ms.save_prompt_cache(path, cache)
    with llama.steer(steer(at)):
        expected, found = (llama.model(mx.array([REST]), cache=c) for c in (cache, ms.load_prompt_cache(path)))
    assert mx.array_equal(expected, found)
    with llama.trace(PROMPT, interventions=steer(at)):
        assert mx.abs(found[0, -1] - llama.output[0, -1]).max().item() <= 1e-4


@pytest.mark.filterwarnings("ignore::mlxsteer.NothingTouched")  # a generated token that is taken for a prompt's
@pytest.mark.parametrize("read", [True, False])
def test_saving_leaves_a_running_text_as_it_is(llama: InterpretableModel, tmp_path: Path, read: bool) -> None:
    """mlx-lm's prompt is told from what it generates by when it reads the cache's state."""
    cache, path, ids = make_prompt_cache(llama.model), tmp_path / "cache.safetensors", mx.array([[5]])
    with llama.steer(steer("generated")):
        as_mlx_lm(llama.model, mx.array([PROMPT]), cache)
        if read:
            mx.eval([c.state for c in cache])
        twin = copy.deepcopy(cache)
        ms.save_prompt_cache(path, cache)
        first, second, third = (as_mlx_lm(llama.model, ids, c) for c in (twin, cache, ms.load_prompt_cache(path)))
    assert mx.array_equal(first, second)
    assert mx.array_equal(first, third)
    plain = llama.model(ids, cache=filled(llama, PROMPT))
    assert (mx.abs(first - plain).max().item() < 1e-4) == read


@pytest.mark.parametrize("opens", [True, False])
def test_what_a_gate_decided_is_kept(llama: InterpretableModel, tmp_path: Path, opens: bool) -> None:
    gate = {SITE: iv.when(iv.cosine(vector(5)) > (-2 if opens else 2), iv.add_vector(vector()))}
    cache, path = make_prompt_cache(llama.model), tmp_path / "cache.safetensors"
    llama.generate(PROMPT, gate, max_tokens=2, prompt_cache=cache)
    ms.save_prompt_cache(path, cache)
    loaded = ms.load_prompt_cache(path)
    with llama.steer(gate):
        expected, found = (llama.model(mx.array([[5]]), cache=c) for c in (cache, loaded))
    assert mx.array_equal(expected, found)


def test_a_span_is_followed_through_a_file(llama: InterpretableModel, tmp_path: Path) -> None:
    spans = {SITE: iv.add_vector(vector(), exclude=iv.inside(9, 5))}  # the prompt ends inside of it
    cache, path = filled(llama, [1]), tmp_path / "cache.safetensors"
    llama.generate(PROMPT, spans, max_tokens=1, prompt_cache=cache)
    ms.save_prompt_cache(path, cache)
    loaded = ms.load_prompt_cache(path)
    with llama.steer(spans):
        for token in (8, 5, 6):
            expected, found = (llama.model(mx.array([[token]]), cache=c) for c in (cache, loaded))
            assert mx.array_equal(expected, found)
    loaded = ms.load_prompt_cache(path)
    trim_prompt_cache(loaded, 1)
    with llama.steer(spans), pytest.raises(PositionError, match="trimmed"):
        llama.model(mx.array([[5]]), cache=loaded)


def test_a_loaded_cache_is_refused_by_whoever_did_not_fill_it(llama: InterpretableModel, tmp_path: Path) -> None:
    cache, path = make_prompt_cache(llama.model), tmp_path / "cache.safetensors"
    llama.generate(PROMPT, steer(), max_tokens=2, prompt_cache=cache)
    ms.save_prompt_cache(path, cache)
    ids = mx.array([[5]])
    for other in (steer(seed=4), steer(key="layers.1"), steer(at="all"), steer() | steer(key="layers.1")):
        loaded = ms.load_prompt_cache(path)
        with pytest.raises(SteeredCacheError, match="another steering"):
            llama.generate(REST, other, max_tokens=2, prompt_cache=loaded)
        with pytest.raises(SteeredCacheError, match="another steering"), llama.steer(other):
            llama.model(ids, cache=loaded)
    for bare in (lambda c: llama.generate(REST, max_tokens=2, prompt_cache=c), lambda c: llama.model(ids, cache=c)):
        with pytest.raises(SteeredCacheError, match="filled under steering"):
            bare(ms.load_prompt_cache(path))


def test_a_loaded_batch_keeps_its_rows(llama: InterpretableModel, tmp_path: Path) -> None:
    cache: list[Any] = [BatchKVCache([2, 0]) for _ in llama.layers]
    rows = mx.array([[0, 0, *CLEAN[:3]], CLEAN])
    with llama.steer(steer([1, 6])):
        llama.model(rows, cache=cache)
        ms.save_prompt_cache(tmp_path / "cache.safetensors", cache)
        loaded = ms.load_prompt_cache(tmp_path / "cache.safetensors")
        one, two = (llama.model(mx.array([[9, 8, 7, 6], [5, 4, 3, 2]]), cache=c) for c in (cache, loaded))
    assert mx.array_equal(one, two)
    assert [[span["stop"] for span in row] for row in ms.cache_history(loaded)] == [[7], [9]]


def test_mlx_lm_itself_refuses_a_steered_cache_in_a_file(llama: InterpretableModel, tmp_path: Path) -> None:
    cache = make_prompt_cache(llama.model)
    llama.generate(PROMPT, steer(), max_tokens=2, prompt_cache=cache)
    ours, theirs = str(tmp_path / "ours.safetensors"), str(tmp_path / "theirs.safetensors")
    ms.save_prompt_cache(ours, cache)
    mlx_lm_caches.save_prompt_cache(theirs, cache)
    for path in (ours, theirs):
        with pytest.raises(KeyError, match="SteeredKVCache"):
            mlx_lm_caches.load_prompt_cache(path)
    with pytest.raises(ValueError, match=r"without what steered it: save it by mlxsteer\.save_prompt_cache"):
        ms.load_prompt_cache(theirs)


def test_a_clean_cache_is_kept_with_its_tokens(model: InterpretableModel, tmp_path: Path) -> None:
    path = str(tmp_path / "cache.safetensors")
    clean = ms.fill_prompt_cache(model, CLEAN)
    ms.save_prompt_cache(path, clean)
    expected, found, plain = (
        run(model.stream(REST, s, max_tokens=3, prompt_cache=c))
        for s, c in ((steer(after((64,))), clean), (steer(after((64,))), ms.load_prompt_cache(path)),
                     (None, mlx_lm_caches.load_prompt_cache(path)))
    )  # fmt: skip
    assert mx.array_equal(expected[1], found[1])
    assert mx.array_equal(plain[1], run(model.stream(REST, max_tokens=3, prompt_cache=filled(model)))[1])


def test_files_that_are_no_such_cache_are_refused(llama: InterpretableModel, tmp_path: Path) -> None:
    cache, path = make_prompt_cache(llama.model), tmp_path / "cache.safetensors"
    llama.generate(PROMPT, steer(), max_tokens=2, prompt_cache=cache)
    ms.save_prompt_cache(path, cache)
    whole = path.read_bytes()
    arrays, metadata = mx.load(str(path), return_metadata=True)
    mx.eval(arrays)
    name = next(n for n in metadata if n.endswith(KEY))

    def changed(**values: Any) -> None:
        data = {**json.loads(metadata[name]), **values}
        mx.save_safetensors(str(path), arrays, metadata | {name: json.dumps(data)})

    with pytest.raises(FileNotFoundError, match="no file"):
        ms.load_prompt_cache(tmp_path / "none.safetensors")
    for size in (3, len(whole) // 2, len(whole) - 8):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="no complete safetensors file|damaged"):
            ms.load_prompt_cache(path)
    mlx_lm_caches.save_prompt_cache(str(path), filled(llama))
    with pytest.raises(ValueError, match="no prompt cache that mlxsteer saved"):
        ms.load_prompt_cache(path)
    changed(version=2)
    with pytest.raises(ValueError, match="of version 2; this mlxsteer reads up to 1"):
        ms.load_prompt_cache(path)
    for wrong in ({"rows": None}, {"rows": [{}]}, {"version": "x"}, {"metadata": 3}, {"rows": [1]}):
        changed(**wrong)
        with pytest.raises(ValueError, match="damaged"):
            ms.load_prompt_cache(path)
    rows = json.loads(metadata[name])["rows"]
    changed(rows=[rows[0] | {"history": [[0, [[1.0, 2.0]]]]}])
    with pytest.raises(ValueError, match="history tells of other steerings"):
        ms.load_prompt_cache(path)
    mx.save_safetensors(str(path), {}, metadata)
    with pytest.raises(ValueError, match="damaged"):
        ms.load_prompt_cache(path)
    changed(mlx_lm="0.1", rows=[1])
    with pytest.raises(ValueError, match=r"mlx-lm 0\.1 wrote it"):
        ms.load_prompt_cache(path)


@pytest.mark.parametrize("wrong", ["x", Path("c.safetensors"), None, 3, [1, 2], {"cache": 1}])
def test_what_is_no_prompt_cache_is_refused(wrong: Any, tmp_path: Path) -> None:
    for use in (ms.cache_history, lambda cache: ms.save_prompt_cache(tmp_path / "c.safetensors", cache)):
        with pytest.raises(TypeError, match="a prompt cache is a list of mlx-lm's caches"):
            use(wrong)
        with pytest.raises(ValueError, match="a prompt cache is empty: fill_prompt_cache"):
            use([])


def test_a_path_comes_before_a_cache(llama: InterpretableModel, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"save_prompt_cache\(path, cache\): a path is a text or a Path, not list"):
        ms.save_prompt_cache(filled(llama), tmp_path / "c.safetensors")  # type: ignore[arg-type]


@pytest.mark.parametrize("step", [0, -1, 2.5, True, "3"])
def test_a_cache_is_filled_in_steps_of_tokens(llama: InterpretableModel, step: Any) -> None:
    with pytest.raises(ValueError, match="prefill_step_size is a whole number from 1 on"):
        ms.fill_prompt_cache(llama, CLEAN, prefill_step_size=step)


def test_what_cannot_be_kept_is_refused_when_saving(llama: InterpretableModel, tmp_path: Path) -> None:
    path = tmp_path / "cache.safetensors"
    for what in (lambda h: h * 0.5, iv.add_vector(vector(), at=lambda ids: [0]), [iv.scale(2.0), lambda h: h]):
        cache = make_prompt_cache(llama.model)
        llama.generate(PROMPT, {SITE: what}, max_tokens=2, prompt_cache=cache)
        with pytest.raises(ValueError, match=r"layers\.2 by what can't be recognised"):
            ms.save_prompt_cache(path, cache)
    with pytest.raises(ValueError, match=r"\.safetensors file"):
        ms.save_prompt_cache(tmp_path / "cache", filled(llama))
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        ms.save_prompt_cache(tmp_path / "none" / "cache.safetensors", filled(llama))
    with pytest.raises(ValueError, match="which is ours"):
        ms.save_prompt_cache(path, filled(llama), {KEY: ""})
    with pytest.raises(TypeError, match="dict of texts"):
        ms.save_prompt_cache(path, filled(llama), {"n": 3})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="can't load a cache of Own"):
        ms.save_prompt_cache(path, [type("Own", (KVCache,), {})()])
    padded: list[Any] = [BatchKVCache([0, 0]) for _ in llama.layers]
    with llama.steer(steer("all")):
        llama.model(mx.array([REST, REST]), cache=padded)
    for entry in padded:
        entry.prepare(lengths=[3, 1], right_padding=[0, 2])
    with pytest.raises(ValueError, match="in the midst of a prefill"):
        ms.save_prompt_cache(path, padded)
    assert not list(tmp_path.iterdir())


# -- history ---------------------------------------------------------------------------------------------------------


def test_a_history_says_how_strongly_each_token_was_steered(llama: InterpretableModel) -> None:
    """Recomputed from the history alone, every step is what was generated."""
    cache: list[Any] = make_prompt_cache(llama.model)
    both = iv.create("compose", steps=[iv.add_vector(vector(3)), iv.add_vector(vector(4), -2.0)], strength=0.5)
    made, steps = [], []
    with llama.steer(mood={SITE: both}, prompt_tokens=PROMPT) as steering:
        pieces = mlx_lm.stream_generate(llama.model, llama.tokenizer, PROMPT, max_tokens=7, prompt_cache=cache)
        for n, piece in enumerate(pieces):
            made.append(piece.token)
            steps.append(piece.logprobs)
            steering["mood"].strength = {1: 0.0, 2: 0.0, 4: -1.5}.get(n, steering["mood"].strength)
    (spans,) = ms.cache_history(cache)
    strengths = np.zeros((spans[-1]["stop"], 2))
    for span in spans:
        strengths[span["start"] : span["stop"]] = [edit["strength"] for edit in span["edits"]]
    assert [span["start"] for span in spans] == [0, 10, 13]  # the token after the next
    assert len(strengths) == cache[0].offset
    vectors = [vector(3), vector(4)]
    expected = recompute(
        llama, PROMPT, made, lambda i: sum(s * v for s, v in zip(strengths[i].tolist(), vectors, strict=True))
    )
    assert mx.abs(mx.stack(steps) - expected).max().item() <= 1e-4
    edit = spans[0]["edits"][1]
    assert {name: edit[name] for name in ("steering", "key", "intervention", "strength")} == {
        "steering": "mood", "key": SITE, "intervention": "add_vector", "strength": -1.0,
    }  # fmt: skip
    assert json.loads(json.dumps(spans)) == spans


def test_another_strength_goes_on_and_is_recorded(llama: InterpretableModel, tmp_path: Path) -> None:
    cache, path = filled(llama), tmp_path / "cache.safetensors"
    first = llama.generate(REST, steer("all"), max_tokens=2, prompt_cache=cache)
    ms.save_prompt_cache(path, cache)
    for goes_on in (cache, ms.load_prompt_cache(path)):
        second, steps = run(llama.stream([11, 12], steer("all", strength=-0.5), max_tokens=3, prompt_cache=goes_on))
        llama.generate([13], steer("all", strength=-0.5), max_tokens=1, prompt_cache=goes_on)
        (spans,) = ms.cache_history(goes_on)
        found = [(s["start"], s["stop"], [edit["strength"] for edit in s["edits"]]) for s in spans]
        assert found == [(0, 5, []), (5, 10, [1.0]), (10, 17, [-0.5])]
        assert len({edit["fingerprint"] for s in spans for edit in s["edits"]}) == 1
        parts = np.repeat([0, 1.0, -0.5], [5, 5, 7]).tolist()
        expected = recompute(
            llama, [*PROMPT, *first.tokens, 11, 12], second, lambda i, parts=parts: parts[i] * vector()
        )
        assert mx.abs(steps - expected).max().item() <= 1e-4


def test_a_history_is_cut_and_copied_with_its_cache(llama: InterpretableModel) -> None:
    cache = make_prompt_cache(llama.model)
    llama.generate(PROMPT, steer("all"), max_tokens=2, prompt_cache=cache)
    twin = copy.deepcopy(cache)
    llama.generate([4], steer("all", strength=2.0), max_tokens=2, prompt_cache=twin)
    assert [s["start"] for s in ms.cache_history(twin)[0]] == [0, 10]
    assert [s["start"] for s in ms.cache_history(cache)[0]] == [0]
    trim_prompt_cache(twin, 4)
    assert [(s["start"], s["stop"]) for s in ms.cache_history(twin)[0]] == [(0, 9)]
    llama.generate([4], steer("all", strength=2.0), max_tokens=1, prompt_cache=twin)
    assert [(s["start"], s["stop"]) for s in ms.cache_history(twin)[0]] == [(0, 9), (9, 11)]


def test_clean_caches_have_a_history_too(llama: InterpretableModel, tokenizer: TokenizerWrapper) -> None:
    assert ms.cache_history(make_prompt_cache(llama.model)) == [[]]
    assert ms.cache_history(filled(llama)) == [[{"start": 0, "stop": 5, "edits": []}]]
    mamba = InterpretableModel(tiny.build("mamba2"), tokenizer)
    assert ms.cache_history(filled(mamba)) == [[{"start": 0, "stop": None, "edits": []}]]
    assert ms.cache_history(ms.fill_prompt_cache(mamba, CLEAN)) == [[{"start": 0, "stop": 5, "edits": []}]]


# -- one clean cache for many steerings --------------------------------------------------------------------------------

LATER: list[Any] = ["generated", "last", after((23,)), -1, [-2, 9], slice(-3, None), lambda ids: [len(ids) - 1]]


def test_many_steerings_go_on_from_copies_of_one_clean_cache(model: InterpretableModel) -> None:
    clean = ms.fill_prompt_cache(model, CLEAN, prefill_step_size=3)
    told = filled(model)
    for number, at in enumerate(LATER):
        own = steer(at, seed=number)
        whole, steps = run(model.stream(PROMPT, own, max_tokens=4))
        for options in ({"prompt_cache": copy.deepcopy(clean)},
                        {"prompt_cache": copy.deepcopy(told), "cached_tokens": mx.array(CLEAN)}):  # fmt: skip
            made, found = run(model.stream(REST, own, max_tokens=4, **options))
            assert made == whole
            assert mx.abs(found - steps).max().item() <= 1e-4
    plain = run(model.stream(REST, max_tokens=4, prompt_cache=clean))
    other = run(model.stream(REST, max_tokens=4, prompt_cache=told))
    assert mx.abs(plain[1] - other[1]).max().item() <= 1e-5  # filled in other chunks


def test_a_text_generated_clean_is_known_to_its_cache(model: InterpretableModel) -> None:
    cache = make_prompt_cache(model.model)
    first = model.generate(CLEAN, max_tokens=2, prompt_cache=cache)
    second = model.generate(REST, max_tokens=1, prompt_cache=cache)
    before = [*CLEAN, *first.tokens, *REST, *second.tokens]
    prompt = [*before, 41, 42]
    own = steer(lambda ids: [len(ids) - 1] if ids == prompt else [])
    steered = model.generate([41, 42], own, max_tokens=3, prompt_cache=cache, logprobs=True)
    assert steered.touched[:3] == [False, True, False]
    assert steered.prompt_tokens == [41, 42]
    scratch = model.generate(prompt, own, max_tokens=3, logprobs=True)
    assert mx.abs(steered.logprobs - scratch.logprobs).max().item() <= 1e-4


def test_a_stream_that_is_left_early_is_known_as_far_as_it_went(llama: InterpretableModel) -> None:
    for own in (None, steer("all")):
        cache = make_prompt_cache(llama.model)
        pieces = llama.stream(PROMPT, own, max_tokens=9, prompt_cache=cache)
        made = [next(pieces).token for _ in range(3)]  # type: ignore[call-overload]
        pieces.close()  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match="holds 11 others"):
            llama.generate([1], own, max_tokens=1, prompt_cache=cache, cached_tokens=[0] * 11)
        llama.generate([1], own, max_tokens=1, prompt_cache=cache, cached_tokens=[*PROMPT, *made])


def test_tokens_are_forgotten_where_others_fill_the_cache(llama: InterpretableModel) -> None:
    ask = steer(after((23,)))

    def refused(cache: list[Any], rest: list[int]) -> None:
        offset = cache[0].offset
        with pytest.raises(PositionError, match=rf"holds {offset} tokens that other code .* cached_tokens=ids"):
            llama.generate(rest, ask, max_tokens=2, prompt_cache=cache)
        assert [c.offset for c in cache] == [offset] * len(cache)

    refused(filled(llama), REST)
    clean = ms.fill_prompt_cache(llama, CLEAN)
    llama.model(mx.array([[5]]), cache=clean)
    trim_prompt_cache(clean, 1)
    refused(clean, REST)  # as long as before
    clean = ms.fill_prompt_cache(llama, PROMPT)
    trim_prompt_cache(clean, 3)
    one, two = (run(llama.stream(REST, ask, max_tokens=3, prompt_cache=c)) for c in (clean, None))
    assert one[0] == run(llama.stream(PROMPT, ask, max_tokens=3))[0]
    with pytest.raises(PositionError, match="no such tokens"):
        llama.generate(CLEAN, ask, max_tokens=2, prompt_cache=ms.fill_prompt_cache(llama, CLEAN))
    assert two is not None


def test_a_cache_of_which_the_steering_is_gone_is_clean_again(llama: InterpretableModel, tmp_path: Path) -> None:
    def refused() -> list[Any]:
        cache = filled(llama)
        with pytest.raises(PositionError, match="lies wholly within"), llama.steer(steer(1)):
            llama.model(mx.array([REST]), cache=cache)
        return cache

    def trimmed() -> list[Any]:
        cache = filled(llama, PROMPT[:3])
        llama.generate(PROMPT[3:], steer("generated", seed=4), max_tokens=1, prompt_cache=cache)
        ms.save_prompt_cache(tmp_path / "cache.safetensors", cache)
        cache = ms.load_prompt_cache(tmp_path / "cache.safetensors")
        trim_prompt_cache(cache, 6)
        with llama.steer(steer("generated", seed=5), prompt_tokens=PROMPT[3:]):
            llama.model(mx.array([PROMPT[3:5]]), cache=cache)
        trim_prompt_cache(cache, 2)
        return cache

    for make, rest in ((refused, REST), (trimmed, PROMPT[3:])):
        bare, foreign = make(), make()
        assert mx.array_equal(llama.model(mx.array([rest]), cache=bare),
                              llama.model(mx.array([rest]), cache=filled(llama, PROMPT[: -len(rest)])))  # fmt: skip
        assert type(bare[0]) is KVCache
        with llama.steer(steer("last"), prompt_tokens=rest):
            made, found = run(
                mlx_lm.stream_generate(llama.model, llama.tokenizer, rest, max_tokens=3, prompt_cache=foreign)
            )
        whole = run(llama.stream(PROMPT, steer("last"), max_tokens=3))
        assert made == whole[0]
        assert mx.abs(found - whole[1]).max().item() <= 1e-4


@pytest.mark.filterwarnings("ignore::mlxsteer.NothingTouched")
@pytest.mark.parametrize("ids", [[5], [*REST, *PROMPT]])
def test_a_prompt_trimmed_away_is_forgotten(llama: InterpretableModel, ids: list[int]) -> None:
    cache, clean = filled(llama, PROMPT[:3]), filled(llama, PROMPT[:3])
    llama.generate(PROMPT[3:], steer("all", seed=4), max_tokens=1, prompt_cache=cache)
    trim_prompt_cache(cache, 6)
    with llama.steer(steer("generated")):  # one token is a generated one, several at once are the next prompt
        found, expected = (as_mlx_lm(llama.model, mx.array([ids]), c) for c in (cache, clean))
    assert mx.array_equal(found, expected)
    plain = llama.model(mx.array([ids]), cache=filled(llama, PROMPT[:3]))
    assert mx.array_equal(found, plain) == (len(ids) > 1)


def test_a_cache_trimmed_and_steered_again_is_no_clean_one(llama: InterpretableModel) -> None:
    cache = ms.fill_prompt_cache(llama, CLEAN)
    llama.generate([4], steer("all"), max_tokens=1, prompt_cache=cache)
    trim_prompt_cache(cache, 4)
    with llama.steer(steer("all", seed=4)):
        llama.model(mx.array([[8, 9]]), cache=cache)
    assert [span["start"] for span in ms.cache_history(cache)[0]] == [0, 3]
    with pytest.raises(SteeredCacheError, match="filled under steering"):
        llama.model(mx.array([[8]]), cache=cache)
    llama.generate([4], steer("all", seed=4), max_tokens=1, prompt_cache=cache, cached_tokens=[*PROMPT[:3], 8, 9])


def test_a_clean_cache_is_what_mlx_lm_made(llama: InterpretableModel) -> None:
    cache = ms.fill_prompt_cache(llama, CLEAN)
    assert isinstance(cache[0], KVCache)
    assert type(pickle.loads(pickle.dumps(cache))[0]) is KVCache
    twin = copy.copy(cache[0])
    llama.model(mx.array([[5]]), cache=cache)
    assert type(cache[0]) is KVCache
    assert twin.offset == 5


def test_cached_tokens_are_those_of_a_cache(llama: InterpretableModel) -> None:
    with pytest.raises(ValueError, match="4 ids, and the prompt cache holds 5 tokens"):
        llama.generate(REST, steer(), max_tokens=1, prompt_cache=filled(llama), cached_tokens=CLEAN[:4])
    with pytest.raises(ValueError, match="and none is given"):
        llama.generate(REST, steer(), max_tokens=1, cached_tokens=CLEAN)
    with pytest.raises(TypeError, match="for a list of prompts"):
        llama.generate([REST], steer(), max_tokens=1, cached_tokens=CLEAN)
    with pytest.raises(ValueError, match="holds 2 rows"):
        llama.generate(REST, steer(), max_tokens=1, prompt_cache=[BatchKVCache([0, 0]) for _ in llama.layers])


def test_a_cache_that_other_code_filled_steered_is_told_its_tokens_too(llama: InterpretableModel) -> None:
    cache, own = make_prompt_cache(llama.model), steer(after((52,)))
    with llama.steer(own, prompt_tokens=CLEAN):
        llama.model(mx.array([CLEAN]), cache=cache)
    with pytest.raises(PositionError, match="cached_tokens=ids"):
        llama.generate(REST, own, max_tokens=3, prompt_cache=copy.deepcopy(cache))
    made, found = run(llama.stream(REST, own, max_tokens=3, prompt_cache=cache, cached_tokens=CLEAN))
    whole, steps = run(llama.stream(PROMPT, own, max_tokens=3))
    assert made == whole
    assert mx.abs(found - steps).max().item() <= 1e-4


def test_a_state_space_cache_of_other_code_is_told_its_tokens(tokenizer: TokenizerWrapper) -> None:
    mamba = InterpretableModel(tiny.build("mamba2"), tokenizer)
    cache = filled(mamba)
    with pytest.raises(SteeredCacheError, match="cached_tokens="):
        mamba.generate(REST, steer(), max_tokens=1, prompt_cache=cache)
    plain = mamba.generate(REST, max_tokens=3, prompt_cache=cache)
    assert plain.tokens == mamba.generate(PROMPT, max_tokens=3).tokens


@pytest.mark.parametrize("at", [1, "first", -6, slice(0, 5), after((18,))])
def test_a_position_within_a_clean_cache_is_refused(llama: InterpretableModel, at: Any) -> None:
    cache = ms.fill_prompt_cache(llama, CLEAN)
    if isinstance(at, after):  # a list of positions, of which none is left
        at = [0, 4]
    with pytest.raises(PositionError, match="lies wholly within the 5 tokens that this prompt cache holds"):
        llama.generate(REST, steer(at), max_tokens=2, prompt_cache=cache)
    assert [c.offset for c in cache] == [5] * 4
    with pytest.raises(PositionError, match="lies wholly within"), llama.steer(steer(at), prompt_tokens=REST):
        mlx_lm.generate(llama.model, llama.tokenizer, REST, max_tokens=2, prompt_cache=cache)
    assert [c.offset for c in cache] == [5] * 4
    llama.generate(REST, steer(at, strength=0.0), max_tokens=2, prompt_cache=copy.deepcopy(cache))
    late = {SITE: iv.add_vector(vector(), at=[1, 9], schedule=iv.window(1, 3))}  # 1 is none of its positions
    llama.generate(REST, late, max_tokens=2, prompt_cache=cache)


@pytest.mark.parametrize("at", ["prompt", [1, -1], slice(1, None), after((18,))])
def test_a_position_partly_within_a_clean_cache_is_warned_of_once(llama: InterpretableModel, at: Any) -> None:
    cache = ms.fill_prompt_cache(llama, CLEAN)
    twin = copy.deepcopy(cache)
    own = steer(at) | steer(at, key="layers.0")
    with pytest.warns(
        PartlySteered, match="and 1 more: at=.* also means some of the 5 .* acts from token 5 on"
    ) as caught:
        made = llama.generate(REST, own, max_tokens=2, prompt_cache=cache, logprobs=True)
    assert [w.filename for w in caught] == [__file__]
    llama.generate([5], own, max_tokens=2, prompt_cache=cache)  # filled under it by now
    assert made.touched[:3] == [at != [1, -1], at != [1, -1], True]
    with pytest.warns(PartlySteered), llama.steer(own, prompt_tokens=REST):  # foreign code goes on from it alike
        _, found = run(mlx_lm.stream_generate(llama.model, llama.tokenizer, REST, max_tokens=2, prompt_cache=twin))
    assert mx.allclose(mx.max(found, axis=-1), made.logprobs, atol=1e-4).item()  # it was chosen greedily


# -- learned positions -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def short(tokenizer: TokenizerWrapper) -> InterpretableModel:
    return InterpretableModel(tiny.build("gpt2", n_positions=16), tokenizer)


@pytest.mark.parametrize("own", [None, steer("all")])
def test_generation_ends_where_learned_positions_do(short: InterpretableModel, own: Any) -> None:
    made = short.generate(PROMPT, own)
    assert (len(made.tokens), made.finish_reason) == (8, "length")
    rows = short.generate([PROMPT, PROMPT[:3]], own, max_tokens=[20, 2])
    assert [(len(row.tokens), row.finish_reason) for row in rows] == [(8, "length"), (2, "length")]
    assert rows[0].tokens == made.tokens
    cache = make_prompt_cache(short.model)
    short.generate(PROMPT, own, max_tokens=2, prompt_cache=cache)
    assert len(short.generate([5], own, max_tokens=-1, prompt_cache=copy.deepcopy(cache)).tokens) == 5
    with pytest.raises(ValueError, match="6 tokens behind the 10 .* has 16 learned positions.* give at most 5"):
        short.generate(PROMPT[:6], own, max_tokens=1, prompt_cache=cache)
    assert cache[0].offset == 10
    with pytest.raises(ValueError, match="16 tokens, and the model has 16 learned positions"):
        list(short.stream(PROMPT * 2, own, max_tokens=1))


def test_a_draft_model_has_learned_positions_too(short: InterpretableModel, llama: InterpretableModel) -> None:
    made = llama.generate(PROMPT, max_tokens=20, draft_model=short.model)
    assert (len(made.tokens), made.finish_reason) == (8, "length")
    assert len(llama.generate(PROMPT, max_tokens=20).tokens) == 20
