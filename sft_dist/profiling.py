"""`--profile`: where the time of a few steps goes."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch


@contextlib.contextmanager
def profiled_steps(directory: Path, *, enabled: bool) -> Iterator["torch.profiler.profile | None"]:
    """Profile steps 3 to 5 into the directory: a Chrome trace and a table by kernel. None where not enabled."""
    if not enabled:
        yield None
        return
    directory.mkdir(parents=True, exist_ok=True)

    def write(profiler: torch.profiler.profile) -> None:
        profiler.export_chrome_trace(str(directory / "trace.json"))
        key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        (directory / "table.txt").write_text(profiler.key_averages().table(sort_by=key, row_limit=40), encoding="utf-8")

    window = torch.profiler.schedule(wait=1, warmup=1, active=3, repeat=1)
    with torch.profiler.profile(schedule=window, on_trace_ready=write, profile_memory=True) as profiler:
        yield profiler
