"""`sft-dist evaluate`: a finished model on the held-out sets, its losses, answers and scores, on one rank or many."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from sft_dist.answering import answer_all
from sft_dist.config import ModelSection, Recipe
from sft_dist.data.batch import MicroBatch
from sft_dist.data.chat import ChatTokenizer
from sft_dist.data.held_out import HeldOut, open_held_out
from sft_dist.data.prepare import open_or_prepare
from sft_dist.data.questions import Questions, read_questions
from sft_dist.data.schedule import CostModel
from sft_dist.data.tokenizer_files import fetch_model
from sft_dist.durable import replace_durably
from sft_dist.engine.collectives import choose_device, gather_texts, join_process_group, on_main, require_agreement
from sft_dist.errors import ConfigError
from sft_dist.evaluate import HeldOutSet
from sft_dist.evaluation.answers import (
    ANSWERS,
    AnswerLog,
    Scored,
    fingerprint_answers,
    require_scorable,
    score_answers,
    write_scored,
)
from sft_dist.evaluation.record import Evaluation, Losses, SetResult
from sft_dist.evaluation.task_scores import task_scores, worst_answers
from sft_dist.generate import Answerer, Sampling, hash_model
from sft_dist.model.answering import as_answering
from sft_dist.model.attention import choose_backend
from sft_dist.model.load import PackedModel, compute_dtype, dropout_rates, load_model, num_positions, read_config
from sft_dist.quiet import quiet_libraries
from sft_dist.run_files import EVALUATION, MODEL
from sft_dist.world import World, read_world

LINE_EVERY_S = 15.0
WAIT_S = 6 * 3600.0
"""Ranks meet when all have answered; when one dies, the launcher ends the others."""
AFTER, BEFORE = "model", "base"
"""What the files of answers are called: of the exported model, and of the one that the training began with."""


@dataclass(frozen=True)
class OneRank:
    """A model that is only measured, whole on every rank."""

    model: PackedModel
    device: torch.device
    world: World

    def __call__(self, micro: MicroBatch) -> Tensor:
        return self.model(micro)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Task:
    """What every model is measured on."""

    recipe: Recipe
    world: World
    device: torch.device
    sets: tuple[HeldOut, ...]
    questions: Questions
    tokenizer: ChatTokenizer
    console: Console


@dataclass(frozen=True)
class Measured:
    """What came of a model: losses by set, and scored answers to all questions."""

    losses: Mapping[str, Losses]
    answers: Sequence[Scored]
    dtype: str


def evaluate_run(recipe: Recipe, *, console: Console, before: bool = False) -> Evaluation:
    """Measure <run>/model on the recipe's held-out sets and write <run>/evaluation.json. Every rank returns the same.

    before: measure model.path as well, and compare. What was answered by an evaluation that was killed is not answered
    again. Raises ConfigError without an exported model and without held-out data.
    """
    quiet_libraries()
    started = time.perf_counter()
    directory = recipe.run.path / MODEL
    if not directory.is_dir():
        raise ConfigError(f"{directory}: no such directory; a run exports its model when its last step is done")
    task = _plan(recipe, console)
    exported = recipe.model.model_copy(update={"path": str(directory), "revision": None})
    base = _measure(task, recipe.model, BEFORE) if before else None
    found = _measure(task, exported, AFTER)
    evaluation = Evaluation(
        model=str(directory),
        base=recipe.model.path if base else None,
        dtype=found.dtype,
        processes=task.world.size,
        seconds=round(time.perf_counter() - started, 2),
        sets=_results(task, found, base),
    )
    file = recipe.run.path / EVALUATION
    on_main(lambda: replace_durably(file, evaluation.to_json()), world=task.world, device=task.device)
    return evaluation


def _plan(recipe: Recipe, console: Console) -> Task:
    """Open data and questions and join the other ranks. What can be refused is refused here."""
    world = read_world()
    device = choose_device(world)
    train = open_or_prepare(recipe, recipe.data.train, console=console, is_preparer=world.is_local_main)
    sets = open_held_out(recipe, train, console=console, is_preparer=world.is_local_main)
    if not sets:
        raise ConfigError("nothing is held out: set data.held_out or data.held_out_share")
    section = recipe.model
    tokenizer = ChatTokenizer.load(section.path, revision=section.revision, chat_template=recipe.data.chat_template)
    questions = Questions((), {})
    if recipe.evaluate is not None:
        questions = read_questions(
            recipe,
            sets,
            tokenizer,
            limit=recipe.evaluate.max_examples,
            max_positions=num_positions(read_config(recipe.model)),
        )
        require_scorable(questions.asked, recipe.evaluate)
    join_process_group(world, device, timeout_s=WAIT_S, needed=False)
    found = [found.store.fingerprint for found in sets]
    require_agreement(f"{found} {fingerprint_answers(questions.asked)}", world=world, device=device)
    return Task(recipe, world, device, sets, questions, tokenizer, console)


def _measure(task: Task, section: ModelSection, kind: str) -> Measured:
    engine = _load(task, section)
    cost = CostModel.from_config(engine.model.causal_lm.config.to_dict()) or CostModel()
    losses = {held_out.name: _losses(task.recipe, held_out, engine, cost) for held_out in task.sets}
    dtype = str(engine.model.head.weight.dtype).removeprefix("torch.")
    scored = _answer(task, section, kind, engine, dtype) if task.questions.asked else []
    return Measured(losses, scored, dtype)


def _load(task: Task, section: ModelSection) -> OneRank:
    section = section.model_copy(update={"checkpointing": "none", "compile": "off"})
    dtype = compute_dtype(section.dtype, task.device)
    backend = choose_backend(
        section.attention,
        device=task.device,
        dtype=dtype,
        dropout=max(dropout_rates(read_config(section)).values(), default=0.0),
    )
    model = load_model(
        section,
        backend=backend,
        dtype=dtype,
        device=task.device,
        num_tokens=task.tokenizer.num_tokens,
        added_token_ids=() if section.path != task.recipe.model.path else task.tokenizer.added_token_ids,
    )
    return OneRank(model, task.device, task.world)


def _losses(recipe: Recipe, held_out: HeldOut, engine: OneRank, cost: CostModel) -> Losses:
    pack_tokens = max(recipe.pack_tokens, held_out.store.max_length) if recipe.batch.packing else None
    example_mean, token_mean = (
        HeldOutSet(held_out.store, held_out.ids, loss, pack_tokens, cost, engine.world.size).loss_of(engine)
        for loss in ("example_mean", "token_mean")
    )
    num_responses = int(np.asarray(held_out.store.num_responses)[held_out.ids].sum())
    return Losses(len(held_out.ids), num_responses, example_mean, token_mean)


def _answer(task: Task, section: ModelSection, kind: str, engine: OneRank, dtype: str) -> list[Scored]:
    """Answer what no earlier evaluation of this model has, and score all."""
    evaluate, world, asked = task.recipe.evaluate, task.world, task.questions.asked
    assert evaluate is not None
    settings = {
        "max_new_tokens": evaluate.max_new_tokens,
        "batch_size": evaluate.batch_size,
        "dtype": dtype,
        "device": task.device.type,
        "torch": torch.__version__,
    }
    directory = task.recipe.run.path / ANSWERS

    def fingerprint() -> str:
        model = fetch_model(section.path, section.revision, with_code=section.trust_remote_code)
        return fingerprint_answers(asked, model=hash_model(model), **settings)

    found = gather_texts(on_main(fingerprint, world=world, device=task.device) or "", world=world)[0]
    log = AnswerLog(directory / f"{kind}-{found}", rank=world.rank)
    # Rank 0 reads for all: others may still see the directory as it was.
    known = gather_texts(json.dumps(list(log.read().items())) if world.is_main else "", world=world)[0]
    progress = _Progress(task.console if world.is_main else None, kind, num_asked=len(asked), num_ranks=world.size)

    def on_batch(answers: dict[int, str]) -> None:
        log.append(answers)
        progress.add(len(answers))

    model = as_answering(engine.model, device=task.device)
    answers = answer_all(
        Answerer(model, task.tokenizer, device=task.device),
        asked,
        world=world,
        sampling=Sampling(evaluate.max_new_tokens),
        batch_size=evaluate.batch_size,
        known=dict(json.loads(known)),
        on_batch=on_batch,
    )
    scored = score_answers(asked, answers, evaluate)

    def write() -> None:
        write_scored(directory / f"{kind}.jsonl", scored)
        log.remove_older()

    on_main(write, world=world, device=task.device)
    return scored


def _results(task: Task, found: Measured, base: Measured | None) -> dict[str, SetResult]:
    section = task.recipe.evaluate
    tasks = task_scores(
        found.answers,
        seed=section.seed if section else 0,
        before=base.answers if base else None,
        section=section,
    )
    return {
        name: SetResult(
            losses=losses,
            before=base.losses[name] if base else None,
            left_out=task.questions.left_out.get(name, {}),
            tasks=tasks.get(name, {}),
            worst=worst_answers(
                [answer for answer in found.answers if answer.set == name], count=section.worst if section else 0
            ),
        )
        for name, losses in found.losses.items()
    }


class _Progress:
    """A line now and then while prompts are answered; nothing for what takes seconds."""

    def __init__(self, console: Console | None, kind: str, *, num_asked: int, num_ranks: int) -> None:
        self._console, self._kind, self._num_asked, self._num_ranks = console, kind, num_asked, num_ranks
        self._done, self._started = 0, time.monotonic()
        self._last = self._started

    def add(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if self._console is not None and now - self._last >= LINE_EVERY_S:
            self._last = now
            rate = self._done * self._num_ranks / (now - self._started)
            self._console.print(
                f"{self._kind}: about {self._done * self._num_ranks:,} of {self._num_asked:,} prompts answered, "
                f"{rate:,.1f} a second",
                highlight=False,
            )
