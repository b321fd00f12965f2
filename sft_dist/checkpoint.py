"""Save without stopping the training for longer than a copy takes; choose, restore and reshape.

A save needs no meeting of its own: each rank writes its fragments behind the training, and the reduction that every
step makes anyway counts who is done. When all are, rank 0 commits; when one could not, nobody does.

    step 100  copy to host | write, flush, hash ............ | done
    step 101                 forward ... reduce: 1 of 2 done
    step 102                             forward ... reduce: 2 of 2 done -> rank 0 commits
"""

import contextlib
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from sft_dist import commits
from sft_dist.commits import RunState, Segment
from sft_dist.config import Recipe, TrainSection
from sft_dist.durable import write_durably
from sft_dist.engine.collectives import any_rank, gather_texts, on_main, sum_over_ranks
from sft_dist.engine.fragments import Fragment, Snapshot, read_fragments, require_shapes, share_of, write_fragments
from sft_dist.engine.interface import Engine
from sft_dist.errors import CheckpointError, SftDistError
from sft_dist.plan.memory_parts import CHECKPOINT_BYTES
from sft_dist.redact import redacted_tree

logger = logging.getLogger(__name__)

SHAPES = "shapes.json"
WAIT_S = 5.0
"""Between signs of life while a save is waited for."""


@dataclass(frozen=True)
class Commit:
    """A checkpoint that was committed. stall_s: how long training stood still; seconds: from begin to commit."""

    step: int
    size_bytes: int
    stall_s: float
    seconds: float


@dataclass
class _Pending:
    """A save that is not committed yet. thread: None when the write was not behind."""

    state: RunState
    writing: Path
    began: float
    stall_s: float = 0.0
    thread: threading.Thread | None = None
    failure: str | None = "the write did not come to its end"

    @property
    def is_done(self) -> bool:
        return self.thread is None or not self.thread.is_alive()


