"""Ranks that hang, are stopped, or fail alone: the others do not wait for ever, and say whom they waited for."""

import math
import signal
import socket
import time

import pytest

from sft_dist.errors import RankLostError
from tests.faults.runs import Plan, shared_lab
from tests.faults.table import engines, fault

TIMEOUT_S = 8.0
SPARE_S = 20.0
"""A machine that does much else may take so much longer."""

HANGS: dict[str, tuple[Plan, str]] = {
    "a step": ({"hang_at": 8}, "tests/faults/rank.py"),
    "the background write of a save": ({"slow_write_s": 3600}, "sft_dist/checkpoint.py"),
}


@pytest.mark.parametrize("engine", engines("zero3"))
@pytest.mark.parametrize("where", HANGS)
def test_a_hanging_rank_ends_the_run_with_the_stacks_of_all(engine: str, where: str) -> None:
    plan, file = HANGS[where]
    lab = shared_lab()
    reference = lab.undisturbed(engine)
    name = f"rank 1 hangs in {where}"
    with lab.run(f"hang-{'-'.join(where.split())}", engine) as run, fault(name, engine=f"{engine} x 2") as outcome:
        ranks = run.start({1: plan}, overrides=[f"train.timeout_s={TIMEOUT_S}"])
        ranks.wait_until(lambda: run.is_started(ranks) and run.last_step() >= 3)
        began, last = time.monotonic(), 0
        while (now := run.last_step()) > last:
            last, began = now, time.monotonic()
            time.sleep(1.0)
        ended = ranks.wait()
        seconds = time.monotonic() - began
        assert ended.codes == (RankLostError.exit_code, RankLostError.exit_code), "\n".join(ended.said)
        assert TIMEOUT_S <= seconds < TIMEOUT_S + SPARE_S
        said = "\n".join(ended.said)
        assert "likely cause: rank 1" in said, said
        assert f"rank 1 on {socket.gethostname()}" in said
        for rank in (0, 1):
            assert "most recent call first" in run.log(rank)
        assert file in run.log(1)
        equal = run.finish(reference)
        outcome.text = (
            f"with train.timeout_s={TIMEOUT_S:g} both ended after {seconds:.0f} s, naming rank 1 and its place, "
            f"stacks in both logs; {equal}"
        )


@pytest.mark.parametrize("engine", engines("zero2"))
def test_a_stopped_rank_is_named_and_ends_once_it_runs(engine: str) -> None:
    lab = shared_lab()
    reference = lab.undisturbed(engine)
    slow: Plan = {"slow_step_s": 0.05}
    with lab.run("frozen", engine) as run, fault("SIGSTOP of rank 0", engine=f"{engine} x 2") as outcome:
        ranks = run.start({0: slow, 1: slow}, overrides=[f"train.timeout_s={TIMEOUT_S}"])
        ranks.wait_until(lambda: run.is_started(ranks) and run.last_step() >= 8)
        began = time.monotonic()
        ranks.signal(signal.SIGSTOP, 0)
        ranks.wait_until(lambda: time.monotonic() > began + TIMEOUT_S - 1)
        while ranks.processes[1].exitcode is None:
            assert time.monotonic() < began + TIMEOUT_S + SPARE_S, ranks.tails()
            time.sleep(0.05)
        seconds = time.monotonic() - began
        ranks.signal(signal.SIGCONT, 0)
        ended = ranks.wait(lag_s=SPARE_S)
        assert ended.codes == (RankLostError.exit_code, RankLostError.exit_code), "\n".join(ended.said)
        assert "likely cause: rank 0" in ended.said[1], ended.said[1]
        assert "no heartbeat for" in ended.said[1]
        assert "most recent call first" in run.log(1)
        equal = run.finish(reference)
        outcome.text = (
            f"with train.timeout_s={TIMEOUT_S:g} the other ended after {seconds:.0f} s naming it, "
            f"and rank 0 as soon as it ran again; {equal}"
        )


@pytest.mark.parametrize("engine", engines("zero2"))
def test_an_exception_in_one_rank_ends_all_with_its_words(engine: str) -> None:
    lab, step = shared_lab(), 23
    reference = lab.undisturbed(engine)
    with lab.run("raises", engine) as run, fault("exception in rank 1's batch", engine=f"{engine} x 2") as outcome:
        ended = run.start({1: {"raise_at": step}}).wait()
        assert ended.codes == (RankLostError.exit_code, 1), "\n".join(ended.said)
        assert ended.lag_s < 15
        assert f"rank 1 on {socket.gethostname()}" in ended.said[0]
        assert "IndexError: index out of range in self" in ended.said[0]
        assert "Traceback" not in ended.said[0]
        assert "Traceback" in ended.said[1]
        assert "IndexError: index out of range in self" in run.log(1)
        equal = run.finish(reference)
        assert run.resumed_from() in (18, 21), "21 if what was written behind the training was committed by then"
        left = f"rank 0 left within {math.ceil(ended.lag_s)} s, naming it and its error"
        outcome.text = f"rank 1 shows its traceback; {left}; {equal}"
