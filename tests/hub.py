"""A hub on the loopback: as much of the protocol of the Hugging Face hub as its clients use to read repositories."""

import hashlib
import io
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow
import pyarrow.parquet
import yaml

from tests.loopback import serving


@dataclass(frozen=True)
class Repository:
    """One state of a repository, with tags that name it. ``gated``: the status that a stranger gets, 401 or 403."""

    files: Mapping[str, bytes]
    tags: tuple[str, ...] = ()
    gated: int | None = None

    @property
    def commit(self) -> str:
        """A hash of its files."""
        digest = hashlib.sha1(usedforsecurity=False)
        for name, content in sorted(self.files.items()):
            digest.update(f"{name} {len(content)} ".encode() + content)
        return digest.hexdigest()


def checkpoint(directory: Path) -> dict[str, bytes]:
    """The files of a model's repository."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def dataset(configurations: Mapping[str, Mapping[str, list[dict]]]) -> dict[str, bytes]:
    """The files of a data set's repository: rows by configuration and split, in parquet, and the card that says so."""
    files, card = {}, []
    for name, splits in configurations.items():
        card.append({"config_name": name, "data_files": []})
        for split, rows in splits.items():
            buffer = io.BytesIO()
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
            files[f"{name}/{split}-00000-of-00001.parquet"] = buffer.getvalue()
            card[-1]["data_files"].append({"split": split, "path": f"{name}/{split}-*"})
    return files | {"README.md": f"---\n{yaml.safe_dump({'configs': card})}---\n".encode()}


@dataclass
class Hub:
    """Repositories by kind and name (``models/OWNER/NAME``, ``datasets/OWNER/NAME``), and what was asked of them.

    A repository has several states; the last is its branch ``main``.
    """

    repositories: Mapping[str, list[Repository]]
    asked: list[str] = field(default_factory=list)

    def serve(self) -> AbstractContextManager[str]:
        """Serve on the loopback inside its block, which gets what ``HF_ENDPOINT`` is set to."""
        return serving(Handler, hub=self)

    def state(self, name: str, revision: str) -> Repository | None:
        """The state of a repository that ``revision`` (a commit, a tag or ``main``) names."""
        states = self.repositories[name]
        if revision == "main":
            return states[-1]
        return next((each for each in states if revision in (each.commit, *each.tags)), None)


class Handler(BaseHTTPRequestHandler):
    """Answers of one request."""

    hub: Hub

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        """Information about a repository, its tree, or a file."""
        self._route()

    def do_HEAD(self) -> None:
        """A file's headers."""
        self._route()

    def do_POST(self) -> None:
        """Information about some paths."""
        length = int(self.headers.get("Content-Length", 0))
        self._route(self.rfile.read(length))

    def _route(self, body: bytes = b"") -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.asked.append(f"{self.command} {path}")
        api = path.startswith("api/")
        parts = path.removeprefix("api/").split("/")
        kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
        name, rest = "/".join(parts[:2]), parts[2:]
        states = self.hub.repositories.get(f"{kind}/{name}")
        if states is None:  # as the hub answers: a stranger cannot tell a private repository from none
            return self._refuse(401, "RepoNotFound", "Invalid username or password.")
        verb, revision = (rest[0], rest[1]) if rest else ("revision", "main")
        state = self.hub.state(f"{kind}/{name}", revision)
        if states[-1].gated is not None and not (api and verb == "revision"):
            return self._refuse(states[-1].gated, "GatedRepo", f"Access to model {name} is restricted.")
        if state is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        inside = "/".join(rest[2:])
        if not api:
            return self._file(state, inside)
        if verb == "revision":
            files = [{"rfilename": file} for file in state.files]
            return self._json({"id": name, "sha": state.commit, "siblings": files, "tags": [], "private": False})
        if verb == "tree":
            return self._json([_entry(state, file) for file in _below(state, inside)])
        assert verb == "paths-info", path
        asked = json.loads(body)["paths"]
        return self._json([_entry(state, file) for file in asked if file in _below(state, "")])

    def _file(self, state: Repository, name: str) -> None:
        if name not in state.files:
            return self._refuse(404, "EntryNotFound", "Entry not found", commit=state.commit)
        content = state.files[name]
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        headers = {
            "ETag": f'"{hashlib.sha1(content, usedforsecurity=False).hexdigest()}"',
            "X-Repo-Commit": state.commit,
            "Accept-Ranges": "bytes",
        }
        self._answer(206 if start else 200, content[start:], headers)

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, message: str, commit: str | None = None) -> None:
        known = {} if commit is None else {"X-Repo-Commit": commit}
        self._answer(status, b"", {"X-Error-Code": code, "X-Error-Message": message, **known})

    def _answer(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _below(state: Repository, folder: str) -> dict[str, bytes | None]:
    """Files and folders below ``folder``, by path; a folder's content is None."""
    folders = {"/".join(file.split("/")[:depth]) for file in state.files for depth in range(1, file.count("/") + 1)}
    entries = {**dict.fromkeys(sorted(folders)), **state.files}
    return {path: entries[path] for path in entries if not folder or path.startswith(f"{folder}/")}


def _entry(state: Repository, path: str) -> dict[str, Any]:
    content = _below(state, "")[path]
    if content is None:
        return {"type": "directory", "path": path, "oid": "0" * 40}
    return {
        "type": "file",
        "path": path,
        "size": len(content),
        "oid": hashlib.sha1(content, usedforsecurity=False).hexdigest(),
    }
