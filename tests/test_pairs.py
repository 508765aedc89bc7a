"""Sets of contrast pairs, and the check of what makes pairs good ones."""

from __future__ import annotations

import copy
import json
import pickle
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mlxsteer as ms
from mlxsteer import Check, ContrastPair, InterpretableModel, PairSet
from mlxsteer.pairs import (
    MOST_HASHES,
    PAIR_HASHES,
    SPLITS,
    pair_hash,
    pair_hashes,
    pairs_seen,
    shared_by_splits,
)

hypothesis_settings = settings(max_examples=25, deadline=None, derandomize=True)

ANIMALS = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay")
PLACES = ["in the park", "at a market", "near our old school", "by that long canal", "under one bridge"]


def good(number: int = 100, split: Any = None) -> list[ContrastPair]:
    """Pairs that have every property: prompts and completions are distinct, and as long as each other."""
    pairs = []
    for row in range(number):
        animal, place = ANIMALS[row % 10], PLACES[row // 10 % 5]
        prompt = f"{'Yesterday' if row % 2 else 'Today at last'} {place} we saw {row} {animal}s, and {row} of them"
        sides = f" seemed{row} lovely {animal}.", f" seemed{row} horrid {animal}."
        pairs.append(ContrastPair(prompt, *(sides if row % 3 else (sides[0] + "!", sides[1] + "!")), split))
    return pairs


def found(check: Check, name: str) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(f.level, f.sentence, f.rows) for f in check.findings if f.property == name]


def the_one(pairs: Sequence[ContrastPair], name: str, tokenizer: Any = None) -> tuple[str, str, tuple[int, ...]]:
    (only,) = found(PairSet(pairs).check(tokenizer), name)
    return only


# -- the set -----------------------------------------------------------------------------------------------------------


def test_a_pair_set_is_a_list_with_a_name() -> None:
    pairs = good(4)
    made = PairSet(pairs, name="moods")
    assert made == pairs
    assert isinstance(made, list)
    assert (made.name, PairSet(pairs).name, len(PairSet())) == ("moods", "", 0)
    assert made[1] is pairs[1]
    for part in (made[1:3], made[::-1], made[:0]):
        assert isinstance(part, PairSet)
        assert part.name == "moods"
    assert made[1:3] == pairs[1:3]
    for twin in (copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert isinstance(twin, PairSet)
        assert (twin, twin.name) == (made, "moods")


def test_a_pair_set_takes_pairs_from_any_iterable_and_nothing_else() -> None:
    assert PairSet(pair for pair in good(3)) == good(3)
    with pytest.raises(TypeError, match=r"a shipped set is datasets\.load\('sentiment'\)"):
        PairSet("sentiment")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"not \('a', 'b'\)\."):
        PairSet([*good(1), ("a", "b")])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="the name of a pair set is a text, not int"):
        PairSet(good(1), name=3)  # type: ignore[arg-type]


def test_a_pair_set_says_what_it_holds() -> None:
    split = [replace(pair, split=s) for pair, s in zip(good(4), ("train", "train", "report", None), strict=True)]
    assert repr(PairSet(split, name="moods")) == "PairSet('moods', 4 pairs: 2 train, 1 report)"
    assert repr(PairSet(good(1))) == "PairSet(1 pair)"
    assert PairSet(split).splits == {"train": 2, "report": 1}
    assert PairSet(good(2)).splits == PairSet().splits == {}


def test_a_split_is_a_pair_set_and_all_pairs_where_there_are_none() -> None:
    made = PairSet([*good(2, "train"), *good(1, "report")], name="moods")
    assert made.split("train") == made[:2]
    assert isinstance(made.split("train"), PairSet)
    assert made.split("train").name == "moods"
    assert PairSet(good(2)).split("choose") == good(2)
    with pytest.raises(ValueError, match=r"no pair is in the split 'choose'; there are \['report', 'train'\]"):
        made.split("choose")
    for pairs in (made, PairSet(good(2))):
        with pytest.raises(ValueError, match="a split is one of train, choose, report, not 'test'"):
            pairs.split("test")


