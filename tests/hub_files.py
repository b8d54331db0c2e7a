"""A Hugging Face Hub on loopback, as far as reading from it goes: model information, files by redirect to a second
server that knows ranges, and the ways in which all that fails.

The client is the real huggingface_hub, which is told of this server by ``HF_ENDPOINT``.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = 4096  # bytes; larger files are kept apart from git, as the Hub does with weights
_STEP = 1 << 16


@dataclass
class Stored:
    """A file of a repository: bytes, or a file on this disk.

    Attributes:
        digest: SHA-256 of a large one, else git's SHA-1; a false one if the content is not what is listed.
    """

    content: bytes | Path
    size: int
    digest: str
    large: bool

    def read(self, start: int, stop: int) -> bytes:
        if isinstance(self.content, bytes):
            return self.content[start:stop]
        with self.content.open("rb") as stream:
            stream.seek(start)
            return stream.read(stop - start)


def stored(content: bytes | Path, digest: str = "") -> Stored:
    """``content`` as the Hub keeps it.

    Args:
        digest: of a large file, for content too large to take it.
    """
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    large = size > LARGE
    if not digest:
        raw = content if isinstance(content, bytes) else content.read_bytes()
        digest = hashlib.sha256(raw).hexdigest() if large else hashlib.sha1(b"blob %d\0" % size + raw).hexdigest()
    return Stored(content, size, digest, large)


@dataclass
class Repository:
    """A model repository.

    Attributes:
        files: by path.
        revisions: commit by branch or tag.
        token: that is needed for access; "" for none.
        gated: access to its files is refused to every token; what they are called is public.
    """

    files: dict[str, Stored]
    revisions: dict[str, str] = field(default_factory=lambda: {"main": "a" * 40})
    token: str = ""
    gated: bool = False

    def commit(self, revision: str) -> str:
        """The commit that ``revision`` means, or ""."""
        known = self.revisions.get(revision, "")
        return known or (revision if revision in self.revisions.values() else "")


@dataclass(frozen=True)
class Request:
    """What was asked for: ``store`` is the server that hands out large files."""

    method: str
    path: str
    store: bool
    range: str
    token: str


@dataclass
class Hub:
    """The servers, what they hold, and what was asked of them.

    Attributes:
        url: of the Hub, for ``HF_ENDPOINT``.
        cut_after: a body ends after so many bytes, without the rest that was announced; None for never.
        cuts: how many more bodies are cut.
        ignores_ranges: answers every request for a range with the whole file.
        status: that every request gets, or 0.
        sent: bytes of bodies that went out.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    url: str = ""
    store_url: str = ""
    cut_after: int | None = None
    cuts: int = 0
    ignores_ranges: bool = False
    status: int = 0
    sent: int = 0
    requests: list[Request] = field(default_factory=list)

    def add(self, repo: str, files: Mapping[str, bytes | Path | Stored], **options: Any) -> Repository:
        """A repository with ``files``."""
        own = {path: file if isinstance(file, Stored) else stored(file) for path, file in files.items()}
        self.repositories[repo] = Repository(own, **options)
        return self.repositories[repo]

    def add_folder(self, repo: str, folder: Path) -> Repository:
        """A repository with the files in ``folder``."""
        return self.add(repo, {path.name: path for path in sorted(folder.iterdir()) if path.is_file()})


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    store: bool
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: stderr is the tests'."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.hub.requests.append(Request(self.command, path, self.store, self.headers.get("Range", ""), token))
        if self.hub.status:
            self._refuse(self.hub.status, "", "trouble")
        elif self.store:
            self._from_store(path.removeprefix("/"))
        elif path.startswith("/api/models/"):
            repo, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            self._information(repo, revision or "main", token)
        else:
            repo, _, rest = path.removeprefix("/").partition("/resolve/")
            revision, _, file = rest.partition("/")
            self._file(repo, revision, file, token)

    def _refuse(self, status: int, code: str, message: str, **further: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message} if code else {}
        self._send(status, json.dumps({"error": message}).encode(), {**headers, **further})

    def _repository(self, repo: str, revision: str, token: str, *, files: bool) -> tuple[Repository, str] | None:
        """The repository and the commit, or None after an answer that says why not.

        Args:
            files: its files are wanted, not only what is said of it.
        """
        found = self.hub.repositories.get(repo)
        if found is None:
            self._refuse(401, "RepoNotFound", "Repository not found")
        elif found.gated and files:
            self._refuse(403 if token else 401, "GatedRepo", f"Access to model {repo} is restricted")
        elif found.token and token != found.token:
            self._refuse(401, "RepoNotFound", "Repository not found")
        elif not found.commit(revision):
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return found, found.commit(revision)
        return None

    def _information(self, repo: str, revision: str, token: str) -> None:
        found = self._repository(repo, revision, token, files=False)
        if found is None:
            return
        siblings = []
        for path, file in found[0].files.items():
            own: dict[str, Any] = {"rfilename": path, "size": file.size, "blobId": "b" * 40}
            if file.large:
                own["lfs"] = {"sha256": file.digest, "size": file.size, "pointerSize": 134}
            else:
                own["blobId"] = file.digest
            siblings.append(own)
        value = {"id": repo, "modelId": repo, "sha": found[1], "siblings": siblings, "tags": [], "downloads": 0}
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _file(self, repo: str, revision: str, path: str, token: str) -> None:
        found = self._repository(repo, revision, token, files=True)
        if found is None:
            return
        repository, commit = found
        file = repository.files.get(path)
        if file is None:
            self._refuse(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit})
            return
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file.digest}"'}
        if file.large:
            headers |= {"X-Linked-Etag": f'"{file.digest}"', "X-Linked-Size": str(file.size)}
            headers |= {"Location": f"{self.hub.store_url}/{repo}/{path}"}
            self._send(302, b"", headers)
        else:
            self._send_range(file, headers)

    def _from_store(self, path: str) -> None:
        owner, name, *rest = path.split("/")
        self._send_range(self.hub.repositories[f"{owner}/{name}"].files["/".join(rest)], {})

    def _send_range(self, file: Stored, headers: dict[str, str]) -> None:
        start, stop, status = 0, file.size, 200
        wanted = self.headers.get("Range", "").removeprefix("bytes=")
        if wanted and not self.hub.ignores_ranges:
            first, _, last = wanted.partition("-")
            start, stop, status = int(first), min(int(last) + 1 if last else file.size, file.size), 206
            headers = {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{file.size}"}
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(stop - start)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        limit = stop
        if self.hub.cut_after is not None and self.hub.cuts > 0 and stop - start > self.hub.cut_after:
            limit, self.hub.cuts, self.close_connection = start + self.hub.cut_after, self.hub.cuts - 1, True
        for position in range(start, limit, _STEP):
            piece = file.read(position, min(position + _STEP, limit))
            try:
                self.wfile.write(piece)
            except (BrokenPipeError, ConnectionResetError):  # the client has enough
                self.close_connection = True
                return
            self.hub.sent += len(piece)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            self.hub.sent += len(body)


@contextmanager
def serving() -> Iterator[Hub]:
    """An empty Hub that answers until the block ends."""
    hub = Hub()
    servers = [
        ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub, "store": store}))
        for store in (False, True)
    ]
    hub.url, hub.store_url = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
