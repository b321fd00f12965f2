"""What a training holds in memory at the fullest moment of a step, by part. Without torch.

A step passes through moments that hold different things; what is needed is the largest of them:

    forward     all activations and the response head's own; gradients of earlier micro-batches
    backward    as activations go, gradients come; a checkpointed layer is computed once more
    update      no activations; buffers of reduction, norm and optimizer
    saving      on a CPU: the copy of a checkpoint that is written behind the training
"""

from collections.abc import Mapping
from dataclasses import dataclass

from sft_dist.plan.memory_parts import (
    Training,
    activation_bytes,
    buffer_bytes,
    copy_bytes,
    head_bytes,
    host_state_bytes,
    layer_backward_bytes,
    state_bytes,
)
from sft_dist.shape import ModelShape

PARTS = ("weights", "gradients", "master", "moments", "activations", "logits", "buffers", "fragmentation")

PASSING = ("gradients", "activations", "logits", "buffers")
"""What comes and goes within a step."""

HEAP_GRADIENTS = ("single", "ddp", "zero1", "zero2")
"""Engines that sum gradients weight by weight; the others have one flat tensor."""


@dataclass(frozen=True)
class Need:
    """Bytes by part at the fullest moment of a process: on its device, and in host memory for what is not there.

    moment: which one. On a CPU everything is on the device.
    """

    device: Mapping[str, int]
    host: Mapping[str, int]
    moment: str

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())


def need(shape: ModelShape, training: Training) -> Need:
    """What a process holds at its fullest moment."""
    moments = moments_of(shape, training)
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    device = {part: round(moments[moment].get(part, 0)) for part in PARTS}
    return Need(device, {} if training.device == "cpu" else _host(shape, training), moment)


def moments_of(shape: ModelShape, training: Training) -> dict[str, dict[str, float]]:
    """Bytes by part on the device of a process, for each moment of a step."""
    num_params, is_cpu = shape.all_params, training.device == "cpu"
    kept = state_bytes(num_params, training)
    if is_cpu:
        for part, size in host_state_bytes(num_params, training).items():
            kept[part] = kept.get(part, 0) + size
    gradients, held = kept.pop("gradients"), kept.pop("buffers", 0)
    if training.engine == "zero2_offload":  # on its way, a weight at a time, to host memory and back
        held += training.weight_bytes * shape.head_params * (2 if is_cpu else 1)
    # Before the first backward of a step single and ddp have no gradients; DeepSpeed's buffers stay.
    summed = 0 if training.engine == "single" and training.num_micros == 1 else gradients
    flowing = buffer_bytes(num_params, shape.head_params, training)
    forward = {"activations": activation_bytes(shape, training), "logits": head_bytes(shape, training)}
    backward = {
        "activations": forward["activations"] + layer_backward_bytes(shape, training),
        "logits": shape.head_params * training.weight_bytes,
    }
    found: dict[str, dict[str, float]] = {
        "forward": kept | forward | {"gradients": summed, "buffers": held + flowing.get("forward", 0)},
        "backward": kept | backward | {"gradients": summed, "buffers": held + flowing.get("backward", 0)},
        "update": kept | {"gradients": gradients, "buffers": held + flowing.get("update", 0)},
    }
    if is_cpu and training.saves_in_background:
        left = gradients if training.engine.endswith("_offload") or training.engine == "zero3" else 0
        found["saving"] = kept | {"gradients": left, "buffers": held + copy_bytes(num_params, training)}
    for name, parts in found.items():
        parts["fragmentation"] = _holes(found, name, shape, training, held) if is_cpu else _cached(parts)
    return found


CUDA_BYTES = 1.5e9
"""A CUDA context, its libraries' workspaces and NCCL's buffers. An estimate, not measured."""

CACHE_SHARE = 0.06
"""Of what comes and goes, blocks of torch's allocator that fit nothing else. An estimate, not measured."""

PROCESS_BYTES = 3e9
"""Host memory of a process with torch and CUDA loaded, without any tensor. An estimate, not measured."""

CPU_BYTES = 64e6
"""What libraries take when they first compute, and a training's own Python objects. Measured: docs/planning.md."""

HEAP_GROWTH, ZERO3_HEAP_GROWTH = 1.4, 1.9
"""The heap over the most of it that comes and goes at a time: gradients come where activations were, and leave holes.
Under ZeRO-3 weights come and go between them, too. Measured: docs/planning.md."""


def _cached(parts: Mapping[str, float]) -> float:
    """Of a GPU, what CUDA takes and torch's allocator keeps."""
    return CUDA_BYTES + CACHE_SHARE * sum(parts.get(part, 0) for part in PASSING)


def _holes(
    found: Mapping[str, Mapping[str, float]], name: str, shape: ModelShape, training: Training, held: float
) -> float:
    """Of host memory, what has been freed by a moment and stays with the process (freed_pages.py)."""

    def passing(moment: str) -> float:
        if moment == "saving":
            return 0.0
        parts = found[moment]
        gradients = parts["gradients"] if training.engine in HEAP_GRADIENTS else 0
        return parts.get("activations", 0) + parts.get("logits", 0) + parts["buffers"] - held + gradients

    growth = ZERO3_HEAP_GROWTH if training.engine.startswith("zero3") else HEAP_GROWTH
    return CPU_BYTES + growth * max(map(passing, found)) - passing(name)


def _host(shape: ModelShape, training: Training) -> dict[str, int]:
    """Host memory of a process whose device is a GPU."""
    parts = dict(host_state_bytes(shape.all_params, training))
    parts["buffers"] = parts.get("buffers", 0) + copy_bytes(shape.all_params, training)
    if training.engine == "zero2_offload":
        parts["buffers"] += 2 * training.weight_bytes * shape.head_params
    parts["process"] = PROCESS_BYTES
    return {part: round(size) for part, size in parts.items() if size}
