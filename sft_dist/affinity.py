"""Keeps a process on the cores beside its GPU, on hosts with several NUMA nodes."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)


def keep_near_gpu(local_rank: int, *, environ: Mapping[str, str] = os.environ, system: Path = Path("/sys")) -> None:
    """Where accelerate's enable_cpu_affinity asks for it, use only cores of the GPU's NUMA node.

    accelerate sets the variable, and acts on it only in its own Accelerator. Nothing happens where the system does not
    say which node that is, or where none of its cores may be used.
    """
    if environ.get("ACCELERATE_CPU_AFFINITY") != "1" or local_rank >= torch.cuda.device_count():
        return
    gpu: Any = torch.cuda.get_device_properties(local_rank)
    cores = cores_near(f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0", system=system)
    usable = cores & os.sched_getaffinity(0)
    if usable:
        os.sched_setaffinity(0, usable)
    else:
        logger.warning("ACCELERATE_CPU_AFFINITY=1: the system names no usable core beside GPU %d", local_rank)


def cores_near(pci_address: str, *, system: Path) -> set[int]:
    """Cores of the NUMA node of a PCI device; none where the system does not know its node."""
    try:
        node = int((system / "bus/pci/devices" / pci_address / "numa_node").read_text(encoding="ascii"))
        listed = (system / f"devices/system/node/node{node}/cpulist").read_text(encoding="ascii").strip()
    except OSError:  # a virtual machine, or node -1: the device belongs to none
        return set()
    spans = [part.partition("-") for part in listed.split(",") if part]
    return {core for first, _, last in spans for core in range(int(first), int(last or first) + 1)}
