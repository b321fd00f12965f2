"""A user's own accelerate config: where it lies, and what of it sft_dist goes by.

accelerate ignores some of what such a file says, without a word. What would be ignored is refused here.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sft_dist.config import ENGINES
from sft_dist.errors import ConfigError

SEVERAL = ("MULTI_GPU", "DEEPSPEED", "FSDP")
"""Values of distributed_type under which accelerate starts several processes that sft_dist can be."""

ONE = ("NO", "MULTI_CPU")
"""Those under which it starts one process, whatever num_processes says."""


@dataclass(frozen=True)
class AccelerateConfig:
    """What of an accelerate config decides a launch.

    num_processes: on all hosts together; None leaves it open. engine: the recipe's name for what deepspeed_config
    asks for, if anything. told: the environment by which accelerate tells the ranks what else the file says.
    """

    path: Path
    distributed_type: str
    num_processes: int | None
    num_hosts: int
    host_index: int
    main_host: str | None
    port: int | None
    use_cpu: bool
    engine: str | None
    told: Mapping[str, str]

    @property
    def processes_per_host(self) -> int | None:
        return None if self.num_processes is None else self.num_processes // self.num_hosts


def default_path(environ: Mapping[str, str] = os.environ) -> Path:
    """Where `accelerate config` writes, and `accelerate launch` reads when it is not told otherwise."""
    cache = environ.get("HF_HOME") or Path(environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(cache, "accelerate", "default_config.yaml").expanduser()


def read_accelerate_config(path: Path) -> AccelerateConfig:
    """Raises ConfigError for a file that is none, and for what accelerate or sft_dist would ignore in silence."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as an accelerate config: {error}") from None
    if not isinstance(raw, dict) or "distributed_type" not in raw:
        raise ConfigError(f"{path}: no accelerate config: it has no distributed_type; `accelerate config` writes one")
    kind = _distributed_type(path, raw)
    num_hosts, num_processes = _count(path, raw, "num_machines") or 1, _count(path, raw, "num_processes")
    if kind in ONE and (num_processes or 1) > 1:
        raise ConfigError(
            f"{path}: num_processes: {num_processes} with distributed_type: {kind} starts one process, in silence; "
            "set distributed_type: MULTI_GPU, accelerate's word for several processes on CPUs too, or num_processes: 1"
        )
    if num_processes is not None and num_processes % num_hosts:
        raise ConfigError(
            f"{path}: num_processes: {num_processes} on num_machines: {num_hosts} starts "
            f"{num_processes // num_hosts * num_hosts}, in silence; num_processes counts those of all machines together"
        )
    deepspeed = raw.get("deepspeed_config") or {} if kind == "DEEPSPEED" else {}
    launcher = deepspeed.get("deepspeed_multinode_launcher", "pdsh")
    if kind == "DEEPSPEED" and num_hosts > 1 and launcher != "standard":
        raise ConfigError(
            f"{path}: deepspeed_multinode_launcher: {launcher} starts the other hosts by itself, unsupervised; "
            "set it to standard, and start the same command on every host"
        )
    told = {"ACCELERATE_MIXED_PRECISION": str(raw.get("mixed_precision") or "no")}
    if kind == "FSDP":
        told["ACCELERATE_USE_FSDP"] = "true"
    if kind == "DEEPSPEED":
        told |= {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(deepspeed.get("zero_stage")),
        }
    port = raw.get("main_process_port")
    return AccelerateConfig(
        path=path,
        distributed_type=kind,
        num_processes=num_processes,
        num_hosts=num_hosts,
        host_index=int(raw.get("machine_rank") or 0),
        main_host=str(raw["main_process_ip"]) if raw.get("main_process_ip") else None,
        port=int(port) if port else None,
        use_cpu=bool(raw.get("use_cpu")),
        engine=_engine(path, deepspeed) if kind == "DEEPSPEED" else None,
        told=told,
    )


def _distributed_type(path: Path, raw: Mapping[str, Any]) -> str:
    kind = raw["distributed_type"]
    if kind is False:  # an unquoted NO is false in YAML
        kind = "NO"
    where = raw.get("compute_environment", "LOCAL_MACHINE")
    if where != "LOCAL_MACHINE" or kind not in (*ONE, *SEVERAL):
        raise ConfigError(
            f"{path}: compute_environment: {where} with distributed_type: {kind} is not what sft_dist trains on; "
            "it needs LOCAL_MACHINE with NO, MULTI_GPU or DEEPSPEED"
        )
    return str(kind)


def _count(path: Path, raw: Mapping[str, Any], key: str) -> int | None:
    """A positive whole number; None where the file has none, or accelerate's -1 for "on the command line"."""
    value = raw.get(key)
    if value in (None, -1):
        return None
    if type(value) is not int or value < 1:
        raise ConfigError(f"{path}: {key}: {value!r} is no whole number of 1 or more")
    return value


def _engine(path: Path, deepspeed: Mapping[str, Any]) -> str:
    """The recipe's name for a deepspeed_config. Raises ConfigError where the recipe has none."""
    if deepspeed.get("deepspeed_config_file"):
        raise ConfigError(
            f"{path}: deepspeed_config_file: {deepspeed['deepspeed_config_file']} would not be read; name it in the "
            "recipe, as train.deepspeed, beside train.engine, and set distributed_type: MULTI_GPU"
        )
    device = str(deepspeed.get("offload_optimizer_device") or "none")
    name = f"zero{deepspeed.get('zero_stage')}" + {"none": "", "cpu": "_offload"}.get(device, f" on {device}")
    if name not in ENGINES:
        raise ConfigError(
            f"{path}: deepspeed_config with zero_stage: {deepspeed.get('zero_stage')} and offload_optimizer_device: "
            f"{device} is none of the engines {', '.join(name for name in ENGINES if name.startswith('zero'))}"
        )
    return name
