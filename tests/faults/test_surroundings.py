"""What happens around a run: a tokeniser process dies, a second job starts, there is no network."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sft_dist.errors import ConfigError, DataError
from sft_dist.launch import descendants
from tests.faults.runs import PATIENCE_S, Plan, Ranks, shared_lab
from tests.faults.table import engines, fault

SLOW: Plan = {"slow_step_s": 0.05}


def tokeniser_processes(ranks: Ranks) -> list[int]:
    """Those that rank 0 has started."""
    found = []
    for pid, _ in descendants(ranks.processes[0].pid or 0):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if any(b"spawn_main" in word for word in words):
            found.append(pid)
    return found


@pytest.mark.parametrize("engine", engines("ddp"))
def test_a_killed_tokeniser_process_is_said_and_leaves_nothing_half(engine: str) -> None:
    lab = shared_lab()
    reference = lab.undisturbed(engine)
    stores = lab.directory / f"stores-{engine}"
    settings = [f"data.store={stores}", "data.workers=2"]
    plans: dict[int, Plan] = {0: {"no_small_data": True}, 1: {"grace_s": 4.0}}
    name = "SIGKILL of a tokeniser process while the data is prepared"
    with lab.run("tokeniser-killed", engine) as run, fault(name, engine=f"{engine} x 2") as outcome:
        ranks = run.start(plans, overrides=settings)
        ranks.wait_until(lambda: tokeniser_processes(ranks))
        os.kill(tokeniser_processes(ranks)[0], signal.SIGKILL)
        ended = ranks.wait()
        assert ended.codes == (DataError.exit_code, DataError.exit_code), "\n".join(ended.said)
        assert "one of 2 tokeniser processes died" in ended.said[0]
        assert "Traceback" not in "".join(ended.said)
        assert [path for path in stores.glob("*") if path.is_dir() and not path.name.startswith(".")] == []
        ended = run.start(plans, overrides=settings).wait()
        assert ended.codes == (0, 0), "\n".join(ended.said)
        outcome.text = f"both ranks ended with exit code 2, rank 0 saying it; the next start: {run.equals(reference)}"


@pytest.mark.parametrize("engine", engines("ddp"))
def test_a_second_job_is_refused_and_the_first_not_disturbed(engine: str) -> None:
    lab = shared_lab()
    reference = lab.undisturbed(engine)
    with lab.run("two-jobs", engine) as run, fault("two jobs on one run directory", engine=f"{engine} x 2") as outcome:
        first = run.start({0: SLOW, 1: SLOW})
        first.wait_until(lambda: run.is_started(first) and run.last_step() >= 5)
        before = run.last_step()
        refused = run.start().wait()
        assert refused.codes == (ConfigError.exit_code, ConfigError.exit_code), "\n".join(refused.said)
        assert "another process is training here" in refused.said[0]
        first.wait_until(lambda: run.last_step() > before)
        assert run.last_step() < len(reference.curve()), "the first works on meanwhile"
        ended = first.wait()
        assert ended.codes == (0, 0), "\n".join(ended.said)
        assert run.attempts == 1
        outcome.text = f"the second is refused with exit code 2; the first finished: {run.equals(reference)}"


@pytest.mark.parametrize("engine", engines("zero2"))
def test_two_ranks_train_where_there_is_no_network_but_loopback(engine: str) -> None:
    lab = shared_lab()
    reference = lab.undisturbed(engine)
    with lab.run("offline", engine) as run, fault("no network but loopback", engine=f"{engine} x 2") as outcome:
        launch = ["-m", "sft_dist", "launch", "--processes", "2", str(run.recipe)]
        without_network(launch, loopback=True)
        outcome.text = f"`sft-dist launch` trains: {run.equals(reference)}"


def test_one_process_trains_where_there_is_no_network_at_all() -> None:
    lab = shared_lab()
    reference = lab.undisturbed("zero2")
    with lab.run("offline", "single") as run, fault("no network, no loopback", engine="single") as outcome:
        without_network(["-m", "sft_dist", "train", str(run.recipe)], loopback=False)
        losses = [[line["loss"] for line in one.curve().values()] for one in (run, reference)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        outcome.text = f"trained {len(losses[0])} steps; losses equal those of zero2 x 2 within 1e-5"


def without_network(words: list[str], *, loopback: bool) -> None:
    """Run python in a network namespace of its own; its loopback is down unless `loopback`."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "--map-root-user", "--net", "true"], check=False).returncode:
        pytest.skip("this machine lets no process take its network away (unshare --map-root-user --net)")
    up = f"{shutil.which('ip')} link set lo up && " if loopback else ""
    command = [unshare, "--map-root-user", "--net", "sh", "-c", f'{up}exec "$@"', "sh", sys.executable, *words]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
