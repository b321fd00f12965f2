"""`sft-dist demo`: the whole job on a CPU, through the same commands that a user would type."""

import json
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
from sft_dist.data.conversation import Message
from sft_dist.demo.dataset import (
    NUM_HELD_OUT,
    NUM_TRAIN,
    DemoFiles,
    example_texts,
    generate_examples,
    write_demo_data,
)
from sft_dist.demo.model import NUM_TOKENIZER_EXAMPLES, build_model, build_tokenizer
from sft_dist.errors import ConfigError
from sft_dist.generate import Answerer, Sampling
from sft_dist.metrics import read_held_out, read_steps
from sft_dist.quiet import quiet_libraries
from sft_dist.scoring import TemplateScore, score_by_template
from sft_dist.world import num_cores

SEED = 0
NUM_PROCESSES = 2
JSON_TEMPLATES = ("extraction",)
MARKER = ".sft_dist_demo"
LONGEST_ANSWER = 120


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
    num_train = num_train or NUM_TRAIN
    files = _write_inputs(directory, num_train=num_train, num_held_out=num_held_out)
    recipe_path = _write_recipe(directory, steps)
    recipe = load_recipe(recipe_path)
    console.print(
        f"{num_train:,} training and {num_held_out} held-out examples that share no values, in {directory / 'data'}"
    )
    for row, command in enumerate((["sft-dist", "prepare", str(recipe_path)], _launch_command(recipe_path)), start=2):
        console.rule(f"{row}/4  {'tokenise once, verify every mask' if row == 2 else 'train: two processes, ZeRO-2'}")
        code = _run(command, console)
        if code:
            return code
    console.rule("4/4  answers on held-out prompts, before and after")
    exported = Answerer(recipe.run.path / "model")
    before, after = (_score(answerer, files.held_out) for answerer in (Answerer(directory / "model"), exported))
    _show_scores(console, before, after)
    _show_summary(console, recipe, directory, seconds=time.perf_counter() - started)
    _show_answer(console, exported, recipe.run.path / "model", files.held_out)
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


def _write_inputs(directory: Path, *, num_train: int, num_held_out: int) -> DemoFiles:
    files = write_demo_data(directory / "data", num_train=num_train, num_held_out=num_held_out, seed=SEED)
    texts = example_texts(generate_examples(NUM_TOKENIZER_EXAMPLES, SEED, "train"))
    build_tokenizer(texts, directory / "model")
    build_model(directory / "model", directory / "model", seed=SEED)
    return files


def _write_recipe(directory: Path, steps: int | None) -> Path:
    """The shipped recipe with its paths under `directory`."""
    text = package_files.find("recipes/demo.yaml").read_text(encoding="utf-8")
    if directory != Path("demo") or steps is not None:
        recipe = _moved(yaml.safe_load(text), directory)
        recipe["train"]["steps"] = steps or recipe["train"]["steps"]
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


def _read_rows(held_out: Path) -> list[tuple[str, list[Message], str]]:
    """(template, prompt messages, true answer) of each held-out row."""
    rows = []
    for line in held_out.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        *prompt, answer = row["messages"]
        rows.append((row["template"], [Message(m["role"], m["content"]) for m in prompt], answer["content"]))
    return rows


def _score(answerer: Answerer, held_out: Path) -> dict[str, TemplateScore]:
    templates, prompts, truths = zip(*_read_rows(held_out), strict=True)
    answers = list(answerer.answer(prompts, sampling=Sampling(max_new_tokens=LONGEST_ANSWER)))
    return score_by_template(templates, answers, truths, json_templates=JSON_TEMPLATES)


def _show_scores(console: Console, before: dict[str, TemplateScore], after: dict[str, TemplateScore]) -> None:
    table = Table(title="exact match on held-out examples (greedy answers)")
    for heading in ("template", "n", "best constant", "before", "after", "after - constant"):
        table.add_column(heading, justify="left" if heading == "template" else "right")
    for name, score in after.items():
        shares = (score.constant_exact_match, before[name].exact_match, score.exact_match)
        table.add_row(
            name, str(score.num_examples), *(f"{share:.0%}" for share in shares), f"{100 * score.gain:+.0f} points"
        )
    console.print(table)


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


def _show_answer(console: Console, answerer: Answerer, model_dir: Path, held_out: Path) -> None:
    """One held-out question through the exported model, and the command for more."""
    _, prompt, truth = next(row for row in _read_rows(held_out) if row[0] == "closed_qa")
    answer = next(answerer.answer([prompt], sampling=Sampling(max_new_tokens=LONGEST_ANSWER)))
    console.rule("a held-out question")
    console.print(prompt[-1].content, markup=False, highlight=False)
    console.print(f"model: {answer}   (truth: {truth})", markup=False, highlight=False)
    command = ["sft-dist", "generate", str(model_dir), "--system", prompt[0].content, "--prompt", prompt[-1].content]
    console.print(Text(f"$ {shlex.join(command)}", style="bold"), soft_wrap=True)
