"""Engines `zero1`, `zero2`, `zero3` and their offloads: DeepSpeed, called directly.

Not through Accelerate: its wrapper steps inside `backward`, divides the loss by its own accumulation count, and
on a CPU does not form the process group. Here the loss is multiplied by the world size, because DeepSpeed averages
over ranks, and nothing else scales it: shares are summed.
"""

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sft_dist.data.batch import MicroBatch
from sft_dist.engine.fragments import Fragment, adamw_state
from sft_dist.engine.interface import MakeOptimizer, StepResult
from sft_dist.errors import BackendError, ConfigError
from sft_dist.model.load import PackedModel, whole
from sft_dist.world import World

RECIPE_KEYS = {
    "train_batch_size": "batch.examples",
    "train_micro_batch_size_per_gpu": "batch.pack_tokens",
    "gradient_accumulation_steps": "batch.pack_tokens",
    "gradient_clipping": "optim.max_grad_norm",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
}

FILE_KEYS = {"zero_optimization", "aio", "comms_logger", "flops_profiler", "memory_breakdown", "wall_clock_breakdown"}


def read_zero_knobs(path: Path, *, engine: str) -> dict[str, Any]:
    """A DeepSpeed file of ZeRO knobs. Raises ConfigError when it says what the recipe says, naming both keys."""
    try:
        knobs: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as a DeepSpeed file: {error}") from None
    zero = knobs.get("zero_optimization") if isinstance(knobs, dict) else None
    if not isinstance(zero, dict):
        raise ConfigError(f"{path}: not a DeepSpeed file: it needs an object with the key 'zero_optimization'")
    for key in knobs:
        if key in RECIPE_KEYS:
            raise ConfigError(
                f"{path}: {key!r} belongs to the recipe, as {RECIPE_KEYS[key]}; "
                "remove it: this file holds ZeRO knobs only"
            )
        if key not in FILE_KEYS:
            raise ConfigError(f"{path}: {key!r} is not a ZeRO knob; this file may hold {', '.join(sorted(FILE_KEYS))}")
    stage = zero.get("stage")
    if f"zero{stage}" != engine.split("_")[0]:
        raise ConfigError(
            f"{path}: zero_optimization.stage={stage} contradicts train.engine={engine}; change one of them"
        )
    offloads = "offload_optimizer" in zero
    if offloads != engine.endswith("_offload"):
        raise ConfigError(
            f"{path}: zero_optimization {'has' if offloads else 'lacks'} offload_optimizer, "
            f"which contradicts train.engine={engine}; change one of them"
        )
    return knobs


def start_zero(
    load_model: Callable[[], PackedModel],
    *,
    name: str,
    world: World,
    device: torch.device,
    dtype: torch.dtype,
    max_grad_norm: float,
    make_optimizer: MakeOptimizer,
    knobs: dict[str, Any],
) -> "ZeroEngine":
    """Load the model, sharded while it is read under ZeRO-3, and hand it to DeepSpeed."""
    deepspeed = _import_deepspeed(device)
    # Until it has been told of the group, DeepSpeed believes in a world of one and trains each rank by itself.
    deepspeed.comm.init_distributed(torch.distributed.get_backend(), dist_init_required=False)
    if deepspeed.comm.get_world_size() != world.size:
        raise BackendError(
            f"DeepSpeed sees {deepspeed.comm.get_world_size()} processes, the launcher says {world.size}"
        )
    config = _full_config(knobs, world=world, dtype=dtype, max_grad_norm=max_grad_norm)
    # transformers reads this object while it lives: from_pretrained then partitions each weight as it is read.
    partitioning = _hf_deepspeed_config(config) if config["zero_optimization"]["stage"] == 3 else None
    model = load_model()
    del partitioning
    named = [(n, p) for n, p in model.causal_lm.named_parameters() if p.requires_grad]
    optimizer = make_optimizer(named)
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    # DeepSpeed casts buffers along with bf16 weights; rotary frequencies in bf16 would bend far positions.
    for n, buffer in model.named_buffers():
        buffer.data = buffers[n].to(buffer.device)
    return ZeroEngine(engine, model, name=name, world=world, device=device)