def test_shipped_sets_are_pair_sets() -> None:
    loaded = ms.datasets.load("sentiment")
    assert isinstance(loaded, PairSet)
    assert loaded.name == "sentiment"
    assert sum(loaded.splits.values()) == len(loaded)
    assert loaded.split("train") == ms.datasets.load("sentiment", "train")
    assert isinstance(ms.datasets.load("sentiment", "train"), PairSet)


def test_shuffling_is_seeded_and_loses_nothing() -> None:
    made = PairSet(good(50), name="moods")
    once = made.shuffled(1)
    assert once == made.shuffled(1)
    assert once != made.shuffled(2)
    assert once != made
    assert sorted(once, key=made.index) == made == good(50)
    assert (type(once), once.name) == (PairSet, "moods")


def test_a_fingerprint_is_of_the_contents_alone() -> None:
    made = PairSet(good(20), name="moods")
    assert len(made.fingerprint) == 16
    assert set(made.fingerprint) <= set("0123456789abcdef")
    same = [made.shuffled(3), made.with_splits(), PairSet(made), made[::-1]]
    assert {other.fingerprint for other in same} == {made.fingerprint}
    first = made[0]
    others = [
        made[1:],
        [*made, first],
        [replace(first, prompt=first.prompt + " "), *made[1:]],
        [replace(first, chat=True), *made[1:]],
        [replace(first, positive=first.negative, negative=first.positive), *made[1:]],
        [ContrastPair("", "a", "b", messages=({"role": "user", "content": first.prompt},)), *made[1:]],
    ]
    assert len({made.fingerprint, *(PairSet(other).fingerprint for other in others)}) == 7


def test_a_fingerprint_stays_the_same_from_version_to_version() -> None:
    pairs = [ContrastPair("É", " a", " b", "train"), ContrastPair("", "x", "y", chat=True)]
    assert PairSet(pairs).fingerprint == "94ec566733d4cda1"


def test_seeded_splits_have_their_shares_and_keep_the_order() -> None:
    made = PairSet(good(100, "report"), name="moods")
    split = made.with_splits()
    assert split.splits == {"train": 50, "choose": 20, "report": 30}
    assert [replace(pair, split="report") for pair in split] == made
    assert made.splits == {"report": 100}
    assert split == made.with_splits() != made.with_splits(seed=1)
    assert made.with_splits(0.8, 0, 0.2).splits == {"train": 80, "report": 20}
    assert made.with_splits(train=1, choose=0, report=0).splits == {"train": 100}
    assert (type(split), split.name) == (PairSet, "moods")


@hypothesis_settings
@given(st.lists(st.integers(1, 4), min_size=12, max_size=40), st.integers(0, 99))
def test_pairs_that_share_a_prompt_stay_in_one_split(sizes: list[int], seed: int) -> None:
    pairs = [
        ContrastPair(("prompt", " Prompt")[copy % 2] + f" {group}", f" yes {group} {copy}", f" no {group} {copy}")
        for group, size in enumerate(sizes)
        for copy in range(size)
    ]
    random.Random(seed).shuffle(pairs)
    split = PairSet(pairs).with_splits(seed=seed)
    of: dict[str, set[str | None]] = {}
    for pair in split:
        of.setdefault(pair.prompt.strip().lower(), set()).add(pair.split)
    assert all(len(splits) == 1 for splits in of.values())
    assert found(split.check(), "splits disjoint") == [("ok", "No prompt and no text is in two splits.", ())]
    for name, share in zip(SPLITS, (0.5, 0.2, 0.3), strict=True):
        assert abs(split.splits[name] - share * len(pairs)) <= 4


def test_pairs_that_share_a_text_without_a_prompt_stay_in_one_split() -> None:
    chain = [ContrastPair("", f"text {n}", f"Text {n + 1}") for n in range(10)]
    lone = [ContrastPair("", f"one {n}", f"two {n}") for n in range(30)]
    split = PairSet([*chain, *lone]).with_splits()
    assert len({pair.split for pair in split[:10]}) == 1
    assert split.splits == {"train": 20, "choose": 8, "report": 12}


