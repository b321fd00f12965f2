"""`python -m sft_dist.doctor.all_reduce`, started by a launcher: two sums over the ranks, each checked.

Joining the process group sums 1, as every run does before step 1; then comes a larger tensor. Rank 0 prints JSON.
"""

import json
import time

import torch

from sft_dist.engine.collectives import choose_device, join_process_group, leave_process_group, sum_over_ranks
from sft_dist.errors import BackendError
from sft_dist.world import read_world

NUM_ELEMENTS = 2**20
TIMEOUT_S = 60.0


def main() -> None:
    """Raises BackendError when a sum is wrong."""
    world = read_world()
    device = choose_device(world)
    try:
        join_process_group(world, device, timeout_s=TIMEOUT_S, needed=True)
        mine = torch.full((NUM_ELEMENTS,), float(world.rank + 1), device=device)
        began = time.perf_counter()
        total = sum_over_ranks(mine)
        low, high = float(total.min()), float(total.max())
        seconds = time.perf_counter() - began
        expected = world.size * (world.size + 1) / 2
        if not low == high == expected:
            raise BackendError(
                f"an all-reduce over {world.size} ranks gave {low:g} to {high:g} instead of {expected:g}"
            )
        if world.is_main:
            backend = torch.distributed.get_backend()
            print(json.dumps({"ranks": world.size, "backend": backend, "seconds": seconds}), flush=True)
    finally:
        leave_process_group()


if __name__ == "__main__":
    main()
