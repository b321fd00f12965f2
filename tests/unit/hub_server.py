"""A hub on loopback: the few endpoints that the real clients call to find and download data sets and models."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = Mapping[str, bytes]


@dataclass
class Hub:
    """repositories: data set id, or models/<model id> -> revision name -> files. The branch is `main`; others are tags.

    requests: method and path of every request, in order.
    """

    repositories: dict[str, dict[str, Files]]
    url: str = ""
    requests: list[str] = field(default_factory=list)

    def commit(self, repository: str, revision: str) -> str:
        """40 hex digits that depend on the content, as in git."""
        content = repr(sorted(self.repositories[repository][revision].items()))
        return hashlib.sha1(f"{repository} {content}".encode()).hexdigest()

    def find(self, repository: str, revision: str) -> tuple[str, Files] | None:
        """The commit and files of a branch, tag or commit."""
        for name, files in self.repositories[repository].items():
            commit = self.commit(repository, name)
            if revision in (name, commit):
                return commit, files
        return None


@contextmanager
def serve(repositories: dict[str, dict[str, Files]], *, handler: "type[Handler] | None" = None) -> Iterator[Hub]:
    """Serve these on a free port of loopback; they may be changed while it runs. handler: one that does more."""
    hub = Hub(repositories)
    serving = type("Serving", (handler or Handler,), {"served": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), serving)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


class Handler(BaseHTTPRequestHandler):
    """Answers what asks for files."""

    served: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def is_private(self, repository: str) -> bool:
        return False

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.served.requests.append(f"{self.command} {path}")
        is_api = path.startswith("/api/")
        rest = path.removeprefix("/api").removeprefix("/")
        if not is_api and not rest.startswith("datasets/"):
            rest = f"models/{rest}"  # the hub leaves the word out
        rest = rest.removeprefix("datasets/")
        repository = next((name for name in self.served.repositories if f"{rest}/".startswith(f"{name}/")), None)
        if repository is None:
            self._fail(404, "RepoNotFound", "Repository not found")
            return
        verb, _, rest = rest.removeprefix(repository).removeprefix("/").partition("/")
        revision, _, inside = rest.partition("/")
        found = self.served.find(repository, revision or "main")
        if found is None:
            self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif not is_api and verb == "resolve":
            self._resolve(*found, inside)
        elif verb in ("", "revision"):
            siblings = [{"rfilename": name} for name in found[1]]
            info = {"id": repository.removeprefix("models/"), "sha": found[0], "siblings": siblings}
            self._send_json({**info, "private": self.is_private(repository)})
        elif verb == "tree":
            self._send_json(_tree(found[1], inside, recursive="recursive=true" in self.path.lower()))
        else:
            self._fail(404, "EntryNotFound", f"no endpoint {path}")

    def _resolve(self, commit: str, files: Files, inside: str) -> None:
        headers = {"X-Repo-Commit": commit}
        if inside not in files:
            self._fail(404, "EntryNotFound", f"{inside} does not exist", headers)
            return
        etag = f'"{hashlib.sha1(files[inside]).hexdigest()}"'
        self._send(200, files[inside], {**headers, "ETag": etag, "Accept-Ranges": "none"})

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, message.encode(), {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _tree(files: Files, folder: str, *, recursive: bool) -> list[dict[str, Any]]:
    """The entries below a folder as the hub lists them: files with their size and blob id, folders without."""
    entries: dict[str, dict[str, Any]] = {}
    start = f"{folder}/" if folder else ""
    for name, content in sorted(files.items()):
        if not name.startswith(start):
            continue
        parts = name.removeprefix(start).split("/")
        parents = ["/".join(parts[:depth]) for depth in range(1, len(parts))]
        for parent in parents if recursive else parents[:1]:
            path = f"{start}{parent}"
            oid = hashlib.sha1(path.encode()).hexdigest()
            entries[path] = {"type": "directory", "path": path, "oid": oid, "size": 0}
        if recursive or not parents:
            oid = hashlib.sha1(content).hexdigest()
            entries[name] = {"type": "file", "path": name, "oid": oid, "size": len(content)}
    return list(entries.values())
