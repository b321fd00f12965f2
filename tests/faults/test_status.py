"""A rank that computes slowly, in a real run that is looked at from outside while it trains."""

import json

import pytest

from sft_dist import cli
from sft_dist.run_files import STOP_FILE
from sft_dist.status import read_status
from tests.faults.runs import shared_lab
from tests.faults.table import engines, fault

SLOW_S = 0.06


@pytest.mark.parametrize("engine", engines("zero2"))
def test_a_rank_that_computes_slowly_is_named_while_the_run_trains(
    engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with fault("rank 1 computes slowly", engine=f"{engine} x 2") as outcome, shared_lab().run("slow", engine) as run:
        ranks = run.start({1: {"slow_forward_s": SLOW_S}})
        ranks.wait_until(lambda: run.is_started(ranks) and run.last_step() >= 8)
        # Both ranks have written their figures a beat after they had them.
        ranks.wait_until(lambda: len(read_status(run.directory).slow_ranks) > 0, timeout_s=20)
        found = read_status(run.directory)
        assert cli.main(["status", str(run.directory)]) == 0
        assert (found.state, found.world_size) == ("running", 2)
        assert [rank.rank for rank in found.slow_ranks] == [1]
        fast, slow = (rank.forward_s or 0.0 for rank in found.ranks)
        assert slow - fast > 0.8 * SLOW_S
        said = " ".join(capsys.readouterr().out.split())
        assert "state running: in step" in said
        assert "slow: rank 1 on" in said
        assert found.left_s is not None
        assert found.left_s > 0

        (run.directory / STOP_FILE).touch()
        assert ranks.wait().codes == (0, 0)
        before = {path: path.lstat() for path in sorted(run.directory.rglob("*"))}
        assert cli.main(["status", str(run.directory), "--json"]) == 0
        ended = json.loads(capsys.readouterr().out)
        assert (ended["state"], ended["step"]) == ("stopped", run.last_step())
        assert ended["commit_step"] == ended["step"]
        after = {path: path.lstat() for path in sorted(run.directory.rglob("*"))}
        assert {path: (s.st_size, s.st_mtime_ns, s.st_ctime_ns) for path, s in after.items()} == {
            path: (s.st_size, s.st_mtime_ns, s.st_ctime_ns) for path, s in before.items()
        }
        outcome.text = (
            f"named by `sft-dist status` while the run went on: {slow * 1e3:.0f} ms of forward passes a step, "
            f"of rank 0 {fast * 1e3:.0f} ms"
        )
