"""Contrast pairs, their splits, and the sets that come with the package."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import mlxsteer as ms
from mlxsteer import ContrastPair
from mlxsteer.pairs import SPLITS, in_split
from mlxsteer.pocket import scorer
from mlxsteer.pocket.grammar import SIDES, TOPICS

POCKET = ["certainty", "formality", "refusal", "sentiment", "tasks", "topic"]
SHIPPED = ["certainty", "formality", "refusal", "sentiment", *(f"pocket/{name}" for name in POCKET)]
every_set = pytest.mark.parametrize("name", ms.datasets.available())


def test_the_shipped_sets_are_available() -> None:
    assert set(SHIPPED) <= set(ms.datasets.available())
    assert ms.datasets.available() == sorted(set(ms.datasets.available()))


@every_set
def test_every_available_set_loads_as_pairs_in_three_splits(name: str) -> None:
    pairs = ms.datasets.load(name)
    assert all(isinstance(pair, ContrastPair) and pair.split in SPLITS for pair in pairs)
    parts = {split: ms.datasets.load(name, split) for split in SPLITS}
    for split, part in parts.items():
        assert part == [pair for pair in pairs if pair.split == split]
        assert len(part) >= 20
    assert sum(map(len, parts.values())) == len(pairs)


@every_set
def test_no_pair_is_in_a_set_twice_and_no_text_in_two_splits(name: str) -> None:
    pairs = ms.datasets.load(name)
    texts = [(pair.prompt, pair.positive, pair.negative) for pair in pairs]
    assert len(set(texts)) == len(texts)
    sides = {
        split: {p.prompt + side for p in ms.datasets.load(name, split) for side in (p.positive, p.negative)}
        for split in SPLITS
    }
    assert not sides["train"] & sides["choose"]
    assert not (sides["train"] | sides["choose"]) & sides["report"]


@every_set
def test_a_prompt_and_its_completions_make_a_text_without_gaps_or_double_blanks(name: str) -> None:
    for pair in ms.datasets.load(name):
        for side in (pair.positive, pair.negative):
            assert side.strip()
            if pair.chat or pair.messages:  # answers stand alone
                assert side == side.strip()
                continue
            assert "  " not in pair.prompt + side
            assert pair.prompt == pair.prompt.rstrip()
            assert side.startswith(" ")


def test_a_set_is_the_lines_of_its_file(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"prompt": "É", "positive": " a", "negative": " b", "split": "train"},
        {"prompt": "C", "positive": "x", "negative": ""},
    ]
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "own.jsonl").write_text(
        "\n\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n", "utf-8"
    )
    monkeypatch.setattr(ms.datasets, "_FOLDER", tmp_path)
    assert ms.datasets.available() == ["deep/own"]
    assert ms.datasets.load("deep/own") == [ContrastPair(**row) for row in rows]
    assert ms.datasets.load("deep/own", "train") == [ContrastPair(**rows[0])]
    with pytest.raises(ValueError, match=r"deep/own has no split 'report'; it has \['none', 'train'\]"):
        ms.datasets.load("deep/own", "report")


def test_an_unknown_set_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no contrast set called 'sentimant'\. Nearest: sentiment"):
        ms.datasets.load("sentimant")


@pytest.mark.parametrize("name", ["", "zzzz", "../pocket/model/config", "sentiment.jsonl", "Sentiment/", "/etc/hosts"])
def test_a_name_that_is_no_set_is_refused(name: str) -> None:
    for attempt in (ms.datasets.load, ms.datasets.card):
        with pytest.raises(
            ValueError, match=r"no contrast set called .* (Nearest: .*sentiment|datasets\.available\(\) lists)"
        ):
            attempt(name)


def test_what_is_no_name_is_refused() -> None:
    for wrong in (None, 3, ["sentiment"]):
        for attempt in (ms.datasets.load, ms.datasets.card):
            with pytest.raises(TypeError, match="a contrast set is named by a text such as 'sentiment', not "):
                attempt(wrong)  # type: ignore[arg-type]


def test_an_unknown_split_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"sentiment has no split 'test'; it has \['choose', 'report', 'train'\]"):
        ms.datasets.load("sentiment", "test")
    with pytest.raises(ValueError, match=r"sentiment has no split 'trian'.*Nearest: train"):
        ms.datasets.load("sentiment", "trian")


# -- pairs -----------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "no text": ((1, "a", "b"), TypeError, "prompt is a text, not int"),
    "no completion": (("p", None, "b"), TypeError, "positive is a text, not NoneType"),
    "a list": (("p", "a", ["b"]), TypeError, "negative is a text, not list"),
    "nothing to read": (("", "", "b"), ValueError, "empty side has nothing to read"),
    "nothing to read on the other side": (("", "a", ""), ValueError, "empty side has nothing to read"),
    "no contrast": (("p", "a", "a"), ValueError, "both sides of a contrast pair are 'a'"),
    "unknown split": (("p", "a", "b", "test"), ValueError, "a split is one of train, choose, report, not 'test'"),
}


@pytest.mark.parametrize(("values", "error", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_contrast_is_refused(values: tuple[Any, ...], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        ContrastPair(*values)


def test_a_side_may_be_empty_where_there_is_a_prompt() -> None:
    assert ContrastPair("p", "", "b").positive == ""


def test_without_splits_every_split_is_all_pairs_and_with_them_only_its_own() -> None:
    plain = [ContrastPair("p", "a", "b"), ContrastPair("q", "a", "b")]
    split = [ContrastPair("p", "a", "b", "train"), ContrastPair("q", "a", "b", "report"), ContrastPair("r", "a", "b")]
    assert in_split(plain, "train") == in_split(plain, "report") == plain
    assert in_split(split, "train") == split[:1]
    with pytest.raises(ValueError, match=r"no pair is in the split 'choose'; there are \['none', 'report', 'train'\]"):
        in_split(split, "choose")


@every_set
def test_every_set_has_its_numbers_on_its_card_and_pairs_enough(name: str) -> None:
    pairs, card = ms.datasets.load(name), ms.datasets.card(name)
    assert len(pairs) >= (200 if name.startswith("pocket/") else 100)
    assert card.startswith("#")
    size = re.search(r"(\d+) pairs: train (\d+), choose (\d+), report (\d+)", card)
    assert size, card
    assert [int(number) for number in size.groups()] == [len(pairs), *(len(pairs.split(name)) for name in SPLITS)]


@every_set
def test_every_set_passes_its_own_checks(name: str) -> None:
    assert ms.datasets.load(name).check().ok


def test_topics_and_tasks_are_groups_of_their_sets() -> None:
    topics, tasks = ms.datasets.load("pocket/topic"), ms.datasets.load("pocket/tasks")
    assert set(topics.groups) == set(TOPICS)
    assert len(tasks.groups) == 10
    for pairs in (topics, tasks):
        for group, count in pairs.groups.items():
            assert len(pairs.group(group)) == count >= 16
            assert set(pairs.group(group).splits) == set(SPLITS)
    assert all(scorer.topic(pair.positive) == pair.group != scorer.topic(pair.negative) for pair in topics)
    for pair in tasks:
        word = pair.prompt.splitlines()[-1].removesuffix(" ->")
        assert scorer.answer_is_right(pair.group or "", word, pair.positive)
        assert not scorer.answer_is_right(pair.group or "", word, pair.negative)


@pytest.mark.parametrize("behaviour", list(SIDES))
def test_the_sides_of_the_bundled_sets_are_those_of_the_grammar(behaviour: str) -> None:
    for pair in ms.datasets.load(f"pocket/{behaviour}"):
        assert (scorer.side(behaviour, pair.positive), scorer.side(behaviour, pair.negative)) == SIDES[behaviour]


def test_the_letters_of_two_option_sets_are_balanced_in_every_split() -> None:
    for name in (n for n in ms.datasets.available() if n.endswith("_ab")):
        for split in ("train", "choose", "report"):
            letters = [pair.positive.strip() for pair in ms.datasets.load(name, split)]
            assert letters.count("(A)") == letters.count("(B)") == len(letters) / 2


def test_a_set_without_a_card_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.jsonl").write_text('{"positive": "a", "negative": "b"}\n')
    with monkeypatch.context() as patched, pytest.raises(ValueError, match="own has no card"):
        patched.setattr(ms.datasets, "_FOLDER", tmp_path)
        ms.datasets.card("own")
    with pytest.raises(ValueError, match="Nearest: sentiment"):
        ms.datasets.card("sentimant")
