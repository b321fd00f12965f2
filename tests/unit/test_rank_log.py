"""Logs of ranks: each has its file, only rank 0 has the console, and a full disk costs no more than the text."""

import os
import subprocess
import sys
from pathlib import Path

from sft_dist.rank_log import flight_recorder_env

ROOT = Path(__file__).parents[2]
CHATTER = """
import logging, os, sys
from pathlib import Path
from sft_dist.rank_log import original_stderr, per_rank_log
from sft_dist.world import World
logging.basicConfig(level=logging.WARNING, format="console %(message)s", stream=sys.stderr)
with per_rank_log(Path(sys.argv[1]), World(rank=int(sys.argv[2]), size=2, local_rank=int(sys.argv[2]), local_size=2)):
    print("printed")
    os.system("echo from a child process")
    logging.getLogger("sft_dist.train").info("own info")
    logging.getLogger("library").info("library info")
    logging.getLogger("library").warning("library warning")
    print("for the user", file=original_stderr(), flush=True)
    for _ in range(2000):
        print("much text " * 5)
print("after")
print("after, on stderr", file=sys.stderr)
"""


def chatter(run_dir: Path, *, rank: int) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", CHATTER, str(run_dir), str(rank)],
        cwd=ROOT,
        # Into a pipe as to a terminal: each line at once, so that the child process's comes after it.
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        timeout=30,
        capture_output=True,
        text=True,
    )


def test_other_ranks_print_into_their_logs(tmp_path: Path) -> None:
    result = chatter(tmp_path, rank=1)
    log = (tmp_path / "logs" / "rank-00001.log").read_text()
    assert result.returncode == 0, result.stderr
    assert result.stdout == "after\n"
    assert result.stderr == "for the user\nafter, on stderr\n"
    assert "printed\nfrom a child process\n" in log
    assert log.count("much text \n") == 2000


def test_the_log_says_who_and_when_and_leaves_out_what_libraries_only_inform_of(tmp_path: Path) -> None:
    for _ in range(2):
        chatter(tmp_path, rank=1)
    log = (tmp_path / "logs" / "rank-00001.log").read_text()
    starts = [line for line in log.splitlines() if "rank 1 of 2 starts on" in line]
    assert len(starts) == 2  # appended
    assert starts[0][:2] == "20"
    assert " INFO rank 1 sft_dist.rank_log: " in starts[0]
    assert " INFO rank 1 sft_dist.train: own info" in log
    assert " WARNING rank 1 library: library warning" in log
    assert "library info" not in log


def test_rank_0_keeps_its_console(tmp_path: Path) -> None:
    result = chatter(tmp_path, rank=0)
    log = (tmp_path / "logs" / "rank-00000.log").read_text()
    assert result.stdout.startswith("printed\n")
    assert (
        result.stderr == "console library warning\nfor the user\nafter, on stderr\n"
    )  # what the file asked for is not here
    assert "own info" in log
    assert "printed" not in log


def test_a_full_disk_costs_only_the_text(tmp_path: Path) -> None:
    for rank in (0, 1):
        (tmp_path / "logs").mkdir(exist_ok=True)
        (tmp_path / "logs" / f"rank-0000{rank}.log").symlink_to("/dev/full")
        result = chatter(tmp_path, rank=rank)
        assert result.returncode == 0, result.stderr
        assert result.stderr.count("cannot be written") == (1 if rank == 0 else 0)  # once per host
        assert "Traceback" not in result.stderr
        assert result.stdout.endswith("after\n")


def test_a_log_that_cannot_be_opened_is_said_and_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where the folder should be")
    result = chatter(tmp_path, rank=0)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("cannot be written") == 1
    assert "for the user" in result.stderr


def test_the_flight_recorder_dumps_beside_the_logs(tmp_path: Path) -> None:
    environ: dict[str, str] = {}
    flight_recorder_env(tmp_path, environ)
    assert environ == {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_FR_DUMP_TEMP_FILE": f"{tmp_path}/logs/nccl-rank-",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }


def test_flight_recorder_settings_of_the_user_stay(tmp_path: Path) -> None:
    chosen = {
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "7",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/x",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    }
    environ = dict(chosen)
    flight_recorder_env(tmp_path, environ)
    assert environ == chosen
