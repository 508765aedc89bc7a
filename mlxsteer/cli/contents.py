"""`mlxsteer inspect`: what is in a file or folder that steers, in words."""

from __future__ import annotations

import json as json_text
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import mlx.core as mx
import typer
from rich.console import Console

from mlxsteer import interventions as iv
from mlxsteer import pocket
from mlxsteer.caches import KEY, cache_history, load_prompt_cache
from mlxsteer.cli.inspect_model import inspect_model
from mlxsteer.cli.screen import literal
from mlxsteer.cli.sources import Named, vector_of
from mlxsteer.formats.autoencoders import FORMAT as AUTOENCODER
from mlxsteer.formats.cards import exactness
from mlxsteer.formats.paths import READERS
from mlxsteer.interventions.files import FORMAT, as_json
from mlxsteer.model import InterpretableModel
from mlxsteer.pairs import counted
from mlxsteer.probes import FORMAT as PROBE
from mlxsteer.probes import Probe
from mlxsteer.publishing import RECORD, record_of
from mlxsteer.refusal import RefusalDirection
from mlxsteer.sae import SparseAutoencoder
from mlxsteer.vectors import FORMAT as VECTOR

Found: TypeAlias = "tuple[dict[str, Any], list[str]]"
"""What is in a file: as data, with its kind, and in words."""


def inspect(
    file: Annotated[
        str | None, typer.Argument(help="A file or folder, or a vector's repository, user/repo.", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="In place of a file: a Hugging Face name, a folder, or 'pocket'.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Run the model once, and check its names.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object in place of words.")] = False,
) -> None:
    """Say what is in a vector, interventions, a prompt cache, an adapter or a baked model; or what a model has.

    Of a file no model is loaded and nothing is run. Of a model: keys by layer, shapes, quantization, chat template.
    """
    if (file is None) == (model is None):
        raise ValueError("name one thing to look into: a file, or --model NAME.")
    if check and model is None:
        raise ValueError("--check is of a model: mlxsteer inspect --model NAME --check.")
    if model is not None:
        facts = inspect_model(InterpretableModel(model), Console(quiet=json), check=check)
        if json:
            typer.echo(as_json(facts.as_data()))
        return
    assert file is not None
    data, words = contents(file)
    if json:
        typer.echo(as_json({"path": file, **data}))
    else:
        Console().print(literal("\n".join([f"{file}: {data['kind']}", *words])), soft_wrap=True)


def contents(name: str) -> Found:
    """What is in a file, folder or repository.

    Raises:
        FileNotFoundError: there is none of this name.
        ValueError: it is damaged, or nothing of ours.
        ConnectionError: the Hub can't be reached.
    """
    path = Path(name).expanduser()
    if path.is_file() and (path.parent / RECORD).is_file() and path.suffix in (".json", ".safetensors"):
        path = path.parent  # a part of what bake or export_adapter wrote
    if path.is_dir():
        for inside, read in _FOLDERS.items():
            if (path / inside).is_file():
                return read(path)
    if path.is_file() and path.suffix == ".safetensors":
        return _safetensors(path)
    if path.is_file() and path.suffix == ".json":
        found = _json(path)
        for key, read in _JSON.items():
            if key in found:
                return read(path)
    if path.is_file() and path.suffix not in READERS:
        raise ValueError(
            f"{path} is nothing that mlxsteer writes or reads: inspect takes {', '.join(READERS)} files, and folders."
        )
    return _vector(path if path.exists() else name)


def _safetensors(path: Path) -> Found:
    try:
        loaded: Any = mx.load(str(path), return_metadata=True)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is no complete safetensors file.") from error
    tensors, metadata = loaded
    if VECTOR in metadata:
        return _vector(path)
    if FORMAT in metadata:
        return _interventions(path)
    if PROBE in metadata:
        probe = Probe.load(path)
        return {"kind": "a probe", **json_text.loads(probe.to_json())}, [repr(probe), probe.table()]
    if AUTOENCODER in metadata:
        sae = SparseAutoencoder.load(path)
        data = {"kind": "a sparse autoencoder", "latents": sae.latents, "width": sae.width, "key": sae.key}
        return {**data, "info": dict(sae.info)}, [repr(sae), *(f"{name}: {value}" for name, value in sae.info.items())]
    if any(name.split(".")[-1] == KEY for name in metadata):
        return _prompt_cache(path)
    count = counted(len(tensors), "tensor")
    raise ValueError(
        f"{path} holds {count}, and is no vector, probe, autoencoder, file of interventions or prompt cache of "
        "mlxsteer's."
    )


