"""What a generation says of its tokens: which were touched, how much, and where that left them."""

from __future__ import annotations

import copy
import html
import pickle
import re
import threading
import warnings
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from rich.console import Console
from tiny import by_hand

from mlxsteer import Generation, InterpretableModel, NothingTouched, PartlySteered, PositionError, fill_prompt_cache
from mlxsteer import interventions as iv
from mlxsteer.generation import NotFinite
from mlxsteer.touched import Touched

PROMPT = [7, 31, 52, 18, 77, 23, 9, 64]
LAYER, KEY = 1, "layers.1"
SMALL = {"num_hidden_layers": 3}


@pytest.fixture(scope="module")
def llama(tokenizer: TokenizerWrapper) -> InterpretableModel:
    return InterpretableModel(tiny.build("llama", **SMALL), tokenizer)


def vector(seed: int = 3, width: int = 64) -> mx.array:
    mx.random.seed(seed)
    return 2 * mx.random.normal((width,))


V, W = vector(3), vector(4)


def captured(bare: nn.Module, ids: list[int], layer: int) -> np.ndarray:
    """What a block gives for each token, (tokens, D), caught by hand."""
    seen: list[mx.array] = []
    with by_hand(bare.layers[layer], lambda h: seen.append(h) or h):
        mx.eval(bare(mx.array([ids])))
    return np.array(seen[0][0], np.float64)


def unit(v: mx.array) -> np.ndarray:
    return np.array(v, np.float64) / np.linalg.norm(np.array(v, np.float64))


# -- how much, and where -----------------------------------------------------------------------------------------------


def test_amounts_and_projections_are_those_of_numpy(llama: InterpretableModel) -> None:
    """By places in the order in which they act; a later one sees what the earlier one did."""
    steer = {KEY: [iv.add_vector(V, 0.5, at="last"), iv.ablate(W)], "layers.2": iv.scale(1.5, at="prompt")}
    made = llama.generate(PROMPT, steer, max_tokens=4)
    whole = [*PROMPT, *made.tokens]
    places = np.arange(len(whole))
    x = captured(llama.model, whole, LAYER)
    y = x + 0.5 * np.array(V, np.float64) * (places >= len(PROMPT) - 1)[:, None]
    y = y - (y @ unit(W))[:, None] * unit(W)
    with by_hand(llama.model.layers[LAYER], lambda h: mx.array(y.astype(np.float32))[None]):
        z = captured(llama.model, whole, 2)
    first, second = made.touched.touches
    assert [(t.key, t.name) for t in (first, second)] == [(KEY, "compose"), ("layers.2", "scale")]
    for touch, before, after in ((first, x, y), (second, z, z * np.where(places < len(PROMPT), 1.5, 1.0)[:, None])):
        moved = np.linalg.norm(after - before, axis=-1)
        assert np.allclose(touch.amount, moved, atol=1e-4)
        assert np.allclose(touch.share, moved / np.linalg.norm(before, axis=-1), atol=1e-5)
    assert first.projection is None  # of two directions
    assert second.projection is None
    assert np.allclose(made.touched.amount, np.maximum(first.share, second.share))
    assert made.touched == [True] * len(whole)


@pytest.mark.parametrize(
    ("edit", "direction"),
    [(iv.add_vector(V), V), (iv.ablate(W), W), (iv.cap(V, 1.0), V), (iv.clamp(low=0.5, along=W), W),
     (iv.when(iv.cosine(V) > -2, iv.add_vector(W)), W), (iv.zero_out() | iv.add_vector(V), V),
     (iv.mean_replace(V, W), W)],
    ids=lambda edit: getattr(edit, "name", ""),
)  # fmt: skip
def test_a_projection_is_on_the_one_direction_of_what_acts(
    llama: InterpretableModel, edit: iv.Intervention, direction: mx.array
) -> None:
    made = llama.generate(PROMPT, {KEY: edit}, max_tokens=2)
    whole = [*PROMPT, *made.tokens]
    with llama.trace(whole, interventions={KEY: edit}, prompt_tokens=len(PROMPT)) as trace:
        after = np.array(trace.activations[KEY][0], np.float64)
    (touch,) = made.touched.touches
    assert touch.projection is not None
    assert np.allclose(touch.projection, after @ unit(direction), atol=1e-3)


