"""Where this process stands: rank, world size, addresses, stop requests and the launcher above it.

The only reader of launcher environment. `accelerate launch`, `torchrun` and `srun` wrappers all set
RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; without them this is a single process.
"""

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NoReturn

from sft_dist.errors import ConfigError

EXIT_CODES = "SFT_DIST_EXIT_CODES"
"""Environment: a directory in which each rank leaves its exit code for `sft-dist launch`."""

AT_WORK = "at-work"
"""Beside that directory: there once the run holds the lock of its own directory."""

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class World:
    """The processes of one run as seen from one of them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        return self.local_rank == 0


def read_world(environ: Mapping[str, str] = os.environ) -> World:
    """The world that the launcher describes. Raises ConfigError when it describes half of one."""
    if "RANK" not in environ and "WORLD_SIZE" not in environ:
        return World()
    values = {}
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        fallback = {"LOCAL_RANK": environ.get("RANK"), "LOCAL_WORLD_SIZE": environ.get("WORLD_SIZE")}.get(key)
        text = environ.get(key, fallback)
        if text is None or not text.isdigit():
            raise ConfigError(
                f"environment {key}={text!r}: a launcher sets RANK and WORLD_SIZE to whole numbers; "
                "unset both for one process"
            )
        values[key] = int(text)
    world = World(values["RANK"], values["WORLD_SIZE"], values["LOCAL_RANK"], values["LOCAL_WORLD_SIZE"])
    if not 0 <= world.rank < world.size:
        raise ConfigError(f"environment RANK={world.rank} is outside WORLD_SIZE={world.size}")
    if world.size > 1:
        for key in ("MASTER_ADDR", "MASTER_PORT"):
            if key not in environ:
                raise ConfigError(
                    f"environment {key} is missing with WORLD_SIZE={world.size}; "
                    "start through accelerate launch or torchrun"
                )
    return world


def is_one_host(environ: Mapping[str, str] = os.environ) -> bool:
    """True where the launcher says that all ranks are on this host; `read_world` assumes it where nothing is said."""
    return "WORLD_SIZE" in environ and environ.get("LOCAL_WORLD_SIZE") == environ["WORLD_SIZE"]


def launcher_has_store(environ: Mapping[str, str] = os.environ) -> bool:
    """True where the launcher itself serves the ranks at MASTER_ADDR, MASTER_PORT; else rank 0 is to."""
    return environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def launcher_name(environ: Mapping[str, str] = os.environ) -> str:
    """What started this process, as far as the environment tells, for people to read."""
    by_slurm = f"SLURM job {environ['SLURM_JOB_ID']}" if environ.get("SLURM_JOB_ID") else ""
    if EXIT_CODES in environ:
        started_by = "sft-dist launch"
    elif "TORCHELASTIC_RUN_ID" in environ:
        started_by = "torchrun or accelerate"
    else:
        started_by = "" if "RANK" not in environ else "RANK and WORLD_SIZE in the environment"
    return ", ".join(filter(None, (by_slurm, started_by))) or "none, one process"


def check_launcher_agrees(engine: str, *, dtype: str, environ: Mapping[str, str] = os.environ) -> None:
    """Refuse an accelerate config that asks for something else than the recipe.

    engine: the recipe's engine after `auto` was resolved. dtype: its model.dtype.
    Raises ConfigError naming both keys.
    """
    precision = environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", dtype) and not (precision == "bf16" and dtype == "auto"):
        raise ConfigError(
            f"accelerate's mixed_precision={precision} contradicts the recipe's model.dtype={dtype}; "
            "set mixed_precision: 'no': the recipe chooses the dtype"
        )
    if environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ConfigError(
            f"accelerate's distributed_type=FSDP contradicts the recipe's train.engine={engine}; "
            "use a plain accelerate config: the recipe chooses the engine"
        )
    if environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return
    stage = environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    if stage is not None and f"zero{stage}" != engine.split("_")[0]:
        raise ConfigError(
            f"accelerate's deepspeed_config.zero_stage={stage} contradicts the recipe's train.engine={engine}; "
            "change one, or use a plain accelerate config: the recipe chooses the engine"
        )


@dataclass
class StopRequest:
    """Remembers that a signal asked for a stop; the loop looks at it once a step."""

    signals: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    received: str | None = None
    _previous: dict[signal.Signals, object] = field(default_factory=dict)

    def __enter__(self) -> "StopRequest":
        for number in self.signals:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name


def stop_when_orphaned(environ: Mapping[str, str] = os.environ) -> bool:
    """Have the kernel send SIGTERM to this process when the launcher above it dies; True where that was arranged.

    A launcher that is killed takes nothing with it: its ranks would train on, unseen, with nobody to stop them.
    Only for a parent that is torchrun or accelerate: a run started from a shell outlives it, as under nohup.
    """
    parent = os.getppid()
    # accelerate starts a single process without RANK and its fellows, and people export ACCELERATE_* in their shells:
    # only the parent's own command line tells.
    if "TORCHELASTIC_RUN_ID" not in environ and not _is_accelerate(parent):
        return False
    return follow_parent(parent, signal.SIGTERM)


def follow_parent(parent: int, number: signal.Signals) -> bool:
    """Get this signal when the parent ends, also when it has ended by now. False where the kernel cannot.

    The kernel watches the thread that started this process: that must be one that lasts.
    """
    arranged = prctl(PR_SET_PDEATHSIG, number)
    if arranged and os.getppid() != parent:
        os.kill(os.getpid(), number)
    return arranged


def prctl(option: int, value: int) -> bool:
    """Set an attribute of this process, by its number in <linux/prctl.h>. False where there is no such thing."""
    return sys.platform == "linux" and bool(ctypes.CDLL(None).prctl(option, value, 0, 0, 0) == 0)


def _is_accelerate(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # no /proc, or the parent has gone
        return False
    return any(Path(word).name == "accelerate" or word.startswith("accelerate.commands") for word in words[:4])


def report_at_work(environ: Mapping[str, str] = os.environ) -> None:
    """Tell `sft-dist launch` that the run's directory is this run's: a stop file made there from now on stops it."""
    directory = environ.get(EXIT_CODES)
    if directory:
        with contextlib.suppress(OSError):  # the launcher has gone, and its directory with it
            Path(directory).with_name(AT_WORK).touch()


def report_exit(code: int, environ: Mapping[str, str] = os.environ) -> None:
    """Leave this rank's exit code for `sft-dist launch`; torchrun and accelerate say 1 for every failure."""
    directory = environ.get(EXIT_CODES)
    if directory:
        with contextlib.suppress(OSError):  # the launcher has gone, and its directory with it
            Path(directory, environ.get("RANK", "0")).write_text(str(code), encoding="ascii")


def waited_in_vain_for_rank_0(environ: Mapping[str, str] = os.environ, *, patience_s: float = 20.0) -> bool:
    """Wait for torchrun or accelerate to end this process since rank 0 has ended. True when it did not.

    They end all ranks of a host as soon as one has ended, rank 0 also before it said why. False, at once, where rank 0
    is not such a neighbour.
    """
    if "TORCHELASTIC_RUN_ID" not in environ:
        return False
    world = read_world(environ)
    if world.is_main or world.rank != world.local_rank:
        return False
    time.sleep(patience_s)
    return True


def end_process(code: int) -> NoReturn:
    """What `sys.exit` does, all but taking the interpreter apart.

    A thread of gloo that lets go of a tensor meanwhile aborts the process (pytorch issue 190489). Leaving the group
    ends these threads only when nobody else holds it, and DeepSpeed does.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads any more, or it is closed
            stream.flush()
    os._exit(code)
