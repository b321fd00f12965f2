"""What a checkpoint costs: how long training stands still, and how much host memory saving and reshaping add.

A random Qwen2 of 200 million parameters is trained by two processes. Its state, fp32 master weights and two moments, is
12 bytes a parameter. Each engine saves once while training waits for the disk, and once behind the training; then other
engines and numbers of processes are restored from what it wrote. Memory is anonymous memory (Pss_Anon of
/proc/self/smaps_rollup, sampled every 10 ms), summed over the processes: the peak above what it was just before, or for
a save behind the training, above the peak of steps without one.

    python benchmarks/checkpoints.py [--small] [--engines zero2 zero3 ddp] [--scratch DIR]

Exits with 1 when memory grows by more than 1.1 times the state.
"""

import argparse
import gc
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

LIMIT = 1.1
SHAPES = {
    "full": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "vocab_size": 45_000},
    "small": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 1000},
}
NUM_TOKENS = 64
RESHAPES = {"zero2": (("zero3", 2), ("single", 1)), "zero3": (("ddp", 2),), "ddp": (("zero2", 2),)}


class Memory:
    """Anonymous memory of this process in a block: before it, and at its peak."""

    def __enter__(self) -> "Memory":
        gc.collect()
        self.before = self.peak = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(0.01):
            self.peak = max(self.peak, anonymous_bytes())


def anonymous_bytes() -> int:
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss_Anon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel does not tell Pss_Anon")


# ---------------------------------------------------------------- one rank


