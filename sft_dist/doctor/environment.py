"""Environment variables that change what a run does without being in its recipe."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from sft_dist.accelerate_config import default_path, read_accelerate_config
from sft_dist.doctor.finding import Finding, Group, Verdict
from sft_dist.errors import ConfigError
from sft_dist.redact import redacted
from sft_dist.world import check_launcher_agrees, num_cores, read_world

GROUP = Group("environment")
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
UNSET = "unset {}"
HIDE_GPUS = "CUDA_VISIBLE_DEVICES= hides GPUs"
OFF = ("", "0", "false", "no", "off", "none", "disabled")
OWN_NCCL = "SOCKET_IFNAME|DEBUG|BLOCKING_WAIT|P2P_DISABLE|SHM_DISABLE|IB_DISABLE"
"""Those that have rules of their own."""


def is_on(value: str) -> bool:
    """Whether a variable that is a switch turns it on; one that is not set is ""."""
    return value.strip().lower() not in OFF


def _is_given(value: str) -> bool:
    return bool(value.strip())


def _may_hold_cuda(value: str) -> bool:
    return re.search("cuda|nccl|nvidia|conda", value, re.IGNORECASE) is not None


@dataclass(frozen=True)
class Rule:
    """What a variable does. bites: for which values. mend: `{}` stands for the variable's name."""

    pattern: str
    verdict: Verdict
    effect: str
    mend: str = UNSET
    bites: Callable[[str], bool] = _is_given


NOTE, WARNING, PROBLEM = Verdict.NOTE, Verdict.WARNING, Verdict.PROBLEM

RULES = (
    Rule("CUDA_LAUNCH_BLOCKING", WARNING, "the host waits for every kernel", bites=is_on),
    Rule("TORCH_DISTRIBUTED_DEBUG", WARNING, "every collective is checked, slowly", bites=lambda v: v == "DETAIL"),
    Rule("TORCH_NCCL_BLOCKING_WAIT|NCCL_BLOCKING_WAIT", WARNING, "the host waits for every collective", bites=is_on),
    Rule("TORCH_COMPILE_DISABLE|TORCHDYNAMO_DISABLE", NOTE, "decoder layers are not compiled", bites=is_on),
    Rule("TORCH_LOGS|TORCH_CPP_LOG_LEVEL", NOTE, "torch prints more than usual"),
    Rule("NVIDIA_TF32_OVERRIDE|TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", WARNING, "fp32 is multiplied otherwise"),
    Rule("NCCL_P2P_DISABLE|NCCL_SHM_DISABLE|NCCL_IB_DISABLE", WARNING, "NCCL's fast ways are closed", bites=is_on),
    Rule("NCCL_DEBUG", NOTE, "NCCL prints its doings", bites=lambda v: v.upper() in ("INFO", "TRACE")),
    Rule(rf"NCCL_(?!{OWN_NCCL}).*", NOTE, "NCCL is told something"),
    Rule("GLOO_(?!SOCKET_IFNAME).*", NOTE, "gloo is told something"),
    Rule("ACCELERATE_USE_CPU", NOTE, "sft_dist takes GPUs that it sees nevertheless", HIDE_GPUS, is_on),
    Rule("DS_ACCELERATOR", NOTE, "DeepSpeed computes on that, whatever there is"),
    Rule("HF_HUB_OFFLINE|TRANSFORMERS_OFFLINE|HF_DATASETS_OFFLINE", NOTE, "nothing is downloaded", bites=is_on),
    Rule("WANDB_DISABLED", NOTE, "wandb gets nothing", bites=is_on),
    Rule("WANDB_MODE", NOTE, "wandb sends nothing by itself", bites=lambda v: v in ("offline", "disabled", "dryrun")),
    Rule("(?i:https?|all)_proxy", NOTE, "requests go through a proxy", "NO_PROXY names hosts that need none"),
    Rule("PYTHONPATH", NOTE, "its packages go before those that are installed"),
    Rule("LD_PRELOAD", WARNING, "is loaded into every process"),
    Rule("LD_LIBRARY_PATH", NOTE, "another CUDA or NCCL than torch's own may be loaded", bites=_may_hold_cuda),
    Rule("OMP_PROC_BIND|GOMP_CPU_AFFINITY|KMP_AFFINITY", WARNING, "may put all ranks on the same cores", bites=is_on),
    Rule("PET_(?!SHUTDOWN_TIMEOUT).*", WARNING, "torchrun takes it for one of its flags"),
    Rule("PYTORCH_((CUDA|HIP)_)?ALLOC_CONF", NOTE, "the allocator of GPU memory is told something"),
    Rule("SFT_DIST_.*", WARNING, "is for processes that sft_dist starts"),
)
"""The first that matches a name counts."""