def _vector(source: Path | str) -> Found:
    vector = vector_of(str(source))
    kind = "a control vector of llama.cpp's" if str(source).endswith(".gguf") else "a steering vector"
    data = {
        "kind": kind, "site": vector.site, "layers": vector.layers, "width": vector.width,
        "positions": vector.positions, "norms": vector.norms, "residual_norms": dict(vector.residual_norms),
        "info": dict(vector.info),
    }  # fmt: skip
    return data, [repr(vector), vector.describe()]


def _interventions(path: Path) -> Found:
    found = Named(iv.load(path))
    names = ("key", "intervention", "strength", "tokens")
    edits = [dict(zip(names, act, strict=True)) for act in found.acts()]
    return {"kind": "interventions", "interventions": edits}, list(found.words())


def _prompt_cache(path: Path) -> Found:
    cache, texts = load_prompt_cache(path, return_metadata=True)
    rows = cache_history(cache)
    words = [f"{counted(len(cache), 'layer')}, {counted(len(rows), 'row')}"] + [
        f"{name}: {text}" for name, text in texts.items()
    ]
    for number, spans in enumerate(rows):
        for span in spans:
            edits = ", ".join(f"{e['intervention']} at {e['key']} ×{_shown(e['strength'])}" for e in span["edits"])
            last = span["stop"] - 1 if span["stop"] is not None else "the end"
            words.append(f"row {number}, tokens {span['start']} to {last}: {edits or 'filled clean'}")
    return {"kind": "a prompt cache", "layers": len(cache), "rows": rows, "metadata": texts}, words


def _shown(strength: Any) -> str:
    return f"{strength:g}" if isinstance(strength, (int, float)) else str(strength)


def _written(path: Path) -> Found:
    record = record_of(path)
    adapter = record["kind"] == "adapter"
    base = record.get("base_model")
    use = (
        f"mlx_lm.load({str(pocket.FOLDER if base == 'pocket' else base)!r}, adapter_path={str(path)!r})"
        if adapter
        else f"mlx_lm.load({str(path)!r})"
    )
    data = {**record, "kind": "an adapter" if adapter else "a baked model"}
    words = [
        f"of {record.get('base_model')}, for plain mlx-lm: {use}",
        *(f"- {edit}" for edit in record["edits"]),
        *exactness(record),
    ]
    return data, words


def _plain_adapter(path: Path) -> Found:
    config = _json(path / "adapter_config.json")
    settings = config.get("lora_parameters") or {}
    data = {
        "kind": "an adapter of mlx-lm's, not made by mlxsteer", "fine_tune_type": config.get("fine_tune_type"),
        "rank": settings.get("rank"), "keys": settings.get("keys"), "num_layers": config.get("num_layers"),
    }  # fmt: skip
    return data, [f"{name}: {value}" for name, value in data.items() if name != "kind" and value is not None]


def _plain_model(path: Path) -> Found:
    config = _json(path / "config.json")
    data: dict[str, Any] = {"kind": "a model's folder, with nothing baked in by mlxsteer"}
    data |= {name: config.get(name) for name in ("model_type", "num_hidden_layers", "hidden_size", "quantization")}
    return data, [f"{name}: {value}" for name, value in data.items() if name != "kind" and value is not None]


def _conversation(path: Path) -> Found:
    found = _json(path)
    said, steering = found["messages"], found.get("steering") or []
    if not isinstance(said, list):
        raise ValueError(f"{path}: its messages are damaged.")
    words = [f"with {found.get('model')}, {counted(len(said), 'message')}", *(str(line) for line in steering)]
    data = {"kind": "a conversation", "model": found.get("model"), "messages": len(said), "steering": steering}
    return data, words


def _refusal(path: Path) -> Found:
    found = RefusalDirection.from_json(path)
    best = found.candidates[0]
    data = {
        "kind": "a refusal direction", "layer": found.layer, "position": found.position, "bypass": best.bypass,
        "induce": best.induce, "kl": best.kl, "ablated": list(found.ablation), "info": dict(found.vector.info),
    }  # fmt: skip
    return data, [repr(found), f"taken out at {', '.join(found.ablation)}", found.table()]


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json_text.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no complete JSON file.") from error
    return found if isinstance(found, dict) else {}


_FOLDERS: dict[str, Callable[[Path], Found]] = {
    RECORD: _written,
    "adapter_config.json": _plain_adapter,
    "config.json": _plain_model,
}
"""What a folder is, by the first of these files that is in it."""
_JSON: dict[str, Callable[[Path], Found]] = {"messages": _conversation, "ablation": _refusal}
"""What a JSON file is, by the first of these names that is in it."""
