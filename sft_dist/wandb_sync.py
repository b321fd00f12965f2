"""Send a run to wandb after the fact: `sft-dist sync RUN`."""

from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from sft_dist import run_files
from sft_dist.environment import all_peak_flops
from sft_dist.errors import BackendError, ConfigError
from sft_dist.metrics import read_counted
from sft_dist.redact import redacted_tree
from sft_dist.run_record import read_starts
from sft_dist.wandb_process import Mode, Start, WandbFailureError, WandbProcess, make_run_id


def sync_run(
    run_dir: Path,
    *,
    project: str | None = None,
    mode: Mode = "online",
    init_timeout_s: float = 30.0,
    finish_timeout_s: float = 600.0,
) -> int:
    """Send every record that counts, and the config, under the run's own id; the number of records sent.

    What wandb has of the run is replaced, so that a second sync changes nothing and gaps of the first are closed.
    project: default: the recipe's. mode: offline only writes wandb's own files into the run directory.
    Raises ConfigError where `run_dir` is no run or no project is known, BackendError where wandb does not take it.
    """
    config = _read_config(run_dir)
    settings = config.get("wandb") or {}
    project = project or settings.get("project")
    if not project:
        raise ConfigError(f"{run_dir}: the run's recipe has no wandb.project; name one with --project")
    starts = read_starts(run_dir)
    records = read_counted(run_dir / run_files.METRICS, starts)  # wandb takes steps in their order only
    if not records:
        raise ConfigError(f"{run_dir / run_files.METRICS}: no records; nothing to send")
    start = Start(
        project=project,
        name=run_dir.resolve().name,
        id=make_run_id(run_dir.resolve()),
        dir=str(run_dir.resolve()),
        mode=mode,
        config=redacted_tree(config),
        resume=None,
        stats_pid=None,
        init_timeout_s=init_timeout_s,
        finish_timeout_s=finish_timeout_s,
        peak_flops=all_peak_flops(next(reversed(starts), {})),
    )
    try:
        # What wandb has is replaced: not while the run itself is sending.
        lock = FileLock(run_dir / run_files.LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"{run_dir}: the run is training; sync when it has ended") from None
    try:
        # Start-up and both limits of the child, and something for a slow machine.
        return _send(start, records, timeout_s=init_timeout_s + finish_timeout_s + 30)
    except WandbFailureError as failure:
        raise BackendError(f"{run_dir}: not sent to wandb: {failure}; mend it and sync again") from None
    finally:
        lock.release()


def _send(start: Start, records: list[dict[str, Any]], *, timeout_s: float) -> int:
    process = WandbProcess(start)
    try:
        for record in records:
            process.send(record)
            process.drain(timeout_s=timeout_s)
        return process.finish(exit_code=0, timeout_s=timeout_s)
    except KeyboardInterrupt:
        process.kill()
        raise


def _read_config(run_dir: Path) -> dict[str, Any]:
    path = run_dir / run_files.CONFIG
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{run_dir}: no run directory: {path.name} is missing; give the directory of a run") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of sections, this is {type(config).__name__}")
    return config
