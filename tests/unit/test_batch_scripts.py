"""The batch scripts on a machine without SLURM: stand-ins take the place of its commands and of the training.

What they do on a cluster, tests/slurm shows.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sft_dist import package_files

STAND_INS = {
    # Shows where the script lies, as SLURM does, and notes requests to queue the job again.
    "scontrol": """
case "$1 $2" in
"show job") echo "   Command=$SCRIPTS/$STEP.sbatch recipe.yaml run.name=x" ;;
"show hostnames") printf 'n1\\nn2\\n' ;;
*) echo "$*" >>"$NOTES/scontrol"; exit "${REFUSES:-0}" ;;
esac""",
    "squeue": "echo $STATE",
    # The step of the training: what it is told to do in $BODY.
    "srun": """
printf '%s\\n' "$@" >"$NOTES/srun"
env >"$NOTES/environment"
job_dir=$RUN/.slurm-7
eval "$BODY" """,
    "python": """
printf '%s\\n' "$*" >>"$NOTES/python"
echo "$RUN" """,
    "apptainer": """
printf '%s\\n' "$*" >>"$NOTES/apptainer"
echo "$RUN" """,
    "sleep": 'exec /bin/sleep "$(($1 > 1 ? 1 : 0)).05"',
}

Start = Callable[..., "subprocess.Popen[str]"]
ROOT = Path(__file__).parents[2]
OTHERS = [*(ROOT / "launch").iterdir(), *(ROOT / "tests" / "slurm").glob("*.sh"), ROOT / ".ci" / "run"]
SCRIPTS = sorted([*(ROOT / "slurm").iterdir(), *OTHERS])


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck: apt-get install shellcheck")
def test_shellcheck_finds_nothing() -> None:
    command = ["shellcheck", "--external-sources", *SCRIPTS]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60).stdout == ""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a batch script as SLURM does: a copy of it, the log for its output. Leftovers are killed."""
    started: list[subprocess.Popen[str]] = []
    notes, commands = tmp_path / "notes", tmp_path / "bin"
    notes.mkdir()
    commands.mkdir()
    for name, body in STAND_INS.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (commands / name).chmod(0o755)

    def start_script(*words: str, step: str = "train", **environ: str) -> "subprocess.Popen[str]":
        copy = tmp_path / "slurm_script"
        copy.write_bytes((package_files.SLURM / f"{step}.sbatch").read_bytes())
        of_slurm = {
            "SLURM_JOB_ID": "7",
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_GPUS_ON_NODE": "4",
        }
        settings = {
            "PATH": f"{commands}:{os.environ['PATH']}",
            "SCRIPTS": str(package_files.SLURM),
            "STEP": step,
            "NOTES": str(notes),
            "RUN": str(tmp_path / "run"),
            "STATE": "RUNNING",
            "BODY": "true",
        }
        with (tmp_path / "log").open("a") as log:
            process = subprocess.Popen(
                ["bash", str(copy), *words],
                cwd=tmp_path,
                env=of_slurm | settings | environ,
                stdout=log,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        started.append(process)
        return process

    yield start_script
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=10)


def log_of(directory: Path) -> str:
    return (directory / "log").read_text()


def noted(directory: Path, name: str) -> list[str]:
    path = directory / "notes" / name
    return path.read_text().splitlines() if path.exists() else []


STOPPED = 'touch "$RUN/INTERRUPTED"'
ASKED = 'touch "$job_dir/asked"; '


