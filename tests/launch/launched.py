"""A run of many steps under a launcher, to be signalled, and what can be seen of it from outside."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from sft_dist.launch import descendants
from tests import tiny

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
LOOPBACK = {"0100007F", "00000000000000000000000001000000"}  # as /proc/net/tcp and tcp6 write it
NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false"}


class Launched:
    """A launcher that was started here, with its run."""

    def __init__(self, command: Sequence[str], run_dir: Path, log: Path, modules: Path) -> None:
        self.run_dir, self.log = run_dir, log
        settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{modules}:{ROOT}"} | NO_COMPILER
        with log.open("w") as out:  # not a pipe: whoever outlives the launcher would hold it open
            self.process = subprocess.Popen(
                [str(BIN / command[0]), *command[1:]],
                env=os.environ | settings,
                stdout=out,
                stderr=subprocess.STDOUT,
                preexec_fn=_heed_interrupts,
            )
        self.parents: dict[int, int] = {}

    def wait_for_steps(self, count: int) -> None:
        """Return when so many steps were logged; notes the processes that are there by then."""
        deadline = time.monotonic() + 90
        while len(self.steps()) < count:
            assert time.monotonic() < deadline, self.log.read_text()[-5000:]
            assert self.process.poll() is None, self.log.read_text()[-5000:]
            time.sleep(0.01)
        self.parents = dict(descendants(self.process.pid))

    @property
    def started(self) -> set[int]:
        return set(self.parents)

    def steps(self) -> list[str]:
        """The lines of metrics.jsonl that are steps."""
        path = self.run_dir / "metrics.jsonl"
        return [line for line in path.read_text().splitlines() if '"event": "step"' in line] if path.exists() else []

    def checkpoints(self) -> list[str]:
        return sorted(path.parent.name for path in self.run_dir.glob("checkpoints/step-*/COMMITTED"))

    def ranks(self) -> list[int]:
        """Processes that train: the launcher gave them a RANK; what they start themselves inherits it."""
        with_rank = {pid for pid in self.started if b"\0RANK=" in b"\0" + _read(pid, "environ")}
        return sorted(pid for pid in with_rank if self.parents[pid] not in with_rank)

    def exit_code(self, timeout_s: float = 30) -> int:
        """The launcher's, as a shell says it: 128 + n for signal n."""
        try:
            code = self.process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not end:\n{self.log.read_text()[-5000:]}") from None
        return code if code >= 0 else 128 - code

    def wait_until_gone(self, timeout_s: float) -> set[int]:
        """Processes that still run when the time is over."""
        deadline = time.monotonic() + timeout_s
        while (left := {pid for pid in self.started if _runs(pid)}) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left

    def listening(self) -> set[str]:
        """Addresses, as /proc/net/tcp and tcp6 write them, on which the launcher and its processes listen."""
        return listening({*self.started, self.process.pid})


def listening(pids: set[int]) -> set[str]:
    """Addresses on which processes listen."""
    sockets = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for handle in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    sockets.add(os.readlink(handle))
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in sockets:
                addresses.add(words[1].split(":")[0])
    return addresses


def _heed_interrupts() -> None:
    """As in a terminal: what a script starts behind itself ignores Ctrl-C, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def _runs(pid: int) -> bool:
    """True for a process that has not ended; one that has, and waits to be reaped, does not run."""
    stat = _read(pid, "stat")
    return bool(stat) and stat.rpartition(b")")[2].split()[0] != b"Z"


@contextlib.contextmanager
def launched(command: Sequence[str], directory: Path, model: Path) -> Iterator[Launched]:
    """Start `command` with the recipe put behind it; on leaving, what it started and still runs is killed.

    Modules in the directory are there for its processes, too.
    """
    directory.mkdir(exist_ok=True)
    tiny.write_chats(directory / "train.jsonl", num_examples=40, seed=0, longest=60)
    raw = {
        "run": {"name": "run", "dir": str(directory), "report": False},
        "model": {"path": str(model)},
        "data": {"train": str(directory / "train.jsonl"), "max_tokens": 128},
        "batch": {"examples": 8},
        "optim": {"lr": 1e-3},
        "train": {"steps": 3000},
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(raw))
    run = Launched([*command, str(directory / "recipe.yaml")], directory / "run", directory / "log.txt", directory)
    try:
        yield run
    finally:
        for pid in {*run.started, run.process.pid, *(pid for pid, _ in descendants(run.process.pid))}:
            if _runs(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        run.process.wait(timeout=30)
