"""One rank of a run with a fault planned for it: patches the product in this process only, then trains.

The plan holds any of
    kill          {"at": one of POINTS, "step": whose save, "whom": "self" or "all"}: SIGKILL at that point
    kill_at       step: SIGKILL of this process before the last micro-batch of that step
    hang_at       step: never returns from there
    raise_at      step: the model's forward raises
    slow_step_s   each step takes so much longer
    slow_forward_s  each forward pass takes so much longer
    slow_write_s  each rank file takes so much longer
    no_small_data the tokeniser processes are used for the smallest data
    grace_s       so long a rank waits for data that nobody prepares
"""

import functools
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sft_dist import checkpoint, cli, commits, heartbeat, loop
from sft_dist.data import build, prepare
from sft_dist.model.load import PackedModel
from sft_dist.run_files import HEARTBEATS

POINTS = {
    "first byte": "before the first byte of its file",
    "half a file": "in the middle of its file",
    "flushed": "after its file was flushed, before that is announced",
    "told": "after its file was announced",
    "manifest": "after the manifest, before COMMITTED",
    "empty COMMITTED": "in the middle of COMMITTED",
    "COMMITTED": "after COMMITTED, before the rename",
    "renamed": "after the rename",
    "half deleted": "in the middle of deleting the oldest",
}
"""Points of a save, in order, in words."""
COMMITTED_POINTS = ("renamed", "half deleted")
"""From here on the new checkpoint counts."""


def kill_in_save(*, at: str, step: int, whom: str) -> None:
    """SIGKILL at a point of the save of `step`."""

    def reached(point: str, directory: Path) -> None:
        if point == at and directory.name.removeprefix(".") == commits.name_of(step):
            if whom == "all":
                for other in heartbeat.read_all(directory.parent.parent / HEARTBEATS):
                    if other.pid != os.getpid():
                        os.kill(other.pid, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

    write_fragments, flush = checkpoint.write_fragments, commits.flush
    write_durably, commit, prune = commits.write_durably, commits.commit, commits.prune

    def dying_fragments(fragments: Any, file: Path) -> None:
        reached("first byte", file.parent)
        write_fragments(fragments, file)
        if at == "half a file" and file.parent.name == f".{commits.name_of(step)}":
            os.truncate(file, file.stat().st_size // 2)
        reached("half a file", file.parent)

    def dying_flush(files: list[Path], *, umask: int) -> Any:
        described = flush(files, umask=umask)
        reached("flushed", files[0].parent)
        return described

    def dying_write(file: Path, text: str) -> None:
        if file.name == commits.COMMITTED and at == "empty COMMITTED":
            file.touch()
            reached("empty COMMITTED", file.parent)
        write_durably(file, text)
        after = {commits.MANIFEST: "manifest", commits.COMMITTED: "COMMITTED"}
        reached(after.get(file.name, "told" if file.name.startswith("rank-") else ""), file.parent)

    def dying_commit(writing: Path, manifest: Any) -> Path:
        final = commit(writing, manifest)
        reached("renamed", final)
        return final

    def dying_prune(directory: Path, **settings: Any) -> list[str]:
        newest = commits.committed(directory)[-1]
        rmtree = shutil.rmtree

        def half(path: Path) -> None:
            sorted(path.iterdir())[-1].unlink()  # COMMITTED comes first, and is still there
            reached("half deleted", newest)
            rmtree(path)

        if at == "half deleted":
            commits.shutil.rmtree = half  # type: ignore[assignment]
        return prune(directory, **settings)

    checkpoint.write_fragments, commits.flush = dying_fragments, dying_flush
    commits.write_durably = checkpoint.write_durably = dying_write
    commits.commit, commits.prune = dying_commit, dying_prune


def disturb_steps(plan: Mapping[str, Any]) -> None:
    """What happens at a step: the hook is where the loop seeds a micro-batch."""
    seed_forward, forward = loop.seed_forward, PackedModel.forward
    at = {"step": 0}

    def disturbed(seed: int, step: int, rank: int, micro_index: int) -> None:
        seed_forward(seed, step, rank, micro_index)
        at["step"] = step
        if micro_index == 0:
            time.sleep(plan.get("slow_step_s", 0))
        if micro_index == 1 and step == plan.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        while micro_index == 1 and step == plan.get("hang_at"):
            time.sleep(60)

    def raising(self: PackedModel, *arguments: Any, **settings: Any) -> Any:
        if at["step"] == plan.get("raise_at"):
            raise IndexError("index out of range in self")
        time.sleep(plan.get("slow_forward_s", 0))
        return forward(self, *arguments, **settings)

    loop.seed_forward, PackedModel.forward = disturbed, raising  # type: ignore[method-assign]


def slow_down_writes(seconds: float) -> None:
    """Each rank's file takes so much longer."""
    write_fragments = checkpoint.write_fragments

    def slow(fragments: Any, file: Path) -> None:
        write_fragments(fragments, file)
        time.sleep(seconds)

    checkpoint.write_fragments = slow


def train_rank(words: Sequence[str], environ: Mapping[str, str], plan: Mapping[str, Any], output: Path) -> None:
    """The process of one rank: `sft-dist train *words` in this environment, what it prints going to a file."""
    os.environ.clear()
    os.environ.update(environ)
    with output.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    disturb_steps(plan)
    if "slow_write_s" in plan:
        slow_down_writes(plan["slow_write_s"])
    if "kill" in plan:
        kill_in_save(**plan["kill"])
    if "no_small_data" in plan:
        build.IN_PROCESS_BYTES = 0
    if "grace_s" in plan:
        prepare.wait_for_store = functools.partial(build.wait_for_store, grace_s=plan["grace_s"])
    sys.exit(cli.main(["train", *words]))
