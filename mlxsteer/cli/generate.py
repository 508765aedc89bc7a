"""`mlxsteer generate`: text from a prompt, steered, and plain beside it where asked."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from mlxsteer.cli.options import Json, Model, Steer, Unit, finite, layers_of, said, unit_of
from mlxsteer.cli.screen import literal, remarks
from mlxsteer.cli.sources import ENOUGH, Named, Source, opened, position
from mlxsteer.extraction import extract
from mlxsteer.model import InterpretableModel
from mlxsteer.pairs import PairSet, in_split
from mlxsteer.recommended import recommended


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to go on from; - reads it from the standard input.")],
    model: Model = "pocket",
    steer: Steer = None,
    layer: Annotated[
        str | None, typer.Option(help="Where vectors act, 4 or 3,5; their middle layer, unless told.")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(callback=finite, help="How strongly; 0 is plain, 1 unless told.")
    ] = None,
    unit: Unit = "raw",
    at: Annotated[
        str | None, typer.Option(help="The tokens that vectors act on: all, prompt, generated, last, first, -1, 2:5.")
    ] = None,
    chat: Annotated[bool, typer.Option(help="The prompt is a user's message.")] = False,
    compare: Annotated[bool, typer.Option(help="Also generate without what steers.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="The most tokens.")] = 128,
    temp: Annotated[float, typer.Option(min=0, callback=finite, help="The temperature; 0 is greedy.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(help="Sample among tokens of so much probability together.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of sampling.")] = None,
    as_json: Json = False,
) -> None:
    """Go on from a prompt, steered.

    A contrast set whose steering of the model was measured acts as it was measured, --strength times, unless --layer or
    --at say otherwise.
    """
    measure, untold = unit_of(unit), layer is None and at is None
    where, layers = position(at or "all"), [] if layer is None else layers_of(layer)
    if layers == "all":
        raise ValueError("--layer all: name the layers, such as 3,5; at all of them at once a strength means little.")
    if not steer and (layer is not None or strength is not None or compare):
        raise ValueError("--layer, --strength and --compare say how something steers: name it by --steer.")
    text = sys.stdin.read() if prompt == "-" else prompt
    sources = [opened(name, model) for name in steer or ()]
    aside = Console(stderr=True)
    loaded = InterpretableModel(model)
    asked: Any = [{"role": "user", "content": text}] if chat else text
    steering: dict[str, Any] = {}
    with remarks(aside):
        for given in sources:
            source = _as_measured(loaded, given) if isinstance(given, PairSet) and untold else given
            named = Named.made(loaded, source, [int(n) for n in layers], strength, where, unit=measure)
            if not as_json:
                aside.print(literal(f"steered: {named}", "dim"), soft_wrap=True)
            for key, one in named.interventions().items() if named.strength else ():
                steering[key] = steering[key] | one if key in steering else one
        options: dict[str, Any] = {"max_tokens": max_tokens, "temp": temp, "top_p": top_p, "seed": seed}
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


def _as_measured(model: InterpretableModel, pairs: PairSet) -> Source:
    """What a contrast set was measured to steer well by, where it was; else the set."""
    try:
        measured = recommended(model, pairs.name)
    except LookupError:
        return pairs
    vector = extract(model, in_split(pairs, "train")[:ENOUGH], layers=list(measured.strengths))
    return dict(measured.interventions(vector))
