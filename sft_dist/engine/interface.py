"""What the training loop needs of an engine, and nothing more."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from sft_dist.data.batch import MicroBatch
from sft_dist.engine.fragments import Fragment
from sft_dist.model.load import PackedModel
from sft_dist.world import World


class MakeOptimizer(Protocol):
    """Builds the optimizer over an engine's master weights."""

    def __call__(self, named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer: ...


@dataclass(frozen=True)
class StepResult:
    """grad_norm: global L2 norm before clipping, NaN if the caller withheld. applied: False when no rank updated."""

    grad_norm: float
    applied: bool


class Engine(Protocol):
    """Sums gradients over micro-batches and ranks, and applies one update a step.

    `loss = engine(micro)` is this rank's share of the global loss; shares are summed, never averaged.
    Every rank makes the same calls in the same order.
    """

    name: str
    world: World
    device: torch.device
    model: PackedModel
    is_replicated: bool
    """True: every rank holds all of the state; else its own part."""

    def __call__(self, micro: MicroBatch) -> Tensor: ...

    def accumulate(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Spans forward and backward of one micro-batch; the last one of a step triggers what reduction is due."""

    def backward(self, loss: Tensor) -> None: ...

    def reduce(self) -> Tensor:
        """Once a step, behind its last backward: sum gradients over ranks. Their global L2 norm, scalar fp64.

        On the device, so that the caller reads it back together with what else it wants to know. NaN from engines that
        sum and clip in one go, and say it in `step`.
        """

    def step(self, *, lr: float, grad_norm: float, withhold: bool = False) -> StepResult:
        """Clip by global norm and update; withheld on all ranks when the norm is not finite or the caller says so.

        grad_norm: what `reduce` returned.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """Whole weights in compute dtype under the causal model's own names, on the host; empty on ranks above 0."""

    def fragments(self) -> list[Fragment]:
        """Master weights and moments that this rank holds: views, to be read, or overwritten before `restored`."""

    def restored(self, num_updates: int) -> None:
        """Take over fragments that were overwritten: they are what `num_updates` updates led to. Collective."""

    def close(self) -> None:
        """Free what the engine holds; the process group stays."""
