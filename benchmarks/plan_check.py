"""What `sft-dist plan` says of memory, against what trainings on this CPU take.

A random Qwen2 of 100 million parameters is trained for two steps of two packs on each engine, as a user trains it:
`train.run` on a recipe, with its check before step 1, its checkpoint and its export. Measured is each process's peak
resident set (VmHWM) above what it was after all imports. ZeRO's buckets are those of a DeepSpeed file, the same for the
plan and the run.

    python benchmarks/plan_check.py [--quick] [--only CASE ...] [--scratch DIR]

Exits with 1 when the plan is more than 10% off the peak of the rank that takes most.
"""

import argparse
import importlib
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

TOLERANCE = 0.10
"""Of a peak, in either direction."""

SIZES = {
    "100M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 32_000},
    "150M": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 10, "vocab_size": 45_000},
}
"""Fields of a config.json, with heads of 64 and a third as many of keys, and a tied embedding."""

BUCKETS = {
    "reduce_bucket_size": 10_000_000,
    "stage3_prefetch_bucket_size": 5_000_000,
    "stage3_param_persistence_threshold": 10_000,
    "stage3_max_live_parameters": 30_000_000,
}


@dataclass(frozen=True)
class Case:
    """processes: ranks. tokens: of a pack; four conversations fill it."""

    engine: str
    processes: int
    checkpointing: str = "none"
    tokens: int = 512
    size: str = "100M"
    behind: bool = True
    """Checkpoints are written behind the training, from a copy."""

    @property
    def name(self) -> str:
        waits = "" if self.behind else "-waits"
        return f"{self.engine}-{self.processes}-{self.checkpointing}-{self.tokens}-{self.size}{waits}"


CASES = (
    Case("single", 1),
    Case("single", 1, tokens=1024),
    Case("single", 1, "selective", tokens=1024),
    Case("single", 1, "full", tokens=1024),
    Case("single", 1, tokens=1024, behind=False),
    Case("single", 1, size="150M"),
    Case("single", 1, tokens=1024, size="150M"),
    Case("ddp", 2),
    Case("ddp", 2, size="150M"),
    Case("zero1", 2),
    Case("zero1", 2, size="150M"),
    Case("zero2", 2),
    Case("zero2", 2, size="150M"),
    Case("zero2", 2, "full", tokens=1024),
    Case("zero3", 2),
    Case("zero3", 2, size="150M"),
    Case("zero3", 2, tokens=1024),
    Case("zero3", 2, tokens=1024, size="150M"),
    Case("zero2_offload", 2),
    Case("zero2_offload", 2, size="150M"),
    Case("zero3_offload", 2),
    Case("zero3_offload", 2, size="150M"),
)
QUICK = (Case("single", 1), Case("zero2", 2))


# ---------------------------------------------------------------- one rank


def run_rank(recipe: Path, found: Path) -> None:
    """Train, and write down the peak above what the imports took."""
    import torch
    from rich.console import Console

    from sft_dist import train
    from sft_dist.config import load_recipe
    from sft_dist.engine.collectives import leave_process_group
    from sft_dist.engine.zero import _import_deepspeed
    from sft_dist.run_record import read_starts
    from sft_dist.world import end_process, read_world

    importlib.import_module("transformers.models.qwen2.modeling_qwen2")
    if recipe.stem.startswith("zero"):
        _import_deepspeed(torch.device("cpu"))
    loaded, world = load_recipe(recipe), read_world()
    baseline = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    train.run(loaded, console=Console(quiet=True))
    measured = resident("VmHWM") - baseline
    planned = read_starts(loaded.run.path)[-1]["planned_memory"]
    found.with_suffix(f".{world.rank}.json").write_text(json.dumps({"measured": measured, "planned": planned}))
    leave_process_group()
    end_process(0)


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


# ---------------------------------------------------------------- all ranks


