"""Checkpoints on disk: whole or not there, every byte hashed. Knows files; what is in them, checkpoint.py knows.

    checkpoints/step-00000100/   rank-00000.safetensors ... shapes.json run_state.json manifest.json COMMITTED
    checkpoints/.step-00000100   being written; never read, swept by the next save
    checkpoints/aside-step-...   set aside, because it is broken or because the run went back behind it; never read

A reader trusts a directory only when COMMITTED is there and names the hash of manifest.json, and every file of the
manifest has its size and hash. The newest one is found by looking, never by a pointer.
"""

import hashlib
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import xxhash

from sft_dist.durable import sync, write_durably
from sft_dist.errors import CheckpointError

FORMAT_VERSION = 2
COMMITTED = "COMMITTED"
MANIFEST = "manifest.json"
STATE = "run_state.json"
SLACK_BYTES = 2**20
_NAME = re.compile(r"step-[0-9]+")
NUM_RECENT = 32
"""Losses that the spike guard looks back on."""


@dataclass(frozen=True)
class Segment:
    """Steps drawn from one schedule. after_step: the step before its first; 0 for the first segment."""

    after_step: int
    data_fingerprint: str
    draws: str


@dataclass(frozen=True)
class RunState:
    """Where a run stands: position is one integer. The rest says what the position is in.

    step: last step done, applied or withheld. num_updates: steps applied. curve: what decides the loss curve, by key of
    the recipe. layout, code: what does not decide it, reported when it changed. segments: the last is drawn from now.
    loss: of the step. held_out_loss: of the first set, if measured after this step. best_by: what train.keep_best
    compares instead; best_value: that, after this step, more being better. recent_losses: of the last applied steps.
    """

    step: int
    num_updates: int
    curve: dict[str, Any]
    segments: tuple[Segment, ...]
    layout: dict[str, Any] = field(default_factory=dict)
    code: dict[str, str] = field(default_factory=dict)
    loss: float | None = None
    held_out_loss: float | None = None
    best_by: str | None = None
    best_value: float | None = None
    withheld_in_a_row: int = 0
    recent_losses: tuple[float, ...] = ()

    @property
    def segment(self) -> Segment:
        return self.segments[-1]

    @property
    def merit(self) -> float | None:
        """What the best checkpoints have most of; None if it was not measured after this step."""
        if self.best_by is not None:
            return self.best_value
        return None if self.held_out_loss is None else -self.held_out_loss

    def after(self, loss: float, *, applied: bool) -> "RunState":
        """The state one step later; a withheld step advances too."""
        return replace(
            self,
            step=self.step + 1,
            num_updates=self.num_updates + applied,
            loss=loss if applied else None,
            held_out_loss=None,
            best_value=None,
            withheld_in_a_row=0 if applied else self.withheld_in_a_row + 1,
            recent_losses=(*self.recent_losses, loss)[-NUM_RECENT:] if applied else self.recent_losses,
        )

    @classmethod
    def from_json(cls, text: str) -> "RunState":
        """Raises ValueError, TypeError or KeyError for what is no state."""
        raw = json.loads(text)
        if not isinstance(raw, dict):
            raise TypeError(f"{text[:20]!r} is no object")
        segments = tuple(Segment(**segment) for segment in raw.pop("segments"))
        if not segments:
            raise ValueError("segments is empty")
        counts = {key: raw[key] for key in ("step", "num_updates", "withheld_in_a_row")}
        if wrong := {key: value for key, value in counts.items() if type(value) is not int or value < 0}:
            raise ValueError(f"no count: {wrong}")
        if wrong := {key: raw[key] for key in ("curve", "layout", "code") if not isinstance(raw[key], dict)}:
            raise TypeError(f"no object: {wrong}")
        return cls(**raw | {"segments": segments, "recent_losses": tuple(raw["recent_losses"])})

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)


