"""The process group, and what ranks tell each other besides gradients."""

import datetime
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from sft_dist.errors import BackendError, ConfigError, DeviceError, SftDistError
from sft_dist.world import World, is_one_host, launcher_has_store

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
        if is_one_host() and sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else gloo listens where the host's name points
        dist.init_process_group(
            backend,
            store=_loopback_store(world, timeout),
            rank=world.rank,
            world_size=world.size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    counted = int(sum_over_ranks(torch.ones((), device=device)))
    if counted != world.size:
        raise BackendError(
            f"an all-reduce of 1 gave {counted}, the launcher says WORLD_SIZE={world.size}: the ranks form no group"
        )


def _loopback_store(world: World, timeout: datetime.timedelta) -> "dist.Store | None":  # type: ignore[name-defined]
    """The store of ranks on one host: in rank 0, where it outlives the launcher, and nobody outside can reach it.

    None for several hosts: torch then joins or makes the one that the launcher names. Raises BackendError where the
    port is taken.
    """
    if not is_one_host():
        return None
    key, port = f"sft_dist/port/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", int(os.environ["MASTER_PORT"])
    launchers = None
    if launcher_has_store():
        launchers = dist.TCPStore(os.environ["MASTER_ADDR"], port, timeout=timeout)  # type: ignore[attr-defined]
        port = 0
    listener = None
    if world.is_main:
        listening = _listen_on_loopback(port, backlog=world.size + 16)
        port, listener = listening.getsockname()[1], listening.detach()
        if launchers is not None:
            launchers.set(key, str(port))
    elif launchers is not None:
        port = int(launchers.get(key))
    return dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", port, world.size, is_master=world.is_main, timeout=timeout, master_listen_fd=listener
    )


def _listen_on_loopback(port: int, *, backlog: int) -> socket.socket:
    """For a store that would else open its own socket: on every interface, whatever its address says."""
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(("127.0.0.1", port))
    except OSError as error:
        listening.close()
        raise BackendError(
            f"MASTER_PORT={port} cannot be opened on 127.0.0.1 ({error}); start again with another port"
        ) from error
    listening.listen(backlog)
    return listening


def sum_over_ranks(values: Tensor) -> Tensor:
    """Element-wise sum over all ranks, the same on each."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def on_device(values: Sequence[float], device: torch.device) -> Tensor:
    """`[n]` fp64. The host does not wait for the device: the copy is from pinned memory."""
    tensor = torch.tensor(values, dtype=torch.float64)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


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
            "the ranks do not see the same data, checkpoints and code; run.dir, data.store and data.train must lie on "
            "a file system that all hosts share, and hosts need the same versions of sft_dist and its libraries"
        )


def gather_texts(mine: str, *, world: World) -> list[str]:
    """Every rank's text, by rank, the same list on each."""
    if world.size == 1:
        return [mine]
    texts: list[str] = [""] * world.size
    dist.all_gather_object(texts, mine)
    return texts


def write_flight_record(file: Path) -> None:
    """Write the last NCCL collectives of this rank, as torch's own analyser reads them; nothing without NCCL."""
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
    if dump is not None:
        file.write_bytes(dump())


def leave_process_group() -> None:
    """Without this a process aborts now and then as it ends; where DeepSpeed ran also with it: see `end_process`."""
    if dist.is_initialized():
        dist.destroy_process_group()
