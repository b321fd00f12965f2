"""One small file per process of a run, rewritten every second: where it stands, and whether it lives."""

import contextlib
import functools
import json
import os
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

BEAT_S = 1.0
"""Seconds between two beats."""

DEAD_AFTER_S = 10.0
"""A process on another host that has not beaten for so long is silent."""

RUNNING, LEFT, FINISHED = "running", "left", "finished"
NOBODY = -1

_LINE_BYTES = 2048  # every line is as long, so that a shorter one leaves no tail of a longer one behind


@dataclass(frozen=True)
class Heartbeat:
    """What one process last said about itself."""

    rank: int
    world_size: int
    host: str
    pid: int
    pid_namespace: str
    """Boot id and pid namespace: only within it does the pid mean this process. Empty where /proc does not say."""
    started: int
    """Clock ticks from boot to the start of the process: tells it from a later one with the same pid."""
    began: float
    """Unix time when it joined the run."""
    beat: int
    step: int
    """The last step begun; 0 before the first."""
    phase: str
    idle_s: float
    """Seconds without progress of the main thread when this was written."""
    forward_s: float
    """Seconds a step in its own forward passes, mean of the newest steps; 0 before there are enough."""
    state: str
    """"running", "left" (with a reason) or "finished"."""
    reason: str
    """Why the run cannot go on; while still running: the loss of a peer that this process has seen."""
    blamed: int
    """The rank that the reason is about: its own when it failed by itself, NOBODY when none can be named."""
    where: str
    """Innermost line of this package in the main thread, once the run hangs; empty before."""
    waits: bool
    """True when the main thread hangs in a collective, waiting for others."""
    time: float
    """Unix time of writing."""

    def is_same_process(self, other: "Heartbeat") -> bool:
        """True when both were written by one process."""
        return (self.pid, self.started, self.pid_namespace) == (other.pid, other.started, other.pid_namespace)


def path_of(directory: Path, rank: int) -> Path:
    """The file of a rank in <run>/heartbeats."""
    return directory / f"rank-{rank:05d}.json"


def first_heartbeat(rank: int, host: str, *, world_size: int = 1) -> Heartbeat:
    """This process before its first beat."""
    pid, now = os.getpid(), time.time()
    status = _stat_of(pid)
    return Heartbeat(
        rank=rank,
        world_size=world_size,
        host=host,
        pid=pid,
        pid_namespace=_pid_namespace(),
        started=status[1] if status else 0,
        began=now,
        beat=0,
        step=0,
        phase="start",
        idle_s=0.0,
        forward_s=0.0,
        state=RUNNING,
        reason="",
        blamed=NOBODY,
        where="",
        waits=False,
        time=now,
    )


def write(directory: Path, heartbeat: Heartbeat) -> None:
    """Overwrite the file of the heartbeat's rank in one write. Raises OSError.

    Opened and closed each time: on NFS a close is what readers on other hosts wait for.
    """
    line = _encoded(heartbeat)
    while len(line) >= _LINE_BYTES:
        longest = max(("reason", "where", "phase", "host"), key=lambda name: len(getattr(heartbeat, name)))
        text = getattr(heartbeat, longest)
        heartbeat = replace(heartbeat, **{longest: text[: len(text) * 3 // 4]})
        line = _encoded(heartbeat)
    handle = os.open(path_of(directory, heartbeat.rank), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        os.write(handle, line.ljust(_LINE_BYTES - 1) + b"\n")
    finally:
        os.close(handle)


def read(directory: Path, rank: int) -> Heartbeat | None:
    """The last heartbeat of a rank. None when there is none, or only a torn or foreign line."""
    try:
        with path_of(directory, rank).open("rb") as file:
            found = json.loads(file.read(_LINE_BYTES).partition(b"\n")[0])
    except (OSError, ValueError):
        return None
    types = {field.name: field.type for field in fields(Heartbeat)}
    if not isinstance(found, dict) or found.keys() != types.keys():
        return None
    if any(type(found[name]) is not kind for name, kind in types.items()):
        return None
    return Heartbeat(**found) if found["rank"] == rank else None


def read_all(directory: Path) -> list[Heartbeat]:
    """All readable heartbeats of a run, by rank. Empty when it never beat."""
    ranks = [path.stem.removeprefix("rank-") for path in directory.glob("rank-*.json")]
    found = [read(directory, int(rank)) for rank in ranks if rank.isdecimal()]
    return sorted((heartbeat for heartbeat in found if heartbeat), key=lambda heartbeat: heartbeat.rank)


def remove(directory: Path, rank: int) -> None:
    """Forget an older run's heartbeat. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        path_of(directory, rank).unlink()


def is_alive(heartbeat: Heartbeat) -> bool | None:
    """Whether the process still runs; None when it runs elsewhere and this host cannot tell.

    A zombie is dead: it computes no more, whoever still has to collect it.
    """
    if not heartbeat.pid_namespace or heartbeat.pid_namespace != _pid_namespace():
        return None
    status = _stat_of(heartbeat.pid)
    return status is not None and status[0] not in "ZX" and status[1] == heartbeat.started


def _encoded(heartbeat: Heartbeat) -> bytes:
    return json.dumps(asdict(heartbeat)).encode()


def _stat_of(pid: int) -> tuple[str, int] | None:
    """(state letter, start in clock ticks) of a process of this namespace; None when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name stands in parentheses and may itself hold spaces and parentheses.
    values = text.rpartition(")")[2].split()
    return values[0], int(values[19])


@functools.cache
def _pid_namespace() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