class Saver:
    """Makes checkpoints of a run, one at a time. Every rank has one and calls it alike.

    Each step: `flags()` joins the step's reduction, and its sums go to `settle`.
    """

    def __init__(
        self,
        engine: Engine,
        directory: Path,
        *,
        settings: TrainSection,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        """on_progress: called while a save is waited for."""
        self._engine, self._directory, self._settings = engine, directory, settings
        self._on_progress = on_progress
        self._snapshot = Snapshot()
        self._umask = commits.read_umask()
        self._shapes = weight_shapes(engine)
        self._pending: _Pending | None = None
        self._undeleted: set[str] = set()
        self.last_step: int | None = None
        """The last step whose checkpoint this run committed."""

    def start(self, state: RunState) -> Commit | None:
        """Begin a checkpoint. An earlier one that is still being written is waited for; returns its commit.

        Raises CheckpointError when it cannot be begun and train.on_save_error is stop.
        """
        earlier = self.finish()
        began = time.perf_counter()
        size_bytes = CHECKPOINT_BYTES * sum(_numel(shape) for shape in self._shapes.values())

        def make_room() -> Path:
            return commits.make_room(self._directory, state.step, size_bytes=size_bytes)

        world = self._engine.world
        try:
            on_main(make_room, world=world, device=self._engine.device)
        except (OSError, SftDistError) as error:  # ranks above 0 only hear that rank 0 failed
            self._failed(state.step, [str(error)])
            return earlier
        pending = _Pending(state, self._directory / f".{commits.name_of(state.step)}", began)
        fragments = self._engine.fragments()
        if self._engine.is_replicated:
            fragments = share_of(fragments, rank=world.rank, world_size=world.size)
        if self._settings.save_in_background:
            try:
                copies = self._snapshot.of(fragments)
                # A daemon: a run that fails does not wait for a save that nobody will commit.
                pending.thread = threading.Thread(target=self._write, args=(pending, copies), name="save", daemon=True)
                pending.thread.start()
            except (MemoryError, RuntimeError) as error:  # all ranks learn of it as of a write that failed
                pending.failure = f"no host memory for the copy ({error}); set train.save_in_background: false"
        else:
            self._write(pending, fragments)
        pending.stall_s = time.perf_counter() - began
        self._pending = pending
        return earlier

    def flags(self) -> list[float]:
        """[written, failed] of this rank, to be summed over all ranks."""
        pending = self._pending
        if pending is None or not pending.is_done:
            return [0.0, 0.0]
        return [float(pending.failure is None), float(pending.failure is not None)]

    def settle(self, num_written: float, num_failed: float) -> Commit | None:
        """Commit or drop the checkpoint once every rank is done with it. Collective then, and only then.

        Raises CheckpointError when a rank could not write and train.on_save_error is stop.
        """
        pending, world = self._pending, self._engine.world
        if pending is None or num_written + num_failed < world.size:
            return None
        self._pending = None
        if num_failed:
            self._drop(pending)
            self._failed(pending.state.step, gather_texts(pending.failure or "", world=world))
            return None
        settling = time.perf_counter()

        def seal() -> int:
            manifest: dict[str, Any] = {}
            for rank in range(world.size):
                manifest |= json.loads(_part(pending.writing, rank, "json").read_text(encoding="utf-8"))
            for rank in range(world.size):
                _part(pending.writing, rank, "json").unlink()
            final = commits.commit(pending.writing, manifest)
            settings = self._settings
            failed = commits.prune(
                self._directory,
                keep=settings.keep_checkpoints,
                keep_every=settings.keep_every,
                keep_best=settings.keep_best,
            )
            for text in failed:
                if text not in self._undeleted:
                    logger.warning("an old checkpoint could not be deleted: %s", text)
            self._undeleted.update(failed)
            logger.info("committed %s", final)
            return sum(entry["size_bytes"] for entry in manifest.values())

        try:
            size_bytes = on_main(seal, world=world, device=self._engine.device)
        except (OSError, SftDistError) as error:
            self._drop(pending)
            self._failed(pending.state.step, [str(error)])
            return None
        self.last_step = pending.state.step
        now = time.perf_counter()
        stall_s = pending.stall_s + now - settling
        return Commit(pending.state.step, size_bytes or 0, stall_s, now - pending.began)

    def finish(self) -> Commit | None:
        """Wait for the checkpoint that is being written, and commit it."""
        if self._pending is None:
            return None
        waiting, written = time.perf_counter(), _blocks(self._pending.writing)
        while not self._pending.is_done:
            assert self._pending.thread is not None
            self._pending.thread.join(WAIT_S)
            # A slow disk may take its time, one that does not answer is a hang.
            if (now := _blocks(self._pending.writing)) != written:
                written = now
                self._on_progress()
        sums = sum_over_ranks(torch.tensor(self.flags(), device=self._engine.device)).tolist()
        self._pending.stall_s += time.perf_counter() - waiting
        return self.settle(*sums)

    def _write(self, pending: _Pending, fragments: Sequence[Fragment]) -> None:
        """Write this rank's part; what goes wrong is kept for the agreement of all ranks."""
        rank = self._engine.world.rank
        try:
            files = [_part(pending.writing, rank, "safetensors")]
            write_fragments(fragments, files[0])
            if rank == 0:
                files += [pending.writing / SHAPES, pending.writing / commits.STATE]
                files[1].write_text(json.dumps(self._shapes), encoding="utf-8")
                files[2].write_text(pending.state.to_json(), encoding="utf-8")
            manifest = json.dumps(commits.flush(files, umask=self._umask))
            write_durably(_part(pending.writing, rank, "json"), manifest)
            pending.failure = None
        # safetensors and torch have their own words for a full disk
        except (OSError, RuntimeError, SafetensorError) as error:
            pending.failure = str(error) or type(error).__name__

    def _drop(self, pending: _Pending) -> None:
        """Give back the space of a save that failed: its lack may be why."""
        if self._engine.world.is_main:
            shutil.rmtree(pending.writing, ignore_errors=True)

    def _failed(self, step: int, failures: Sequence[str]) -> None:
        said = "; ".join(dict.fromkeys(f"rank {rank}: {text}" for rank, text in enumerate(failures) if text))
        message = f"the checkpoint of step {step} could not be written: {said}; the checkpoints before it are untouched"
        if self._settings.on_save_error == "stop":
            raise CheckpointError(message)
        logger.warning("%s; the run goes on (train.on_save_error: go_on)", message)


def weight_shapes(engine: Engine) -> dict[str, list[int]]:
    """Shape of every trained weight, whoever holds it."""
    named = engine.model.causal_lm.named_parameters()
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in named if p.requires_grad}


