"""`sft-dist launch` without training: its command, its exit code, and how it watches what it starts."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from sft_dist.config import load_recipe
from sft_dist.errors import ConfigError
from sft_dist.launch import (
    SAVE_PATIENCE_S,
    command_for,
    count_gpus,
    descendants,
    launch,
    remove_stale_stop,
    settings_for,
    true_code,
)
from sft_dist.world import EXIT_CODES, is_one_host, launcher_has_store, report_exit
from tests import tiny
from tests.launch.launched import LOOPBACK

ROOT = Path(__file__).parents[2]

# Supervises the Python code that follows, in little patience.
SUPERVISE = """
import sys
from pathlib import Path
from sft_dist import launch
launch.LINGER_S = launch.END_PATIENCE_S = 0.3
sys.exit(launch.supervise([sys.executable, '-c', *sys.argv[2:]], Path(sys.argv[1])))
"""

# A run that obeys its stop file, and notes the signals it gets.
OBEYS = """
import os, signal, sys, time
from pathlib import Path
run = Path(sys.argv[1])
def note(number, frame):
    (run.parent / 'got').write_text(str(number))
    sys.exit(0)
signal.signal(signal.SIGTERM, note)
(run.parent / 'pid').write_text(str(os.getpid()))
deadline = time.monotonic() + 30
while not (run / 'STOP').exists() and time.monotonic() < deadline:
    time.sleep(0.01)
time.sleep(0.3)
sys.exit(not (run / 'STOP').exists())
"""

# Starts a process that shrugs at SIGTERM, in a session of its own, and leaves.
LEAVES_ONE_BEHIND = """
import subprocess, sys
orphan = subprocess.Popen([sys.executable, '-c', '''
import os, signal, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, lambda *_: Path(sys.argv[1], "told").touch())
Path(sys.argv[1], "pid").write_text(str(os.getpid()))
print("up", flush=True)
time.sleep(30)
''', sys.argv[1]], start_new_session=True, stdout=subprocess.PIPE)
orphan.stdout.readline()
sys.exit(3)
"""

Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts `python words`; what still runs at the end of the test is killed."""
    started = []

    def start_python(*words: object, **environ: str) -> "subprocess.Popen[bytes]":
        settings = os.environ | {"PYTHONPATH": str(ROOT)} | environ
        process = subprocess.Popen(
            [sys.executable, *map(str, words)], env=settings, stderr=subprocess.PIPE, start_new_session=True
        )
        started.append(process)
        return process

    yield start_python
    for process in started:
        for pid in {pid for pid, _ in descendants(process.pid)} | ({process.pid} if process.poll() is None else set()):
            os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=30)


def wait_for(path: Path) -> str:
    """The text of a file, once it is there and has one."""
    deadline = time.monotonic() + 20
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline, f"{path.name} never came"
        time.sleep(0.01)
    return path.read_text()


def runs(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_one_process_needs_no_launcher_and_several_need_accelerate() -> None:
    words = ["r.yaml", "optim.lr=1e-5", "--no-resume"]
    assert command_for(words, num_processes=1, on_gpus=True) == [sys.executable, "-m", "sft_dist", "train", *words]
    command = command_for(words, num_processes=3, on_gpus=False)
    assert command[command.index("--num_processes") + 1] == "3"
    assert command[-6:] == ["-m", "sft_dist", "train", *words]


def test_the_installed_launcher_understands_command_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import _filter_args
    from torch.distributed.run import config_from_args, get_args_parser

    for key, value in (settings_for(2, num_cores=8) | {"PET_RDZV_ENDPOINT": "/a/file"}).items():
        monkeypatch.setenv(key, value)
    command = command_for(["r.yaml", "--engine", "zero2"], num_processes=2, on_gpus=False)
    arguments = launch_command_parser().parse_args(command[3:])
    assert (arguments.training_script, arguments.training_script_args) == (
        "sft_dist",
        ["train", "r.yaml", "--engine", "zero2"],
    )
    script = ["--training_script", "sft_dist", "--training_script_args", arguments.training_script_args]
    arguments.nproc_per_node = str(arguments.num_processes)
    config = config_from_args(_filter_args(arguments, get_args_parser(), script))[0]
    assert config.shutdown_timeout == SAVE_PATIENCE_S
    assert (config.rdzv_backend, config.rdzv_endpoint, config.rdzv_configs["store_type"]) == ("c10d", "/a/file", "file")
    assert (config.nproc_per_node, config.local_addr) == (2, "127.0.0.1")


def test_dry_run_prints_a_command_to_paste_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path)
    words = [str(recipe), "run.name=a b"]
    assert launch(load_recipe(recipe, []), words, num_processes=2, dry_run=True) == 0
    printed = shlex.split(capsys.readouterr().out)
    settings = settings_for(2, num_cores=len(os.sched_getaffinity(0)))
    assert printed[: len(settings)] == [f"{key}={value}" for key, value in settings.items()]
    assert printed[len(settings) :] == command_for(words, num_processes=2, on_gpus=count_gpus() > 0)
    assert not (tmp_path / "runs").exists()


