"""Trains two steps as one of several ranks; in the second nothing between its first forward and last backward may wait.

python no_sync_rank.py model_dir engine attention compile checkpointing
"""

import contextlib
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from sft_dist.config import ModelSection, OptimSection
from sft_dist.data.batch import MicroBatch
from sft_dist.engine.collectives import choose_device, join_process_group, leave_process_group
from sft_dist.engine.local import LocalEngine
from sft_dist.model.attention import choose_backend
from sft_dist.model.load import compute_dtype, load_model
from sft_dist.optim import build_adamw
from sft_dist.world import end_process, read_world
from tests.unit.test_attention import documents, pack

ROWS = documents(2, 90, 33, 700)


@contextlib.contextmanager
def no_wait(device: torch.device) -> Iterator[None]:
    """torch raises where the host waits for the device. Without a GPU nothing is watched."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def forward_and_backward(engine: LocalEngine, micros: list[MicroBatch]) -> torch.Tensor:
    shares = []
    for index, micro in enumerate(micros):
        with engine.accumulate(is_last=index == len(micros) - 1):
            share = engine(micro)
            engine.backward(share)
        shares.append(share.detach().double())
    return torch.stack(shares).sum()


def main() -> None:
    path, name, attention, compile_, checkpointing = sys.argv[1:]
    world = read_world()
    device = choose_device(world)
    dtype = compute_dtype("auto", device)
    join_process_group(world, device, timeout_s=120, needed=name == "ddp")
    model = load_model(
        ModelSection(path=str(Path(path)), compile=compile_, checkpointing=checkpointing),
        backend=choose_backend(attention, device=device, dtype=dtype),
        dtype=dtype,
        device=device,
        num_tokens=32,
        added_token_ids=[],
    )
    engine = LocalEngine(
        model,
        name=name,
        world=world,
        device=device,
        max_grad_norm=1.0,
        make_optimizer=functools.partial(build_adamw, optim=OptimSection(lr=1e-3)),
    )
    losses = []
    for ids, watched in ((((0, 1), (2, 3)), False), (((1, 3), (0, 1, 2)), True)):
        micros = [pack(ROWS, *some).to(device) for some in ids]
        # The first step compiles, fills caches and makes the optimizer's states.
        with no_wait(device) if watched else contextlib.nullcontext():
            loss = forward_and_backward(engine, micros)
        assert engine.step(lr=1e-3, grad_norm=float(engine.reduce())).applied
        losses.append(float(loss))
    if world.is_main:
        print(f"losses {losses}, graphs {len(model.compiled.graphs) if model.compiled else 0}")
    leave_process_group()
    end_process(0)


main()
