"""Which tokens are touched: every form of `at=`, in any chunking and padding, against whole sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxsteer import PositionError, after
from mlxsteer.interventions.schedules import Schedule
from mlxsteer.positions import NAMES, Position, Prompt, Tokens

hypothesis_settings = settings(max_examples=100, deadline=None, derandomize=True)
LETTERS = "abc"


def letters(ids: Sequence[int]) -> str:
    """One letter for each token id."""
    return "".join(LETTERS[i] for i in ids)


def text_bytes(ids: Sequence[int]) -> str:
    """Token ids as the bytes of a text, as byte-level tokenizers decode them."""
    return bytes(ids).decode("utf-8", errors="replace")


# -- the reference: one row, the whole sequence at once --------------------------------------------------------------


def naive(at: Any, prompt: Sequence[int], total: int) -> set[int]:
    """The touched positions of a sequence of `total` tokens of which the first are `prompt`."""
    n = len(prompt)
    if isinstance(at, str):
        tests: dict[str, Callable[[int], bool]] = {
            "all": lambda p: True,
            "prompt": lambda p: p < n,
            "generated": lambda p: p >= n,
            "last": lambda p: p >= n - 1,
            "first": lambda p: p == 0,
        }
        return {p for p in range(total) if tests[at](p)}
    if isinstance(at, after):
        wanted = list(at.text) if isinstance(at.text, tuple) else [LETTERS.index(c) for c in at.text]
        ends = [end for end in range(len(wanted), n + 1) if list(prompt[end - len(wanted) : end]) == wanted]
        return set(range(max(ends), total))
    if isinstance(at, slice):
        first = 0 if at.start is None else at.start if at.start >= 0 else max(0, n + at.start)
        stop = total if at.stop is None else at.stop if at.stop >= 0 else max(0, n + at.stop)
        return {p for p in range(first, min(stop, total)) if (p - first) % (at.step or 1) == 0}
    chosen = at(list(prompt)) if callable(at) else [at] if isinstance(at, int) else at
    return {p for p in (i if i >= 0 else n + i for i in chosen) if p < total}


@dataclass(frozen=True)
class Choose:
    """A callable position that chooses the tokens of one id, counted from one end or the other."""

    token: int
    backwards: bool

    def __call__(self, ids: list[int]) -> Iterable[int]:
        return [i - self.backwards * len(ids) for i, token in enumerate(ids) if token == self.token]


# -- random prompts, positions and chunkings -------------------------------------------------------------------------

prompts = st.lists(st.integers(0, 2), min_size=1, max_size=9)


def positions(shortest: Sequence[int], every: Sequence[Sequence[int]]) -> st.SearchStrategy[Any]:
    """Every form of `at=` that means something for all of these prompts."""
    n = len(shortest)
    ints = st.integers(-n, 14)
    bound = st.none() | st.integers(-12, 14)
    forms = [
        st.sampled_from(NAMES),
        ints,
        st.lists(ints, max_size=4),
        st.lists(ints, max_size=4).map(tuple),
        st.lists(ints, min_size=1, max_size=4).map(np.array),
        st.lists(ints, min_size=1, max_size=4).map(mx.array),
        st.builds(slice, bound, bound, st.none() | st.integers(1, 4)),
        st.builds(Choose, st.integers(0, 2), st.booleans()),
    ]
    parts = [tuple(shortest[i:j]) for i in range(n) for j in range(i + 1, n + 1)]
    common = [part for part in parts if all(letters(part) in letters(prompt) for prompt in every)]
    if common:
        forms += [st.sampled_from(common).map(after), st.sampled_from(common).map(lambda ids: after(letters(ids)))]
    return st.one_of(forms)


def listed(at: Any) -> Any:
    return at.tolist() if isinstance(at, (np.ndarray, mx.array)) else at


@given(st.data())
@hypothesis_settings
def test_in_any_chunking_and_padding_the_touched_tokens_are_those_of_the_whole_sequence(data: st.DataObject) -> None:
    rows = data.draw(st.lists(prompts, min_size=1, max_size=3), label="prompts")
    at = data.draw(positions(min(rows, key=len), rows), label="at")
    totals = [len(prompt) + data.draw(st.integers(0, 4), label="generated") for prompt in rows]
    position = Position.of(at)
    known = [Prompt(len(prompt), list(prompt), letters) for prompt in rows]
    seen, touched = [0] * len(rows), [set[int]() for _ in rows]
    while seen != totals:
        left = [total - start for total, start in zip(totals, seen, strict=True)]
        real = [data.draw(st.integers(0, most), label="real") for most in left]
        real = real if any(real) else left  # so that the loop ends
        width = max(max(real) + data.draw(st.integers(0, 3), label="padding"), 1)
        tokens = Tokens(seen, real, width, known)
        marks = np.stack([tokens.marks(row, position) for row in range(len(rows))])
        mask = tokens.touched(position)
        np.testing.assert_array_equal(np.broadcast_to(np.array(mask), marks.shape), marks)
        assert isinstance(mask, mx.array) == (0 < marks.sum() < marks.size)
        for row, (start, length) in enumerate(zip(seen, real, strict=True)):
            assert not marks[row, length:].any(), "padding is touched"
            touched[row] |= {start + int(i) for i in np.flatnonzero(marks[row])}
        seen = [s + r for s, r in zip(seen, real, strict=True)]
    for row, prompt in enumerate(rows):
        assert touched[row] == naive(listed(at), prompt, totals[row]), f"row {row}"


@pytest.mark.parametrize("step", [2, 3, 4])
@pytest.mark.parametrize("start", [None, 0, 1, 2, 5, -1, -3, -5, -6, -7, -99])
@pytest.mark.parametrize("stop", [None, 4, 7, -1])
def test_a_step_counts_from_the_start_of_the_slice_not_of_the_chunk(
    start: int | None, stop: int | None, step: int
) -> None:
    at, prompt, total = slice(start, stop, step), [0] * 5, 9
    for cut in range(1, total + 1):
        touched: set[int] = set()
        for begin in range(0, total, cut):
            tokens = Tokens([begin], [min(cut, total - begin)], cut, [Prompt(5)])
            touched |= {begin + int(i) for i in np.flatnonzero(tokens.marks(0, Position.of(at)))}
        assert touched == naive(at, prompt, total), f"chunks of {cut}"


@given(st.data())
@hypothesis_settings
def test_rows_that_may_not_be_touched_are_not(data: st.DataObject) -> None:
    rows = data.draw(st.lists(prompts, min_size=1, max_size=3))
    position = Position.of(data.draw(positions(min(rows, key=len), rows)))
    allowed = tuple(data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows))))
    lengths = [len(prompt) for prompt in rows]
    tokens = Tokens([0] * len(rows), lengths, max(lengths), [Prompt(len(p), list(p), letters) for p in rows])
    mask = np.broadcast_to(np.array(tokens.touched(position, allowed)), (len(rows), max(lengths)))
    for row, may in enumerate(allowed):
        np.testing.assert_array_equal(mask[row], tokens.marks(row, position) & may)


@given(starts=st.lists(st.integers(0, 2000), min_size=1, max_size=4), width=st.integers(1, 7))
@hypothesis_settings
def test_positions_are_absolute(starts: list[int], width: int) -> None:
    tokens = Tokens(starts, [width] * len(starts), width, [Prompt(1)] * len(starts))
    assert tokens.positions().tolist() == [[start + i for i in range(width)] for start in starts]
    assert len(tokens) == len(starts)


@given(st.data())
@hypothesis_settings
def test_a_position_is_written_as_it_was_read(data: st.DataObject) -> None:
    prompt = data.draw(prompts)
    at = data.draw(positions(prompt, [prompt]))
    position = Position.of(at)
    assert Position.of(position.written()) == position
    assert Position.of(position) is position
    assert hash(Position.of(position.written())) == hash(position)


# -- what each form means, spelled out -------------------------------------------------------------------------------

MEANINGS: list[tuple[Any, list[int]]] = [
    # a prompt of 6 tokens, b a b c a b, and 3 generated ones
    ("all", [0, 1, 2, 3, 4, 5, 6, 7, 8]), ("prompt", [0, 1, 2, 3, 4, 5]), ("generated", [6, 7, 8]),
    ("last", [5, 6, 7, 8]), ("first", [0]), (0, [0]), (-1, [5]), (-6, [0]), (7, [7]), (99, []),
    ([0, -1, 5, 0], [0, 5]), ([], []), (slice(None), [0, 1, 2, 3, 4, 5, 6, 7, 8]), (slice(2, 4), [2, 3]),
    (slice(-2, None), [4, 5, 6, 7, 8]), (slice(None, -2), [0, 1, 2, 3]), (slice(1, None, 3), [1, 4, 7]),
    (slice(-99, 2), [0, 1]), (slice(4, 2), []), (after("a"), [5, 6, 7, 8]), (after("ab"), [6, 7, 8]),
    (after("ba"), [2, 3, 4, 5, 6, 7, 8]), (after((0, 1)), [6, 7, 8]), (after((2,)), [4, 5, 6, 7, 8]),
    (lambda ids: [i for i, token in enumerate(ids) if token == 1], [0, 2, 5]), (lambda ids: {-1, 1}, [1, 5]),
    (lambda ids: [], []), (np.int64(2), [2]), (np.array([1, -1]), [1, 5]), (mx.array([1, -1]), [1, 5]),
    (range(2, 4), [2, 3]),
]  # fmt: skip


@pytest.mark.parametrize(("at", "expected"), MEANINGS, ids=[str(at)[:20] for at, _ in MEANINGS])
def test_each_form_means_what_it_says(at: Any, expected: list[int]) -> None:
    tokens = Tokens([0], [9], 9, [Prompt(6, [1, 0, 1, 2, 0, 1], letters)])
    assert np.flatnonzero(tokens.marks(0, Position.of(at))).tolist() == expected


@pytest.mark.parametrize("scalar", [mx.array(-1), np.array(-1)], ids=["mlx", "numpy"])
def test_an_array_that_holds_one_number_is_that_number(scalar: Any) -> None:
    assert Position.of(scalar) == Position.of(-1)


@pytest.mark.parametrize("lump", ["", "xé", "日本", "😀", "é😀é"])
@pytest.mark.parametrize("text", ["é", "😀", "本", "]"])
def test_after_a_character_of_several_tokens_begins_behind_its_last_token(lump: str, text: str) -> None:
    before = f"a{lump}{text}".encode()
    prompt = list(before + b"bc")
    tokens = Tokens([0], [len(prompt)], len(prompt), [Prompt(len(prompt), prompt, text_bytes)])
    marks = tokens.marks(0, Position.of(after(text)))
    assert np.flatnonzero(marks).tolist() == list(range(len(before), len(prompt)))


def test_after_a_text_that_ends_inside_a_token_begins_behind_that_token() -> None:
    words = ["the", " food", " was"]
    decode = lambda ids: "".join(words[i] for i in ids)
    known = Prompt(5, [0, 1, 2, 1, 2], decode)
    assert known.ranges(Position.of(after("foo")))[0].start == 4
    assert known.ranges(Position.of(after("was")))[0].start == 5
    assert known.ranges(Position.of(after("the f")))[0].start == 2


def test_token_ids_are_made_only_when_a_position_asks_for_them() -> None:
    asked = []
    known = Prompt(3, None, letters, source=lambda: asked.append(1) or [0, 1, 2])
    for at in ("all", "last", -1, slice(-2, None), [0, 1]):
        known.ranges(Position.of(at))
    assert not asked
    assert known.ranges(Position.of(after("b")))[0].start == 2
    assert known.ranges(Position.of(after((0,))))[0].start == 1
    assert asked == [1]


def test_a_prompt_that_grows_is_looked_at_again() -> None:
    known = Prompt()
    assert known.ranges(Position.of("prompt"))[0].stop > 10**9
    known.length = 2
    assert known.ranges(Position.of("prompt")) == (range(0, 2),)
    assert known.ranges(Position.of("last"))[0].start == 1


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    ["lst", "", "All", 1.5, None, True, [True], [0.5], ["last"], {0: 1},
     np.ones((2, 2), int), np.array([0.5]), mx.array([[1]]), object()],
    ids=lambda bad: repr(bad)[:20],
)  # fmt: skip
def test_what_is_no_position_is_refused_in_a_sentence_that_lists_the_forms(bad: Any) -> None:
    with pytest.raises(PositionError, match=r"after\("):
        Position.of(bad)


def test_a_slice_that_runs_backwards_is_refused() -> None:
    for step in (0, -1):
        with pytest.raises(PositionError, match="step of a slice of tokens is 1 or more"):
            Position.of(slice(None, None, step))


@pytest.mark.parametrize("empty", ["", ()])
def test_after_nothing_is_refused(empty: Any) -> None:
    with pytest.raises(PositionError, match="use at='all'"):
        Position.of(after(empty))


@pytest.mark.parametrize(
    "at", ["last", -1, [0, -2], slice(-1, None), slice(None, -1), after("a"), after((0,)), lambda ids: [0]]
)
def test_what_needs_the_prompt_is_refused_where_nobody_told_it(at: Any) -> None:
    with pytest.raises(PositionError, match="prompt_tokens="):
        Prompt().ranges(Position.of(at))


@pytest.mark.parametrize("at", ["all", "first", 0, [1, 5], slice(2, 7), "prompt", "generated"])
def test_what_needs_no_prompt_is_not_refused(at: Any) -> None:
    tokens = Tokens([0], [9], 9, [Prompt()])
    expected = naive(at, [0] * 9, 9)
    assert set(np.flatnonzero(tokens.marks(0, Position.of(at)))) == expected


def test_prompt_and_generated_are_refused_where_drafts_hide_the_end_of_the_prompt() -> None:
    for at in ("prompt", "generated"):
        with pytest.raises(PositionError, match="draft model"):
            Prompt(mixed=True).ranges(Position.of(at))
    assert Prompt(mixed=True).ranges(Position.of("all"))


def test_in_a_trace_generated_and_tokens_behind_the_prompt_are_refused() -> None:
    known = Prompt(4, [0, 1, 2, 0], letters, whole=True)
    with pytest.raises(PositionError, match="every token of a trace.*is prompt"):
        known.ranges(Position.of("generated"))
    for at in (4, [0, 7]):
        with pytest.raises(PositionError, match="behind the prompt, which has 4 tokens"):
            known.ranges(Position.of(at))
    assert known.ranges(Position.of(3)) == (range(3, 4),)


def test_an_index_before_the_prompt_is_refused() -> None:
    for at in (-5, [0, -5]):
        with pytest.raises(PositionError, match="at=-5 lies before the prompt, which has 4 tokens"):
            Prompt(4).ranges(Position.of(at))


@pytest.mark.parametrize("index", [3, -4, 10**6])
def test_a_callable_that_chooses_no_token_of_the_prompt_is_refused(index: int) -> None:
    with pytest.raises(PositionError, match=f"chose position {index} in a prompt of 3 tokens"):
        Prompt(3, [0, 1, 2]).ranges(Position.of(lambda ids: [0, index]))


@pytest.mark.parametrize("given", [1, np.int64(1), mx.array(1), -2, (1,), np.array([1]), mx.array([1]), range(1, 2)])
def test_a_callable_may_give_one_token_or_several_of_any_kind(given: Any) -> None:
    assert Prompt(3, [0, 1, 2]).ranges(Position.of(lambda ids: given)) == (range(1, 2),)


@pytest.mark.parametrize("given", ["all", "12", None, [0.5], 1.0, True, [0, True], [[0]], np.array([0.5]), b"1"])
def test_a_callable_that_gives_no_tokens_is_refused(given: Any) -> None:
    with pytest.raises(PositionError, match="gives a list of token indices, such as .*this one gave"):
        Prompt(2, [0, 1]).ranges(Position.of(lambda ids: given))


@dataclass
class Unhashable:
    """A callable that is equal to others of its kind, and so has no hash."""

    index: int

    def __call__(self, given: Any) -> Any:
        return [self.index] if isinstance(given, list) else float(self.index)


def test_a_callable_needs_no_hash() -> None:
    tokens = Tokens([0], [3], 3, [Prompt(3, [0, 1, 2])])
    for index in (0, 2, 0):
        assert np.flatnonzero(tokens.marks(0, Position.of(Unhashable(index)))).tolist() == [index]
        strengths = tokens.strengths(None, Schedule.of(Unhashable(index + 2)))
        assert strengths is not None
        assert strengths.tolist() == [[index + 2]]


@pytest.mark.parametrize("text", [5, 5.5, None, [1.5], ["a"], np.int64(5)])
def test_after_takes_a_text_or_token_ids(text: Any) -> None:
    with pytest.raises(TypeError, match="after: a text or a list of token ids, not"):
        after(text)
    assert after(np.array([2, 1])) == after([2, 1]) == after((2, 1))  # type: ignore[arg-type]


def test_after_what_is_not_there_or_can_not_be_looked_for_is_refused() -> None:
    with pytest.raises(PositionError, match=r"the prompt has no such text: 'abc'"):
        Prompt(3, [0, 1, 2], letters).ranges(Position.of(after("cb")))
    with pytest.raises(PositionError, match=r"after\(\[2, 1\]\): the prompt has no such tokens"):
        Prompt(3, [0, 1, 2], letters).ranges(Position.of(after((2, 1))))
    with pytest.raises(PositionError, match="no such tokens"):
        Prompt(1, [0], letters).ranges(Position.of(after((0, 0))))
    with pytest.raises(PositionError, match="needs a tokenizer"):
        Prompt(3, [0, 1, 2]).ranges(Position.of(after("b")))
    with pytest.raises(PositionError, match="only its length is known"):
        Prompt(3).ranges(Position.of(after("b")))


# -- masks -----------------------------------------------------------------------------------------------------------


def test_a_mask_is_made_once_for_each_position() -> None:
    tokens = Tokens([0], [4], 4, [Prompt(4)])
    assert tokens.touched(Position.of(1)) is tokens.touched(Position.of([1]))
    assert tokens.touched(Position.of("all")) is True
    assert tokens.touched(Position.of([])) is False
    assert tokens.touched(Position.of("all"), (False,)) is False
