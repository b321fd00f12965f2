"""Counts what one step sends and where the host reads from tensors, as one of several ranks.

    python step_traffic.py recipe.yaml name=engine[,settings.json] ...

Prints a JSON object: name/dtype/micro-batches -> {"sent": {phase: {operation: [calls, bytes]}}, "read": {phase: {place:
times}}}. Phases: micro (first forward to last backward), step (what follows). Places are files and functions of
DeepSpeed, or "ours".
"""

import contextlib
import gc
import json
import sys
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sft_dist.config import Recipe, load_recipe
from sft_dist.engine.collectives import choose_device, join_process_group, leave_process_group
from sft_dist.engine.start import start_engine
from sft_dist.model.attention import choose_backend
from sft_dist.model.load import load_model
from sft_dist.optim import build_adamw
from sft_dist.quiet import quiet_libraries
from sft_dist.world import World, end_process, read_world
from tests.unit.test_attention import documents, pack

READS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal"}


class Watched(TorchDispatchMode):
    """Counts collectives with the bytes of their largest side, and reads of values, while a phase is set."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.sent: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(lambda: [0, 0]))
        self.read: dict[str, Counter[str]] = defaultdict(Counter)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split(".")[0]
        if name.startswith("c10d::"):
            sizes = [x.nbytes for x in tree_leaves(args) if isinstance(x, Tensor)]
            count = self.sent[self.phase][name.removeprefix("c10d::").strip("_")]
            count[0] += 1
            count[1] += max(sizes, default=0)
        if name in READS:
            self.note_read()
        return func(*args, **(kwargs or {}))

    def note_read(self) -> None:
        self.read[self.phase][place()] += 1


def place() -> str:
    for frame in reversed(traceback.extract_stack()):
        if "/deepspeed/" in frame.filename:
            return f"{frame.filename.split('/deepspeed/')[-1]} {frame.name}"
    return "ours"


@contextlib.contextmanager
def reads_without_operations(watched: Watched) -> Iterator[None]:
    """What waits for a GPU and is no operation on a CPU: `.cpu()`, `.tolist()`, the accelerator's `synchronize`."""
    from deepspeed.accelerator import get_accelerator

    def noting(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            watched.note_read()
            return original(*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for owner, name in ((Tensor, "cpu"), (Tensor, "tolist"), (type(get_accelerator()), "synchronize")):
            stack.enter_context(mock.patch.object(owner, name, noting(getattr(owner, name))))
        yield


def watch_step(recipe: Recipe, world: World, *, dtype: torch.dtype, num_micros: int) -> dict[str, Any]:
    """The third step: the first makes buffers, and ZeRO-3 records in two what it will gather."""
    device = choose_device(world)
    backend = choose_backend("sdpa", device=device, dtype=dtype)
    engine = start_engine(
        recipe,
        name=recipe.train.engine,
        world=world,
        dtype=dtype,
        device=device,
        load_model=lambda: load_model(
            recipe.model, backend=backend, dtype=dtype, device=device, num_tokens=32, added_token_ids=[]
        ),
        make_optimizer=lambda named: build_adamw(named, optim=recipe.optim),
    )
    micro = pack(documents(20, 33), 0, 1)
    for _ in range(3):
        watched = Watched()
        with watched, reads_without_operations(watched):
            watched.phase = "micro"
            for index in range(num_micros):
                with engine.accumulate(is_last=index == num_micros - 1):
                    engine.backward(engine(replace(micro, is_last=index == num_micros - 1)))
            watched.phase = "step"
            engine.step(lr=1e-3, grad_norm=float(engine.reduce()))
    num_params = engine.model.num_parameters
    engine.close()
    return {"parameters": num_params, "sent": watched.sent, "read": watched.read}


def main() -> None:
    torch.set_num_threads(1)
    quiet_libraries()
    path, *cases = sys.argv[1:]
    world = read_world()
    found = {}
    for case in cases:
        label, _, engine = case.partition("=")
        engine, _, settings = engine.partition(",")
        changes = [f"train.engine={engine}"] + ([f"train.deepspeed={settings}"] if settings else [])
        recipe = load_recipe(path, changes)
        join_process_group(world, choose_device(world), timeout_s=120, needed=True)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            for num_micros in (1, 3):
                found[f"{label}/{name}/{num_micros}"] = watch_step(recipe, world, dtype=dtype, num_micros=num_micros)
                gc.collect()
    if world.is_main:
        print(json.dumps(found))
    leave_process_group()
    end_process(0)


if __name__ == "__main__":
    main()