# ---------------------------------------------------------------- commit


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step after which a checkpoint was made."""
    return int(path.name.removeprefix("step-"))


def make_room(directory: Path, step: int, *, size_bytes: int) -> Path:
    """Sweep what earlier saves left half, check the space, and return the directory to write into.

    Raises CheckpointError when less than `size_bytes` are free: the checkpoints before it are needed until it is there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in [*directory.glob(".step-*"), *directory.glob(".old-*")]:
        # What cannot be deleted stops no save: `prune` tells of old ones.
        shutil.rmtree(leftover, ignore_errors=True)
    free = shutil.disk_usage(directory).free
    if free < size_bytes + SLACK_BYTES:
        raise CheckpointError(
            f"{directory}: the checkpoint of step {step} needs {(size_bytes + SLACK_BYTES) / 1e6:,.1f} MB and "
            f"{free / 1e6:,.1f} MB are free; make room: older checkpoints go only after a newer one is whole, "
            f"so delete what you can spare yourself{_spare(directory)}"
        )
    writing = directory / f".{name_of(step)}"
    writing.mkdir()
    return writing


def _spare(directory: Path) -> str:
    older = [path.name for path in committed(directory)[:-1]]
    return f", such as {older[0]}" if older else ""


def read_umask() -> int:
    """The umask, which can only be read by setting it: not in a thread, where others make files meanwhile."""
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


def flush(files: list[Path], *, umask: int) -> dict[str, dict[str, Any]]:
    """Bring files to the disk with the modes that the umask allows; their names, sizes and hashes."""
    for file in files:
        file.chmod(0o666 & ~umask)  # safetensors writes 0600
        sync(file)
    return {file.name: _describe(file) for file in files}


def commit(writing: Path, manifest: Mapping[str, Any]) -> Path:
    """Make a directory whose files are all on the disk a checkpoint. One process does this, once."""
    text = json.dumps({"version": FORMAT_VERSION, "files": manifest}, indent=2)
    write_durably(writing / MANIFEST, text)
    write_durably(writing / COMMITTED, xxhash.xxh3_128_hexdigest(text.encode()) + "\n")
    sync(writing)
    final = writing.with_name(writing.name.removeprefix("."))
    if final.exists():  # broken, or from before the run went back behind it
        final.rename(final.with_name(f".old-{final.name}"))
    writing.rename(final)  # this is the commit
    sync(final.parent)
    return final


def prune(directory: Path, *, keep: int, keep_every: int | None, keep_best: int) -> list[str]:
    """Delete what need not be kept, after a newer commit. Returns what could not be deleted: no reason to stop.

    keep: the newest so many. keep_every: those at multiples of it. keep_best: those with the most merit among those of
    the newest one's curve, and by its measure.
    """
    every = committed(directory)
    keeping = set(every[-keep:]) | {path for path in every if keep_every and step_of(path) % keep_every == 0}
    if keep_best:
        states = {path: state for path in every if (state := _state_or_none(path)) is not None}
        newest = list(states.values())[-1:]
        measured = [
            (-state.merit, state.step, path)
            for path, state in states.items()
            if state.merit is not None
            and math.isfinite(state.merit)
            and [(state.curve, state.segments, state.best_by)]
            == [(last.curve, last.segments, last.best_by) for last in newest]
        ]
        keeping |= {path for *_, path in sorted(measured)[:keep_best]}
    failed = []
    for path in [*(p for p in every if p not in keeping), *directory.glob(".old-*")]:
        try:
            if not path.name.startswith("."):
                # Half deleted, it must not look committed.
                path = path.rename(path.with_name(f".old-{path.name}"))
            shutil.rmtree(path)
        except OSError as error:
            failed.append(f"{path}: {error.strerror or error}")
    return failed


def set_aside(path: Path) -> Path:
    """Take a checkpoint out of the row without deleting it. Returns its new place."""
    target = path.with_name(f"aside-{path.name}")
    number = 1
    while target.exists():
        number += 1
        target = path.with_name(f"aside-{path.name}.{number}")
    path.rename(target)
    sync(path.parent)
    return target


# ---------------------------------------------------------------- read


def committed(directory: Path) -> list[Path]:
    """Checkpoints that say they are committed, oldest first."""
    return [path for path in steps(directory) if (path / COMMITTED).exists()]


