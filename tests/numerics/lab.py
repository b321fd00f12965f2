"""Runs of the product under every layout, made once per world size for the tests that were selected."""

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from sft_dist.data.schedule import Schedule
from sft_dist.evaluation.answers import read_scored, step_file
from sft_dist.metrics import read_held_out, read_steps
from tests import tiny
from tests.numerics import reference

WORKER = str(Path(__file__).with_name("worker.py"))
STEPS, EXAMPLES, SEED = 20, 32, 3
LR, WARMUP, DECAY, MAX_NORM = 1e-3, 4, 0.1, 1.0
ONE_PACK, MANY_PACKS = 10**6, 1024
TAIL_7, TAIL_1 = 103, 97  # rows: three full steps of 32, then 7 or 1; with 1, all ranks but one run a filler
HELD_OUT_ROWS = 23


@dataclass(frozen=True)
class Case:
    """One run. `checks` are the worker's instruments. `resumed_at`: it goes on from that step of the same run, or of
    one on another engine and world, `resumes`."""

    engine: str
    world: int
    pack_tokens: int | None = MANY_PACKS
    loss: str = "example_mean"
    rows: int = TAIL_7
    checkpointing: str = "none"
    dtype: str = "fp32"
    eval_every: int | None = None
    save_every: int | None = None
    resumed_at: int | None = None
    resumes: tuple[str, int] | None = None
    checks: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        packs = {None: "unpacked", ONE_PACK: "onepack", MANY_PACKS: "packs"}[self.pack_tokens]
        parts = [self.engine, packs, self.loss, f"r{self.rows}", *self.checks]
        parts += [self.checkpointing] * (self.checkpointing != "none") + [self.dtype] * (self.dtype != "fp32")
        parts += [f"eval{self.eval_every}"] * bool(self.eval_every) + [f"save{self.save_every}"] * bool(self.save_every)
        parts += [f"from{self.resumed_at}"] * bool(self.resumed_at)
        return "-".join([*parts, *map(str, self.resumes or ())])

    @property
    def run_name(self) -> str:
        return f"{self.name}-w{self.world}"

    @property
    def single(self) -> "Case":
        """The single-process run that this one must equal."""
        return Case("single", 1, loss=self.loss, rows=self.rows)

    @property
    def uninterrupted(self) -> "Case":
        """The run that a resumed one goes on from; checkpoints at every step or, where saving costs, at even ones."""
        engine, world = self.resumes or (self.engine, self.world)
        often = 1 if engine == "single" else 2
        return replace(self, engine=engine, world=world, resumed_at=None, resumes=None, save_every=often)

    @property
    def evaluated_alone(self) -> "Case":
        return replace(self.single, eval_every=self.eval_every)

    @property
    def unevaluated(self) -> "Case":
        return replace(self, eval_every=None)

    @property
    def needs(self) -> tuple["Case", ...]:
        poisoned = [Case("single", 1, checks=("poisoned",))] * ("poisoned" in self.checks)
        others = [self.single, *poisoned] + [self.uninterrupted] * bool(self.resumed_at)
        return (self, *others, *[self.unevaluated, self.evaluated_alone] * bool(self.eval_every))


