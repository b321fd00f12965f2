"""GPUs, as the driver and as torch see them: free memory, links, why there is none."""

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from shutil import which
from typing import Any

from sft_dist.doctor.finding import Finding, Group
from sft_dist.doctor.probe import Answer, ask
from sft_dist.doctor.topology import link_findings, parse_topology

GROUP = Group("GPUs")
SMI_S = 20.0
FIELDS = ("index", "name", "driver_version", "memory.total", "memory.used", "compute_mode", "mig.mode.current")
BUSY_MB = 1024
"""A driver keeps some hundred MB for itself; more is somebody's."""

INSTALL = "install a build of torch for this driver's CUDA, from PyTorch's own index"


def check_gpus(torch: Answer, *, driver: Path = Path("/dev/nvidiactl")) -> Iterator[Finding]:
    """torch: its answer to `ask_torch`. driver: a file that is there where NVIDIA's driver is loaded."""
    has_driver = driver.exists()
    smi = ask(["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"], timeout_s=SMI_S)
    listed = [] if smi.failure else parse_gpus(smi.out)
    if smi.failure and (has_driver or which("nvidia-smi")):
        yield GROUP.warning(
            "nvidia-smi",
            f"{'a driver is loaded' if has_driver else 'no driver is loaded'}, and nvidia-smi fails: {smi.failure}",
            "a driver that hangs needs a reboot (dmesg names Xid errors); a container needs the NVIDIA runtime",
        )
    yield from gpu_findings(listed)
    if torch.facts:
        yield from torch_gpu_findings(torch.facts, driver_lists=len(listed) if not smi.failure else None)
    if len(listed) > 1:
        topology = ask(["nvidia-smi", "topo", "-m"], timeout_s=SMI_S)
        yield from link_findings(parse_topology(topology.out), GROUP)


def parse_gpus(text: str) -> list[dict[str, str]]:
    """Rows of `nvidia-smi --query-gpu`, by field; rows that are none are passed over."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines())]
    return [dict(zip(FIELDS, row, strict=True)) for row in rows if len(row) == len(FIELDS) and row[0].isdigit()]


def gpu_findings(listed: list[dict[str, str]]) -> Iterator[Finding]:
    """What the driver says of each GPU."""
    for gpu in listed:
        name, label = f"GPU {gpu['index']}", f"{gpu['name']}, driver {gpu['driver_version']}"
        if not (gpu["memory.total"].isdigit() and gpu["memory.used"].isdigit()):
            yield GROUP.note(name, f"{label}; it tells no memory", "nvidia-smi may tell more as root")
            continue
        total, used = int(gpu["memory.total"]), int(gpu["memory.used"])
        memory = f"{(total - used) / 1024:.1f} of {total / 1024:.1f} GiB free"
        if gpu["compute_mode"] == "Prohibited":
            mend = f"nvidia-smi -i {gpu['index']} -c DEFAULT, as root"
            yield GROUP.problem(name, f"{label}; its compute mode is Prohibited: nothing may run on it", mend)
        elif used > BUSY_MB:
            yield GROUP.warning(
                name,
                f"{label}; {memory}: another process holds {used / 1024:.1f} GiB",
                "end it (nvidia-smi lists processes), or leave this GPU out with CUDA_VISIBLE_DEVICES",
            )
        elif gpu["mig.mode.current"] == "Enabled":
            mend = "NCCL does not connect two slices: one process per run; nvidia-smi -mig 0 gives the whole GPU"
            yield GROUP.note(name, f"{label}; MIG is on: a process gets a slice of it", mend)
        else:
            yield GROUP.ok(name, f"{label}; {memory}")


def torch_gpu_findings(facts: Mapping[str, Any], *, driver_lists: int | None) -> Iterator[Finding]:
    """What torch says of the GPUs, against what the driver lists. driver_lists: GPUs; None where it does not answer."""
    for index, device in enumerate(facts["devices"]):
        name = f"torch, GPU {index}"
        if "error" in device:
            mend = "another process may have it for itself, or it needs a reset; nvidia-smi tells"
            yield GROUP.problem(name, f"nothing can be computed on it: {device['error']}", mend)
            continue
        major, minor = device["capability"]
        label = f"{device['name']}, capability {major}.{minor}, {device['free'] / 2**30:.1f} GiB free"
        if facts["archs"] and not has_kernels(facts["archs"], major, minor):
            yield GROUP.problem(name, f"{label}; this torch has kernels for {' '.join(facts['archs'])} only", INSTALL)
        elif (major, minor) < (8, 0):
            mend = "model.dtype: fp32 and model.attention: sdpa run there, slowly"
            yield GROUP.warning(name, f"{label}; bf16 and flash attention need 8.0 (Ampere) or newer", mend)
        else:
            yield GROUP.ok(name, label)
    if facts["devices"]:
        return
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")
    if hidden and driver_lists:
        return  # the environment's group says so
    if driver_lists:
        seen = f"the driver lists {driver_lists}, and torch sees none: {facts['why_not']}"
        yield GROUP.problem("torch", seen, INSTALL)
    else:
        yield GROUP.note(
            "torch",
            f"no GPU: {facts['why_not'] or 'the driver shows none'}",
            "a run computes on the CPU, in fp32; on a cluster, ask inside a job that has GPUs",
        )


def has_kernels(archs: Sequence[str], major: int, minor: int) -> bool:
    """True where a build for these architectures runs on a GPU of this capability.

    Machine code (sm_80) runs on later minors of its major; intermediate code (compute_80) on everything later.
    """
    for arch in archs:
        kind, _, digits = arch.rstrip("af").partition("_")  # sm_90a: Hopper's own instructions
        if not digits.isdigit():
            continue
        built = divmod(int(digits), 10)
        if built <= (major, minor) and (kind == "compute" or built[0] == major):
            return True
    return False
