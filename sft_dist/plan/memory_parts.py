"""What each part of a training takes, counted from the shape of the model: the one count of it. Without torch.

The counts follow engine/local.py, engine/zero.py (and DeepSpeed under it), model/loss.py, model/checkpointing.py and
engine/fragments.py. docs/planning.md has them as a table.

T = tokens of the longest pack, R = its response tokens, n = processes; other letters as in shape.py
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sft_dist.shape import ModelShape

BYTES_OF_DTYPE = {"fp32": 4, "bf16": 2}

MASTER_BYTES = 4
"""fp32 master weight, which AdamW updates. In fp32 `single` and `ddp` have none beside the weight."""

MOMENT_BYTES = 8
"""AdamW's two moments, fp32."""

CHECKPOINT_BYTES = MASTER_BYTES + MOMENT_BYTES
"""A parameter in a checkpoint."""

GRADIENT_BYTES = 4
"""Gradients are summed over micro-batches in fp32, whatever the weights are."""

NORM_BYTES = 8 * 16 * 2**20
"""engine/local.py takes the gradient norm in double precision, of so many elements at a time."""

LOCAL_BUCKET_ELEMENTS = 64 * 2**20
"""engine/local.py reduces, and updates from bf16 gradients, in buckets of at least so many elements."""

ZERO1_BF16_BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's ZeRO-1 in bf16 sends so many at a time, whatever its file says."""

HEAD_CHUNK_BYTES = {"cpu": 8 * 2**20, "cuda": 1024 * 2**20}
HEAD_LEAST_ROWS = 128
"""A chunk of logits, as in model/loss.py."""


@dataclass(frozen=True)
class Buckets:
    """Sizes of ZeRO's buffers, in elements, by default DeepSpeed's own."""

    reduce: int = 500_000_000
    prefetch: int = 50_000_000
    live: int = 1_000_000_000
    num_reduce: int = 1
    """Two where a bucket travels while the next one is filled."""

    @classmethod
    def from_knobs(cls, knobs: Mapping[str, Any]) -> "Buckets":
        """From the contents of a DeepSpeed file; defaults for what it does not say, and for none at all."""
        zero = knobs.get("zero_optimization", {})
        return cls(
            reduce=int(zero.get("reduce_bucket_size", cls.reduce)),
            prefetch=int(zero.get("stage3_prefetch_bucket_size", cls.prefetch)),
            live=int(zero.get("stage3_max_live_parameters", cls.live)),
            num_reduce=2 if zero.get("overlap_comm", False) else 1,
        )


@dataclass(frozen=True)
class Training:
    """How a model is trained, as far as memory depends on it.

    tokens, responses: of the largest pack. num_micros: micro-batches of a step on each process. device: cuda or cpu.
    """

    engine: str
    num_processes: int
    dtype: str
    device: str
    checkpointing: str
    tokens: int
    responses: int
    num_micros: int = 2
    buckets: Buckets = field(default_factory=Buckets)
    saves_in_background: bool = True

    @property
    def weight_bytes(self) -> int:
        return BYTES_OF_DTYPE[self.dtype]

    @property
    def is_fp32(self) -> bool:
        return self.dtype == "fp32"


# ---------------------------------------------------------------- weights, gradients, optimizer


def state_bytes(num_params: int, training: Training) -> dict[str, float]:
    """Weights, summed gradients, master weights and moments on the device; what is offloaded is none of it."""
    state = _state(num_params, training)
    if training.engine.endswith("_offload"):
        kept = () if training.engine == "zero3_offload" else ("weights",)
        return {part: size if part in kept else 0 for part, size in state.items()}
    return state


def host_state_bytes(num_params: int, training: Training) -> dict[str, float]:
    """What an offloading engine keeps in host memory, and of the updated weights a copy on their way to the device."""
    if not training.engine.endswith("_offload"):
        return {}
    state = _state(num_params, training)
    share = num_params / training.num_processes
    if training.engine == "zero3_offload":
        # The sum over micro-batches, and what AdamW reads.
        return state | {"gradients": 2 * GRADIENT_BYTES * share}
    # Behind them the sums so far of the parameters that are this process's, in the weights' dtype.
    return state | {"weights": 0, "buffers": 2 * training.weight_bytes * share}


def _state(num_params: int, training: Training) -> dict[str, float]:
    """Of a process, wherever it lies."""
    engine, share = training.engine, num_params / training.num_processes
    is_local = engine in ("single", "ddp")
    # DeepSpeed clones fp32 weights, too; one micro-batch on one process keeps its gradient as it is.
    master = 0 if is_local and training.is_fp32 else MASTER_BYTES
    gradient = training.weight_bytes if engine == "single" and training.num_micros == 1 else GRADIENT_BYTES
    return {
        "weights": training.weight_bytes * (share if engine.startswith("zero3") else num_params),
        "gradients": gradient * (num_params if is_local or engine == "zero1" else share),
        "master": master * (num_params if is_local else share),
        "moments": MOMENT_BYTES * (num_params if is_local else share),
    }