def write_model(directory: Path, size: str) -> Path:
    """A model with random weights and a tokenizer of letters, made once."""
    if not (directory / "config.json").exists():
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from tests import tiny

        tiny.write_tokenizer(directory)
        heads = SIZES[size]["hidden_size"] // 64
        config = AutoConfig.for_model(
            "qwen2",
            **SIZES[size],
            num_attention_heads=heads,
            num_key_value_heads=heads // 3 if heads % 3 == 0 else heads // 4,
            tie_word_embeddings=True,
            dtype="float32",
        )
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def write_chats(path: Path, *, tokens: int) -> Path:
    """Conversations of so many tokens, nearly half of them trained: a letter is a token."""
    letters = "abcdefghij" * tokens
    turns = {"user": letters[: tokens // 2 - 2], "assistant": letters[: tokens // 2 - 1]}
    row = {"messages": [{"role": role, "content": content} for role, content in turns.items()]}
    path.write_text(64 * (json.dumps(row) + "\n"))
    return path


def measure(work: Path, case: Case) -> list[dict[str, Any]]:
    """Train a case; what each rank planned and took."""
    train: dict[str, Any] = {"engine": case.engine, "steps": 2, "save_in_background": case.behind}
    if case.engine.startswith("zero"):
        train["deepspeed"] = str(_write_knobs(work, case.engine))
    recipe = {
        "run": {"name": case.name, "dir": str(work / "runs")},
        "model": {"path": str(write_model(work / case.size, case.size)), "checkpointing": case.checkpointing},
        "data": {"train": str(write_chats(work / "train.jsonl", tokens=case.tokens // 4)), "max_tokens": case.tokens},
        "batch": {"examples": 8 * case.processes, "pack_tokens": case.tokens},
        "optim": {"lr": 1e-4},
        "train": train,
    }
    path, found = work / f"{case.name}.yaml", work / f"{case.name}.found"
    path.write_text(json.dumps(recipe))
    with started([sys.executable, __file__, "--rank", str(path), str(found)], list(_environs(case))) as ranks:
        codes = [rank.wait(timeout=1800) for rank in ranks]
    if any(codes):
        sys.exit(f"{case.name}: a process failed: {codes}")
    return [json.loads(found.with_suffix(f".{rank}.json").read_text()) for rank in range(case.processes)]


def _write_knobs(work: Path, engine: str) -> Path:
    from sft_dist import package_files

    knobs = json.loads(package_files.find(f"deepspeed/{engine}.json").read_text())
    zero = knobs["zero_optimization"]
    zero |= {key: value for key, value in BUCKETS.items() if key in zero}
    path = work / f"{engine}.json"
    path.write_text(json.dumps(knobs))
    return path


def _environs(case: Case) -> Iterator[dict[str, str]]:
    """One environment a rank."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    for rank in range(case.processes):
        settings = {"OMP_NUM_THREADS": "1"}
        if case.processes > 1:
            world = {"WORLD_SIZE": case.processes, "LOCAL_WORLD_SIZE": case.processes, "RANK": rank, "LOCAL_RANK": rank}
            settings |= {key: str(value) for key, value in world.items()}
            settings |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        yield os.environ | settings


@contextmanager
def started(command: list[str], environs: list[dict[str, str]]) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """A process for each environment; none outlives the block."""
    ranks = [subprocess.Popen(command, env=environ, stderr=subprocess.DEVNULL) for environ in environs]
    try:
        yield ranks
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()


def row_of(case: Case, ranks: Sequence[dict[str, Any]]) -> tuple[str, float]:
    """A line of the table, and how far the plan is off the rank that took most: that one has to fit."""
    planned = ranks[0]["planned"]
    error = sum(planned.values()) / max(rank["measured"] for rank in ranks) - 1
    measured = " / ".join(f"{rank['measured'] / 1e6:,.0f}" for rank in ranks)
    parts = ", ".join(f"{part} {size / 1e6:,.0f}" for part, size in planned.items() if size)
    saves = "" if case.behind else ", saving waits"
    return (
        f"| {case.engine} x {case.processes} | {case.size} | {case.tokens:,} | {case.checkpointing}{saves} | "
        f"{sum(planned.values()) / 1e6:,.0f} | {measured} | {error:+.1%} | {parts} |"
    ), error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two engines only")
    parser.add_argument("--only", nargs="+", metavar="CASE", help=f"of {', '.join(case.name for case in CASES)}")
    parser.add_argument("--scratch", type=Path, help="where models and runs are written")
    parser.add_argument("--rank", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    if options.rank:
        run_rank(*options.rank)
        return
    cases = QUICK if options.quick else [case for case in CASES if case.name in (options.only or [case.name])]
    print(
        "| engine | model | pack | recomputes | planned MB | measured MB, by rank | planned is off by | planned parts |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    off = []
    with tempfile.TemporaryDirectory(prefix="plan-check-", dir=options.scratch) as directory:
        for case in cases:
            line, error = row_of(case, measure(Path(directory), case))
            print(line, flush=True)
            off += [case.name] * (abs(error) > TOLERANCE)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "deepspeed"))
    print(f"\n{platform.machine()}, {os.cpu_count()} cores, {platform.libc_ver()[1]} glibc, {versions}")
    if off:
        sys.exit(f"more than {TOLERANCE:.0%} off: {', '.join(off)}")


if __name__ == "__main__":
    main()
