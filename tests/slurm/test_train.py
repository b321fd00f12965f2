"""Real trainings by slurm/train.sbatch, disturbed in every way that a cluster has. Each ends as if nothing had been."""

import os
import re
import signal
import time
from collections.abc import Iterator

import numpy as np
import pytest
from safetensors.numpy import load_file

from sft_dist import heartbeat
from sft_dist.run_files import INTERRUPTED, MODEL, STOP_FILE
from tests.faults.runs import Run
from tests.slurm.conftest import Scenario
from tests.slurm.jobs import (
    CLUSTER_SH,
    NODES,
    SAVE_EVERY,
    Job,
    ask,
    long_steps,
    new_run,
    reconfigured,
    train,
    undisturbed,
    undisturbed_on_one_node,
    wait_for_steps,
    wait_until,
)

IN_THE_MIDDLE = SAVE_EVERY + 5
"""Steps after which something happens: behind a checkpoint, and not at one."""


@pytest.fixture(autouse=True)
def _nothing_runs_on() -> Iterator[None]:
    yield
    for number in ask("squeue", "--noheader", "--format=%A").split():
        ask("scancel", number)
    wait_until(lambda: not ask("squeue", "--noheader"), or_tell=lambda: ask("squeue"))


def goes_on(job: Job, run: Run, *, as_if: Run | None = None) -> str:
    """Wait for the end of a job that is queued again; in words, how its run equals the undisturbed one, or another."""
    job.start_again()
    job.wait_for("COMPLETED")
    assert job.restarts == 1, job.tell()
    assert "train: start: attempt 2 of at most 21, 2 nodes" in "\n".join(job.said())
    assert job.said()[-1] == f"train: finished: {run.directory}/model"
    return f"resumed from step {run.resumed_from()}; {run.equals(as_if or undisturbed())}"


def is_saved(run: Run, job: Job) -> None:
    """The last step that was made is on disk, and nothing of the request is left."""
    assert (run.directory / INTERRUPTED).exists(), job.tell()
    assert run.good_steps()[-1] == run.last_step(), job.tell()
    assert not (run.directory / STOP_FILE).exists()
    assert not list(run.directory.glob(".slurm-*")), "what the attempt kept for itself"


def pushed_out_by_another(job: Job) -> float:
    """Submit a job that wants the nodes more; the seconds until it has them."""
    other = ask("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null",
                "--wrap=sleep 1")  # fmt: skip
    return wait_until(
        lambda: ask("squeue", "--noheader", f"--jobs={other}", "--format=%T") not in ("PENDING", "CONFIGURING"),
        or_tell=job.tell,
    )


def power(change: str, node: int) -> None:
    ask(CLUSTER_SH, f"power-{change}", node)


def port_of(job: Job) -> str:
    return str(re.findall(r"meeting at \w+:(\d+)", "\n".join(job.said()))[0])


def is_near(run: Run, other: Run) -> str:
    """In words, how far two finished runs of other layouts are apart; it fails beyond rounding."""
    curves = [[(step, line["batch"], line["lr"]) for step, line in sorted(one.curve().items())] for one in (run, other)]
    assert curves[0] == curves[1], "examples or rates"
    losses = np.array([[one.curve()[step]["loss"] for step in sorted(other.curve())] for one in (run, other)])
    weights = [load_file(one.directory / MODEL / "model.safetensors") for one in (run, other)]
    apart = np.abs(losses[0] - losses[1]).max()
    weights_apart = float(max(np.abs(weights[0][name] - weights[1][name]).max() for name in weights[1]))
    assert apart <= 1e-5  # the order of the sums
    assert weights_apart <= 1e-5
    return f"losses within {apart:.0e}, final weights within {weights_apart:.0e} of those of 2 x 2"


def test_completes(scenario: Scenario) -> None:
    with scenario("completes: `sbatch --nodes=2 --gpus-per-node=2 slurm/train.sbatch recipe.yaml`") as outcome:
        run = undisturbed()
        outcome.text = f"{len(run.curve())} steps"


