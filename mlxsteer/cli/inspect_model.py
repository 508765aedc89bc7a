"""What a model has to steer, printed: its keys by layer, shapes, dtypes, quantization, chat template."""

from __future__ import annotations

from rich.console import Console
from rich.table import Column, Table

from mlxsteer.model import InterpretableModel
from mlxsteer.model_facts import ModelFacts, model_facts


def inspect_model(model: InterpretableModel, console: Console | None = None, *, check: bool = False) -> ModelFacts:
    """Print what a model has to steer, keys by layers.

    Args:
        model: the model.
        console: where to; the terminal unless told.
        check: run a check of it too, a few forwards over four tokens.

    Returns:
        What was printed.
    """
    console, facts = console or Console(), model_facts(model, check=check)
    console.print(f"{facts.name}: {facts.architecture}, {facts.layers} layers, {facts.parameters:,} parameters")
    for line in facts.words():
        console.print(line)
    whole = [Column(name, no_wrap=True) for name in ("key", "also", "layers", "width")]
    table = Table(*whole, "weight", box=None, pad_edge=False)
    for row in facts.keys:
        table.add_row(row.key, row.role, row.layers, str(row.width or ""), row.weight)
    console.print(table)
    if facts.check is not None:
        console.print(facts.check, markup=False, highlight=False, soft_wrap=True)
    return facts
