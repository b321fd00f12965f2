"""What is written of each step, and how it is read back.

`metrics.jsonl` is the truth about a run: one JSON object a line, written by rank 0. A resumed run appends with
the next `attempt`; readers take the last attempt of a step and ignore a torn last line.
"""

import json
import resource
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sft_dist.data.batch import StepBatch
from sft_dist.engine.interface import StepResult


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step over all ranks."""

    step: int
    epoch: int
    loss: float
    """Nats; the global loss, already weighted."""
    lr: float
    grad_norm: float
    """Global L2 norm before clipping."""
    applied: bool
    """False: the gradient was not finite and the update was withheld on all ranks."""
    examples: int
    tokens: int
    response_tokens: int
    tokens_per_s: float
    seconds: float
    pack_fill: float
    """Tokens over capacity of all packs; there is no padding, so a low fill wastes nothing."""
    imbalance: float
    """Slowest rank's cost summed over micro-steps, over the ideal; 1.0 is perfect."""
    peak_memory_bytes: int
    """Of rank 0: device memory on GPU, resident set on CPU; since the run began."""
    attempt: int


@dataclass(frozen=True)
class HeldOutMetrics:
    """The held-out loss after `step` updates, in nats, under the run's own `loss`."""

    step: int
    held_out_loss: float
    examples: int
    response_tokens: int
    seconds: float
    attempt: int


def step_metrics(
    batch: StepBatch,
    result: StepResult,
    *,
    loss: float,
    lr: float,
    seconds: float,
    device: torch.device,
    attempt: int,
) -> StepMetrics:
    """The metrics of a step that took `seconds`."""
    return StepMetrics(
        step=batch.step,
        epoch=batch.epoch,
        loss=loss,
        lr=lr,
        grad_norm=result.grad_norm,
        applied=result.applied,
        examples=batch.num_examples,
        tokens=batch.num_tokens,
        response_tokens=batch.num_responses,
        tokens_per_s=batch.num_tokens / seconds,
        seconds=seconds,
        pack_fill=batch.pack_fill,
        imbalance=batch.imbalance,
        peak_memory_bytes=peak_memory_bytes(device),
        attempt=attempt,
    )


def peak_memory_bytes(device: torch.device) -> int:
    """Peak device memory, or the peak resident set of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def to_line(metrics: StepMetrics | HeldOutMetrics) -> dict[str, Any]:
    """The JSON object of a line; `event` tells the two kinds apart."""
    event = "step" if isinstance(metrics, StepMetrics) else "held_out"
    return {"event": event} | asdict(metrics)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Lines as they were written; a torn last line is ignored."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def read_steps(path: Path) -> dict[int, dict[str, Any]]:
    """The last attempt of each step, by step."""
    return {line["step"]: line for line in read_lines(path) if line["event"] == "step"}


def read_held_out(path: Path) -> dict[int, dict[str, Any]]:
    """The last attempt of each held-out loss, by step."""
    return {line["step"]: line for line in read_lines(path) if line["event"] == "held_out"}
