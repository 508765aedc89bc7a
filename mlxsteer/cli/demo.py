"""`mlxsteer demo`: from contrast pairs to steered text, in under a minute on the bundled model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlxsteer import datasets
from mlxsteer.cli.options import taken_words
from mlxsteer.cli.screen import bar, literal, writing
from mlxsteer.extraction import extract
from mlxsteer.model import InterpretableModel
from mlxsteer.pairs import ContrastPair, counted, in_split
from mlxsteer.sweep import Sweep, sweep
from mlxsteer.vectors import SteeringVector

STRENGTHS = (-2.0, -1.0, 0.0, 1.0, 2.0)
POSITION = -1
"""The vector is added once, at the last prompt token."""


def demo(
    model: Annotated[str, typer.Option(help="A Hugging Face name, a folder, or 'pocket'.")] = "pocket",
    behaviour: Annotated[str, typer.Option(help="A contrast set, such as sentiment, formality, certainty.")] = (
        "sentiment"
    ),
    pairs: Annotated[int, typer.Option(min=1, help="Training pairs to compute the vector from.")] = 24,
    held_out: Annotated[int, typer.Option(min=1, help="Held-out pairs to choose on, and to report on.")] = 4,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each completion.")] = 16,
    out: Annotated[
        Path | None, typer.Option(help="Where to save the vector.", show_default="BEHAVIOUR.safetensors")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object in place of tables.")] = False,
) -> None:
    """Find a steering vector, see where and how much it acts, and watch it change the text.

    Reads contrast pairs, computes their mean difference at every layer, scans layers and strengths on held-out pairs,
    completes a few held-out prompts at −, 0 and +, and saves the vector.
    """
    target = out if out is not None else Path(f"{behaviour.rsplit('/', 1)[-1]}.safetensors")
    if target.suffix != ".safetensors" or not target.absolute().parent.is_dir():
        raise ValueError(f"--out {target}: name a .safetensors file in a folder that exists.")
    screen = Console(quiet=as_json)
    own = f"pocket/{behaviour}"  # the bundled model has sets in its own language
    data = datasets.load(own if model == "pocket" and own in datasets.available() else behaviour)
    train, choose = in_split(data, "train")[:pairs], in_split(data, "choose")[:held_out]
    report = in_split(data, "report")[: 2 * held_out]
    loaded = InterpretableModel(model)
    of = {"name": data.name, "train": len(train), "choose": len(choose), "report": len(report)}
    screen.print(Text(repr(loaded), style="bold"))
    screen.print(literal(taken_words(of)))
    with bar(f"activations of {counted(len(train), 'pair')}, every layer") as step:
        vector = extract(loaded, train, progress=step)
    with bar(
        f"{len(loaded.layers)} layers × {len(STRENGTHS)} strengths on {counted(len(choose), 'held-out pair')}"
    ) as step:
        scan = sweep(loaded, vector, choose, strengths=STRENGTHS, at=POSITION, unit="raw", progress=step)
    layer, strength = scan.best()
    screen.print(scan)
    with bar(f"layer {layer} at ±{strength:g} on {counted(len(report), 'pair')} never looked at") as step:
        both = (-strength, 0.0, strength)
        final = sweep(loaded, vector, report, layers=[layer], strengths=both, at=POSITION, unit="raw", progress=step)
    shown = _completions(loaded, vector, layer, strength, report, max_tokens)
    with writing(target):
        vector.save(target)
    if as_json:
        found = _as_data(loaded, behaviour, scan, final, layer, strength, shown, target)
        typer.echo(json.dumps(found | {"set": of}, indent=2))
    else:
        _print(screen, behaviour, final, layer, strength, shown, target)


def _completions(
    model: InterpretableModel,
    vector: SteeringVector,
    layer: int,
    strength: float,
    pairs: list[ContrastPair],
    max_tokens: int,
) -> list[dict[str, Any]]:
    """Completions of three prompts, steered down, not at all and up, in one batch per prompt."""
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs if pair.prompt))[:3]
    steers = [vector.at(layer, -strength, at=POSITION), None, vector.at(layer, strength, at=POSITION)]
    shown = []
    with bar("completions") as step:
        for number, prompt in enumerate(prompts):
            texts = model.generate([prompt] * 3, steers, max_tokens=max_tokens)
            shown.append({"prompt": prompt, "minus": str(texts[0]), "plain": str(texts[1]), "plus": str(texts[2])})
            step(number + 1, len(prompts))
    return shown


def _print(
    screen: Console,
    behaviour: str,
    final: Sweep,
    layer: int,
    strength: float,
    shown: list[dict[str, Any]],
    target: Path,
) -> None:
    effects = final.effect[0].mean(axis=1)
    table = Table(title=f"{behaviour}: the vector of layer {layer}, added once, at the last prompt token", expand=True)
    for head in (f"−{strength:g}", "0", f"+{strength:g}"):
        table.add_column(head, ratio=1)
    for row in shown:
        table.add_row(
            *(Text.assemble((row["prompt"], "dim"), " ", row[k].lstrip()) for k in ("minus", "plain", "plus"))
        )
        table.add_section()
    table.add_row(*(Text(f"{e:+.2f} nats", style="bold") for e in effects))
    screen.print(table)
    count = final.effect.shape[2]
    up, down = (final.effect[0][2] > final.effect[0][1]).sum(), (final.effect[0][0] < final.effect[0][1]).sum()
    screen.print(
        f"Last row: log P(positive) − log P(negative) on {counted(count, 'pair')} that nothing was chosen on; "
        f"+ raised it on {up} of {count}, − lowered it on {down} of {count}."
    )
    screen.print(f"Saved: {target}. Use it:")
    screen.print(
        f"  vector = ms.SteeringVector.load({str(target)!r})\n"
        f"  model.generate(prompt, vector.at({layer}, strength={strength:g}, at={POSITION}))",
        markup=False,
        highlight=False,
    )


def _as_data(
    model: InterpretableModel,
    behaviour: str,
    scan: Sweep,
    final: Sweep,
    layer: int,
    strength: float,
    shown: list[dict[str, Any]],
    target: Path,
) -> dict[str, Any]:
    minus, plain, plus = (float(e) for e in final.effect[0].mean(axis=1))
    return {
        "model": model.name,
        "behaviour": behaviour,
        "layers": scan.layers,
        "strengths": scan.strengths,
        "effect": scan.effect.mean(axis=2).tolist(),
        "layer": layer,
        "strength": strength,
        "held_out_effect": {"minus": minus, "plain": plain, "plus": plus},
        "completions": shown,
        "vector": str(target),
    }