def test_usr1_before_the_time_limit(scenario: Scenario) -> None:
    with scenario("SIGUSR1 to the batch script, as before the time limit") as outcome:
        run = new_run("usr1")
        job = train(run)
        wait_for_steps(run, IN_THE_MIDDLE, job)
        ask("scancel", "--signal=USR1", "--batch", job.number)
        job.wait_until_queued_again()
        is_saved(run, job)
        assert "train: stop asked by SLURM: all ranks finish their step and save" in job.said()
        assert "train: stopped and saved; queued again" in job.said()
        outcome.text = f"saved, queued again, {goes_on(job, run)}"


def test_the_same_file_on_one_node(scenario: Scenario) -> None:
    with scenario("`--nodes=1` of the same file, SFT_DIST_PROCESSES=4") as outcome:
        run = undisturbed_on_one_node()
        outcome.text = f"{len(run.curve())} steps"


def test_a_time_limit(scenario: Scenario) -> None:
    with scenario("`--time=1 --signal=B:USR1@30`, two nodes") as outcome:
        run = new_run("limit", steps=long_steps())
        job = train(run, options=(*NODES, "--time=1", "--signal=B:USR1@30"))
        seconds = job.wait_until_queued_again()
        is_saved(run, job)
        assert "train: stop asked by SLURM: all ranks finish their step and save" in job.said()
        # As many ranks: the nodes that they are on change nothing.
        told = goes_on(job, run, as_if=undisturbed_on_one_node())
        outcome.text = f"saved, queued again after {seconds:.0f} s, {told} of the one on one node"


def test_preemption_with_sigterm_to_the_steps_alone(scenario: Scenario) -> None:
    with scenario("pushed out by a job of a higher partition") as outcome:
        run = new_run("preempted")
        job = train(run)
        wait_for_steps(run, IN_THE_MIDDLE, job)
        seconds = pushed_out_by_another(job)
        is_saved(run, job)
        assert seconds < 20, "the nodes were free before the grace was over"
        outcome.text = f"saved, made room after {seconds:.0f} s of 20, queued again, {goes_on(job, run)}"


def test_preemption_with_the_user_signal(scenario: Scenario) -> None:
    with (
        scenario("the same with `preempt_send_user_signal`") as outcome,
        reconfigured("SlurmctldParameters", "preempt_send_user_signal"),
    ):
        run = new_run("preempted-usr1")
        job = train(run)
        wait_for_steps(run, IN_THE_MIDDLE, job)
        seconds = pushed_out_by_another(job)
        is_saved(run, job)
        assert seconds < 20, "the nodes were free before the grace was over"
        outcome.text = f"saved, made room after {seconds:.0f} s of 20, queued again, {goes_on(job, run)}"