def test_splits_that_cannot_be_are_refused() -> None:
    made = PairSet(good(10))
    for shares in ((0.5, 0.2, 0.2), (1.2, 0, -0.2), (float("nan"), 0.5, 0.5), (0.8, 0.2, 0.3)):
        with pytest.raises(ValueError, match="shares of the splits are at least 0 and sum to 1, not train="):
            made.with_splits(*shares)
    with pytest.raises(ValueError, match="no pair is left for the split 'choose': 2 pairs in 2 groups that share"):
        made[:2].with_splits()
    one = PairSet([ContrastPair("p", f" {n}", f" not {n}") for n in range(9)])
    with pytest.raises(ValueError, match="9 pairs in 1 group that share a prompt or a text"):
        one.with_splits()
    with pytest.raises(ValueError, match="0 pairs in 0 groups"):
        PairSet().with_splits()


# -- the check ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ms.datasets.available())
def test_every_shipped_set_is_without_errors(name: str) -> None:
    check = ms.datasets.load(name).check()
    assert check.ok, str(check)
    assert check.name == name


def test_good_pairs_have_every_property() -> None:
    check = PairSet(good(200), name="moods").with_splits().check()
    assert [f.property for f in check.findings] == [
        "matched context",
        "clear difference",
        "diversity",
        "length",
        "duplicates",
        "splits disjoint",
        "letters balanced",
        "number",
        "spaces",
    ]
    assert {f.level for f in check.findings} == {"ok"}
    assert (check.ok, check.errors, check.warnings) == (True, (), ())


def test_a_check_is_readable_and_goes_into_json() -> None:
    check = PairSet([*good(90, "train"), *good(1, "report")], name="moods").check()
    assert not check.ok
    assert [f.property for f in check.errors] == ["splits disjoint"]
    assert [f.property for f in check.warnings] == ["duplicates"]
    assert repr(check) == "moods: 91 pairs, 1 error, 1 warning"
    lines = str(check).splitlines()
    assert lines[0] == repr(check)
    assert len(lines) == 1 + len(check.findings)
    assert "  warning  duplicates        Exact copies of earlier pairs: 1; each counts again. Rows: 90." in lines
    data = json.loads(json.dumps(check.as_dict()))
    assert data == check.as_dict()
    assert (data["name"], data["pairs"], data["ok"]) == ("moods", 91, False)
    assert data["findings"][5] == {
        "property": "splits disjoint",
        "level": "error",
        "sentence": "Pairs with a text (prompt and side) that is in another split too: 2.",
        "rows": [0, 90],
    }


def test_an_empty_set_is_an_error() -> None:
    check = PairSet().check()
    assert not check.ok
    assert str(check).splitlines()[1].split() == ["error", "number", "There", "are", "no", "pairs."]


def test_at_most_five_rows_are_shown() -> None:
    assert the_one([*good(9), *good(9)], "duplicates")[2] == (9, 10, 11, 12, 13)


def test_context_is_matched_by_a_prompt_or_by_what_the_sides_have_in_common() -> None:
    assert the_one(good(), "matched context")[:2] == ("ok", "The sides of every pair share a prompt.")
    talk = ContrastPair("", "Yes.", "No.", messages=({"role": "user", "content": "Is it?"},))
    assert the_one([talk], "matched context")[0] == "ok"
    begun = ContrastPair("", "I walked to the shop and felt great", "I walked to the shop and felt awful")
    level, sentence, _ = the_one([begun], "matched context")
    assert (level, sentence[:60]) == ("ok", "The sides of 1 pair without a prompt have 88% of their text ")
    framed = ContrastPair("", "Act happy. What do you see today?", "Pretend sad. What do you see today?")
    assert the_one([framed], "matched context")[0] == "ok"
    loose = ContrastPair("", "What a splendid evening!", "My knee hurts since Monday.")
    level, sentence, rows = the_one([begun, loose], "matched context")
    assert (level, rows) == ("warning", (1,))
    assert sentence.startswith("In 1 pair of 2 without a prompt, less than 20% of the text is common")
    assert the_one([*[begun] * 9, loose], "matched context")[0] == "ok"
    assert the_one([*[begun] * 9, loose, loose], "matched context")[0] == "warning"
    chinese = [ContrastPair("", "我今天非常高兴", "我今天非常难过"), ContrastPair("", "春天来了", "他不吃鱼")]
    assert the_one(chinese, "matched context")[2] == (1,)


