"""Directories that a run reads and writes: is there room, may it write, do locks work, does the disk answer at all."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sft_dist.doctor.finding import Finding, Group
from sft_dist.doctor.probe import Answer, ask_python

GROUP = Group("disk")
ANSWER_S = 15.0
GB = 10**9
LITTLE_BYTES = 2 * GB


def check_places(
    *, run_dir: Path, num_checkpoint_bytes: int | None, environ: Mapping[str, str] = os.environ
) -> Iterator[Finding]:
    """run_dir: where runs are written. num_checkpoint_bytes: what the checkpoints of a recipe will take, if known."""
    yield place_finding("runs", run_dir, _ask(run_dir), needed=num_checkpoint_bytes)
    cache = Path(environ.get("HF_HUB_CACHE") or Path(hub_home(environ), "hub"))
    yield place_finding("hub cache", cache, _ask(cache), mend="set HF_HOME to a directory that can be written")
    scratch = environ.get("TMPDIR")
    try:
        temporary = Path(scratch or tempfile.gettempdir())
    except OSError as error:  # none of the usual places can be written
        yield GROUP.problem("temporary", str(error), "set TMPDIR to a directory that can be written")
        return
    yield place_finding("temporary", temporary, _ask(temporary), mend="set TMPDIR to a directory that can be written")


def hub_home(environ: Mapping[str, str]) -> Path:
    """Where the hub's client keeps its things."""
    cache = environ.get("HF_HOME") or Path(environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(cache).expanduser()


def _ask(path: Path) -> Answer:
    return ask_python("doctor.ask_directory", str(path), timeout_s=ANSWER_S)


def place_finding(name: str, path: Path, answer: Answer, *, needed: int | None = None, mend: str = "") -> Finding:
    """answer: of `doctor.ask_directory`. needed: bytes that must fit."""
    facts: Mapping[str, Any] = answer.facts
    if answer.failure or not facts:
        why = answer.failure or "no answer"
        mend = "a network mount hangs: ask for it to be mounted anew, or use another directory"
        return GROUP.problem(name, f"{path}: {why}", mend)
    if facts["error"]:
        return GROUP.problem(
            name, f"{path} cannot be written: {facts['error']}", mend or "give run.dir a directory that can be written"
        )
    room = f"{path}: {facts['free'] / GB:,.1f} of {facts['total'] / GB:,.1f} GB free"
    if facts["inodes_full"]:
        return GROUP.problem(name, f"{room}, but no inode for another file", "delete files: their number is limited")
    if facts["lock_error"]:
        mend = "use a file system with locks (NFS 4, Lustre with -o flock): runs and stores are locked while written"
        return GROUP.problem(name, f"{path}: files cannot be locked: {facts['lock_error']}", mend)
    if needed is not None and facts["free"] < needed:
        mend = "make room, set run.dir elsewhere, or keep less by train.keep_checkpoints, keep_best and keep_every"
        return GROUP.problem(name, f"{room}; checkpoints and the model will take {needed / GB:,.1f} GB", mend)
    if facts["free"] < LITTLE_BYTES:
        return GROUP.warning(name, room, "make room: a checkpoint takes 12 bytes a parameter, and a model 2 or 4")
    takes = f"; checkpoints and the model will take {needed / GB:,.1f} GB" if needed is not None else ""
    return GROUP.ok(name, room + takes)