def restore(engine: Engine, path: Path, state: RunState) -> None:
    """Put the state of a verified checkpoint into the engine, whatever engine and world wrote it. Collective.

    Raises CheckpointError, on every rank, for another model or a weight or moment that is missing.
    """
    failure = ""
    try:
        shapes = json.loads((path / SHAPES).read_text(encoding="utf-8"))
        if not isinstance(shapes, dict):
            raise ValueError("is no object")
        require_shapes(shapes, weight_shapes(engine))
        files = [file for file in commits.named_files(path) if file.suffix == ".safetensors"]
        read_fragments(engine.fragments(), files)
    except (OSError, ValueError) as error:
        failure = f"{path / SHAPES}: {error}"
    except CheckpointError as error:
        failure = str(error)
    _raise_together(failure, engine, path)
    engine.restored(state.num_updates)


def find_good(
    engine: Engine, candidates: Sequence[Path], *, may_fall_back: bool, trust: bool = False
) -> tuple[Path, RunState, list[str]]:
    """The newest checkpoint of which every byte is right, its state, and what was wrong with newer ones. Collective.

    candidates: newest first. may_fall_back: False when the user named it. trust: whoever owns it.
    Raises CheckpointError when none is left.
    """
    world = engine.world
    wrong: list[str] = []
    for path in candidates:
        failure, state = "", None
        try:
            if not trust:
                commits.require_trusted(path)
            state = commits.read_state(path)
            commits.verify(path, part=world.rank, num_parts=world.size)
        except CheckpointError as error:
            failure = str(error)
        if not any_rank(bool(failure), engine.device):
            assert state is not None
            return path, state, wrong
        wrong.append(next(text for text in gather_texts(failure, world=world) if text))
        if not may_fall_back:
            break
    raise CheckpointError(
        f"no checkpoint can be gone on from: {'; '.join(wrong)}. "
        + (
            "Restore one from a backup, or begin again under another run.name"
            if may_fall_back
            else "Leave --resume-from out to take the newest good one"
        )
    )


def curve_of(recipe: Recipe, *, dtype: str, model: str) -> dict[str, Any]:
    """What decides the curve beside the draws, by key of the recipe. Launch, packing, engine and cadence do not.

    model: a digest of the model's config. Where the model lies does not matter: its weights are in the checkpoint.
    """
    found = {"model.dtype": dtype, "model's config": model}
    return {key: value for key, value in _settings(recipe).items() if _decides_the_curve(key)} | found


def layout_of(recipe: Recipe, **found: Any) -> dict[str, Any]:
    """What does not decide the curve: the other keys of the recipe, and what was found on this machine."""
    place = ("run.name", "run.dir", "run.report", "model.dtype")
    others = {key: value for key, value in _settings(recipe).items() if not _decides_the_curve(key)}
    return {key: value for key, value in others.items() if key not in place} | found


CURVE_KEYS = {
    "loss",
    "train.steps",
    "train.epochs",
    "train.spike_guard",
    "run.seed",
    "batch.examples",
    "batch.tokens",
    "data.train.weight",
    "data.train.cap",
    "data.order",
    "data.held_out_share",
    "data.held_out_seed",
    "data.turns",
    "data.control_tokens",
    "data.max_tokens",
    "data.too_long",
    "data.bad_rows",
}


def _decides_the_curve(key: str) -> bool:
    return key in CURVE_KEYS or key.startswith("optim.")


