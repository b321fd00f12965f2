"""Batch jobs of the project's own scripts on the throwaway cluster, and the runs that they train."""

import contextlib
import functools
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.faults.runs import Lab, Run

ROOT = Path(__file__).parents[2]
CLUSTER_SH = Path(__file__).with_name("cluster.sh")
PATIENCE_S = 150.0
"""How long anything may take on a machine that does much else."""

STEPS, SAVE_EVERY = 120, 20
LONG_S = 36.0
"""Seconds of steps that SLURM, which looks at time limits each half minute, cannot miss."""
NODES = ("--nodes=2", "--gpus-per-node=2", "--cpus-per-task=8")
"""Two nodes with two processes each, one for each GPU that SLURM gives; no other job beside them."""


def cluster_dir() -> Path:
    return Path(os.environ["CLUSTER"])


def ask(*command: object, **environ: str) -> str:
    """What a command of SLURM prints. Raises AssertionError with what it says when it fails."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


def wait_until(what: Callable[[], Any], *, or_tell: Callable[[], str], timeout_s: float = PATIENCE_S) -> float:
    """Return the seconds until `what` is true."""
    started = time.monotonic()
    while not what():
        assert time.monotonic() < started + timeout_s, f"waited {timeout_s:g} s in vain:\n{or_tell()}"
        time.sleep(0.1)
    return time.monotonic() - started


@dataclass(frozen=True)
class Job:
    """A job, from outside."""

    number: str
    log: Path

    def shown(self) -> dict[str, str]:
        """What SLURM knows of it, by name."""
        words = ask("scontrol", "show", "job", "--oneliner", self.number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    @property
    def state(self) -> str:
        return self.shown()["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.shown()["Restarts"])

    @property
    def exit_code(self) -> int:
        return int(self.shown()["ExitCode"].split(":")[0])

    def when(self, what: str) -> datetime:
        """what: StartTime or EndTime."""
        return datetime.fromisoformat(self.shown()[what])

    def said(self) -> list[str]:
        """The lines of its log."""
        return self.log.read_text(errors="replace").splitlines() if self.log.exists() else []

    def wait_for(self, state: str, *, timeout_s: float = PATIENCE_S) -> float:
        """Return the seconds until it is in this state. Fails at once when it has ended in another."""
        ends = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"} - {state}

        def arrived() -> bool:
            now = self.state
            assert now not in ends, f"ended as {now}:\n{self.tell()}"
            return now == state

        return wait_until(arrived, or_tell=self.tell, timeout_s=timeout_s)

    def wait_until_queued_again(self) -> float:
        """Return the seconds until it is back in the queue."""
        return wait_until(lambda: (self.state, self.restarts) == ("PENDING", 1), or_tell=self.tell)

    def start_again(self) -> None:
        """Let it start without the minutes for which SLURM holds it, and without the time limit it had."""
        self.wait_until_queued_again()
        # In the second of its end a job cannot start: to SLURM, what came before a moment and after it is the same.
        ask("scontrol", "update", f"JobId={self.number}", "StartTime=now+2", "TimeLimit=10")

    def cancel(self) -> None:
        ask("scancel", self.number)

    def tell(self) -> str:
        return f"job {self.number}: {self.shown()}\n" + "\n".join(self.said()[-60:])


def sbatch(script: str, *words: object, options: tuple[str, ...] = ()) -> Job:
    """`sbatch slurm/<script>` from the project's directory."""
    log = cluster_dir() / "jobs" / "%x-%j.log"
    log.parent.mkdir(exist_ok=True)
    command = ("sbatch", "--parsable", f"--output={log}", *options, f"slurm/{script}", *words)
    number = ask(*command, **environment())
    return Job(number, log.with_name(f"{script.removesuffix('.sbatch')}-{number}.log"))


def environment() -> dict[str, str]:
    """Environment of jobs: nothing of the user's own, nothing that the machine has no room for."""
    return {
        "SFT_DIST_PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(cluster_dir() / "huggingface"),
        "CC": "/bin/false",
        "CXX": "/bin/false",
    }


@contextlib.contextmanager
def reconfigured(key: str, value: object) -> Iterator[None]:
    """The cluster with one setting changed."""
    path = Path(os.environ["SLURM_CONF"])
    settings = path.read_text()
    others = [line for line in settings.splitlines() if not line.startswith(f"{key}=")]
    path.write_text("\n".join([*others, f"{key}={value}"]) + "\n")
    ask("scontrol", "reconfigure")
    try:
        yield
    finally:
        path.write_text(settings)
        ask("scontrol", "reconfigure")


def train(run: Run, *, settings: tuple[str, ...] = (), options: tuple[str, ...] = NODES) -> Job:
    return sbatch("train.sbatch", *settings, run.recipe, options=options)


def wait_for_steps(run: Run, count: int, job: Job, *, attempt: int = 1) -> None:
    """Return when an attempt has logged so many steps."""

    def done() -> bool:
        job_state = job.state
        assert job_state in ("PENDING", "CONFIGURING", "RUNNING"), job.tell()
        return len([line for line in run.step_lines() if line["attempt"] == attempt]) >= count

    wait_until(done, or_tell=job.tell)


@functools.cache
def shared_lab() -> Lab:
    """Model and data of all runs. In memory, as the cluster is: it goes with it."""
    directory = cluster_dir() / "work"
    directory.mkdir()
    return Lab(directory)


def new_run(name: str, *, steps: int = STEPS, **train: Any) -> Run:
    """A run of four ranks under ZeRO-2 that has not begun."""
    run = shared_lab().run(name, "zero2", steps=steps, **{"save_every": SAVE_EVERY} | train)
    run.world = 4
    return run


@functools.cache
def undisturbed() -> Run:
    """The run that nothing happens to, made once."""
    run = new_run("undisturbed")
    train(run).wait_for("COMPLETED")
    assert len(list(run.step_lines())) == STEPS
    return run


@functools.cache
def long_steps() -> int:
    """Steps that take LONG_S on this machine."""
    seconds = [float(line["seconds"]) for line in undisturbed().step_lines()]
    return max(STEPS, math.ceil(LONG_S / statistics.median(seconds)))


@functools.cache
def undisturbed_on_one_node() -> Run:
    """A longer one, by the same file with as many processes on one node, none of which has a GPU."""
    run = new_run("one-node", steps=long_steps())
    job = train(run, settings=("SFT_DIST_PROCESSES=4",), options=("--nodes=1", "--cpus-per-task=8"))
    job.wait_for("COMPLETED")
    assert "1 nodes" in job.said()[0]
    assert len(list(run.step_lines())) == long_steps()
    return run
