"""What a step is measured to be: its numbers over all ranks, and the memory of this one."""

import os
import resource
import sys
from pathlib import Path

import numpy as np
import torch
import xxhash

from sft_dist.data.batch import StepBatch
from sft_dist.engine.interface import StepResult
from sft_dist.metrics import StepMetrics
from sft_dist.shape import ModelShape


def step_metrics(
    batch: StepBatch,
    result: StepResult,
    *,
    loss: float,
    withheld: str | None,
    lr: float,
    seconds: float,
    shape: ModelShape | None,
    device: torch.device,
    attempt: int,
) -> StepMetrics:
    """The metrics of a step that took `seconds`. shape: of the model; None where its FLOPs are not known."""
    flops = None
    if shape is not None:
        flops = shape.step_flops(tokens=batch.num_tokens, responses=batch.num_responses, sum_squares=batch.sum_squares)
    return StepMetrics(
        step=batch.step,
        epoch=batch.epoch,
        loss=loss,
        lr=lr,
        grad_norm=result.grad_norm,
        applied=result.applied,
        withheld=withheld,
        examples=batch.num_examples,
        batch=xxhash.xxh3_64_hexdigest(np.ascontiguousarray(batch.example_ids, dtype=np.int64).tobytes()),
        tokens=batch.num_tokens,
        response_tokens=batch.num_responses,
        tokens_per_s=batch.num_tokens / seconds,
        seconds=seconds,
        pack_fill=batch.pack_fill,
        imbalance=batch.imbalance,
        peak_memory_bytes=peak_memory_bytes(device),
        attempt=attempt,
        flops=flops,
        memory_bytes=memory_bytes(device),
    )


def peak_memory_bytes(device: torch.device) -> int:
    """Peak device memory, or the peak resident set of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_bytes(device: torch.device) -> int | None:
    """Device memory in use, or the resident set of this process on a CPU; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None