def copy_bytes(num_params: int, training: Training) -> float:
    """Host memory for the copy of a checkpoint that is written behind the training: this process's part of it."""
    share = num_params / training.num_processes
    return CHECKPOINT_BYTES * share if training.saves_in_background else 0


def buffer_bytes(num_params: int, largest: int, training: Training) -> dict[str, float]:
    """What passes through the device in each moment, besides activations. largest: elements of the largest weight."""
    engine, size, buckets = training.engine, training.weight_bytes, training.buckets
    share = num_params / training.num_processes
    if engine in ("single", "ddp"):
        bucket = GRADIENT_BYTES * max(min(num_params, LOCAL_BUCKET_ELEMENTS), largest)
        is_used = engine == "ddp" or (training.num_micros == 1 and not training.is_fp32)
        return {"update": max(NORM_BYTES, bucket * is_used)}
    if engine == "zero1" and not training.is_fp32:
        return {"update": GRADIENT_BYTES * min(num_params, ZERO1_BF16_BUCKET_ELEMENTS)}
    # An allocated page of host memory takes nothing until it is written to.
    bucket = min(num_params, buckets.reduce) if training.device == "cpu" else buckets.reduce
    in_flight = max(min(num_params, buckets.reduce), largest)
    gathered = 0.0
    num_buckets = buckets.num_reduce
    if engine.startswith("zero3"):
        gathered = size * min(num_params, max(buckets.live, largest) + buckets.prefetch)
        num_buckets = 1
    reducing = num_buckets * size * bucket + size * largest * (largest > buckets.reduce)
    reducing += GRADIENT_BYTES * in_flight * (not training.is_fp32)
    held = size * bucket if engine.startswith("zero3") else 0
    is_flattened = engine == "zero3" or (training.is_fp32 and engine in ("zero1", "zero2"))
    return {
        "forward": gathered + held,
        "backward": gathered + reducing,
        "update": held + GRADIENT_BYTES * share * is_flattened,
    }


# ---------------------------------------------------------------- activations and head


def layer_token_bytes(shape: ModelShape, *, dtype: str, device: str, mode: str = "none") -> int:
    """What a decoder layer keeps of a token for the backward, as transformers' modules compute it uncompiled.

    mode none: of both norms the fp32 input, the normalised and the weighted output and the inverse norm; of queries and
    keys the same where they are normed; queries, keys, values, attention's output and its fp32 normaliser; of the MLP
    gate, silu(gate), up and their product. On a CPU attention runs per document, and its outputs are kept once more,
    end to end. selective: the layer's input, attention's output and normaliser. full: the layer's input.
    """
    size = BYTES_OF_DTYPE[dtype]
    output = size * shape.attention_width + 4 * shape.num_heads
    if mode == "full":
        return size * shape.hidden
    if mode == "selective":
        return size * shape.hidden + output
    norms = 2 * (shape.hidden * (4 + 2 * size) + 4)
    heads = (shape.num_heads + shape.num_key_value_heads) * shape.has_qk_norm
    norms += heads * (shape.head_dim * (4 + size) + 4)
    attention = size * (shape.attention_width + 2 * shape.key_value_width) + output
    attention += size * shape.attention_width * (device == "cpu")
    return norms + attention + 4 * size * shape.intermediate


def activation_bytes(shape: ModelShape, training: Training) -> int:
    """All that is kept between the forward and the backward of a pack, beside the head's.

    The last layer works on the R response tokens alone once attention is done: of its MLP, its second norm and the norm
    behind it only those are kept.
    """
    size, tokens, responses = training.weight_bytes, training.tokens, training.responses
    mode = training.checkpointing
    each = layer_token_bytes(shape, dtype=training.dtype, device=training.device, mode=mode)
    last_norm = responses * (shape.hidden * (4 + size) + 4)  # the head keeps none of its input
    if mode != "none":
        return each * tokens * shape.num_layers + last_norm
    on_responses = 4 * size * shape.intermediate + shape.hidden * (4 + 2 * size) + 4
    return each * tokens * shape.num_layers - on_responses * (tokens - responses) + last_norm


def layer_backward_bytes(shape: ModelShape, training: Training) -> int:
    """What the backward of one layer needs beside what is kept: gradients of its MLP, and all of it if checkpointed."""
    size, tokens = training.weight_bytes, training.tokens
    gradients = size * (3 * shape.intermediate + 2 * shape.hidden)
    if training.checkpointing == "none":
        return gradients * training.responses
    return (gradients + layer_token_bytes(shape, dtype=training.dtype, device=training.device)) * tokens


def head_bytes(shape: ModelShape, training: Training) -> int:
    """The response head at its fullest: its weight's gradient in fp32, a chunk of logits, the gradient of its input.

    In bf16 a product is made before it is added to the gradient, and a chunk has a bf16 copy.
    """
    size = training.weight_bytes
    most = max(HEAD_LEAST_ROWS, HEAD_CHUNK_BYTES[training.device] // (4 * shape.vocabulary))
    rows = min(most, training.responses)
    chunk = rows * shape.vocabulary * (4 if training.is_fp32 else 4 + size)
    gradient = shape.head_params * (4 if training.is_fp32 else 4 + 4)
    return chunk + gradient + size * training.responses * shape.hidden
