"""Word pairs: the shipped sets, and in-context prompts made of them."""

from __future__ import annotations

from typing import Any

import pytest

import mlxsteer as ms
from mlxsteer.pairs import SPLITS
from mlxsteer.pocket import scorer
from mlxsteer.word_pairs import TEMPLATES

SHIPPED = ["adverb", "antonym", "capital", "comparative", "nationality", "past_tense", "plural", "synonym"]
COLOURS = [("one", "1"), ("two", "2"), ("three", "3"), ("four", "4"), ("five", "5"), ("six", "6")]
every_set = pytest.mark.parametrize("name", SHIPPED)


# -- sets ------------------------------------------------------------------------------------------------------------


def test_the_sets_of_word_pairs_are_listed_apart_from_contrast_sets() -> None:
    assert [name for name in ms.datasets.word_sets() if not name.startswith("pocket/")] == SHIPPED
    assert not [name for name in ms.datasets.available() if name.startswith("words")]


@every_set
def test_a_set_has_a_hundred_pairs_and_no_word_twice_on_a_side(name: str) -> None:
    pairs = ms.datasets.words(name)
    assert len(pairs) >= 100
    for side in zip(*pairs, strict=True):
        assert len({word.casefold() for word in side}) == len(side)
        assert all(word == word.strip() and "  " not in word and word for word in side)
    assert all(a != b for a, b in pairs)
    if name in ("antonym", "synonym"):  # no pair comes back the other way round
        assert len({word for pair in pairs for word in pair}) == 2 * len(pairs)


@every_set
def test_splits_share_nothing_and_make_up_the_set(name: str) -> None:
    parts = [ms.datasets.words(name, split) for split in SPLITS]
    assert sorted(pair for part in parts for pair in part) == sorted(ms.datasets.words(name))
    assert min(map(len, parts)) >= 20
    card = ms.datasets.card(f"words/{name}")
    assert (
        f"{sum(map(len, parts))} pairs: train {len(parts[0])}, choose {len(parts[1])}, report {len(parts[2])}" in card
    )
    assert "Written by hand for mlxsteer" in card


def test_the_bundled_models_tasks_have_the_answers_of_its_scorer_and_the_splits_of_its_training() -> None:
    for name in (name for name in ms.datasets.word_sets() if name.startswith("pocket/")):
        task = name.removeprefix("pocket/")
        pairs = ms.datasets.words(name)
        assert all(scorer.right_answer(task, word) == answer for word, answer in pairs)
        parts = [ms.datasets.words(name, split) for split in SPLITS]
        assert sorted(pair for part in parts for pair in part) == sorted(pairs)
    rows = ms.datasets.load("pocket/tasks", "report").group("antonym")  # written when the model was trained
    asked = {pair.prompt.rsplit("\n")[-1].removesuffix(" ->") for pair in rows}
    assert asked <= {word for word, _ in ms.datasets.words("pocket/antonym", "report")}
    assert "Word-pair tasks" in ms.datasets.card("words/pocket/antonym")


def test_a_set_or_split_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no set of word pairs called 'antonyms'\. Nearest: antonym"):
        ms.datasets.words("antonyms")
    with pytest.raises(ValueError, match="no set of word pairs called 'nope'"):
        ms.datasets.card("words/nope")
    with pytest.raises(ValueError, match=r"a split is one of train, choose, report, not 'test'"):
        ms.datasets.words("antonym", "test")
    with pytest.raises(TypeError, match="named by a text such as 'antonym', not 3"):
        ms.datasets.words(3)  # type: ignore[arg-type]


# -- prompts ---------------------------------------------------------------------------------------------------------


def test_a_prompt_shows_examples_and_asks_a_word_that_is_none_of_them() -> None:
    prompts = ms.in_context(COLOURS, shots=3)
    assert [prompt.word for prompt in prompts] == [word for word, _ in COLOURS]
    for prompt, (word, answer) in zip(prompts, COLOURS, strict=True):
        lines = prompt.text.split("\n")
        assert lines == [*(f"{a} -> {b}" for a, b in prompt.examples), f"{word} ->"]
        assert prompt.answer == f" {answer}"
        assert len(set(prompt.examples)) == 3
        assert set(prompt.examples) <= set(COLOURS) - {(word, answer)}


def test_zero_shots_ask_alone() -> None:
    assert [prompt.text for prompt in ms.in_context(dict(COLOURS), shots=0)] == [f"{word} ->" for word, _ in COLOURS]
    assert ms.in_context(COLOURS[:1], shots=0)[0].text == "one ->"


