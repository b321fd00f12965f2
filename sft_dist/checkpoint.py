"""Checkpoints that are whole or do not exist, and the state of a run.

    checkpoints/step-00000100/   state files of the engine, run_state.json, manifest.json, COMMITTED
    checkpoints/.step-00000100   being written; never read, removed by the next commit

A reader trusts a directory only when COMMITTED is there and every file of the manifest has its size and hash.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError

from sft_dist.config import Recipe
from sft_dist.durable import sync
from sft_dist.engine.collectives import barrier, on_main
from sft_dist.engine.interface import Engine
from sft_dist.errors import CheckpointError

FORMAT_VERSION = 1


@dataclass(frozen=True)
class RunState:
    """Where a run stands: position is one integer. The rest says what the position is in.

    step: last step done, applied or withheld. curve: what decides the loss curve (`curve_of`).
    """

    step: int
    data_fingerprint: str
    curve: dict[str, Any]
    engine: str
    world_size: int

    def next(self) -> "RunState":
        return replace(self, step=self.step + 1)


def curve_of(recipe: Recipe, *, num_steps: int, dtype: str, draws: str) -> dict[str, Any]:
    """What decides the curve, by key of the recipe. Launch, packing, engine and cadence are not among them.

    draws: fingerprint of the draws and steps.
    """
    dump = recipe.model_dump(mode="json")
    keys = {
        "run.seed": dump["run"]["seed"],
        "model.path": dump["model"]["path"],
        "model.revision": dump["model"]["revision"],
        "model.dtype": dtype,
        "batch.examples": dump["batch"]["examples"],
        "batch.tokens": dump["batch"]["tokens"],
        "loss": dump["loss"],
        "train.steps": num_steps,
        "data.train.weight": [source["weight"] for source in dump["data"]["train"]],
        "data.train.cap": [source["cap"] for source in dump["data"]["train"]],
        "data.order": dump["data"]["order"],
        "data.held_out_share": dump["data"]["held_out_share"],
        # Without a share the seed decides nothing.
        "data.held_out_seed": dump["data"]["held_out_seed"] if dump["data"]["held_out_share"] else None,
        "draws": draws,
    }
    return keys | {f"optim.{key}": value for key, value in dump["optim"].items()}


def commit(engine: Engine, state: RunState, directory: Path, *, keep: int) -> Path:
    """Write a checkpoint of every rank's state and make it the newest; then delete all but `keep`.

    Raises CheckpointError when a rank could not write; the checkpoints before it are untouched.
    """
    final = directory / f"step-{state.step:08d}"
    writing = directory / f".{final.name}"

    def make_room() -> None:
        for stale in [*directory.glob(".step-*"), final]:
            if stale.exists():
                shutil.rmtree(stale)
        writing.mkdir(parents=True)

    def seal_and_commit() -> None:
        _seal(writing, state)
        writing.rename(final)
        _write_durably(final / "COMMITTED", f"{FORMAT_VERSION}\n")
        sync(directory)
        for old in committed(directory)[:-keep]:
            shutil.rmtree(old)

    try:
        on_main(make_room, world=engine.world, device=engine.device)
        engine.save(writing)
        barrier(engine.device)
        on_main(seal_and_commit, world=engine.world, device=engine.device)
    # safetensors and torch have their own words for a full disk
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{writing}: could not be written: {error}; the checkpoints before it are untouched"
        ) from None
    return final


def committed(directory: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    return [path for path in sorted(directory.glob("step-*")) if is_committed(path)]


def step_of(path: Path) -> int:
    """The step after which a checkpoint was made."""
    return int(path.name.removeprefix("step-"))


def is_committed(path: Path) -> bool:
    return (path / "COMMITTED").is_file()


def read_state(path: Path) -> RunState:
    """Verify a checkpoint, every byte of it, and return its state. Raises CheckpointError naming the file."""
    if not is_committed(path):
        raise CheckpointError(
            f"{path}: not a committed checkpoint; choose one of {[p.name for p in committed(path.parent)]}"
        )
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        for name, expected in manifest.items():
            found = _describe(path / name)
            if found != expected:
                raise CheckpointError(
                    f"{path / name}: is {found}, the manifest says {expected}; "
                    f"delete {path} to go on from an older checkpoint"
                )
        return RunState(**json.loads((path / "run_state.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: broken: {error}; delete it to go on from an older checkpoint") from None


def require_same_run(found: RunState, expected: RunState, path: Path) -> None:
    """Refuse to go on from a checkpoint whose continuation would not be this run's curve. Names every key."""
    changed = [
        f"{key}: {found.curve.get(key)!r} then, {expected.curve.get(key)!r} now"
        for key in {**found.curve, **expected.curve}
        if found.curve.get(key) != expected.curve.get(key)
    ]
    for key in ("data_fingerprint", "engine", "world_size"):
        then, now = getattr(found, key), getattr(expected, key)
        if then != now:
            changed.append(f"{key}: {then!r} then, {now!r} now")
    if changed:
        raise CheckpointError(
            f"{path} belongs to another run: {'; '.join(changed)}. "
            "Put it back as it was, or give the run a new run.name"
        )


def _seal(directory: Path, state: RunState) -> None:
    _write_durably(directory / "run_state.json", json.dumps(asdict(state), indent=2))
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    umask = os.umask(0)
    os.umask(umask)
    for file in files:
        file.chmod(0o666 & ~umask)  # torch.save and safetensors disagree about modes
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    manifest = {str(file.relative_to(directory)): _describe(file) for file in files}
    _write_durably(directory / "manifest.json", json.dumps(manifest, indent=2))
    sync(directory)


def _describe(file: Path) -> dict[str, Any]:
    digest = xxhash.xxh3_128()
    with file.open("rb") as handle:
        while block := handle.read(2**24):
            digest.update(block)
    return {"size_bytes": file.stat().st_size, "xxh3": digest.hexdigest()}


def _write_durably(file: Path, text: str) -> None:
    with file.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
