"""What a step sends between two ranks, and where the host waits for the device, counted under each engine."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sft_dist import package_files
from tests import tiny

SCRIPT = str(Path(__file__).with_name("step_traffic.py"))
ENGINES = ("ddp", "zero1", "zero2", "zero3", "zero2_offload")
GRADIENTS = {"allreduce", "reduce", "reduce_scatter_base"}
FP32 = 4
BYTES = {"fp32": FP32, "bf16": 2}


@pytest.fixture(scope="module")
def traffic(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By name/dtype/micro-batches. Under zero3 no weight is small enough to be kept whole, as in a large model."""
    directory = tmp_path_factory.mktemp("traffic")
    recipe = {
        "run": {"name": "r"},
        "model": {"path": str(tiny.write_model(directory / "m"))},
        "data": {"train": "unused.jsonl"},
        "batch": {"examples": 8},
        "optim": {"lr": 1e-3},
        "train": {"timeout_s": 60},
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    cases = [f"{engine}={engine}" for engine in ENGINES if engine != "zero3"]
    for name, engine, change in (
        ("zero3", "zero3", {"stage3_param_persistence_threshold": 0}),
        ("zero2 by owner", "zero2", {"use_multi_rank_bucket_allreduce": False}),
    ):
        knobs = json.loads(package_files.find(f"deepspeed/{engine}.json").read_text())
        knobs["zero_optimization"] |= change
        file = directory / f"{name.replace(' ', '-')}.json"
        file.write_text(json.dumps(knobs))
        cases.append(f"{name}={engine},{file}")
    out = tiny.run_ranks([SCRIPT, str(directory / "recipe.yaml"), *cases], world_size=2, timeout_s=150)
    found: dict[str, Any] = json.loads(next(line for line in out.splitlines() if line.startswith("{")))
    return found


def reduced(step: dict[str, Any]) -> dict[str, int]:
    """Bytes of gradients by operation; sums of a few numbers are not gradients."""
    sums: dict[str, int] = {}
    for operations in step["sent"].values():
        for name, (_, size) in operations.items():
            if name in GRADIENTS and size >= step["parameters"]:
                sums[name] = sums.get(name, 0) + size
    return sums


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("engine", ["ddp", "zero1"])
def test_gradients_are_reduced_once_a_step_however_many_micro_batches(
    engine: str, dtype: str, traffic: dict[str, Any]
) -> None:
    for num_micros in (1, 3):
        step = traffic[f"{engine}/{dtype}/{num_micros}"]
        assert reduced(step) == {"allreduce": FP32 * step["parameters"]}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("engine", "operation"),
    [
        ("zero2", "allreduce"),
        ("zero2_offload", "allreduce"),
        ("zero2 by owner", "reduce"),
        ("zero3", "reduce_scatter_base"),
    ],
)
def test_gradients_are_reduced_after_every_micro_batch(
    engine: str, operation: str, dtype: str, traffic: dict[str, Any]
) -> None:
    for num_micros in (1, 3):
        step = traffic[f"{engine}/{dtype}/{num_micros}"]
        assert reduced(step) == {operation: num_micros * FP32 * step["parameters"]}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_weights_are_gathered_in_their_own_dtype(dtype: str, traffic: dict[str, Any]) -> None:
    for num_micros in (1, 3):
        for engine, times in (("zero1", 1), ("zero2", 1), ("zero3", num_micros)):
            step = traffic[f"{engine}/{dtype}/{num_micros}"]
            gathered = sum(operations.get("allgather_base", (0, 0))[1] for operations in step["sent"].values())
            assert gathered == times * BYTES[dtype] * step["parameters"], engine


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("engine", ENGINES[:-1])
def test_the_host_waits_for_nothing_between_first_forward_and_last_backward(
    engine: str, dtype: str, traffic: dict[str, Any]
) -> None:
    for num_micros in (1, 3):
        assert traffic[f"{engine}/{dtype}/{num_micros}"]["read"].get("micro", {}) == {}


def test_offload_waits_once_a_parameter_in_the_last_backward(traffic: dict[str, Any]) -> None:
    (place,) = traffic["zero2_offload/bf16/3"]["read"]["micro"]
    assert place == "runtime/zero/stage_1_and_2.py update_offload_overflow_tracker"


@pytest.mark.parametrize(("engine", "most"), [("ddp", 0), ("zero1", 3), ("zero2", 4), ("zero3", 1)])
def test_deepspeeds_own_waits_in_step_are_those_that_are_listed(
    engine: str, most: int, traffic: dict[str, Any]
) -> None:
    for dtype in BYTES:
        places = dict(traffic[f"{engine}/{dtype}/3"]["read"]["step"])
        assert places.pop("ours") >= 1, "the count sees our own read"
        assert sum(places.values()) <= most, places


def test_every_setting_is_explained_and_nothing_else_is() -> None:
    text = (Path(__file__).parents[2] / "docs" / "zero.md").read_text()
    table = text.split("## Settings")[1]
    explained = {line.split("`")[1] for line in table.splitlines() if line.startswith("| `")}
    used = set()
    for engine in ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"):
        used |= json.loads(package_files.find(f"deepspeed/{engine}.json").read_text())["zero_optimization"].keys()
    assert explained == used