def _settings(recipe: Recipe) -> dict[str, Any]:
    """The recipe as `section.key: value`, secrets taken out; a source's keys are lists over the sources."""
    dump = redacted_tree(recipe.model_dump(mode="json"))
    flat: dict[str, Any] = {}
    for section, values in dump.items():
        flat |= (
            {f"{section}.{key}": value for key, value in values.items()}
            if isinstance(values, dict)
            else {section: values}
        )
    held_out = {f"data.held_out.{name}": sources for name, sources in flat.pop("data.held_out").items()}
    for part, sources in {"data.train": flat.pop("data.train"), **held_out}.items():
        flat |= {f"{part}.{key}": [source[key] for source in sources] for key in (sources[0] if sources else ())}
    flat["train.epochs"] = flat["train.epochs"] or 1  # what is meant where nothing is said; nothing beside train.steps
    if not flat["data.held_out_share"]:
        flat["data.held_out_seed"] = None  # without a share it decides nothing
    return flat


@dataclass(frozen=True)
class Changes:
    """What is different from when a checkpoint was made, as `key: then -> now`. curve: what changes the loss curve."""

    curve: tuple[str, ...]
    other: tuple[str, ...]
    new_draws: bool


@dataclass(frozen=True)
class Continuation:
    """What a run goes on from, and what is to be said of it."""

    path: Path
    step: int
    warnings: tuple[str, ...]
    changes: Changes


def changes_since(found: RunState, now: RunState) -> Changes:
    """Compare a checkpoint's state with this run's, key by key."""
    segments = [{"data": state.segment.data_fingerprint, "draws": state.segment.draws} for state in (found, now)]
    return Changes(
        curve=(*_differences(found.curve, now.curve), *_differences(*segments)),
        other=(*_differences(found.layout, now.layout), *_differences(found.code, now.code)),
        new_draws=segments[0] != segments[1],
    )


def continued(found: RunState, now: RunState, *, allow_change: bool, path: Path) -> RunState:
    """The state to go on with: position and history of `found`, settings of `now`. Changed draws begin a new segment.

    Raises CheckpointError, naming every key, when the curve would change and that was not allowed.
    """
    changes = changes_since(found, now)
    if changes.curve and not allow_change:
        raise CheckpointError(
            f"{path} was made under other settings: {'; '.join(changes.curve)}. Put them back as they were, give the "
            "run a new run.name, or go on with --allow-change: weights, moments and step are kept, the curve is another"
        )
    segments = found.segments
    if changes.new_draws:
        segments = (*segments, replace(now.segment, after_step=found.step))
    here = replace(found, curve=now.curve, layout=now.layout, code=now.code, segments=segments, best_by=now.best_by)
    # Losses of another curve are no measure of a spike, and what it withheld does not count against this one.
    return replace(here, recent_losses=(), withheld_in_a_row=0) if changes.curve else here


def first_state(
    *,
    curve: dict[str, Any],
    segment: Segment,
    layout: dict[str, Any],
    code: dict[str, str],
    best_by: str | None = None,
) -> RunState:
    """The state before step 1."""
    return RunState(step=0, num_updates=0, curve=curve, segments=(segment,), layout=layout, code=code, best_by=best_by)


def _differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        f"{key}: {then.get(key)!r} then, {now.get(key)!r} now"
        for key in {**then, **now}
        if then.get(key) != now.get(key)
    ]


def _raise_together(failure: str, engine: Engine, path: Path) -> None:
    """Raise CheckpointError on every rank when one has a failure."""
    if any_rank(bool(failure), engine.device):
        said = next(text for text in gather_texts(failure, world=engine.world) if text)
        raise CheckpointError(f"{path} cannot be gone on from: {said}; --resume-from names another")


def _part(directory: Path, rank: int, kind: str) -> Path:
    """A rank's file: its fragments (safetensors), or, while the checkpoint is written, what it wrote (json)."""
    return directory / f"rank-{rank:05d}.{kind}"


def _blocks(directory: Path) -> int:
    """Disk blocks that the files of a directory take: they grow while something is written."""
    total = 0
    for file in directory.glob("*"):
        with contextlib.suppress(FileNotFoundError):  # safetensors writes under another name, and renames
            total += file.stat().st_blocks
    return total


def _numel(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())
