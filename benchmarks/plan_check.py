"""What `sft-dist plan` says of memory, against what trainings on this CPU take.

A random Qwen2 of 100 million parameters is trained for two steps on each engine, as a user trains it: `train.run` on a
recipe, with its check, its checkpoint and its export. Measured is each rank's peak resident set (VmHWM) above what it was
after all imports. ZeRO's buckets are given in a DeepSpeed file, the same for the plan and the run.

    python benchmarks/plan_check.py [--quick] [--only CASE ...] [--scratch DIR]

Exits with 1 when a peak is more than 10% off.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODEL = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 32_000,
}
PACK_TOKENS = 1024
ROW_LETTERS = 250
"""A prompt and an answer of half as many letters each; a letter is a token."""
BUCKETS = {
    "reduce_bucket_size": 10_000_000,
    "stage3_prefetch_bucket_size": 5_000_000,
    "stage3_param_persistence_threshold": 10_000,
    "stage3_max_live_parameters": 30_000_000,
}


@dataclass(frozen=True)
class Case:
    engine: str
    world_size: int
    checkpointing: str = "none"

    @property
    def name(self) -> str:
        return f"{self.engine}-{self.checkpointing}-{self.world_size}"


CASES = (
    Case("single", 1),
    Case("single", 1, "selective"),
    Case("single", 1, "full"),
    Case("ddp", 2),
    Case("zero1", 2),
    Case("zero2", 2),
    Case("zero3", 2),
    Case("zero2_offload", 2),
    Case("zero3_offload", 2),
)


# ---------------------------------------------------------------- one rank


def run_rank(recipe: Path, found: Path) -> None:
    import importlib

    import torch
    from rich.console import Console

    from sft_dist import train
    from sft_dist.config import load_recipe
    from sft_dist.engine.collectives import leave_process_group
    from sft_dist.world import read_world

    importlib.import_module("transformers.models.qwen2.modeling_qwen2")
    if "zero" in recipe.stem:
        train.start_engine.__globals__["start_zero"].__globals__["_import_deepspeed"](torch.device("cpu"))
    world = read_world()
    baseline = resident("VmRSS")
    peaks: dict[str, int] = {}
    for phase, name in (
        ("load", "start_engine"),
        ("check", "require_own_loss"),
        ("steps", "_train"),
        ("export", "_export"),
    ):
        setattr(train, name, watched(getattr(train, name), phase, baseline, peaks))
    train.run(load_recipe(recipe), console=Console(quiet=True))
    found.with_suffix(f".{world.rank}.json").write_text(json.dumps({"baseline": baseline, "peaks": peaks}))
    leave_process_group()


def watched(function: Callable[..., Any], phase: str, baseline: int, peaks: dict[str, int]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        Path("/proc/self/clear_refs").write_text("5")
        try:
            return function(*arguments, **named)
        finally:
            peaks[phase] = resident("VmHWM") - baseline
            peaks[f"after {phase}"] = resident("VmRSS") - baseline

    return call


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


# ---------------------------------------------------------------- all ranks


def write_inputs(work: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tests import tiny

    tiny.write_tokenizer(work / "model")
    config = AutoConfig.for_model("qwen2", **MODEL, tie_word_embeddings=True, dtype="float32")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(work / "model")
    half = "abcdefghij" * 100
    rows = [
        {
            "messages": [
                {"role": "user", "content": half[: ROW_LETTERS // 2 - 2]},
                {"role": "assistant", "content": half[: ROW_LETTERS // 2 - 1]},
            ]
        }
        for _ in range(64)
    ]
    (work / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def measure(work: Path, case: Case) -> list[dict[str, Any]]:
    recipe: dict[str, Any] = {
        "run": {"name": case.name, "dir": str(work / "runs")},
        "model": {"path": str(work / "model"), "checkpointing": case.checkpointing},
        "data": {"train": str(work / "train.jsonl"), "max_tokens": PACK_TOKENS},
        "batch": {"examples": 8 * case.world_size, "pack_tokens": PACK_TOKENS},
        "optim": {"lr": 1e-4},
        "train": {"engine": case.engine, "steps": 2},
    }
    if case.engine.startswith("zero"):
        knobs = json.loads((Path(__file__).resolve().parents[1] / f"configs/deepspeed/{case.engine}.json").read_text())
        zero = knobs["zero_optimization"]
        zero |= {key: value for key, value in BUCKETS.items() if key in zero}
        path = work / f"{case.engine}.json"
        path.write_text(json.dumps(knobs))
        recipe["train"]["deepspeed"] = str(path)
    path = work / f"{case.name}.yaml"
    path.write_text(json.dumps(recipe))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    settings = {"OMP_NUM_THREADS": 1} | (
        {}
        if case.world_size == 1
        else {
            "WORLD_SIZE": case.world_size,
            "LOCAL_WORLD_SIZE": case.world_size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
    )
    environs = [
        os.environ
        | {
            key: str(value)
            for key, value in (settings | ({"RANK": r, "LOCAL_RANK": r} if case.world_size > 1 else {})).items()
        }
        for r in range(case.world_size)
    ]
    found = work / f"{case.name}.found"
    command = [sys.executable, __file__, "--rank", str(path), str(found)]
    with started(command, environs) as ranks:
        codes = [rank.wait(timeout=900) for rank in ranks]
    if any(codes):
        sys.exit(f"{case.name} failed: {codes}")
    return [json.loads(found.with_suffix(f".{rank}.json").read_text()) for rank in range(case.world_size)]


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
    parser.add_argument("--only", nargs="+", default=[case.name for case in CASES])
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--rank", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        run_rank(*options.rank)
        return
    with tempfile.TemporaryDirectory(prefix="plan-check-", dir=options.scratch) as directory:
        work = Path(directory)
        write_inputs(work)
        for case in CASES:
            if case.name in options.only:
                for rank, each in enumerate(measure(work, case)):
                    print(
                        case.name,
                        rank,
                        f"baseline {each['baseline'] / 1e6:.0f}",
                        {k: round(v / 1e6) for k, v in each["peaks"].items()},
                        flush=True,
                    )


if __name__ == "__main__":
    main()
