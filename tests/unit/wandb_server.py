"""A wandb server on loopback that takes one client's runs and remembers what it was sent."""

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class WandbServer:
    port: int
    upserts: list[dict[str, Any]] = field(default_factory=list)
    """The variables of each mutation that makes or changes a run."""
    history: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)
    """Rows by place, by run id. A row that is sent for a place again replaces the old one."""
    resumes: list[str] = field(default_factory=list)
    """Ids that a client asked to go on with."""
    exit_codes: dict[str, int] = field(default_factory=dict)
    sent: list[bytes] = field(default_factory=list)
    """Every request as it came: head and body."""

    @property
    def environ(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self.port}", "WANDB_API_KEY": "a" * 40}

    def rows(self, run_id: str) -> list[dict[str, Any]]:
        return [row for _, row in sorted(self.history[run_id].items())]


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    seen = WandbServer(0)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            seen.sent.append(f"{self.path}\n{self.headers}\n".encode() + body)
            answer = _graphql(seen, json.loads(body)) if self.path == "/graphql" else {}
            if self.path.endswith("/file_stream"):
                _file_stream(seen, self.path.split("/")[-2], json.loads(body))
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_PUT = do_GET = do_POST

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    seen.port = server.server_port
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield seen
    finally:
        server.shutdown()
        server.server_close()


def _graphql(seen: WandbServer, request: dict[str, Any]) -> dict[str, Any]:
    query, variables = request["query"], request.get("variables") or {}
    data: dict[str, Any] = {}
    if "UpsertBucket" in query:
        seen.upserts.append(variables)
        project = {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": "e"}}
        bucket = {"id": "b", "name": variables["name"], "displayName": variables["name"], "project": project}
        data = {"upsertBucket": {"bucket": bucket, "inserted": True}}
    elif "RunResumeStatus" in query:
        seen.resumes.append(variables["name"])
        data = {
            "model": {"id": "m", "name": "m", "entity": {"id": "e", "name": "e"}, "bucket": _known(seen, variables)}
        }
    elif "CreateRunFiles" in query:
        data = {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}}
    return {"data": data}


def _known(seen: WandbServer, variables: dict[str, Any]) -> dict[str, Any] | None:
    """What a client needs to go on with a run; None: there is no such run."""
    run_id = variables["name"]
    if run_id not in seen.history:
        return None
    rows = seen.rows(run_id)
    return {
        "name": run_id,
        "summaryMetrics": "{}",
        "displayName": run_id,
        "logLineCount": 0,
        "historyLineCount": len(rows),
        "eventsLineCount": 0,
        "historyTail": json.dumps([json.dumps(rows[-1])]),
        "eventsTail": "[]",
        "config": "{}",
        "tags": [],
        "wandbConfig": '{"t": 1}',
    }


def _file_stream(seen: WandbServer, run_id: str, body: dict[str, Any]) -> None:
    part = body.get("files", {}).get("wandb-history.jsonl")
    if part:
        rows = seen.history.setdefault(run_id, {})
        rows |= {part["offset"] + index: json.loads(row) for index, row in enumerate(part["content"])}
    if body.get("complete"):
        seen.exit_codes[run_id] = body["exitcode"]
