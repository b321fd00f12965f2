"""What this card can do at a model's own shapes, and the least time that a step can take on it.

Measured are the matrix multiplications of a layer and of the head in all three orientations, attention forward and
backward at the bounds of a real pack, and copies. The floor of a step is their sum and the optimizer's traffic at the
copy's bandwidth. Norms, rotary embeddings and activations are left out: they can be fused into what is counted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpu.clock import seconds_of
from gpu.models import Case
from gpu.packs import Counts, Steps

from sft_dist.data.batch import MicroBatch, build_step
from sft_dist.model.attention import Backend, document_bounds

OPTIMIZER_BYTES = 30
"""AdamW, a parameter: master, moments and fp32 gradient read, master and moments written, bf16 weight written."""

COPY_BYTES = {"cuda": 2**30, "cpu": 2**24}


@dataclass(frozen=True)
class Floor:
    """Seconds of a model's parts on this device, at their best."""

    body_forward: float
    """Matrices of all layers, a token."""
    body_backward: float
    attention_forward: float
    """Attention of all layers, a squared token of document length."""
    attention_backward: float
    head: float
    """All three matmuls, a response token."""
    optimizer: float
    """A step."""

    def step(self, counts: Counts, *, num_steps: int, checkpointing: str) -> float:
        """The least seconds of `num_steps` steps. What is recomputed is one more forward of the layers."""
        body = self.body_forward + self.body_backward
        attention = self.attention_forward + self.attention_backward
        if checkpointing != "none":
            body += self.body_forward
        if checkpointing == "full":
            attention += self.attention_forward
        work = body * counts.tokens + attention * counts.sum_squares + self.head * counts.responses
        return work + self.optimizer * num_steps


def measure_roofline(
    case: Case, steps: Steps, *, backend: Backend, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Rates by shape, and the floor that follows. T and R are those of the first pack."""
    shape = case.shape
    micro = build_step(steps.store, steps.batches[0], rank=0, loss="token_mean", pack_tokens=case.pack_tokens).micros[0]
    tokens, rows = micro.input_ids.shape[1], len(micro.targets)
    matrices: dict[tuple[int, int], tuple[float, float]] = {}
    lines = []

    def matmul(name: str, num_rows: int, inputs: int, outputs: int) -> tuple[float, float]:
        forward, *backward = measure_matmul(num_rows, inputs, outputs, device=device, dtype=dtype)
        flops = 2.0 * num_rows * inputs * outputs
        for orientation, seconds in zip(
            ("forward", "input gradient", "weight gradient"), (forward, *backward), strict=True
        ):
            lines.append(_line(f"{name} {num_rows} x {inputs} x {outputs}, {orientation}", seconds, flops))
        return forward, sum(backward)

    for inputs, outputs in shape.layer_matrices:
        if (inputs, outputs) not in matrices:
            matrices[inputs, outputs] = matmul("layer", tokens, inputs, outputs)
    head = sum(matmul("head", rows, shape.hidden, shape.vocabulary))
    forward, both = measure_attention(case, micro.to(device), backend=backend, device=device, dtype=dtype)
    squares = sum(length**2 for length in micro.document_lengths)
    flops = 2.0 * shape.attention_width * squares
    lines.append(_line(f"attention {backend.name}, {len(micro.document_lengths)} documents, forward", forward, flops))
    lines.append(_line("attention, backward", both - forward, 2 * flops))
    bytes_per_s = measure_copy(device)
    layer = [matrices[pair] for pair in shape.layer_matrices]
    floor = Floor(
        body_forward=shape.num_layers * sum(f for f, _ in layer) / tokens,
        body_backward=shape.num_layers * sum(b for _, b in layer) / tokens,
        attention_forward=shape.num_layers * forward / squares,
        attention_backward=shape.num_layers * (both - forward) / squares,
        head=head / rows,
        optimizer=OPTIMIZER_BYTES * shape.num_params / bytes_per_s,
    )
    return {
        "rates": lines,
        "copy_bytes_per_s": bytes_per_s,
        "best_flops_per_s": max(line["flops_per_s"] for line in lines),
        "floor": vars(floor),
        "tokens": tokens,
        "responses": rows,
    }


def _line(name: str, seconds: float, flops: float) -> dict[str, Any]:
    return {"name": name, "seconds": seconds, "flops_per_s": flops / max(seconds, 1e-12)}


def measure_matmul(
    rows: int, inputs: int, outputs: int, *, device: torch.device, dtype: torch.dtype
) -> tuple[float, float, float]:
    """Seconds of x W^T, of the gradient of x and of the gradient of W, laid out as autograd has them."""
    x = torch.randn(rows, inputs, device=device, dtype=dtype)
    weight = torch.randn(outputs, inputs, device=device, dtype=dtype)
    grad = torch.randn(rows, outputs, device=device, dtype=dtype)
    calls: tuple[Callable[[], object], ...] = (
        lambda: torch.mm(x, weight.T),
        lambda: torch.mm(grad, weight),
        lambda: torch.mm(grad.T, x),
    )
    forward, input_gradient, weight_gradient = (seconds_of(call, device) for call in calls)
    return forward, input_gradient, weight_gradient


def measure_attention(
    case: Case, micro: MicroBatch, *, backend: Backend, device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    """Seconds of one layer's attention on a pack: forward alone, and forward and backward."""
    shape, tokens = case.shape, micro.input_ids.shape[1]
    heads = (shape.num_heads, shape.num_key_value_heads, shape.num_key_value_heads)
    q, k, v = (
        torch.randn(tokens, num, shape.head_dim, device=device, dtype=dtype, requires_grad=True) for num in heads
    )
    bounds = document_bounds(micro)["document_bounds"]
    grad = torch.randn(tokens, shape.num_heads, shape.head_dim, device=device, dtype=dtype)

    def forward() -> torch.Tensor:
        return backend.attend(q, k, v, scale=shape.head_dim**-0.5, window=None, dropout=0.0, **bounds)

    def both() -> None:
        torch.autograd.grad(forward(), (q, k, v), grad)

    return seconds_of(forward, device), seconds_of(both, device)


def measure_copy(device: torch.device) -> float:
    """Bytes read and written a second by a copy on the device."""
    source = torch.zeros(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_of(lambda: target.copy_(source), device)