def test_sides_differ_in_more_than_case_punctuation_and_spaces() -> None:
    loud = [ContrastPair(f"Say {n}:", f" well, yes{n}.", f" WELL yes{n}!") for n in range(3)]
    level, sentence, rows = the_one([*good(3), *loud], "clear difference")
    assert (level, rows) == ("error", (3, 4, 5))
    assert sentence == "In 3 pairs the sides differ only in case, punctuation or spaces."
    level, sentence, _ = the_one(loud, "clear difference")
    assert level == "warning"
    assert sentence.endswith("fine where that is the behaviour.")
    signs = [ContrastPair("a", " +", " <"), ContrastPair("mood", " 🙂", " 🙁")]
    assert the_one(signs, "clear difference")[0] == "ok"


def test_a_side_that_goes_on_after_the_other_is_no_clear_difference() -> None:
    more = [ContrastPair(f"Number {n} is", f" red {n}.", f" red {n} and round.") for n in range(2)]
    level, sentence, rows = the_one([*good(10), *more], "clear difference")
    assert (level, rows) == ("warning", (10, 11))
    assert sentence.startswith("In 2 pairs of 12 one side is the other with more text at its end")
    assert the_one([*good(9), more[0]], "clear difference")[0] == "ok"
    assert the_one([*good(9), *more], "clear difference")[0] == "warning"


def test_prompts_and_completions_are_diverse() -> None:
    assert the_one(good(), "diversity") == ("ok", "100 of 100 prompts and 200 of 200 completions are distinct.", ())
    few = [replace(pair, prompt=("The day", "the  day")[row % 2]) for row, pair in enumerate(good(9))]
    assert the_one(few, "diversity") == ("warning", "Only 1 of 9 prompts are distinct.", (0, 1, 2, 3, 4))
    assert the_one([*good(1), *few], "diversity")[2] == (1, 2, 3, 4, 5)
    assert the_one([*good(20)[10:], *few, replace(few[0], prompt="The Day")], "diversity")[0] == "ok"
    assert the_one([*good(20)[12:], *few, replace(few[0], prompt="The Day")], "diversity")[0] == "ok"  # 9 of 18
    assert the_one([*good(20)[13:], *few, replace(few[0], prompt="The Day")], "diversity")[0] == "warning"
    near = [
        replace(pair, prompt=f"We went to see the {a} yesterday") for pair, a in zip(good(9), ANIMALS, strict=False)
    ]
    sentence = "9 of 9 prompts differ from another one in a single word."
    assert the_one(near, "diversity") == ("warning", sentence, (0, 1, 2, 3, 4))
    assert the_one([*good(9), *near], "diversity")[0] == "ok"
    assert the_one([*good(8), *near], "diversity")[2] == (8, 9, 10, 11, 12)
    four = [replace(pair, prompt=f"See the {a} run") for pair, a in zip(good(9), ANIMALS, strict=False)]
    assert the_one(four, "diversity")[1] == sentence
    short = [replace(pair, prompt=f"The {a}") for pair, a in zip(good(9), ANIMALS, strict=False)]
    assert the_one(short, "diversity")[0] == "ok"
    yes = [replace(pair, positive=" yes", negative=" no") for pair in good(9)]
    level, sentence, rows = the_one(yes, "diversity")
    assert (level, rows) == ("warning", (0, 1, 2, 3, 4))
    assert sentence.startswith("Only 2 of 18 completions are distinct")
    assert the_one([*good(1), *yes], "diversity")[2] == (1, 2, 3, 4, 5)
    assert the_one([*good(8)[1:], *yes], "diversity")[0] == "ok"  # 16 of 32
    assert the_one([*good(7)[1:], *yes], "diversity")[0] == "warning"  # 14 of 30
    for a, b in ((" (A)", " (B)"), ("A", "B"), (" A.", " B.")):
        letters = [replace(pair, positive=a, negative=b) for pair in good(9)]
        assert the_one(letters, "diversity")[0] == "ok"


