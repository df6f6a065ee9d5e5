"""A Hugging Face hub on the loopback: the part of its protocol that the real client uses to download models.

It answers as the real one does: commits, a tree in pages, large files (with sha256) by a redirect to another origin,
small ones (with git's id) itself, ranges, error codes in `X-Error-Code`, and Xet's chunk store where it is switched
on. Faults are set with `Hub.on`.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 10  # entries of a tree in one answer; the real hub has 1000
CHUNK = 4096  # bytes of a chunk in Xet; the real one's vary around 64 KiB
LARGE = (".safetensors", ".bin")


def commit_of(files: Mapping[str, bytes]) -> str:
    digest = hashlib.sha1()
    for path, content in sorted(files.items()):
        digest.update(f"{path} {sha256(content)}\n".encode())
    return digest.hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()


@dataclass
class Fault:
    """What becomes of the requests that match."""

    pattern: str
    times: int
    status: int = 0
    """answer with this, and `headers`"""
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: int | None = None
    """hang up after so many bytes of the body"""
    damage: bool = False
    """flip a bit of the body"""
    whole: bool = False
    """ignore that only a range was asked for"""


@dataclass(frozen=True)
class Request:
    line: str
    """such as "GET /owner/name/resolve/main/config.json" """
    headers: Mapping[str, str]
    """names in lower case"""


class Hub:
    """Repositories in memory, behind `endpoint`. Every commit that was pushed stays there."""

    def __init__(self) -> None:
        self.branches: dict[str, dict[str, str]] = {}
        self.commits: dict[str, dict[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.token: str | None = None
        """without it in their Authorization, requests get 401"""
        self.xet = False
        self.requests: list[Request] = []
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.cdn = f"http://localhost:{self.port}"  # another origin: credentials must not follow there
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def push(self, repository: str, files: Mapping[str, bytes]) -> str:
        """A new commit on `main` that has just these files."""
        commit = commit_of(files)
        self.commits[commit] = dict(files)
        self.branches.setdefault(repository, {})["main"] = commit
        return commit

    def on(self, pattern: str, times: int = 1_000_000, **fault: object) -> None:
        """Answers the next `times` requests whose line matches the expression with a `Fault`."""
        self._faults.append(Fault(pattern, times, **fault))  # type: ignore[arg-type]

    def heal(self) -> None:
        self._faults.clear()

    def lines(self, pattern: str = "") -> list[str]:
        """The lines of the requests so far that match."""
        return [request.line for request in self.requests if re.search(pattern, request.line)]

    def fault(self, line: str) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.times > 0 and re.search(fault.pattern, line):
                    fault.times -= 1
                    return fault
        return None


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement of its headers

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)  # a client that goes through a proxy asks for a whole URL
        line = f"{self.command} {unquote(url.path)}"
        self.hub.requests.append(Request(line, {name.lower(): value for name, value in self.headers.items()}))
        self._fault = self.hub.fault(line)
        if self._fault is not None and self._fault.status:
            return self._answer(self._fault.status, b"", self._fault.headers)
        routes: list[tuple[str, Callable[..., None]]] = [
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", self._tree),
            (r"/api/models/([^/]+/[^/]+)/xet-read-token/([^/]+)", self._xet_token),
            (r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", self._info),
            (r"/cdn/(\w+)", self._blob),
            (r"/v1/reconstructions/(\w+)", self._xet_plan),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
        ]
        for pattern, route in routes:
            if match := re.fullmatch(pattern, url.path):
                public = route in (self._blob, self._xet_plan)
                token = self.headers.get("Authorization", "").removeprefix("Bearer ")
                if not public and self.hub.token not in (None, token):
                    return self._error(401, "RepoNotFound", "Invalid username or password.")
                return route(*(unquote(group or "main") for group in match.groups()))
        self._error(404, "", "no such route")

    do_HEAD = do_GET

    def do_POST(self) -> None:  # Xet's telemetry
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(200, b"{}")

    # The hub's API

    def _commit(self, repository: str, revision: str) -> str | None:
        branches = self.hub.branches.get(repository)
        if branches is None:
            self._error(404, "RepoNotFound", "Repository not found")
            return None
        commit = branches.get(revision, revision)
        if commit not in self.hub.commits:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return commit

    def _info(self, repository: str, revision: str) -> None:
        if commit := self._commit(repository, revision):
            siblings = [{"rfilename": path} for path in self.hub.commits[commit]]
            self._json({"id": repository, "modelId": repository, "sha": commit, "tags": [], "siblings": siblings})

    def _tree(self, repository: str, revision: str) -> None:
        commit = self._commit(repository, revision)
        if commit is None:
            return
        entries: list[dict[str, object]] = []
        for path, content in sorted(self.hub.commits[commit].items()):
            entry: dict[str, object] = {"type": "file", "path": path, "size": len(content), "oid": git_id(content)}
            if path.endswith(LARGE):
                entry["oid"] = git_id(b"a pointer to " + sha256(content).encode())
                entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 135}
                if self.hub.xet:
                    entry["xetHash"] = _xet_hash(content)
            entries.append(entry)
        start = int(parse_qs(urlsplit(self.path).query).get("cursor", ["0"])[0])
        more = {}
        if start + PAGE < len(entries):
            url = f"http://{self.headers['Host']}/api/models/{repository}/tree/{revision}"
            url += f"?recursive=True&cursor={start + PAGE}"
            more = {"Link": f'<{url}>; rel="next"'}
        self._json(entries[start : start + PAGE], more)

    def _resolve(self, repository: str, revision: str, path: str) -> None:
        commit = self._commit(repository, revision)
        if commit is None:
            return
        content = self.hub.commits[commit].get(path)
        if content is None:
            return self._error(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not path.endswith(LARGE):
            return self._ranged(content, headers | {"ETag": f'"{git_id(content)}"'})
        self.hub.blobs[sha256(content)] = content
        headers |= {"X-Linked-Etag": f'"{sha256(content)}"', "X-Linked-Size": str(len(content))}
        if self.hub.xet:
            self.hub.blobs[_xet_hash(content)] = content
            headers["X-Xet-Hash"] = _xet_hash(content)
            headers["Link"] = f'<{self.hub.endpoint}/api/models/{repository}/xet-read-token/{commit}>; rel="xet-auth"'
        self._answer(302, b"", headers | {"Location": f"{self.hub.cdn}/cdn/{sha256(content)}"})

    def _blob(self, digest: str) -> None:
        """Of the content delivery network; and what Xet stores, for it: the chunks of a file."""
        content = self.hub.blobs[digest]
        self._ranged(content if digest == sha256(content) else _xet_chunks(content), {"ETag": f'"{digest}"'})

    # Xet

    def _xet_token(self, repository: str, revision: str) -> None:
        expires = int(time.time()) + 3600
        self._json({"accessToken": "for Xet only", "exp": expires, "casUrl": self.hub.cdn})

    def _xet_plan(self, digest: str) -> None:
        """Which chunks make up a range of a file, and where they are."""
        size = len(self.hub.blobs[digest])
        start, end = _range(self.headers.get("Range"), size)
        first, last = start // CHUNK, (end - 1) // CHUNK + 1
        chunks = {"start": first, "end": last}
        terms = [{"hash": digest, "unpacked_length": min(last * CHUNK, size) - first * CHUNK, "range": chunks}]
        stored = {"start": first * (CHUNK + 8), "end": min(last * CHUNK, size) + last * 8 - 1}
        fetch = [{"range": chunks, "url": f"{self.hub.cdn}/cdn/{digest}", "url_range": stored}]
        self._json({"offset_into_first_range": start - first * CHUNK, "terms": terms, "fetch_info": {digest: fetch}})

    # Answers

    def _ranged(self, content: bytes, headers: Mapping[str, str]) -> None:
        asked = self.headers.get("Range")
        if asked is None or (self._fault and self._fault.whole):
            return self._answer(200, content, headers)
        start, end = _range(asked, len(content))
        if start >= len(content):
            return self._answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        part = {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"}
        self._answer(206, content[start:end], {**headers, **part})

    def _json(self, value: object, headers: Mapping[str, str] | None = None) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _error(self, status: int, code: str, message: str) -> None:
        self._answer(
            status, json.dumps({"error": message}).encode(), {"X-Error-Code": code, "X-Error-Message": message}
        )

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        fault = self._fault if hasattr(self, "_fault") else None
        if fault and fault.damage and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault and fault.cut is not None:
            self.wfile.write(body[: fault.cut])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        else:
            self.wfile.write(body)


def _range(header: str | None, size: int) -> tuple[int, int]:
    """Start and end (exclusive) in bytes."""
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", header or "bytes=0-")
    assert match, header
    return int(match[1]), min(int(match[2]) + 1, size) if match[2] else size


def _xet_hash(content: bytes) -> str:
    """Stands for the Merkle hash, which the client does not check."""
    return sha256(b"xet" + content)


def _xet_chunks(content: bytes) -> bytes:
    """As Xet stores them: version, stored size, no compression, size, data."""
    stored = b""
    for start in range(0, len(content), CHUNK):
        chunk = content[start : start + CHUNK]
        size = len(chunk).to_bytes(3, "little")
        stored += b"\0" + size + b"\0" + size + chunk
    return stored
