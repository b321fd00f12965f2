"""Runs many recipes in one set of processes: start-up, not training, is what costs.

    python worker.py cases.json      as one rank of a world described by the environment

cases.json: [{"recipe": {...}, "checks": [...], "resume": {"run": name, "step": k} or null}, ...]. Each case is the
product's own `run`; results are what it leaves on disk. `resume` first gives the run another's checkpoint of step k.
Under ZeRO-3 every
parameter's local shard must be 1/world of it before and after each step. Checks add more instruments:
    poisoned   step 3 has infinite weights on the last rank; training ends after step 5
    gradients  the summed gradient of step 1 is written to <run>/gradients.safetensors, and nothing is trained
    reversed   the documents of every pack in the opposite order; rotated: the last one first
    accumulates  gradient norms of a micro-batch, and of 256 times it, then 16 times it, go to <run>/norms.json
    in_memory  the trained model's logits on a fixed input, computed by the engine, are written to <run>/logits.pt
"""

import contextlib
import dataclasses
import gc
import io
import itertools
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from rich.console import Console

from sft_dist import commits, train
from sft_dist.config import parse_recipe
from sft_dist.engine.collectives import leave_process_group, sum_over_ranks
from sft_dist.world import end_process, read_world

transformers.utils.logging.disable_progress_bar()
ORIGINAL_LOOP, ORIGINAL_BATCHES = train.train_loop, train.global_batches
REORDER = {"reversed": lambda pack: pack[::-1], "rotated": lambda pack: pack[-1:] + pack[:-1]}


def reordered_batches(reorder: Any) -> Any:
    def batches(*arguments: Any, **settings: Any) -> Any:
        for batch in ORIGINAL_BATCHES(*arguments, **settings):
            rows = tuple(tuple(reorder(pack) for pack in row) for row in batch.micro_steps)
            yield dataclasses.replace(batch, micro_steps=rows)

    return batches


def checked_loop(checks: list[str]) -> Any:
    def loop(engine: Any, steps: Any, state: Any, **kwargs: Any) -> Any:
        directory = kwargs["recipe"].run.path
        if "accumulates" in checks:
            write_norms(engine, next(iter(steps)).micros[0], directory)
            return state
        if "gradients" in checks:
            write_gradients(engine, next(iter(steps)), directory)
            return state
        if "poisoned" in checks:
            steps = itertools.islice(poisoned(steps), 5)
        if engine.name.startswith("zero3"):
            steps = between_steps(lambda: assert_sharded(engine), steps)
        state = ORIGINAL_LOOP(engine, steps, state, **kwargs)
        if "in_memory" in checks:
            write_logits(engine, directory)
        return state

    return loop


def between_steps(check: Any, steps: Any) -> Any:
    check()
    for step in steps:
        yield step
        check()


def poisoned(steps: Any) -> Any:
    """Infinite weights in step 3, on the last rank only."""
    for batch in steps:
        if batch.step == 3 and read_world().rank == read_world().size - 1:
            micros = tuple(dataclasses.replace(micro, weights=micro.weights * torch.inf) for micro in batch.micros)
            batch = dataclasses.replace(batch, micros=micros)
        yield batch


def assert_sharded(engine: Any) -> None:
    for name, parameter in engine.model.named_parameters():
        expected = -(-parameter.ds_numel // engine.world.size)
        assert parameter.numel() == 0, f"{name} is whole on rank {engine.world.rank}: {parameter.numel()} elements"
        assert parameter.ds_tensor.numel() == expected, (
            f"{name}: shard of {parameter.ds_tensor.numel()}, 1/world is {expected}"
        )


def write_norms(engine: Any, micro: Any, directory: Path) -> None:
    norms = []
    for scales in ([1], [256] + [1] * 16):
        for index, scale in enumerate(scales):
            with engine.accumulate(is_last=index == len(scales) - 1):
                engine.backward(engine(micro) * scale)
        norms.append(engine.step(lr=0.0, grad_norm=float(engine.reduce())).grad_norm)
    if engine.world.is_main:
        (directory / "norms.json").write_text(json.dumps(norms))


def write_gradients(engine: Any, batch: Any, directory: Path) -> None:
    for micro in batch.micros:
        with engine.accumulate(is_last=micro.is_last):
            engine.backward(engine(micro))
    gradients = {}
    for name, parameter in engine.model.causal_lm.named_parameters():
        if engine.name.startswith("zero"):
            from deepspeed.utils import safe_get_full_grad

            gradients[name] = safe_get_full_grad(parameter).clone()
        else:
            gradients[name] = sum_over_ranks(parameter.grad.clone())
    if engine.world.is_main:
        safetensors.torch.save_file(gradients, directory / "gradients.safetensors")
    engine.step(lr=0.0, grad_norm=float(engine.reduce()))


@torch.no_grad()
def write_logits(engine: Any, directory: Path) -> None:
    causal_lm = engine.model.causal_lm
    implementation = causal_lm.config._attn_implementation
    causal_lm.set_attn_implementation("eager")
    logits = causal_lm(input_ids=torch.arange(20)[None], use_cache=False).logits
    causal_lm.set_attn_implementation(implementation)
    if engine.world.is_main:
        torch.save(logits, directory / "logits.pt")


def copy_checkpoint(source: Path, target: Path, name: str) -> None:
    """Rank 0 copies, the others wait until it is there: the process group may not exist yet."""
    final = target / "checkpoints" / name
    if read_world().is_main:
        shutil.copytree(source / "checkpoints" / name, target / "copying")
        final.parent.mkdir(parents=True, exist_ok=True)
        (target / "copying").rename(final)
    deadline = time.monotonic() + 60
    while not final.is_dir():
        assert time.monotonic() < deadline, f"rank 0 has not copied {final}"
        time.sleep(0.01)


def run_case(case: dict[str, Any]) -> None:
    recipe = parse_recipe(case["recipe"], origin="case")
    if case["resume"]:
        source, step = recipe.run.dir / case["resume"]["run"], case["resume"]["step"]
        copy_checkpoint(source, recipe.run.path, commits.name_of(step))
    train.train_loop = checked_loop(case["checks"])
    train.end_orderly = lambda *_: None  # some checks end a run early, and nobody asked for that
    reorder = next((REORDER[check] for check in case["checks"] if check in REORDER), None)
    train.global_batches = reordered_batches(reorder) if reorder else ORIGINAL_BATCHES
    with contextlib.redirect_stdout(io.StringIO()):
        train.run(recipe, console=Console(file=io.StringIO()))
    gc.collect()


def main() -> None:
    torch.set_num_threads(1)
    path = Path(sys.argv[1])
    for case in json.loads(path.read_text()):
        try:
            run_case(case)
        except BaseException:
            print(f"case {case['recipe']['run']['name']} failed", flush=True)
            raise
    leave_process_group()
    end_process(0)


if __name__ == "__main__":
    main()