def check_environment(environ: Mapping[str, str] = os.environ, *, has_gpus: bool) -> Iterator[Finding]:
    """has_gpus: the driver shows some."""
    found = [
        *_launcher(environ),
        *_schedulers(environ),
        *_gpus(environ, has_gpus=has_gpus),
        *_threads(environ),
        *_interfaces(environ),
        *_told_by_accelerate(environ),
        *_by_rule(environ),
        *_accelerate_config(environ),
    ]
    yield from found
    if all(finding.verdict in (Verdict.OK, Verdict.NOTE) for finding in found):
        yield GROUP.ok("variables", f"none of the {len(environ)} that are set makes a run fail or slow")


def _launcher(environ: Mapping[str, str]) -> Iterator[Finding]:
    """What a launcher left behind, or half of it: the doctor itself is started without one."""
    there = [name for name in LAUNCHERS if name in environ]
    if not there:
        return
    shown = " ".join(f"{name}={environ[name]}" for name in there)
    mend = f"unset {' '.join(there)}; launchers set them for the processes that they start"
    try:
        world = read_world(environ)
    except ConfigError as error:
        yield GROUP.problem("launcher", f"{shown}: {error}", mend)
        return
    if world.size > 1:
        yield GROUP.problem("launcher", f"{shown}: sft-dist train would wait here for {world.size - 1} others", mend)
    elif "RANK" in environ or "WORLD_SIZE" in environ:
        yield GROUP.note(
            "launcher", f"{shown}: left over from a launcher; a world of one is what it would be anyway", mend
        )
    else:
        yield GROUP.note("launcher", f"{shown}: left over from a launcher, without RANK and WORLD_SIZE", mend)


def _schedulers(environ: Mapping[str, str]) -> Iterator[Finding]:
    if job := environ.get("SLURM_JOB_ID"):
        tasks = environ.get("SLURM_NTASKS") or environ.get("SLURM_NPROCS") or "1"
        where = (
            f"step {environ['SLURM_STEP_ID']} of SLURM job {job}" if "SLURM_STEP_ID" in environ else f"SLURM job {job}"
        )
        nodes = environ.get("SLURM_JOB_NUM_NODES") or environ.get("SLURM_NNODES") or "1"
        seen = f"inside {where}: {tasks} tasks on {nodes} nodes ({environ.get('SLURM_JOB_NODELIST', '?')})"
        mend = (
            "in a shell of salloc, sft-dist launch uses the node that it runs on, which may be the login node: "
            "srun --ntasks-per-node 1 --pty bash takes you to the GPUs, sft-dist submit uses all nodes"
        )
        yield GROUP.note("SLURM", seen, mend)
    mpi = {
        name: environ[name] for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE") if name in environ
    }
    for name, value in mpi.items():
        if value.isdecimal() and int(value) > 1 and "RANK" not in environ:
            seen = f"{name}={value} without RANK: each of the {value} processes would be a run of its own"
            mend = "start with sft-dist launch or torchrun instead of mpirun, or set RANK, WORLD_SIZE and MASTER_*"
            yield GROUP.problem("MPI", seen, mend)
        else:
            yield GROUP.note("MPI", f"{name}={value}: started by MPI", "sft_dist goes by RANK and WORLD_SIZE alone")


