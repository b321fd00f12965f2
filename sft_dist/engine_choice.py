"""Which engine fits into the memory of these GPUs, before anything is loaded. Without torch.

The sizes are what engine/local.py and engine/zero.py keep, counted, not measured.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

BYTES_OF_DTYPE = {"fp32": 4, "bf16": 2}

MASTER_BYTES = 4
"""fp32 master weight, which AdamW updates. In fp32 `single` and `ddp` have none beside the weight."""

MOMENT_BYTES = 8
"""AdamW's two moments, fp32."""

GRADIENT_BYTES = 4
"""Gradients are summed over micro-batches in fp32, whatever the weights are."""

DDP_BUCKET_BYTES = 4 * 64 * 2**20
"""One flat copy of the gradients that are being reduced."""

ZERO_BUCKET_ELEMENTS = 200_000_000
"""reduce_bucket_size of configs/deepspeed: with overlap_comm two buckets in the weights' dtype, and each once more in
fp32 while it is reduced."""

ZERO3_LIVE_ELEMENTS = 1_000_000_000
"""stage3_max_live_parameters of configs/deepspeed: weights that are gathered at a time, at most."""

STATE_SHARE = 0.7
"""The part of a GPU that weights, gradients and optimizer may fill; activations, logits and CUDA need the rest."""


@dataclass(frozen=True)
class EngineChoice:
    """The engine to take instead of `auto`, and why, in one line."""

    engine: str
    reason: str


def choose_engine(*, num_gpus: int, gpu_bytes: int, num_parameters: int, dtype: str) -> EngineChoice | None:
    """What `auto` has to be for the state to fit; None where single or ddp, which it is by itself, will do.

    num_gpus: on all hosts together. gpu_bytes: memory of the smallest. dtype: of the weights, fp32 or bf16.
    The first of single or ddp, zero2, zero3 (on one GPU there is nothing to spread) and the offloads that fits;
    zero3_offload where none does.
    """
    plain = "single" if num_gpus == 1 else "ddp"
    spread = ("zero2_offload",) if num_gpus == 1 else ("zero2", "zero3")
    sizes = {
        engine: state_bytes(engine, num_gpus=num_gpus, num_parameters=num_parameters, dtype=dtype)
        for engine in (plain, *spread, "zero3_offload")
    }
    room = STATE_SHARE * gpu_bytes
    fitting = [engine for engine, size in sizes.items() if size <= room]
    engine = fitting[0] if fitting else "zero3_offload"
    if engine == plain:
        return None
    host = host_bytes(engine, num_processes=num_gpus, num_parameters=num_parameters, dtype=dtype)
    in_host = f", and host memory {_gb(host)} a process" if host else ""
    return EngineChoice(
        engine,
        f"train.engine=auto becomes {engine}: the state of {num_parameters / 1e9:.2f} B parameters under {plain} takes "
        f"{_gb(sizes[plain])}, of which a GPU of {_gb(gpu_bytes)} has {_gb(room)} beside activations; "
        f"under {engine} it takes {_gb(sizes[engine])}{in_host}",
    )


def state_bytes(engine: str, *, num_gpus: int, num_parameters: int, dtype: str) -> float:
    """Memory on one GPU for weights, gradients, optimizer and buffers of the engine, without activations."""
    weight = BYTES_OF_DTYPE[dtype]
    if engine in ("single", "ddp"):
        master = 0 if dtype == "fp32" else MASTER_BYTES
        bucket = DDP_BUCKET_BYTES if engine == "ddp" else 0
        return num_parameters * (weight + master + MOMENT_BYTES + GRADIENT_BYTES) + bucket
    buckets = min(num_parameters, ZERO_BUCKET_ELEMENTS) * 2 * (weight + (GRADIENT_BYTES if dtype != "fp32" else 0))
    optimizer = 0 if engine.endswith("_offload") else MASTER_BYTES + MOMENT_BYTES + GRADIENT_BYTES
    if engine.startswith("zero2"):
        return num_parameters * (weight + optimizer / num_gpus) + buckets
    live = min(num_parameters, ZERO3_LIVE_ELEMENTS) * weight
    kept = 0 if engine.endswith("_offload") else weight + optimizer
    return num_parameters * kept / num_gpus + live + buckets


def host_bytes(engine: str, *, num_processes: int, num_parameters: int, dtype: str) -> float:
    """Host memory that one process of an offloading engine needs; 0 for the others."""
    if not engine.endswith("_offload"):
        return 0
    weight = BYTES_OF_DTYPE[dtype]  # zero2_offload stages the updated weights there, zero3_offload keeps them there
    return num_parameters * (weight + MASTER_BYTES + MOMENT_BYTES + GRADIENT_BYTES) / num_processes


def count_parameters(model: str, *, revision: str | None = None) -> int | None:
    """Elements of the weights in a directory, or in the hub's cache; None where their files are not here."""
    directory = Path(model) if Path(model).is_dir() else _cached(model, revision)
    if directory is None:
        return None
    try:
        return sum(_elements(path) for path in _weight_files(directory)) or None
    except (OSError, ValueError, KeyError, SafetensorError):  # loading the model will say what is wrong with it
        return None


def _cached(model: str, revision: str | None) -> Path | None:
    """The directory of a hub model that was downloaded before."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(model, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return [directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    single = directory / "model.safetensors"
    return [single] if single.is_file() else []


def _elements(path: Path) -> int:
    """Elements of all tensors of a safetensors file, from its header alone."""
    with safe_open(path, framework="numpy") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
