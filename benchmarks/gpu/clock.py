"""Seconds of work on a device: CUDA events there, the wall clock on a CPU; and the syncs of a step."""

import contextlib
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

LEAST_S = {"cuda": 0.02, "cpu": 0.002}
"""A kernel is repeated for this long, three times."""

MOST_CALLS = 200


class Clock:
    """A stretch of work. It waits for the device where it starts and where it stops, and nowhere between."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"

    def start(self) -> None:
        if self._on_cuda:
            self._began, self._ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            self._began.record()
        else:
            self._started = time.perf_counter()

    def stop(self) -> float:
        if not self._on_cuda:
            return time.perf_counter() - self._started
        self._ended.record()
        torch.cuda.synchronize()
        return float(self._began.elapsed_time(self._ended)) / 1e3


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: the median of three stretches of repeated calls, after two to warm up."""
    clock = Clock(device)
    call()
    clock.start()
    call()
    num_calls = min(MOST_CALLS, 1 + int(LEAST_S[device.type] / max(clock.stop(), 1e-6)))
    stretches = []
    for _ in range(3):
        clock.start()
        for _ in range(num_calls):
            call()
        stretches.append(clock.stop() / num_calls)
    return sorted(stretches)[1]


class Region:
    """The steps of one side, told where each ends: warm-up, the last of which is searched for syncs, then the timed."""

    def __init__(self, device: torch.device, *, warmup: int, timed: int) -> None:
        self._device, self._clock = device, Clock(device)
        self._warmup, self._last = warmup, warmup + timed
        self._watched = contextlib.ExitStack()
        self._caught: list[warnings.WarningMessage] = []
        self.seconds = 0.0
        self.syncs: dict[str, int] | None = None
        """Host syncs of one step by file and line; None on a CPU, which has none."""

    def step_ended(self, step: int) -> None:
        """step: 1-based."""
        if step == self._warmup - 1:
            self._caught = self._watched.enter_context(syncs_as_warnings(self._device))
        if step == self._warmup:
            self._watched.close()
            self.syncs = sites_of_syncs(self._caught) if self._device.type == "cuda" else None
            self._clock.start()
        if step == self._last:
            self.seconds = self._clock.stop()

    def close(self) -> None:
        """Undo what a side that failed in the middle left set."""
        self._watched.close()


@contextlib.contextmanager
def syncs_as_warnings(device: torch.device) -> Iterator[list[warnings.WarningMessage]]:
    """Collects the warnings of a block; on CUDA each operation that waits for the device is one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield caught
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


def sites_of_syncs(caught: list[warnings.WarningMessage]) -> dict[str, int]:
    """Warnings of the sync debug mode by the Python line that they name."""
    found = [w for w in caught if "synchronizing" in str(w.message)]
    return dict(Counter(f"{Path(w.filename).name}:{w.lineno}" for w in found))