def test_gates_and_spans_say_where_they_acted(llama: InterpretableModel) -> None:
    plain = llama.generate(PROMPT, max_tokens=4)
    readings = captured(llama.model, [*PROMPT, *plain.tokens], LAYER) @ unit(V)
    threshold = float(np.sort(readings)[5:7].mean())
    steer = {KEY: iv.when(iv.projection(V) > threshold, iv.add_vector(W, 0.2), per="token")}
    made = llama.generate(PROMPT, steer, max_tokens=4)
    readings = captured(llama.model, [*PROMPT, *made.tokens], LAYER) @ unit(V)
    assert np.abs(readings - threshold).min() > 1e-4
    assert made.touched == (readings > threshold).tolist()
    assert np.allclose(made.touched.touches[0].amount, (readings > threshold) * np.linalg.norm(0.2 * np.array(W)))
    spans = llama.generate(PROMPT, {KEY: iv.add_vector(W, exclude=(52, 23))}, max_tokens=2)
    assert spans.touched == [True] * 2 + [False] * 4 + [True] * 4
    shut = llama.generate(PROMPT, {KEY: iv.when(iv.cosine(V) > 2, iv.add_vector(W))}, max_tokens=2)
    assert not any(shut.touched)
    assert not shut.touched.amount.any()


def test_what_is_part_of_a_model_is_counted_too(llama: InterpretableModel) -> None:
    """An edited model's own edits act in it; the report is of them and of what is added."""
    plain = llama.generate(PROMPT, {KEY: iv.add_vector(W, at="last")}, max_tokens=3)
    edited = llama.edit({KEY: iv.add_vector(W, at="last")})
    own = edited.generate(PROMPT, max_tokens=3)
    assert own.touched == list(plain.touched)
    assert np.allclose(own.touched.amount, plain.touched.amount, atol=1e-6)
    shut = llama.edit({KEY: iv.when(iv.cosine(V) > 2, iv.add_vector(W))})
    assert not any(shut.generate(PROMPT, max_tokens=2).touched)
    more = shut.generate(PROMPT, {KEY: iv.add_vector(V, at=[0])}, max_tokens=2)
    assert more.touched == [True] + [False] * 9
    assert [touch.name for touch in more.touched.touches] == ["when", "add_vector"]
    tokens = mx.array([PROMPT])
    before = edited.model(tokens)
    mx.eval(own.touched.amount, before)  # a report leaves the edited model steered as it was
    assert mx.array_equal(edited.model(tokens), before)
    assert not mx.array_equal(llama.model(tokens), before)


def test_steerings_around_are_counted_with_the_strength_they_had(llama: InterpretableModel) -> None:
    with llama.steer(mood={KEY: iv.add_vector(V, at=[0])}) as steering:
        steering["mood"].strength = 0.5
        made = llama.generate(PROMPT, {KEY: iv.add_vector(W, at=[1])}, max_tokens=2)
        steering["mood"].strength = 4.0
    outer, inner = made.touched.touches
    assert outer.amount[0] == pytest.approx(0.5 * float(mx.linalg.norm(V)), rel=1e-5)
    assert inner.amount[1] == pytest.approx(float(mx.linalg.norm(W)), rel=1e-5)
    assert np.count_nonzero(outer.amount) == np.count_nonzero(inner.amount) == 1


def test_strength_0_and_no_steering_touch_nothing(llama: InterpretableModel) -> None:
    for steer in (None, {KEY: iv.add_vector(W, 0.0)}, {KEY: iv.when(iv.cosine(V) > -2, iv.add_vector(W), 0.0)},
                  {KEY: iv.when(iv.cosine(V) > -2, iv.add_vector(W, 0.0))}):  # fmt: skip
        made = llama.generate(PROMPT, steer, max_tokens=3)
        assert made.touched == [False] * 11
        assert made.touched.amount.tolist() == [0.0] * 11
        assert made.touched.text().plain == "".join(made.touched._pieces())
        assert "rgba(230,120,20,0.00)" in made.touched._repr_html_()
    with pytest.raises(ValueError, match="no intervention here has one direction to project on"):
        llama.generate(PROMPT, max_tokens=2).touched.text("projection")


def test_rows_of_a_batch_have_each_their_own(llama: InterpretableModel) -> None:
    gate = iv.when(iv.cosine(V) > -2, iv.add_vector(W))
    steers = [{KEY: gate}, None, {"layers.2": iv.add_vector(V, at=[1])}]
    rows = llama.generate([PROMPT, PROMPT[:3], PROMPT[:5]], steers, max_tokens=2)
    assert [row.touched.count(True) for row in rows] == [3, 0, 1]
    assert [[t.key for t in row.touched.touches] for row in rows] == [[KEY], [], ["layers.2"]]
    alone = llama.generate(PROMPT, steers[0], max_tokens=2)
    assert np.allclose(rows[0].touched.amount, alone.touched.amount, atol=1e-5)


# -- as a sequence -----------------------------------------------------------------------------------------------------


