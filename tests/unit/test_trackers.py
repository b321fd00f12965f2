"""Whatever becomes of wandb, the run goes on, says so once, and metrics.jsonl has everything."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from sft_dist.config import Recipe, parse_recipe
from sft_dist.metrics import HeldOutMetrics, StepMetrics, read_lines
from sft_dist.trackers import JsonlTracker, Trackers, WandbTracker
from sft_dist.wandb_process import make_run_id
from tests.tiny import free_port
from tests.unit.wandb_server import wandb_server

ROOT = Path(__file__).parents[2]
PATIENCE_S = 15.0
"""The longest wait for something that takes a second or two on a free machine."""


def metrics_of(step: int, **given: Any) -> StepMetrics:
    return StepMetrics(**({field.name: 1 for field in fields(StepMetrics)} | {"step": step, "loss": 1 / step} | given))


def held_out_of(step: int) -> HeldOutMetrics:
    return HeldOutMetrics(step, held_out_loss=2.5, examples=3, response_tokens=4, seconds=9.0, attempt=1)


pytestmark = pytest.mark.usefixtures("no_wandb_of_the_machine")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return make_recipe(tmp_path, mode="online")


def make_recipe(directory: Path, *, mode: str) -> Recipe:
    (directory / "runs" / "r").mkdir(parents=True, exist_ok=True)
    raw = {
        "run": {"name": "r", "dir": str(directory / "runs")},
        "model": {"path": "https://ann:opensesame@host/model"},
        "data": {"train": "d.jsonl"},
        "batch": {"examples": 8},
        "optim": {"lr": 1e-3},
        "wandb": {"project": "p", "mode": mode},
    }
    return parse_recipe(raw, origin="test")


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """The one warning of the tracker."""

    def the_warning() -> str:
        (record,) = (record for record in caplog.records if record.name == "sft_dist.trackers")
        assert record.levelno == logging.WARNING
        return record.getMessage()

    return the_warning


def log_until_it_gives_up(tracker: WandbTracker) -> float:
    """The longest that one `log` took, in seconds."""
    slowest, deadline, step = 0.0, time.monotonic() + PATIENCE_S, 0
    while tracker.pid is not None and time.monotonic() < deadline:
        step += 1
        started = time.perf_counter()
        tracker.log(metrics_of(step))
        slowest = max(slowest, time.perf_counter() - started)
        time.sleep(0.02)
    assert tracker.pid is None, "wandb failed and nobody noticed"
    tracker.log(metrics_of(step + 1))
    tracker.close()
    return slowest


def wait_until(true: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, f"not within {PATIENCE_S:g} s: {what}"
        time.sleep(0.02)


def children_of(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def is_running(pid: int) -> bool:
    """False also for a process that has ended and was not waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_without_a_key_the_run_goes_on_and_says_so_once(recipe: Recipe, said: Callable[[], str]) -> None:
    path = recipe.run.path / "metrics.jsonl"
    with Trackers([JsonlTracker(path), WandbTracker(recipe)]) as trackers:
        for step in (1, 2, 3):
            trackers.log(metrics_of(step))
    assert "No API key configured" in said()
    assert "training goes on" in said()
    assert f"sft-dist sync {recipe.run.path}" in said()
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3]


def test_a_server_that_refuses_does_not_matter(
    recipe: Recipe, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_port()}")
    log_until_it_gives_up(WandbTracker(recipe, init_timeout_s=1))
    assert "wandb is off for this run" in said()
    assert "CommError" in said()


@pytest.fixture
def silent_server() -> Iterator[int]:
    """The port of a server that accepts and never answers."""
    held = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    held.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
    for connection in held:
        connection.close()


def test_a_server_that_never_answers_delays_no_step(
    recipe: Recipe, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch, silent_server: int
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent_server}")
    slowest = log_until_it_gives_up(WandbTracker(recipe, init_timeout_s=1))
    assert slowest < 0.5, "a step waited for wandb"
    assert "CommError" in said()


