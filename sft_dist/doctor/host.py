"""This host: memory, shared memory, cores, limits, ports, its own name."""

import os
import resource
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from sft_dist.doctor.finding import Finding, Group
from sft_dist.doctor.probe import ask
from sft_dist.errors import ConfigError
from sft_dist.machine import num_numa_nodes, require_free_port
from sft_dist.world import num_cores

GROUP = Group("host")
GIB = 2**30
SHM_BYTES = GIB
"""NCCL takes tens of MB for each pair of GPUs without peer access; docker's default is 64 MB for everything."""

RESOLVE_S = 8.0
DEFAULT_PORT = 29500
"""torch's and accelerate's, when none is given."""


@dataclass(frozen=True)
class Limit:
    """A limit of `ulimit`. enough: what is enough, in its unit; why: what it stops below that."""

    name: str
    number: int
    flag: str
    enough: int
    why: str
    unit: int = 1


LIMITS = (
    Limit("open files", resource.RLIMIT_NOFILE, "-n", 4096, "sockets, shards and memory-mapped stores of a large run"),
    Limit("processes", resource.RLIMIT_NPROC, "-u", 4096, "each rank starts dozens of threads"),
    Limit("file size", resource.RLIMIT_FSIZE, "-f", 2**40, "a larger checkpoint file kills its rank (SIGXFSZ)", 1024),
    Limit("address space", resource.RLIMIT_AS, "-v", 2**44, "CUDA maps far more than it uses", 1024),
)


def check_host(*, has_gpus: bool, environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """has_gpus: what is slow or small matters more then."""
    yield _cores()
    yield memory_finding()
    yield shm_finding(has_gpus=has_gpus)
    yield from (limit_finding(limit, resource.getrlimit(limit.number)) for limit in LIMITS)
    yield memlock_finding(resource.getrlimit(resource.RLIMIT_MEMLOCK), adapters=rdma_adapters())
    yield from _ports(environ)
    yield _own_name()


def _cores() -> Finding:
    usable, there = num_cores(), os.cpu_count() or 1
    nodes = num_numa_nodes()
    text = f"{usable} usable of {there}" + (f", {nodes} NUMA nodes" if nodes > 1 else "")
    quota = cgroup_cores()
    if quota is not None and quota < usable:
        return GROUP.note(
            "cores",
            f"{text}, but the container's quota is {quota:g}",
            f"set OMP_NUM_THREADS and data.workers to what {quota:g} cores carry: threads beyond it wait",
        )
    if usable < there / 2:
        mend = "start it without taskset, or with --cpus-per-task of SLURM at the cores that ranks and tokeniser need"
        return GROUP.note("cores", f"{text}: this shell is bound to a part", mend)
    return GROUP.ok("cores", text)


def cgroup_cores(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores that the container's quota pays for; None without a quota."""
    words = _read(root / "cpu.max").split()
    if len(words) == 2 and words[0].isdigit() and words[1].isdigit():
        return int(words[0]) / max(1, int(words[1]))
    return None


def memory_finding(root: Path = Path("/sys/fs/cgroup")) -> Finding:
    """Host memory, or what a container leaves of it."""
    memory = psutil.virtual_memory()
    free, total, whose = int(memory.available), int(memory.total), ""
    limit, used = _read(root / "memory.max").strip(), _read(root / "memory.current").strip()
    if limit.isdigit() and int(limit) < total:
        total, whose = int(limit), ", the container's limit"
        free = min(free, total - (int(used) if used.isdigit() else 0))
    text = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free{whose}"
    if free < 2 * GIB:
        mend = "end what fills it, or raise the limit: each rank needs about 1 GiB for torch alone"
        return GROUP.warning("memory", text, mend)
    return GROUP.ok("memory", text)


def shm_finding(path: Path = Path("/dev/shm"), *, has_gpus: bool) -> Finding:
    """Shared memory, through which NCCL connects processes of a host and Python makes its locks."""
    mend = "start the container with --shm-size=8g or --ipc=host"
    try:
        usage = shutil.disk_usage(path)
    except OSError as error:
        return GROUP.problem("shared memory", f"{path}: {error.strerror}", "mount a tmpfs there")
    if not os.access(path, os.W_OK):
        return GROUP.problem("shared memory", f"{path} cannot be written", f"chmod 1777 {path}, as root")
    text = f"{usage.free / 2**20:,.0f} of {usage.total / 2**20:,.0f} MiB free in {path}"
    if usage.free >= SHM_BYTES:
        return GROUP.ok("shared memory", text)
    make = GROUP.warning if has_gpus else GROUP.note
    return make("shared memory", f"{text}; NCCL ends with a bus error where it does not suffice", mend)


def limit_finding(limit: Limit, found: tuple[int, int]) -> Finding:
    """found: (soft, hard), as getrlimit gives them."""
    soft, hard = found
    if soft == resource.RLIM_INFINITY or soft >= limit.enough:
        shown = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft:,}"
        return GROUP.ok(f"ulimit {limit.flag}", f"{limit.name}: {shown}")
    can_raise = hard == resource.RLIM_INFINITY or hard >= limit.enough
    value = limit.enough // limit.unit
    mend = f"ulimit {limit.flag} {value}" + ("" if can_raise else ", which needs root: /etc/security/limits.conf")
    make = GROUP.note if limit.number in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC) else GROUP.warning
    return make(f"ulimit {limit.flag}", f"{limit.name}: {soft:,}; {limit.why}", mend)


