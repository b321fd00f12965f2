"""The machine that is planned for: what the user says of it, or this one. Without torch in this process."""

import re
from dataclasses import dataclass

import psutil  # type: ignore[import-untyped]

from sft_dist.engine_choice import USABLE_SHARE
from sft_dist.errors import ConfigError
from sft_dist.machine import look_for_gpus

CARDS = {
    "H100": 80,
    "H200": 141,
    "B200": 180,
    "A100": 80,
    "A100-40GB": 40,
    "L40S": 45,
    "L40": 45,
    "A30": 24,
    "A10": 22,
    "L4": 22,
    "RTX 5090": 32,
    "RTX 4090": 24,
    "RTX 3090": 24,
}
"""Memory that may be used, in GB of 10^9 bytes: what a card is sold by, or less where ECC takes of it."""

_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*(GB|GiB)", re.IGNORECASE)

HOST_SHARE = 0.95
"""Of this machine's memory, when it trains on its CPU: the rest is the system's."""


@dataclass(frozen=True)
class Machine:
    """What is trained on, so many processes on each node, each with memory of its own.

    memory_bytes: that may be used. device: cuda or cpu. card: a GPU's name, where it is known. source: where this was
    found. host_bytes: of a node.
    """

    nodes: int
    per_node: int
    memory_bytes: int
    device: str
    card: str | None
    source: str
    host_bytes: int | None = None

    @property
    def num_processes(self) -> int:
        return self.nodes * self.per_node

    def __str__(self) -> str:
        memory = f"{self.memory_bytes / 1e9:.0f} GB"
        if self.device == "cpu":
            return f"CPU, {self.per_node} process{'es' * (self.per_node > 1)} with {memory}"
        nodes = f"{self.nodes} nodes of " if self.nodes > 1 else ""
        return f"{nodes}{self.per_node} x {self.card or 'GPU'} with {memory}"


def parse_gpus(text: str, *, host_memory: str | None = None) -> Machine:
    """`80GB`, `4x80GB`, `2x8x80GB` (nodes, GPUs of each, memory of each), `H100`, `8xH100`. Raises ConfigError.

    host_memory: of a node, `64GB`; None where nobody said.
    """
    *counts, kind = re.split(r"(?<=\d)x(?=\w)", text.strip(), flags=re.IGNORECASE)
    sizes = [int(count) for count in counts if count.isdecimal()]
    if len(sizes) == len(counts) <= 2 and 0 not in sizes:
        nodes, gpus = ([1, 1, *sizes])[-2:]
        card = _card(kind)
        if memory := CARDS[card] * 10**9 if card is not None else _bytes(kind):
            host = None if host_memory is None else _host_bytes(host_memory)
            return Machine(nodes, gpus, memory, "cuda", card, f"--gpus {text}", host)
    raise ConfigError(
        f"--gpus {text}: expected a memory or a card with counts before it, as 80GB, 4x80GB, 2x8x80GB (nodes x GPUs x "
        f"memory), 8xH100; cards: {', '.join(CARDS)}"
    )


def _host_bytes(text: str) -> int:
    if size := _bytes(text):
        return size
    raise ConfigError(f"--host-memory {text}: expected the memory of a node, as 64GB or 64GiB")


def _bytes(text: str) -> int:
    """Of a memory with its unit; 0 for what is none."""
    found = _MEMORY.fullmatch(text.strip())
    return int(float(found[1]) * (2**30 if found[2].lower() == "gib" else 10**9)) if found is not None else 0


def _card(name: str) -> str | None:
    """As it is in the table, however it is written."""
    known = {card.replace(" ", "").lower(): card for card in CARDS}
    return known.get(name.replace(" ", "").lower())


def this_machine(*, processes: int | None = None) -> Machine:
    """The GPUs that are visible here, or else the CPU and its memory, shared by so many processes."""
    gpus, memory = look_for_gpus(), psutil.virtual_memory().total
    if gpus.count:
        usable, card = int(USABLE_SHARE * gpus.memory_bytes), gpus.name or None
        return Machine(1, processes or gpus.count, usable, "cuda", card, "this machine", memory)
    count = processes or 1
    source = f"this machine's {memory / 1e9:.0f} GB of memory"
    return Machine(1, count, int(HOST_SHARE * memory / count), "cpu", None, source, memory)
