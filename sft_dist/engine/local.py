"""Engines `single` and `ddp`: every rank holds the whole model, gradients are summed once a step.

Not torch's DistributedDataParallel: it keeps and reduces gradients in the parameters' dtype, so bf16 gradients
would be accumulated over micro-batches in bf16. Here they are accumulated and reduced in fp32:

    bf16 weights --backward--> bf16 gradient --add--> fp32 sum --all-reduce--> AdamW on fp32 master --> bf16 weights

With fp32 weights, weights and master are one and the same tensor. With one process and one micro-batch there is
nothing to add: the bf16 gradient stays as it is, and becomes fp32 a bucket at a time while AdamW updates it, so that a
parameter takes 16 bytes instead of 18.
"""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sft_dist.data.batch import MicroBatch
from sft_dist.engine.collectives import sum_over_ranks
from sft_dist.engine.fragments import Fragment, adamw_state
from sft_dist.engine.interface import MakeOptimizer, StepResult
from sft_dist.model.load import PackedModel
from sft_dist.world import World

BUCKET_ELEMENTS = 64 * 2**20
"""Gradients are reduced, and bf16 ones updated with, in buckets of about this many fp32 elements (256 MiB)."""

NORM_ELEMENTS = 16 * 2**20
"""torch copies what it takes a double-precision norm of: of an 8B model's whole embedding that would be 5 GB."""


class LocalEngine:
    """Replicated data parallelism; with one process, plain training. Implements `Engine`."""

    is_replicated = True

    def __init__(
        self,
        model: PackedModel,
        *,
        name: str,
        world: World,
        device: torch.device,
        max_grad_norm: float,
        make_optimizer: MakeOptimizer,
    ) -> None:
        self.name, self.world, self.device, self.model = name, world, device, model
        self._max_grad_norm = max_grad_norm
        self._weights = {n: p for n, p in model.causal_lm.named_parameters() if p.requires_grad}
        self._masters = {n: self._master_of(p) for n, p in self._weights.items()}
        self._optimizer = make_optimizer(self._masters.items())
        self._num_micros = 0
        self._is_only_one = False

    def __call__(self, micro: MicroBatch) -> Tensor:
        return self.model(micro)  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def accumulate(self, *, is_last: bool) -> Iterator[None]:
        self._num_micros += 1
        self._is_only_one = is_last and self._num_micros == 1 and self.world.size == 1
        yield  # gradients add up where they are; the one reduction is in `reduce`

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    @torch.no_grad()
    def reduce(self) -> Tensor:
        gradients = [self._gradient_of(name) for name in self._masters]
        if self.world.size > 1:
            _sum_in_buckets(gradients)
        return _global_norm(gradients)

    @torch.no_grad()
    def step(self, *, lr: float, grad_norm: float, withhold: bool = False) -> StepResult:
        applied = math.isfinite(grad_norm) and not withhold
        if applied:
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            for names in self._buckets():
                self._update(names, grad_norm)
            self._round_masters()
        for parameter in (*self._masters.values(), *self._weights.values()):
            parameter.grad = None
        self._num_micros = 0
        return StepResult(math.nan if withhold else grad_norm, applied)

    def _gradient_of(self, name: str) -> Tensor:
        """The sum so far: the master's, or, where nothing was added up, the weight's own."""
        found: Tensor | None = self._masters[name].grad
        if found is None:
            found = self._weights[name].grad
        if found is None:  # unused in this step: a zero, so that buckets are alike on all ranks
            found = self._masters[name].grad = torch.zeros_like(self._masters[name])
        return found

    def _buckets(self) -> Iterator[list[str]]:
        """Names of the parameters that are updated together: all, unless their gradients have to become fp32 first."""
        bucket: list[str] = []
        for name in self._masters:
            bucket.append(name)
            if self._is_only_one and sum(self._masters[n].numel() for n in bucket) >= BUCKET_ELEMENTS:
                yield bucket
                bucket = []
        if bucket:
            yield bucket

    def _update(self, names: list[str], grad_norm: float) -> None:
        gradients = []
        for name in names:
            gradients.append(self._gradient_of(name).float())
            self._weights[name].grad = None
            self._masters[name].grad = gradients[-1]
        scale = self._max_grad_norm / (grad_norm + 1e-6)
        if scale < 1:
            torch._foreach_mul_(gradients, scale)
        self._optimizer.step()  # passes over masters without a gradient, those of other buckets
        for name in names:
            self._masters[name].grad = None

    def state_dict(self) -> dict[str, Tensor]:
        if not self.world.is_main:
            return {}
        return {name: value.detach().cpu() for name, value in self.model.causal_lm.state_dict().items()}

    def fragments(self) -> list[Fragment]:
        found = []
        for name, master in self._masters.items():
            state = self._state_of(master)
            whole = {"master": master.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
            found.append(Fragment(name, 0, {kind: tensor.view(-1) for kind, tensor in whole.items()}))
        return found

    def restored(self, num_updates: int) -> None:
        for master in self._masters.values():
            self._state_of(master)["step"].fill_(num_updates)
        self._round_masters()

    def close(self) -> None:
        self._optimizer.state.clear()

    def _state_of(self, master: nn.Parameter) -> dict[str, Tensor]:
        return adamw_state(self._optimizer, master)

    def _master_of(self, weight: nn.Parameter) -> nn.Parameter:
        if weight.dtype == torch.float32:
            return weight
        master = nn.Parameter(weight.detach().float())

        def add_to_master(of: Tensor) -> None:
            assert of.grad is not None
            if self._is_only_one:
                return
            master.grad = of.grad.float() if master.grad is None else master.grad.add_(of.grad)
            of.grad = None

        weight.register_post_accumulate_grad_hook(add_to_master)
        return master

    @torch.no_grad()
    def _round_masters(self) -> None:
        for name, weight in self._weights.items():
            if weight is not self._masters[name]:
                weight.copy_(self._masters[name])


def _global_norm(grads: list[Tensor]) -> Tensor:
    """L2 norm over all gradients, scalar fp64.

    torch's fp32 norm of one large tensor on a CPU is off by 1e-5 at a million elements and 1e-3 at thirty million.
    """
    parts = [part for grad in grads for part in grad.reshape(-1).split(NORM_ELEMENTS)]
    norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def _sum_in_buckets(grads: list[Tensor]) -> None:
    """All-reduce the gradients in place, in a few large messages."""
    bucket: list[Tensor] = []
    for index, grad in enumerate(grads):
        bucket.append(grad)
        is_last = index == len(grads) - 1
        if is_last or sum(g.numel() for g in bucket) + grads[index + 1].numel() > BUCKET_ELEMENTS:
            flat = sum_over_ranks(torch.cat([g.reshape(-1) for g in bucket]))
            for g, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                g.copy_(part.view_as(g))
            bucket = []
