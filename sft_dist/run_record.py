"""run.json: every start of a run, where it went on from, and what had changed."""

import json
import socket
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import xxhash

from sft_dist.commits import RunState
from sft_dist.durable import replace_durably
from sft_dist.errors import CheckpointError
from sft_dist.redact import redacted
from sft_dist.run_files import CHECKPOINTS, CONFIG, INTERRUPTED, RUN_JSON, STOP_FILE


def read_starts(run_dir: Path) -> list[dict[str, Any]]:
    """What each start noted, oldest first; none for a fresh run. Raises CheckpointError for a damaged file."""
    path = run_dir / RUN_JSON
    if not path.exists():
        return []
    try:
        starts = json.loads(path.read_text(encoding="utf-8"))["starts"]
        if any(type(start["after_step"]) is not int for start in starts):
            raise TypeError("after_step is no whole number")
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path}: is not the record of a run's starts any more ({type(error).__name__}: {error}); "
            "put it back from a copy, or move it away: checkpoints do not need it"
        ) from None
    return list(starts)


def record_start(
    run_dir: Path,
    state: RunState,
    *,
    num_steps: int,
    came_from: Path | None,
    asked: str | None,
    changed: list[str],
    config: str,
    earlier_reason: str = "",
) -> tuple[int, bool]:
    """Add a start, beside the resolved recipe `config`. Returns its attempt, from 1, and whether a new curve begins.

    num_steps: of the whole run. came_from: the checkpoint. asked: what --resume-from said. earlier_reason: why the
    start before could not go on, if it was not stopped on request. A new curve begins where the settings that decide it
    are not those of the start before.
    """
    starts, curve = read_starts(run_dir), curve_digest(state)
    if starts:
        starts[-1]["ended"] = _stopped_by(run_dir) or earlier_reason or None
    start = {
        "attempt": len(starts) + 1,
        "time": _now(),
        "host": socket.gethostname(),
        "after_step": state.step,
        "num_steps": num_steps,
        "from": _noted(came_from, run_dir) if came_from else None,
        "asked": asked,
        "curve": curve,
        "changed": changed,
        "layout": state.layout,
        "code": state.code,
    }
    segments = [asdict(segment) for segment in state.segments]
    text = json.dumps({"attempts": len(starts) + 1, "segments": segments, "starts": [*starts, start]}, indent=2)
    replace_durably(run_dir / RUN_JSON, redacted(text) + "\n")
    replace_durably(run_dir / CONFIG, redacted(config))
    (run_dir / INTERRUPTED).unlink(missing_ok=True)
    return len(starts) + 1, bool(starts) and starts[-1].get("curve") != curve


def amend_start(run_dir: Path, notes: Mapping[str, Any]) -> None:
    """Add what is known by now of the newest start: on what it computes, and what was said before step 1."""
    path = run_dir / RUN_JSON
    record = json.loads(path.read_text(encoding="utf-8"))
    record["starts"][-1] |= notes
    replace_durably(path, redacted(json.dumps(record, indent=2)) + "\n")


def record_end(run_dir: Path, *, interrupted_after: int | None, reason: str) -> None:
    """Take the request to stop away, and say on disk that it was obeyed, if it was: after which step, and why."""
    if interrupted_after is not None:
        note = {"step": interrupted_after, "reason": reason, "time": _now()}
        replace_durably(run_dir / INTERRUPTED, json.dumps(note) + "\n")
    (run_dir / STOP_FILE).unlink(missing_ok=True)


def read_interrupted(run_dir: Path) -> dict[str, Any] | None:
    """After which step the run stopped on request, why and when; None when it did not, or has gone on."""
    try:
        note: dict[str, Any] = json.loads((run_dir / INTERRUPTED).read_text(encoding="utf-8"))
        return note if {"step", "reason", "time"} <= note.keys() else None
    except (OSError, ValueError, AttributeError):  # not there, or not written by a run
        return None


def _noted(checkpoint: Path, run_dir: Path) -> str:
    """The name of a checkpoint of the run itself, which may be moved; the whole path of another's."""
    own = checkpoint.resolve().parent == (run_dir / CHECKPOINTS).resolve()
    return checkpoint.name if own else str(checkpoint.absolute())


def curve_digest(state: RunState) -> str:
    """16 hex digits over what decides the curve."""
    decides = json.dumps([state.curve, [asdict(segment) for segment in state.segments]], sort_keys=True)
    return xxhash.xxh3_64_hexdigest(decides.encode())


def _stopped_by(run_dir: Path) -> str:
    note = read_interrupted(run_dir)
    return f"stopped on request after step {note['step']} ({note['reason']})" if note else ""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