def test_shuffled_prompts_are_the_others_with_no_label_in_its_place() -> None:
    right = ms.in_context(COLOURS, 20, shots=5, seed=3)
    wrong = ms.in_context(COLOURS, 20, shots=5, seed=3, shuffled=True)
    answers = dict(COLOURS)
    for a, b in zip(right, wrong, strict=True):
        assert (a.word, a.answer) == (b.word, b.answer)
        assert [word for word, _ in a.examples] == [word for word, _ in b.examples]
        assert sorted(label for _, label in a.examples) == sorted(label for _, label in b.examples)
        assert all(answers[word] != label for word, label in b.examples)
        assert b.text == TEMPLATES["arrow"].prompt(b.examples, b.word)
        assert (a.shuffled, b.shuffled) == (False, True)


def test_the_seed_decides_and_a_count_goes_round_the_questions() -> None:
    first, again, other = (ms.in_context(COLOURS, 14, shots=2, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert sorted(p.word for p in first[:6]) == sorted(p.word for p in first[6:12]) == sorted(w for w, _ in COLOURS)


def test_other_words_are_asked_than_those_shown() -> None:
    prompts = ms.in_context(COLOURS[:4], shots=4, queries=COLOURS[4:])
    assert [prompt.word for prompt in prompts] == ["five", "six"]
    assert {word for prompt in prompts for word, _ in prompt.examples} == {"one", "two", "three", "four"}


@pytest.mark.parametrize(
    ("template", "text", "answer"),
    [
        ("arrow", "one -> 1\ntwo ->", " 2"),
        ("colon", "one: 1\ntwo:", " 2"),
        ("questions", "Q: one\nA: 1\n\nQ: two\nA:", " 2"),
        ("words", "Input: one\nOutput: 1\n\nInput: two\nOutput:", " 2"),
        (ms.Template("<{input}>{output}", " ", "Numbers. "), "Numbers. <one>1 <two>", "2"),
    ],
)
def test_templates_write_examples_and_leave_the_blank_to_the_answer(template: Any, text: str, answer: str) -> None:
    prompt = ms.in_context(COLOURS[:1], shots=1, queries=COLOURS[1:2], template=template)[0]
    assert (prompt.text, prompt.answer) == (text, answer)


REFUSED: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    (("one",), {}, TypeError, "pairs are a list of"),
    ((3,), {}, TypeError, "pairs are a list of"),
    (([],), {}, ValueError, "pairs are empty"),
    (([("one", 1)],), {}, TypeError, r"number 0: a pair is \(input, output\), two texts, not \('one', 1\)"),
    ((["ab"],), {}, TypeError, "two texts, not 'ab'"),
    (([("one", " ")],), {}, ValueError, "has an empty text"),
    (([("a", "b"), ("a", "c")],), {}, ValueError, "the input 'a' twice"),
    ((COLOURS,), {"shots": 6}, ValueError, "6 pairs are too few for 6 examples"),
    ((COLOURS,), {"shots": -1}, ValueError, "shots is a whole number from 0 on"),
    ((COLOURS, 0), {"shots": 2}, ValueError, "count is a whole number from 1 on"),
    ((COLOURS,), {"shots": 1, "shuffled": True}, ValueError, "need at least 2 examples"),
    ((COLOURS,), {"shots": 2, "shuffled": 1}, TypeError, "shuffled is True or False"),
    ((COLOURS,), {"shots": 2, "seed": -1}, ValueError, "a seed is"),
    ((COLOURS,), {"shots": 2, "template": "arow"}, ValueError, "no template called 'arow'. Nearest: arrow"),
    ((COLOURS,), {"shots": 2, "template": 3}, TypeError, "template is a Template or a name"),
    ((COLOURS,), {"shots": 2, "queries": "x"}, TypeError, "queries are a list of"),
]


@pytest.mark.parametrize(("given", "options", "error", "sentence"), REFUSED)
def test_what_makes_no_prompts_is_refused(given: Any, options: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        ms.in_context(*given, **options)


@pytest.mark.parametrize("example", ["{input}", "{output} {input}", "{input} {input} {output}", "{output}"])
def test_a_template_that_asks_nothing_is_refused(example: str) -> None:
    with pytest.raises(ValueError, match="an example has {input} once and ends with {output}"):
        ms.Template(example)
    with pytest.raises(TypeError, match="separator is a text"):
        ms.Template(separator=1)  # type: ignore[arg-type]
