"""`sft-dist launch` without training: its command, its exit code, and how it watches what it starts."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from sft_dist import launch as launch_module
from sft_dist import package_files
from sft_dist.config import Recipe, load_recipe
from sft_dist.errors import ConfigError
from sft_dist.launch import (
    SAVE_PATIENCE_S,
    Asked,
    Hosts,
    command_for,
    descendants,
    hosts_from,
    launch,
    plan_launch,
    remove_stale_stop,
    settings_for,
    supervise,
    true_code,
)
from sft_dist.machine import Gpus, Route, look_for_gpus
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
from sft_dist.world import report_at_work
run = Path(sys.argv[1])
run.mkdir(parents=True)
def note(number, frame):
    (run.parent / 'got').write_text(str(number))
    sys.exit(0)
signal.signal(signal.SIGTERM, note)
(run.parent / 'pid').write_text(str(os.getpid()))
deadline = time.monotonic() + 30
time.sleep(0.3)
if (run / 'STOP').exists():
    sys.exit('a stop file before the lock was held: it may be for another job')
report_at_work()
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
HOSTS = Hosts(3, 1, "10.0.0.1", 29500)


@pytest.fixture(autouse=True)
def _no_accelerate_config_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


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


def test_several_hosts_meet_at_an_address_and_are_not_held_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import _filter_args, prepare_multi_gpu_env
    from torch.distributed.run import config_from_args, get_args_parser

    settings = settings_for(2, num_cores=8, route=Route("eth1", is_to_itself=False))
    assert settings["OMP_NUM_THREADS"] == "4"
    assert (settings["GLOO_SOCKET_IFNAME"], settings["NCCL_SOCKET_IFNAME"]) == ("eth1", "=eth1")
    for key, value in settings.items():
        monkeypatch.setenv(key, value)
    command = command_for(["r.yaml"], num_processes=2, on_gpus=False, hosts=HOSTS)
    arguments = _validate_launch_command(launch_command_parser().parse_args(command[3:]))[0]
    prepare_multi_gpu_env(arguments)
    script = ["--training_script", "sft_dist", "--training_script_args", arguments.training_script_args]
    config = config_from_args(_filter_args(arguments, get_args_parser(), script))[0]
    assert (config.nproc_per_node, config.min_nodes, config.max_nodes) == (2, 3, 3)
    assert (config.rdzv_backend, config.rdzv_endpoint) == ("static", "10.0.0.1:29500")
    assert config.rdzv_configs["rank"] == 1
    assert config.local_addr is None
    assert config.shutdown_timeout == SAVE_PATIENCE_S


def test_one_process_on_each_of_several_hosts_needs_accelerate_too() -> None:
    command = command_for(["r.yaml"], num_processes=1, on_gpus=True, hosts=HOSTS)
    assert command[command.index("--num_processes") + 1] == "3"
    assert settings_for(1, num_cores=8, route=Route(None, is_to_itself=True)).keys() == {
        "OMP_NUM_THREADS",
        "PET_SHUTDOWN_TIMEOUT",
    }


def test_hosts_are_described_whole_or_refused() -> None:
    assert hosts_from(Asked()) is None
    assert hosts_from(Asked(num_hosts=1, host_index=0, main_host="a", port=1)) is None
    assert hosts_from(Asked(num_hosts=3, host_index=1, main_host="10.0.0.1", port=29500)) == HOSTS
    with pytest.raises(ConfigError, match="--hosts, --port without --host-index, --main-host; several hosts need"):
        hosts_from(Asked(num_hosts=2, port=29500))
    with pytest.raises(ConfigError, match="--host-index 2 with --hosts 2; hosts count from 0 to 1"):
        hosts_from(Asked(num_hosts=2, host_index=2, main_host="a", port=1))


def test_dry_run_prints_a_command_to_paste_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path)
    words = [str(recipe), "run.name=a b"]
    assert launch(load_recipe(recipe, []), words, asked=Asked(num_processes=2), dry_run=True) == 0
    printed = shlex.split(capsys.readouterr().out)
    settings = settings_for(2, num_cores=len(os.sched_getaffinity(0)))
    assert printed[: len(settings)] == [f"{key}={value}" for key, value in settings.items()]
    assert printed[len(settings) :] == command_for(words, num_processes=2, on_gpus=look_for_gpus().count > 0)
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_of_several_hosts_prints_the_command_of_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path)
    asked = Asked(num_processes=1, num_hosts=2, host_index=1, main_host="127.0.0.1", port=29500)
    assert launch(load_recipe(recipe, []), [str(recipe)], asked=asked, dry_run=True) == 0
    first, command_0, second, command_1 = capsys.readouterr().out.splitlines()
    assert first == "# host 0, where GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME may be another interface"
    assert second == "# host 1"
    assert "SOCKET_IFNAME" not in command_0
    assert "GLOO_SOCKET_IFNAME=lo" in shlex.split(command_1)
    for index, command in enumerate((command_0, command_1)):
        hosts = Hosts(2, index, "127.0.0.1", 29500)
        assert command.endswith(
            shlex.join(command_for([str(recipe)], num_processes=1, on_gpus=look_for_gpus().count > 0, hosts=hosts))
        )


def test_only_host_0_looks_at_the_lock_and_others_point_to_it_when_they_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """On host 1, rank 0 of this very run may already hold the lock."""
    recipe = load_recipe(write_recipe(tmp_path), [])
    recipe.run.path.mkdir(parents=True)
    (recipe.run.path / "STOP").touch()
    monkeypatch.setattr(launch_module, "supervise", lambda *_, **__: 5)
    asked = Asked(1, num_hosts=2, host_index=0, main_host="127.0.0.1", port=tiny.free_port())
    with FileLock(recipe.run.path / ".lock"):
        with pytest.raises(ConfigError, match="another process is training here"):
            launch(recipe, ["r.yaml"], asked=asked)
        assert launch(recipe, ["r.yaml"], asked=replace(asked, host_index=1)) == 5
    assert (recipe.run.path / "STOP").exists()
    assert "ended with exit code 5; host 0 says why" in capfd.readouterr().err
    assert launch(recipe, ["r.yaml"], asked=asked) == 5
    assert not (recipe.run.path / "STOP").exists()


def plan_notes(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, asked: Asked | None = None, gpus: Gpus | None = None
) -> tuple[launch_module.Plan, str]:
    """The plan on a machine with these GPUs, and what is said of it."""
    monkeypatch.setattr(launch_module, "look_for_gpus", lambda: gpus or Gpus())
    plan = plan_launch(recipe, ["r.yaml"], asked or Asked())
    return plan, " | ".join(plan.notes)


def test_without_a_gpu_it_trains_on_the_cpu_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(write_recipe(tmp_path), [])
    plan, said = plan_notes(recipe, monkeypatch)
    assert plan.num_processes == 1
    assert said == "no GPU: training on the CPU, in 1 process; --processes N starts more"
    plan, said = plan_notes(recipe, monkeypatch, gpus=Gpus(4, 10**11))
    assert (plan.num_processes, said) == (4, ""), "a model that is not here is not judged"
    assert "accelerate/gpu-8.yaml" in " ".join(plan.command())


def test_an_engine_is_chosen_only_when_the_recipe_leaves_it_open(
    tmp_path: Path, tied_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(tmp_path)
    too_small = Gpus(1, 10**6)
    plan, said = plan_notes(load_recipe(path, [f"model.path={tied_model}"]), monkeypatch, gpus=too_small)
    assert plan.words == ("r.yaml", "--engine", "zero3_offload")
    assert "train.engine=auto becomes zero3_offload: a step of 0.00 B parameters under single takes" in said
    asked = load_recipe(path, [f"model.path={tied_model}", "train.engine=single"])
    plan, said = plan_notes(asked, monkeypatch, gpus=too_small)
    assert (plan.words, said) == (("r.yaml",), "")
    plan, said = plan_notes(load_recipe(path, [f"model.path={tied_model}"]), monkeypatch, gpus=Gpus(1, 10**10))
    assert (plan.words, said) == (("r.yaml",), ""), "it fits"


def test_affinity_is_asked_for_only_with_gpus_and_several_numa_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(write_recipe(tmp_path), [])
    for num_nodes, gpus, wanted in ((2, Gpus(2, 10**11), True), (1, Gpus(2, 10**11), False), (2, Gpus(), False)):
        monkeypatch.setattr(launch_module, "num_numa_nodes", lambda count=num_nodes: count)
        plan, _ = plan_notes(recipe, monkeypatch, gpus=gpus)
        assert ("ACCELERATE_CPU_AFFINITY" in plan.settings) == wanted


def write_accelerate_config(path: Path, **keys: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU"} | keys))
    return path


def test_a_users_own_accelerate_config_is_used_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(write_recipe(tmp_path), [])
    default = write_accelerate_config(tmp_path / "hf" / "accelerate" / "default_config.yaml", num_processes=3)
    plan, said = plan_notes(recipe, monkeypatch)
    assert plan.num_processes == 3
    assert f"using your accelerate config {default}" in said
    assert plan.command()[3:7] == ["--config_file", str(default), "--num_processes", "3"]
    plan, _ = plan_notes(recipe, monkeypatch, Asked(num_processes=2))
    assert plan.command()[5:7] == ["--num_processes", "2"], "the flag wins"
    named = write_accelerate_config(tmp_path / "mine.yaml", num_processes=4)
    plan, said = plan_notes(recipe, monkeypatch, Asked(config_file=named))
    assert (plan.num_processes, str(named) in said) == (4, True)


def test_a_config_for_one_process_can_be_told_to_start_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(write_recipe(tmp_path), [])
    one = write_accelerate_config(tmp_path / "one.yaml", distributed_type="NO", num_processes=1, use_cpu=True)
    plan, _ = plan_notes(recipe, monkeypatch, Asked(config_file=one), Gpus(4, 10**11))
    assert (plan.num_processes, "--multi_gpu" in plan.command()) == (1, False)
    assert plan.settings["CUDA_VISIBLE_DEVICES"] == ""
    plan, _ = plan_notes(recipe, monkeypatch, Asked(2, config_file=one))
    assert (plan.num_processes, "--multi_gpu" in plan.command()) == (2, True)


def test_a_config_of_several_machines_brings_its_rendezvous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(write_recipe(tmp_path), [])
    meeting = {"main_process_ip": "127.0.0.1", "main_process_port": 29511}
    path = write_accelerate_config(tmp_path / "two.yaml", num_machines=2, num_processes=4, machine_rank=1, **meeting)
    plan, _ = plan_notes(recipe, monkeypatch, Asked(config_file=path))
    assert (plan.num_processes, plan.hosts) == (2, Hosts(2, 1, "127.0.0.1", 29511))
    assert not plan.holds_the_lock
    assert "store_type=file" not in plan.command()
    plan, _ = plan_notes(recipe, monkeypatch, Asked(host_index=0, config_file=path))
    assert plan.hosts == Hosts(2, 0, "127.0.0.1", 29511), "one file for all hosts"
    without = write_accelerate_config(tmp_path / "half.yaml", num_machines=2, num_processes=4)
    with pytest.raises(ConfigError, match="--hosts, --host-index without --main-host, --port"):
        plan_notes(recipe, monkeypatch, Asked(config_file=without))


def test_a_config_that_contradicts_the_recipe_is_refused_with_both_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(write_recipe(tmp_path), [])
    half = write_accelerate_config(tmp_path / "fp16.yaml", mixed_precision="fp16")
    with pytest.raises(ConfigError, match=r"mixed_precision=fp16 contradicts the recipe's model\.dtype=auto"):
        plan_notes(recipe, monkeypatch, Asked(config_file=half))
    fsdp = write_accelerate_config(tmp_path / "fsdp.yaml", distributed_type="FSDP")
    with pytest.raises(ConfigError, match=r"distributed_type=FSDP contradicts the recipe's train\.engine"):
        plan_notes(recipe, monkeypatch, Asked(config_file=fsdp))
    zero = write_accelerate_config(
        tmp_path / "zero.yaml", distributed_type="DEEPSPEED", num_processes=2, deepspeed_config={"zero_stage": 3}
    )
    plan, said = plan_notes(recipe, monkeypatch, Asked(config_file=zero))
    assert plan.words == ("r.yaml", "--engine", "zero3")
    assert "train.engine=auto becomes zero3: your accelerate config's deepspeed_config asks for it" in said
    with pytest.raises(ConfigError, match=r"zero_stage=3 contradicts the recipe's train\.engine=zero2"):
        plan_notes(load_recipe(write_recipe(tmp_path), ["train.engine=zero2"]), monkeypatch, Asked(config_file=zero))


@pytest.mark.parametrize("path", sorted(package_files.CONFIGS.glob("accelerate/*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_what_is_shipped(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    several = config.distributed_type.value == "MULTI_GPU"
    assert several == (config.num_processes > 1)
    assert config.mixed_precision == "no"


SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_says_how_it_is_used_and_what_it_starts(path: Path, tmp_path: Path) -> None:
    """From another directory; `python` is replaced by one that prints what it is asked."""
    silent = subprocess.run([path], capture_output=True, text=True, cwd=tmp_path)
    assert silent.returncode == 2
    assert "RECIPE [key=value ...]" in silent.stderr
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nif [ "$1" = -c ]; then echo 3; else printf "%s\\n" "$@"; fi\n')
    python.chmod(0o755)
    environ = os.environ | {"PYTHON": str(python), "HOSTS": "2", "HOST_INDEX": "1", "MAIN_HOST": "a", "PORT": "29500"}
    ran = subprocess.run([path, "r.yaml", "run.name=a b"], capture_output=True, text=True, cwd=tmp_path, env=environ)
    assert ran.returncode == 0, ran.stderr
    words = ran.stdout.splitlines()
    assert words[:3] == ["-m", "accelerate.commands.launch", "--config_file"]
    assert Path(words[3]).parent.resolve() == package_files.CONFIGS / "accelerate"
    assert words[-5:] == ["-m", "sft_dist", "train", "r.yaml", "run.name=a b"]
    asked = {"one_gpu.sh": None, "all_gpus.sh": "3", "cpu.sh": "2", "several_hosts.sh": "6"}[path.name]
    assert asked == (words[words.index("--num_processes") + 1] if "--num_processes" in words else None)


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
    assert look_for_gpus({"CUDA_VISIBLE_DEVICES": ""}) == look_for_gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == Gpus()


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


def test_ranks_of_one_host_meet_in_a_file_and_those_of_several_do_not(tmp_path: Path) -> None:
    """With an endpoint in its environment, torchrun takes that for the address of the others."""
    command = ["sh", "-c", "exit ${PET_RDZV_ENDPOINT:+7}"]
    assert supervise(command, tmp_path) == 7
    assert supervise(command, tmp_path, several_hosts=True) == 0


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
