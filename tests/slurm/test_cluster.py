"""The throwaway cluster: quick to come, and gone without a trace whatever ends it. Clusters within the cluster."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from sft_dist.launch import descendants
from tests.slurm.jobs import CLUSTER_SH

FREEZER = "mount -t cgroup -o freezer freezer /mnt && find /mnt -name 'slurm_*'"


def start(*command: str) -> "subprocess.Popen[str]":
    """A cluster with a command, in a session of its own."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("CLUSTER", "SLURM"))}
    return subprocess.Popen(
        [CLUSTER_SH, *command],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def control_groups() -> set[str]:
    """Those of SLURM in the machine's hierarchy; none where the kernel has no such hierarchy."""
    found = subprocess.run(["unshare", "--mount", "bash", "-c", FREEZER], capture_output=True, text=True, timeout=20)
    return set(found.stdout.split())


def test_it_is_up_within_20_s_and_hands_the_exit_code_on() -> None:
    started = time.monotonic()
    cluster = start("bash", "-c", "srun --nodes=2 --gpus-per-node=2 bash -c 'echo $CUDA_VISIBLE_DEVICES'; exit 7")
    said, errors = cluster.communicate(timeout=60)
    assert cluster.returncode == 7, errors
    assert said.split() == ["0,1", "0,1"]
    up = re.search(r"cluster: 2 nodes idle after (\d+) ms, proctrack/(\w+)", errors)
    assert up, errors
    assert int(up[1]) < 20_000
    assert time.monotonic() - started < 30


MEETING = """
read -r first second < <(sinfo --noheader --partition=batch --Node --format=%N | xargs)
listen='import socket, time; listener = socket.create_server(("", 5000)); print(flush=True); time.sleep(20)'
srun --nodelist="$first" python3 -c "$listen" > >(read -r && srun --nodelist="$second" bash -c "
    for host in $first localhost; do (: </dev/tcp/\\$host/5000) && echo \\$host; done; exit 0")
"""


def test_each_node_is_a_host_of_its_own() -> None:
    """As on a real cluster: who is told to meet on localhost meets nobody."""
    cluster = start("bash", "-c", MEETING)
    assert cluster.stdout is not None
    reached = cluster.stdout.readline()
    cluster.kill()
    rest, errors = cluster.communicate(timeout=30)
    assert re.fullmatch(r"c\w+n1\n", reached), reached + errors
    assert not rest
    assert "refused" in errors


@pytest.mark.parametrize("how", ["kill", "kill the group", "terminate"])
def test_nothing_is_left_behind(how: str) -> None:
    before = control_groups()
    cluster = start("bash", "-c", "srun --nodes=2 bash -c 'sleep 300 & sleep 300' & sleep 1; echo up; wait")
    assert cluster.stdout is not None
    assert cluster.stdout.readline() == "up\n"
    pids = {pid for pid, _ in descendants(cluster.pid)}
    assert len(pids) >= 10, "daemons, job steps and what they started"
    if how == "kill":
        cluster.kill()
    elif how == "terminate":
        cluster.terminate()
    else:
        os.killpg(cluster.pid, signal.SIGKILL)
    assert cluster.wait(timeout=20) in (-signal.SIGKILL, 124, 137, 143)
    deadline = time.monotonic() + 15
    while any(Path(f"/proc/{pid}").exists() for pid in pids) or control_groups() - before:
        assert time.monotonic() < deadline, f"left: {control_groups() - before}"
        time.sleep(0.1)
