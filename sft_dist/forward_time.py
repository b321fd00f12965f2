"""How long a rank computes by itself: in its forward passes it does not wait for the others, in most else it does."""

import contextlib
import time
from collections import deque
from collections.abc import Iterator

import torch

NUM_STEPS = 20
"""The newest steps that the mean is of."""

LEAST_STEPS = 3
"""Fewer say nothing. The first of all is never one of them: it warms up."""


class ForwardTime:
    """Seconds a step in this rank's own forward passes.

    On CUDA it waits for nothing: events around each pass, read after the host has read the loss of the step, which is
    behind them in the stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0
        self._steps: deque[float] = deque(maxlen=NUM_STEPS)
        self._is_warm = False

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """One forward pass."""
        if self._on_cuda:
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began.record()
            yield
            ended.record()
            self._events.append((began, ended))
        else:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started

    def end_step(self) -> float:
        """Mean over the newest steps; 0.0 until there are enough. Call it when the loss of the step has been read."""
        seconds = self._seconds + sum(began.elapsed_time(ended) for began, ended in self._events) / 1e3
        self._events, self._seconds = [], 0.0
        if self._is_warm:
            self._steps.append(seconds)
        self._is_warm = True
        return sum(self._steps) / len(self._steps) if len(self._steps) >= LEAST_STEPS else 0.0