def write_recipe(directory: Path) -> Path:
    path = directory / "r.yaml"
    path.write_text(
        f"run: {{name: a, dir: {directory}/runs}}\nmodel: {{path: m}}\ndata: {{train: d.jsonl}}\n"
        "batch: {examples: 8}\noptim: {lr: 1e-3}\n"
    )
    return path


@pytest.mark.parametrize(
    ("launchers", "recorded", "code"),
    [
        (0, [0, 0], 0),
        (1, [0, 0], 0),  # torchrun after a signal that all ranks obeyed
        (-9, [0, 0], 0),
        (1, [3, 5], 3),  # one out of memory; the other lost it
        (1, [5, 4], 4),
        (1, [5], 5),  # the other was killed
        (1, [0], 1),  # one ended well, the other without a word
        (1, [], 1),  # a traceback
        (-9, [0], 137),
        (2, [2, 2], 2),
    ],
)
def test_the_exit_code_is_that_of_the_rank_that_failed(launchers: int, recorded: list[int], code: int) -> None:
    assert true_code(launchers, recorded, num_processes=2) == code


def test_a_rank_leaves_its_exit_code_only_for_a_launcher_that_asks(tmp_path: Path) -> None:
    report_exit(4, {EXIT_CODES: str(tmp_path), "RANK": "1"})
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("1", "4")]
    report_exit(4, {"RANK": "1"})
    report_exit(4, {EXIT_CODES: str(tmp_path / "gone"), "RANK": "1"})


def test_hidden_gpus_are_not_counted() -> None:
    assert count_gpus({"CUDA_VISIBLE_DEVICES": ""}) == count_gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == 0


