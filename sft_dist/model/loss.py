"""The response-only head: hidden states at response positions to a weighted sum of negative log-likelihoods.

Logits exist for one chunk of rows at a time. Gradients with respect to hidden states and weight are made
in the forward, chunk by chunk, so the backward only scales them: three matmuls where recomputation needs four.

    R = response tokens of the micro-batch, H = hidden size, V = vocabulary
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

CHUNK_BYTES = {"cpu": 8 * 2**20, "cuda": 1024 * 2**20}
"""Size of one chunk of fp32 logits. A GPU needs a few thousand rows to saturate its matmul units; on a CPU what comes
after the matmul finds small chunks in the cache."""

LEAST_ROWS = 128
"""Of a chunk, whatever its size: each reads the whole weight."""


class ResponseHead(nn.Module):
    """Holds the (possibly tied) `lm_head` weight and returns the weighted loss from its own forward.

    A module of its own so that ZeRO-3 gathers the weight once per micro-batch, and on every rank,
    also when the rank has only a filler.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden: Tensor, targets: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """sum_r weights[r] * -log softmax(hidden[r] @ weight.T)[targets[r]], scalar fp32, in nats.

        hidden: [R,H]; targets: [R] int64; weights: [R] fp32, final. R may be 0: the zero it returns is
        connected to hidden states and weight, so that gradients and collectives exist on every rank.
        Without targets: the logits [R,V] themselves, for the check before step 1.
        """
        if targets is None:
            return hidden @ self.weight.T
        loss: Tensor = _WeightedNLL.apply(hidden, self.weight, targets, weights)
        return loss


class _WeightedNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        # Chunks are summed in fp32 whatever the weight's dtype: a bf16 sum over chunks would lose small terms.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        chunks = _chunks(len(targets), weight.shape[0], hidden.device.type)
        # One buffer for all chunks: on a CPU, pages that the kernel has to hand out anew cost as much as a matmul.
        buffer = torch.empty(_size(chunks), weight.shape[0], dtype=torch.float32, device=hidden.device)
        for rows in chunks:
            loss += _chunk_loss(hidden, weight, targets, weights, rows, buffer, grad_hidden, grad_weight)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors  # type: ignore[attr-defined]
        scale = grad_outputs[0]
        for grad in (grad_hidden, grad_weight):
            if grad is not None:
                grad.mul_(scale)  # in place: a second [V,H] gradient would double the head's memory
        return grad_hidden, grad_weight, None, None


def _chunks(num_rows: int, vocabulary: int, device_type: str) -> list[slice]:
    rows = max(LEAST_ROWS, CHUNK_BYTES.get(device_type, CHUNK_BYTES["cuda"]) // (4 * vocabulary))
    return [slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows)]


def _size(chunks: list[slice]) -> int:
    """Rows of the largest chunk, which is the first."""
    return chunks[0].stop if chunks else 0


def _chunk_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    rows: slice,
    buffer: Tensor,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
) -> Tensor:
    """Loss of some rows; their gradients are written to `grad_hidden[rows]` and added to `grad_weight`."""
    chunk, target, token_weight = hidden[rows], targets[rows, None], weights[rows, None]
    logits = _product(chunk, weight.T, out=buffer[: len(chunk)])  # [r,V]; the only logits alive
    largest, target_logit = logits.amax(-1, keepdim=True), logits.gather(-1, target)
    exps = logits.sub_(largest).exp_()
    normalizer = exps.sum(-1, keepdim=True)
    loss = (token_weight * (normalizer.log() + largest - target_logit)).sum()
    if grad_hidden is None and grad_weight is None:
        return loss
    # d loss / d logits = weight_r * (softmax - onehot), made in place of the logits.
    exps.scatter_add_(-1, target, -normalizer)
    grad_logits = exps if weight.dtype == torch.float32 else torch.empty_like(exps, dtype=weight.dtype)
    torch.mul(exps, token_weight / normalizer, out=grad_logits)
    if grad_hidden is not None:
        torch.mm(grad_logits, weight, out=grad_hidden[rows])
    if grad_weight is not None:
        _add_product(grad_weight, grad_logits.T, chunk)
    return loss


def _product(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    """a @ b into the fp32 tensor `out`, and on a GPU without rounding to the factors' dtype in between."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return out.copy_(a @ b)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to the fp32 tensor `total`."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.device.type == "cuda":
        total += torch.mm(a, b, out_dtype=torch.float32)  # torch 2.11's addmm may refuse to add bf16 products to fp32
    else:
        total += a @ b
