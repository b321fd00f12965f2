"""`sft-dist submit`: prepare, train and evaluate as SLURM jobs, each after the one before."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sft_dist import package_files
from sft_dist.config import Recipe
from sft_dist.errors import BackendError, ConfigError
from sft_dist.run_files import LOGS, MODEL

SITE = "slurm/site.sh"
"""The settings of the site: of the directory from which one submits, else the shipped ones, which say nothing."""

OF_SLURM = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT")
"""Variables that are settings of SLURM, and not of a job from inside of which one submits."""


@dataclass(frozen=True)
class Request:
    """What is asked of the cluster. None leaves a thing to the site's settings and defaults.

    gpus_per_node: a number, or as h100:8. processes: on each node, where there are no GPUs.
    time: of one attempt of the training, as sbatch takes it.
    signal_before_s: how long before that is over the run is asked to save. train_options: more words for sbatch.
    """

    nodes: int = 1
    gpus_per_node: str | None = None
    processes: int | None = None
    time: str | None = None
    signal_before_s: int = 120
    max_requeues: int | None = None
    site: Path | None = None
    prepare: bool = True
    evaluate: bool = True
    train_options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """One call of sbatch, without the job that it waits for. step: prepare, train or evaluate."""

    step: str
    options: tuple[str, ...]
    words: tuple[str, ...]
    """The script and what it is given."""

    def command(self, *, after: str | None) -> list[str]:
        # Without the second option a job whose forerunner has failed waits for ever.
        waits = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []
        return ["sbatch", "--parsable", *waits, *self.options, *self.words]


def submit(
    recipe: Recipe, words: Sequence[str], flags: Sequence[str], *, request: Request, dry_run: bool = False
) -> int:
    """Submit the jobs, or with dry_run print a script that does, and say what to do next. Returns an exit code.

    words: the recipe as it was named, and overrides. flags: those of `sft-dist train`.
    Raises ConfigError for site settings that cannot be read, BackendError when SLURM is not here or refuses.
    """
    site = find_site(request.site)
    settings = read_site(site, environ=without_job(os.environ))
    jobs = plan(words, flags, request=request, site=site, settings=settings, run_dir=recipe.run.path)
    if dry_run:
        print(as_script(jobs, site=site, run_dir=recipe.run.path))
        return 0
    if shutil.which("sbatch") is None:
        raise BackendError("sbatch is not found: submit from a login node of the cluster, or look with --dry-run")
    (recipe.run.path / LOGS).mkdir(parents=True, exist_ok=True)  # SLURM makes none, and writes no log then
    numbers = _submit_all(jobs, environ=settings)
    for job, number, after in zip(jobs, numbers, [None, *numbers], strict=False):
        print(f"{job.step:<9} job {number}" + (f", after job {after}" if after else ""))
    train = numbers[[job.step for job in jobs].index("train")]
    run_dir = shlex.quote(str(recipe.run.path))
    print(f"how it stands:     sft-dist status {run_dir}")
    print(f"its log:           tail -F {run_dir}/{LOGS}/train-{train}.log")
    print(f"save and stop it:  scancel {train}   (what was submitted after it is cancelled as well)")
    print(f"the model, later:  {run_dir}/{MODEL}")
    return 0


def plan(
    words: Sequence[str],
    flags: Sequence[str],
    *,
    request: Request,
    site: Path,
    settings: Mapping[str, str],
    run_dir: Path,
) -> list[Job]:
    """The jobs in their order. settings: the environment with the site's settings in it."""
    known = [f"SFT_DIST_SITE={site.absolute()}"]
    if not any(settings.get(key) for key in ("SFT_DIST_SETUP", "SFT_DIST_PYTHON", "SFT_DIST_CONTAINER")):
        known.append(f"SFT_DIST_PYTHON={sys.executable}")
    given = {"SFT_DIST_MAX_REQUEUES": request.max_requeues, "SFT_DIST_PROCESSES": request.processes}
    for_train = [f"{key}={value}" for key, value in given.items() if value is not None]
    gpus = request.gpus_per_node if request.gpus_per_node != "0" else None
    train = [f"--nodes={request.nodes}", f"--signal=B:USR1@{request.signal_before_s}"]
    train += [f"--gpus-per-node={gpus}"] if gpus else []
    train += [f"--time={request.time}"] if request.time else []

    def job(step: str, options: Sequence[str], own: Sequence[str] = (), flags: Sequence[str] = ()) -> Job:
        of_site = shlex.split(settings.get(f"SFT_DIST_{step.upper()}_OPTIONS", ""))
        log = f"--output={run_dir.absolute() / LOGS / f'{step}-%j.log'}"
        name = f"--job-name={step}-{run_dir.name}"
        script = str(package_files.SLURM / f"{step}.sbatch")
        return Job(step, (name, log, *of_site, *options), (script, *known, *own, *words, *flags))

    jobs = [job("prepare", ())] if request.prepare else []
    jobs += [job("train", (*train, *request.train_options), for_train, flags)]
    one_gpu = (f"--gpus-per-node={re.sub('[0-9]+$', '1', gpus)}",) if gpus else ()
    jobs += [job("evaluate", one_gpu)] if request.evaluate else []
    return jobs


def as_script(jobs: Sequence[Job], *, site: Path, run_dir: Path) -> str:
    """Lines of bash that submit the jobs."""
    lines = [f"source {shlex.quote(str(site))}", f"mkdir -p {shlex.quote(str(run_dir / LOGS))}"]
    after: str | None = None
    for job in jobs:
        # Job numbers are variables of the script, which quoting would keep from being filled in.
        command = shlex.join(job.command(after="AFTER" if after else None)).replace(
            "afterok:AFTER", f"afterok:${after}"
        )
        lines.append(f"{job.step}=$({command})")
        after = job.step
    return "\n".join(lines)


def find_site(asked: Path | None) -> Path:
    """The file with the settings of the site. Raises ConfigError when the one that was asked for is not there."""
    if asked is not None:
        if not asked.is_file():
            raise ConfigError(f"--site {asked}: no such file; docs/slurm.md lists what it may hold")
        return asked
    own = Path(SITE)
    return own if own.is_file() else package_files.SLURM / "site.sh"


def read_site(site: Path, *, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment after bash has read the file. Raises ConfigError when bash stumbles over it."""
    script = 'set -eu; source "$1" >&2; env --null'
    read = subprocess.run(
        ["bash", "-c", script, "bash", str(site.absolute())],
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
    )
    if read.returncode:
        raise ConfigError(f"{site}: bash cannot read it: {read.stderr.strip()[-500:]}")
    return dict(entry.split("=", 1) for entry in read.stdout.split("\0") if "=" in entry)


def without_job(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without what describes the job that this process may be in: sbatch would take it for options."""
    return {key: value for key, value in environ.items() if not key.startswith("SLURM_") or key in OF_SLURM}


def _submit_all(jobs: Sequence[Job], *, environ: Mapping[str, str]) -> list[str]:
    """Numbers of the submitted jobs. Raises BackendError when one is refused; those before it are cancelled."""
    numbers: list[str] = []
    for job in jobs:
        command = job.command(after=numbers[-1] if numbers else None)
        done = subprocess.run(command, env=environ, capture_output=True, text=True)
        if done.returncode:
            if numbers:
                subprocess.run(["scancel", *numbers], env=environ)
            cancelled = f"; cancelled again: {', '.join(numbers)}" if numbers else ""
            raise BackendError(f"{shlex.join(command)}: {done.stderr.strip()}{cancelled}")
        numbers.append(done.stdout.strip().partition(";")[0])  # number;cluster where there are several clusters
    return numbers