def test_sides_are_about_as_long_as_each_other() -> None:
    level, sentence, _ = the_one(good(), "length")
    assert (level, sentence[:56]) == ("ok", "The sides of a pair differ in length by 0% on average (c")
    uneven = [ContrastPair("p", "a" * (30 if n % 2 else 10), "b" * (10 if n % 2 else 30)) for n in range(9)]
    worst = ContrastPair("p", "a", "b" * 99)
    level, sentence, rows = the_one([*uneven, worst], "length")
    assert (level, rows[0]) == ("warning", 9)
    assert sentence == "The sides of a pair differ in length by 110% on average (characters); 30% is a fair limit."
    just = [ContrastPair("p", "a" * (23 if n % 2 else 17), "b" * (17 if n % 2 else 23)) for n in range(10)]
    assert the_one(just, "length")[0] == "ok"


@pytest.mark.parametrize("side", ["positive", "negative"])
def test_a_side_that_is_mostly_the_longer_one_is_a_warning(side: str) -> None:
    def pair(number: int, longer: bool) -> ContrastPair:
        sides = f" {number} aaaaaaaaaaaa", f" {number} bbbbbbbbbbb"
        return ContrastPair("p", *(sides if longer == (side == "positive") else sides[::-1]))

    assert the_one([pair(n, n >= 2) for n in range(10)], "length")[0] == "ok"
    level, sentence, rows = the_one([pair(n, n >= 1) for n in range(10)], "length")
    assert (level, rows) == ("warning", (1, 2, 3, 4, 5))
    assert sentence.startswith(f"The {side} side is the longer one in 9 of 10 pairs (characters)")


def test_lengths_are_in_tokens_where_there_is_a_tokenizer(pocket: InterpretableModel) -> None:
    class Words:
        def encode(self, text: str, add_special_tokens: bool = True) -> list[str]:
            return ["<s>"] * 50 * add_special_tokens + text.split()

    pairs = [ContrastPair("p", f" a b c {n}", f" {n}xxxxx{'' if n else ' y z w'}") for n in range(10)]
    assert found(PairSet(pairs).check(), "length")[0][0] == "warning"
    level, sentence, rows = found(PairSet(pairs).check(Words()), "length")[1]
    assert (level, rows) == ("warning", (1, 2, 3, 4, 5))
    assert sentence.startswith("The positive side is the longer one in 9 of 10 pairs (tokens)")
    assert "by 108% on average (tokens)" in found(PairSet(pairs).check(Words()), "length")[0][1]
    assert "(tokens)" in the_one(good(5), "length", pocket.tokenizer)[1]
    for wrong in ("pocket", 3):
        with pytest.raises(TypeError, match=f"a tokenizer turns texts to token ids by its `encode`; {wrong!r} can't"):
            PairSet(pairs).check(wrong)


def test_copies_are_found_and_swapped_twins_contradict_each_other() -> None:
    pairs = good(4)
    shouted = replace(pairs[1], positive=pairs[1].positive.upper().replace(" ", "  "))
    twin = replace(pairs[2], positive=pairs[2].negative, negative=pairs[2].positive.upper())
    check = PairSet([*pairs, pairs[0], shouted, twin]).check()
    assert found(check, "duplicates") == [
        ("error", "Pairs that contradict another one, with the same sides swapped: 1.", (2, 6)),
        ("warning", "Exact copies of earlier pairs: 1; each counts again.", (4,)),
        ("warning", "Copies of earlier pairs but for case and spaces: 1; each counts again.", (5,)),
    ]
    joined = [ContrastPair("a b", " c", " d"), ContrastPair("a", " b c", " b d")]
    assert the_one(joined, "duplicates")[:2] == ("warning", "Exact copies of earlier pairs: 1; each counts again.")
    loud = [ContrastPair("p", " YES", " yes")]
    assert the_one(loud, "duplicates") == ("ok", "No pair is there twice.", ())


