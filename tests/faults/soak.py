"""A soak: one run, killed again and again at random moments, must end as if nothing had happened.

    python tests/faults/soak.py --kills 30 --seed 0 --engine zero2

Each kill takes one random rank or all: one in five in the first seconds of a start, the others after a random number of
steps and a random part of a step, saves among them. Exit code 1 on any difference from the undisturbed run: in what a
step was trained on and what came of it, in a weight, in a place to resume.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

from sft_dist.errors import RankLostError
from tests.faults.runs import Lab, Plan, Ranks, Run

START_SHARE, START_S = 0.2, 3.0
MOST_STEPS, STEP_S = 45, 0.2
STEPS_PER_KILL, SAVE_EVERY = 30, 5
LAST_STEPS = 5
"""A run that is so near its end is killed at once: each kill must find it unfinished."""
SOON_S = 15.0
DISTURBED: Plan = {"slow_step_s": 0.02, "slow_write_s": 0.05}


def soak(lab: Lab, *, engine: str, kills: int, seed: int) -> str:
    """Do it, printing a line per kill; the summary. Raises AssertionError on any difference."""
    steps, chance, phases = STEPS_PER_KILL * max(kills, 2), random.Random(seed), Counter[str]()
    began = time.monotonic()
    reference = lab.undisturbed(engine, steps=steps)
    print(f"undisturbed: {steps} steps in {time.monotonic() - began:.0f} s", flush=True)
    with lab.run("soak", engine, steps=steps, save_every=SAVE_EVERY) as run:
        good = 0
        for number in range(1, kills + 1):
            ranks = run.start(dict.fromkeys(range(run.world), DISTURBED))
            doomed = chance.choice([[0], [1], [0, 1]])
            seconds = until_random_moment(run, ranks, chance=chance, steps=steps)
            ranks.signal(signal.SIGKILL, *doomed)
            has_started = run.is_started(ranks)
            left = survivors_leave(ranks, doomed, must=has_started)
            where = place(run) if has_started else "start-up"
            resumed = f"resumed from step {run.resumed_from()}, " if has_started else ""
            if has_started:
                assert run.resumed_from() == good, f"resumed from {run.resumed_from()}, step {good} was good"
            good = max(run.good_steps(), default=0) if run.checkpoints.exists() else 0
            phases[where.split(",")[0]] += 1
            who = "all ranks" if len(doomed) == run.world else f"rank {doomed[0]}"
            print(
                f"kill {number} of {kills}: {who} after {seconds:.1f} s, {resumed}in {where}; {left}"
                f"newest whole checkpoint: step {good}",
                flush=True,
            )
        equal = run.finish(reference)
        assert run.resumed_from() == good
    shares = ", ".join(f"{count} in {phase}" for phase, count in phases.most_common())
    return f"{kills} kills ({shares}) in {time.monotonic() - began:.0f} s; equal to the undisturbed run: {equal}"


def until_random_moment(run: Run, ranks: Ranks, *, chance: random.Random, steps: int) -> float:
    """Return at some moment after a start, not later than when the run is nearly done; the seconds since the start."""
    began = time.monotonic()
    if chance.random() < START_SHARE:
        time.sleep(chance.uniform(0, START_S))
    else:
        count, part_s = chance.randrange(MOST_STEPS), chance.uniform(0, STEP_S)
        ranks.wait_until(lambda: run.is_started(ranks))
        last = min(run.resumed_from() + count, steps - LAST_STEPS)
        ranks.wait_until(lambda: run.last_step() >= last)
        time.sleep(part_s)
    return time.monotonic() - began


def survivors_leave(ranks: Ranks, doomed: list[int], *, must: bool) -> str:
    """Wait for those that were not killed, in words; in a start they are ended as a launcher does."""
    others = set(range(len(ranks.processes))) - set(doomed)
    if not others:
        ranks.wait(lag_s=SOON_S)
        return ""
    if not must:
        ranks.end()
        return ""
    ended = ranks.wait(lag_s=SOON_S)
    codes = {ended.codes[rank] for rank in others}
    assert codes == {RankLostError.exit_code}, "\n".join(ended.said)
    assert all(f"rank {doomed[0]} on " in ended.said[rank] for rank in others), "\n".join(ended.said)
    return f"the other left {ended.lag_s:.1f} s later; "


def place(run: Run) -> str:
    """What the kill interrupted, as the disk shows it."""
    half = [path.name for path in run.checkpoints.glob(".step-*")] if run.checkpoints.exists() else []
    if half:
        return f"a save, of {half[0].removeprefix('.')}"
    if any(run.checkpoints.glob(".old-*")):
        return "a delete"
    return f"training, after step {run.last_step()}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", default="zero2", choices=["ddp", "zero2", "zero3"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        try:
            print(soak(Lab(Path(directory)), engine=arguments.engine, kills=arguments.kills, seed=arguments.seed))
        except AssertionError as error:
            print(f"DIFFERENT: {error}", flush=True)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
