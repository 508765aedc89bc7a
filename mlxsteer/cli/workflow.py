"""`mlxsteer extract`, `sweep`, `select`, `evaluate`: from contrast pairs to a steering, and what it does and costs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mlxsteer import interventions as iv
from mlxsteer.choice import Choice
from mlxsteer.cli.options import (
    At,
    Json,
    Layer,
    Layers,
    Model,
    Pairs,
    Places,
    Seed,
    Strength,
    Strengths,
    Unit,
    layers_of,
    numbers_of,
    pairs_of,
    picture,
    said,
    some_layers,
    taken,
    taken_words,
    target,
    unit_of,
)  # fmt: skip
from mlxsteer.cli.screen import bar, literal, remarks, writing
from mlxsteer.cli.sources import Named, check_places, opened, position
from mlxsteer.directions import available as methods
from mlxsteer.evaluation import Evaluation
from mlxsteer.evaluation import evaluate as evaluated
from mlxsteer.extraction import extract as extracted
from mlxsteer.model import InterpretableModel
from mlxsteer.pairs import SPLITS, PairSet, counted, hint, in_split, nearest
from mlxsteer.selection import select as selected
from mlxsteer.sweep import Sweep
from mlxsteer.sweep import sweep as swept
from mlxsteer.vectors import SteeringVector

_READS = ("last", "first", "mean", "all")


def _read(text: str) -> str | int:
    if text in _READS:
        return text
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--read {text}: a name or an index such as -2. {nearest(text, _READS)}") from None


def extract(
    pairs: Pairs,
    out: Annotated[Path, typer.Option(help="Where to save the vector, .safetensors.")],
    model: Model = "pocket",
    method: Annotated[str, typer.Option(help=f"How it is computed: {', '.join(methods())}.")] = "mean_difference",
    read: Annotated[str, typer.Option(help="The token that is read: last, first, mean, all or an index.")] = "last",
    layers: Layers = "all",
    chat: Annotated[bool, typer.Option(help="Prompts are a user's messages.")] = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Compute a steering vector from contrast pairs, those of the train split where there are splits."""
    target(out, ".safetensors", "--out")
    if method not in methods():
        raise ValueError(f"--method {method}: there is none. {nearest(method, methods())}")
    where, which, data = _read(read), layers_of(layers), pairs_of(pairs, model)
    loaded = InterpretableModel(model)
    with remarks(Console(stderr=True)), bar("activations") as step:
        vector = extracted(loaded, data, method=method, read=where, layers=which, chat=chat, seed=seed, progress=step)
    of = taken(data, "train")
    if as_json:
        said({"vector": str(out), "model": loaded.name, "method": method, "set": of, "layers": list(_rows(vector))})
    else:
        Console().print(literal(f"{taken_words(of)}\n{vector.describe()}"))
    if 1 in of.values():
        Console(stderr=True).print(literal("note: one pair says more of its words than of a behaviour; from 80 on "
                                           "vectors are usually reliable.", "yellow"), soft_wrap=True)  # fmt: skip
    _keep(as_json, (out, vector.save))


def _rows(vector: SteeringVector) -> Iterator[dict[str, Any]]:
    """What is known of each layer's direction."""
    tables = {"length": vector.norms, "residual_norm": vector.residual_norms, "agreement": vector.agreement,
              "reliability": vector.reliability}  # fmt: skip
    for layer in vector.layers:
        known = {name: table.get(layer, math.nan) for name, table in tables.items()}
        yield {"layer": layer} | {name: None if math.isnan(value) else value for name, value in known.items()}


def sweep(
    vector: Annotated[str, typer.Option(help="A vector's file.")],
    pairs: Pairs,
    model: Model = "pocket",
    split: Annotated[str, typer.Option(help="The split whose pairs are measured, where there are splits.")] = "choose",
    limit: Annotated[int, typer.Option(min=1, help="The most pairs.")] = 32,
    layers: Layers = "all",
    strengths: Strengths = "-1,-0.5,0,0.5,1",
    unit: Unit = "residual",
    at: At = "-1",
    plot: Annotated[Path | None, typer.Option(help="Draw it: .png, .pdf or .svg.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write all of it as JSON.")] = None,
    as_json: Json = False,
) -> None:
    """Steer at each layer with each strength, and measure how far it moves held-out pairs."""
    measure = unit_of(unit)
    if split not in SPLITS:
        raise ValueError(f"--split {split}: one of {', '.join(SPLITS)}.{hint(split, SPLITS)}")
    if out is not None:
        target(out, ".json", "--out")
    drawn, which, how, where = picture(plot), layers_of(layers), numbers_of(strengths, "--strengths"), position(at)
    source, given = _vector(vector, model), pairs_of(pairs, model)
    data = in_split(given, split)[:limit]
    loaded = InterpretableModel(model)
    with remarks(Console(stderr=True)), bar(f"{counted(len(data), 'pair')} × {counted(len(how), 'strength')}") as step:
        found = swept(loaded, source, data, layers=which, strengths=how, at=where, unit=measure, progress=step)
    found = replace(found, record={**found.record, "set": taken(given, split, most=limit)})
    _show(found, as_json)
    _keep(as_json, (out, found.to_json), (drawn, found.plot))


