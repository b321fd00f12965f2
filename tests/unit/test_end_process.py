"""How a process ends: as `sys.exit` ends it, without an interpreter taken apart under threads that still need it."""

import os
import subprocess
import sys

import pytest

from tests import tiny

# Thirty sums that nobody waits for, on a group that somebody holds, as DeepSpeed holds its own.
UNFINISHED = """
import torch
import torch.distributed as dist
from sft_dist.engine.collectives import join_process_group, leave_process_group
from sft_dist.world import end_process, read_world
join_process_group(read_world(), torch.device("cpu"), timeout_s=60, needed=True)
held = dist.group.WORLD
dist.barrier()
values = [torch.ones(1_000_000) for _ in range(30)]
for value in values:
    dist.all_reduce(value, async_op=True)
del value, values
leave_process_group()
end_process(0)
"""

ENDS = """
import atexit, sys, threading, time
from sft_dist.world import end_process

class Part:
    def __del__(self):
        print("taken apart", flush=True)

part = Part()
atexit.register(print, "asked to run at exit")
threading.Thread(target=lambda: (time.sleep(0.2), print("a thread's last words"))).start()
end_process(3)
"""


@pytest.mark.parametrize("attempt", range(3))
def test_a_rank_ends_in_peace_while_gloo_still_works(attempt: int) -> None:
    tiny.run_ranks(["-c", UNFINISHED], world_size=2, timeout_s=60)


def test_threads_exit_functions_and_output_are_waited_for() -> None:
    ended = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 3
    assert ended.stdout == "a thread's last words\nasked to run at exit\n", "and nothing is taken apart"
    assert ended.stderr == ""


def test_nobody_reading_is_no_error() -> None:
    code = "import sys; sys.stdout.write('unread'); from sft_dist.world import end_process; end_process(4)"
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, env=buffered, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 4
