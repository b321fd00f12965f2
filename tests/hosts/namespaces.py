"""Hosts made of namespaces: each has a name that does not resolve, processes and network devices of its own."""

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

NEEDS = ("ip", "unshare", "nsenter")


def missing() -> str:
    """Why there can be no such hosts here, and how there can; empty where there can."""
    absent = [program for program in NEEDS if shutil.which(program) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install iproute2 util-linux"
    if subprocess.run(["unshare", "--net", "--pid", "--fork", "true"], capture_output=True).returncode:
        return "network namespaces need root: sudo -E env PATH=$PATH python -m pytest tests/hosts"
    return ""


@dataclass(frozen=True)
class Host:
    """One host. holder: the first process in it, with which all others in it end."""

    name: str
    address: str
    interface: str
    holder: "subprocess.Popen[bytes]"

    @property
    def pid(self) -> int:
        """The holder, as seen from outside: the child of `unshare`."""
        children = Path(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children")
        deadline = time.monotonic() + 10
        while not (found := children.read_text().split()):
            assert time.monotonic() < deadline, f"{self.name} did not start"
            time.sleep(0.01)
        return int(found[0])

    def command(self, words: Sequence[str]) -> list[str]:
        """The command that runs `words` on this host."""
        return ["nsenter", "--target", str(self.pid), "--net", "--uts", "--pid", "--mount", *words]

    def end(self) -> None:
        """Power off: every process on it is killed at once, and its end of the cable goes."""
        self.holder.kill()
        self.holder.wait(timeout=10)


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts joined by a cable. They vanish on leaving, and also when this process is killed."""
    with contextlib.ExitStack() as stack:
        hosts = []
        for index in range(2):
            name = f"nowhere-{index}"
            # `cat` ends with our end of the pipe, and the namespaces end with their first process.
            inside = f"hostname {name} && ip link set lo up && exec cat"
            flags = ["--net", "--uts", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
            holder = subprocess.Popen(["unshare", *flags, "sh", "-c", inside], stdin=subprocess.PIPE)
            stack.callback(_end, holder)
            hosts.append(Host(name, f"10.99.0.{index + 1}", f"veth-{index}", holder))
        ends = [["name", host.interface, "netns", str(host.pid)] for host in hosts]
        _ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for host in hosts:
            subprocess.run(
                host.command(["ip", "address", "add", f"{host.address}/24", "dev", host.interface]), check=True
            )
            subprocess.run(host.command(["ip", "link", "set", host.interface, "up"]), check=True)
        yield hosts[0], hosts[1]


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def _end(holder: "subprocess.Popen[bytes]") -> None:
    holder.kill()
    holder.wait(timeout=10)
    if holder.stdin is not None:
        holder.stdin.close()