def test_a_stale_stop_file_is_removed_but_not_that_of_a_run_at_work(tmp_path: Path) -> None:
    remove_stale_stop(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
    (tmp_path / "STOP").touch()
    with FileLock(tmp_path / ".lock"), pytest.raises(ConfigError, match="another process is training here"):
        remove_stale_stop(tmp_path)
    assert (tmp_path / "STOP").exists()
    remove_stale_stop(tmp_path)
    assert not (tmp_path / "STOP").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_becomes_the_stop_file_and_reaches_nobody_else(tmp_path: Path, start: Start, number: int) -> None:
    process = start("-c", SUPERVISE, tmp_path / "run", OBEYS, tmp_path / "run")
    wait_for(tmp_path / "pid")
    os.killpg(process.pid, number)  # to the whole group, as Ctrl-C does
    time.sleep(0.05)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert errors.decode().splitlines()[-1].endswith(f"{signal.Signals(number).name}: already stopping")
    assert not (tmp_path / "got").exists()
    assert not (tmp_path / "run" / "STOP").exists(), "the run did not remove it: it is for no later one"


def test_where_no_stop_file_can_be_made_the_run_gets_the_signal(tmp_path: Path, start: Start) -> None:
    (tmp_path / "file").touch()
    process = start("-c", SUPERVISE, tmp_path / "file" / "run", OBEYS, tmp_path / "run")
    wait_for(tmp_path / "pid")
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert (tmp_path / "got").read_text() == str(int(signal.SIGTERM))


def test_what_outlives_the_launcher_is_ended(tmp_path: Path, start: Start) -> None:
    process = start("-c", SUPERVISE, tmp_path / "run", LEAVES_ONE_BEHIND, tmp_path)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 3, errors
    assert (tmp_path / "told").exists(), "SIGTERM comes before SIGKILL"
    assert not runs(int(wait_for(tmp_path / "pid")))


def test_a_killed_supervisor_takes_the_run_with_it_gently(tmp_path: Path, start: Start) -> None:
    process = start("-c", SUPERVISE, tmp_path / "run", OBEYS, tmp_path / "run")
    pid = int(wait_for(tmp_path / "pid"))
    process.kill()
    assert wait_for(tmp_path / "got") == str(int(signal.SIGTERM))
    deadline = time.monotonic() + 10
    while runs(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Says whether it follows its parent.
RANK = """
import sys, time
from pathlib import Path
from sft_dist.world import stop_when_orphaned
Path(sys.argv[1]).write_text(str(stop_when_orphaned()))
time.sleep(30)
"""

# Starts the rank behind the file that its pid goes to.
PARENT = """
import subprocess, sys
from pathlib import Path
rank = subprocess.Popen([sys.executable, *sys.argv[2:]])
Path(sys.argv[1]).write_text(str(rank.pid))
rank.wait()
"""


def test_a_rank_follows_its_launcher_and_a_plain_run_outlives_its_shell(tmp_path: Path, start: Start) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    environs = {
        "torchrun": {"TORCHELASTIC_RUN_ID": "1"},
        "accelerate": {},
        "bash": {"ACCELERATE_MIXED_PRECISION": "no"},
    }
    parents = {}
    for name, environ in environs.items():
        (tmp_path / name).write_text(PARENT)
        pid_file, said_file = tmp_path / f"{name}.pid", tmp_path / f"{name}.said"
        parents[name] = start(tmp_path / name, pid_file, tmp_path / "rank.py", said_file, **environ)
    follows = {name: wait_for(tmp_path / f"{name}.said") for name in parents}
    assert follows == {"torchrun": "True", "accelerate": "True", "bash": "False"}
    ranks = {name: int((tmp_path / f"{name}.pid").read_text()) for name in parents}
    try:
        for parent in parents.values():
            parent.kill()
        deadline = time.monotonic() + 10
        while runs(ranks["torchrun"]) or runs(ranks["accelerate"]):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert runs(ranks["bash"])
    finally:
        for pid in filter(runs, ranks.values()):
            os.kill(pid, signal.SIGKILL)


# A rank that joins and prints where its process listens.
JOINS = """
import os, torch
from sft_dist.engine.collectives import any_rank, join_process_group, leave_process_group
from sft_dist.world import read_world
from tests.launch.launched import listening
cpu = torch.device("cpu")
join_process_group(read_world(), cpu, timeout_s=60, needed=True)
print(os.environ["GLOO_SOCKET_IFNAME"], *sorted(listening({os.getpid()})))
any_rank(False, cpu)
leave_process_group()
"""


def test_ranks_of_one_host_listen_on_loopback_only() -> None:
    interface, *addresses = tiny.run_ranks(["-c", JOINS], world_size=2, timeout_s=60).split()
    assert interface == "lo", "also where the host's name is the address of another one"
    assert addresses, "rank 0 holds the store"
    assert set(addresses) <= LOOPBACK


def test_one_host_is_what_the_launcher_says_and_is_not_assumed() -> None:
    assert is_one_host({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"})
    assert not is_one_host({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"})
    assert not is_one_host({"WORLD_SIZE": "4"})
    assert not is_one_host({})
    assert launcher_has_store({"TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert not launcher_has_store({"TORCHELASTIC_USE_AGENT_STORE": "False"})
