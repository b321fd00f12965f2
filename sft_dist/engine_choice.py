"""Which engine fits into the memory of these GPUs, before anything is loaded. Without torch.

How much each needs is counted in memory.py; here is the one order, and the one rule by which an engine is taken.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sft_dist import package_files
from sft_dist.config import Recipe
from sft_dist.plan.known_models import cached_file, find_config
from sft_dist.plan.memory import need
from sft_dist.plan.memory_parts import Buckets, Training, host_state_bytes, state_bytes
from sft_dist.shape import ModelShape

STATE_SHARE = 0.7
"""The part of a GPU that weights, gradients and optimizer may fill where the shape of the model, and with it the size
of its activations, is not known."""

USABLE_SHARE = 0.93
"""Of the memory that torch reports of a GPU; the rest is for what was counted wrong. A card that is sold with 80 GB
reports 85.5 billion bytes: what may be used of it is about the figure that it is sold by."""


@dataclass(frozen=True)
class EngineChoice:
    """The engine to take instead of `auto`, and why, in one line."""

    engine: str
    reason: str


def engines_for(num_processes: int) -> tuple[str, ...]:
    """From the plainest, which is the fastest, to the last resort; on one process there is nothing to spread."""
    if num_processes == 1:
        return ("single", "zero2_offload", "zero3_offload")
    return ("ddp", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")


def choose_engine(
    recipe: Recipe, *, num_gpus: int, gpu_bytes: float, dtype: str, size: ModelShape | int
) -> EngineChoice | None:
    """What `auto` has to be for the recipe to fit; None where single or ddp, which it is by itself, will do.

    num_gpus: on all hosts together. gpu_bytes: what torch reports of the smallest. dtype: of the weights, fp32 or bf16.
    size: the model's shape, or the number of its parameters where that is all that is known.
    The first that fits; zero3_offload where none does.
    """
    engines = engines_for(num_gpus)
    needs = {engine: _bytes_of(recipe, engine, num_gpus, dtype, size) for engine in engines}
    room = (USABLE_SHARE if isinstance(size, ModelShape) else STATE_SHARE) * gpu_bytes
    engine = next((engine for engine in engines if needs[engine] <= room), engines[-1])
    plain = engines[0]
    if engine == plain:
        return None
    num_params = size.all_params if isinstance(size, ModelShape) else size
    training = training_of(recipe, engine=engine, num_processes=num_gpus, dtype=dtype)
    host = sum(host_state_bytes(num_params, training).values())
    in_host = f", and host memory {_gb(host)} a process" if host else ""
    what = "a step" if isinstance(size, ModelShape) else "the state"
    of_it = f"{_gb(room)} to use" if isinstance(size, ModelShape) else f"{_gb(room)} beside activations"
    there = f"{_gb(needs[engine])}{in_host}"
    return EngineChoice(
        engine,
        f"train.engine=auto becomes {engine}: {what} of {num_params / 1e9:.2f} B parameters under {plain} takes "
        f"{_gb(needs[plain])}, of which a GPU of {_gb(gpu_bytes)} has {of_it}; under {engine} it takes {there}",
    )


def _bytes_of(recipe: Recipe, engine: str, num_processes: int, dtype: str, size: ModelShape | int) -> float:
    training = training_of(recipe, engine=engine, num_processes=num_processes, dtype=dtype)
    if isinstance(size, ModelShape):
        return need(size, training).device_bytes
    return sum(state_bytes(size, training).values())


def training_of(
    recipe: Recipe,
    *,
    engine: str,
    num_processes: int,
    dtype: str,
    device: str = "cuda",
    checkpointing: str | None = None,
    longest_example: int | None = None,
    response_share: float = 1.0,
) -> Training:
    """What of a recipe decides its memory. checkpointing: instead of the recipe's.

    longest_example, response_share: of the data; where it is not known, an example may have data.max_tokens, and all of
    a pack be trained.
    """
    longest = longest_example or recipe.data.max_tokens
    tokens = recipe.pack_tokens if recipe.batch.packing else longest
    if recipe.batch.examples is not None:
        tokens = min(tokens, recipe.batch.examples * longest)
    return Training(
        engine=engine,
        num_processes=num_processes,
        dtype=dtype,
        device=device,
        checkpointing=checkpointing or recipe.model.checkpointing,
        tokens=tokens,
        responses=math.ceil(tokens * response_share),
        num_micros=1 if num_processes == 1 and _is_one_pack(recipe) else 2,
        buckets=Buckets.from_knobs(_knobs(recipe, engine)),
        saves_in_background=recipe.train.save_in_background,
    )


def _is_one_pack(recipe: Recipe) -> bool:
    """True where no step can be longer than a pack, whatever is drawn."""
    batch, longest = recipe.batch, recipe.data.max_tokens
    # The example that reaches batch.tokens may be as long as any.
    most = batch.tokens - 1 + longest if batch.tokens is not None else (batch.examples or 0) * longest
    return batch.packing and most <= recipe.pack_tokens


def _knobs(recipe: Recipe, engine: str) -> Mapping[str, Any]:
    """What the engine's DeepSpeed file says; what is wrong with a user's own is said when the run starts."""
    if not engine.startswith("zero"):
        return {}
    own = recipe.train.deepspeed if recipe.train.engine == engine else None
    try:
        knobs = json.loads((own or package_files.find(f"deepspeed/{engine}.json")).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return knobs if isinstance(knobs, dict) else {}


def find_shape(recipe: Recipe, *, may_fetch: bool) -> ModelShape | None:
    """The shape of the recipe's model; None where its config is not here, or is not that of a plain dense decoder."""
    config = find_config(recipe.model.path, revision=recipe.model.revision, may_fetch=may_fetch)
    return ModelShape.from_config(config) if config is not None else None


def count_parameters(model: str, *, revision: str | None = None) -> int | None:
    """Elements of the weights in a directory, or in the hub's cache; None where their files are not here."""
    config = cached_file(model, "config.json", revision=revision) if not Path(model).is_dir() else None
    directory = Path(model) if Path(model).is_dir() else config.parent if config is not None else None
    if directory is None:
        return None
    try:
        return sum(_elements(path) for path in _weight_files(directory)) or None
    except (OSError, ValueError, KeyError, SafetensorError):  # loading the model will say what is wrong with it
        return None


def _weight_files(directory: Path) -> Sequence[Path]:
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
