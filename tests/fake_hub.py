"""A model hub on the loopback: the parts of the hub's HTTP interface that huggingface_hub uses, over dictionaries.

Owns: FakeHub and the fixture that points huggingface_hub at one, with a cache of its own. Nothing leaves 127.0.0.1.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

__all__ = ["TOKEN", "FakeHub", "FakeRepo", "fake_hub", "folder_files", "use_hub"]

TOKEN = "hf_secretsecretsecret"
Files = dict[str, bytes]


@dataclass
class FakeRepo:
    """A repository: a branch or tag has one state of files; its commit is a hash of them."""

    revisions: dict[str, Files] = field(default_factory=lambda: {"main": {}})
    is_gated: bool = False
    is_private: bool = False

    def find(self, revision: str) -> tuple[str, Files] | None:
        """Return commit and files of a branch, tag or commit."""
        for name, files in self.revisions.items():
            if revision in (name, commit_of(files)):
                return commit_of(files), files
        return None


def commit_of(files: Files) -> str:
    """Name a state of files."""
    digest = hashlib.sha1()
    for name, data in sorted(files.items()):
        digest.update(name.encode() + b"\0" + hashlib.sha1(data).digest())
    return digest.hexdigest()


def folder_files(folder: Path) -> Files:
    """Read a folder into a state of files."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


