"""Scenes of damage: a run is staged as if it had been killed, something is spoiled, and the product goes on.

Ranks stay alive between scenes, for their start is what costs. What each scene runs is the product's own command.
"""

import atexit
import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import xxhash
import yaml

from sft_dist import commits
from sft_dist.metrics import read_lines, read_steps
from sft_dist.run_files import CHECKPOINTS, METRICS, MODEL, RUN_JSON
from tests import tiny

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("scene_worker.py")
STEPS, SAVE_EVERY, ROWS, EXAMPLES, PACK_TOKENS = 14, 2, 50, 12, 64
EPOCH = 5
"""Steps of an epoch; its last has two examples."""
PATIENCE_S = 120.0
"""How long one scene may take on a machine that does much else."""

Effects = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Played:
    """How a scene ended. codes: by rank. said: what each rank printed; rank 0 speaks for all."""

    codes: tuple[int | None, ...]
    said: tuple[str, ...]

    @property
    def code(self) -> int | None:
        """The exit code that all ranks had."""
        assert len(set(self.codes)) == 1, f"ranks ended differently, {self.codes}:\n{self}"
        return self.codes[0]

    @property
    def text(self) -> str:
        """What rank 0 said, on one line: tables break lines."""
        return " ".join(self.said[0].split())

    @property
    def errors(self) -> str:
        """What rank 0 said in its error."""
        return "\n".join(line.removeprefix("error: ") for line in self.said[0].splitlines() if line.startswith("error"))

    def __str__(self) -> str:
        return "\n".join(f"--- rank {rank}\n{text[-3000:]}" for rank, text in enumerate(self.said))


