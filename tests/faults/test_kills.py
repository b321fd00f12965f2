"""SIGKILL at every stage of a save and in a step: the next start goes on as if nothing had happened."""

import functools
import math
import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from sft_dist.errors import RankLostError
from tests.faults.rank import COMMITTED_POINTS, POINTS
from tests.faults.runs import SAVE_EVERY, Plan, Run, shared_lab
from tests.faults.table import engines, fault
from tests.launch.launched import launched

SOON_S = 15.0
"""The others of a dead rank leave within so long."""

LAUNCHERS = {
    "sft-dist launch": ("python", "-m", "sft_dist", "launch", "--processes", "2"),
    "torchrun": ("torchrun", "--standalone", "--nproc_per_node", "2", "-m", "sft_dist", "train"),
}


@dataclass(frozen=True)
class Kill:
    """SIGKILL of `rank`, or with it of all, at a point of its save."""

    point: str
    rank: int = 0
    whom: str = "self"

    @property
    def name(self) -> str:
        if self.whom == "self":
            return f"SIGKILL of rank {self.rank} in a save, {POINTS[self.point]}"
        point = POINTS[self.point].replace("its file", f"rank {self.rank}'s file")
        return f"SIGKILL of all ranks in a save, {point}"


ALL_DIE = tuple(Kill(point, whom="all") for point in POINTS)
ONE_DIES = (
    Kill("first byte", rank=1),
    Kill("half a file", rank=1),
    Kill("half a file", rank=0),
    Kill("told", rank=1),
    Kill("manifest", rank=0),
    Kill("COMMITTED", rank=0),
    Kill("renamed", rank=0),
)


def goes_through(run: Run, reference: Run, kills: Sequence[Kill]) -> None:
    """One run that is killed again and again, each time in the second save after its start; at last it finishes."""

    def step_of_kill(good: int) -> int:
        return good + 2 * SAVE_EVERY

    def plans(kill: Kill | None, good: int) -> dict[int, Plan]:
        if kill is None:
            return {}
        return {kill.rank: {"kill": {"at": kill.point, "step": step_of_kill(good), "whom": kill.whom}}}

    good = 0
    ranks = run.start(plans(kills[0], good))
    for kill, following in pairwise([*kills, None]):
        assert kill is not None
        with fault(kill.name, engine=f"{run.engine} x 2") as outcome:
            ended = ranks.wait()
            killed = -signal.SIGKILL
            survivor = 1 - kill.rank
            if kill.whom == "all":
                assert ended.codes == (killed, killed), "\n".join(ended.said)
                left = ""
            else:
                assert (ended.codes[kill.rank], ended.codes[survivor]) == (killed, RankLostError.exit_code), ended
                assert ended.lag_s < SOON_S
                assert f"rank {kill.rank} on {socket.gethostname()}" in ended.said[survivor]
                left = f"the other left within {math.ceil(ended.lag_s)} s naming it; "
            step = step_of_kill(good)
            expected = step if kill.point in COMMITTED_POINTS else step - SAVE_EVERY
            assert max(run.good_steps()) == expected
            assert run.broken_steps() == []
            good = expected
            ranks = run.start(plans(following, good))
            ranks.wait_until(functools.partial(run.is_started, ranks))
            assert run.resumed_from() == expected
            replayed = run.matches(reference)
            assert replayed >= 0
            outcome.text = f"{left}resumed from step {expected}, the newest whole one (killed saving step {step})"
    with fault(f"the run after these {len(kills)}", engine=f"{run.engine} x 2") as outcome:
        ended = ranks.wait()
        assert ended.codes == (0, 0), "\n".join(ended.said)
        outcome.text = f"finished; equal to the undisturbed one: {run.equals(reference)}"
    assert sorted(path.name for path in run.checkpoints.iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize("engine", engines("zero2"))
def test_all_ranks_killed_at_each_stage_of_a_save(engine: str) -> None:
    lab = shared_lab()
    reference = lab.undisturbed(engine)
    with lab.run("all-killed", engine) as run:
        goes_through(run, reference, ALL_DIE)


@pytest.mark.parametrize("engine", engines("zero3"))
def test_one_rank_killed_at_each_stage_of_a_save(engine: str) -> None:
    lab = shared_lab()
    reference = lab.undisturbed(engine)
    with lab.run("one-killed", engine) as run:
        goes_through(run, reference, ONE_DIES)


@pytest.mark.parametrize("engine", engines("zero2"))
@pytest.mark.parametrize("rank", [0, 1])
def test_the_others_of_a_killed_rank_leave_and_name_it(engine: str, rank: int) -> None:
    lab, step = shared_lab(), 41
    reference = lab.undisturbed(engine)
    name = f"SIGKILL of rank {rank} within a step, in epoch {reference.curve()[step]['epoch']}"
    with lab.run(f"killed-{rank}", engine) as run, fault(name, engine=f"{engine} x 2") as outcome:
        ended = run.start({rank: {"kill_at": step}}).wait()
        assert (ended.codes[rank], ended.codes[1 - rank]) == (-signal.SIGKILL, RankLostError.exit_code), ended
        assert ended.lag_s < SOON_S
        said = ended.said[1 - rank]
        assert f"rank {rank} on {socket.gethostname()}" in said
        assert "died after step" in said
        equal = run.finish(reference)
        assert run.resumed_from() in (36, 39), "39 if what was written behind the training was committed by then"
        outcome.text = f"the other left within {math.ceil(ended.lag_s)} s naming rank, host and step; {equal}"


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_of_a_killed_rank_ends_and_leaves_nobody(tmp_path: Path, tied_model: Path, launcher: str) -> None:
    with fault(f"SIGKILL of one rank under `{launcher}`", engine="ddp x 2") as outcome:
        with launched(LAUNCHERS[launcher], tmp_path, tied_model) as run:
            run.wait_for_steps(5)
            os.kill(run.ranks()[-1], signal.SIGKILL)
            code = run.exit_code()
            assert code == (RankLostError.exit_code if "sft" in launcher else 1), run.log.read_text()
            assert run.wait_until_gone(SOON_S) == set()
        outcome.text = f"exit code {code}, no process left"


def test_every_point_of_a_save_is_tried() -> None:
    assert [kill.point for kill in ALL_DIE] == list(POINTS)
    assert {*COMMITTED_POINTS} < {*POINTS}
