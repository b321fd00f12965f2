"""The loopback hub with what the real client calls to push a folder: repository, LFS objects, one commit."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from tests.unit import hub_server

WRITE_TOKEN, READ_TOKEN = "hf_" + "w" * 30, "hf_" + "r" * 30
LARGE = (".safetensors",)


@dataclass
class Uploads:
    """private: repositories that only their owner sees. objects: LFS objects by sha256. messages: of the commits."""

    private: set[str] = field(default_factory=set)
    objects: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)


@contextmanager
def serve(repositories: dict[str, dict[str, hub_server.Files]]) -> Iterator[tuple[hub_server.Hub, Uploads]]:
    """A hub that takes pushes with WRITE_TOKEN, refuses READ_TOKEN with 403 and any other with 401."""
    uploads = Uploads()

    class Handler(_Handler):
        kept = uploads

    with hub_server.serve(repositories, handler=Handler) as hub:
        yield hub, uploads


class _Handler(hub_server.Handler):
    kept: Uploads

    def is_private(self, repository: str) -> bool:
        return repository in self.kept.private

    def do_PUT(self) -> None:
        path = urlsplit(self.path).path
        self.served.requests.append(f"PUT {path}")
        body = self._body()
        assert hashlib.sha256(body).hexdigest() == path.rpartition("/")[2], "the object is what its name says"
        self.kept.objects[path.rpartition("/")[2]] = body
        self._send_json({})

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.served.requests.append(f"POST {path}")
        body = self._body()
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token != WRITE_TOKEN:
            self._fail(403 if token == READ_TOKEN else 401, "", f"Invalid credentials, {token} may not do this")
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._send_json({"errors": [], "warnings": []})
        elif path.endswith("/info/lfs/objects/batch"):
            self._send_json({"transfer": "basic", "objects": [self._upload_of(o) for o in json.loads(body)["objects"]]})
        elif "/preupload/" in path:
            self._send_json({"files": [_mode_of(file["path"]) for file in json.loads(body)["files"]]})
        elif "/commit/" in path:
            self._commit(path.removeprefix("/api/").partition("/commit/")[0], body)
        else:
            self._fail(404, "EntryNotFound", f"no endpoint {path}")

    def _create(self, asked: dict[str, object]) -> None:
        name = f"models/{asked.get('organization') or 'me'}/{asked['name']}"
        url = f"{self.served.url}/{name.removeprefix('models/')}"
        if name in self.served.repositories:
            said = json.dumps({"error": "You already created this model repo", "url": url}).encode()
            self._send(409, said, {"Content-Type": "application/json"})
            return
        self.served.repositories[name] = {"main": {}}
        self.kept.private |= {name} if asked.get("visibility") == "private" or asked.get("private") else set()
        self._send_json({"url": url, "name": name.removeprefix("models/"), "id": name.removeprefix("models/")})

    def _upload_of(self, wanted: dict[str, object]) -> dict[str, object]:
        href = f"{self.served.url}/objects/{wanted['oid']}"
        return wanted if wanted["oid"] in self.kept.objects else {**wanted, "actions": {"upload": {"href": href}}}

    def _commit(self, repository: str, body: bytes) -> None:
        files = dict(self.served.repositories[repository]["main"])
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.kept.messages.append(value["summary"])
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.kept.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        self.served.repositories[repository]["main"] = files
        url = f"{self.served.url}/{repository.removeprefix('models/')}/commit/1"
        self._send_json({"success": True, "commitUrl": url, "commitOid": self.served.commit(repository, "main")})

    def _body(self) -> bytes:
        if (length := self.headers.get("Content-Length")) is not None:
            return self.rfile.read(int(length))
        body = b""
        while size := int(self.rfile.readline(), 16):  # chunked
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body


def _mode_of(path: str) -> dict[str, object]:
    return {"path": path, "uploadMode": "lfs" if path.endswith(LARGE) else "regular", "shouldIgnore": False}
