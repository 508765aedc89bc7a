"""Vectors in repositories of the Hugging Face Hub."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mlxsteer.formats import own
from mlxsteer.vectors import SteeringVector

NAME = "vector.safetensors"
_NETWORK: tuple[Any, ...] = (*HfHubHTTPError.__bases__, OSError)
"""What a failed request may raise: the HTTP library's errors, from which the Hub's are derived, or the system's."""


def fetch(
    repository: str, choose: Callable[[list[str]], str], revision: str | None = None, filename: str | None = None
) -> Path:
    """Download a vector's file.

    Args:
        repository: ``"user/repo"``.
        choose: given the names of the repository's files, the vector's; asked where there is no ``vector.safetensors``.
        revision: a branch, tag or commit.
        filename: the file; None to look for it.

    Returns:
        its path here.

    Raises:
        FileNotFoundError: there is no such repository, revision or file.
        ConnectionError: the Hub can't be reached, or refuses.
    """
    with _said(f"read {repository!r}, which is no path here", revision):
        try:
            path = Path(huggingface_hub.hf_hub_download(repository, filename or NAME, revision=revision))
        except EntryNotFoundError as error:
            if filename is not None or isinstance(error, LocalEntryNotFoundError):
                raise
            names = huggingface_hub.HfApi().list_repo_files(repository, revision=revision)
            filename = choose(names)
            path = Path(huggingface_hub.hf_hub_download(repository, filename, revision=revision))
        if other := {".pt": ".json", ".json": ".pt"}.get(path.suffix):  # a vector of rotalabs-steer is in two files
            twin = str(Path(filename or NAME).with_suffix(other))
            huggingface_hub.hf_hub_download(repository, twin, revision=revision)
        return path


def push(
    vector: SteeringVector, repository: str, *, private: bool = False, commit_message: str = "Add a steering vector"
) -> str:
    """Write a vector and a model card into a repository, which is made if it isn't there.

    Returns:
        the repository's address.

    Raises:
        FileNotFoundError: there is no such user or organization, or you may not write there.
        ConnectionError: the Hub can't be reached, or refuses.
    """
    vector = replace(vector)  # what load would refuse is refused here
    with tempfile.TemporaryDirectory() as folder:
        own.write(vector, Path(folder) / NAME)
        (Path(folder) / "README.md").write_text(card(vector, repository), "utf-8")
        with _said(f"write to {repository!r}"):
            api = huggingface_hub.HfApi()
            address = api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(repo_id=repository, folder_path=folder, commit_message=commit_message)
    return str(address)


@contextmanager
def _said(what: str, revision: str | None = None) -> Iterator[None]:
    """The Hub's errors in one sentence each."""
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"can't {what}: a repository's name is of the form 'user/repo'.") from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"can't {what}: it has no revision {revision!r}.") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"can't {what}: the Hugging Face Hub has no such repository, unless it is private or gated and you are not "
            "logged in as one who may use it."
        ) from error
    except LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"can't {what}: the Hugging Face Hub can't be reached, and the file is not in the cache."
        ) from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"can't {what}: the repository has no such file.") from error
    except _NETWORK as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConnectionError(f"can't {what}: the Hugging Face Hub can't be reached, or refuses: {reason}") from error


def card(vector: SteeringVector, repository: str) -> str:
    """The model card of a vector: what it is, where it comes from, how it is used."""
    info = dict(vector.info)
    model = info.get("model")
    meta = ["library_name: mlxsteer", "tags:", "- steering-vector", "- activation-steering", "- mlx"]
    if isinstance(model, str) and model.count("/") == 1:
        meta.append(f"base_model: {json.dumps(model)}")  # a JSON text is a YAML text, whatever is in it
    layers = f"{len(vector)}, from {vector.layers[0]} to {vector.layers[-1]}" if len(vector) > 1 else vector.layers[0]
    facts = {"layers with a direction": layers, "width": vector.width, "site": vector.site}
    rows = [f"| {_cell(name)} | {_cell(value)} |" for name, value in {**facts, **info}.items()]
    shape = "one direction for each layer" if vector.positions is None else "a direction for each position and layer"
    origin = f", computed on {_cell(model)}" if model else ""
    middle = vector.layers[len(vector) // 2]
    return "\n".join(
        [
            "---", *meta, "---", "",
            f"# {repository.rsplit('/', 1)[-1]}", "",
            f"A steering vector{origin}: {shape}, to add to the model's activations while it runs.", "",
            "| | |", "|---|---|", *rows, "",
            "## Use", "",
            "```python",
            "from mlxsteer import InterpretableModel, SteeringVector", "",
            f"model = InterpretableModel({json.dumps(model) if isinstance(model, str) else '...'})",
            f"vector = SteeringVector.load({json.dumps(repository)})",
            f'print(model.generate("The food was", interventions=vector.at({middle}, strength=1.0)))',
            "```", "",
            "Which layer and which strength steer well is to be measured: `mlxsteer.sweep` shows it.", "",
        ]
    )  # fmt: skip


def _cell(value: object) -> str:
    """A value in one cell of a table."""
    text = " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= 200 else text[:200] + "…"