def test_it_is_a_sequence_of_bool() -> None:
    touched = Touched([True, False, True])
    assert list(touched) == [True, False, True] == touched
    assert touched == (True, False, True)
    assert touched == Touched([True, False, True])
    assert touched != [True, True, True]
    assert touched[1:] == [False, True]
    assert (len(touched), touched[-1], touched.count(True), touched.index(False)) == (3, True, 2, 1)
    assert repr(touched) == "[True, False, True]"
    assert True in touched
    assert touched != "text"
    with pytest.raises(TypeError, match="unhashable"):
        hash(touched)


def test_nothing_is_run_until_somebody_looks(llama: InterpretableModel) -> None:
    calls: list[int] = []
    made = llama.generate(PROMPT, {KEY: iv.when(iv.cosine(V) > -2, iv.add_vector(W))}, max_tokens=2)
    counting = llama.generate(PROMPT, {KEY: iv.add_vector(W)}, max_tokens=2)
    with by_hand(llama.model.layers[0], lambda h: calls.append(1) or h):
        assert counting.touched[0] is True  # known from positions
        assert not calls
        assert any(made.touched)
        assert len(calls) == 1
        assert made.touched.amount.any()
        assert made.touched.touches is made.touched.touches
        assert len(calls) == 1  # once for all


def test_a_pickle_and_a_copy_keep_the_marks_and_leave_the_model(llama: InterpretableModel) -> None:
    made = llama.generate(PROMPT, {KEY: iv.when(iv.cosine(V) > -2, iv.add_vector(W))}, max_tokens=3, logprobs=True)
    for again in (pickle.loads(pickle.dumps(made.touched)), copy.deepcopy(made.touched)):
        assert again == [False] * 7 + [True] * 4
        with pytest.raises(ValueError, match="of a text just generated, and this one was loaded"):
            again.amount  # noqa: B018
    whole = pickle.loads(pickle.dumps(made))
    assert isinstance(whole, Generation)
    assert (whole, whole.tokens, whole.touched) == (made, made.tokens, list(made.touched))
    assert mx.array_equal(whole.logprobs, made.logprobs)
    with pytest.raises(ValueError, match="was loaded"):
        Generation("a", [1], [2], touched=[True, False]).touched.touches  # noqa: B018


@pytest.mark.parametrize("filled", ["steered", "clean", "by other code"])
def test_of_a_text_that_goes_on_from_a_cache_the_same_is_known(llama: InterpretableModel, filled: str) -> None:
    """Where the tokens in the cache are known, and the strengths stayed as they were; with spans and gates too."""
    gate = iv.when(iv.projection(V) > -1e6, iv.add_vector(W, at="last"))
    if filled == "steered":  # under another prompt, of which such a gate asks
        gate = iv.when(iv.projection(V) > -1e6, iv.add_vector(W, at=[*range(4), *range(13, 99)]), per="token")
    steer = {KEY: iv.add_vector(W, exclude=((5,), (77,))), "layers.2": gate}
    cache, begun, told = make_prompt_cache(llama.model), list(PROMPT), {}
    if filled == "steered":
        begun += llama.generate(PROMPT, steer, max_tokens=2, prompt_cache=cache).tokens
    elif filled == "clean":
        cache = fill_prompt_cache(llama, PROMPT)
    else:
        mx.eval(llama.model(mx.array([PROMPT]), cache=cache))
        told = {"cached_tokens": PROMPT}
    made = llama.generate([8, 5, 6, 77], steer, max_tokens=2, prompt_cache=cache, **told)
    # what a block gives depends on nothing that is done behind it, so that the plain run says ‖x‖ there
    x = captured(llama.model, [*begun, 8, 5, 6, 77, *made.tokens], LAYER)[len(begun) :]
    outside = np.array([True, False, False, False, True, True])
    first, second = made.touched.touches
    expected = outside * np.linalg.norm(np.array(W)) / np.linalg.norm(x, axis=-1)
    np.testing.assert_allclose(first.share, expected, rtol=1e-4)
    assert (second.amount > 0).tolist() == [False, False, False, True, True, True]
    assert list(made.touched) == [True, False, False, True, True, True]


