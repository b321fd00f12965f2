"""`sft-dist launch` with two ranks: what a signal does to it, and what it leaves behind."""

import json
import os
import signal
from pathlib import Path

from sft_dist.run_files import INTERRUPTED, STOP_FILE
from tests.launch.launched import LOOPBACK, launched

LAUNCH = ("python", "-m", "sft_dist", "launch", "--processes", "2", "--engine", "zero2")


def test_two_signals_to_the_launcher_save_once_and_it_returns_0(tmp_path: Path, tied_model: Path) -> None:
    with launched(LAUNCH, tmp_path, tied_model) as run:
        run.wait_for_steps(5)
        assert len(run.ranks()) == 2
        assert run.listening() <= LOOPBACK
        run.process.send_signal(signal.SIGINT)
        run.process.send_signal(signal.SIGTERM)
        assert run.exit_code() == 0, run.log.read_text()
        assert run.wait_until_gone(0) == set()
        assert run.checkpoints() == [f"step-{len(run.steps()):08d}"], "at the step that all agreed on"
        assert len(run.steps()) < 3000
        assert not (run.run_dir / STOP_FILE).exists()
        assert json.loads((run.run_dir / INTERRUPTED).read_text())["step"] == len(run.steps())
        said = run.log.read_text()
        assert "SIGINT: all ranks finish this step" in said
        assert "SIGTERM: already stopping" in said
        assert "stopped on request after step" in said


def test_a_signal_to_one_rank_stops_all(tmp_path: Path, tied_model: Path) -> None:
    with launched(LAUNCH, tmp_path, tied_model) as run:
        run.wait_for_steps(5)
        os.kill(run.ranks()[-1], signal.SIGUSR1)
        assert run.exit_code() == 0, run.log.read_text()
        assert run.wait_until_gone(0) == set()
        assert run.checkpoints() == [f"step-{len(run.steps()):08d}"]


def test_ranks_of_a_killed_launcher_save_and_end(tmp_path: Path, tied_model: Path) -> None:
    with launched(LAUNCH, tmp_path, tied_model) as run:
        run.wait_for_steps(5)
        run.process.kill()
        assert run.exit_code() == 128 + signal.SIGKILL
        assert run.wait_until_gone(15) == set()
        assert run.checkpoints() == [f"step-{len(run.steps()):08d}"], run.log.read_text()


def test_the_ranks_own_exit_code_is_returned(tmp_path: Path, tied_model: Path) -> None:
    """accelerate alone says 1, and ends rank 0 before it spoke when another rank is quicker."""
    slow = "import os, time; time.sleep(5 * (os.environ.get('RANK') == '0'))"
    (tmp_path / "sitecustomize.py").write_text(slow)
    with launched((*LAUNCH[:-1], "single"), tmp_path, tied_model) as run:
        assert run.exit_code(timeout_s=60) == 2, run.log.read_text()
        assert "train.engine=single was started as 2 processes" in run.log.read_text()
