"""A stand-in of the Hugging Face hub on the loopback: its file layout, and what the hub's own client asks it for."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

TOKENS = {"hf_alice": "alice", "hf_bob": "bob"}
"""The users by their tokens."""


@dataclass
class Repository:
    owner: str
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    """Branches and tags."""

    def __post_init__(self) -> None:
        self.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        """Put files on top of those of a branch."""
        whole = {**self.commits.get(self.refs.get(branch, ""), {}), **files}
        sha = hashlib.sha1(repr((len(self.commits), sorted(whole.items()))).encode()).hexdigest()
        self.commits[sha], self.refs[branch] = whole, sha
        return sha

    def sha(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


class Hub(ThreadingHTTPServer):
    """The server and all that it holds."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []
        """The requests, as ``GET /path``."""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Refused(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        self.server.asked.append(f"{self.command} {unquote(path)}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = [unquote(part) for part in path.split("/")[1:]]
        try:
            if parts[:2] == ["api", "models"]:
                self._of_model("/".join(parts[2:4]), parts[4:])
            elif parts == ["api", "repos", "create"]:
                self._create()
            elif parts == ["api", "validate-yaml"]:
                self._json({"warnings": [], "errors": []})
            elif parts[0] == "lfs":
                self.server.large[parts[1]] = self.body
                self._json({})
            elif parts[-2:] == ["objects", "batch"]:
                self._batch(f"{parts[0]}/{parts[1].removesuffix('.git')}")
            elif parts[2:3] == ["resolve"]:
                self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
            else:
                raise Refused(404, "", f"no such page: {self.path}")
        except Refused as error:
            self._send(
                error.status,
                json.dumps({"error": str(error)}).encode(),
                {"X-Error-Code": error.code, "X-Error-Message": str(error)},
            )

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    @property
    def user(self) -> str | None:
        return TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _found(self, repo_id: str, *, writes: bool = False) -> Repository:
        found = self.server.repositories.get(repo_id)
        if found is None or (found.private and found.owner != self.user):
            # As the hub does, which does not tell strangers what there is.
            raise Refused(404 if self.user else 401, "RepoNotFound", "Repository not found")
        if writes and found.owner != self.user:
            raise Refused(403 if self.user else 401, "", "you cannot write here")
        return found

    def _create(self) -> None:
        asked = json.loads(self.body)
        if self.user is None:
            raise Refused(401, "", "Invalid username or password.")
        owner = asked.get("organization") or self.user
        repo_id = f"{owner}/{asked['name']}"
        url = {"url": f"{self.server.endpoint}/{repo_id}"}
        if repo_id in self.server.repositories:
            return self._send(409, json.dumps(url | {"error": "You already created this model repo"}).encode(), {})
        if owner != self.user:
            raise Refused(403, "", f"You don't have the rights to create a model under the namespace {owner}")
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.server.repositories[repo_id] = Repository(owner, private)
        self._json(url)

    def _of_model(self, repo_id: str, rest: list[str]) -> None:
        verb, revision = (*rest, "main", "main")[:2] if rest else ("info", "main")
        repository = self._found(repo_id, writes=self.command == "POST")
        if verb in ("branch", "tag"):
            name = revision if verb == "branch" else json.loads(self.body)["tag"]
            if name in repository.refs:
                raise Refused(409, "", "Reference already exists")
            repository.refs[name] = repository.refs["main"]
            return self._json({})
        sha = repository.sha(revision)
        if sha is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if verb in ("info", "revision"):
            siblings = [{"rfilename": path} for path in repository.commits[sha]]
            self._json({"id": repo_id, "sha": sha, "private": repository.private, "siblings": siblings, "tags": []})
        elif verb == "tree":
            listed = [
                {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
                for path, content in repository.commits[sha].items()
            ]
            self._json(listed)
        elif verb == "preupload":
            files = json.loads(self.body)["files"]
            modes = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for each in files
            ]
            self._json({"files": modes})
        else:
            assert verb == "commit"
            self._commit(repo_id, repository, revision)

    def _commit(self, repo_id: str, repository: Repository, branch: str) -> None:
        files: dict[str, bytes] = {}
        for line in self.body.splitlines():
            each = json.loads(line)
            value = each["value"]
            now = repository.refs[branch]
            if each["key"] == "header" and value.get("parentCommit", now) != now:
                raise Refused(412, "", "A commit has happened since. Please refresh and try again.")
            if each["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if each["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
        sha = repository.commit(branch, files)
        self._json({"commitUrl": f"{self.server.endpoint}/{repo_id}/commit/{sha}", "commitOid": sha})

    def _batch(self, repo_id: str) -> None:
        self._found(repo_id, writes=True)
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.server.endpoint}/lfs/{each['oid']}"}}}
            for each in json.loads(self.body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _resolve(self, repo_id: str, revision: str, path: str) -> None:
        repository = self._found(repo_id)
        sha = repository.sha(revision)
        if sha is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if path not in repository.commits[sha]:
            raise Refused(404, "EntryNotFound", "Entry not found")
        content = repository.commits[sha][path]
        self._send(200, content, {"X-Repo-Commit": sha, "ETag": f'"{_oid(content)}"'})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def served() -> Iterator[Hub]:
    """A hub that answers while the context lasts."""
    hub = Hub()
    thread = Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that the client in this process speaks to, with a cache of its own and no token."""
    from huggingface_hub import constants

    with served() as found:
        for name, value in {
            "ENDPOINT": found.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": found.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(constants, name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield found


def environment(hub: Hub, home: Path, *, token: str | None) -> dict[str, str]:
    """The environment of a process that speaks to the hub."""
    found = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        found.pop(name, None)
    return found | ({"HF_TOKEN": token} if token else {})