def test_no_text_and_no_prompt_is_in_two_splits() -> None:
    pairs = [*good(10, "train"), *(replace(pair, split="report") for pair in good(20)[10:])]
    assert the_one(pairs, "splits disjoint")[0] == "ok"
    again = replace(pairs[3], negative=" it was awful.", positive=pairs[3].positive.upper(), split="choose")
    assert the_one([*pairs, again], "splits disjoint") == (
        "error",
        "Pairs with a text (prompt and side) that is in another split too: 2.",
        (3, 20),
    )
    asked = ContrastPair(pairs[3].prompt, " it was fine.", " it was foul.", "choose")
    assert the_one([*pairs, asked], "splits disjoint") == (
        "warning",
        "Pairs whose prompt is in another split too: 2.",
        (3, 20),
    )
    assert the_one([*pairs, replace(asked, prompt="?", split=None)], "splits disjoint") == (
        "warning",
        "Pairs without a split, which are in none: 1.",
        (20,),
    )
    level, sentence, _ = the_one(good(), "splits disjoint")
    assert (level, sentence[:23]) == ("warning", "No pair names a split: ")


def lettered(letters: str, split: str | None = None, form: str = " ({})") -> list[ContrastPair]:
    return [
        ContrastPair(f"{split} {n}", form.format(letter), form.format("B" if letter == "A" else "A"), split)
        for n, letter in enumerate(letters)
    ]


def test_option_letters_are_balanced_in_every_split() -> None:
    assert the_one(lettered("AB" * 5), "letters balanced")[0] == "ok"
    assert the_one(lettered("AAABB"), "letters balanced")[0] == "ok"
    level, sentence, rows = the_one(lettered("AAAAAAABBB"), "letters balanced")
    assert (level, rows) == ("warning", (0, 1, 2, 3, 4))
    assert sentence.startswith("The positive side is A in 7 of 10 pairs: 40% to 60% is fair")
    mixed = [*lettered("AB" * 5, "train"), *lettered("BBBBA", "choose"), *lettered("B" * 4, "report")]
    assert [(level, sentence[:62]) for level, sentence, _ in found(PairSet(mixed).check(), "letters balanced")] == [
        ("warning", "The positive side is B in 4 of 5 pairs of the split 'choose': 4"[:62]),
        ("error", "The positive side is B in 4 of 4 pairs of the split 'report': t"[:62]),
    ]
    assert the_one(lettered("A"), "letters balanced")[0] == "ok"
    half = ContrastPair("p", " (A)", " neither")
    assert the_one([half, *lettered("AAAA")], "letters balanced")[0] == "ok"
    assert the_one(lettered("AAAA"), "letters balanced")[1].endswith("4 of 4 pairs: the vector is the letter.")
    for form in ("{}", "[{}]", " {}.", " {}:", "({})"):
        assert the_one(lettered("AAAA", form=form), "letters balanced")[0] == "error"
    assert the_one(lettered("AAAA", form=" the {}"), "letters balanced")[1] == "The completions are no option letters."
    whole = [
        ContrastPair("", f"Is it {n}?\n(A) yes\n(B) no\n(A)", f"Is it {n}?\n(A) yes\n(B) no\n(B)") for n in range(4)
    ]
    assert the_one(whole, "letters balanced")[0] == "error"


def test_fewer_than_eighty_pairs_to_train_on_are_few() -> None:
    assert the_one(good(80), "number")[:2] == ("ok", "80 pairs to train on; beyond about 80 more help little.")
    level, sentence, _ = the_one(good(79), "number")
    assert (level, sentence[:22]) == ("warning", "79 pairs to train on: ")
    assert "2505.03189" in sentence
    assert the_one([*good(80, "train"), *good(20, "report")], "number")[0] == "ok"
    assert the_one([*good(20, "train"), *good(80, "report")], "number")[0] == "warning"
    for other in ("report", None):
        level, sentence, _ = the_one([*good(90, "choose"), *good(10, other)], "number")
        assert (level, sentence[:32]) == ("error", "No pair is in the split 'train':")


