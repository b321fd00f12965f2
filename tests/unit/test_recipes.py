"""Every shipped recipe, for its chat model and its base model: parsed, planned for its machine, and dry-launched."""

import re
from pathlib import Path

import pytest

from sft_dist import cli, package_files
from sft_dist import launch as launch_module
from sft_dist.config import load_recipe
from sft_dist.machine import Gpus
from sft_dist.plan.machine import parse_gpus
from sft_dist.plan.planner import Asked, make_plan

RECIPES = {path.stem: path for path in package_files.recipes() if path.stem != "demo"}
VARIANTS = ("chat", "base")
STATE = ("weights", "gradients", "master", "moments")


def machine_of(name: str) -> str:
    """What the name of a recipe ends in, as `sft-dist plan --gpus` takes it: 1x24gb, 8x80gb, 2x8x80gb."""
    return name.rpartition("-")[2]


def overrides(path: Path, variant: str) -> list[str]:
    """None for the chat model; for the base model those that the recipe's own comment gives."""
    found = re.search(r"The base model: (model\.path=\S+) (optim\.lr=\S+)", path.read_text())
    assert found is not None
    return list(found.groups()) if variant == "base" else []


def test_there_is_a_recipe_for_every_promised_machine() -> None:
    assert set(RECIPES) == {
        "qwen2.5-1.5b-1x24gb",
        "qwen2.5-1.5b-1x80gb",
        "qwen2.5-1.5b-8x80gb",
        "qwen3-4b-8x80gb",
        "qwen3-8b-1x141gb",
        "qwen3-8b-8x80gb",
        "qwen3-8b-2x8x80gb",
        "qwen3-8b-4x8x80gb",
    }


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", RECIPES)
def test_it_fits_its_machine_as_its_comment_says(name: str, variant: str) -> None:
    recipe = load_recipe(RECIPES[name], overrides(RECIPES[name], variant))
    assert recipe.run.name == name
    is_base = recipe.model.path in ("Qwen/Qwen2.5-1.5B", "Qwen/Qwen3-4B-Base", "Qwen/Qwen3-8B-Base")
    assert is_base == (variant == "base")
    host = re.search(r"with (\d+ GB) of host memory", RECIPES[name].read_text())
    plan = make_plan(recipe, Asked(gpus=machine_of(name), host_memory=host[1] if host else None))
    assert plan.own.why_not == ""
    said = re.search(r"pack_tokens: \d+ # (\d+) GB by the plan", RECIPES[name].read_text())
    assert said is not None
    assert round(plan.own.need.device_bytes / 1e9) == int(said[1])


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("qwen2.5-1.5b-1x24gb", "", "master and moments are {all} GB"),
        ("qwen2.5-1.5b-1x24gb", "", "goes to host memory ({host} GB, with the copy of a checkpoint)"),
        ("qwen2.5-1.5b-1x24gb", "model.checkpointing=none", "packs of 16,384 tokens would need {device} GB"),
        ("qwen2.5-1.5b-1x80gb", "batch.pack_tokens=16384 train.engine=single", "16384 needs {device}: only with"),
        ("qwen2.5-1.5b-8x80gb", "batch.pack_tokens=16384 train.engine=ddp", "16384 needs {device}: only with"),
        ("qwen3-4b-8x80gb", "", "ZeRO-2 leaves {state} GB of it on each GPU"),
        ("qwen3-4b-8x80gb", "model.checkpointing=none", "packs of 16,384 tokens would need {device} GB"),
        ("qwen3-4b-8x80gb", "train.engine=zero1", "zero1 sends less and needs {more} GB more"),
        ("qwen3-4b-8x80gb", "train.engine=zero3", "zero3 saves {less} GB"),
        ("qwen3-8b-1x141gb", "", "its copy takes {copy} GB of host memory"),
        ("qwen3-8b-1x141gb", "train.engine=zero2_offload", "({device} GB on the GPU, {host} GB of host memory)"),
        ("qwen3-8b-8x80gb", "", "an eighth of each on a GPU, {state} GB"),
        ("qwen3-8b-8x80gb", "train.engine=zero2", "zero2 needs {more} GB more"),
        ("qwen3-8b-8x80gb", "model.checkpointing=none", "would need more than {tens} GB"),
        ("qwen3-8b-2x8x80gb", "model.checkpointing=none", "would need more than {tens} GB"),
        ("qwen3-8b-4x8x80gb", "model.checkpointing=none", "would need more than {tens} GB"),
        ("qwen3-8b-2x8x80gb", "", "1/16 of the state on a GPU, {state} GB"),
        ("qwen3-8b-2x8x80gb", "train.engine=zero1", "zero1 fits, too ({device} GB)"),
        ("qwen3-8b-4x8x80gb", "", "1/32 of the state on a GPU, {state} GB"),
        ("qwen3-8b-4x8x80gb", "train.engine=zero1", "zero1 fits, too ({device} GB)"),
    ],
)  # fmt: skip
def test_its_comments_say_what_the_plan_says(name: str, words: str, said: str) -> None:
    recipe, asked = load_recipe(RECIPES[name]), Asked(gpus=machine_of(name))
    plan = make_plan(load_recipe(RECIPES[name], words.split()), asked)
    usual, need = make_plan(recipe, asked).own.need, plan.own.need
    numbers = {
        "device": need.device_bytes,
        "tens": need.device_bytes // 10**10 * 10**10,
        "host": need.host_bytes,
        "copy": need.host.get("buffers", 0),
        "state": sum(need.device[part] for part in STATE),
        "all": 18 * plan.shape.all_params,
        "more": need.device_bytes - usual.device_bytes,
        "less": usual.device_bytes - need.device_bytes,
    }
    comments = " ".join(line.partition("#")[2].strip() for line in RECIPES[name].read_text().splitlines())
    expected = said.format(**{what: round(size / 1e9) for what, size in numbers.items()})
    assert expected in " ".join(comments.split())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", RECIPES)
def test_it_is_launched_as_planned(
    name: str, variant: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))  # no accelerate config of a user's own
    machine, words = parse_gpus(machine_of(name)), [name, *overrides(RECIPES[name], variant)]
    # What torch reports of a card is 7% more than it is sold by.
    gpus = Gpus(machine.per_node, round(machine.memory_bytes / 0.93))
    monkeypatch.setattr(launch_module, "look_for_gpus", lambda: gpus)
    if machine.nodes > 1:
        nodes = str(machine.nodes)
        assert cli.main(["submit", *words, "--nodes", nodes, "--gpus-per-node", "8", "--dry-run"]) == 0
        train = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("train="))
        assert f"--nodes={nodes}" in train
        assert "--gpus-per-node=8" in train
        assert train.rstrip(")").endswith(" ".join(words))
        hosts = ["--hosts", nodes, "--host-index", "0", "--main-host", "127.0.0.1", "--port", "29500"]
        assert cli.main(["launch", *words, *hosts, "--dry-run"]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if "sft_dist train" in line]
        assert len(lines) == machine.nodes
    else:
        assert cli.main(["launch", *words, "--dry-run"]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if "sft_dist train" in line]
        assert len(lines) == 1
    for line in lines:
        assert line.endswith(f"-m sft_dist train {' '.join(words)}"), "the engine is the recipe's, or single or ddp"
        assert ("accelerate.commands.launch" in line) == (machine.num_processes > 1)
        assert f"--num_processes {machine.num_processes} " in line or machine.num_processes == 1
