"""Options that mean the same in every command, and how what is typed is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mlxsteer import datasets
from mlxsteer.cli.sources import sets_for
from mlxsteer.pairs import PairSet, nearest


def finite(value: float | None) -> float | None:
    """A number that is given is finite."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number.")
    return value


Model = Annotated[str, typer.Option(help="A Hugging Face name, a folder, or 'pocket'.")]
Steer = Annotated[
    list[str] | None,
    typer.Option(
        "--steer",
        "--vector",
        help="What steers: a saved steering, a vector's file, or a set of pairs; may be repeated.",
    ),
]
Layer = Annotated[
    str | None,
    typer.Option("--layer", "--layers", help="Where vectors act, 4 or 3,5; their middle layer, unless told."),
]
Strength = Annotated[float | None, typer.Option(callback=finite, help="How strongly; 0 is plain, 1 unless told.")]
Places = Annotated[
    str | None, typer.Option(help="The tokens that vectors act on: all, prompt, generated, last, first, -1, 2:5.")
]
MaxTokens = Annotated[int, typer.Option(min=1, help="The most tokens.")]
Temperature = Annotated[float, typer.Option(min=0, callback=finite, help="The temperature; 0 is greedy.")]
Pairs = Annotated[
    str, typer.Option(help="A contrast set, such as sentiment, or a file of pairs: .jsonl, .json, .csv, .tsv.")
]
Layers = Annotated[str, typer.Option("--layers", "--layer", help="Layers: all, or like 4 or 3,5 or 2:6.")]
Strengths = Annotated[str, typer.Option(help="Strengths, with commas between them.")]
At = Annotated[str, typer.Option(help="The tokens that are steered: all, prompt, generated, last, first, -1, 2:5.")]
Unit = Annotated[str, typer.Option(help="residual: 1 is the layer's median norm; raw: 1 is the vector as it is.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object in place of tables.")]
Seed = Annotated[int, typer.Option(min=0, help="Of everything that is drawn at random.")]


def pairs_of(name: str, model: str) -> PairSet:
    """The pairs of a file, or of a contrast set; the bundled model has some in its own language.

    Raises:
        FileNotFoundError: there is neither, with the nearest sets.
        IsADirectoryError: it is a folder.
    """
    path = Path(name).expanduser()
    own = f"pocket/{name}"
    if path.is_file():
        return datasets.read(path)
    if model == "pocket" and own in datasets.available():
        return datasets.load(own)
    if name in datasets.available():
        return datasets.load(name)
    if path.is_dir():
        raise IsADirectoryError(f"{name} is a folder, not a file of contrast pairs: name a file in it.")
    end = nearest(name, sets_for(model), "mlxsteer datasets")
    if not end.startswith("Nearest"):  # as many as it lists
        end = nearest(name, datasets.available(), "mlxsteer datasets")
    raise FileNotFoundError(f"there is no file and no contrast set {name!r}. {end}")


def taken(data: PairSet, *splits: str, most: int | None = None) -> dict[str, Any]:
    """Which set was taken, and how many pairs of it: two sets may go by one name.

    Args:
        data: the set.
        splits: those that are looked at; all there are unless told.
        most: of each split.
    """
    counts = {name: count for name, count in data.splits.items() if name in (splits or data.splits)}
    counts = counts or {"all": len(data)}
    return {"name": data.name, **{name: count if most is None else min(count, most) for name, count in counts.items()}}


def taken_words(found: Mapping[str, Any]) -> str:
    """What `taken` found, in words."""
    counts = {name: count for name, count in found.items() if name != "name"}
    told = (f"{count} of {name}" if name != "all" else str(count) for name, count in counts.items())
    return f"pairs: {found['name']}, {', '.join(told)}"


def layers_of(text: str) -> str | list[int]:
    """``all``, or layers as they are typed: 4, 3,5 or 2:6 (without the last, as in Python).

    Raises:
        ValueError: it is none of these.
    """
    if text.strip() == "all":
        return "all"
    found: list[int] = []
    try:
        for part in text.split(","):
            first, colon, last = part.partition(":")
            found += range(int(first or 0), int(last)) if colon else [int(part)]
    except ValueError:
        found = []
    if not found:
        raise ValueError(f"{text!r} is no list of layers: they are written all, or like 4 or 3,5 or 2:6.")
    return list(dict.fromkeys(found))


def unit_of(text: str) -> Literal["raw", "residual"]:
    """The unit of strengths.

    Raises:
        ValueError: there is none of this name.
    """
    if text == "raw":
        return "raw"
    if text == "residual":
        return "residual"
    raise ValueError(f"--unit {text}: there are raw and residual.")


def some_layers(text: str | None) -> list[int]:
    """Layers as they are typed; none where they weren't.

    Raises:
        ValueError: they are none, or ``all``.
    """
    found = [] if text is None else layers_of(text)
    if isinstance(found, str):
        raise ValueError("--layer all: name the layers, such as 3,5; at all of them at once a strength means little.")
    return found


def numbers_of(text: str, option: str) -> list[float]:
    """Numbers with commas between them.

    Raises:
        ValueError: something else stands there.
    """
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        given = text or repr(text)
        raise ValueError(f"{option} {given}: numbers with commas between them, such as -1,0,1.")
    return found


def target(path: Path, ending: str, option: str) -> Path:
    """A file that can be written, asked before any work is done.

    Raises:
        ValueError: it has another ending, or lies in no folder that exists.
    """
    if path.suffix != ending or not path.absolute().parent.is_dir() or path.is_dir():
        raise ValueError(f"{option} {path}: name a {ending} file in a folder that exists.")
    return path


def picture(path: Path | None) -> Path | None:
    """A picture's file, if one is wanted.

    Raises:
        ValueError: no kind of picture that can be drawn, or no folder that exists.
        RuntimeError: there is no matplotlib.
    """
    if path is None:
        return None
    kinds = (".png", ".pdf", ".svg")
    if path.suffix not in kinds or not path.absolute().parent.is_dir():
        raise ValueError(f"--plot {path}: name a {', '.join(kinds)} file in a folder that exists.")
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise RuntimeError("--plot needs matplotlib: install mlxsteer[plot].")
    return path


def said(record: Any) -> None:
    """Print one JSON object."""
    import json

    typer.echo(record if isinstance(record, str) else json.dumps(record, indent=2, ensure_ascii=False))