def test_what_cannot_be_known_is_said_and_shown_without(llama: InterpretableModel) -> None:
    cache = make_prompt_cache(llama.model)
    mx.eval(llama.model(mx.array([PROMPT]), cache=cache))  # nobody says with what
    made = llama.generate([5, 6], {KEY: iv.add_vector(W, at="last")}, max_tokens=2, prompt_cache=cache)
    assert made.touched == [False, True, True, True]
    with pytest.raises(ValueError, match="8 tokens came from a prompt cache, and nobody has told which"):
        made.touched.amount  # noqa: B018
    styles = [str(span.style) for span in made.touched.text().spans]
    assert styles == ["dim", *["rgb(0,0,0) on rgb(230,120,20)"] * 3]
    assert made.touched._repr_html_().count("rgba(230,120,20,1.00)") == 3
    with llama.steer(mood={KEY: iv.add_vector(W, at="last")}) as steering:
        pieces: list[int] = []

        def turned_off(tokens: Any, logits: mx.array) -> mx.array:
            pieces.append(1)
            steering["mood"].strength = 1.0 if len(pieces) < 3 else 0.0
            return logits

        varied = llama.generate(PROMPT, max_tokens=6, logits_processors=[turned_off])
    assert varied.touched[len(PROMPT) - 1]
    with pytest.raises(ValueError, match="a strength was changed while the text was made"):
        varied.touched.amount  # noqa: B018