def steps(directory: Path) -> list[Path]:
    """Whatever is named like a checkpoint, oldest first: also what has lost its COMMITTED."""
    found = [path for path in directory.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def read_state(path: Path) -> RunState:
    """The state in a checkpoint whose manifest is sound; its other files are not looked at (`verify` does).

    Raises CheckpointError naming the file.
    """
    manifest = _manifest(path)
    _verify_file(path / STATE, manifest.get(STATE))
    try:
        return RunState.from_json((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path / STATE}: is no state of this version: {error}") from None


def verify(path: Path, *, part: int = 0, num_parts: int = 1) -> None:
    """Compare size and hash of every file with the manifest, or of every `num_parts`-th: ranks share the reading.

    Raises CheckpointError naming the first file that is not what was committed.
    """
    files = sorted(_manifest(path).items())
    for name, expected in files[part::num_parts]:
        _verify_file(path / name, expected)


def named_files(path: Path) -> list[Path]:
    """The files that the manifest names, sorted: nobody has verified others. Raises CheckpointError."""
    return [path / name for name in sorted(_manifest(path))]


def require_trusted(path: Path) -> None:
    """Refuse a checkpoint that somebody else made or can change. Raises CheckpointError.

    Nothing in a checkpoint is ever unpickled; but whoever can write it decides what is trained on from here.
    """
    for file in (path, *sorted(path.iterdir())):
        info = file.lstat()
        if stat.S_ISLNK(info.st_mode):
            raise CheckpointError(f"{file}: is a link; put what it points to in its place, or set the checkpoint aside")
        if info.st_uid not in (os.getuid(), 0):
            raise CheckpointError(
                f"{file}: belongs to another user (uid {info.st_uid}); --trust-checkpoint goes on from it nevertheless"
            )
        if info.st_mode & stat.S_IWOTH:
            raise CheckpointError(
                f"{file}: everybody may write it; take that right away, or --trust-checkpoint goes on nevertheless"
            )


@dataclass(frozen=True)
class Listed:
    """A line of `sft-dist checkpoints`. verdict: "good", or what is wrong."""

    path: Path
    step: int | None
    size_bytes: int
    state: RunState | None
    verdict: str

    @property
    def is_good(self) -> bool:
        return self.verdict == "good"


def list_checkpoints(directory: Path) -> Iterator[Listed]:
    """Every checkpoint, oldest first, verified byte by byte; then what is half written or was set aside."""
    for path in steps(directory):
        state, verdict = None, "good"
        try:
            state = read_state(path)
            verify(path)
        except CheckpointError as error:
            verdict = str(error).removeprefix(f"{path}").lstrip("/: ")
        yield Listed(path, step_of(path), _size(path), state, verdict)
    for path in sorted(directory.glob("aside-step-*")):
        yield Listed(path, None, _size(path), None, "set aside; not used")
    for path in sorted(directory.glob(".step-*")):
        yield Listed(path, None, _size(path), None, "not committed: being written, or left by a crash")


def _manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Name, size and hash of each file. Raises CheckpointError when it is not the one that was committed."""
    try:
        digest = (path / COMMITTED).read_text(encoding="utf-8").strip()
        text = (path / MANIFEST).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: not a committed checkpoint: {Path(error.filename).name} is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if xxhash.xxh3_128_hexdigest(text.encode()) != digest:
        raise CheckpointError(f"{path / MANIFEST}: is not what was committed: COMMITTED names another hash")
    try:
        manifest = json.loads(text)
        version, files = manifest["version"], dict[str, dict[str, Any]](manifest["files"].items())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST}: is no manifest: {error}") from None
    if version != FORMAT_VERSION:
        _refuse_format(path, version)
    for name in files:
        if Path(name).name != name:
            raise CheckpointError(f"{path / MANIFEST}: names {name!r}, a file outside of the checkpoint")
    return files


def _refuse_format(path: Path, version: object) -> NoReturn:
    raise CheckpointError(
        f"{path}: a checkpoint of format {version}, this version reads format {FORMAT_VERSION}; "
        "finish the run with the version that began it"
    )


def _verify_file(file: Path, expected: dict[str, Any] | None) -> None:
    try:
        found = _describe(file)
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}, and the manifest names it") from None
    if found != expected:
        raise CheckpointError(f"{file}: is {found}, the manifest says {expected}")


def _describe(file: Path) -> dict[str, Any]:
    with file.open("rb") as handle:
        digest = hashlib.file_digest(handle, xxhash.xxh3_128)
    return {"size_bytes": file.stat().st_size, "xxh3": digest.hexdigest()}


def _state_or_none(path: Path) -> RunState | None:
    try:
        return read_state(path)
    except CheckpointError:
        return None


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
