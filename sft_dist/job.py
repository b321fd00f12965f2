"""All that a run needs to know before any process group forms, and every refusal that is possible by then."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PretrainedConfig

from sft_dist import checkpoint, commits, package_files
from sft_dist.commits import RunState, Segment
from sft_dist.config import Recipe
from sft_dist.data.batch import MicroBatch, build_micro_batch, token_weights
from sft_dist.data.chat import ChatTokenizer
from sft_dist.data.held_out import HeldOut, open_held_out
from sft_dist.data.prepare import open_or_prepare
from sft_dist.data.questions import Question, read_questions, require_best_task
from sft_dist.data.schedule import Schedule
from sft_dist.data.steps import fingerprint_of, schedule_of
from sft_dist.data.store import TokenStore
from sft_dist.engine.collectives import choose_device
from sft_dist.engine.start import resolve_engine, zero_knobs
from sft_dist.errors import CheckpointError, ConfigError
from sft_dist.evaluation.answers import require_scorable
from sft_dist.metrics import last_commit
from sft_dist.model.attention import Backend, choose_backend
from sft_dist.model.load import (
    PackedModel,
    check_context,
    compute_dtype,
    config_digest,
    dropout_rates,
    load_model,
    num_positions,
    read_config,
)
from sft_dist.plan.planner import planned_memory
from sft_dist.run_files import CHECKPOINTS, METRICS, MODEL, RUN_JSON
from sft_dist.run_record import read_starts
from sft_dist.world import World, check_launcher_agrees, read_world

# The check before step 1 runs eager attention, whose memory grows with the square of a document.
PROBE_TOKENS = 2048


@dataclass(frozen=True)
class ResumeOptions:
    """How a run deals with checkpoints that are there.

    forbid: refuse to go on. start: go on from this one, a step, a path or "latest", or refuse; None: from the newest
    good one, if there is any. allow_change: go on where the curve will be another. trust: whoever made it.
    """

    forbid: bool = False
    start: str | None = None
    allow_change: bool = False
    trust: bool = False


@dataclass(frozen=True)
class Job:
    """A recipe in this world, checked.

    held_out: the sets that are only measured. questions: prompts of them that are answered during the run. draws:
    fingerprint of what is drawn and how it is cut into steps. pack_tokens: None for one example a pack.
    candidates: checkpoints to go on from, newest first; none for a fresh run.
    """

    recipe: Recipe
    world: World
    engine_name: str
    device: torch.device
    dtype: torch.dtype
    backend: Backend
    store: TokenStore
    held_out: tuple[HeldOut, ...]
    questions: tuple[Question, ...]
    model_config: PretrainedConfig
    tokenizer: ChatTokenizer
    pack_tokens: int | None
    schedule: Schedule
    draws: str
    candidates: tuple[Path, ...]
    resume: ResumeOptions

    @property
    def longest_example(self) -> int:
        return max(store.max_length for store in (self.store, *(held_out.store for held_out in self.held_out)))

    @property
    def identity(self) -> str:
        """What every rank must have found alike: data, length of the run, and where it goes on from."""
        start = [path.name for path in self.candidates]
        held_out = [(found.name, found.store.fingerprint) for found in self.held_out]
        asked = [(question.set_name, question.id) for question in self.questions]
        return f"{held_out} {asked} {self.schedule.num_steps} {start} {self.first_state}"

    @property
    def first_state(self) -> RunState:
        """The state before step 1."""
        found = {
            "processes": self.world.size,
            "train.engine": self.engine_name,
            "batch.pack_tokens": self.pack_tokens,
            "model.attention": self.backend.name,
            "device": self.device.type,
        }
        curve = checkpoint.curve_of(
            self.recipe, dtype=str(self.dtype).removeprefix("torch."), model=config_digest(self.model_config)
        )
        if dropout_rates(self.model_config):  # its random numbers depend on the layout
            curve |= {key: found.pop(key) for key in ("processes", "train.engine", "batch.pack_tokens")}
        return checkpoint.first_state(
            curve=curve,
            segment=Segment(0, self.store.fingerprint, self.draws),
            layout=checkpoint.layout_of(self.recipe, **found),
            code=package_files.code_identity(),
            best_by=self.recipe.evaluate.best_by if self.recipe.evaluate else None,
        )

    @cached_property
    def planned_memory(self) -> dict[str, int]:
        """Bytes by part that a process will hold on its device, counted; empty for a model whose shape is not known."""
        return planned_memory(
            self.recipe,
            self.model_config.to_dict(),
            engine=self.engine_name,
            num_processes=self.world.size,
            dtype="fp32" if self.dtype == torch.float32 else "bf16",
            device=self.device.type,
            longest_example=self.store.max_length,
            response_share=int(self.store.num_responses.sum()) / int(self.store.lengths.sum()),
        )

    def continuing(self, state: RunState) -> "Job":
        """This job with the steps of the segment that `state` draws from. Raises CheckpointError behind the last."""
        after_step = state.segment.after_step
        job = self
        if after_step:
            job = replace(self, schedule=schedule_of(self.recipe, self.store, after_step=after_step))
        if state.step > job.schedule.num_steps:
            raise CheckpointError(
                f"{self.recipe.run.path} stands after step {state.step}, and the recipe ends at step "
                f"{job.schedule.num_steps}; raise train.steps or train.epochs, or choose another run.name"
            )
        return job

    def require_same_checkpoints(self) -> None:
        """Raise CheckpointError when another job has saved or deleted some since they were looked for.

        Call when the run's directory is locked: ranks of a run that was just stopped may have been saving.
        """
        if _find_checkpoints(self.recipe, self.resume) != self.candidates:
            raise CheckpointError(
                f"{self.recipe.run.path}: another job saved here while this one was starting; start it again"
            )

    def load_model(self) -> PackedModel:
        """Read the weights; under ZeRO-3 each rank keeps its part."""
        return load_model(
            self.recipe.model,
            backend=self.backend,
            dtype=self.dtype,
            device=self.device,
            num_tokens=self.tokenizer.num_tokens,
            added_token_ids=self.tokenizer.added_token_ids,
        )

    def probe_batch(self) -> MicroBatch:
        """A pack of three examples of the first step, the shortest, a middling and the longest; equal on all ranks.

        From the whole store when the step has fewer; not above PROBE_TOKENS each where there are such.
        """
        _, ids = self.schedule.example_ids(self.schedule.first_step)
        pool = dict.fromkeys(ids.tolist() if len(set(ids.tolist())) >= 3 else range(len(self.store)))
        by_length = sorted(pool, key=lambda i: int(self.store.lengths[i]))
        fitting = [i for i in by_length if self.store.lengths[i] <= PROBE_TOKENS]
        by_length = fitting if len(fitting) >= 3 else by_length[:3]
        chosen = list(dict.fromkeys([by_length[0], by_length[len(by_length) // 2], by_length[-1]]))
        weights = token_weights(self.store.num_responses[chosen], loss=self.recipe.loss)
        weight_of = dict(zip(chosen, weights.tolist(), strict=True))
        return build_micro_batch(self.store, tuple(chosen), weight_of, is_last=False).to(self.device)


def plan_job(recipe: Recipe, *, console: Console, resume: ResumeOptions) -> Job:
    """Check the recipe against launcher, machine and data, preparing the data if need be.

    Raises ConfigError, DataError, BackendError or CheckpointError; nothing has been started by then.
    """
    world = read_world()
    engine_name = resolve_engine(recipe.train.engine, world=world)
    check_launcher_agrees(engine_name, dtype=recipe.model.dtype)
    zero_knobs(recipe, engine_name)
    if recipe.batch.examples is not None and recipe.batch.examples < world.size:
        raise ConfigError(
            f"batch.examples={recipe.batch.examples} is fewer examples a step than the {world.size} ranks; "
            "raise it or start fewer processes"
        )
    device = choose_device(world)
    dtype = compute_dtype(recipe.model.dtype, device)
    config = read_config(recipe.model)
    dropout = float(getattr(config, "attention_dropout", 0.0) or 0.0)
    backend = choose_backend(recipe.model.attention, device=device, dtype=dtype, dropout=dropout)
    store = open_or_prepare(recipe, recipe.data.train, console=console, is_preparer=world.is_local_main)
    held_out = open_held_out(recipe, store, console=console, is_preparer=world.is_local_main)
    schedule = schedule_of(recipe, store)
    section = recipe.model
    tokenizer = ChatTokenizer.load(section.path, revision=section.revision, chat_template=recipe.data.chat_template)
    job = Job(
        recipe=recipe,
        world=world,
        engine_name=engine_name,
        device=device,
        dtype=dtype,
        backend=backend,
        store=store,
        held_out=held_out,
        questions=_questions(recipe, held_out, tokenizer, config),
        model_config=config,
        tokenizer=tokenizer,
        pack_tokens=_checked_pack_tokens(recipe, [store, *(found.store for found in held_out)]),
        schedule=schedule,
        draws=fingerprint_of(recipe, store),
        candidates=_find_checkpoints(recipe, resume),
        resume=resume,
    )
    check_context(config, longest_example=job.longest_example)
    _refuse_early(job)
    return job


def _questions(
    recipe: Recipe, held_out: Sequence[HeldOut], tokenizer: ChatTokenizer, config: PretrainedConfig
) -> tuple[Question, ...]:
    """What is answered during the run; nothing unless evaluate.generate_every is set."""
    section = recipe.evaluate
    if section is None or section.generate_every is None:
        return ()
    limit = section.generate_examples or section.max_examples
    found = read_questions(recipe, held_out, tokenizer, limit=limit, max_positions=num_positions(config))
    require_scorable(found.asked, section)
    require_best_task(recipe, found.asked)
    return found.asked


def _checked_pack_tokens(recipe: Recipe, stores: list[TokenStore]) -> int | None:
    """Most tokens in a pack; None for one example a pack. Raises ConfigError below the longest kept example."""
    if not recipe.batch.packing:
        return None
    for store in stores:
        if store.max_length > recipe.pack_tokens:
            longest = int(store.lengths.argmax())
            raise ConfigError(
                f"batch.pack_tokens={recipe.pack_tokens} is shorter than an example of "
                f"{int(store.lengths[longest])} tokens ({store.origin(longest)}); "
                "raise it to at least that, or lower data.max_tokens to drop such examples"
            )
    return recipe.pack_tokens


def _find_checkpoints(recipe: Recipe, resume: ResumeOptions) -> tuple[Path, ...]:
    """What a run may go on from, newest first. Raises CheckpointError where something must be there and is not."""
    directory = recipe.run.path / CHECKPOINTS
    found = tuple(reversed(commits.steps(directory)))
    if found and resume.forbid:
        raise CheckpointError(
            f"{recipe.run.path} already holds checkpoints up to {found[0].name}; resume it, or choose another run.name"
        )
    starts = read_starts(recipe.run.path)
    last_start = starts[-1] if starts else {}
    newest = max((commits.step_of(path) for path in commits.committed(directory)), default=0)
    has_gone_on = newest > last_start.get("after_step", 0)
    came_from = last_start.get("from")
    if resume.start is None and came_from and not has_gone_on and not _is_in(Path(came_from), directory):
        raise CheckpointError(
            f"{recipe.run.path} went on from {came_from} and has saved nothing since; "
            f"give --resume-from {came_from} again"
        )
    if resume.start not in (None, "latest"):
        # A job that is started again with the same words goes on from what it has saved since.
        if not (has_gone_on and last_start.get("asked") == resume.start):
            found = (_named(resume.start, directory),)
    elif not found:
        if begun := _signs_of_a_begun_run(recipe.run.path, starts):
            raise CheckpointError(
                f"{directory}: no checkpoint is here, but {begun}; put it back, or choose another run.name: "
                "a run that was begun does not start again at step 1 by itself"
            )
        if resume.start == "latest":
            raise CheckpointError(
                f"--resume-from latest: no checkpoint is in {directory}; leave it out to start at step 1"
            )
    if found and not resume.trust:
        commits.require_trusted(found[0])
    return found


def _signs_of_a_begun_run(run_dir: Path, starts: Sequence[Mapping[str, Any]]) -> str:
    """What says that checkpoints were here, in words; empty for a run that has not committed one."""
    if (last := last_commit(run_dir / METRICS)) is not None:
        return f"{METRICS} says that step {last} was committed"
    if after := max((start["after_step"] for start in starts), default=0):
        return f"{RUN_JSON} says that it went on after step {after}"
    if aside := sorted((run_dir / CHECKPOINTS).glob("aside-step-*")):
        return f"{aside[-1].name} was set aside"
    return f"a finished model is in {run_dir / MODEL}" if (run_dir / MODEL).exists() else ""


def _is_in(path: Path, directory: Path) -> bool:
    """True for a checkpoint of the run itself: noted by its name, so that the run may be moved."""
    return len(path.parts) == 1 or path.resolve().parent == directory.resolve()


def _named(start: str, directory: Path) -> Path:
    """The checkpoint that --resume-from names, by step or by path."""
    path = directory / commits.name_of(int(start)) if start.isascii() and start.isdecimal() else Path(start)
    if not start or not path.is_dir():
        names = ", ".join(known.name for known in commits.committed(directory)) or "none"
        raise CheckpointError(f"--resume-from {start}: there is no {path}; there are: {names}")
    return path


def _refuse_early(job: Job) -> None:
    """Refuse to go on under settings that change the curve, as far as can be told before bytes are verified."""
    for path in job.candidates[:1]:
        try:
            state = commits.read_state(path)
        except CheckpointError:
            return  # broken: all ranks together look for a good one
        here = checkpoint.continued(state, job.first_state, allow_change=job.resume.allow_change, path=path)
        job.continuing(here)