class ZeroEngine:
    """A DeepSpeed engine that sums. Implements `Engine`."""

    is_replicated = False

    def __init__(self, engine: Any, model: PackedModel, *, name: str, world: World, device: torch.device) -> None:
        self.name, self.world, self.device, self.model = name, world, device, model
        self.deepspeed = engine
        self._stage = int(engine.zero_optimization_stage())
        self._names = {p: n for n, p in model.causal_lm.named_parameters() if p.requires_grad}
        self._judge: Any = sys.modules[type(engine.optimizer).__module__]
        if not hasattr(self._judge, "is_invalid_grad_norm"):
            raise BackendError(
                f"this DeepSpeed's {type(engine.optimizer).__name__} cannot be told to withhold an update; "
                "install a version between 0.19 and 0.20"
            )

    def __call__(self, micro: MicroBatch) -> Tensor:
        return self.deepspeed(micro)  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def accumulate(self, *, is_last: bool) -> Iterator[None]:
        self.deepspeed.set_gradient_accumulation_boundary(is_last)
        yield

    def backward(self, loss: Tensor) -> None:
        self.deepspeed.backward(loss * self.world.size, scale_wrt_gas=False)

    def reduce(self) -> Tensor:
        return torch.full((), math.nan, dtype=torch.float64, device=self.device)  # DeepSpeed's `step` has it

    def step(self, *, lr: float, grad_norm: float, withhold: bool = False) -> StepResult:
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        with self._withholding() if withhold else contextlib.nullcontext():
            self.deepspeed.step()
        applied = self.deepspeed.was_step_applied()
        if withhold and applied:
            raise BackendError(f"{self.name}: DeepSpeed made an update that was to be withheld; the run cannot go on")
        if not applied:
            self._forget_gradients()
        return StepResult(math.nan if withhold else float(self.deepspeed.get_global_grad_norm()), applied)

    @contextlib.contextmanager
    def _withholding(self) -> Iterator[None]:
        """Make DeepSpeed withhold the update and clean up, as it does by itself for a gradient that is not finite.

        Not by spoiling a gradient: with offload the norm was taken before, and the spoilt update would be made.
        """
        judge = self._judge.is_invalid_grad_norm
        self._judge.is_invalid_grad_norm = lambda _norm: True
        try:
            yield
        finally:
            self._judge.is_invalid_grad_norm = judge

    def _forget_gradients(self) -> None:
        """Drop a withheld step's sums: with offload DeepSpeed keeps them, and would withhold every later step too."""
        optimizer = self.deepspeed.optimizer
        for sums in (getattr(optimizer, "averaged_gradients", {}), getattr(optimizer, "all_grad_tensors", {})):
            for key in sums:
                sums[key] = None

    def state_dict(self) -> dict[str, Tensor]:
        causal_lm = self.model.causal_lm
        values: dict[int, Tensor] = {}
        for parameter in causal_lm.parameters():
            # One parameter at a time: no rank ever holds the whole model on its device.
            with whole(parameter):
                if self.world.is_main:
                    values[id(parameter)] = parameter.detach().cpu().clone()
        if not self.world.is_main:
            return {}
        names = causal_lm.named_parameters(remove_duplicate=False)
        persistent = {n: b.detach().cpu() for n, b in causal_lm.named_buffers() if n in causal_lm.state_dict()}
        return {name: values[id(parameter)] for name, parameter in names} | persistent

    def fragments(self) -> list[Fragment]:
        found = []
        for flat, parts in self._partitions():
            state = adamw_state(self.deepspeed.optimizer.optimizer, flat)
            kinds = {"master": flat.data, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
            for name, start, offset, numel in parts:
                tensors = {kind: tensor.narrow(0, offset, numel) for kind, tensor in kinds.items()}
                found.append(Fragment(name, start, tensors))
        return found

    @torch.no_grad()
    def restored(self, num_updates: int) -> None:
        optimizer = self.deepspeed.optimizer
        for flat, _ in self._partitions():
            adamw_state(optimizer.optimizer, flat)["step"].fill_(num_updates)
        if self._stage < 3:
            optimizer.update_lp_params()
            return
        # Small weights are kept whole on every rank: give them up, then gather the new ones.
        optimizer.checkpoint_event_prologue()
        for master, weights in zip(
            optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat, strict=True
        ):
            weights.data.copy_(master.data)
        optimizer.checkpoint_event_epilogue()

    def _partitions(self) -> Iterator[tuple[Tensor, list[tuple[str, int, int, int]]]]:
        """This rank's flat fp32 tensors, each with the parameters in it: (name, start, offset, elements).

        start: first element within the flattened parameter; offset: where it lies in the flat tensor.
        """
        optimizer = self.deepspeed.optimizer
        if self._stage == 3:
            for flat, group in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
                parts, offset = [], 0
                for parameter in group:
                    size = parameter.partition_numel()  # the last ranks' parts end in padding
                    start = self.world.rank * size
                    numel = min(size, parameter.ds_numel - start)
                    if numel > 0:
                        parts.append((self._names[parameter], start, offset, numel))
                    offset += size
                yield flat, parts
            return
        is_bf16 = hasattr(optimizer, "bf16_groups")  # DeepSpeed has a class of its own for ZeRO-1 in bf16
        groups = optimizer.bf16_groups if is_bf16 else optimizer.bit16_groups
        flats = optimizer.fp32_groups_flat_partition if is_bf16 else optimizer.single_partition_of_fp32_groups
        for flat, group in zip(flats, groups, strict=True):
            mapped = [(self._names[p], p._hp_mapping) for p in group if p._hp_mapping is not None]
            yield (
                flat,
                [
                    (name, at.lp_fragment_address.start, at.hp_fragment_address.start, at.hp_fragment_address.numel)
                    for name, at in mapped
                ],
            )

    def close(self) -> None:
        self.deepspeed.destroy()


def _full_config(knobs: dict[str, Any], *, world: World, dtype: torch.dtype, max_grad_norm: float) -> dict[str, Any]:
    """The knobs, completed by the recipe. Accumulation stays 1: the loop says which micro-batch is last."""
    config = knobs | {
        "train_batch_size": world.size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        # torch's AdamW updates offloaded states too; DeepSpeed's own needs a compiler.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": sys.maxsize,
        # It would wait for the device before each forward.
        "timers": {"throughput": {"enabled": False}},
    }
    if dtype == torch.bfloat16:
        config |= {
            "bf16": {"enabled": True, "check_grad_overflow": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
        }
    return config


def _hf_deepspeed_config(config: dict[str, Any]) -> object:
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(config)


def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, quiet, and on a CPU without the compiler that its shared-memory collectives ask for."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if device.type == "cpu":
        # Every start would compile it (a minute, or a failure without ninja), for inference only.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    return deepspeed
