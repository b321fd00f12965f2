"""Parameter groups, and the learning rate as a function of the step."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from sft_dist.config import OptimSection


def lr_at(step: int, *, optim: OptimSection, num_steps: int) -> float:
    """Learning rate of a 1-based step.

    Linear warm-up from 0 reaches the peak at step `warmup_steps + 1`; cosine and linear then fall towards
    `min_lr`, which the step after the last would have: no update is wasted on a rate of 0.
    """
    if step <= optim.warmup_steps:
        return optim.lr * step / (optim.warmup_steps + 1)
    if optim.schedule == "constant":
        return optim.lr
    progress = (step - optim.warmup_steps - 1) / (num_steps - optim.warmup_steps)
    remaining = (1 + math.cos(math.pi * progress)) / 2 if optim.schedule == "cosine" else 1 - progress
    return optim.min_lr + (optim.lr - optim.min_lr) * remaining


def needs_decay(name: str, num_dimensions: int) -> bool:
    """Weight decay is for matrices; norms and biases are vectors."""
    return num_dimensions >= 2 and not name.endswith(".bias")


def build_adamw(named: Iterable[tuple[str, nn.Parameter]], *, optim: OptimSection) -> torch.optim.AdamW:
    """AdamW, in one pass over the states, over what decays and what does not. The engine sets each step's lr."""
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in named:
        # ZeRO-3 leaves an empty local tensor behind and keeps the real shape in ds_shape.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        (decayed if needs_decay(name, len(shape)) else undecayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True
    )
