"""`sft-dist evaluate`: the held-out loss and perplexity of a run's exported model, in one process."""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from sft_dist.config import Recipe
from sft_dist.data.batch import MicroBatch
from sft_dist.data.prepare import open_or_prepare
from sft_dist.data.schedule import CostModel
from sft_dist.data.steps import held_out_of
from sft_dist.durable import replace_durably
from sft_dist.engine.collectives import choose_device
from sft_dist.errors import ConfigError
from sft_dist.evaluate import HeldOutSet
from sft_dist.model.attention import choose_backend
from sft_dist.model.load import PackedModel, compute_dtype, dropout_rates, load_model, read_config
from sft_dist.quiet import quiet_libraries
from sft_dist.run_files import EVALUATION, MODEL
from sft_dist.world import World, read_world


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of held-out examples. Losses in nats.

    example_mean, token_mean: the two training losses over the whole set. perplexity: exp(token_mean).
    """

    model: str
    examples: int
    response_tokens: int
    example_mean: float
    token_mean: float
    perplexity: float
    dtype: str
    seconds: float


@dataclass(frozen=True)
class OneProcess:
    """A model that is only measured, in this process alone."""

    model: PackedModel
    device: torch.device
    world: World

    def __call__(self, micro: MicroBatch) -> Tensor:
        return self.model(micro)  # type: ignore[no-any-return]


def evaluate_run(recipe: Recipe, *, console: Console) -> Evaluation:
    """Measure <run>/model on the recipe's held-out data and write <run>/evaluation.json.

    Raises ConfigError without an exported model, without held-out data, and in a world of several processes.
    """
    if read_world().size > 1:
        raise ConfigError(f"evaluate runs in one process, this is one of {read_world().size}; start it by itself")
    quiet_libraries()
    started = time.perf_counter()
    directory = recipe.run.path / MODEL
    if not directory.is_dir():
        raise ConfigError(f"{directory}: no such directory; a run exports its model when its last step is done")
    store = open_or_prepare(recipe, recipe.data.train, console=console)
    example_ids = np.flatnonzero(held_out_of(recipe, store))
    if recipe.data.held_out:
        store = open_or_prepare(recipe, recipe.data.held_out, console=console)
        example_ids = np.arange(len(store))
    if not len(example_ids):
        raise ConfigError("nothing is held out: set data.held_out or data.held_out_share")
    engine = _load(recipe, directory)
    cost = CostModel.from_config(engine.model.causal_lm.config.to_dict()) or CostModel()
    pack_tokens = max(recipe.pack_tokens, store.max_length) if recipe.batch.packing else None
    example_mean, token_mean = (
        HeldOutSet(store, example_ids, loss, pack_tokens, cost, world_size=1).loss_of(engine)
        for loss in ("example_mean", "token_mean")
    )
    evaluation = Evaluation(
        model=str(directory),
        examples=len(example_ids),
        response_tokens=int(np.asarray(store.num_responses)[example_ids].sum()),
        example_mean=example_mean,
        token_mean=token_mean,
        perplexity=math.exp(token_mean) if token_mean < 700 else math.inf,
        dtype=str(engine.model.head.weight.dtype).removeprefix("torch."),
        seconds=round(time.perf_counter() - started, 2),
    )
    replace_durably(recipe.run.path / EVALUATION, json.dumps(asdict(evaluation), indent=2) + "\n")
    return evaluation


def _load(recipe: Recipe, directory: Path) -> OneProcess:
    one_pass = {"checkpointing": "none", "compile": "off"}
    section = recipe.model.model_copy(update={"path": str(directory), "revision": None, **one_pass})
    device = choose_device(World())
    dtype = compute_dtype(section.dtype, device)
    config = read_config(section)
    backend = choose_backend(
        section.attention, device=device, dtype=dtype, dropout=max(dropout_rates(config).values(), default=0.0)
    )
    model = load_model(section, backend=backend, dtype=dtype, device=device, num_tokens=0, added_token_ids=())
    return OneProcess(model, device, World())
