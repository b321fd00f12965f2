"""Runs of two real ranks, each a process of its own with no launcher above it, and what they leave behind.

The ranks are forked from a server that has imported everything: of a start of ten seconds, eight are imports.
"""

import atexit
import functools
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import yaml

from sft_dist import commits
from sft_dist.metrics import read_lines
from sft_dist.run_files import CHECKPOINTS, HEARTBEATS, LOGS, METRICS, MODEL, RUN_JSON
from tests import tiny
from tests.faults.rank import train_rank

FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(["tests.faults.rank"])
STEPS, SAVE_EVERY, KEEP = 60, 3, 2
ROWS, EXAMPLES, PACK_TOKENS = 200, 12, 64
PATIENCE_S = 180.0
"""How long a start and a whole run may take on a machine that does much else."""
LAG_S = 60.0
"""How long ranks may outlive another before a test gives up."""

Plan = Mapping[str, Any]


@dataclass(frozen=True)
class Ended:
    """How one start ended, by rank. codes: negative for a signal. lag_s: from the first end to the last."""

    codes: tuple[int, ...]
    said: tuple[str, ...]
    lag_s: float


class Ranks:
    """The processes of one start."""

    def __init__(
        self, processes: Sequence[ForkServerProcess], outputs: Sequence[Path], *, attempts_before: int
    ) -> None:
        self.processes, self._outputs, self.attempts_before = processes, outputs, attempts_before

    def signal(self, number: int, *ranks: int) -> None:
        """Send a signal to these ranks, or to all."""
        for rank in ranks or range(len(self.processes)):
            os.kill(self.processes[rank].pid or 0, number)

    def wait(self, *, timeout_s: float = PATIENCE_S, lag_s: float = LAG_S) -> Ended:
        """Return when all have ended. lag_s: longest time from the first end to the last."""
        ends: dict[int, float] = {}
        deadline = time.monotonic() + timeout_s
        while len(ends) < len(self.processes):
            now = time.monotonic()
            new = {i: now for i, process in enumerate(self.processes) if i not in ends and process.exitcode is not None}
            deadline = min(deadline, now + lag_s) if new and not ends else deadline
            ends |= new
            assert now < deadline, f"of {len(self.processes)} ranks only {sorted(ends)} have ended:\n{self.tails()}"
            time.sleep(0.02)
        codes = tuple(process.exitcode or 0 for process in self.processes)
        said = tuple(output.read_text(errors="replace") for output in self._outputs)
        return Ended(codes, said, max(ends.values()) - min(ends.values()))

    def wait_until(self, what: Callable[[], Any], *, timeout_s: float = PATIENCE_S) -> None:
        """Return when `what` is true; all ranks must live until then."""
        deadline = time.monotonic() + timeout_s
        while not what():
            assert all(process.exitcode is None for process in self.processes), f"a rank has ended:\n{self.tails()}"
            assert time.monotonic() < deadline, f"waited in vain:\n{self.tails()}"
            time.sleep(0.02)

    def end(self) -> None:
        """Kill those that still run."""
        for process in self.processes:
            process.kill()
            process.join(timeout=30)

    def tails(self) -> str:
        """The ends of what the ranks printed."""
        return "\n".join(output.read_text(errors="replace")[-3000:] for output in self._outputs)