def test_a_run_that_is_cancelled_capped_crashed_and_queued_again_by_hand(scenario: Scenario) -> None:
    run = new_run("ends")
    with scenario("`scancel`") as outcome:
        job = train(run)
        wait_for_steps(run, IN_THE_MIDDLE, job)
        job.cancel()
        seconds = job.wait_for("CANCELLED")
        is_saved(run, job)
        time.sleep(3)
        assert (job.state, job.restarts) == ("CANCELLED", 0)
        outcome.text = f"saved step {run.last_step()}, and CANCELLED, after {seconds:.0f} s; not queued again"

    with scenario("SIGUSR1 before the launcher has started, and SFT_DIST_MAX_REQUEUES=0; the same run") as outcome:
        before, attempts = run.last_step(), run.attempts
        job = train(run, settings=("SFT_DIST_MAX_REQUEUES=0",))
        wait_until(lambda: "attempt 1 of at most 1" in "\n".join(job.said()), or_tell=job.tell)
        ask("scancel", "--signal=USR1", "--batch", job.number)
        job.wait_for("FAILED")
        is_saved(run, job)
        assert (run.attempts, job.exit_code, job.restarts) == (attempts + 1, 75, 0), job.tell()
        assert "SFT_DIST_MAX_REQUEUES=0 is reached" in job.said()[-1]
        assert before < run.last_step() <= before + 2
        outcome.text = f"stopped after step {run.last_step()}, FAILED with exit code 75, not queued again"

    with scenario("SIGKILL of a rank on the second node; the same run") as outcome:
        job = train(run)
        wait_for_steps(run, 20, job, attempt=run.attempts + 1)
        (victim,) = (beat for beat in heartbeat.read_all(run.heartbeats) if beat.rank == 3)
        os.kill(victim.pid, signal.SIGKILL)
        seconds = job.wait_for("FAILED", timeout_s=60)
        assert (job.exit_code, job.restarts) == (5, 0), job.tell()
        end = job.said()[-6:]
        end = end[[line.startswith("train: failed with exit code 5") for line in end].index(True) :]
        reasons = [line for line in end if re.match(r"error: rank 3 on \w+n2 \(pid \d+\) died", line)]
        assert reasons, job.tell()
        reason = re.sub(r"\b\w+n2\b", "n2", reasons[0])
        outcome.text = (
            f"FAILED with exit code 5 after {seconds:.0f} s, not queued again; at the end of the log: {reason}"
        )

    with scenario("`scontrol requeue`; the same run") as outcome:
        job = train(run)
        wait_for_steps(run, 20, job, attempt=run.attempts + 1)
        ask("scontrol", "requeue", job.number)
        job.wait_until_queued_again()
        is_saved(run, job)
        outcome.text = f"saved, {goes_on(job, run)}"


def all_nodes_are_back(job: Job) -> None:
    nodes = ("sinfo", "--noheader", "--partition=batch", "--format=%T %D")
    wait_until(lambda: ask(*nodes) == "idle 2", or_tell=lambda: ask(*nodes) + job.tell())


@pytest.mark.parametrize(("node", "what"), [(2, "the second node"), (1, "the node of the batch script")])
def test_a_lost_node(node: int, what: str, scenario: Scenario) -> None:
    with scenario(f"power cut of {what}, and back after SLURM has noticed (`SlurmdTimeout=10`)") as outcome:
        run = new_run(f"lost-{node}")
        job = train(run)
        wait_for_steps(run, IN_THE_MIDDLE, job)
        power("off", node)
        seconds = job.wait_until_queued_again()
        power("on", node)
        nodes = ("sinfo", "--noheader", "--partition=batch", "--format=%T %D")
        wait_until(lambda: ask(*nodes) == "idle 2", or_tell=lambda: ask(*nodes) + job.tell())
        assert run.good_steps()[-1] == SAVE_EVERY, "what was not saved is lost, and no more"
        outcome.text = f"queued again by SLURM after {seconds:.0f} s; {goes_on(job, run)}"


def test_two_jobs_at_once_on_the_same_nodes(scenario: Scenario) -> None:
    with scenario("two jobs at once on the same two nodes, one GPU of each node for each") as outcome:
        runs = [new_run("twin-1"), new_run("twin-2")]
        share = ("--nodes=2", "--gpus-per-node=1", "--cpus-per-task=2")
        jobs = [train(run, options=share) for run in runs]
        wait_until(lambda: all(job.state == "RUNNING" for job in jobs), or_tell=jobs[1].tell)
        for job in jobs:
            job.wait_for("COMPLETED")
        ports = [port_of(job) for job in jobs]
        assert len(set(ports)) == 2
        assert jobs[1].when("StartTime") < jobs[0].when("EndTime"), "one after the other"
        runs[0].equals(runs[1])
        outcome.text = f"ports {ports[0]} and {ports[1]}; equal bit for bit, {is_near(runs[0], undisturbed())}"
