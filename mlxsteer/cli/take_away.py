"""`mlxsteer bake` and `mlxsteer export`: a steering for programs that don't have this package."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mlxsteer import pocket
from mlxsteer.adapters import export_adapter
from mlxsteer.baking import bake as bake_model
from mlxsteer.cli.options import Json, Layer, Model, Places, Steer, Strength, Unit, some_layers, unit_of
from mlxsteer.cli.screen import literal, remarks, writing
from mlxsteer.cli.sources import Named, Source, position, sources_of, together
from mlxsteer.control_vectors import export_control_vector
from mlxsteer.folders import target_folder
from mlxsteer.folding import KEEPS, CannotBake
from mlxsteer.formats.paths import WRITERS
from mlxsteer.interventions.files import as_json
from mlxsteer.model import InterpretableModel
from mlxsteer.pairs import hint
from mlxsteer.vectors import SteeringVector

FORMATS = ("adapter", *(suffix[1:] for suffix in WRITERS))

Interventions = Annotated[str | None, typer.Option(help="A file of interventions.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there already.")]


def bake(
    to: Annotated[Path, typer.Option(help="The folder to make.")],
    model: Model = "pocket",
    vector: Steer = None,
    interventions: Interventions = None,
    layer: Layer = None,
    strength: Strength = None,
    unit: Unit = "raw",
    at: Places = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write a model folder with a steering in its weights, which plain mlx-lm and LM Studio run.

    Additions become biases and ablations edited weights; what no weights can do is refused, with the reason. What is
    written is compared with the hooked model before it gets its name.
    """
    screen, aside = Console(quiet=json), Console(stderr=True)
    layers = some_layers(layer)
    sources = _sources(vector, interventions, layers, strength, unit, at, model)
    with _option_named(), writing(to), remarks(aside):
        target_folder(to, overwrite)
        loaded, named = _loaded(sources, model, layers, strength, unit, at)
        _say(loaded, named, screen)
        with aside.status("baking"):
            report = bake_model(loaded, together(loaded, named.values()), to, overwrite=overwrite, dry_run=dry_run)
    if json:
        typer.echo(as_json({"path": None if dry_run else str(to), **report.data()}))
        return
    screen.print(literal("\n".join([*report.edits, str(report)])), soft_wrap=True)
    if not dry_run:
        screen.print(literal(f"Written: {to}. Run it: mlx_lm.generate --model {to} --prompt '...'"), soft_wrap=True)


