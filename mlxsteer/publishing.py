"""Vectors, adapters and baked folders into repositories of the Hugging Face Hub, with a card each."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from mlxsteer import formats
from mlxsteer.adapters import Adapter
from mlxsteer.baked import Baked
from mlxsteer.choice import Choice
from mlxsteer.control_vectors import ControlVector
from mlxsteer.formats import gguf, hub
from mlxsteer.formats.cards import exactness, folder_card, vector_card
from mlxsteer.refusal import RefusalDirection
from mlxsteer.vectors import SteeringVector

RECORD = "mlxsteer.json"
"""What `bake` and `export_adapter` say in a folder of what they wrote."""
_NEEDED = {"baked": ("config.json", "model*.safetensors"), "adapter": ("adapter_config.json", "adapters.safetensors")}


def record_of(folder: Path) -> dict[str, Any]:
    """What the record of a baked folder or an adapter says.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or of a later version.
    """
    path = folder / RECORD
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {RECORD}, so it is no folder that ms.bake or ms.export_adapter wrote."
        )
    try:
        record = json.loads(path.read_text("utf-8"))
        version, kind, edits = int(record["version"]), record["kind"], record["edits"]
        exactness(record)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged.") from error
    if version > 1:
        raise ValueError(f"{path} is of version {version}; this mlxsteer reads up to 1.")
    if kind not in _NEEDED or not isinstance(edits, list):
        raise ValueError(f"{path} is damaged.")
    return dict(record)


def push_to_hub(
    what: Any,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    licence: str | None = None,
    measured: Any = None,
) -> str:
    """Write a vector, an adapter or a baked model into a repository of the Hugging Face Hub, with a model card.

    The card says what it is and of which model, layers and strengths, how it was made, what was measured, how it is
    used, and under what licence; of what may take refusal out, also what to mind. A folder's own ``README.md`` stays
    here. A vector comes back by ``SteeringVector.load(repository, revision=...)``, a baked model by
    ``InterpretableModel(repository)`` or ``mlx_lm.load``.

    Args:
        what: a `SteeringVector`, or a path of one; a `Choice` or `RefusalDirection`, whose vector is pushed with its
            evidence; a folder that `bake` or `export_adapter` wrote, or their report; a control vector (``.gguf``).
        repository: ``"user/repo"``, made if it isn't there.
        private: whether a repository that is made is private.
        revision: a branch, made if it isn't there; None for the main one.
        token: of a user who may write there; None for the one that is logged in.
        commit_message: what the commit says.
        licence: an identifier for the card, such as ``"mit"``.
        measured: what it was measured to do: a text, or what has a table, such as an `Evaluation`.

    Returns:
        the repository's address.

    Raises:
        TypeError: it is nothing that is pushed.
        FileNotFoundError: there is no such file or folder, or no such user or organization.
        ValueError: the folder is incomplete or no folder of ours, or the file no vector.
        PermissionError: nobody is logged in, or who is may not write there.
        ConnectionError: the Hub can't be reached, or refuses.
    """
    card: dict[str, Any] = {"licence": licence, "measured": _words(measured)}
    to: dict[str, Any] = {"private": private, "revision": revision, "token": token}
    message = commit_message or "Add a steering vector"
    if isinstance(what, Choice):
        card["measured"] = card["measured"] or what.summary()
        strengths = {layer: round(float(strength), 6) for layer, strength in what.strengths.items()}
        at = f", at={what.at!r}" if isinstance(what.at, (str, int, list)) else ""
        card["use"] = f"{strengths}{at}, unit='residual'"
        what = what.vector
    elif isinstance(what, RefusalDirection):
        card["measured"] = card["measured"] or what.table()
        what = what.vector
    if isinstance(what, SteeringVector):
        return formats.push(what, repository, commit_message=message, **to, **card)
    if isinstance(what, (Baked, Adapter, ControlVector)):
        if what.path is None or not what.path.exists():
            raise FileNotFoundError("nothing was written yet (dry run): there is nothing to push.")
        what = what.path
    if not isinstance(what, (str, os.PathLike)):
        raise TypeError(
            f"what is pushed is a SteeringVector, a Choice, or the path of a vector, a baked folder or an adapter, not "
            f"{type(what).__name__}."
        )
    path = Path(what).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}.")
    if path.is_dir() and ((path / RECORD).is_file() or (path / "config.json").is_file()):
        return _push_folder(path, repository, commit_message, to, card)
    if path.suffix != ".gguf":
        return formats.push(formats.load(path), repository, commit_message=message, **to, **card)
    vector = gguf.read(path)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(path, Path(folder) / "vector.gguf")
        text = vector_card(vector, repository, gguf=True, **card)
        (Path(folder) / "README.md").write_text(text, "utf-8")
        return hub.upload(Path(folder), repository, commit_message=message, **to)


def _push_folder(
    path: Path, repository: str, commit_message: str | None, to: dict[str, Any], card: dict[str, Any]
) -> str:
    record = record_of(path)
    kind = record["kind"]
    for pattern in _NEEDED[kind]:
        if not any(path.glob(pattern)):
            raise ValueError(f"{path} lacks {pattern}: it is no complete {kind} folder.")
    with tempfile.TemporaryDirectory() as folder:
        for file in path.iterdir():  # no hidden file, no subfolder: neither of ours has any
            if file.is_file() and not file.name.startswith(".") and file.name != "README.md":
                (Path(folder) / file.name).symlink_to(file.resolve())
        (Path(folder) / "README.md").write_text(folder_card(record, repository, **card), "utf-8")
        # mlx-lm loads every model*.safetensors that it finds, those of an older push too
        replaced = ["model*.safetensors", "model.safetensors.index.json"] if kind == "baked" else []
        message = commit_message or ("Add an adapter" if kind == "adapter" else "Add a steered model")
        return hub.upload(Path(folder), repository, commit_message=message, replaced=replaced, **to)


def _words(measured: Any) -> str | None:
    """What was measured, in words."""
    if measured is None or isinstance(measured, str):
        return measured
    for name in ("summary", "table"):
        if callable(said := getattr(measured, name, None)):
            return str(said())
    raise TypeError(f"measured= is a text, or has a table, as an Evaluation has; not {type(measured).__name__}.")
