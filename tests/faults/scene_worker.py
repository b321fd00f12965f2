"""One rank that plays scenes: command lines of `sft-dist`, one after the other, in one process.

    python scene_worker.py          as one rank of a world described by the environment

Each line of standard input is {"argv": [...], "effects": {...}, "result": file}: the product's own `main` runs, and
what came of it is written to the file. An effect plants a fault in this process for one scene:
    poison   {"steps": [...], "rank": r, "factor": x}: token weights of these steps are multiplied, on that rank
    offset   {"steps": [...], "rank": r, "value": x}: is added to the loss of these steps; gradients stay as they are
    bend     {"steps": [...], "rank": r}: gradients of these steps are NaN; the loss stays as it is
    fill     {"file": path, "step": k, "tail": path}: when the checkpoint of this step is about to be written, a file
             takes all space, and blanks what is left of the last page of `tail`
    spill    the same, when this step begins
    free     {"file": path, "step": k}: when this step begins, that file goes
    touch    {"file": path, "step": k}: when this step begins, that file appears
"""

import contextlib
import dataclasses
import gc
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from sft_dist import checkpoint, cli, train, watchdog
from sft_dist.engine import collectives
from sft_dist.model.load import PackedModel
from sft_dist.world import read_world

transformers.utils.logging.disable_progress_bar()
leave_process_group = collectives.leave_process_group
LOAD_STEPS, WRITE_FRAGMENTS, FORWARD = train.load_steps, checkpoint.write_fragments, PackedModel.forward


class Patches(contextlib.ExitStack):
    """Changes of the product that last for one scene."""

    def put(self, owner: Any, name: str, value: Any) -> None:
        self.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)


PAGE = 4096


def fill(file: Path, tail: Path | None = None) -> None:
    """Take all space of a small file system. tail: a file that can grow in its last page yet; blanks take that, too."""
    with file.open("ab", buffering=0) as handle, contextlib.suppress(OSError):
        while True:
            handle.write(b"\0" * PAGE)
    if tail is not None and read_world().is_main:
        with tail.open("ab", buffering=0) as handle:
            handle.write(b" " * (-tail.stat().st_size % PAGE))


def at_step(patches: Patches, act: Callable[[Any], Any]) -> None:
    """Let `act` change, or see, each step's batch when it is fetched."""
    before = train.load_steps

    def steps(*arguments: Any, **named: Any) -> Iterator[Any]:
        for batch in before(*arguments, **named):
            changed = act(batch)
            yield batch if changed is None else changed

    patches.put(train, "load_steps", steps)


def poison(patches: Patches, *, steps: list[int], rank: int, factor: float) -> None:
    def act(batch: Any) -> Any:
        if batch.step not in steps or read_world().rank != rank:
            return None
        micros = tuple(dataclasses.replace(micro, weights=micro.weights * factor) for micro in batch.micros)
        return dataclasses.replace(batch, micros=micros)

    at_step(patches, act)


def offset(patches: Patches, *, steps: list[int], rank: int, value: float) -> None:
    change_loss(patches, lambda loss: loss + value, steps=steps, rank=rank)


def bend(patches: Patches, *, steps: list[int], rank: int) -> None:
    # The square root's slope at 0 is infinite, and infinity times 0 is NaN.
    change_loss(patches, lambda loss: loss + (loss * 0).sqrt(), steps=steps, rank=rank)


def change_loss(patches: Patches, change: Callable[[Any], Any], *, steps: list[int], rank: int) -> None:
    now = {"step": 0}

    def forward(model: Any, micro: Any, **named: Any) -> Any:
        result = FORWARD(model, micro, **named)
        hit = now["step"] in steps and read_world().rank == rank and torch.is_grad_enabled()
        return change(result) if hit else result

    at_step(patches, lambda batch: now.update(step=batch.step))
    patches.put(PackedModel, "forward", forward)


def fill_at_write(patches: Patches, *, file: str, step: int, tail: str) -> None:
    def write(fragments: Any, target: Path) -> None:
        if target.parent.name == f".step-{step:08d}":
            fill(Path(file), Path(tail))
        WRITE_FRAGMENTS(fragments, target)

    patches.put(checkpoint, "write_fragments", write)


def on_main_at(act: Callable[..., Any]) -> Callable[..., None]:
    def effect(patches: Patches, *, step: int, **files: str) -> None:
        def once(batch: Any) -> None:
            if batch.step == step and read_world().is_main:
                act(*map(Path, files.values()))

        at_step(patches, once)

    return effect


EFFECTS: dict[str, Callable[..., None]] = {
    "poison": poison,
    "offset": offset,
    "bend": bend,
    "fill": fill_at_write,
    "spill": on_main_at(fill),
    "free": on_main_at(Path.unlink),
    "touch": on_main_at(Path.touch),
}


def play(argv: list[str], effects: dict[str, Any]) -> dict[str, Any]:
    """Run one command line; its exit code and what it printed. code: None for a traceback, which is in the text."""
    for handler in list(logging.getLogger().handlers):
        logging.getLogger().removeHandler(handler)
    said = io.StringIO()
    with Patches() as patches, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        for name, settings in effects.items():
            EFFECTS[name](patches, **settings)
        try:
            code: int | None = cli.main(argv)
        # a bug of the product shows as a traceback, and the next scene is played nevertheless
        except Exception:  # noqa: BLE001, RUF100
            logging.getLogger(__name__).exception("not explained to the user")
            code = None
    gc.collect()
    return {"code": code, "said": said.getvalue()}


def main() -> None:
    torch.set_num_threads(1)
    collectives.leave_process_group = lambda: None  # the next scene needs it
    watchdog.LEAVE_S = 10.0**6  # a scene that is refused ends here, the process does not
    for line in sys.stdin:
        scene = json.loads(line)
        result = Path(scene["result"])
        text = json.dumps(play(scene["argv"], scene["effects"]))
        result.with_suffix(".tmp").write_text(text)
        result.with_suffix(".tmp").rename(result)
    leave_process_group()
    sys.stdout.flush()
    os._exit(0)  # an engine that a refused scene left behind must not hold the process


if __name__ == "__main__":
    main()
