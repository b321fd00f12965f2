"""Heartbeats: what is written is read, what is torn or foreign is not, and a zombie is dead."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sft_dist import heartbeat
from sft_dist.heartbeat import LEFT, RUNNING, Heartbeat


def of_process(pid: int) -> Heartbeat:
    """A heartbeat as the process itself would have written it."""
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return replace(heartbeat.first_heartbeat(1, "h"), pid=pid, started=int(ticks))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    own = replace(
        heartbeat.first_heartbeat(3, "node-7"), step=17, phase="forward", state=LEFT, reason='a "reason" ü\n2'
    )
    heartbeat.write(tmp_path, own)
    assert heartbeat.read(tmp_path, 3) == own
    assert (tmp_path / "rank-00003.json").exists()


def test_a_shorter_line_leaves_nothing_of_a_longer_one(tmp_path: Path) -> None:
    own = heartbeat.first_heartbeat(0, "h")
    heartbeat.write(tmp_path, replace(own, phase="p" * 300))
    heartbeat.write(tmp_path, own)
    lines = heartbeat.path_of(tmp_path, 0).read_text().splitlines()
    assert len(lines) == 1
    assert json.loads(lines[0])["phase"] == own.phase


def test_a_long_reason_is_cut_and_the_rest_kept(tmp_path: Path) -> None:
    own = replace(heartbeat.first_heartbeat(0, "h"), state=LEFT, reason="é" * 5000, where="w" * 100)
    heartbeat.write(tmp_path, own)
    found = heartbeat.read(tmp_path, 0)
    assert found is not None
    assert found.reason.startswith("é" * 100)
    assert replace(found, reason="") == replace(own, reason="")


def test_torn_and_foreign_lines_are_ignored(tmp_path: Path) -> None:
    own = heartbeat.first_heartbeat(0, "h")
    heartbeat.write(tmp_path, own)
    path = heartbeat.path_of(tmp_path, 0)
    whole = path.read_bytes()
    for line in (
        b"",
        whole[:200],
        b"\0" * len(whole),
        b"[]\n",
        b'{"rank": 0}\n',
        whole.replace(b'"beat": 0', b'"beat": "0"'),
        whole.replace(b'"rank": 0', b'"rank": 1'),
    ):
        path.write_bytes(line)
        assert heartbeat.read(tmp_path, 0) is None, line[:60]
    assert heartbeat.read(tmp_path, 7) is None


def test_all_heartbeats_come_by_rank(tmp_path: Path) -> None:
    for rank in (10, 2, 0):
        heartbeat.write(tmp_path, heartbeat.first_heartbeat(rank, "h"))
    (tmp_path / "rank-00001.json").write_text("torn")
    (tmp_path / "rank-x.json").write_text("{}")
    assert [found.rank for found in heartbeat.read_all(tmp_path)] == [0, 2, 10]
    assert heartbeat.read_all(tmp_path / "none") == []


def test_this_process_is_alive() -> None:
    assert heartbeat.is_alive(heartbeat.first_heartbeat(0, "h")) is True


def test_a_zombie_is_dead() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    own = of_process(child.pid)
    assert heartbeat.is_alive(own) is True
    child.kill()
    deadline = time.monotonic() + 5
    while heartbeat.is_alive(own) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert heartbeat.is_alive(own) is False
    assert Path(f"/proc/{child.pid}").exists()  # not yet collected
    child.communicate(timeout=5)
    assert heartbeat.is_alive(own) is False


def test_another_process_with_the_same_pid_is_not_the_one_that_beat() -> None:
    own = heartbeat.first_heartbeat(0, "h")
    assert heartbeat.is_alive(replace(own, started=own.started - 1)) is False


@pytest.mark.parametrize("namespace", ["", "another-boot pid:[4026531836]"])
def test_a_process_elsewhere_cannot_be_judged(namespace: str) -> None:
    own = replace(heartbeat.first_heartbeat(0, "h"), pid=2**22 + 1, pid_namespace=namespace)
    assert heartbeat.is_alive(own) is None


def test_a_beat_that_cannot_be_written_raises(tmp_path: Path) -> None:
    heartbeat.path_of(tmp_path, 0).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space"):
        heartbeat.write(tmp_path, heartbeat.first_heartbeat(0, "h"))
    assert heartbeat.first_heartbeat(0, "h").state == RUNNING
    assert os.path.islink(heartbeat.path_of(tmp_path, 0))