class Ranks:
    """The processes of one world, waiting for command lines."""

    def __init__(self, world_size: int, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._numbers = directory, itertools.count()
        shared = os.environ | {
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(tiny.free_port()),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        self._processes = []
        for rank in range(world_size):
            environ = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with (directory / f"output-{rank}.txt").open("wb") as output:
                words = [sys.executable, str(WORKER)]
                process = subprocess.Popen(
                    words, env=environ, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, text=True
                )
            self._processes.append(process)

    def play(self, argv: Sequence[str], effects: Effects) -> Played:
        """Give every rank the command line. Raises AssertionError when a rank dies or takes too long."""
        number = next(self._numbers)
        results = [self._directory / f"{id(self)}-{number}-{rank}.json" for rank in range(len(self._processes))]
        for process, result in zip(self._processes, results, strict=True):
            assert process.stdin is not None
            process.stdin.write(json.dumps({"argv": argv, "effects": effects, "result": str(result)}) + "\n")
            process.stdin.flush()
        deadline = time.monotonic() + PATIENCE_S
        while not all(result.exists() for result in results):
            dead = [rank for rank, process in enumerate(self._processes) if process.poll() is not None]
            if dead or time.monotonic() > deadline:
                said = [json.loads(result.read_text())["said"] for result in results if result.exists()]
                self.end()
                outputs = [path.read_text(errors="replace")[-3000:] for path in self._directory.glob("output-*")]
                raise AssertionError(
                    f"ranks {dead or 'none'} died, waited {PATIENCE_S:g} s:\n" + "\n".join(said + outputs)
                )
            time.sleep(0.01)
        found = [json.loads(result.read_text()) for result in results]
        return Played(tuple(one["code"] for one in found), tuple(one["said"] for one in found))

    @property
    def alive(self) -> bool:
        return all(process.poll() is None for process in self._processes)

    def end(self) -> None:
        for process in self._processes:
            if process.stdin is not None and process.poll() is None:
                process.kill()
            process.wait(timeout=30)


@dataclass
class Run:
    """A run's directory and recipe, and the ranks that play it."""

    stage: "Stage"
    path: Path
    recipe: dict[str, Any]
    world_size: int

    @property
    def engine(self) -> str:
        return str(self.recipe["train"]["engine"])

    @property
    def layout(self) -> str:
        """As the table of faults names it."""
        return f"{self.engine} x {self.world_size}"

    def train(self, *words: str, effects: Effects | None = None) -> Played:
        """`sft-dist train` on all ranks. words: flags and key=value."""
        self.write_recipe()
        return self.play(*words, effects=effects)

    def play(self, *words: str, effects: Effects | None = None) -> Played:
        """The same under the recipe that lies there."""
        return self.stage.ranks(self.world_size).play(["train", str(self._file), *words], effects or {})

    def write_recipe(self) -> None:
        self._file.write_text(yaml.safe_dump(self.recipe))

    @property
    def _file(self) -> Path:
        return self.path.parent / f"{self.path.name}.yaml"

    # ------------------------------------------------------------ what is on disk

    def checkpoint(self, step: int) -> Path:
        return self.path / CHECKPOINTS / commits.name_of(step)

    def committed(self) -> list[int]:
        return [commits.step_of(path) for path in commits.committed(self.path / CHECKPOINTS)]

    def good(self) -> list[int]:
        """Steps of the checkpoints of which every byte is right."""
        return [one.step or 0 for one in commits.list_checkpoints(self.path / CHECKPOINTS) if one.is_good]

    def master(self, step: int) -> dict[str, Any]:
        """Master weights of a checkpoint by rank and piece."""
        files = sorted(self.checkpoint(step).glob("rank-*.safetensors"))
        stored = {(file.name, key): t for file in files for key, t in safetensors.torch.load_file(file).items()}
        return {key: tensor for key, tensor in stored.items() if key[1].startswith("master/")}

    def starts(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads((self.path / RUN_JSON).read_text())["starts"]
        return found

    def segments(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads((self.path / RUN_JSON).read_text())["segments"]
        return found

    def lines(self) -> Iterator[dict[str, Any]]:
        return read_lines(self.path / METRICS)

    def column(self, key: str) -> dict[int, Any]:
        """By step, of the last attempt."""
        return {step: line[key] for step, line in sorted(read_steps(self.path / METRICS).items())}

    def curve(self) -> dict[int, dict[str, Any]]:
        """What each step was trained on and what came of it."""
        return {step: _of_curve(line) for step, line in read_steps(self.path / METRICS).items()}

    def weights(self) -> bytes:
        return (self.path / MODEL / "model.safetensors").read_bytes()

    # ------------------------------------------------------------ what must come of it

    def resumed_after(self) -> int:
        return int(self.starts()[-1]["after_step"])

    def requires_equal(self, other: "Run", *, after: int = 0) -> str:
        """Fails unless this finished run is the other one from a step on; says so in words."""
        found, expected = self.curve(), other.curve()
        assert sorted(found) == sorted(expected)
        for step in range(after + 1, len(expected) + 1):
            assert found[step] == expected[step]
        assert self.weights() == other.weights(), "the final weights differ"
        return "curve and final weights bit for bit"

    def requires_refused(self, played: Played, *said: str) -> str:
        """Fails unless all ranks ended with 2, rank 0 said these words, and nothing was trained or set aside."""
        assert played.code == 2, str(played)
        for words in said:
            assert words in played.errors, f"{words!r} is not in: {played.errors or played}"
        return "refused (exit 2)"


def _of_curve(line: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("step", "epoch", "loss", "lr", "grad_norm", "applied", "withheld", "batch", "examples", "response_tokens")
    return {key: line[key] for key in keys}


class Stage:
    """Ranks, model and data of all scenes, and the undisturbed run of each layout."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.model = tiny.write_model(directory / "model")
        tiny.write_chats(directory / "train.jsonl", num_examples=ROWS, seed=0, longest=60)
        self._ranks: dict[int, Ranks] = {}
        self._undisturbed: dict[str, Run] = {}
        self._numbers = itertools.count(1)

    def ranks(self, world_size: int) -> Ranks:
        """Ranks of a world, started when they are first needed or when a scene has killed them."""
        found = self._ranks.get(world_size)
        if found is None or not found.alive:
            if found is not None:
                found.end()
            self._ranks[world_size] = Ranks(world_size, self.directory / "ranks" / str(world_size))
        return self._ranks[world_size]

    def end(self) -> None:
        for ranks in self._ranks.values():
            ranks.end()

    def run(self, engine: str, *, world_size: int = 2, name: str = "", at: Path | None = None, **train: Any) -> Run:
        """A run that has not begun. at: its run.dir. train: settings beside the usual ones; None removes one."""
        settings = {"steps": STEPS, "save_every": SAVE_EVERY, "keep_checkpoints": STEPS, "timeout_s": 60.0}
        if engine.startswith("zero"):
            settings["deepspeed"] = str(tiny.write_zero_file(self.directory, engine))
        settings |= {"engine": engine} | train
        name = name or f"scene-{next(self._numbers)}"
        directory = at or self.directory / "runs"
        directory.mkdir(exist_ok=True)
        recipe = {
            "run": {"name": name, "dir": str(directory), "seed": 3, "report": False},
            "model": {"path": str(self.model), "dtype": "fp32"},
            "data": {
                "train": str(self.directory / "train.jsonl"),
                "max_tokens": PACK_TOKENS,
                "store": str(self.directory / "stores"),
            },
            "batch": {"examples": EXAMPLES},
            "optim": {"lr": 1e-3, "warmup_steps": 4, "weight_decay": 0.1},
            "train": {key: value for key, value in settings.items() if value is not None},
        }
        return Run(self, directory / name, recipe, world_size)

    def undisturbed(self, engine: str, *, world_size: int = 2, **train: Any) -> Run:
        """The run that nothing happens to, made once; every checkpoint of it is there."""
        key = json.dumps([engine, world_size, train], sort_keys=True)
        if key not in self._undisturbed:
            name = f"undisturbed-{len(self._undisturbed)}"
            run = self.run(engine, world_size=world_size, name=name, **train)
            played = run.train()
            assert played.code == 0, str(played)
            self._undisturbed[key] = run
        return self._undisturbed[key]

    def killed(
        self, engine: str, *, world_size: int = 2, last: int = 8, keep: int = 2, at: Path | None = None, **train: Any
    ) -> Run:
        """The undisturbed run as a kill a step after checkpoint `last` would have left it; `keep` checkpoints."""
        whole = self.undisturbed(engine, world_size=world_size, **train)
        run = self.run(engine, world_size=world_size, at=at, **train)
        run.path.mkdir()
        for path in commits.committed(whole.path / CHECKPOINTS):
            if last - keep * SAVE_EVERY < commits.step_of(path) <= last:
                shutil.copytree(path, run.path / CHECKPOINTS / path.name)
        lines = [line for line in whole.lines() if line["step"] <= last + (line["event"] == "step")]
        (run.path / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
        shutil.copy(whole.path / RUN_JSON, run.path / RUN_JSON)
        return run


@functools.cache
def shared_stage() -> Stage:
    """The one stage of a test session."""
    directory = Path(tempfile.mkdtemp(prefix="scenes-"))
    stage = Stage(directory)
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    atexit.register(stage.end)
    return stage


def reseal(path: Path, *files: str) -> None:
    """Rewrite what vouches for files of a checkpoint, as somebody would who wants them believed. Missing ones go."""
    manifest = json.loads((path / commits.MANIFEST).read_text())
    for name in files:
        manifest["files"].pop(name, None)
        if (path / name).exists():
            manifest["files"] |= commits.flush([path / name], umask=commits.read_umask())
    text = json.dumps(manifest)
    (path / commits.MANIFEST).write_text(text)
    (path / commits.COMMITTED).write_text(xxhash.xxh3_128_hexdigest(text.encode()) + "\n")
