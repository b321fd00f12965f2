"""One part after the other, within a limit of time, and what came of each in a JSON file that is whole at any time."""

import contextlib
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from sft_dist.errors import SftDistError


class PartTooLong(RuntimeError):
    """The part's share of the time is used up."""


# Of libraries whose versions are the machine's: one that fails is reported, and the other parts are still measured.
FAILURES = (RuntimeError, ImportError, AttributeError, TypeError, ValueError, OSError, SftDistError)

LEAST_SECONDS = 5.0
"""With less time left a part is not begun."""


class Parts:
    """Results by part. A part is done, does not fit, has failed, or was left out; the last three say why."""

    def __init__(self, path: Path, *, device: torch.device, head: dict[str, Any]) -> None:
        self._path, self._device = path, device
        self.results: dict[str, Any] = {**head, "parts": {}}
        self._write()

    def run(self, name: str, measure: Callable[[], dict[str, Any]], *, until: float) -> dict[str, Any] | None:
        """What `measure` returns, noted as part `name`; None where it came to nothing.

        until: time.monotonic() at which the part is ended.
        """
        left = until - time.monotonic()
        if left < LEAST_SECONDS:
            self.note(name, "left out", reason="no time left")
            return None
        started = time.monotonic()
        found: dict[str, Any] | None = None
        status, reason = "done", None
        try:
            with limited_to(left):
                found = measure()
        except (torch.OutOfMemoryError, MemoryError) as error:
            status, reason = "does not fit", _first_line(error)
        except FAILURES as error:
            status, reason = "failed", _first_line(error)
        # The exception is gone by now, and with it the frames that held tensors of the part.
        release(self._device)
        self.note(name, status, reason=reason, seconds=round(time.monotonic() - started, 2), result=found)
        return found

    def note(self, name: str, status: str, **more: Any) -> None:
        self.results["parts"][name] = {"status": status} | {k: v for k, v in more.items() if v is not None}
        told = [status, more.get("reason"), f"{more['seconds']:.1f} s" if "seconds" in more else None]
        print(f"{name}: {', '.join(filter(None, told))}", file=sys.stderr, flush=True)
        self._write()

    def _write(self) -> None:
        writing = self._path.with_suffix(".writing")
        writing.write_text(json.dumps(self.results, indent=1), encoding="utf-8")
        os.replace(writing, self._path)


@contextlib.contextmanager
def limited_to(seconds: float) -> Iterator[None]:
    """Raise PartTooLong in the block when the time is over; a kernel that runs is waited for."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise PartTooLong(f"not done within {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def release(device: torch.device) -> None:
    """Give back what a part has allocated and compiled."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
