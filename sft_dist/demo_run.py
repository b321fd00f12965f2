"""`sft-dist demo`: the whole job on a CPU, through the same commands that a user would type."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sft_dist import package_files
from sft_dist.config import Recipe, load_recipe
from sft_dist.console import make_console
from sft_dist.demo.dataset import (
    NUM_HELD_OUT,
    NUM_TRAIN,
    example_texts,
    generate_examples,
    write_demo_data,
)
from sft_dist.demo.model import NUM_TOKENIZER_EXAMPLES, build_model, build_tokenizer
from sft_dist.errors import ConfigError
from sft_dist.evaluation.answers import ANSWERS, read_scored
from sft_dist.metrics import read_held_out, read_steps
from sft_dist.quiet import quiet_libraries
from sft_dist.world import num_cores

SEED = 0
NUM_PROCESSES = 2
MARKER = ".sft_dist_demo"


def run_demo(directory: Path, *, steps: int | None = None, num_train: int | None = None) -> int:
    """Data, tiny model, two processes with ZeRO-2, held-out scores before and after, one answer. Returns an exit code.

    Raises ConfigError when `directory` holds something that is not a demo.
    """
    quiet_libraries()
    console = make_console()
    started = time.perf_counter()
    _make_room(directory)
    console.rule("1/4  data, tokenizer and model, all from scratch")
    num_held_out = NUM_HELD_OUT if num_train is None else max(6, min(NUM_HELD_OUT, num_train // 8))
    num_train = NUM_TRAIN if num_train is None else num_train
    _write_inputs(directory, num_train=num_train, num_held_out=num_held_out)
    recipe_path = _write_recipe(directory, steps)
    recipe = load_recipe(recipe_path)
    console.print(
        f"{num_train:,} training and {num_held_out} held-out examples that share no values, in {directory / 'data'}"
    )
    steps_of_the_job = {
        "tokenise once, verify every mask": ["sft-dist", "prepare", str(recipe_path)],
        "train: two processes, ZeRO-2": _launch_command(recipe_path),
        "answers to held-out prompts, before and after": ["sft-dist", "evaluate", str(recipe_path), "--before"],
    }
    for number, (title, command) in enumerate(steps_of_the_job.items(), start=2):
        console.rule(f"{number}/4  {title}")
        code = _run(command, console)
        if code:
            return code
    _show_summary(console, recipe, directory, seconds=time.perf_counter() - started)
    _show_answer(console, recipe.run.path / "model", recipe.run.path / ANSWERS / "model.jsonl")
    return 0


def _make_room(directory: Path) -> None:
    """Start afresh, but delete nothing that a demo did not write."""
    marker = directory / MARKER
    if directory.exists() and not (directory.is_dir() and (marker.exists() or not any(directory.iterdir()))):
        raise ConfigError(f"{directory} exists and is not a demo; choose another place with --dir")
    for name in ("data", "model", "runs"):
        shutil.rmtree(directory / name, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    marker.write_text("written by sft-dist demo, which may delete what lies beside this file\n", encoding="utf-8")


def _write_inputs(directory: Path, *, num_train: int, num_held_out: int) -> None:
    write_demo_data(directory / "data", num_train=num_train, num_held_out=num_held_out, seed=SEED)
    texts = example_texts(generate_examples(NUM_TOKENIZER_EXAMPLES, SEED, "train"))
    build_tokenizer(texts, directory / "model")
    build_model(directory / "model", directory / "model", seed=SEED)


def _write_recipe(directory: Path, steps: int | None) -> Path:
    """The shipped recipe with its paths under `directory`."""
    text = package_files.find("recipes/demo.yaml").read_text(encoding="utf-8")
    if directory != Path("demo") or steps is not None:
        recipe = _moved(yaml.safe_load(text), directory)
        recipe["train"] |= {} if steps is None else {"steps": steps}
        text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    path = directory / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def _moved(value: Any, directory: Path) -> Any:
    """The recipe's values with `demo/...` under another directory."""
    if isinstance(value, dict):
        return {key: _moved(item, directory) for key, item in value.items()}
    if isinstance(value, list):
        return [_moved(item, directory) for item in value]
    return (
        str(directory / value.removeprefix("demo/")) if isinstance(value, str) and value.startswith("demo/") else value
    )


def _launch_command(recipe: Path) -> list[str]:
    config = package_files.find("accelerate/cpu-2.yaml")
    return ["accelerate", "launch", "--config_file", str(config), "-m", "sft_dist", "train", str(recipe)]


def _run(command: Sequence[str], console: Console) -> int:
    """Show the command as a user would type it, and run it from this environment with a fair share of the cores."""
    console.print(Text(f"$ {shlex.join(command)}", style="bold"), soft_wrap=True)
    program = str(Path(sys.executable).with_name(command[0]))
    threads = {"OMP_NUM_THREADS": str(max(1, num_cores() // NUM_PROCESSES)), "TOKENIZERS_PARALLELISM": "false"}
    # The demo runs on the CPU also where there are GPUs: it shows the same thing everywhere.
    return subprocess.run([program, *command[1:]], env=os.environ | threads | {"CUDA_VISIBLE_DEVICES": ""}).returncode


def _show_summary(console: Console, recipe: Recipe, directory: Path, *, seconds: float) -> None:
    steps = read_steps(recipe.run.path / "metrics.jsonl")
    held_out = read_held_out(recipe.run.path / "metrics.jsonl")
    tokens = sum(step["tokens"] for step in steps.values())
    training_s = sum(step["seconds"] for step in steps.values())
    table = Table(show_header=False, box=None)
    first, last = held_out[min(held_out)]["held_out_loss"], held_out[max(held_out)]["held_out_loss"]
    table.add_row("held-out response loss", f"{first:.3f} before, {last:.3f} after (nats, {recipe.loss})")
    table.add_row(
        "training",
        f"{len(steps)} steps, {tokens:,} tokens, {tokens / training_s:,.0f} tokens/s on {NUM_PROCESSES} processes",
    )
    table.add_row("time", f"{training_s:.0f} s in training steps, {seconds:.0f} s in all")
    table.add_row("data", str(directory / "data"))
    table.add_row("recipe", str(directory / "recipe.yaml"))
    table.add_row("metrics", str(recipe.run.path / "metrics.jsonl"))
    table.add_row("checkpoints", str(recipe.run.path / "checkpoints"))
    table.add_row("model", str(recipe.run.path / "model"))
    console.print(table)


def _show_answer(console: Console, model_dir: Path, answers: Path) -> None:
    """One held-out question and its answer by the exported model, and the command for more."""
    shown = next(answer for answer in read_scored(answers) if answer.task == "closed_qa")
    system, user = (turn["content"] for turn in shown.prompt)
    console.rule("a held-out question")
    console.print(user, markup=False, highlight=False)
    console.print(f"model: {shown.answer}   (truth: {shown.truth})", markup=False, highlight=False)
    command = ["sft-dist", "generate", str(model_dir), "--system", system, "--prompt", user]
    console.print(Text(f"$ {shlex.join(command)}", style="bold"), soft_wrap=True)
