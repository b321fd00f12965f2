"""What `sft-dist plan` says of a recipe on a machine."""

import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from sft_dist import cli
from sft_dist import launch as launch_module
from sft_dist.config import Recipe, load_recipe
from sft_dist.data.prepare import open_or_prepare
from sft_dist.errors import ConfigError
from sft_dist.launch import plan_launch
from sft_dist.machine import Gpus
from sft_dist.plan import machine as plan_machine
from sft_dist.plan.machine import parse_gpus
from sft_dist.plan.memory import PARTS
from sft_dist.plan.planner import MODES, Asked, make_plan
from sft_dist.plan.report import print_plan, to_json
from sft_dist.run_record import read_starts
from tests import tiny

GB = 10**9


def recipe_for(directory: Path, model: str = "Qwen/Qwen3-8B", *overrides: str, **sections: dict[str, object]) -> Recipe:
    """64 examples a step, packs of 8192 tokens."""
    plain = {"data": {"max_tokens": 8192}, "batch": {"examples": 64, "pack_tokens": 8192}}
    merged = {key: plain.get(key, {}) | sections.get(key, {}) for key in {*plain, *sections}}
    return load_recipe(tiny.write_recipe(directory, model, **merged), overrides)


@pytest.mark.parametrize(
    ("text", "nodes", "per_node", "gb", "card"),
    [
        ("80GB", 1, 1, 80, None),
        ("4x80GB", 1, 4, 80, None),
        ("2x8x80gb", 2, 8, 80, None),
        ("16GiB", 1, 1, 16 * 2**30 / GB, None),
        ("H100", 1, 1, 80, "H100"),
        ("8xh200", 1, 8, 141, "H200"),
        ("2x8xH100", 2, 8, 80, "H100"),
        ("4xRTX4090", 1, 4, 24, "RTX 4090"),
    ],
)
def test_machines_are_read(text: str, nodes: int, per_node: int, gb: float, card: str | None) -> None:
    machine = parse_gpus(text)
    assert (machine.nodes, machine.per_node, machine.card) == (nodes, per_node, card)
    assert machine.memory_bytes == pytest.approx(gb * GB)


@pytest.mark.parametrize("text", ["", "x", "80", "0x80GB", "0GB", "8x0.0GiB", "8xTPU", "2x2x2x80GB", "8x"])
def test_what_is_no_machine_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a memory or a card with counts before it"):
        parse_gpus(text)


@pytest.mark.parametrize("checkpointing", MODES)
@pytest.mark.parametrize("model", ["Qwen/Qwen2.5-1.5B", "Qwen/Qwen3-8B", "meta-llama/Llama-3.2-3B"])
def test_what_auto_is_in_the_plan_it_is_when_launched(
    model: str, checkpointing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    recipe = recipe_for(tmp_path, model, f"model.checkpointing={checkpointing}")
    for count, gb in ((1, 24), (1, 48), (1, 80), (1, 141), (2, 80), (8, 24), (8, 80)):
        gpus = Gpus(count, gb * GB)
        monkeypatch.setattr(launch_module, "look_for_gpus", lambda gpus=gpus: gpus)
        monkeypatch.setattr(plan_machine, "look_for_gpus", lambda gpus=gpus: gpus)
        words = plan_launch(recipe, ["r.yaml"], launch_module.Asked()).words
        launched = words[words.index("--engine") + 1] if "--engine" in words else "single" if count == 1 else "ddp"
        assert make_plan(recipe, Asked()).own.engine == launched


def test_it_picks_the_fastest_that_fits_and_says_why_others_do_not(tmp_path: Path) -> None:
    plan = make_plan(recipe_for(tmp_path), Asked(gpus="8x80GB"))
    assert len(plan.settings) == 6 * 3
    assert plan.fastest is not None
    assert not plan.fastest.why_not
    for setting in plan.settings:
        fits = setting.need.device_bytes <= 80 * GB
        assert fits == (not setting.why_not)
        if fits and not setting.engine.endswith("_offload"):
            assert MODES.index(setting.checkpointing) >= MODES.index(plan.fastest.checkpointing)
    ddp = next(setting for setting in plan.settings if setting.engine == "ddp")
    over = (ddp.need.device_bytes - 80 * GB) / GB
    assert ddp.why_not == f"{over:.1f} GB too much, in the forward; most is moments: 65.5 GB"
    nothing = make_plan(recipe_for(tmp_path), Asked(gpus="8GB"))
    assert nothing.fastest is None
    assert cli.main(["plan", str(tmp_path / "r.yaml"), "--gpus", "8GB"]) == 1


def test_host_memory_of_this_machine_is_a_limit_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_machine, "look_for_gpus", lambda: Gpus(1, 80 * GB))
    monkeypatch.setattr(plan_machine.psutil, "virtual_memory", lambda: type("M", (), {"total": 64 * GB}))
    plan = make_plan(recipe_for(tmp_path), Asked())
    offloads = [s for s in plan.settings if s.engine == "zero3_offload" and s.need.device_bytes < 70 * GB]
    assert len(offloads) == 2
    assert all(setting.why_not.startswith("host memory: ") for setting in offloads)