def test_close_waits_no_longer_than_it_may(
    recipe: Recipe, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch, silent_server: int
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent_server}")
    tracker = WandbTracker(recipe, close_timeout_s=0.5)
    pid = tracker.pid
    assert pid is not None
    tracker.log(metrics_of(1))
    started = time.monotonic()
    tracker.close()
    assert time.monotonic() - started < 3
    assert "did not finish within 0.5 s" in said()
    assert not is_running(pid)


def test_a_server_that_goes_away_midway_is_said_at_the_end(
    recipe: Recipe, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with wandb_server() as server:
        for name, value in server.environ.items():
            monkeypatch.setenv(name, value)
        tracker = WandbTracker(recipe, finish_timeout_s=1)
        tracker.log(metrics_of(1))
        wait_until(lambda: server.upserts, "the run has started at wandb")
    tracker.log(metrics_of(2))
    started = time.monotonic()
    tracker.close()
    assert time.monotonic() - started < 10
    assert "wandb is off for this run" in said()


def test_a_service_that_is_killed_midway_is_said_once(tmp_path: Path, said: Callable[[], str]) -> None:
    tracker = WandbTracker(make_recipe(tmp_path, mode="offline"))
    pid = tracker.pid
    assert pid is not None
    tracker.log(metrics_of(1))
    wait_until(lambda: list(tmp_path.glob("runs/r/wandb/offline-run-*/*.wandb")), "wandb's file is there")
    (service,) = children_of(pid)
    assert "wandb-core" in Path(f"/proc/{service}/cmdline").read_text()
    os.kill(service, signal.SIGKILL)
    assert log_until_it_gives_up(tracker) < 6
    assert "its service process ended" in said()


def test_a_process_of_wandb_that_is_killed_is_said_once(tmp_path: Path, said: Callable[[], str]) -> None:
    tracker = WandbTracker(make_recipe(tmp_path, mode="offline"))
    assert tracker.pid is not None
    wait_until(lambda: list(tmp_path.glob("runs/r/wandb/offline-run-*/*.wandb")), "wandb's file is there")
    os.kill(tracker.pid, signal.SIGKILL)
    log_until_it_gives_up(tracker)
    assert "its process ended with code -9" in said()


def test_a_wandb_that_takes_nothing_more_neither_blocks_nor_fills_the_memory(
    tmp_path: Path, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sft_dist.wandb_process.MAX_UNSENT_BYTES", 200_000)
    tracker = WandbTracker(make_recipe(tmp_path, mode="offline"))
    pid = tracker.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)

    def log_much() -> None:
        for step in range(1, 2001):
            tracker.log(metrics_of(step))

    logging_thread = threading.Thread(target=log_much, daemon=True)
    logging_thread.start()
    logging_thread.join(timeout=10)
    assert not logging_thread.is_alive(), "a step waits for wandb"
    assert "takes no records any more" in said()
    assert not is_running(pid), "a stopped process can still be killed"


def test_a_machine_that_starts_no_process_does_not_matter(
    recipe: Recipe, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    tracker = WandbTracker(recipe)
    tracker.log(metrics_of(1))
    tracker.close()
    assert "/nowhere/python" in said()


def test_a_resumed_run_goes_on_under_its_id_and_tells_no_secrets(
    recipe: Recipe, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two attempts against a server: the second replays step 3, which wandb has already."""
    monkeypatch.setenv("HF_TOKEN", "abracadabra")
    with wandb_server() as server:
        for name, value in server.environ.items():
            monkeypatch.setenv(name, value)
        run_id = make_run_id(recipe.run.path)
        for steps, failed in ((range(1, 4), True), (range(3, 6), False)):
            tracker = WandbTracker(recipe)
            for step in steps:
                tracker.log(metrics_of(step, grad_norm=float("nan"), applied=False))
            tracker.log(held_out_of(steps[-1]))
            tracker.log(held_out_of(1))
            tracker.close(failed=failed)
            assert server.exit_codes[run_id] == failed
        rows = server.rows(run_id)
        sent = b"".join(server.sent)
    assert not caplog.records
    assert [row["_step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["train/loss"] for row in rows] == pytest.approx([1 / step for step in range(1, 6)])
    assert rows[4]["held_out/held_out/loss"] == 2.5
    assert rows[4]["held_out/held_out/step"] == 1, "a record that comes late stands beside the step that is at hand"
    assert (rows[4]["perf/step_s"], rows[4]["held_out/held_out/seconds"]) == (1, 9), (
        "records of one step keep their own values"
    )
    assert rows[0]["train/applied"] == 0
    assert "train/grad_norm" not in rows[0]
    assert server.resumes == [run_id, run_id]
    config = json.loads(server.upserts[0]["config"])
    assert config["model"]["value"]["path"] == "https://ann:***@host/model"
    assert config["optim"]["value"]["lr"] == 1e-3
    for secret in (b"opensesame", b"abracadabra", str(ROOT).encode()):
        assert secret not in sent, f"{secret!r} left the machine"


def test_wandb_ends_with_the_run_and_touches_nothing_in_it(tmp_path: Path) -> None:
    """A trainer that is killed: neither wandb's process nor its service stays."""
    code = """
import os, sys, time
hooks = sys.exit, sys.excepthook
from sft_dist.wandb_process import Start, WandbProcess
start = Start("p", "r", "r-1", sys.argv[1], "offline", {}, resume="allow", stats_pid=os.getpid())
process = WandbProcess(start)
process.send({"event": "step", "step": 1, "loss": 0.5})
assert (sys.exit, sys.excepthook) == hooks and "wandb" not in sys.modules
print(process.pid, flush=True)
time.sleep(60)
"""
    trainer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert trainer.stdout is not None
        pid = int(trainer.stdout.readline())
        wait_until(lambda: list(tmp_path.glob("wandb/offline-run-*/*.wandb")), "wandb's file is there")
        (service,) = children_of(pid)
        assert os.getsid(pid) == pid, "no terminal to ask for a key, and Ctrl-C is for the training"
    finally:
        trainer.kill()
        trainer.wait(timeout=10)
    wait_until(lambda: not is_running(pid), "wandb's process ends")
    wait_until(lambda: not is_running(service), "wandb's service ends")


def test_the_id_is_kept_and_a_torn_one_is_made_anew(tmp_path: Path) -> None:
    run_id = make_run_id(tmp_path)
    assert run_id.startswith(f"{tmp_path.name}-")
    assert make_run_id(tmp_path) == run_id
    for torn in (b"", b"a/b", b"\xff\xfe"):
        (tmp_path / "wandb_id").write_bytes(torn)
        assert make_run_id(tmp_path) not in (run_id, torn.decode(errors="replace"))


class Recorder:
    def __init__(self, closed: list[tuple[str, bool]], name: str, *, breaks: bool = False) -> None:
        self._closed, self._name, self._breaks = closed, name, breaks

    def log(self, metrics: object) -> None: ...

    def close(self, *, failed: bool = False) -> None:
        self._closed.append((self._name, failed))
        if self._breaks:
            raise OSError("no space left")


def test_all_trackers_are_closed_though_one_cannot_be_and_hear_how_the_run_ended() -> None:
    closed: list[tuple[str, bool]] = []
    with (
        pytest.raises(OSError, match="no space"),
        Trackers([Recorder(closed, "a", breaks=True), Recorder(closed, "b")]),
    ):
        pass
    with pytest.raises(ValueError, match="x"), Trackers([Recorder(closed, "c")]):
        raise ValueError("x")
    assert closed == [("a", False), ("b", False), ("c", True)]


def test_the_file_loses_a_torn_line_and_writes_null_for_what_json_has_not(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "step", "step": 1}\n{"event": "st')
    tracker = JsonlTracker(path)
    tracker.log(metrics_of(2, loss=float("inf")))
    tracker.close()
    first, second = read_lines(path)
    assert first == {"event": "step", "step": 1}
    assert (second["step"], second["loss"]) == (2, None)
