"""Vectors in repositories of the Hugging Face Hub."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
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
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mlxsteer.formats import own
from mlxsteer.formats.cards import vector_card
from mlxsteer.vectors import SteeringVector

NAME = "vector.safetensors"
_NETWORK: tuple[Any, ...] = (*HfHubHTTPError.__bases__, OSError)
"""What a failed request may raise: the HTTP library's errors, from which the Hub's are derived, or the system's."""

_LOG_IN = "log in by `hf auth login`, or give token="


def fetch(
    repository: str,
    choose: Callable[[list[str]], str],
    revision: str | None = None,
    filename: str | None = None,
    token: str | None = None,
) -> Path:
    """Download a vector's file.

    Args:
        repository: ``"user/repo"``.
        choose: given the names of the repository's files, the vector's; asked where there is no ``vector.safetensors``.
        revision: a branch, tag or commit.
        filename: the file; None to look for it.
        token: of a user who may read it; None for the one that is logged in.

    Returns:
        its path here.

    Raises:
        FileNotFoundError: there is no such repository, revision or file.
        PermissionError: the token isn't valid.
        ConnectionError: the Hub can't be reached, or refuses.
    """

    options: dict[str, Any] = {"revision": revision, "token": token}

    def download(name: str) -> Path:
        return Path(huggingface_hub.hf_hub_download(repository, name, **options))

    with _said(f"read {repository!r}, which is no path here", revision):
        try:
            huggingface_hub.HfApi(token=token).model_info(repository, revision=revision)
        except HfHubHTTPError:  # the Hub answers
            raise
        except _NETWORK:  # asked once: a download would try for half a minute, and log each try
            options["local_files_only"] = True
        try:
            path = download(filename or NAME)
        except EntryNotFoundError as error:
            if filename is not None or isinstance(error, LocalEntryNotFoundError):
                raise
            names = huggingface_hub.HfApi(token=token).list_repo_files(repository, revision=revision)
            filename = choose(names)
            path = download(filename)
        if other := {".pt": ".json", ".json": ".pt"}.get(path.suffix):  # a vector of rotalabs-steer is in two files
            download(str(Path(filename or NAME).with_suffix(other)))
        return path


def fetch_files(
    repository: str,
    choose: Callable[[list[str]], list[str]],
    revision: str | None = None,
    token: str | None = None,
) -> list[Path]:
    """Download some of a repository's files.

    Args:
        repository: ``"user/repo"``.
        choose: given the names of all of its files, those that are wanted.
        revision: a branch, tag or commit.
        token: of a user who may read it; None for the one that is logged in.

    Returns:
        their paths here, in the order chosen.

    Raises:
        FileNotFoundError: there is no such repository or revision.
        PermissionError: the token isn't valid.
        ConnectionError: the Hub can't be reached, or refuses.
    """
    what = f"read {repository!r}, which is no path here"
    with _said(what, revision):
        names = huggingface_hub.HfApi(token=token).list_repo_files(repository, revision=revision)
    chosen = choose(names)  # what it refuses is not the Hub's refusal
    with _said(what, revision):
        return [
            Path(huggingface_hub.hf_hub_download(repository, name, revision=revision, token=token)) for name in chosen
        ]


def upload(
    folder: Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str,
    replaced: Sequence[str] = (),
) -> str:
    """Write the files of a folder into a repository, which is made if it isn't there.

    Args:
        folder: its files go to the repository's top.
        repository: ``"user/repo"``.
        private: whether a repository that is made is private.
        revision: a branch, made if it isn't there; None for the main one.
        token: of a user who may write there; None for the one that is logged in.
        commit_message: what the commit says.
        replaced: patterns of files there that go, unless they are written anew.

    Returns:
        the repository's address.

    Raises:
        PermissionError: nobody is logged in, or who is may not write there.
        FileNotFoundError: there is no such user or organization.
        ConnectionError: the Hub can't be reached, or refuses.
    """
    with _said(f"write to {repository!r}", revision, "write"):
        api = huggingface_hub.HfApi(token=token)
        address = api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            delete_patterns=list(replaced) or None,
        )
    return str(address)


def push(
    vector: SteeringVector,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Add a steering vector",
    **card: Any,
) -> str:
    """Write a vector and a model card into a repository, which is made if it isn't there; see `upload`.

    Args:
        vector, repository, private, revision, token, commit_message: as there.
        card: what else the card says; see `vector_card`.
    """
    vector = replace(vector)  # what load would refuse is refused here
    with tempfile.TemporaryDirectory() as folder:
        own.write(vector, Path(folder) / NAME)
        (Path(folder) / "README.md").write_text(vector_card(vector, repository, **card), "utf-8")
        return upload(
            Path(folder), repository, private=private, revision=revision, token=token, commit_message=commit_message
        )


@contextmanager
def _said(what: str, revision: str | None = None, verb: str = "read") -> Iterator[None]:
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
    except LocalTokenNotFoundError as error:
        raise PermissionError(f"can't {what}: {_LOG_IN}.") from error
    except _NETWORK as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 401:
            raise PermissionError(f"can't {what}: nobody is logged in, or the token isn't valid; {_LOG_IN}.") from error
        if status == 403:
            raise PermissionError(f"can't {what}: the token doesn't allow you to {verb} there; {_LOG_IN}.") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConnectionError(f"can't {what}: the Hugging Face Hub can't be reached, or refuses: {reason}") from error
