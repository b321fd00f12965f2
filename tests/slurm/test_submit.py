"""`sft-dist submit` on the cluster: prepare, train and evaluate, each after the one before."""

import itertools
import json
import re
import sys
from pathlib import Path

from sft_dist.run_files import EVALUATION, LOGS
from tests.faults.runs import Run
from tests.slurm.conftest import Scenario
from tests.slurm.jobs import Job, ask, cluster_dir, environment, new_run

STEPS = ("prepare", "train", "evaluate")


def submitted(run: Run, *words: str) -> list[Job]:
    """The jobs that `sft-dist submit` makes of a run."""
    site = cluster_dir() / "site.sh"
    site.write_text("export SBATCH_PARTITION=batch SFT_DIST_TRAIN_OPTIONS=--cpus-per-task=2\n")
    flags = ("--site", site, "--nodes=2", "--gpus-per-node=1", "--time=5")
    environ = {key: value for key, value in environment().items() if key != "SFT_DIST_PYTHON"}
    said = ask(sys.executable, "-m", "sft_dist", "submit", run.recipe, *words, *flags, **environ)
    numbers = re.findall(r"^(\w+) +job (\d+)", said, re.M)
    assert tuple(step for step, _ in numbers) == STEPS, said
    return [Job(number, run.directory / LOGS / f"{step}-{number}.log") for step, number in numbers]


def test_prepare_train_evaluate(scenario: Scenario) -> None:
    with scenario("`sft-dist submit recipe.yaml --nodes 2 --gpus-per-node 1`") as outcome:
        run = new_run("chain", steps=40)
        jobs = submitted(run, "data.held_out_share=0.1")
        for job in jobs:
            job.wait_for("COMPLETED")
        for earlier, later in itertools.pairwise(jobs):
            assert earlier.when("EndTime") <= later.when("StartTime")
        assert "2 nodes" in jobs[1].said()[0]
        perplexity = json.loads((run.directory / EVALUATION).read_text())["perplexity"]
        outcome.text = f"prepare, train, evaluate, each after the one before; perplexity {perplexity:.1f}"


def test_what_fails_takes_what_waits_for_it_along(scenario: Scenario) -> None:
    with scenario("the same, and `prepare` fails") as outcome:
        run = new_run("broken-chain")
        jobs = submitted(run, f"data.train={Path('none.jsonl').absolute()}")
        jobs[0].wait_for("FAILED")
        for job in jobs[1:]:
            job.wait_for("CANCELLED")
        assert "none.jsonl" in "\n".join(jobs[0].said())
        outcome.text = "`train` and `evaluate` are cancelled"