@pytest.mark.parametrize(
    ("body", "environ", "code", "queued", "last"),
    [
        ("true", {}, 0, False, "finished"),
        (STOPPED, {}, 75, False, "by request, not queued again"),
        (ASKED + STOPPED, {}, 0, True, "stopped and saved; queued again"),
        (ASKED, {}, 0, False, "finished"),
        (ASKED + STOPPED, {"STATE": "COMPLETING"}, 0, False, "SLURM ends this attempt (COMPLETING)"),
        (ASKED + STOPPED, {"SFT_DIST_MAX_REQUEUES": "2", "SLURM_RESTART_COUNT": "1"}, 0, True, "queued again"),
        (ASKED + STOPPED, {"SFT_DIST_MAX_REQUEUES": "2", "SLURM_RESTART_COUNT": "2"}, 75, False, "=2 is reached"),
        (ASKED + STOPPED, {"REFUSES": "1"}, 75, True, "SLURM refuses"),
        # A node that failed has the others ended by srun, which then says 137.
        ('echo 3 >"$job_dir/code-1"; exit 137', {}, 3, False, "failed with exit code 3"),
        ('echo 5 >"$job_dir/code-0"; echo 4 >"$job_dir/code-1"; exit 5', {}, 4, False, "failed with exit code 4"),
        ('echo 0 >"$job_dir/code-0"; echo 5 >"$job_dir/code-1"; exit 137', {}, 5, False, "failed with exit code 5"),
        ('echo 3 >"$job_dir/code-0"; echo 5 >"$job_dir/code-1"; exit 137', {}, 3, False, "failed with exit code 3"),
        ("exit 1", {}, 1, False, "failed with exit code 1"),
        (ASKED + STOPPED + "; exit 2", {}, 2, False, "failed with exit code 2"),
        # SLURM has lost a node, and queues the job again by itself.
        ("exit 5", {"STATE": "COMPLETING"}, 5, False, "SLURM ends this attempt (COMPLETING)"),
    ],
)
def test_how_a_training_ends(
    start: Start, tmp_path: Path, body: str, environ: dict[str, str], code: int, queued: bool, last: str
) -> None:
    assert start("recipe.yaml", BODY=body, **environ).wait(timeout=30) == code, log_of(tmp_path)
    assert noted(tmp_path, "scontrol") == ["requeue 7"] * queued
    assert last in log_of(tmp_path).splitlines()[-1]
    assert not list((tmp_path / "run").glob(".slurm-*"))
    assert not (tmp_path / "run" / "STOP").exists()


def test_the_reason_of_a_failure_is_at_the_end_of_the_log(start: Start, tmp_path: Path) -> None:
    (tmp_path / "log").write_text("error: of an attempt before\n")
    lines = ["error: rank 3 died", "error: rank 3 died", "Traceback", "ValueError: no", "a summary"]
    body = "".join(f"echo '{line}'; " for line in lines) + "exit 1"
    assert start("recipe.yaml", BODY=body).wait(timeout=30) == 1
    last = log_of(tmp_path).splitlines()[-2:]
    assert last[0].startswith("train: failed with exit code 1, not queued again")
    assert last[1] == "error: rank 3 died"
    assert start("recipe.yaml", BODY=body.replace("error: ", "")).wait(timeout=30) == 1
    assert log_of(tmp_path).splitlines()[-1] == "ValueError: no"


OBEYS = """
until [[ -e $RUN/STOP ]]; do /bin/sleep 0.02; done
rm "$RUN/STOP"
until [[ -e $RUN/STOP ]]; do /bin/sleep 0.02; done
touch "$RUN/INTERRUPTED" """


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, None])
def test_a_signal_makes_the_stop_file_until_it_is_obeyed(start: Start, tmp_path: Path, number: int | None) -> None:
    """A launcher that starts late takes a stop file away that it finds: the request must outlast that."""
    script = start("recipe.yaml", BODY=OBEYS if number else ASKED + OBEYS)  # None: a node got the signal, and noted it
    deadline = time.monotonic() + 20
    while not noted(tmp_path, "srun"):
        assert time.monotonic() < deadline, log_of(tmp_path)
        time.sleep(0.02)
    for _ in range(2 if number else 0):
        script.send_signal(number or 0)
    assert script.wait(timeout=30) == 0, log_of(tmp_path)
    assert noted(tmp_path, "scontrol") == ["requeue 7"]
    assert log_of(tmp_path).count("stop asked by SLURM") == 1
    assert not (tmp_path / "run" / "STOP").exists(), "it would be for the next attempt"