def _gpus(environ: Mapping[str, str], *, has_gpus: bool) -> Iterator[Finding]:
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not has_gpus:
        return
    if visible.strip() in ("", "-1"):
        seen = f"CUDA_VISIBLE_DEVICES={visible!r} hides all GPUs: a run computes on the CPU"
        yield GROUP.warning("CUDA_VISIBLE_DEVICES", seen, "unset CUDA_VISIBLE_DEVICES")
    else:
        seen = f"only these GPUs are seen: {visible}"
        yield GROUP.note("CUDA_VISIBLE_DEVICES", seen, "unset CUDA_VISIBLE_DEVICES to see all")


def _threads(environ: Mapping[str, str]) -> Iterator[Finding]:
    text, cores = environ.get("OMP_NUM_THREADS"), num_cores()
    if text is None:
        mend = "nothing with sft-dist launch, which gives each process its share; torchrun alone sets 1"
        yield GROUP.note("OMP_NUM_THREADS", f"not set: one process alone takes all {cores} cores", mend)
    elif not text.isdecimal() or not int(text):
        yield GROUP.problem("OMP_NUM_THREADS", f"{text!r} is no number of threads", "unset OMP_NUM_THREADS")
    elif int(text) > cores:
        yield GROUP.warning("OMP_NUM_THREADS", f"{text} threads for {cores} cores", "unset OMP_NUM_THREADS")


def _interfaces(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Names of network interfaces that are not there: gloo and NCCL end with an error that does not say so."""
    known = set(psutil.net_if_addrs())
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        value = environ.get(name, "")
        if not value or value.startswith("^"):
            continue
        exact = value.startswith("=") or name.startswith("GLOO")
        asked = [each.strip() for each in value.lstrip("=").split(",")]
        missing = [
            each for each in asked if each not in known and (exact or not any(k.startswith(each) for k in known))
        ]
        if missing:
            seen = f"{value}: this host has no interface {', '.join(missing)}; it has {', '.join(sorted(known))}"
            yield GROUP.problem(name, seen, f"unset {name}, or name one of them")


def _told_by_accelerate(environ: Mapping[str, str]) -> Iterator[Finding]:
    """What every run refuses, exported in this shell."""
    try:
        check_launcher_agrees("auto", dtype="auto", environ=environ)
    except ConfigError as error:
        names = [name for name in environ if name.startswith(("ACCELERATE_USE", "ACCELERATE_MIXED", "ACCELERATE_DEEP"))]
        yield GROUP.problem("accelerate", str(error), f"unset {' '.join(sorted(names))}")


def _by_rule(environ: Mapping[str, str]) -> Iterator[Finding]:
    for name in sorted(environ):
        rule = next((rule for rule in RULES if re.fullmatch(rule.pattern, name)), None)
        if rule is not None and rule.bites(environ[name]):
            value = redacted(environ[name], environ)
            seen = f"{value if len(value) <= 80 else value[:77] + '...'}: {rule.effect}"
            yield Finding(GROUP.name, name, rule.verdict, seen, rule.mend.format(name))


def _accelerate_config(environ: Mapping[str, str]) -> Iterator[Finding]:
    """What `accelerate config` wrote once: every launch goes by it, and no command line says so."""
    path: Path = default_path(environ)
    if not path.is_file():
        return
    mend = "sft-dist launch --config-file names another; remove it if it is not meant"
    try:
        config = read_accelerate_config(path)
    except ConfigError as error:
        yield GROUP.problem("accelerate config", str(error), mend)
        return
    count = "" if config.num_processes is None else f", {config.num_processes} processes on {config.num_hosts} hosts"
    engine = f", engine {config.engine}" if config.engine else ""
    cpu = ", on the CPU" if config.use_cpu else ""
    yield GROUP.note(
        "accelerate config", f"{path} decides launches: {config.distributed_type}{count}{engine}{cpu}", mend
    )
