"""`nvidia-smi topo -m`: how GPUs are linked."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

from sft_dist.doctor.finding import Finding, Group

ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
DEVICE = re.compile(r"(?:GPU|NIC)\d+|mlx\w*|CPU Affinity|NUMA Affinity|GPU NUMA ID")
SLOW = ("NODE", "SYS")
MEANING = {
    "PIX": "one PCIe bridge",
    "PXB": "several PCIe bridges",
    "PHB": "PCIe through the CPU",
    "NODE": "PCIe through bridges of one NUMA node",
    "SYS": "the link between CPU sockets",
}


@dataclass(frozen=True)
class Topology:
    """links: how GPU i reaches GPU j, i < j: NV18 (18 NVLinks), PIX, PXB, PHB, NODE or SYS."""

    num_gpus: int
    links: Mapping[tuple[int, int], str]


def parse_topology(text: str) -> Topology:
    """The matrix at the top of the output. Lines that are none are passed over; no matrix is a topology of no GPUs."""
    lines = ESCAPES.sub("", text).splitlines()
    header = next((line for line in lines if line.lstrip().startswith("GPU0")), "")
    # The header's cells may be separated by tabs or spaces; those of affinities have spaces in them.
    columns = DEVICE.findall(header)
    gpus = [column for column in columns if column.startswith("GPU") and column != "GPU NUMA ID"]
    links = {}
    for line in lines:
        cells = line.split()
        if line == header or not cells or cells[0] not in gpus or len(cells) <= len(gpus):
            continue
        row = int(cells[0].removeprefix("GPU"))
        for column, kind in zip(columns, cells[1:], strict=False):
            if column in gpus and (other := int(column.removeprefix("GPU"))) > row:
                links[row, other] = kind
    return Topology(len(gpus), links)


def link_findings(topology: Topology, group: Group) -> Iterator[Finding]:
    """One finding about all pairs of GPUs; none where there are no pairs."""
    if topology.num_gpus < 2:
        return
    kinds = sorted({topology.links.get(pair, "?") for pair in combinations(range(topology.num_gpus), 2)})
    by_wire = [kind for kind in kinds if kind.startswith("NV")]
    rest = [kind for kind in kinds if kind not in by_wire]
    said = ", ".join(f"{kind} ({MEANING[kind]})" if kind in MEANING else kind for kind in rest)
    if not rest:
        yield group.ok("links", f"NVLink between all pairs of GPUs ({', '.join(by_wire)})")
    elif by_wire:
        pairs = [f"{i}-{j}" for (i, j), kind in sorted(topology.links.items()) if not kind.startswith("NV")]
        yield group.note(
            "links",
            f"NVLink between some pairs, but {said} between GPUs {', '.join(pairs[:6])}{' ...' * (len(pairs) > 6)}",
            "choose GPUs that are linked (CUDA_VISIBLE_DEVICES); a ring is as fast as its slowest link",
        )
    elif any(kind in SLOW for kind in rest):
        yield group.warning(
            "links",
            f"no NVLink; some pairs reach each other over {said}",
            "ddp and zero1 send least; zero3 gathers weights over these links in every micro-batch",
        )
    else:
        yield group.note("links", f"no NVLink; {said}", "ddp, zero1 and zero2 send less than zero3")
