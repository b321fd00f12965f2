"""wandb in a process of its own, fed through a pipe that never blocks.

wandb may hang in `init`, in `finish` or at interpreter exit, replace `sys.exit` and `sys.excepthook`, and ask for a key
on a terminal. In a process of its own it can do all that and be killed: the training process never imports it.

The parent writes JSON lines: first a `Start`, then records, last `{"exit_code": n}`. The child answers with one line:
`{"sent": n}`, or `{"failed": reason}` and its end. A pipe that closes without the last line means that the parent died;
the child then marks the run as failed and ends too.
"""

import json
import os
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal, NoReturn

from sft_dist.metric_names import named_numbers
from sft_dist.redact import redacted

Mode = Literal["online", "offline"]

MAX_UNSENT_BYTES = 8 * 2**20
"""Some 20,000 records. wandb that is this far behind hangs."""


class WandbFailureError(Exception):
    """wandb does not work; the message says why, in one line, without secrets."""


@dataclass(frozen=True)
class Start:
    """What `wandb.init` is told."""

    project: str
    name: str
    id: str
    dir: str
    """Where wandb keeps its own files, under `wandb/`."""
    mode: Mode
    config: dict[str, Any]
    """Without secrets."""
    resume: Literal["allow"] | None
    """allow: the run of this id goes on. None: what wandb has of it is replaced."""
    stats_pid: int | None
    """The process whose CPU and memory are shown beside the metrics; None: no system metrics."""
    init_timeout_s: float = 30.0
    finish_timeout_s: float = 15.0
    peak_flops: float | None = None
    """Of all devices together, for the MFU."""


class WandbProcess:
    """The parent's side. Only `drain` and `finish` wait for anything."""

    def __init__(self, start: Start) -> None:
        """Raises OSError where no process can be started, WandbFailureError where it ends at once."""
        self._unsent = bytearray()
        # A session of its own: Ctrl-C at the terminal is for the training, and there is no terminal to ask for a key.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sft_dist.wandb_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
            # No crash reports, which name paths, to others than the server of the user's choice.
            env={"WANDB_ERROR_REPORTING": "false", **os.environ},
        )
        assert self._process.stdin is not None
        self._pipe = self._process.stdin
        os.set_blocking(self._pipe.fileno(), False)
        self._put(asdict(start))
        self._push()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, line: Mapping[str, Any]) -> None:
        """Hand a record over without waiting. Raises WandbFailureError when wandb has given up, or takes no more."""
        self._put(line)
        self._push()
        if len(self._unsent) > MAX_UNSENT_BYTES:
            self.kill()
            raise WandbFailureError(f"takes no records any more ({len(self._unsent) / 2**20:.1f} MiB wait)")

    def drain(self, *, timeout_s: float) -> None:
        """Wait until the pipe has taken what was sent. Raises WandbFailureError."""
        self._drain(time.monotonic() + timeout_s)
        if self._unsent:
            self.kill()
            raise WandbFailureError(f"has taken no records for {timeout_s:g} s")

    def finish(self, *, exit_code: int, timeout_s: float) -> int:
        """Wait until wandb has everything; the number of records it took. Raises WandbFailureError."""
        deadline = time.monotonic() + timeout_s
        self._put({"exit_code": exit_code})
        self._drain(deadline)
        answer = self._last_words(max(0.0, deadline - time.monotonic()))
        if answer is None:
            raise WandbFailureError(f"did not finish within {timeout_s:g} s")
        if "sent" not in answer:
            raise WandbFailureError(answer["failed"])
        return int(answer["sent"])

    def kill(self) -> None:
        """End the child at once; wandb's own service follows it."""
        self._process.kill()
        self._process.communicate()

    def _put(self, line: Mapping[str, Any]) -> None:
        self._unsent += json.dumps(line).encode() + b"\n"

    def _drain(self, deadline: float) -> None:
        self._push()
        while self._unsent and (seconds := deadline - time.monotonic()) > 0:
            select.select([], [self._pipe], [], seconds)
            self._push()

    def _push(self) -> None:
        """Write as much as the pipe takes."""
        try:
            while self._unsent:
                del self._unsent[: os.write(self._pipe.fileno(), self._unsent)]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            answer = self._last_words(5.0) or {}
            raise WandbFailureError(answer.get("failed", "ended unasked")) from None

    def _last_words(self, timeout_s: float) -> dict[str, Any] | None:
        """Close the pipe and wait for the child's answer; None, and the child is killed, where it takes too long."""
        try:
            out, _ = self._process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            return None
        failed = {"failed": f"its process ended with code {self._process.returncode}"}
        try:
            return dict(json.loads(out)) if out else failed
        except ValueError:  # killed while it spoke
            return failed


