"""Several hosts without a scheduler: two, joined by a cable, that know each other by address only."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from sft_dist.commits import committed
from sft_dist.metrics import read_steps
from sft_dist.run_files import INTERRUPTED, STOP_FILE
from tests import tiny
from tests.hosts.namespaces import Host, missing, two_hosts
from tests.launch.launched import NO_COMPILER

ROOT = Path(__file__).parents[2]
PORT = "29533"  # of a network that is made here
ENVIRON = os.environ | NO_COMPILER | {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
MISSING = missing()
needs_hosts = pytest.mark.skipif(MISSING != "", reason=MISSING)


@pytest.fixture
def recipe(tmp_path: Path, tied_model: Path) -> Callable[[str, int], Path]:
    tiny.write_chats(tmp_path / "train.jsonl", num_examples=40, seed=0, longest=60)

    def write(name: str, steps: int) -> Path:
        raw = {
            "run": {"name": name, "dir": str(tmp_path), "report": False},
            "model": {"path": str(tied_model)},
            "data": {"train": str(tmp_path / "train.jsonl"), "max_tokens": 128},
            "batch": {"examples": 8},
            "optim": {"lr": 1e-3},
            "train": {"steps": steps, "engine": "zero2"},
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(raw))
        return path

    return write


class Launchers:
    """The same command on both hosts, and what they print."""

    def __init__(self, hosts: tuple[Host, Host], words: Callable[[int], list[str]], folder: Path, **environ: str):
        self.logs = [folder / f"{host.name}.txt" for host in hosts]
        self.processes = []
        for index, (host, log) in enumerate(zip(hosts, self.logs, strict=True)):
            with log.open("w") as out:
                command = host.command(words(index))
                settings = ENVIRON | environ | {"HOST_INDEX": str(index)}
                process = subprocess.Popen(command, env=settings, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
            self.processes.append(process)

    def launcher(self, index: int) -> int:
        """The pid of what was started on a host: the child of `nsenter`."""
        pid = self.processes[index].pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def said(self) -> str:
        return "".join(f"--- {log.name}\n{log.read_text()[-4000:]}" for log in self.logs)

    def exit_code(self, index: int, *, timeout_s: float = 60) -> int:
        try:
            return self.processes[index].wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"host {index} did not end:\n{self.said()}") from None

    def wait_for_steps(self, run_dir: Path, count: int) -> None:
        deadline = time.monotonic() + 60
        while len(read_steps(run_dir / "metrics.jsonl")) < count:
            assert time.monotonic() < deadline, self.said()
            assert all(process.poll() is None for process in self.processes), self.said()
            time.sleep(0.01)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Launchers]]:
    """Starts launchers; they end with their hosts, and are collected here."""
    started: list[Launchers] = []

    def start_launchers(hosts: tuple[Host, Host], words: Callable[[int], list[str]], **environ: str) -> Launchers:
        started.append(Launchers(hosts, words, tmp_path, **environ))
        return started[-1]

    yield start_launchers
    for launchers in started:
        for process in launchers.processes:
            process.wait(timeout=10)


def launch_words(recipe_path: Path, main: Host) -> Callable[[int], list[str]]:
    """`sft-dist launch` as a host of the pair runs it."""

    def words(index: int) -> list[str]:
        flags = ["--hosts", "2", "--host-index", str(index), "--main-host", main.address, "--port", PORT]
        return [sys.executable, "-m", "sft_dist", "launch", str(recipe_path), *flags]

    return words


@needs_hosts
def test_a_signal_on_one_host_stops_both_and_another_launcher_goes_on(
    recipe: Callable[[str, int], Path], start: Callable[..., Launchers], tmp_path: Path
) -> None:
    """The losses are those of two processes on one host, bit for bit."""
    one_host, two = recipe("one", 60), recipe("two", 60)
    tiny.run_ranks(["-m", "sft_dist", "train", str(one_host)], world_size=2, timeout_s=60, **NO_COMPILER)
    run_dir = tmp_path / "two"
    run_dir.mkdir()
    (run_dir / STOP_FILE).touch()  # left by an earlier run: host 0 removes it
    with two_hosts() as hosts:
        launchers = start(hosts, launch_words(two, hosts[0]))
        launchers.wait_for_steps(run_dir, 3)
        os.kill(launchers.launcher(1), signal.SIGTERM)
        codes = [launchers.exit_code(0), launchers.exit_code(1)]
        assert codes == [0, 0], launchers.said()
        assert (run_dir / INTERRUPTED).exists()
        assert not (run_dir / STOP_FILE).exists()
        stopped_after = len(read_steps(run_dir / "metrics.jsonl"))
        assert 3 <= stopped_after < 60
        assert [path.name for path in committed(run_dir / "checkpoints")] == [f"step-{stopped_after:08d}"]

        script = [str(ROOT / "launch" / "several_hosts.sh"), str(two)]
        environ = {"HOSTS": "2", "MAIN_HOST": hosts[0].address, "PORT": PORT, "PROCESSES": "1"}
        # The names of these hosts do not resolve; the script leaves that to whoever runs it.
        with_interface = ["sh", "-c", 'GLOO_SOCKET_IFNAME=veth-$HOST_INDEX exec "$@"', "-", *script]
        launchers = start(hosts, lambda _: with_interface, **environ)
        codes = [launchers.exit_code(0), launchers.exit_code(1)]
        assert codes == [0, 0], launchers.said()
        assert f"resumed after step {stopped_after}" in launchers.logs[0].read_text()
    whole, resumed = (read_steps(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert {step: line["loss"] for step, line in resumed.items()} == {s: line["loss"] for s, line in whole.items()}
    assert (run_dir / "model" / "model.safetensors").read_bytes() == (
        tmp_path / "one" / "model" / "model.safetensors"
    ).read_bytes()


@needs_hosts
def test_when_a_host_dies_the_launcher_of_the_other_ends_with_a_line(
    recipe: Callable[[str, int], Path], start: Callable[..., Launchers], tmp_path: Path
) -> None:
    path = recipe("dies", 3000)
    with two_hosts() as hosts:
        launchers = start(hosts, launch_words(path, hosts[0]))
        launchers.wait_for_steps(tmp_path / "dies", 2)
        hosts[1].end()
        assert launchers.exit_code(0, timeout_s=40) == 5, launchers.said()
        said = launchers.logs[0].read_text()
        assert "rank 1 on nowhere-1" in said, said
        assert "has given no sign of life" in said
        assert "the last committed checkpoint is whole" in said
        left = subprocess.run(hosts[0].command(["ps", "-e", "-o", "comm="]), capture_output=True, text=True)
        assert left.stdout.split() == ["cat", "ps"], "nothing but this host's first process"


@needs_hosts
def test_a_host_that_waits_for_the_others_ends_on_a_signal(
    recipe: Callable[[str, int], Path], start: Callable[..., Launchers], tmp_path: Path
) -> None:
    path = recipe("waits", 3)
    with two_hosts() as hosts:
        words = launch_words(path, hosts[0])
        launchers = start(hosts, lambda index: words(0) if index == 0 else ["true"])
        deadline = time.monotonic() + 30
        listening = hosts[0].command(["sh", "-c", f"grep -qi ':{int(PORT):04X} .* 0A ' /proc/net/tcp6 /proc/net/tcp"])
        while subprocess.run(listening).returncode:
            assert time.monotonic() < deadline, launchers.said()
            time.sleep(0.1)
        os.kill(launchers.launcher(0), signal.SIGTERM)
        assert launchers.exit_code(0, timeout_s=15) == 128 + signal.SIGTERM
        assert "ended while it waited for the other hosts" in launchers.said()
        assert not (tmp_path / "waits" / STOP_FILE).exists(), "it would stop the next run"


@needs_hosts
def test_hosts_vanish_with_whoever_made_them() -> None:
    """Also when that is killed: nothing is left to clean up."""
    makes_hosts = (
        "import time\nfrom tests.hosts.namespaces import two_hosts\n"
        "with two_hosts() as hosts:\n    print(*(host.pid for host in hosts), flush=True)\n    time.sleep(60)\n"
    )
    maker = subprocess.Popen([sys.executable, "-c", makes_hosts], env=ENVIRON, stdout=subprocess.PIPE, text=True)
    assert maker.stdout is not None
    first = [int(word) for word in maker.stdout.readline().split()]
    maker.kill()
    maker.communicate(timeout=10)
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in first):
        assert time.monotonic() < deadline
        time.sleep(0.02)