@pytest.mark.parametrize(
    ("prompt", "completion", "what"),
    [
        ("The soup was", "good", "a word follows the prompt without a space"),
        ("The soup was good.", "It", "a word follows the prompt without a space"),
        ("Answer:", "yes", "a word follows the prompt without a space"),
        ("The soup was ", " good", "two spaces meet"),
        ("The soup was", " good", None),
        ("The soup was ", "good", None),
        ('He said "', "good", None),
        ("The soup", "'s good", None),
        ("The soup", "", None),
        ("Answer:\n", "good", None),
        ("汤很", "好喝", None),
        ("ซุป", "อร่อย", None),
    ],
)
def test_a_prompt_and_its_completion_need_one_space(prompt: str, completion: str, what: str | None) -> None:
    pair = ContrastPair(prompt, "(so so)", completion)
    level, sentence, rows = the_one([ContrastPair("Well,", " a", " b"), pair], "spaces")
    if what is None:
        assert level == "ok"
    else:
        assert (level, sentence, rows) == ("warning", f"In 1 pair {what} where the completion begins.", (1,))


def test_answers_of_a_chat_need_no_space() -> None:
    assert the_one([ContrastPair("How was it?", "Good.", "Bad.", chat=True)], "spaces")[0] == "ok"


# -- what goes in ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "messages", ["hi", {"role": "user", "content": "hi"}, [{"rol": "user", "content": "hi"}], [("user", "hi")], 3,
                 [{"role": "user", "content": 3}]],
)  # fmt: skip
def test_messages_are_dicts_of_two_texts(messages: Any) -> None:
    with pytest.raises(TypeError, match="messages are a list of dicts with the texts role and content, not"):
        ContrastPair("", "a", "b", messages=messages)


def test_switches_and_splits_of_a_pair() -> None:
    with pytest.raises(TypeError, match="chat is True or False, not 'yes'"):
        ContrastPair("p", "a", "b", chat="yes")  # type: ignore[arg-type]
    for attempt in (lambda: ContrastPair("p", "a", "b", "trian"), lambda: PairSet(good(2)).split("trian")):
        with pytest.raises(ValueError, match="a split is one of train, choose, report, not 'trian'. Nearest: train"):
            attempt()


def test_sums_and_copies_of_pair_sets_are_pair_sets() -> None:
    moods, more = PairSet(good(3), name="moods"), PairSet(good(5)[3:], name="more")
    assert repr(moods + more) == "PairSet('moods + more', 5 pairs)"
    assert moods + more == good(5)
    assert [(type(s), s.name) for s in (moods.copy(), copy.copy(moods), moods + list(more))] == [(PairSet, "moods")] * 3
    assert (moods + moods).name == "moods"
    assert moods.copy() is not moods
    with pytest.raises(TypeError, match="list of ContrastPair"):
        moods + list("a")  # type: ignore[operator]
    with pytest.raises(TypeError):
        moods + 3  # type: ignore[operator]


def test_shares_that_are_not_given_divide_the_rest() -> None:
    made = PairSet(good(100))
    assert made.with_splits(train=0.8).splits == {"train": 80, "choose": 8, "report": 12}
    assert made.with_splits(choose=0.3).splits == {"train": 44, "choose": 30, "report": 26}
    assert made.with_splits(train=0.5, choose=0.5).splits == {"train": 50, "choose": 50}
    assert made.with_splits(train=0.9, choose=0.1).splits == {"train": 90, "choose": 10}
    with pytest.raises(ValueError, match="sum to 1, not train=1.5"):
        made.with_splits(train=1.5)
    for wrong in ("a", True, [0.5]):
        with pytest.raises(ValueError, match="shares of the splits are at least 0 and sum to 1, not train="):
            made.with_splits(wrong)  # type: ignore[arg-type]
    for attempt in (lambda: made.shuffled("a"), lambda: made.with_splits(seed="a"), lambda: made.shuffled(-1)):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="a seed is a whole number from 0 on, not"):
            attempt()


