"""The part of the Hugging Face Hub's API that publishing and pulling use, on loopback, for the real huggingface_hub.

Repositories are commits of files by branch; large files are objects by SHA-256, as with Git LFS. What is asked
is recorded, and a test can make it fail: refuse, cut the connection in the middle of a file, change a repository
between two requests.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from click.testing import Result

Command = Callable[..., Result]
TOKEN, READ_ONLY = "hf_valid", "hf_read"
# Files of more bytes, and GGUFs, are large, as the Hub's preupload would say.
_LARGE = 1 << 20


@dataclass(frozen=True)
class Blob:
    """A file of a commit."""

    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.git


@dataclass
class Repository:
    """Branches by name, each the list of its commits; a commit is its identifier and its files.

    ``pulls``: of each pull request, from 1 on, title, status, target branch and author.
    """

    private: bool = False
    gated: str | bool = False
    card: dict[str, Any] = field(default_factory=dict)
    branches: dict[str, list[tuple[str, dict[str, Blob]]]] = field(default_factory=dict)
    pulls: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.branches = self.branches or {"main": [(hashlib.sha1(b"first").hexdigest(), {})]}

    def at(self, revision: str) -> tuple[str, dict[str, Blob]] | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        for commits in self.branches.values():
            for commit in commits:
                if commit[0] == revision:
                    return commit
        return None

    @property
    def files(self) -> dict[str, Blob]:
        return self.branches["main"][-1][1]

    def commit(self, branch: str, files: dict[str, Blob]) -> str:
        history = self.branches[branch]
        names = repr((branch, len(history), history[-1][0], sorted((path, blob.git) for path, blob in files.items())))
        history.append((hashlib.sha1(names.encode()).hexdigest(), files))
        return history[-1][0]


class Refusal(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Cut(Exception):
    """End the connection without a word."""


@dataclass
class HubServer:
    """The server's state, which tests look at and change.

    Attributes:
        objects: large files by SHA-256, uploaded but perhaps not committed.
        requests: method and path of all that was asked.
        received: SHA-256 of large files that arrived whole, in order.
        before: called with method and path before a request is answered; may raise ``Refusal`` or ``Cut``.
        cut_after: bytes of the next GGUF that is fetched, after which the connection is cut.
        ranges: first bytes that were asked for instead of whole files.
        damaged: a bit of every GGUF that is fetched is wrong.
    """

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    received: list[str] = field(default_factory=list)
    before: Callable[[str, str], None] = lambda method, path: None
    cut_after: int | None = None
    ranges: list[int] = field(default_factory=list)
    damaged: bool = False
    lock: threading.RLock = field(default_factory=threading.RLock)

    def asked(self, method: str, pattern: str) -> list[str]:
        return [path for verb, path in self.requests if verb == method and re.search(pattern, path)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_: Any) -> None:
        """Nothing: the requests are recorded."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        address = urlsplit(self.path)
        path, self.query = unquote(address.path), parse_qs(address.query)
        try:
            with self.hub.lock:
                self.hub.requests.append((self.command, path))
            try:
                self.hub.before(self.command, path)
            except Refusal:
                self._body()  # the connection is used again
                raise
            body = self._body()
            with self.hub.lock:
                self._route(path, body)
        except Refusal as refusal:
            headers = {"X-Error-Message": str(refusal)} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            self._send(json.dumps({"error": str(refusal)}).encode(), refusal.status, headers)
        except (Cut, ConnectionError):
            self.close_connection = True

    def _body(self) -> bytes:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if len(body) < length:
            raise Cut
        return body

    def _route(self, path: str, body: bytes) -> None:
        for method, pattern, name in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split():
                getattr(self, name)(*match.groups(), body)
                return
        raise Refusal(404, f"no such address: {self.command} {path}")

    def _send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    # Who asks, and for what.

    @property
    def token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _require_token(self, *, write: bool = False) -> None:
        if self.token not in (TOKEN, READ_ONLY):
            raise Refusal(401, "Invalid username or password.")
        if write and self.token == READ_ONLY:
            raise Refusal(403, "This token is read-only.")

    def _repository(self, name: str, *, write: bool = False) -> Repository:
        found = self.hub.repositories.get(name)
        if found is None or (found.private and self.token not in (TOKEN, READ_ONLY)):
            raise Refusal(404 if self.token == TOKEN else 401, "Repository not found", "RepoNotFound")
        if write:
            self._require_token(write=True)
        return found

    def _commit_of(self, repository: Repository, revision: str) -> tuple[str, dict[str, Blob]]:
        commit = repository.at(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # Answers.

    def whoami(self, _: bytes) -> None:
        self._require_token()
        self._json({"name": "me", "type": "user", "orgs": []})

    def create(self, body: bytes) -> None:
        self._require_token(write=True)
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repositories:
            raise Refusal(409, "You already created this model repo")
        self.hub.repositories[name] = Repository(private=asked.get("visibility") == "private")
        self._json({"url": f"{self.hub.address}/{name}", "name": name})

    def validate(self, body: bytes) -> None:
        asked = json.loads(body)
        if not asked["content"].startswith("---\n"):
            self._json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]})
            return
        self._json({"errors": [], "warnings": []})

    def branch(self, name: str, branch: str, _: bytes) -> None:
        repository = self._repository(name, write=True)
        if branch in repository.branches:
            raise Refusal(409, "Reference already exists")
        repository.branches[branch] = list(repository.branches["main"])
        self._json({})

    def info(self, name: str, revision: str | None, _: bytes) -> None:
        repository = self._repository(name)
        sha, files = self._commit_of(repository, revision or "main")
        self._json(
            {
                "id": name,
                "sha": sha,
                "private": repository.private,
                "gated": repository.gated,
                "cardData": repository.card,
                "siblings": [{"rfilename": path} for path in files],
                "tags": [],
            }
        )

    def tree(self, name: str, revision: str, _: bytes) -> None:
        _, files = self._commit_of(self._repository(name), revision)
        rows: list[dict[str, Any]] = []
        for path, blob in sorted(files.items()):
            row = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.git}
            if blob.large:
                row["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 130}
            rows.append(row)
        self._json(rows)

    def preupload(self, name: str, revision: str, body: bytes) -> None:
        _, files = self._commit_of(self._repository(name, write=True), revision)
        answers = []
        for asked in json.loads(body)["files"]:
            path, old = asked["path"], files.get(asked["path"])
            large = path.endswith(".gguf") or asked["size"] > _LARGE
            row = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            answers.append(row | ({"oid": old.etag} if old else {}))
        self._json({"files": answers})

    def batch(self, name: str, body: bytes) -> None:
        self._repository(name, write=True)
        rows = []
        for asked in json.loads(body)["objects"]:
            row = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.objects:
                row["actions"] = {"upload": {"href": f"{self.hub.address}/objects/{asked['oid']}"}}
            rows.append(row)
        self._json({"transfer": "basic", "objects": rows})

    def put(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "The content is not what it was to be")
        self.hub.objects[oid] = body
        self.hub.received.append(oid)
        self._send(b"")

    def commit(self, name: str, revision: str, body: bytes) -> None:
        repository = self._repository(name, write=True)
        head, files = self._commit_of(repository, revision)
        files, lines = dict(files), [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, head):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), large=False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                files[value["path"]] = Blob(self.hub.objects[value["oid"]], large=True)
            else:
                del files[value["path"]]
        branch, answer = revision, {}
        if "create_pr" in self.query:
            row = {"title": header["summary"], "status": "open", "base": f"refs/heads/{revision}", "author": "me"}
            repository.pulls.append(row)
            branch = f"refs/pr/{len(repository.pulls)}"
            repository.branches[branch] = list(repository.branches[revision])
            answer["pullRequestUrl"] = f"{self.hub.address}/{name}/discussions/{len(repository.pulls)}"
        sha = repository.commit(branch, files)
        self._json({"commitUrl": f"{self.hub.address}/{name}/commit/{sha}", "commitOid": sha, **answer})

    def _discussion(self, name: str, number: int) -> dict[str, Any]:
        row = self._repository(name).pulls[number - 1]
        own = {key: row[key] for key in ("title", "status")} | {"author": {"name": row["author"]}}
        repo = {"name": name, "type": "model"}
        return {**own, "num": number, "createdAt": "2026-01-01T00:00:00.000Z", "repo": repo, "isPullRequest": True}

    def discussions(self, name: str, _: bytes) -> None:
        count, per_page, page = len(self._repository(name).pulls), 2, int(self.query["p"][0])
        rows = [self._discussion(name, number) for number in range(count, 0, -1)]
        wanted = {key: self.query[key][0] for key in ("status", "author")}
        rows = [row for row in rows if (row["status"], row["author"]["name"]) == (wanted["status"], wanted["author"])]
        start = per_page * page
        self._json({"count": len(rows), "start": start, "discussions": rows[start : start + per_page]})

    def discussion(self, name: str, number: str, _: bytes) -> None:
        changes = {"base": self._repository(name).pulls[int(number) - 1]["base"]}
        found = self._discussion(name, int(number))
        self._json({**found, "changes": changes, "filesWithConflicts": [], "events": []})

    def resolve(self, name: str, revision: str, path: str, _: bytes) -> None:
        repository = self._repository(name)
        if repository.gated and self.token != TOKEN:
            raise Refusal(403, f"Access to model {name} is restricted", "GatedRepo")
        sha, files = self._commit_of(repository, revision)
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        content, first = files[path].content, 0
        if self.hub.damaged and path.endswith(".gguf"):
            content = content[:-40] + bytes([content[-40] ^ 1]) + content[-39:]
        headers = {"ETag": f'"{files[path].etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            first = int(match[1])
            self.hub.ranges.append(first)
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        if self.hub.cut_after is not None and self.command == "GET" and path.endswith(".gguf"):
            count, self.hub.cut_after = self.hub.cut_after, None
            self.send_response(206 if first else 200)
            for key, value in {"Content-Length": str(len(content) - first), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content[first : first + count])
            self.wfile.flush()
            raise Cut
        self._send(content[first:], 206 if first else 200, headers)


_NAME, _REVISION = r"([\w.-]+/[\w.-]+)", r"([^/]+|refs/pr/\d+)"
_ROUTES = (
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("POST", rf"/api/models/{_NAME}/branch/(.+)", "branch"),
    ("GET", rf"/api/models/{_NAME}/tree/{_REVISION}", "tree"),
    ("POST", rf"/api/models/{_NAME}/preupload/{_REVISION}", "preupload"),
    ("POST", rf"/api/models/{_NAME}/commit/{_REVISION}", "commit"),
    ("GET", rf"/api/models/{_NAME}/discussions", "discussions"),
    ("GET", rf"/api/models/{_NAME}/discussions/(\d+)", "discussion"),
    ("GET", rf"/api/models/{_NAME}(?:/revision/{_REVISION})?", "info"),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/objects/([0-9a-f]{64})", "put"),
    ("GET HEAD", rf"/{_NAME}/resolve/{_REVISION}/(.+)", "resolve"),
)


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """A server for the time of the block."""
    state = HubServer()
    handler = type("Handler", (_Handler,), {"hub": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    state.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def value(done: Result) -> Any:
    """The JSON value that a successful command printed."""
    assert done.exception is None, (done.exception, done.output)
    return json.loads(done.stdout)
