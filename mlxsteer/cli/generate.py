"""`mlxsteer generate`: text from a prompt, steered, and plain beside it where asked."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from mlxsteer.cli.options import (
    Json,
    Layer,
    MaxTokens,
    Model,
    Places,
    Steer,
    Strength,
    Temperature,
    Unit,
    said,
    some_layers,
    unit_of,
)  # fmt: skip
from mlxsteer.cli.screen import literal, remarks
from mlxsteer.cli.sources import ENOUGH, Named, Source, check_places, opened, position, together
from mlxsteer.extraction import extract
from mlxsteer.model import InterpretableModel
from mlxsteer.pairs import PairSet, in_split
from mlxsteer.recommended import recommended


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to go on from; - reads it from the standard input.")],
    model: Model = "pocket",
    steer: Steer = None,
    layer: Layer = None,
    strength: Strength = None,
    unit: Unit = "raw",
    at: Places = None,
    chat: Annotated[bool, typer.Option(help="The prompt is a user's message.")] = False,
    compare: Annotated[bool, typer.Option(help="Also generate without what steers.")] = False,
    max_tokens: MaxTokens = 128,
    temp: Temperature = 0.0,
    top_p: Annotated[float | None, typer.Option(help="Sample among tokens of so much probability together.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of sampling.")] = None,
    as_json: Json = False,
) -> None:
    """Go on from a prompt, steered.

    A contrast set whose steering of the model was measured acts as it was measured, --strength times, unless --layer or
    --at say otherwise.
    """
    measure, untold = unit_of(unit), layer is None and at is None
    where, layers = position(at or "all"), some_layers(layer)
    if not steer and (layer is not None or strength is not None or compare):
        raise ValueError("--layer, --strength and --compare say how something steers: name it by --steer.")
    text = _read() if prompt == "-" else prompt
    sources = [(name, opened(name, model)) for name in steer or ()]
    check_places(sources, layers, at, unit)
    aside = Console(stderr=True)
    loaded = InterpretableModel(model)
    asked: Any = [{"role": "user", "content": text}] if chat else text
    with remarks(aside):
        named = []
        for _, given in sources:
            source = _as_measured(loaded, given) if isinstance(given, PairSet) and untold else given
            named.append(Named.made(loaded, source, layers, strength, where, unit=measure))
            if not as_json:
                aside.print(literal(f"steered: {named[-1]}", "dim"), soft_wrap=True)
        steering = together(loaded, named)
    options: dict[str, Any] = {"max_tokens": max_tokens, "temp": temp, "top_p": top_p, "seed": seed}
    with remarks(aside, at_once=True):  # a prompt that is too long takes its time
        texts = {"steered" if steering else "plain": loaded.generate(asked, steering or None, **options)}
        if compare and steering:
            texts["plain"] = loaded.generate(asked, **options)
    if as_json:
        said({"prompt": text} | {name: str(made) for name, made in texts.items()})
        return
    screen = Console()
    for name, made in texts.items():
        if len(texts) > 1:
            screen.print(literal(f"{name}:", "bold"))
        screen.print(literal(str(made)), soft_wrap=True)


def _read() -> str:
    try:
        text = sys.stdin.read()
        text.encode()  # some locales keep a byte that is no text as half a character
    except UnicodeError as error:
        raise ValueError("the prompt is no UTF-8 text: the standard input holds other bytes.") from error
    return text


def _as_measured(model: InterpretableModel, pairs: PairSet) -> Source:
    """What a contrast set was measured to steer well by, where it was; else the set."""
    try:
        measured = recommended(model, pairs.name)
    except LookupError:
        return pairs
    vector = extract(model, in_split(pairs, "train")[:ENOUGH], layers=list(measured.strengths))
    return dict(measured.interventions(vector))
