"""The commands of the README, as they stand there, on real processes."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from sft_dist import cli, commits, package_files
from sft_dist.metrics import read_steps
from tests import tiny

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false"}


@pytest.fixture
def recipe(tmp_path: Path, tied_model: Path) -> Callable[..., Path]:
    return lambda name, **train: tiny.write_recipe(tmp_path, tied_model, name=name, train=train)


def start(*command: str, **environ: str) -> "subprocess.Popen[str]":
    """Start a command of this environment."""
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environ}
    program = [str(BIN / command[0]), *command[1:]]
    return subprocess.Popen(
        program, env=os.environ | settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(*command: str, timeout_s: float = 150, **environ: str) -> str:
    process = start(*command, **environ)
    try:
        output = process.communicate(timeout=timeout_s)[0]
    finally:
        process.kill()
    assert process.returncode == 0, output[-5000:]
    return output


def losses(recipe_path: Path) -> list[float]:
    run_section = yaml.safe_load(recipe_path.read_text())["run"]
    steps = read_steps(Path(run_section["dir"]) / run_section["name"] / "metrics.jsonl")
    return [steps[step]["loss"] for step in sorted(steps)]


def test_accelerate_torchrun_and_python_draw_one_curve(recipe: Callable[..., Path]) -> None:
    """accelerate and torchrun with two ranks, python alone; ZeRO needs no compiler on a CPU."""
    alone, accelerated, torch_run = recipe("alone"), recipe("accelerated"), recipe("torchrun")
    config = str(package_files.find("accelerate/cpu-2.yaml"))
    train = ("-m", "sft_dist", "train")
    run("python", *train, str(alone))
    run("accelerate", "launch", "--config_file", config, *train, str(accelerated), "--engine", "zero2", **NO_COMPILER)
    torchrun = ("torchrun", "--standalone", "--nproc_per_node", "2")
    run(*torchrun, *train, str(torch_run), "--engine", "zero3", **NO_COMPILER)
    for other in (accelerated, torch_run):
        assert losses(other) == pytest.approx(losses(alone), abs=3e-6)


def test_a_signal_saves_and_the_same_command_goes_on(
    recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM to a single process: it commits, exits 0, and the next start ends where an undisturbed run ends."""
    whole, stopped = recipe("whole", steps=200), recipe("stopped", steps=200)
    process = start("python", "-m", "sft_dist", "train", str(stopped))
    wait_for_steps(process, stopped, 5)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    assert "stopped on request after step" in output
    assert len(losses(stopped)) < 200
    assert cli.main(["train", str(stopped)]) == cli.main(["train", str(whole)]) == 0
    assert "resumed after step" in capsys.readouterr().out
    assert losses(stopped) == losses(whole)
    metrics = stopped.parent / "runs" / "stopped" / "metrics.jsonl"
    assert {json.loads(line)["attempt"] for line in metrics.read_text().splitlines()} == {1, 2}


def wait_for_steps(process: "subprocess.Popen[str]", recipe_path: Path, count: int) -> None:
    deadline = time.monotonic() + 90
    while len(losses(recipe_path)) < count:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)


def test_a_stop_file_stops_all_ranks_after_the_same_step(recipe: Callable[..., Path]) -> None:
    stopped = recipe("stopped2", steps=400)
    process = start("torchrun", "--standalone", "--nproc_per_node", "2", "-m", "sft_dist", "train", str(stopped))
    wait_for_steps(process, stopped, 3)
    directory = stopped.parent / "runs" / "stopped2"
    (directory / "STOP").touch()
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    done = len(losses(stopped))
    assert 3 <= done < 400
    assert [path.name for path in commits.committed(directory / "checkpoints")] == [f"step-{done:08d}"]


def test_profile_writes_a_trace_and_a_table(recipe: Callable[..., Path]) -> None:
    path = recipe("profiled", steps=6)
    assert cli.main(["train", str(path), "--profile"]) == 0
    directory = path.parent / "runs" / "profiled" / "profile"
    assert json.loads((directory / "trace.json").read_text())["traceEvents"]
    assert "aten::mm" in (directory / "table.txt").read_text()


def test_a_second_run_starts_from_the_store_at_once(
    recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe("prepared")
    assert cli.main(["prepare", str(path)]) == 0
    assert "40 read, 40 kept" in capsys.readouterr().out
    store = next((path.parent / "runs" / "stores").glob("*/tokens.bin"))
    written = store.stat().st_mtime_ns
    assert cli.main(["train", str(path)]) == 0
    assert store.stat().st_mtime_ns == written


@pytest.fixture(scope="module")
def wheel_demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Path]:
    """Four steps of the demo by the wheel, unpacked beside nothing of the checkout and started where there is no file.

    The directory that it left, what it said, and where the wheel lies.
    """
    tmp_path = tmp_path_factory.mktemp("wheel")
    run("python", "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT))
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    site, empty = tmp_path / "site", tmp_path / "empty"
    run("python", "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel))
    empty.mkdir()
    process = subprocess.run(
        [sys.executable, "-m", "sft_dist", "demo", "--steps", "4", "--examples", "600"],
        cwd=empty,
        env=os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"} | NO_COMPILER,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    return empty, process.stdout, site


def test_the_wheel_runs_the_demo_from_an_empty_directory(wheel_demo: tuple[Path, str, Path]) -> None:
    empty, said, site = wheel_demo
    assert str(site) in said.replace("\n", ""), "the accelerate config is the wheel's own"
    assert len(read_steps(empty / "demo" / "runs" / "demo" / "metrics.jsonl")) == 4
    assert (empty / "demo" / "runs" / "demo" / "model" / "model.safetensors").exists()
    for heading in ("closed_qa", "held-out response loss", "mean of tasks", "constant", "tokens/s"):
        assert heading in said


def test_every_verb_takes_what_the_demo_left(
    wheel_demo: tuple[Path, str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(wheel_demo[0])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    question = "Weight 70 kg, height 175 cm. BMI?"
    for line, expected in {
        "plan demo/recipe.yaml --processes 2": "zero2",
        "lint demo/recipe.yaml": "verdict: ",
        "inspect demo/recipe.yaml --example 0": "example 0",
        "doctor demo/recipe.yaml --quick --offline": "demo/model: 0.5 M parameters",
        "status demo/runs/demo": "finished",
        "checkpoints demo/runs/demo": "step-00000004",
        "report demo/runs/demo": "report.html",
        f"generate demo/runs/demo --prompt '{question}' --max-new-tokens 8": "",
        "export demo/runs/demo --dtype bf16 --output clinic-bf16": "clinic-bf16",
        "evaluate --compare demo/runs/demo demo/runs/demo": "calculator",
    }.items():
        code = cli.main(shlex.split(line))
        said = "".join(capsys.readouterr())
        assert (code, expected in said) == (0, True), f"{line}: exit code {code}\n{said}"
