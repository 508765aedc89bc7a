"""A Hugging Face Hub on loopback: the few routes that making, filling and reading a model repository take."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]
WRITER, READER = "hf_writer", "hf_reader"


class Hub(ThreadingHTTPServer):
    """Repositories in memory: name → branch → path → content."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, Files]] = {}
        self.private: set[str] = set()
        self.messages: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, body: Any = None, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _missing(self, code: str) -> None:
        self._answer(404, {"error": code}, X_Error_Code=code)

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _branch(self, name: str, revision: str) -> Files | None:
        """The files of a branch or commit, or None once the refusal is sent."""
        repository = self.server.repositories.get(name)
        if repository is None or (name in self.server.private and self.token not in (WRITER, READER)):
            self._missing("RepoNotFound")
        else:
            for branch, files in repository.items():
                if revision in (branch, _commit(files)):
                    return files
            self._missing("RevisionNotFound")
        return None

    # -- reading -----------------------------------------------------------------------------------------------------

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            files = self._branch(found[1], found[2])
            if files is not None and found[3] not in files:
                self._missing("EntryNotFound")
            elif files is not None:
                content = files[found[3]]
                etag = hashlib.sha1(content).hexdigest()
                self._answer(200, content, ETag=f'"{etag}"', X_Repo_Commit=_commit(files))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            files = self._branch(found[1], found[2] or "main")
            if files is not None:
                siblings = [{"rfilename": name} for name in files]
                self._answer(200, {"id": found[1], "sha": _commit(files), "siblings": siblings, "private": False})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?", path):
            files = self._branch(found[1], found[2])
            if files is not None:
                oid = "0" * 40
                self._answer(
                    200,
                    [{"type": "file", "path": name, "size": len(x), "oid": oid} for name, x in files.items()],
                )
        else:
            self._answer(500, {"error": f"no route {path}"})

    def do_HEAD(self) -> None:
        self.do_GET()

    # -- writing -----------------------------------------------------------------------------------------------------

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif self.token not in (WRITER, READER):
            self._answer(401, {"error": "Invalid username or password."})
        elif self.token == READER:
            self._answer(403, {"error": "no write token"}, X_Error_Message="no write token")
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name in self.server.repositories:
                return self._answer(409, {"url": f"{self.server.url}/{name}"})
            self.server.repositories[name] = {"main": {}}
            self.server.private |= {name} if asked.get("private") or asked.get("visibility") == "private" else set()
            self._answer(200, {"url": f"{self.server.url}/{name}", "name": name})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
            branches = self.server.repositories[found[1]]
            if found[2] in branches:
                return self._answer(409, {"error": "there already"})
            branches[found[2]] = dict(branches["main"])
            self._answer(200, {})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", path):
            if self._branch(found[1], found[2]) is not None:
                kept = {"uploadMode": "regular", "shouldIgnore": False}
                self._answer(200, {"files": [{"path": one["path"], **kept} for one in json.loads(body)["files"]]})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", path):
            files = self._branch(found[1], found[2])
            if files is not None:
                self._commit(files, body)
                oid = _commit(files)
                address = f"{self.server.url}/{found[1]}/commit/{oid}"
                self._answer(200, {"success": True, "commitOid": oid, "commitUrl": address})
        else:
            self._answer(500, {"error": f"no route {path}"})

    def _commit(self, files: Files, body: bytes) -> None:
        for line in body.splitlines():
            said = json.loads(line)
            if said["key"] == "header":
                self.server.messages.append(said["value"]["summary"])
            elif said["key"] == "file":
                files[said["value"]["path"]] = base64.b64decode(said["value"]["content"])
            elif said["key"] == "deletedFile":
                del files[said["value"]["path"]]


def _commit(files: Files) -> str:
    return hashlib.sha1(b"".join(name.encode() + x for name, x in sorted(files.items()))).hexdigest()
