"""The scripts of launch/, and a user's own accelerate config, on real processes."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from sft_dist.metrics import read_steps
from tests import tiny
from tests.launch.launched import NO_COMPILER

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(tmp_path: Path, tied_model: Path) -> Callable[[str], Path]:
    return lambda name: tiny.write_recipe(tmp_path, tied_model, name=name)


def run(*command: str | Path, directory: Path, **environ: str) -> "subprocess.CompletedProcess[str]":
    settings = NO_COMPILER | {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environ
    return subprocess.run(
        [str(word) for word in command],
        env=os.environ | settings,
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_cpu_script_trains_from_any_directory(recipe: Callable[[str], Path], tmp_path: Path) -> None:
    path = recipe("scripted")
    result = run(ROOT / "launch" / "cpu.sh", path, "optim.lr=2e-3", "--engine", "zero2", directory=tmp_path)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "zero2 on 2 processes" in result.stdout
    steps = read_steps(tmp_path / "runs" / "scripted" / "metrics.jsonl")
    assert (len(steps), steps[1]["lr"]) == (3, 2e-3)


def test_a_users_deepspeed_config_starts_its_processes_with_its_stage(
    recipe: Callable[[str], Path], tmp_path: Path
) -> None:
    path, config = recipe("own"), tmp_path / "hf" / "accelerate" / "default_config.yaml"
    config.parent.mkdir(parents=True)
    raw = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {"zero_stage": 3, "offload_optimizer_device": "none"},
        "num_machines": 1,
        "num_processes": 2,
        "mixed_precision": "no",
    }
    config.write_text(yaml.safe_dump(raw))
    launch = (sys.executable, "-m", "sft_dist", "launch", path)
    result = run(*launch, directory=tmp_path, HF_HOME=str(tmp_path / "hf"))
    assert result.returncode == 0, result.stderr[-4000:]
    assert "zero3 on 2 processes" in result.stdout
    assert f"using your accelerate config {config}" in result.stderr
    assert len(read_steps(tmp_path / "runs" / "own" / "metrics.jsonl")) == 3

    refused = run(*launch, "train.engine=ddp", directory=tmp_path, HF_HOME=str(tmp_path / "hf"))
    assert refused.returncode == 2
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert "deepspeed_config.zero_stage=3 contradicts the recipe's train.engine=ddp" in line
    assert "Traceback" not in refused.stderr