def _child() -> NoReturn:
    """Take what the parent sends to wandb. Ends without interpreter exit, where wandb may hang."""
    # wandb's service inherits the standard streams and would keep the parent's pipes open after this process is gone.
    with os.fdopen(os.dup(0), "rb") as records, os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        with open(os.devnull, "r+b") as nothing:
            for stream in (0, 1, 2):
                os.dup2(nothing.fileno(), stream)
        try:
            _answer(answers, {"sent": _serve(records, answers)}, code=0)
        except (Exception, SystemExit) as error:  # whatever wandb raises is the answer, and the end of this process
            _answer(answers, {"failed": _reason(error)}, code=1)


def _serve(records: IO[bytes], answers: IO[str]) -> int:
    """Start wandb, log every record, finish; the number of records."""
    start = Start(**json.loads(next(records)))
    with _within(start.init_timeout_s + 10, "to start", answers):
        run = _init(start)
    num_sent, exit_code, latest = 0, 1, 0
    for line in records:
        record = json.loads(line)
        if "exit_code" in record:
            exit_code = record["exit_code"]
            break
        step = record.get("step", latest)
        # wandb drops a row whose step has passed: right for a step that is replayed, not for a commit that comes late.
        if record.get("event") != "step":
            step = max(step, latest)
        run.log(named_numbers(record, peak_flops=start.peak_flops), step=step)
        latest = max(step, latest)
        num_sent += 1
    # wandb's own limit comes first: it keeps what it could not send.
    with _within(start.finish_timeout_s + 2, "to finish", answers):
        run.finish(exit_code=exit_code)
        _end_service()
    return num_sent


def _init(start: Start) -> Any:
    import wandb

    # Nothing but metrics and config leaves: no command line, no git remote, no code, no console, no package list.
    settings = wandb.Settings(
        silent=True,
        console="off",
        init_timeout=start.init_timeout_s,
        login_timeout=start.init_timeout_s,
        finish_timeout=start.finish_timeout_s,
        finish_timeout_raises=True,
        program="sft-dist",
        save_code=False,
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        x_disable_meta=True,
        x_save_requirements=False,
        x_disable_stats=start.stats_pid is None,
        x_stats_pid=start.stats_pid or os.getpid(),
    )
    return wandb.init(
        project=start.project,
        name=start.name,
        id=start.id,
        dir=start.dir,
        mode=start.mode,
        config=start.config,
        resume=start.resume,
        settings=settings,
    )


def _end_service() -> None:
    """Wait for wandb's service: it writes its file behind `finish`, and dies half-way where its client just exits."""
    import wandb

    wandb.teardown(exit_code=0)


@contextmanager
def _within(seconds: float, what: str, answers: IO[str]) -> Iterator[None]:
    """End this process where the block takes longer: wandb's own limits do not cover all that it waits for."""
    words = {"failed": f"took more than {seconds:g} s {what}"}
    timer = threading.Timer(seconds, _answer, (answers, words), {"code": 1})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _answer(answers: IO[str], words: dict[str, Any], *, code: int) -> NoReturn:
    try:
        answers.write(json.dumps(words) + "\n")
        answers.flush()
    finally:  # a parent that is gone hears nothing
        os._exit(code)


def _reason(error: BaseException) -> str:
    if isinstance(error, ImportError) and error.name == "wandb":
        return "wandb is not installed; pip install 'sft-dist[wandb]'"
    name = type(error).__name__
    if isinstance(error, ConnectionError) or name in ("HandleAbandonedError", "MailboxClosedError"):
        return f"its service process ended ({name})"
    return redacted(f"{name}: {str(error).strip().splitlines()[0]}" if str(error).strip() else name)


def make_run_id(run_dir: Path) -> str:
    """The run's id at wandb, the same in every attempt: its name and a random part, kept in `<run>/wandb_id`."""
    path = run_dir / "wandb_id"
    known = path.read_text(encoding="utf-8", errors="replace").strip() if path.exists() else ""
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,128}", known):  # never made, or torn by a crash
        known = f"{run_dir.name}-{os.urandom(4).hex()}"
        writing = path.with_suffix(".tmp")
        writing.write_text(known + "\n", encoding="utf-8")
        writing.replace(path)
    return known


if __name__ == "__main__":
    _child()
