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
    plan = make_plan(recipe, Asked(gpus=machine_of(name)))
    assert plan.own.why_not == ""
    said = re.search(r"pack_tokens: \d+ # (\d+) GB by the plan", RECIPES[name].read_text())
    assert said is not None
    assert round(plan.own.need.device_bytes / 1e9) == int(said[1])


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