def test_a_model_measures_lengths_by_its_tokenizer(pocket: InterpretableModel) -> None:
    made = PairSet(good(4))
    assert str(made.check(pocket)) == str(made.check(pocket.tokenizer))
    with pytest.raises(TypeError, match="without a tokenizer"):
        made.check(InterpretableModel(pocket.model))


def test_pairs_are_hashed_with_a_conversation_too() -> None:
    said = {"role": "user", "content": "Is?"}, {"role": "user", "content": "Was?"}
    first, same, other = (ContrastPair("", "a", "b", messages=(m,)) for m in (said[0], dict(said[0]), said[1]))
    assert hash(first) == hash(same)
    assert len({first, same, other}) == 2


def test_a_pair_is_known_again_by_its_hash() -> None:
    pair = ContrastPair("The soup was", " good.", " bad.", split="train")
    same = [
        replace(pair, split="report"),
        ContrastPair("the  soup was", " Good.", " bad."),
        ContrastPair("The soup was", " bad.", " good.", chat=True),
        ContrastPair("", "The soup was good.", "The soup was bad."),
    ]
    asked = {"role": "user", "content": "How was it?"}
    others = [replace(pair, positive=" fine."), replace(pair, prompt="A soup was"),
              ContrastPair("", " good.", " bad.", messages=(asked,))]  # fmt: skip
    assert re.fullmatch("[0-9a-f]{8}", pair_hash(pair))
    assert {pair_hash(one) for one in same} == {pair_hash(pair)}
    assert len({pair_hash(one) for one in [pair, *others]}) == 4
    kept = pair_hashes([*others, pair, pair])
    assert kept == pair_hashes([pair, *others[::-1]])
    assert len(kept[PAIR_HASHES]) == 4 * 9 - 1
    assert pairs_seen(kept[PAIR_HASHES], [same[0], same[1], replace(pair, positive=" new.")]) == 2
    assert [pairs_seen(hashes, [pair]) for hashes in ("", None, 3)] == [0, None, None]
    many = [replace(pair, prompt=str(i)) for i in range(MOST_HASHES + 1)]
    assert (len(pair_hashes(many[1:])), pair_hashes(many)) == (1, {})


def test_what_splits_share_is_counted() -> None:
    def pair(prompt: str, positive: str, split: str | None) -> ContrastPair:
        return ContrastPair(prompt, positive, " no", split)

    apart = [pair("a", " x", "train"), pair("a", " y", "train"), pair("", "x", "choose"), pair("", "y", "report"),
             pair("a", " x", None)]  # fmt: skip
    assert shared_by_splits(apart) == (0, 0)
    assert shared_by_splits([*apart, pair("A ", " z", "report")]) == (0, 3)
    assert shared_by_splits([*apart, pair("A", " X", "report")]) == (2, 1)


def test_groups_divide_a_set() -> None:
    rows = [
        ContrastPair("p", "a", "b", group="ocean"),
        ContrastPair("q", "a", "b", group="farm"),
        ContrastPair("r", "a", "b"),
    ]
    pairs = PairSet([*rows, replace(rows[0], prompt="s")], name="topic")
    assert pairs.groups == {"ocean": 2, "farm": 1}
    assert pairs.group("ocean") == [pairs[0], pairs[3]]
    assert pairs.group("ocean").name == "topic: ocean"
    assert PairSet(rows).group("farm").name == "farm"
    assert PairSet(rows[2:]).groups == {}
    assert pairs.with_splits(train=0.5, choose=0, report=0.5).groups == pairs.groups
    with pytest.raises(ValueError, match=r"no pair is in the group 'ocaen'\. Nearest: ocean\."):
        pairs.group("ocaen")
    with pytest.raises(ValueError, match=r"group 'ocean'\. No pair of this set names a group\."):
        PairSet(rows[2:]).group("ocean")
    with pytest.raises(TypeError, match="group is a text such as 'ocean', not 3"):
        ContrastPair("p", "a", "b", group=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="group is empty"):
        ContrastPair("p", "a", "b", group="")
