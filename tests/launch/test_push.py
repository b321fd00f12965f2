"""`sft-dist export --push-to-hub`, from a process of its own to a hub on loopback, named by HF_ENDPOINT."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from sft_dist.config import load_recipe
from sft_dist.train import run
from tests import tiny
from tests.unit import hub_uploads
from tests.unit.hub_uploads import READ_TOKEN, WRITE_TOKEN

# One process for all pushes, since importing torch takes seconds: a line of JSON in, the exit code and its words out.
SERVED = """
import contextlib, io, json, os, sys
from sft_dist.cli import main
from huggingface_hub import close_session, snapshot_download
for line in sys.stdin:
    asked = json.loads(line)
    close_session()  # a connection that is kept open would outlive the hub
    os.environ.pop("HF_TOKEN", None)
    os.environ.update(asked["environment"])
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        if "download" in asked:
            code = snapshot_download(asked["download"])
        else:
            code = main(asked["words"])
    sys.__stdout__.write(json.dumps([code, said.getvalue()]) + "\\n")
    sys.__stdout__.flush()
"""


class Pusher:
    def __init__(self, process: "subprocess.Popen[str]", run_dir: Path) -> None:
        self._process, self._run_dir = process, run_dir

    def push(self, name: str, token: str | None, *flags: str) -> tuple[int, str]:
        """The exit code, and all that was said."""
        words = ["export", str(self._run_dir), "--push-to-hub", name, *flags]
        return tuple(self._ask({"words": words, "environment": {"HF_TOKEN": token} if token else {}}))

    def download(self, name: str) -> Path:
        return Path(self._ask({"download": name, "environment": {"HF_TOKEN": WRITE_TOKEN}})[0])

    def _ask(self, asked: dict[str, object]) -> list[object]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@contextlib.contextmanager
def pusher(run_dir: Path, url: str, home: Path) -> Iterator[Pusher]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))} | {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", SERVED],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Pusher(process, run_dir)
    finally:
        process.kill()
        process.communicate(timeout=30)


def test_a_push_arrives_byte_for_byte_and_what_goes_wrong_is_one_line(tmp_path: Path) -> None:
    recipe = tiny.write_recipe(tmp_path, tiny.write_model(tmp_path / "m"), num_examples=12)
    run_dir = run(load_recipe(recipe), console=Console(quiet=True)).model_dir.parent
    stale = {"README.md": b"old", "model.safetensors.index.json": b"{}", "model-00001-of-00002.safetensors": b"old"}
    repositories = {"models/org/public": {"main": {**stale, "notes.txt": b"theirs"}}}
    everything = ""
    with contextlib.ExitStack() as processes, contextlib.ExitStack() as served:
        hub, uploads = served.enter_context(hub_uploads.serve(repositories))
        hf = processes.enter_context(pusher(run_dir, hub.url, tmp_path / "home"))

        def refused(name: str, token: str | None, *flags: str) -> str:
            nonlocal everything
            before = json.dumps(sorted(map(str, repositories.items())))
            code, said = hf.push(name, token, *flags)
            everything += said
            assert code == 2, said
            lines = [line for line in said.splitlines() if line.startswith("error: ")]
            assert len(lines) == 1, said
            assert "Traceback" not in said
            assert json.dumps(sorted(map(str, repositories.items()))) == before
            assert (run_dir / "model" / "model.safetensors").is_file()
            return lines[0]

        assert "there is no token; set HF_TOKEN" in refused("org/clinic", None)
        assert "answers 401" in refused("org/clinic", "hf_" + "x" * 30)
        said = refused("org/clinic", READ_TOKEN)
        assert "answers 403" in said
        assert "the token may not write there" in said
        assert "no name of a repository; expected owner/name" in refused("a/b/c", WRITE_TOKEN)
        assert "is there already, and public; nothing was pushed" in refused("org/public", WRITE_TOKEN, "--private")

        code, said = hf.push("org/clinic", WRITE_TOKEN, "--private")
        everything += said
        assert code == 0, said
        assert f"pushed to {hub.url}/org/clinic\n" in said
        assert uploads.private == {"models/org/clinic"}
        ours = {file.name: file.read_bytes() for file in (run_dir / "model").iterdir()}
        assert dict(repositories["models/org/clinic"]["main"]) == ours
        assert list(uploads.objects.values()) == [ours["model.safetensors"]], "weights go as large objects"
        assert uploads.messages == ["sft-dist export: weights after step 3"]
        fetched = hf.download("org/clinic")
        assert {file.name: file.read_bytes() for file in fetched.iterdir()} == ours

        code, said = hf.push("org/public", WRITE_TOKEN)
        everything += said
        assert code == 0, said
        expected = {**ours, "notes.txt": b"theirs"}
        assert dict(repositories["models/org/public"]["main"]) == expected, "no stale shard is left to be loaded"

        served.close()
        code, said = hf.push("org/clinic", WRITE_TOKEN)
        assert code == 2
        assert f"{hub.url} cannot be reached" in said
        assert f"the export stays in {run_dir / 'model'}" in said
        everything += said
    for token in (WRITE_TOKEN, READ_TOKEN, "x" * 30):
        assert token not in everything