@dataclass
class Lab:
    directory: Path
    model_dir: Path
    pairs: dict[int, list[tuple[str, str]]]

    @classmethod
    def open(cls, directory: Path, model_dir: Path, cases: Iterable[Case]) -> "Lab":
        """Write the data, and run every case and what it is compared with."""
        pairs = {n: tiny.write_chats(directory / f"train-{n}.jsonl", num_examples=n, seed=n) for n in (TAIL_7, TAIL_1)}
        tiny.write_chats(directory / "held_out.jsonl", num_examples=HELD_OUT_ROWS, seed=5)
        lab = cls(directory, model_dir, pairs)
        every = sorted({need for case in cases for need in case.needs}, key=lambda case: case.run_name)
        # Uninterrupted runs first: resumed ones copy their checkpoints.
        for phase in (
            [case for case in every if not case.resumed_at],
            [case for case in every if case.resumed_at],
        ):
            # One process leaves a core idle, so it runs beside two; four have the machine to themselves.
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(lambda world, phase=phase: lab.run(world, phase), (1, 2)))
            lab.run(4, phase)
        return lab

    def run(self, world: int, cases: Iterable[Case]) -> None:
        """Run the cases of a world size, in order, in one set of processes."""
        specs = [self.spec(case) for case in cases if case.world == world]
        if specs:
            path = self.directory / f"cases-{world}.json"
            path.write_text(json.dumps(specs))
            tiny.run_ranks([WORKER, str(path)], world_size=world, timeout_s=400)

    def spec(self, case: Case) -> dict[str, Any]:
        resume = {"run": case.uninterrupted.run_name, "step": case.resumed_at} if case.resumed_at else None
        return {"recipe": self.recipe(case), "checks": list(case.checks), "resume": resume}

    def recipe(self, case: Case) -> dict[str, Any]:
        data: dict[str, Any] = {"train": str(self.directory / f"train-{case.rows}.jsonl"), "max_tokens": 1000}
        if case.eval_every:
            data["held_out"] = str(self.directory / "held_out.jsonl")
        train = {"steps": STEPS, "engine": case.engine, "eval_every": case.eval_every, "timeout_s": 120}
        train |= {"save_every": case.save_every, "keep_checkpoints": STEPS}
        if case.engine.startswith("zero"):
            train["deepspeed"] = str(tiny.write_zero_file(self.directory, case.engine))
        answers = {"generate_every": case.eval_every, "generate_examples": 5, "batch_size": 2, "max_new_tokens": 12}
        return {
            "run": {"name": case.run_name, "dir": str(self.directory / "runs"), "seed": SEED, "report": False},
            "model": {"path": str(self.model_dir), "checkpointing": case.checkpointing, "dtype": case.dtype},
            "data": data,
            "batch": {"examples": EXAMPLES, "packing": case.pack_tokens is not None, "pack_tokens": case.pack_tokens},
            "loss": case.loss,
            "optim": {"lr": LR, "warmup_steps": WARMUP, "weight_decay": DECAY, "max_grad_norm": MAX_NORM},
            "train": train,
            "evaluate": answers if case.eval_every else None,
        }

    def steps(self, rows: int) -> list[list[tuple[str, str]]]:
        """The (prompt, answer) pairs of every step. Only the example ids come from the product."""
        lengths = np.array([sum(map(len, reference.tokens_of(*pair))) for pair in self.pairs[rows]])
        schedule = Schedule(lengths, lengths, seed=SEED, examples=EXAMPLES, steps=STEPS)
        return [[self.pairs[rows][i] for i in schedule.example_ids(step)[1]] for step in range(1, STEPS + 1)]

    def run_dir(self, case: Case) -> Path:
        return self.directory / "runs" / case.run_name

    def series(self, case: Case, key: str) -> np.ndarray:
        """A column of metrics.jsonl by step; a resumed run holds the steps after the checkpoint."""
        steps = read_steps(self.run_dir(case) / "metrics.jsonl")
        assert sorted(steps) == list(range(1 + (case.resumed_at or 0), STEPS + 1))
        return np.array([steps[step][key] for step in sorted(steps)])

    def column(self, case: Case, key: str) -> list[object]:
        """A column of metrics.jsonl by step, as it stands there."""
        steps = read_steps(self.run_dir(case) / "metrics.jsonl")
        return [steps[step][key] for step in sorted(steps)]

    def weights(self, case: Case) -> dict[str, torch.Tensor]:
        return safetensors.torch.load_file(self.run_dir(case) / "model" / "model.safetensors")

    def answers(self, case: Case, step: int) -> dict[str, str]:
        """What was answered to each prompt after a step."""
        found = read_scored(step_file(self.run_dir(case), step))
        return {answer.id: answer.answer for answer in found}

    def held_out(self, case: Case) -> dict[int, float]:
        lines = read_held_out(self.run_dir(case) / "metrics.jsonl")
        return {step: line["held_out_loss"] for step, line in lines.items()}