def test_under_which_prompts_earlier_turns_ran_is_not_known(llama: InterpretableModel) -> None:
    for edit in (iv.add_vector(W, at="last"), iv.add_vector(W, schedule=iv.decay(3)), iv.add_vector(W, at=-1)):
        cache = make_prompt_cache(llama.model)
        llama.generate(PROMPT, {KEY: edit}, max_tokens=2, prompt_cache=cache)
        made = llama.generate([5, 6], {KEY: edit}, max_tokens=2, prompt_cache=cache)
        assert made.touched[1]
        with pytest.raises(ValueError, match="steered under prompts of their own"):
            made.touched.amount  # noqa: B018


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (iv.add_sequence(mx.stack([V, W])), [0, 1]),
        (iv.add_sequence(mx.stack([V, W]), at=slice(1, None)), [1]),
        (iv.replace_with(mx.stack([V, W])), [6, 7]),
        (iv.replace_with(mx.stack([V, W])[None], align="start"), [0, 1]),
        (iv.replace_with(mx.stack([V, W]), at="last"), [7]),
        (iv.replace_with(V, at=2), [2]),
        (iv.Compose((iv.add_vector(V, at=3), iv.Compose((iv.add_vector(W),), 0.0))), [3]),
        ([iv.add_vector(V, at=1), iv.when(iv.cosine(V) > -2, iv.add_vector(W), 0.0)], [1]),
    ],
)
def test_what_is_laid_along_the_prompt_or_at_strength_0_touches_no_more(
    llama: InterpretableModel, edit: Any, expected: list[int]
) -> None:
    made = llama.generate(PROMPT, {KEY: edit}, max_tokens=3)
    assert np.flatnonzero(list(made.touched)).tolist() == expected
    assert np.flatnonzero(made.touched.amount > 0).tolist() == expected


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (iv.Compose((iv.add_vector(V, at=99),)), "at=99 lies nowhere in 10 tokens"),
        (iv.when(iv.cosine(V) > -2, iv.add_vector(V, at="first")), "behind a gate that opens with the prompt's last"),
        (iv.when(iv.cosine(V) > -2, iv.add_vector(V, at=slice(0, 7))), "behind a gate that opens with the prompt's"),
    ],
)
def test_what_can_touch_nothing_is_told(llama: InterpretableModel, edit: Any, said: str) -> None:
    with pytest.warns(NothingTouched, match=said):
        llama.generate(PROMPT, {KEY: edit}, max_tokens=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llama.generate(PROMPT, {KEY: iv.Compose((edit,), 0.0)}, max_tokens=2)  # it isn't meant to


def test_a_sequence_behind_which_a_cache_goes_on_is_refused(llama: InterpretableModel) -> None:
    cache = fill_prompt_cache(llama, PROMPT)
    with pytest.raises(PositionError, match="lies wholly within the 8 tokens"):
        llama.generate([5], {KEY: iv.add_sequence(mx.stack([V, W]))}, max_tokens=2, prompt_cache=cache)
    nothing = {KEY: iv.Compose((iv.add_vector(V, at=1),), 0.0)}
    assert llama.generate([5], nothing, max_tokens=2, prompt_cache=cache)
    with pytest.warns(PartlySteered, match="acts from token 8 on"):
        llama.generate([5, 6], {KEY: iv.add_sequence(mx.stack([V] * 12))}, max_tokens=2,
                       prompt_cache=fill_prompt_cache(llama, PROMPT))  # fmt: skip


def test_a_marker_that_is_there_in_other_tokens_is_told(pocket: InterpretableModel) -> None:
    prompt = "The food was good"
    with pytest.warns(NothingTouched, match=r"the marker 'food' is in the text, but not as the tokens"):
        pocket.generate(prompt, {"layers.2": iv.add_vector(vector(1, 256), exclude=("food", " was"))}, max_tokens=1)
    spans = {"layers.2": iv.add_vector(vector(1, 256), exclude=(" food", " was"))}
    made = pocket.generate(prompt, spans, max_tokens=1)  # warnings are errors here
    assert list(made.touched).count(False) >= 2


def test_a_text_of_nan_is_told(llama: InterpretableModel) -> None:
    large = {KEY: iv.add_vector(W, 1e38)}
    with pytest.warns(NotFinite, match="Steer less strongly"):
        llama.generate(PROMPT, large, max_tokens=2)
    with pytest.warns(NotFinite):
        llama.generate([PROMPT, PROMPT[:3]], [None, large], max_tokens=2)


def test_log_probabilities_are_there_for_every_thread(llama: InterpretableModel) -> None:
    rows = llama.generate([PROMPT, PROMPT[:3]], max_tokens=3, logprobs=True)
    made, read = [llama.generate(PROMPT, max_tokens=3, logprobs=True), *rows], []
    thread = threading.Thread(target=lambda: read.extend(one.logprobs.tolist() for one in made))
    thread.start()
    thread.join()
    assert [len(one) for one in read] == [3, 3, 3]


# -- shown -------------------------------------------------------------------------------------------------------------


def test_the_text_is_coloured_by_how_much_each_token_was_moved(pocket: InterpretableModel) -> None:
    v = vector(1, 256)
    made = pocket.generate("The food was", {"layers.2": iv.add_vector(v, -1.0, at="generated")}, max_tokens=4)
    shown = made.touched.text()
    text = pocket.decode([*made.prompt_tokens, *made.tokens])
    assert shown.plain == text
    count = len(made.prompt_tokens)
    styles = [str(span.style) for span in shown.spans]
    assert styles[:count] == ["dim"] * count
    assert all(style.startswith("rgb(0,0,0) on rgb(") for style in styles[count:])
    strongest = int(made.touched.amount.argmax())
    assert styles[strongest] == "rgb(0,0,0) on rgb(230,120,20)"  # the one that was moved most
    (touch,) = made.touched.touches
    by_projection = [str(span.style) for span in made.touched.text("projection").spans]
    low = int(touch.projection.argmin())
    assert touch.projection[low] < 0
    red, _, blue = (int(part) for part in by_projection[low].split("on rgb(")[1][:-1].split(","))
    assert red < blue  # below 0 is blue
    with pytest.raises(ValueError, match="by is 'amount' or 'projection', not 'size'"):
        made.touched.text("size")  # type: ignore[arg-type]
    console = Console(record=True, width=200, force_terminal=False)
    with console.capture() as capture:
        console.print(made.touched)
    assert capture.get().strip() == text


def test_texts_are_shown_as_they_are_in_a_notebook(pocket: InterpretableModel) -> None:
    prompt = 'The <b>"food"</b> & [bold]room[/bold] was'
    made = pocket.generate(prompt, {"layers.2": iv.add_vector(vector(1, 256), at="last")}, max_tokens=2)
    page = made.touched._repr_html_()
    assert "<b>" not in page
    assert page.count("<span") == page.count("</span>") == len(made.prompt_tokens) + len(made.tokens)
    assert "layers.2 add_vector: moved " in page
    assert ", projection " in page
    assert prompt in made.touched.text().plain  # nothing is read as markup
    text = html.unescape(re.sub(r"<[^>]*>", "", page))
    assert text == pocket.decode([*made.prompt_tokens, *made.tokens])


def test_pieces_of_one_character_lie_with_its_last_token(pocket: InterpretableModel) -> None:
    prompt = "The food — 日本 é"
    made = pocket.generate(prompt, {"layers.2": iv.add_vector(vector(1, 256))}, max_tokens=2)
    pieces = made.touched._pieces()
    assert len(pieces) == len(made.prompt_tokens) + len(made.tokens)
    assert "".join(pieces) == made.touched.text().plain == pocket.decode([*made.prompt_tokens, *made.tokens])
    assert prompt in made.touched.text().plain
    (at,) = (i for i, piece in enumerate(pieces) if piece.endswith("日"))
    assert pieces[at - 1] == ""  # of a character's tokens only the last has a text


def test_without_a_text_tokens_are_dots(llama: InterpretableModel) -> None:
    made = llama.generate(PROMPT, {KEY: iv.add_vector(W)}, max_tokens=2)
    dots: Any = Touched([True] * 10, None, 8, lambda: made.touched.touches)
    assert dots.text().plain == "·" * 10
