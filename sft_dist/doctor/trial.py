"""Two real trials: an all-reduce over two processes, and three steps of a tiny model through the real commands."""

import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from sft_dist.doctor.environment import LAUNCHERS
from sft_dist.doctor.finding import Finding, Group
from sft_dist.doctor.probe import Answer, ask, ask_python
from sft_dist.launch import command_for, settings_for
from sft_dist.run_files import METRICS
from sft_dist.world import num_cores

GROUP = Group("trial")
ALL_REDUCE_S = 150.0
INPUTS_S = 120.0
SMOKE_S = 300.0
NUM_PROCESSES = 2
NUM_STEPS = 3

LEFT_OVER = (*LAUNCHERS, "PMI_SIZE", "PMI_RANK")
"""What the environment's group complains of: the trials look for what else is wrong."""


def trial_environment(num_gpus: int, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Of both trials. With fewer than two GPUs two processes compute on the CPU."""
    kept = {name: value for name, value in environ.items() if name not in LEFT_OVER}
    return kept | ({"CUDA_VISIBLE_DEVICES": ""} if num_gpus < NUM_PROCESSES else {})


def try_all_reduce(*, num_gpus: int) -> Finding:
    """The process group of the engines, over the launcher. num_gpus: that torch can use."""
    environ = trial_environment(num_gpus)
    with tempfile.TemporaryDirectory(prefix="sft-dist-doctor-") as directory:
        command = command_for(
            (), num_processes=NUM_PROCESSES, on_gpus=num_gpus >= NUM_PROCESSES, module="sft_dist.doctor.all_reduce"
        )
        settings = settings_for(NUM_PROCESSES, num_cores=num_cores())
        meeting = {"PET_RDZV_ENDPOINT": str(Path(directory, "rendezvous"))}
        answer = ask(command, timeout_s=ALL_REDUCE_S, environ=settings | environ | meeting)
    return all_reduce_finding(answer)


def all_reduce_finding(answer: Answer) -> Finding:
    """From what rank 0 printed."""
    facts = answer.facts
    if answer.failure or facts.get("ranks") != NUM_PROCESSES:
        mend = "look at loopback, shared memory and links above; NCCL_DEBUG=INFO says more"
        return GROUP.problem("all-reduce", f"{NUM_PROCESSES} processes: {answer.failure or 'no answer'}", mend)
    seen = f"{facts['ranks']} processes over {facts['backend']}: the sum is right"
    return GROUP.ok(
        "all-reduce", f"{seen} ({answer.seconds:.0f} s with the start, {1e3 * facts['seconds']:.1f} ms for 4 MiB)"
    )


def try_smoke_run(*, num_gpus: int, engine: str) -> Finding:
    """Data, a tiny model and three steps, through `sft-dist launch`. engine: of the recipe, or auto."""
    environ = trial_environment(0 if num_gpus < 1 else NUM_PROCESSES)  # one GPU: one process on it
    with tempfile.TemporaryDirectory(prefix="sft-dist-doctor-") as name:
        directory = Path(name)
        made = ask_python("doctor.smoke_inputs", name, timeout_s=INPUTS_S, environ=environ)
        if made.failure:
            mend = "torch, transformers or the temporary directory is broken; see above"
            return GROUP.problem("smoke run", f"no tiny model could be made: {made.failure}", mend)
        count = NUM_PROCESSES if num_gpus != 1 else 1
        words = [str(directory / "recipe.yaml"), "--processes", str(count), f"train.engine={_engine(engine, count)}"]
        command = [sys.executable, "-m", "sft_dist", "launch", *words]
        answer = ask(command, timeout_s=SMOKE_S, environ=environ)
        losses = read_losses(directory / "runs" / "smoke" / METRICS)
    return smoke_finding(answer, losses, engine=_engine(engine, count), num_processes=count)


def _engine(engine: str, num_processes: int) -> str:
    return "ddp" if engine == "single" and num_processes > 1 else engine


def read_losses(metrics: Path) -> list[float]:
    """The losses of the steps that were logged; none without a file."""
    try:
        lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return []
    steps = [line for line in lines if line.get("event") == "step"]
    return [math.nan if line["loss"] is None else float(line["loss"]) for line in steps]


def smoke_finding(answer: Answer, losses: list[float], *, engine: str, num_processes: int) -> Finding:
    """losses: of the steps, in order."""
    how = f"{num_processes} process{'es' * (num_processes > 1)}, engine {engine}"
    if answer.failure or len(losses) != NUM_STEPS or not all(map(math.isfinite, losses)):
        why = answer.failure or f"losses {losses}"
        mend = "sft-dist demo runs the same at length and shows all that is said"
        return GROUP.problem("smoke run", f"{how}: {why}", mend)
    shown = ", ".join(f"{loss:.3f}" for loss in losses)
    return GROUP.ok(
        "smoke run", f"{how}: {NUM_STEPS} steps, saved and exported in {answer.seconds:.0f} s; losses {shown}"
    )
