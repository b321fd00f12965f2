"""The table of docs/signals.md, done again: stock launchers, each signal, on real processes."""

import os
import re
import signal
from pathlib import Path

import pytest

from sft_dist import package_files
from tests.launch.launched import LOOPBACK, ROOT, launched

TRAIN = ("-m", "sft_dist", "train")
CONFIG = str(package_files.find("accelerate/cpu-2.yaml"))
PLAIN = ("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
COMMANDS = {
    "accelerate": ("accelerate", "launch", "--config_file", CONFIG, *TRAIN),
    "torchrun": ("torchrun", "--standalone", "--nproc_per_node", "2", *TRAIN),
    "accelerate-1": ("accelerate", "launch", "--num_processes", "1", *PLAIN, *TRAIN),
}
ROWS = re.findall(r"^\| `([\w-]+)` \| (SIG\w+) \| (\d+) \| yes \|", (ROOT / "docs" / "signals.md").read_text(), re.M)


def test_the_table_has_a_row_for_each_launcher_and_signal() -> None:
    signals = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGKILL")
    assert sorted(row[:2] for row in ROWS) == sorted((launcher, name) for launcher in COMMANDS for name in signals)


@pytest.mark.parametrize(("launcher", "name", "code"), ROWS, ids=[f"{row[0]}-{row[1]}" for row in ROWS])
def test_no_signal_to_a_stock_launcher_loses_the_run(
    tmp_path: Path, tied_model: Path, launcher: str, name: str, code: str
) -> None:
    with launched(COMMANDS[launcher], tmp_path, tied_model) as run:
        run.wait_for_steps(5)
        os.kill(run.process.pid, signal.Signals[name])
        assert run.exit_code() == int(code), run.log.read_text()
        assert run.wait_until_gone(15) == set()
        assert run.checkpoints() == [f"step-{len(run.steps()):08d}"], run.log.read_text()


@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_a_stop_file_makes_a_stock_launcher_return_0(tmp_path: Path, tied_model: Path, launcher: str) -> None:
    with launched(COMMANDS[launcher], tmp_path, tied_model) as run:
        run.wait_for_steps(5)
        assert run.listening() - LOOPBACK == {"0" * 32}, "the launcher's own store, on every interface"
        (run.run_dir / "STOP").touch()
        assert run.exit_code() == 0, run.log.read_text()
        assert run.checkpoints() == [f"step-{len(run.steps()):08d}"]
