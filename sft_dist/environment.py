"""On what a start of a run computes, and how it was called: noted in run.json, for whoever reads its figures later."""

import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sft_dist.peaks import peak_flops
from sft_dist.redact import redacted
from sft_dist.world import World, launcher_name, num_cores


def describe_environment(
    *,
    device: str,
    device_name: str,
    world: World,
    settings: Mapping[str, str],
    argv: Sequence[str] = sys.argv,
    environ: Mapping[str, str] = os.environ,
) -> dict[str, Any]:
    """The environment as plain data, secrets taken out.

    device: its type. device_name: of the GPU; empty on a CPU, whose name the system tells. settings: what was chosen
    for this start, by name: engine, dtype, attention.
    Every process is taken to have a device such as this one's; peak_flops is of one of them, None where not known.
    """
    return {
        "device": device,
        "device_name": device_name or cpu_name(),
        "peak_flops": peak_flops(device_name) if device == "cuda" else None,
        "world_size": world.size,
        "hosts": max(1, world.size // world.local_size),
        "cores": num_cores(),
        **settings,
        "launcher": launcher_name(environ),
        "command": redacted(shlex.join(["sft-dist", *argv[1:]])),
        "system": platform.platform(),
    }


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """As the kernel tells it; the architecture where it does not."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.machine()


def all_peak_flops(start: Mapping[str, Any]) -> float | None:
    """Dense bf16 FLOP/s of all devices of a start, by what run.json says of it; None where it does not know."""
    environment = start.get("environment") or {}
    peak, world_size = environment.get("peak_flops"), environment.get("world_size")
    return peak * world_size if peak and world_size else None