def test_host_memory_of_another_machine_is_a_limit_where_it_is_said(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path)
    plan = make_plan(recipe, Asked(gpus="2x8x80GB", host_memory="100GB"))
    assert plan.machine.host_bytes == 100 * GB
    for setting in plan.settings:
        node = 8 * setting.need.host_bytes
        if setting.need.device_bytes <= 80 * GB:
            assert setting.why_not == (f"host memory: {node / GB:.0f} GB of 100 GB" if node > 100 * GB else "")
    path = str(tmp_path / "r.yaml")
    assert cli.main(["plan", path, "--gpus", "8x80GB", "--host-memory", "64GB"]) == 1, "no room for a checkpoint's copy"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Asked(gpus="8xH100", processes=4), "--processes 4 is of this machine, and --gpus 8xH100 of another"),
        (Asked(host_memory="64GB"), "--host-memory 64GB needs --gpus"),
        (Asked(gpus="80GB", host_memory="0GB"), "--host-memory 0GB: expected the memory of a node"),
        (Asked(gpus="80GB", host_memory="64"), "--host-memory 64: expected the memory of a node"),
    ],
)
def test_flags_that_make_no_sense_together_are_refused(asked: Asked, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(recipe_for(tmp_path), asked)


def test_tokens_and_steps_come_from_the_store_or_from_flags_or_are_not_known(tmp_path: Path, tied_model: Path) -> None:
    recipe = recipe_for(tmp_path, str(tied_model), train={"steps": None, "epochs": 3})
    assert make_plan(recipe, Asked(gpus="80GB")).work.source.startswith("not known: run sft-dist prepare")
    work = make_plan(recipe, Asked(gpus="80GB", tokens=5000, examples=130)).work
    assert (work.tokens, work.steps) == (15_000, 9)
    store = open_or_prepare(recipe, recipe.data.train, console=Console(quiet=True))
    work = make_plan(recipe, Asked(gpus="80GB")).work
    assert (work.tokens, work.responses) == (3 * store.lengths.sum(), 3 * store.num_responses.sum())
    assert work.squares == 3 * (store.lengths**2).sum()
    assert work.steps == 3 * -(-len(store) // 64)


def test_time_is_tokens_over_a_rate_that_is_given_or_follows_from_the_peak(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, train={"steps": None, "epochs": 1})
    time = make_plan(recipe, Asked(gpus="80GB", tokens=1_000_000, tokens_per_s=500.0)).time
    assert time is not None
    assert time.seconds == 2000
    asked = Asked(gpus="8xH100", tokens=1_000_000, mfu=40.0)
    plan = make_plan(recipe, asked)
    assert plan.time is not None
    flops = plan.shape.step_flops(tokens=10**6, responses=10**6, sum_squares=10**6 * 8192 // 4)
    assert plan.time.seconds == pytest.approx(flops / (8 * 0.4 * 989e12))
    assert "989 dense bf16 TFLOP/s, H100's data sheet" in plan.time.source
    with pytest.raises(ConfigError, match="--mfu 40 needs a card whose peak is known"):
        make_plan(recipe, Asked(gpus="8x80GB", mfu=40.0))
    assert make_plan(recipe, Asked(gpus="80GB")).time is None


@pytest.mark.parametrize(
    ("save_every", "kept"),
    [(5, 3 + 5), (10, 3 + 5), (4, 3 + 2), (None, 3)],  # the newest 3, and those of steps 10, 20, ...; of 20 and 40
)
def test_disk_is_counted_for_what_is_kept_and_what_is_being_written(
    save_every: int | None, kept: int, tmp_path: Path
) -> None:
    train = {"keep_checkpoints": 3, "keep_every": 10, "save_every": save_every, "steps": 50}
    plan = make_plan(recipe_for(tmp_path, train=train), Asked(gpus="80GB"))
    one = 12 * plan.shape.all_params
    assert plan.disk["a checkpoint"] == one
    assert plan.disk[f"{kept} kept and one being written"] == (kept + 1) * one
    assert plan.disk["the model"] == 2 * plan.shape.all_params


@pytest.mark.parametrize("width", [80, 100])
def test_nothing_that_is_printed_is_wider_than_the_terminal(tmp_path: Path, width: int) -> None:
    file = (tmp_path / "out").open("w")
    asked = Asked(gpus="8x80GB", tokens=252_180_000, tokens_per_s=1000.0)
    console = Console(width=width, record=True, force_terminal=True, color_system=None, file=file)
    plan = make_plan(recipe_for(tmp_path, train={"steps": None}), asked)
    print_plan(plan, console)
    lines = console.export_text().splitlines()
    assert any(line.split()[:5] == ["time", "2", "d", "22", "h"] for line in lines), "as status says it: 70 h 3 min"
    assert max(map(len, lines)) <= width
    for setting in plan.settings:
        numbers = f"{setting.need.device_bytes / 1e9:.1f}"
        assert sum(numbers in line and setting.engine in line for line in lines) >= 2, "a row and a bar"
    bars = [line for line in lines if "WWW" in line or "AAA" in line]
    edges = {line.index("|") for line in bars}
    assert len(edges) == 1, "the memory there is, a line through all bars"
    assert all(">" in line for line in bars if line.startswith("ddp"))


def test_json_has_every_number(tmp_path: Path) -> None:
    plan = make_plan(recipe_for(tmp_path), Asked(gpus="8x80GB"))
    found = json.loads(to_json(plan))
    assert found["parameters"] == plan.shape.all_params
    assert [sum(each["device"].values()) for each in found["settings"]] == [
        setting.need.device_bytes for setting in plan.settings
    ]
    assert tuple(found["own"]["device"]) == PARTS


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_the_bars_are_drawn(tmp_path: Path, suffix: str, magic: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    recipe_for(tmp_path)
    path = tmp_path / f"plan{suffix}"
    assert cli.main(["plan", str(tmp_path / "r.yaml"), "--gpus", "8x80GB", "--picture", str(path)]) == 0
    assert path.read_bytes().startswith(magic)
    assert str(path) in capsys.readouterr().out


def test_a_picture_without_matplotlib_says_how_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe_for(tmp_path)
    words = ["plan", str(tmp_path / "r.yaml"), "--gpus", "8x80GB", "--picture"]
    assert cli.main([*words, str(tmp_path / "plan.gif")]) == 2
    assert "expected a file that ends in .png or .svg" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main([*words, str(tmp_path / "plan.png")]) == 2
    assert "pip install 'sft-dist[report]'" in capsys.readouterr().err


def test_a_model_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json is not here, cannot be fetched"):
        make_plan(recipe_for(tmp_path, "someone/never-downloaded"), Asked(gpus="80GB"))


def test_a_run_notes_what_was_planned_and_leaves_a_rate(
    tmp_path: Path, tied_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny.write_recipe(tmp_path, tied_model, train={"steps": 2})
    assert cli.main(["train", str(path)]) == 0
    noted = read_starts(tmp_path / "runs" / "r")[-1]["planned_memory"]
    assert tuple(noted) == PARTS
    assert f"planned peak {sum(noted.values()) / 1e9:,.2f} GB a process, on its cpu" in capsys.readouterr().out
    plan = make_plan(load_recipe(path), Asked(processes=1))
    assert plan.time is not None
    assert "the median of 2 steps" in plan.time.source
    assert "on 1 processes" in plan.time.source
    assert plan.own.engine == "single"