@dataclass
class Run:
    """A run, which may take several starts. A context: on leaving, what still runs is killed."""

    directory: Path
    recipe: Path
    engine: str
    world: int = 2
    _starts: list[Ranks] = field(default_factory=list)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        for ranks in self._starts:
            ranks.end()

    def start(self, plans: Mapping[int, Plan] | None = None, *, overrides: Sequence[str] = ()) -> Ranks:
        """Start all ranks of `sft-dist train`; those with a plan meet what it says."""
        processes, outputs = [], []
        environ = os.environ | {
            "WORLD_SIZE": str(self.world),
            "LOCAL_WORLD_SIZE": str(self.world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(tiny.free_port()),
        }
        for rank in range(self.world):
            outputs.append(self.directory.parent / f"{self.directory.name}-{len(self._starts)}-{rank}.txt")
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            words = [str(self.recipe), *overrides]
            arguments = (words, environ | own, (plans or {}).get(rank, {}), outputs[-1])
            processes.append(FORKING.Process(target=train_rank, args=arguments))
            processes[-1].start()
        self._starts.append(Ranks(processes, outputs, attempts_before=self.attempts))
        return self._starts[-1]

    def is_started(self, ranks: Ranks) -> bool:
        """Whether a start, the newest, has got as far as to know where it goes on."""
        return self.attempts > ranks.attempts_before

    def finish(self, reference: "Run") -> str:
        """Start once more without a fault, to the end; in words, from where, and how what is left equals another's."""
        ended = self.start().wait()
        assert ended.codes == (0,) * self.world, "\n".join(ended.said)
        return f"resumed from step {self.resumed_from()}; {self.equals(reference)}"

    def equals(self, reference: "Run") -> str:
        """In words, how this finished run equals another; it fails where it does not."""
        replayed = self.matches(reference)
        assert sorted(self.curve()) == sorted(reference.curve()), "steps are missing"
        weights = [(run.directory / MODEL / "model.safetensors").read_bytes() for run in (self, reference)]
        assert weights[0] == weights[1], "the final weights differ"
        return f"{len(self.curve())} steps, {replayed} of them twice, and the final weights bit for bit"

    def matches(self, reference: "Run") -> int:
        """Every line that was ever logged equals the reference's bit for bit; the number of steps done again."""
        expected, found = reference.curve(), list(self.step_lines())
        for line in found:
            assert _of_curve(line) == expected[line["step"]], f"attempt {line['attempt']} differs"
        return len(found) - len({line["step"] for line in found})

    def step_lines(self) -> Iterator[dict[str, Any]]:
        return (line for line in read_lines(self.directory / METRICS) if line["event"] == "step")

    def curve(self) -> dict[int, dict[str, Any]]:
        """What each step was trained on and what came of it, in its last attempt."""
        return {line["step"]: _of_curve(line) for line in self.step_lines()}

    def last_step(self) -> int:
        """The last step of the newest attempt, or the one that it went on after."""
        steps = [line["step"] for line in self.step_lines() if line["attempt"] == self.attempts]
        return max(steps, default=self.resumed_from())

    @property
    def attempts(self) -> int:
        """Starts that got as far as to know where they go on."""
        return len(self._recorded_starts())

    def resumed_from(self) -> int:
        """The step that the newest attempt went on after."""
        return int(self._recorded_starts()[-1]["after_step"])

    def _recorded_starts(self) -> list[dict[str, Any]]:
        path = self.directory / RUN_JSON
        found: list[dict[str, Any]] = json.loads(path.read_text())["starts"] if path.exists() else []
        return found

    @property
    def checkpoints(self) -> Path:
        return self.directory / CHECKPOINTS

    def good_steps(self) -> list[int]:
        """Steps of committed checkpoints, each verified byte by byte."""
        return [found.step or 0 for found in self._listed() if found.is_good]

    def broken_steps(self) -> list[int]:
        """Steps of checkpoints that have their name but are not whole."""
        return [found.step for found in self._listed() if found.step and not found.is_good]

    def _listed(self) -> Iterator[commits.Listed]:
        return commits.list_checkpoints(self.checkpoints)

    def log(self, rank: int) -> str:
        return (self.directory / LOGS / f"rank-{rank:05d}.log").read_text(errors="replace")

    @property
    def heartbeats(self) -> Path:
        return self.directory / HEARTBEATS


class Lab:
    """Model, data and recipes, and the undisturbed run of each engine."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.model = tiny.write_model(directory / "model")
        tiny.write_chats(directory / "train.jsonl", num_examples=ROWS, seed=0, longest=60)
        self._undisturbed: dict[tuple[str, int], Run] = {}

    def run(self, name: str, engine: str, *, steps: int = STEPS, **train: Any) -> Run:
        """A run that has not begun. train: settings beside the usual ones."""
        settings = {"steps": steps, "save_every": SAVE_EVERY, "keep_checkpoints": KEEP, "timeout_s": PATIENCE_S}
        if engine.startswith("zero"):
            settings["deepspeed"] = str(tiny.write_zero_file(self.directory, engine))
        recipe = {
            "run": {"name": f"{name}-{engine}", "dir": str(self.directory), "report": False},
            "model": {"path": str(self.model)},
            "data": {
                "train": str(self.directory / "train.jsonl"),
                "max_tokens": PACK_TOKENS,
                "store": str(self.directory / "stores"),
            },
            "batch": {"examples": EXAMPLES},
            "optim": {"lr": 1e-3, "warmup_steps": 4},
            "train": settings | {"engine": engine} | train,
        }
        path = self.directory / f"{name}-{engine}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return Run(self.directory / f"{name}-{engine}", path, engine)

    def undisturbed(self, engine: str, *, steps: int = STEPS) -> Run:
        """The run that nothing happens to, made once."""
        if (engine, steps) not in self._undisturbed:
            run = self.run(f"undisturbed-{steps}", engine, steps=steps)
            # As users start it, with all its imports: what is forked must equal it.
            command = ["-m", "sft_dist", "train", str(run.recipe)]
            tiny.run_ranks(command, world_size=run.world, timeout_s=PATIENCE_S)
            lines = list(run.step_lines())
            assert len(lines) == steps
            assert lines[-1]["epoch"] >= 2
            # Two ranks' single packs hold no more: nearly every step accumulates, but for short last ones of an epoch.
            assert sum(line["tokens"] > 2 * PACK_TOKENS for line in lines) >= 0.95 * steps
            self._undisturbed[engine, steps] = run
        return self._undisturbed[engine, steps]


@functools.cache
def shared_lab() -> Lab:
    """The one lab of a test session: an undisturbed run serves all tests."""
    directory = Path(tempfile.mkdtemp(prefix="faults-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return Lab(directory)


def _of_curve(line: Mapping[str, Any]) -> dict[str, Any]:
    return {key: line[key] for key in ("step", "epoch", "loss", "lr", "grad_norm", "applied", "batch", "examples")}