class FakeHub:
    """The server: repos by id, renamed ids, what was asked for, and faults to come."""

    def __init__(self) -> None:
        self.repos: dict[str, FakeRepo] = {}
        self.renamed: dict[str, str] = {}
        self.fetched: list[str] = []
        """Names of the files whose contents were sent, in order."""
        self.tokens: set[str | None] = set()
        """Authorization headers that came."""
        self.status: int | None = None
        """Answer everything with this status."""
        self.cut: dict[str, int] = {}
        """Send so many bytes of a file and hang up, once (always where is_cutting_on)."""
        self.is_cutting_on = False
        self.commits: list[tuple[str, str, str]] = []
        """Repository, branch and message of each commit."""
        self.uploads: Files = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=lambda: self._server.serve_forever(poll_interval=0.01), daemon=True)

    @property
    def url(self) -> str:
        """Address of the server."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def start(self) -> None:
        """Serve in a thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(self, repo_id: str, files: Files, revision: str = "main") -> FakeRepo:
        """Put a state of files on a branch, making the repository where it is missing."""
        repo = self.repos.setdefault(repo_id, FakeRepo())
        repo.revisions[revision] = files
        return repo


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._serve()

        def do_GET(self) -> None:
            self._serve()

        def do_POST(self) -> None:
            self._serve()

        def do_PUT(self) -> None:
            self._serve()

        def _serve(self) -> None:
            path = unquote(urlsplit(self.path).path)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))) if self.command in ("POST", "PUT") else b""
            hub.tokens.add(self.headers.get("Authorization"))
            if hub.status is not None:
                return self._send(hub.status, b"{}")
            for old, new in hub.renamed.items():
                if f"/{old}/" in path:
                    return self._send(307, b"", {"Location": path.replace(f"/{old}/", f"/{new}/")})
            if self.command in ("POST", "PUT"):
                return self._write(path, body)
            parts = path.strip("/").split("/")
            api = parts[:2] == ["api", "models"]
            repo_id, rest = "/".join(parts[2:4] if api else parts[:2]), parts[4:] if api else parts[2:]
            repo = self._readable(repo_id)
            if repo is None:
                return None
            revision = "main" if not rest or rest[0] not in ("revision", "tree", "resolve") else rest[1]
            found = repo.find(revision)
            if found is None:
                return self._refuse(404, "RevisionNotFound")
            if not api:
                return self._file(*found, "/".join(rest[2:]))
            if rest and rest[0] == "tree":
                return self._json([_entry(name, data) for name, data in found[1].items()])
            return self._json({"id": repo_id, "modelId": repo_id, "sha": found[0], "siblings": [{"rfilename": n} for n in found[1]]})

        def _readable(self, repo_id: str) -> FakeRepo | None:
            repo, is_known = hub.repos.get(repo_id), self.headers.get("Authorization") == f"Bearer {TOKEN}"
            if repo is None or (repo.is_private and not is_known):
                self._refuse(401 if not is_known else 404, "RepoNotFound")
                return None
            if repo.is_gated and not is_known and "/resolve/" in self.path:  # the listing of a gated repository is public
                self._refuse(403, "GatedRepo")
                return None
            return repo

        def _file(self, commit: str, files: Files, name: str) -> None:
            if name not in files:
                return self._refuse(404, "EntryNotFound")
            data, status, start = files[name], 200, 0
            headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit}
            if self.command == "GET":
                hub.fetched.append(name)
                if range_ := self.headers.get("Range"):
                    start, status = int(range_.removeprefix("bytes=").split("-")[0]), 206
                    headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                if name in hub.cut:
                    return self._send(status, data[start:], headers, hub.cut[name] if hub.is_cutting_on else hub.cut.pop(name))
            return self._send(status, data[start:], headers)

        def _write(self, path: str, body: bytes) -> None:
            parts = path.strip("/").split("/")
            if path.startswith("/upload/"):
                hub.uploads[parts[1]] = body
                return self._json({})
            if path == "/api/validate-yaml":
                return self._json({"warnings": [], "errors": []})
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self._refuse(401, "RepoNotFound")
            if path.endswith("/info/lfs/objects/batch"):
                return self._json(_lfs_answer(hub.url, json.loads(body)))
            if path == "/api/repos/create":
                return self._create(json.loads(body))
            repo_id, action, branch = "/".join(parts[2:4]), parts[4], "/".join(parts[5:])
            if action == "preupload":
                return self._json({"files": [_upload_mode(file) for file in json.loads(body)["files"]]})
            if action == "branch":
                repo = hub.repos[repo_id]
                if branch in repo.revisions:
                    return self._send(409, b"{}")
                repo.revisions[branch] = dict(repo.revisions["main"])
                return self._json({})
            return self._commit(repo_id, branch, [json.loads(line) for line in body.splitlines()])

        def _create(self, wanted: dict[str, Any]) -> None:
            repo_id = f"{wanted['organization']}/{wanted['name']}"
            if repo_id in hub.repos:
                return self._send(409, b"{}")
            is_private = wanted.get("visibility") == "private" or wanted.get("private") is True
            hub.repos[repo_id] = FakeRepo(is_private=is_private)
            return self._json({"url": f"{hub.url}/{repo_id}"})

        def _commit(self, repo_id: str, branch: str, lines: list[dict[str, Any]]) -> None:
            files = dict(hub.repos[repo_id].revisions[branch])
            message = ""
            for value, kind in ((line["value"], line["key"]) for line in lines):
                match kind:
                    case "header":
                        message = value["summary"]
                    case "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    case "lfsFile":
                        files[value["path"]] = hub.uploads[value["oid"]]
            hub.repos[repo_id].revisions[branch] = files
            hub.commits.append((repo_id, branch, message))
            oid = commit_of(files)
            self._json({"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{repo_id}/commit/{oid}"})

        def _refuse(self, status: int, code: str) -> None:
            self._send(status, b"{}", {"X-Error-Code": code})

        def _json(self, values: Any) -> None:
            self._send(200, json.dumps(values).encode(), {"Content-Type": "application/json"})

        def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None, stop: int | None = None) -> None:
            self.send_response(status)
            for key, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data[:stop])
            self.close_connection = stop is not None

    return Handler


def _entry(name: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


def _upload_mode(file: dict[str, Any]) -> dict[str, Any]:
    return {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular", "shouldIgnore": False}


def _lfs_answer(url: str, asked: dict[str, Any]) -> dict[str, Any]:
    objects = [
        {"oid": item["oid"], "size": item["size"], "actions": {"upload": {"href": f"{url}/upload/{item['oid']}", "header": {}}}}
        for item in asked["objects"]
    ]
    return {"transfer": "basic", "objects": objects}


@contextmanager
def use_hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[FakeHub]:
    """Start a hub and point huggingface_hub in this process at it, without token, offline flag or the xet client."""
    hub = FakeHub()
    hub.start()
    values = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_TOKEN_PATH": str(cache / "token"),
        "HF_STORED_TOKENS_PATH": str(cache / "stored_tokens"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()
    try:
        yield hub
    finally:
        huggingface_hub.close_session()
        hub.stop()


@pytest.fixture(name="hub")
def fake_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """Start a fake hub whose clients keep their cache in tmp_path/cache."""
    with use_hub(monkeypatch, tmp_path / "cache") as hub:
        yield hub