def memlock_finding(found: tuple[int, int], *, adapters: list[str]) -> Finding:
    """Locked memory: RDMA registers its buffers in it. adapters: InfiniBand and RoCE adapters of this host."""
    soft = found[0]
    if soft == resource.RLIM_INFINITY:
        return GROUP.ok("ulimit -l", "locked memory: unlimited")
    text = f"locked memory: {soft / 1024:,.0f} KiB"
    if adapters:
        mend = "ulimit -l unlimited in /etc/security/limits.conf, and in slurmd's unit: LimitMEMLOCK=infinity"
        return GROUP.warning("ulimit -l", f"{text}, and {', '.join(adapters)} register buffers in it", mend)
    return GROUP.ok("ulimit -l", f"{text}; it matters with InfiniBand, and there is none")


def rdma_adapters(system: Path = Path("/sys/class/infiniband")) -> list[str]:
    """Names of InfiniBand and RoCE adapters."""
    return sorted(path.name for path in system.glob("*"))


def _ports(environ: Mapping[str, str]) -> Iterator[Finding]:
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname(), timeout=3),
        ):
            yield GROUP.ok("loopback", "processes of this host can reach each other on 127.0.0.1")
    except OSError as error:
        mend = "ip link set lo up; a sandbox without a loopback interface cannot run two processes"
        yield GROUP.problem("loopback", f"127.0.0.1 does not work: {error}", mend)
    asked = environ.get("MASTER_PORT", "")
    port = int(asked) if asked.isdecimal() else DEFAULT_PORT
    try:
        require_free_port(port)
        yield GROUP.ok(f"port {port}", "free" if asked else "free (what torchrun and accelerate take by default)")
    except ConfigError:
        if asked:
            mend = "unset MASTER_PORT, or choose a free one: rank 0 cannot listen there"
            yield GROUP.problem(f"port {port}", "MASTER_PORT names it, and something listens there already", mend)
        else:
            mend = "sft-dist launch does not need it; give accelerate --main_process_port 0"
            yield GROUP.note(
                f"port {port}", "something listens there, and torchrun and accelerate take it by default", mend
            )


def _own_name() -> Finding:
    name = socket.gethostname()
    code = f"import socket; print(socket.gethostbyname({name!r}))"
    answer = ask([sys.executable, "-c", code], timeout_s=RESOLVE_S)
    if not answer.failure:
        return GROUP.ok("host name", f"{name} is {answer.out.strip()}")
    return GROUP.note(
        "host name",
        f"{name} is not found: {answer.failure}",
        "add it to /etc/hosts; several hosts need it, or GLOO_SOCKET_IFNAME, as sft-dist launch sets it",
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""
