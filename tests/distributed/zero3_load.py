"""Loads a model under an engine as one of several ranks and prints the peak private bytes that took.

python zero3_load.py recipe.yaml
"""

import contextlib
import gc
import sys
import threading
from pathlib import Path

import torch

from sft_dist.config import Recipe, load_recipe
from sft_dist.engine.collectives import choose_device, join_process_group, leave_process_group
from sft_dist.engine.start import start_engine
from sft_dist.engine.zero import _import_deepspeed
from sft_dist.model.attention import choose_backend
from sft_dist.model.load import PackedModel, load_model
from sft_dist.quiet import quiet_libraries
from sft_dist.world import World, end_process, read_world


class LoadedEnough(Exception):
    """Raised after loading: the optimizer's states are not what is measured."""


class PeakPrivateBytes(threading.Thread):
    """Samples RssAnon, the memory that is this process's own; a mapped weight file is the page cache's."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.peak = self.read()
        self.stopping = threading.Event()

    @staticmethod
    def read() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024

    def run(self) -> None:
        while not self.stopping.wait(0.002):
            self.peak = max(self.peak, self.read())

    def above_before(self) -> int:
        self.stopping.set()
        self.join(timeout=10)
        return max(self.peak, self.read()) - self.before


def peak_bytes(recipe: Recipe, world: World) -> int:
    device = choose_device(world)
    backend = choose_backend("sdpa", device=device, dtype=torch.float32)
    meters: list[PeakPrivateBytes] = []

    def load() -> PackedModel:
        meters.append(PeakPrivateBytes())
        meters[0].start()
        return load_model(
            recipe.model, backend=backend, dtype=torch.float32, device=device, num_tokens=32, added_token_ids=[]
        )

    def no_optimizer(*_: object, **__: object) -> torch.optim.Optimizer:
        raise LoadedEnough

    with contextlib.suppress(LoadedEnough):
        join_process_group(world, device, timeout_s=120, needed=True)
        start_engine(
            recipe,
            name=recipe.train.engine,
            world=world,
            dtype=torch.float32,
            device=device,
            load_model=load,
            make_optimizer=no_optimizer,
        )
    return meters[0].above_before()


def main() -> None:
    torch.set_num_threads(1)
    quiet_libraries()
    path, *engines = sys.argv[1:]
    world = read_world()
    _import_deepspeed(choose_device(world))  # its own memory belongs to the baseline
    for engine in engines:
        print(engine, peak_bytes(load_recipe(path, [f"train.engine={engine}"]), world))
        gc.collect()
        torch.distributed.barrier()
    leave_process_group()
    end_process(0)


if __name__ == "__main__":
    main()