def run_rank(task: dict[str, Any]) -> None:
    """Start an engine; save, or restore; write what was measured."""
    import torch
    from rich.console import Console  # noqa: F401, loaded before memory is measured

    from sft_dist import checkpoint, commits
    from sft_dist.checkpoint import Saver
    from sft_dist.commits import Segment
    from sft_dist.config import parse_recipe
    from sft_dist.engine.collectives import choose_device, join_process_group, leave_process_group, sum_over_ranks
    from sft_dist.engine.start import start_engine
    from sft_dist.model.attention import choose_backend
    from sft_dist.model.load import load_model
    from sft_dist.optim import build_adamw
    from sft_dist.world import end_process, read_world

    torch.set_num_threads(1)
    world, directory = read_world(), Path(task["directory"])
    recipe = parse_recipe(task["recipe"], origin="benchmark")
    device, dtype = choose_device(world), torch.float32
    join_process_group(world, device, timeout_s=600, needed=True)
    backend = choose_backend("sdpa", device=device, dtype=dtype, dropout=0.0)
    load = partial(load_model, recipe.model, backend=backend, dtype=dtype, device=device, num_tokens=1)
    engine = start_engine(
        recipe,
        name=recipe.train.engine,
        world=world,
        dtype=dtype,
        device=device,
        load_model=partial(load, added_token_ids=()),
        make_optimizer=partial(build_adamw, optim=recipe.optim),
    )
    micro = micro_batch(device)

    def step() -> float:
        started = time.perf_counter()
        with engine.accumulate(is_last=True):
            engine.backward(engine(micro))
        engine.step(lr=1e-4, grad_norm=float(engine.reduce()))
        return time.perf_counter() - started

    def over_ranks(value: float) -> float:
        return float(sum_over_ranks(torch.tensor(value, dtype=torch.float64, device=device)))

    num_parameters = sum(torch.Size(shape).numel() for shape in checkpoint.weight_shapes(engine).values())
    found: dict[str, Any] = {"state_bytes": 12 * num_parameters, "parameters": num_parameters}
    step()
    if task["restore"]:
        path = Path(task["restore"])
        engine.fragments()
        with Memory() as memory:
            started = time.perf_counter()
            commits.verify(path, part=world.rank, num_parts=world.size)
            checkpoint.restore(engine, path, commits.read_state(path))
            found["seconds"] = time.perf_counter() - started
        found["added_bytes"] = over_ranks(memory.peak - memory.before)
    else:
        state = checkpoint.first_state(curve={}, segment=Segment(0, "", ""), layout={}, code={})
        state = state.after(1.0, applied=True)
        with Memory() as training:
            alone = [step() for _ in range(task["steps"])]
        found["step_s"] = sorted(alone)[len(alone) // 2]
        for name in ("waiting", "first", "behind"):  # the first allocates the copy, later ones use it again
            behind = name != "waiting"
            settings = recipe.train.model_copy(update={"save_in_background": behind})
            if name != "behind":
                saver = Saver(engine, directory / "checkpoints", settings=settings)
            started, num_steps = time.perf_counter(), 0
            with Memory() as memory:
                saver.start(state)
                commit = None
                while commit is None:
                    sums = sum_over_ranks(torch.tensor(saver.flags(), device=device)).tolist()
                    commit = saver.settle(*sums)
                    if commit is None:
                        step()
                        num_steps += 1
            wall = time.perf_counter() - started
            found[name] = {
                "stall_s": commit.stall_s,
                "slower_s": wall - num_steps * found["step_s"],
                "wall_s": wall,
                "steps": num_steps,
                "added_bytes": over_ranks(memory.peak - (training.peak if num_steps else memory.before)),
            }
            state = state.after(1.0, applied=True)
    if world.is_main:
        (directory / "found.json").write_text(json.dumps(found))
    leave_process_group()
    end_process(0)


def micro_batch(device: Any) -> Any:
    """One document of NUM_TOKENS tokens, all trained but the first."""
    import torch

    from sft_dist.data.batch import MicroBatch

    ids = torch.arange(NUM_TOKENS) % 900
    index = torch.arange(NUM_TOKENS - 1)
    return MicroBatch(
        input_ids=ids[None],
        position_ids=torch.arange(NUM_TOKENS)[None],
        cu_seqlens=torch.tensor([0, NUM_TOKENS], dtype=torch.int32),
        max_seqlen=NUM_TOKENS,
        response_index=index,
        targets=ids[1:],
        weights=torch.full((NUM_TOKENS - 1,), 1 / (NUM_TOKENS - 1)),
        document_lengths=(NUM_TOKENS,),
        is_last=True,
    ).to(device)


# ---------------------------------------------------------------- all ranks


def write_model(directory: Path, shape: dict[str, int]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen2", **shape, num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=True, dtype="float32"
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)


def measure(work: Path, engine: str, world_size: int, *, restore: Path | None, steps: int) -> dict[str, Any]:
    """Run the ranks of one engine and return what they measured."""
    recipe = {
        "run": {"name": "b", "dir": str(work / "runs"), "report": False},
        "model": {"path": str(work / "model")},
        "data": {"train": "none.jsonl"},
        "batch": {"examples": world_size},
        "optim": {"lr": 1e-4},
        "train": {"engine": engine},
    }
    task = {"directory": str(work), "recipe": recipe, "restore": str(restore) if restore else None, "steps": steps}
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    settings = {"WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    # Blocks that were freed go back, so that what one phase left is not room for the next.
    settings |= {"MALLOC_MMAP_THRESHOLD_": 65536}
    command = [sys.executable, __file__, "--rank", json.dumps(task)]
    environs = [
        os.environ | {key: str(value) for key, value in (settings | {"RANK": r, "LOCAL_RANK": r}).items()}
        for r in range(world_size)
    ]
    with started(command, environs) as ranks:
        codes = [rank.wait(timeout=1800) for rank in ranks]
    if any(codes):
        sys.exit(f"{engine} on {world_size} processes failed: {codes}")
    found: dict[str, Any] = json.loads((work / "found.json").read_text())
    return found


@contextmanager
def started(command: list[str], environs: list[dict[str, str]]) -> Iterator[list["subprocess.Popen[bytes]"]]:
    ranks = [subprocess.Popen(command, env=environ) for environ in environs]
    try:
        yield ranks
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a model of 0.1 million parameters: that it runs")
    parser.add_argument("--engines", nargs="+", default=["zero2", "zero3", "ddp"], choices=sorted(RESHAPES))
    parser.add_argument("--scratch", type=Path, help="where checkpoints are written (default: the temporary directory)")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        run_rank(json.loads(options.rank))
        return
    too_much = []
    saves = [
        "| engine | state GB | a step | stall, waiting | stall, behind (first) | slower by, behind | added, waiting "
        "| added, behind |"
    ]
    loads = ["| written by | restored on | seconds | added |", "|---|---|---|---|"]
    saves.append("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="checkpoints-", dir=options.scratch) as directory:
        work = Path(directory)
        write_model(work / "model", SHAPES["small" if options.small else "full"])
        for engine in options.engines:
            found = measure(work, engine, 2, restore=None, steps=3)
            state, waiting, behind = found["state_bytes"], found["waiting"], found["behind"]
            shares = [save["added_bytes"] / state for save in (waiting, behind)]
            saves.append(
                f"| {engine} x 2 | {state / 1e9:.2f} | {found['step_s']:.2f} s | {waiting['stall_s']:.2f} s | "
                f"{behind['stall_s']:.2f} s ({found['first']['stall_s']:.2f}) | "
                f"{behind['slower_s']:.2f} s in {behind['steps']} steps | {shares[0]:.2f}x | {shares[1]:.2f}x |"
            )
            too_much += [f"{engine}: saving added {share:.2f} times the state" for share in shares if share > LIMIT]
            newest = max((work / "checkpoints").glob("step-*"))
            for other, world_size in RESHAPES[engine]:
                restored = measure(work, other, world_size, restore=newest, steps=0)
                share = restored["added_bytes"] / state
                loads.append(f"| {engine} x 2 | {other} x {world_size} | {restored['seconds']:.1f} | {share:.2f}x |")
                too_much += [f"{other}: restoring added {share:.2f} times the state"] * (share > LIMIT)
        print(f"{found['parameters'] / 1e6:,.1f} M parameters\n")
    print("\n".join([*saves, "", *loads]))
    print(
        f"\n{platform.machine()}, {os.cpu_count()} cores, torch {version('torch')}, "
        f"safetensors {version('safetensors')}, deepspeed {version('deepspeed')}; `python benchmarks/checkpoints.py`"
    )
    if too_much and not options.small:
        sys.exit("\n".join(too_much))


if __name__ == "__main__":
    main()
