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


def needs_decay(name: str, dimensions: int) -> bool:
    """Weight decay is for matrices; norms and biases are vectors.

    dimensions: of the parameter as the model defines it, since ZeRO-3 leaves an empty local tensor behind.
    """
    return dimensions >= 2 and not name.endswith(".bias")


def build_adamw(
    decayed: Iterable[nn.Parameter], undecayed: Iterable[nn.Parameter], *, optim: OptimSection, fused: bool
) -> torch.optim.AdamW:
    """AdamW over two groups. Its lr is a placeholder: the loop sets `lr_at(step)` before each update."""
    groups = [
        {"params": list(decayed), "weight_decay": optim.weight_decay},
        {"params": list(undecayed), "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=fused
    )