def test_a_node_that_is_ended_because_another_failed_asks_nobody_to_stop(start: Start, tmp_path: Path) -> None:
    body = 'echo 5 >"$job_dir/code-1"; touch "$job_dir/asked"; /bin/sleep 0.5; exit 137'
    assert start("recipe.yaml", BODY=body).wait(timeout=30) == 5
    assert "stop asked" not in log_of(tmp_path)


def test_each_node_gets_one_launcher_with_what_slurm_gave(start: Start, tmp_path: Path) -> None:
    words = ("SFT_DIST_INTERFACE=ib0", "recipe.yaml", "optim.lr=1e-5", "--engine", "zero2", "--no-resume")
    given = {"SLURM_CPUS_PER_TASK": "16", "SBATCH_ACCOUNT": "a", "SFT_DIST_PYTHON": "python"}
    assert start(*words, **given).wait(timeout=30) == 0, log_of(tmp_path)
    called = noted(tmp_path, "srun")
    assert {"--ntasks-per-node=1", "--kill-on-bad-exit=1", "--cpus-per-task=16", "--export=ALL"} <= set(called)
    launch = called[called.index("launch") :]
    assert (
        launch
        == (
            "launch recipe.yaml optim.lr=1e-5 --engine zero2 --no-resume --processes 4 --hosts 2 --host-index %n "
            "--main-host n1 --port 16391"
        ).split()
    )
    assert noted(tmp_path, "python") == ["-m sft_dist config recipe.yaml optim.lr=1e-5 train.engine=zero2 --run-dir"]
    environ = noted(tmp_path, "environment")
    assert {"HF_HUB_OFFLINE=1", "GLOO_SOCKET_IFNAME=ib0", "NCCL_SOCKET_IFNAME=ib0"} <= set(environ)
    assert not [line for line in environ if line.startswith("SBATCH_")], (
        "for this job, not for those that it may submit"
    )
    # What is there when the job comes back is its own.
    assert start(*words, **given, SLURM_RESTART_COUNT="1").wait(timeout=30) == 0
    assert "--no-resume" not in noted(tmp_path, "srun")


def test_ports_of_neighbouring_jobs_differ_and_are_below_those_of_the_kernel() -> None:
    (line,) = [
        line for line in (package_files.SLURM / "train.sbatch").read_text().splitlines() if line.startswith("port=")
    ]
    numbers = [*range(1, 40), 16383, 16384, 4_000_000]
    script = "".join(f"SLURM_JOB_ID={number}; {line}; echo $port\n" for number in numbers)
    ports = [int(port) for port in subprocess.check_output(["bash", "-c", script], text=True).split()]
    assert len(set(ports[:39])) == 39
    assert all(1024 < port < 32768 for port in ports)


def test_apptainer_wraps_the_launcher_and_the_question_for_the_directory(start: Start, tmp_path: Path) -> None:
    settings = {"SFT_DIST_CONTAINER": "apptainer", "SFT_DIST_IMAGE": "/i.sif", "SFT_DIST_BINDS": "/s:/s"}
    assert start("recipe.yaml", **settings, SFT_DIST_CONTAINER_OPTIONS="--cleanenv").wait(timeout=30) == 0
    (asked,) = noted(tmp_path, "apptainer")
    mounts = f"{tmp_path}:{tmp_path},{package_files.SLURM}:{package_files.SLURM},/s:/s"
    wrapped = f"exec --nv --bind {mounts} --pwd {tmp_path} --cleanenv /i.sif python -m sft_dist"
    assert asked == f"{wrapped} config recipe.yaml --run-dir"
    assert f"apptainer {wrapped} launch recipe.yaml" in " ".join(noted(tmp_path, "srun"))


def test_pyxis_is_asked_through_srun(start: Start, tmp_path: Path) -> None:
    settings = {"SFT_DIST_CONTAINER": "pyxis", "SFT_DIST_IMAGE": "/i.sqsh", "BODY": 'echo "$RUN"'}
    assert start("recipe.yaml", **settings).wait(timeout=30) == 0, log_of(tmp_path)
    called = noted(tmp_path, "srun")
    assert "--container-image=/i.sqsh" in called
    assert f"--container-workdir={tmp_path}" in called
    assert noted(tmp_path, "python") == [], "not outside of the container"


