"""wandb and TensorBoard show the same numbers under the same names, and those are the numbers of metrics.jsonl."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from sft_dist.metric_names import GIB, mfu_of, named_numbers
from sft_dist.metrics import read_lines
from sft_dist.tensorboard_tracker import TensorboardTracker
from tests import tiny
from tests.unit.test_trackers import held_out_of, metrics_of

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("no_wandb_of_the_machine")


def tensorboard_values(run_dir: Path) -> dict[tuple[str, int], list[float]]:
    """By name and step; a step that is shown twice has two."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    found: dict[tuple[str, int], list[float]] = {}
    for name in events.Tags()["tensors"]:
        for event in events.Tensors(name):
            found.setdefault((name, event.step), []).append(float(tensor_util.make_ndarray(event.tensor_proto)))
    return found


def records_of(data: bytes) -> Iterator[bytes]:
    """The records of a file of wandb: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    place, parts = 7, b""
    while place + 7 <= len(data):
        room = 2**15 - place % 2**15
        if room < 7:  # a block's end, too short for a header
            place += room
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            yield parts
            parts = b""


def wandb_rows(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Rows by step, of the file that wandb keeps of an offline run."""
    from wandb.proto import wandb_internal_pb2

    (path,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    rows: dict[int, dict[str, Any]] = {}
    for data in records_of(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.setdefault(record.history.step.num, {}).update(row)
    return rows


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, tied_model: Path) -> Path:
    """A run of four steps with held-out losses and commits."""
    root = tmp_path_factory.mktemp("names")
    tiny.write_chats(root / "held.jsonl", num_examples=6, seed=5, longest=60)
    recipe = tiny.write_recipe(
        root,
        tied_model,
        data={"held_out": str(root / "held.jsonl")},
        # Two commits that end beside one step share a row of wandb, which then has the later one: here none waits.
        train={"steps": 4, "eval_every": 2, "save_every": 2, "save_in_background": False, "tensorboard": True},
        wandb={"project": "p", "mode": "offline"},
    )
    environ = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-m", "sft_dist", "train", str(recipe)],
        cwd=ROOT,
        env=environ | {"HOME": str(root), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return Path(yaml.safe_load(recipe.read_text())["run"]["dir"]) / "r"


def expected(run_dir: Path) -> dict[str, dict[int, float]]:
    """From metrics.jsonl, by a table that is written down here once more."""
    found: dict[str, dict[int, float]] = {}
    for line in read_lines(run_dir / "metrics.jsonl"):
        table: Mapping[str, Any] = {
            "step": {
                "train/loss": line.get("loss"), "train/lr": line.get("lr"), "train/grad_norm": line.get("grad_norm"),
                "train/tokens": line.get("tokens"), "perf/tokens_per_s": line.get("tokens_per_s"),
                "perf/step_flops": line.get("flops"), "perf/imbalance": line.get("imbalance"),
                "memory/peak_gib": line.get("peak_memory_bytes", 0) / 2**30,
            },
            "held_out": {"held_out/held_out/loss": line.get("held_out_loss")},
            "commit": {"checkpoint/seconds": line.get("seconds"), "checkpoint/stall_s": line.get("stall_s")},
        }[line["event"]]  # fmt: skip
        for name, value in table.items():
            found.setdefault(name, {})[line["step"]] = value
    return found


def test_tensorboard_has_the_values_of_the_file_once_each(run_dir: Path) -> None:
    shown, wanted = tensorboard_values(run_dir), expected(run_dir)
    assert set(wanted["train/loss"]) == {1, 2, 3, 4}
    assert set(wanted["held_out/held_out/loss"]) == {0, 2, 4}
    for name, by_step in wanted.items():
        assert {step: values for (of, step), values in shown.items() if of == name} == {
            step: [value] for step, value in by_step.items()
        }, name


def test_wandb_has_the_values_of_the_file(run_dir: Path) -> None:
    """A held-out loss and a commit may stand beside a later step, and say which one they are of."""
    rows, wanted = wandb_rows(run_dir), expected(run_dir)
    for name, by_step in wanted.items():
        kind = "checkpoint/step" if name.startswith("checkpoint") else "held_out/held_out/step"
        shown = {(row[kind] if "train" not in name and kind in row else step): row[name]
                 for step, row in rows.items() if name in row}  # fmt: skip
        assert shown == by_step, name


def test_both_show_the_same_names(run_dir: Path) -> None:
    names = {name for row in wandb_rows(run_dir).values() for name in row if not name.startswith("_")}
    assert names == {name for name, _ in tensorboard_values(run_dir)}
    assert not any(name.startswith("perf/mfu") for name in names), "the peak of a CPU is not known"


def test_a_step_says_its_flops_and_memory_and_run_json_the_environment(run_dir: Path) -> None:
    """FLOPs against the formula of the model's config, from the lengths of the examples of each step."""
    from sft_dist.config import load_recipe
    from sft_dist.data.prepare import open_or_prepare
    from sft_dist.data.steps import schedule_of

    recipe = load_recipe(run_dir.parents[1] / "r.yaml")
    store = open_or_prepare(recipe, recipe.data.train, console=Console())
    layers, hidden, kv, width, inner, vocabulary = 2, 64, 32, 64, 128, 32
    body = layers * (2 * hidden * width + 2 * hidden * kv + 3 * hidden * inner)
    for line in read_lines(run_dir / "metrics.jsonl"):
        if line["event"] != "step":
            continue
        _, ids = schedule_of(recipe, store).example_ids(line["step"])
        squares = sum(int(store.lengths[i]) ** 2 for i in ids)
        matrices = body * line["tokens"] + hidden * vocabulary * line["response_tokens"]
        assert line["flops"] == 6 * (matrices + layers * width * squares)
        assert 2**20 < line["memory_bytes"] <= line["peak_memory_bytes"] + 2**20
    (start,) = json.loads((run_dir / "run.json").read_text())["starts"]
    assert start["environment"]["engine"] == "single"
    assert start["environment"]["peak_flops"] is None
    assert start["environment"]["command"].startswith("sft-dist train ")
    assert start["data"]["fingerprint"] == store.fingerprint
    assert sum(start["data"]["lengths"]["examples"]) == len(store)
    assert ["held out", "warning"] in [[name, text.split(":")[0]] for name, text in start["banner"]]


def test_numbers_are_finite_and_named_by_their_kind() -> None:
    step = {
        "event": "step",
        "step": 3,
        "loss": float("nan"),
        "lr": 0.5,
        "applied": True,
        "batch": "ab",
        "withheld": None,
    }
    assert named_numbers(step) == {"train/lr": 0.5, "train/applied": 1}
    commit = {"event": "commit", "step": 3, "size_bytes": GIB // 2, "stall_s": 0.5, "seconds": 2}
    assert named_numbers(commit) == {
        "checkpoint/step": 3, "checkpoint/stall_s": 0.5, "checkpoint/seconds": 2, "checkpoint/size_gib": 0.5,
    }  # fmt: skip
    score = {"event": "score", "step": 3, "set": "new", "task": "calculator", "score": 0.25, "n": 50}
    assert named_numbers(score) == {"score/new/calculator": 0.25, "score/new/step": 3}
    held_out = {"event": "held_out", "step": 3, "set": "new", "held_out_loss": 2.0, "examples": 4}
    assert named_numbers(held_out) == {"held_out/new/loss": 2.0, "held_out/new/examples": 4, "held_out/new/step": 3}
    assert named_numbers({"event": "change", "step": 3, "changed": ["optim.lr"]}) == {"change/step": 3}


def test_mfu_is_flops_over_what_all_devices_could_have_done() -> None:
    line = {"event": "step", "flops": 4e15, "seconds": 2.0}
    assert mfu_of(line, peak_flops=8 * 989e12) == pytest.approx(4e15 / 2 / (8 * 989e12))
    assert named_numbers(line, peak_flops=1e16)["perf/mfu"] == 0.2
    assert mfu_of(line, peak_flops=None) is None
    assert mfu_of({"flops": None, "seconds": 2.0}, peak_flops=1e15) is None


def test_a_run_that_goes_on_shows_no_step_twice(tmp_path: Path) -> None:
    """Killed after step 5 and resumed after step 3: steps 4 and 5 of the first attempt are gone."""
    for first, last, done, loss in ((1, 5, 0, 1.0), (4, 6, 3, 2.0)):
        tracker = TensorboardTracker(tmp_path, done=done, peak_flops=None)
        for step in range(first, last + 1):
            tracker.log(metrics_of(step, loss=loss))
        tracker.close()
    shown = {step: values for (name, step), values in tensorboard_values(tmp_path).items() if name == "train/loss"}
    assert shown == {1: [1.0], 2: [1.0], 3: [1.0], 4: [2.0], 5: [2.0], 6: [2.0]}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_directory_that_goes_away_midway_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = TensorboardTracker(tmp_path, done=0, peak_flops=None)
    tracker.log(metrics_of(1))
    shutil.rmtree(tmp_path / "tensorboard")
    for step in range(2, 200):
        tracker.log(metrics_of(step, loss=float(step)))
    tracker.log(held_out_of(3))
    tracker.close()
    (record,) = (record for record in caplog.records if record.name == "sft_dist.tensorboard_tracker")
    assert record.levelno == logging.WARNING
    assert "TensorBoard is off for this run" in record.getMessage()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_place_that_cannot_be_written_does_not_matter(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tensorboard").write_text("a file")
    tracker = TensorboardTracker(tmp_path, done=0, peak_flops=None)
    tracker.log(metrics_of(1))
    tracker.close()
    assert "TensorBoard is off for this run" in caplog.text
