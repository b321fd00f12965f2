"""What this host has: GPUs and their memory, NUMA nodes, the way to another host. Without torch in this process."""

import ipaddress
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from sft_dist.errors import BackendError, ConfigError

ASK_TORCH = """
import json, torch
gpus = range(torch.cuda.device_count())
found = [torch.cuda.get_device_properties(gpu) for gpu in gpus]
print(json.dumps([[gpu.total_memory, gpu.name] for gpu in found]))
"""


@dataclass(frozen=True)
class Gpus:
    """The GPUs that a process started here sees. memory_bytes, name: of the smallest."""

    count: int = 0
    memory_bytes: int = 0
    name: str = ""


def look_for_gpus(environ: Mapping[str, str] = os.environ) -> Gpus:
    """Raises BackendError when torch cannot be asked."""
    hidden = environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")
    if hidden or not any(Path(driver).exists() for driver in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
        return Gpus()
    # In a process of its own: this one lives as long as the run, and torch costs seconds and memory.
    asked = subprocess.run([sys.executable, "-c", ASK_TORCH], capture_output=True, text=True, env=environ)
    if asked.returncode:
        raise BackendError(f"torch does not start, so that GPUs cannot be counted: {asked.stderr.strip()[-500:]}")
    found: list[tuple[int, str]] = [(size, name) for size, name in json.loads(asked.stdout.splitlines()[-1])]
    return Gpus(len(found), *min(found, default=(0, "")))


def num_numa_nodes(system: Path = Path("/sys/devices/system/node")) -> int:
    """NUMA nodes that have cores; 1 where the system does not say."""
    lists = [path.read_text(encoding="ascii").strip() for path in system.glob("node[0-9]*/cpulist")]
    return sum(1 for cores in lists if cores) or 1


@dataclass(frozen=True)
class Route:
    """The way from this host to an address. interface: None where the system does not tell."""

    interface: str | None
    is_to_itself: bool


def route_to(main_host: str) -> Route:
    """The network interface from which this host reaches host 0, or is reached when it is host 0.

    Raises ConfigError when there is no way, or when the name means each host itself wherever it is looked up.
    """
    try:
        family, _, _, _, destination = socket.getaddrinfo(main_host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(destination)  # sends nothing: the kernel looks up the route
            own = str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(
            f"main host {main_host}: {error}; give an address of host 0 that every host reaches"
        ) from None
    if ipaddress.ip_address(own.partition("%")[0]).is_loopback and main_host not in (destination[0], "localhost"):
        raise ConfigError(
            f"main host {main_host} is {destination[0]} on this host, which no other host reaches; "
            "give host 0's address in the network"
        )
    found = psutil.net_if_addrs().items()
    interface = next((name for name, addresses in found if own in {each.address for each in addresses}), None)
    return Route(interface, is_to_itself=own == destination[0])


def require_free_port(port: int) -> None:
    """Raise ConfigError when something listens there already: accelerate would end in a traceback."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except (OSError, OverflowError) as error:
            raise ConfigError(f"port {port}: {error}; choose another one, the same on every host") from None