@pytest.mark.parametrize(
    ("words", "environ", "told"),
    [
        ((), {}, "name a recipe"),
        (("r",), {"SFT_DIST_CONTAINER": "docker"}, "expected none, apptainer or pyxis"),
        (("r",), {"SFT_DIST_SETUP": "module load nothing"}, "SFT_DIST_SETUP failed"),
        (("SFT_DIST_SITE=/none.sh", "r"), {}, "/none.sh: the settings of the site cannot be read"),
    ],
)
def test_what_is_refused(
    start: Start, tmp_path: Path, words: tuple[str, ...], environ: dict[str, str], told: str
) -> None:
    assert start(*words, **environ).wait(timeout=30) == 2
    assert told in log_of(tmp_path)
    assert noted(tmp_path, "srun") == []


def test_words_are_stronger_than_the_site_and_the_site_than_the_environment(start: Start, tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "site.sh").write_text("export SFT_DIST_PROCESSES=2 SFT_DIST_INTERFACE=ib0\n")
    words = ("SFT_DIST_PROCESSES=3", "recipe.yaml")
    assert start(*words, SFT_DIST_INTERFACE="eth0").wait(timeout=30) == 0, log_of(tmp_path)
    called = noted(tmp_path, "srun")
    assert called[called.index("--processes") + 1] == "3"
    assert "GLOO_SOCKET_IFNAME=ib0" in noted(tmp_path, "environment")


@pytest.mark.parametrize(("step", "offline"), [("prepare", False), ("evaluate", True)])
def test_prepare_may_use_the_network_and_evaluate_not(start: Start, tmp_path: Path, step: str, offline: bool) -> None:
    assert start("recipe.yaml", "run.name=x", step=step, BODY="exit 2").wait(timeout=30) == 2, "its own exit code"
    called = " ".join(noted(tmp_path, "srun"))
    with_model = " --with-model" * (step == "prepare")
    assert called.endswith(f"node.sh - python -m sft_dist {step} recipe.yaml run.name=x{with_model}")
    assert ("HF_HUB_OFFLINE=1" in noted(tmp_path, "environment")) == offline


def test_a_node_keeps_caches_on_its_own_disk_and_notes_signals_and_its_code(tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    (tmp_path / "disk").mkdir()
    command = 'echo "$TRITON_CACHE_DIR" "$@"; mkdir "$TRITON_CACHE_DIR"; touch up; sleep 1; exit 4'
    node = subprocess.Popen(
        ["bash", str(package_files.SLURM / "node.sh"), "job", "bash", "-c", command, "-", "--host-index", "%n", "50%"],
        cwd=tmp_path,
        env=os.environ | {"SLURM_JOB_ID": "7", "SLURM_NODEID": "1", "SFT_DIST_LOCAL_DIR": str(tmp_path / "disk")},
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 20
    while not (tmp_path / "up").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    node.send_signal(signal.SIGTERM)
    said, _ = node.communicate(timeout=20)
    assert node.returncode == 4, "of the command, which the signal did not end"
    directory, *words = said.split()
    assert Path(directory).parent.parent == tmp_path / "disk"
    assert Path(directory).parent.name.startswith("sft-dist-7-")
    assert words == ["--host-index", "1", "50%"]
    assert not list((tmp_path / "disk").iterdir())
    assert (tmp_path / "job" / "asked").exists()
    assert (tmp_path / "job" / "code-1").read_text() == "4\n"


def test_a_node_without_a_directory_of_the_job_only_runs_the_command(tmp_path: Path) -> None:
    command = ["bash", str(package_files.SLURM / "node.sh"), "-", "bash", "-c", "echo done; exit 3"]
    environ = os.environ | {"SLURM_JOB_ID": "7", "SLURM_NODEID": "0", "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout, done.stderr) == (3, "done\n", "")
    assert not list(tmp_path.iterdir())
