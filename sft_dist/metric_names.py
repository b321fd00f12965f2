"""The one place where metrics get the names under which wandb and TensorBoard show them."""

import math
from collections.abc import Mapping
from typing import Any

GIB = 2**30

STEP_NAMES = {
    "loss": "train/loss",
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "applied": "train/applied",
    "epoch": "train/epoch",
    "examples": "train/examples",
    "tokens": "train/tokens",
    "response_tokens": "train/response_tokens",
    "attempt": "train/attempt",
    "tokens_per_s": "perf/tokens_per_s",
    "seconds": "perf/step_s",
    "flops": "perf/step_flops",
    "pack_fill": "perf/pack_fill",
    "imbalance": "perf/imbalance",
}
"""Fields of a step's line. Memory and MFU, which are in other units than the line's, come beside them."""


def mfu_of(line: Mapping[str, Any], *, peak_flops: float | None) -> float | None:
    """Model FLOPs utilisation of a step's line. peak_flops: of all devices together; None where it is not known."""
    flops, seconds = line.get("flops"), line.get("seconds")
    return flops / seconds / peak_flops if flops and seconds and peak_flops else None


def named_numbers(line: Mapping[str, Any], *, peak_flops: float | None = None) -> dict[str, float]:
    """The finite numbers of a record of metrics.jsonl, by the name under which trackers show them.

    train/*, perf/*, memory/*                   a step
    held_out/<set>/loss, examples, ...          a held-out loss
    score/<set>/<task>                          answers against the truth
    checkpoint/size_gib, stall_s, seconds       a commit
    Records other than steps say the step they belong to as well (`checkpoint/step`): a commit may come when others are
    done, and a tracker that knows rows only puts it into the newest.
    """
    event = line.get("event", "step")
    if event == "step":
        found = _step_numbers(line, peak_flops)
    elif event == "held_out":
        name = f"held_out/{line.get('set', 'held_out')}"
        kept = {key: line.get(key) for key in ("examples", "response_tokens", "seconds", "step")}
        found = {f"{name}/loss": line.get("held_out_loss")} | {f"{name}/{key}": value for key, value in kept.items()}
    elif event == "score":
        name = f"score/{line.get('set', 'held_out')}"
        found = {f"{name}/{line.get('task')}": line.get("score"), f"{name}/step": line.get("step")}
    elif event == "commit":
        found = {f"checkpoint/{key}": line.get(key) for key in ("stall_s", "seconds", "step")}
        found["checkpoint/size_gib"] = _gib(line.get("size_bytes"))
    else:
        found = {f"{event}/step": line.get("step")}
    return {name: +value for name, value in found.items() if _is_finite(value)}


def _step_numbers(line: Mapping[str, Any], peak_flops: float | None) -> dict[str, Any]:
    found = {name: line.get(key) for key, name in STEP_NAMES.items()}
    found["perf/mfu"] = mfu_of(line, peak_flops=peak_flops)
    found["memory/peak_gib"] = _gib(line.get("peak_memory_bytes"))
    found["memory/step_end_gib"] = _gib(line.get("memory_bytes"))
    return found


def _gib(size_bytes: float | None) -> float | None:
    return None if size_bytes is None else size_bytes / GIB


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