def export(
    to: Annotated[Path, typer.Option(help="The folder or file to make.")],
    model: Model = "pocket",
    vector: Steer = None,
    interventions: Interventions = None,
    layer: Annotated[
        str | None,
        typer.Option(
            "--layer", "--layers", help="Where vectors act, 4 or 3,5; in a vector's file, all their layers unless told."
        ),
    ] = None,
    strength: Strength = None,
    unit: Unit = "raw",
    at: Places = None,
    form: Annotated[
        str | None,
        typer.Option("--format", help=f"One of {', '.join(FORMATS)}.", show_default="by the suffix of --to"),
    ] = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write a steering as an adapter for plain mlx-lm, a control vector for llama.cpp, or a vector's file.

    A folder becomes an adapter, and .gguf a control vector. A single vector is written with its layers and strength
    folded in, or as it is, at all its layers, where neither is told.
    """
    screen, aside = Console(quiet=json), Console(stderr=True)
    form = _format(form, to)
    if form != "adapter" and to.exists() and not overwrite:
        raise FileExistsError(f"{to} is there already: name another file, or --overwrite.")
    if form != "adapter" and not to.absolute().parent.is_dir():
        raise FileNotFoundError(f"--to {to}: there is no folder {to.parent}.")
    layers = some_layers(layer)
    sources = _sources(vector, interventions, layers, strength, unit, at, model)
    with _option_named(), writing(to), remarks(aside), tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / to.name if dry_run else to
        data: dict[str, Any]
        if form == "adapter":
            target_folder(to, overwrite)
            loaded, named = _loaded(sources, model, layers, strength, unit, at)
            _say(loaded, named, screen)
            adapter = export_adapter(loaded, together(loaded, named.values()), target, overwrite=overwrite)
            said = "\n".join([*adapter.edits, str(adapter)])
            data = {"edits": list(adapter.edits), "rank": adapter.rank, "bytes": adapter.bytes}
            base = pocket.FOLDER if model == "pocket" else model
            use = f"mlx_lm.generate --model {base} --adapter-path {to} --prompt '...'"
        else:
            made = _file(form, target, sources, model, layers, strength, unit, at, dry_run=dry_run)
            said = repr(made)
            data = {"layers": made.layers, "width": made.width, "norms": made.norms}
            use = (
                f"llama-cli -m MODEL.gguf --control-vector-scaled {to}:1"
                if form == "gguf"
                else f"mlxsteer.SteeringVector.load({str(to)!r})"
            )
    if json:
        typer.echo(as_json({"path": None if dry_run else str(to), "format": form, **data}))
        return
    screen.print(literal(said), soft_wrap=True)
    screen.print(literal("Nothing written (dry run)." if dry_run else f"Written: {to}. Use it: {use}"), soft_wrap=True)


def _sources(
    vector: Sequence[str] | None,
    interventions: str | None,
    layers: Sequence[int],
    strength: float | None,
    unit: str,
    at: str | None,
    model: str,
) -> dict[str, Source]:
    names = [*(vector or ()), *([interventions] if interventions else [])]
    if not names:
        raise ValueError("nothing is named to take away: give --steer.")
    if strength == 0:
        raise ValueError("--strength 0 is the plain model: there is nothing to write.")
    if at is not None:
        position(at)
    unit_of(unit)
    return sources_of(names, layers, at, unit, model)


def _loaded(
    sources: dict[str, Source], model: str, layers: Sequence[int], strength: float | None, unit: str, at: str | None
) -> tuple[InterpretableModel, dict[str, Named]]:
    """The model, and what steers it."""
    loaded, where = InterpretableModel(model), position(at or "all")
    named = {
        name: Named.made(loaded, source, layers, strength, where, unit_of(unit)) for name, source in sources.items()
    }
    return loaded, named


def _say(model: InterpretableModel, named: dict[str, Named], screen: Console) -> None:
    lines = [repr(model), *(f"{name}: {one}" for name, one in named.items())]
    screen.print(literal("\n".join(lines)), soft_wrap=True)


def _format(form: str | None, to: Path) -> str:
    """The format that is named, or that the path says."""
    if form is None:
        form = to.suffix[1:] if to.suffix in WRITERS else "adapter"
        if to.suffix and form == "adapter":
            raise ValueError(
                f"--to {to}: files are {', '.join(WRITERS)}, and an adapter is a folder: --format adapter makes it so."
                f"{hint(to.suffix, WRITERS)}"
            )
    if form not in FORMATS:
        raise ValueError(f"--format {form}: it is one of {', '.join(FORMATS)}.{hint(form, FORMATS)}")
    if form != "adapter" and to.suffix != f".{form}":
        raise ValueError(f"--to {to}: a {form} file's name ends in .{form}.")
    return form


def _file(
    form: str,
    target: Path,
    sources: dict[str, Source],
    model: str,
    layers: Sequence[int],
    strength: float | None,
    unit: str,
    at: str | None,
    *,
    dry_run: bool,
) -> SteeringVector:
    """Write a vector's file, and say what is in it."""
    only = next(iter(sources.values())) if len(sources) == 1 else None
    if only is None or isinstance(only, dict):
        if form != "gguf":
            raise ValueError(
                f"--format {form} holds one vector: give a single vector. Interventions go with adapter and gguf."
            )
        loaded, named = _loaded(sources, model, layers, strength, unit, at)
        return export_control_vector(loaded, together(loaded, named.values()), target, dry_run=dry_run).vector
    if at not in (None, "all"):
        raise ValueError(f"--at {at}: a vector's file doesn't say at which tokens it acts: leave --at out.")
    if not isinstance(only, SteeringVector):  # contrast pairs, to compute one from
        (one,) = _loaded(sources, model, layers, strength, unit, at)[1].values()
        assert isinstance(one.source, SteeringVector)
        only = one.source
    folded = bool(layers) or strength is not None
    strengths = dict.fromkeys(layers or only.layers, 1.0 if strength is None else strength) if folded else None
    only.save(target, strengths=strengths, unit=unit_of(unit))
    return only if strengths is None and form != "gguf" else SteeringVector.load(target)


@contextmanager
def _option_named() -> Iterator[None]:
    """Call things by their names in a shell: an argument of a function by its option."""
    try:
        yield
    except CannotBake as error:
        raise CannotBake(str(error).replace(KEEPS, "mlxsteer generate and mlxsteer chat run it as it is.")) from error
