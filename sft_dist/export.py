"""`sft-dist export`: a run's weights in Hugging Face format, from its checkpoints, without a GPU.

checkpoints/step-00000100 ... 300   fp32 masters in pieces  --mean, a block at a time-->  model in bf16 or fp32
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from sft_dist import commits
from sft_dist.checkpoint import SHAPES
from sft_dist.commits import RunState
from sft_dist.config import Recipe, load_recipe
from sft_dist.data.chat import ChatTokenizer
from sft_dist.durable import replace_durably
from sft_dist.engine.fragments import BLOCK_ELEMENTS, Pieces, require_shapes
from sft_dist.errors import CheckpointError, ConfigError
from sft_dist.model.export import CARD, empty_model, fill, write_export
from sft_dist.model.load import config_digest, read_config
from sft_dist.model_card import Weights, write_card
from sft_dist.quiet import quiet_libraries
from sft_dist.run_files import CHECKPOINTS, CONFIG, MODEL, RUN_JSON
from sft_dist.run_record import read_starts

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True)
class Exported:
    """directory: the export. steps: whose weights these are, or whose mean. is_new: False when only its card is new."""

    directory: Path
    steps: tuple[int, ...]
    dtype: str
    is_new: bool


def export_run(
    run_dir: Path,
    *,
    step: int | None = None,
    average: int | None = None,
    dtype: str | None = None,
    output: Path | None = None,
) -> Exported:
    """Export a run; with nothing asked, and a finished model there, that model gets a new card and is else left alone.

    step: of which checkpoint; None: the newest. average: the mean over so many checkpoints, the last of them `step`.
    dtype: bf16 or fp32; None: what the run computed in. output: None for <run>/model where these are the weights after
    the last step, and a directory beside it, named for what it holds, where they are others.
    Raises ConfigError for what is not there or in the way, CheckpointError for a checkpoint that is not whole.
    """
    quiet_libraries()
    starts = read_starts(run_dir)
    if not (starts and (run_dir / CONFIG).is_file()):
        missing = CONFIG if starts else RUN_JSON
        raise ConfigError(f"{run_dir}: no run is here ({missing} is missing); name a run's directory, as runs/<name>")
    recipe, num_steps = load_recipe(run_dir / CONFIG), starts[-1]["num_steps"]
    if (step, average, dtype, output) == (None, None, None, None) and (run_dir / MODEL / "config.json").is_file():
        return _new_card(run_dir, recipe, num_steps)
    chosen = _choose(run_dir / CHECKPOINTS, step=step, average=average or 1)
    for path in chosen:
        commits.verify(path)
    state = commits.read_state(chosen[-1])
    trained_in = str(state.curve["model.dtype"])
    weights = Weights(tuple(commits.step_of(path) for path in chosen), DTYPES[dtype] if dtype else trained_in)
    is_final = weights == Weights((num_steps,), trained_in)
    directory = output or run_dir / (MODEL if is_final else _name_of(weights, trained_in))
    if output is not None and output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(f"--output {output}: is there already; name a new directory")
    tokenizer, causal_lm = _empty(recipe, state, dtype=getattr(torch, weights.dtype))
    fill(causal_lm, mean_of(chosen, dtype=causal_lm.dtype))
    card = write_card(run_dir, recipe, weights=weights, tokenizer=tokenizer)
    write_export(causal_lm, directory, tokenizer=tokenizer, card=card)
    return Exported(directory, weights.steps, weights.dtype, is_new=True)


def _empty(recipe: Recipe, state: RunState, *, dtype: torch.dtype) -> tuple[ChatTokenizer, PreTrainedModel]:
    """A run's tokenizer, and its model without weights. Raises ConfigError when model.path is another model now."""
    section = recipe.model
    if config_digest(read_config(section)) != state.curve.get("model's config"):
        raise ConfigError(
            f"model.path={section.path!r} has another config than the model that was trained; put that one back"
        )
    tokenizer = ChatTokenizer.load(section.path, revision=section.revision, chat_template=recipe.data.chat_template)
    return tokenizer, empty_model(section, num_tokens=tokenizer.num_tokens, dtype=dtype)


@torch.no_grad()
def mean_of(checkpoints: Sequence[Path], *, dtype: torch.dtype) -> dict[str, Tensor]:
    """The mean of the checkpoints' fp32 master weights, every one with the same say, rounded once to `dtype`.

    Added up in fp64, whose rounding is far below that of fp32: the mean is the same in whatever order. Memory is that
    of the result and a block of 8 million elements.
    Raises CheckpointError for checkpoints of different models, or one with a gap.
    """
    shapes = [_shapes(path) for path in checkpoints]
    for other in shapes[:-1]:
        require_shapes(other, shapes[-1])
    found = {}
    try:
        pieces = [
            Pieces([file for file in commits.named_files(path) if file.suffix == ".safetensors"])
            for path in checkpoints
        ]
        for name, shape in shapes[-1].items():
            weight = found[name] = torch.empty(shape, dtype=dtype)
            for start in range(0, weight.numel(), BLOCK_ELEMENTS):
                part = weight.view(-1)[start : start + BLOCK_ELEMENTS]
                total = torch.zeros(part.numel(), dtype=torch.float64)
                block = torch.empty(part.numel(), dtype=torch.float32)
                for each in pieces:
                    each.read_into(block, kind="master", name=name, start=start)
                    total += block
                # By way of fp32, as training rounds: its bf16 weights are rounded fp32 masters.
                part.copy_((total / len(pieces)).float())
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{checkpoints[-1]}: cannot be read: {error}") from None
    return found


def _shapes(path: Path) -> dict[str, list[int]]:
    try:
        shapes: dict[str, list[int]] = json.loads((path / SHAPES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / SHAPES}: cannot be read: {error}") from None
    return shapes


def _choose(directory: Path, *, step: int | None, average: int) -> list[Path]:
    """The last `average` committed checkpoints up to the one after `step`, oldest first."""
    there = commits.committed(directory)
    names = ", ".join(str(commits.step_of(path)) for path in there) or "none"
    if step is not None and step not in map(commits.step_of, there):
        raise ConfigError(f"--checkpoint {step}: {directory} has no committed checkpoint of that step; it has: {names}")
    upto = [path for path in there if step is None or commits.step_of(path) <= step]
    if len(upto) < average or not upto:
        raise ConfigError(
            f"{directory} has {len(upto)} committed checkpoints to export, {average} are needed; steps there: {names}"
            + (". train.keep_checkpoints and train.keep_every say how many a run keeps" if average > 1 else "")
        )
    return upto[-average:]


def _name_of(weights: Weights, trained_in: str) -> str:
    """A directory beside <run>/model that says what it holds."""
    short = {name: flag for flag, name in DTYPES.items()}[weights.dtype]
    dtype = f"-{short}" * (weights.dtype != trained_in)
    mean = f"-average-{len(weights.steps)}" * (len(weights.steps) > 1)
    return f"{MODEL}-{commits.name_of(weights.steps[-1])}{mean}{dtype}"


def _new_card(run_dir: Path, recipe: Recipe, num_steps: int) -> Exported:
    directory = run_dir / MODEL
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    weights = Weights((num_steps,), str(config.get("dtype", "float32")))
    card = write_card(run_dir, recipe, weights=weights, tokenizer=ChatTokenizer.load(directory))
    replace_durably(directory / CARD, card)
    return Exported(directory, weights.steps, weights.dtype, is_new=False)
