"""The process group, and the two things ranks tell each other besides gradients."""

import datetime
import os
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from sft_dist.errors import BackendError, ConfigError, DeviceError, SftDistError
from sft_dist.world import World

T = TypeVar("T")


def choose_device(world: World) -> torch.device:
    """This rank's GPU, or the CPU when there is none. Raises BackendError when there are more ranks than GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if world.local_rank >= torch.cuda.device_count():
        raise DeviceError(
            f"local rank {world.local_rank} has no GPU: this machine shows {torch.cuda.device_count()}; "
            "start at most that many processes, or hide the GPUs (CUDA_VISIBLE_DEVICES=) to run on the CPU"
        )
    device = torch.device("cuda", world.local_rank)
    torch.cuda.set_device(device)
    return device


def join_process_group(world: World, device: torch.device, *, timeout_s: float, needed: bool) -> None:
    """Form the group and prove that all ranks are in it. A no-op when it exists, and for one process unless `needed`.

    Raises BackendError when the all-reduce of 1 is not the world size.
    """
    if dist.is_initialized() or (world.size == 1 and not needed):
        return
    timeout = datetime.timedelta(seconds=timeout_s)
    # DeepSpeed makes subgroups without passing a timeout on; they take this default (30 minutes otherwise).
    dist.distributed_c10d.default_pg_timeout = timeout
    dist.distributed_c10d.default_pg_nccl_timeout = timeout  # type: ignore[attr-defined]
    backend = "nccl" if device.type == "cuda" else "gloo"
    if world.size == 1:
        # Libraries read these even for a world of one; nothing listens, the store is in this process.
        for key, value in {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",
        }.items():
            os.environ.setdefault(key, value)
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    else:
        device_id = device if device.type == "cuda" else None
        dist.init_process_group(backend, timeout=timeout, device_id=device_id)
    counted = int(sum_over_ranks(torch.ones((), device=device)))
    if counted != world.size:
        raise BackendError(
            f"an all-reduce of 1 gave {counted}, the launcher says WORLD_SIZE={world.size}: the ranks form no group"
        )


def sum_over_ranks(values: Tensor) -> Tensor:
    """Element-wise sum over all ranks, the same on each."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on every rank when it is true on one."""
    return bool(sum_over_ranks(torch.tensor(float(flag), device=device)) > 0)


def on_main(action: Callable[[], T], *, world: World, device: torch.device) -> T | None:
    """Run `action` on rank 0 while the others wait; all return (None on the others), or all raise."""
    failure: Exception | None = None
    result = None
    if world.is_main:
        try:
            result = action()
        except Exception as error:  # carried to the other ranks, then raised again
            failure = error
    if any_rank(failure is not None, device):
        raise failure or SftDistError("rank 0 failed; its message says why")
    return result


def require_agreement(what: str, *, world: World, device: torch.device) -> None:
    """Raise ConfigError on every rank when `what` is not the same text on all of them.

    what: data fingerprint, number of steps and checkpoint, which ranks read from disk each for itself.
    """
    mine = xxhash.xxh3_64_intdigest(what.encode()) >> 2  # fits int64, with room for the sum
    mains = int(sum_over_ranks(torch.tensor(mine if world.is_main else 0, device=device)))
    if any_rank(mine != mains, device):
        raise ConfigError(
            "the ranks do not see the same data and checkpoints; run.dir, data.store and data.train must lie on a "
            "file system that all hosts share"
        )


def barrier(device: torch.device) -> None:
    """Return once every rank is here."""
    sum_over_ranks(torch.zeros((), device=device)).item()


def leave_process_group() -> None:
    """Leaving without this aborts now and then."""
    if dist.is_initialized():
        dist.destroy_process_group()