def _show(found: Sweep | Choice | Evaluation, as_json: bool, **more: Any) -> None:
    if as_json and more:
        said(json.loads(found.to_json()) | more)
    elif as_json:
        said(found.to_json())
    else:
        screen = Console()
        screen.print(literal(taken_words(found.record["set"])))
        screen.print(found)


def _keep(as_json: bool, *files: tuple[Path | None, Callable[[Path], Any]]) -> None:
    """Write the files that are wanted, last of all: what was found is on the screen, should one fail."""
    for path, write in files:
        if path is not None:
            with writing(path):
                write(path)
            if not as_json:
                Console().print(literal(f"Saved: {path}"), soft_wrap=True)


def _vector(name: str, model: str) -> SteeringVector:
    source = opened(name, model)
    if not isinstance(source, SteeringVector):
        if isinstance(source, dict) and Path(name).expanduser().exists():
            raise ValueError(f"--vector {name} holds interventions, and no vector: mlxsteer extract writes one.")
        raise ValueError(f"--vector {name}: no vector; mlxsteer extract --pairs {name} computes one.")
    return source


def select(
    pairs: Pairs,
    out: Annotated[Path, typer.Option(help="Where to save what steers, for --steer; .safetensors.")],
    model: Model = "pocket",
    vector: Annotated[str | None, typer.Option(help="A vector's file; else it is computed on the train split.")] = None,
    budget: Annotated[float, typer.Option(min=1e-6, help="Mean KL to the unsteered model on neutral text, nats.")] = (
        0.3
    ),
    layers: Layers = "all",
    at: At = "-1",
    nulls: Annotated[int, typer.Option(min=0, help="Random vectors to hold the result against.")] = 20,
    chat: Annotated[bool, typer.Option(help="Prompts are a user's messages.")] = False,
    seed: Seed = 0,
    plot: Annotated[Path | None, typer.Option(help="Draw it: .png, .pdf or .svg.")] = None,
    as_json: Json = False,
) -> None:
    """Choose layer and strength by what steering does on held-out pairs, at equal side effects."""
    target(out, ".safetensors", "--out")
    drawn, which, where = picture(plot), layers_of(layers), position(at)
    source, data = None if vector is None else _vector(vector, model), pairs_of(pairs, model)
    loaded = InterpretableModel(model)
    with remarks(Console(stderr=True)), bar("choosing") as step:
        choice = selected(
            loaded, data, vector=source, budget={"kl_mean": budget}, layers=which, at=where, nulls=nulls, chat=chat,
            seed=seed, progress=step,
        )  # fmt: skip
    choice.record["set"] = taken(data, *SPLITS[vector is not None :])
    _show(choice, as_json, steer=str(out))
    _keep(as_json, (out, lambda path: iv.save(choice.interventions, path)), (drawn, choice.plot))
    if not as_json:
        use = f"Use it: mlxsteer generate --model {model} --steer {out} 'your prompt'"
        Console().print(literal(use), soft_wrap=True)


def evaluate(
    steer: Annotated[str, typer.Option(help="What steers: a saved steering, or a vector with --layer.")],
    pairs: Pairs,
    model: Model = "pocket",
    layer: Layer = None,
    strength: Strength = None,
    unit: Unit = "raw",
    at: Places = None,
    instruction: Annotated[str | None, typer.Option(help="A sentence that asks for it, to compare with.")] = None,
    nulls: Annotated[int, typer.Option(min=0, help="Random vectors to hold the result against.")] = 20,
    chat: Annotated[bool, typer.Option(help="Prompts are a user's messages.")] = False,
    seed: Seed = 0,
    plot: Annotated[Path | None, typer.Option(help="Draw it: .png, .pdf or .svg.")] = None,
    as_json: Json = False,
) -> None:
    """Measure a steering on pairs that nothing was chosen on: effect, nulls, and what it costs on neutral text."""
    measure, drawn, where, layers = unit_of(unit), picture(plot), position(at or "-1"), some_layers(layer)
    data, source = pairs_of(pairs, model), opened(steer, model)
    if isinstance(source, PairSet):
        raise ValueError(f"--steer {steer}: a contrast set; extract a vector, or select a steering, first.")
    check_places([(steer, source)], layers, at, unit)
    loaded = InterpretableModel(model)
    with remarks(Console(stderr=True)), bar("measuring") as step:
        named = Named.made(loaded, source, layers, strength, where, unit=measure)
        found = evaluated(
            loaded, named.interventions(), data, instruction=instruction, nulls=nulls, chat=chat, seed=seed,
            vector=source if isinstance(source, SteeringVector) else None, progress=step,
        )  # fmt: skip
    found.record["set"] = taken(data, *["report"] * ("report" in data.splits))
    _show(found, as_json)
    for warning in () if as_json else found.warnings:
        Console().print(literal(f"Warning: {warning}", "yellow"), soft_wrap=True)
    _keep(as_json, (drawn, found.plot))
