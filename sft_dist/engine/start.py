"""From an engine's name to a running engine."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from sft_dist import package_files
from sft_dist.config import Recipe
from sft_dist.engine.interface import Engine, MakeOptimizer
from sft_dist.engine.local import LocalEngine
from sft_dist.engine.zero import read_zero_knobs, start_zero
from sft_dist.errors import BackendError, ConfigError
from sft_dist.model.load import PackedModel
from sft_dist.world import World


def resolve_engine(name: str, *, world: World) -> str:
    """`auto` becomes single or ddp. Raises ConfigError for `single` in a world of many."""
    if name == "auto":
        return "single" if world.size == 1 else "ddp"
    if name == "single" and world.size > 1:
        raise ConfigError(
            f"train.engine=single was started as {world.size} processes; use ddp or a zero engine, or start one process"
        )
    return name


def zero_knobs(recipe: Recipe, engine: str) -> dict[str, Any]:
    """The ZeRO knobs of an engine: from the recipe's own file, or from configs/deepspeed/<engine>.json.

    Empty for single and ddp. Raises ConfigError for a file that contradicts the recipe, BackendError without DeepSpeed.
    """
    if not engine.startswith("zero"):
        return {}
    if importlib.util.find_spec("deepspeed") is None:
        raise BackendError(
            f"train.engine={engine} needs the package deepspeed, which is not installed (it runs on Linux); "
            "install it or use train.engine: ddp"
        )
    path = recipe.train.deepspeed or package_files.find(f"deepspeed/{engine}.json")
    return read_zero_knobs(path, engine=engine)


def start_engine(
    recipe: Recipe,
    *,
    name: str,
    world: World,
    dtype: torch.dtype,
    device: torch.device,
    load_model: Callable[[], PackedModel],
    make_optimizer: MakeOptimizer,
) -> Engine:
    """Load the model and wrap it. The process group exists by now: ZeRO-3 shards what is read.

    name: an engine other than `auto`.
    """
    knobs = zero_knobs(recipe, name)
    max_grad_norm = recipe.optim.max_grad_norm
    if knobs:
        return start_zero(
            load_model,
            name=name,
            world=world,
            device=device,
            dtype=dtype,
            max_grad_norm=max_grad_norm,
            make_optimizer=make_optimizer,
            knobs=knobs,
        )
    return LocalEngine(
        load_model(),
        name=name,
        world=world,
        device=device,
        max_grad_norm=max_grad_norm,
        make_optimizer=make_optimizer,
    )
