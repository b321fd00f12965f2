"""The one place where all parts meet: `run` builds them, the loop trains, and what came of it is exported."""

import contextlib
import functools
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from rich.console import Console

from sft_dist import checkpoint, commits
from sft_dist.banner import show_banner
from sft_dist.checkpoint import Continuation, Saver
from sft_dist.commits import RunState
from sft_dist.config import Recipe
from sft_dist.data.batch import load_steps
from sft_dist.data.schedule import CostModel, global_batches
from sft_dist.data.store_note import store_note
from sft_dist.engine.collectives import (
    join_process_group,
    on_main,
    require_agreement,
    write_flight_record,
)
from sft_dist.engine.interface import Engine
from sft_dist.engine.start import start_engine
from sft_dist.environment import describe_environment
from sft_dist.errors import CheckpointError, ConfigError, SftDistError
from sft_dist.evaluate import HeldOutSet, evaluating
from sft_dist.freed_pages import keep_freed_pages
from sft_dist.job import Job, ResumeOptions, plan_job
from sft_dist.loop import train_loop
from sft_dist.measuring import Measuring
from sft_dist.metrics import (
    ChangeMetrics,
    Replay,
    last_commit,
    read_counted,
)
from sft_dist.model.export import write_export
from sft_dist.model.verify import require_own_loss
from sft_dist.model_card import Weights, write_card
from sft_dist.oom import explained_out_of_memory
from sft_dist.optim import build_adamw
from sft_dist.profiling import profiled_steps
from sft_dist.quiet import quiet_libraries
from sft_dist.rank_log import flight_recorder_env, per_rank_log
from sft_dist.report.apart import write_report_apart
from sft_dist.run_files import CHECKPOINTS, LOCK, LOGS, METRICS, MODEL
from sft_dist.run_record import amend_start, read_starts, record_end, record_start
from sft_dist.trackers import Trackers, start_trackers
from sft_dist.watchdog import Watchdog
from sft_dist.world import StopRequest, report_at_work

logger = logging.getLogger(__name__)

REPLAY_TOLERANCE = {
    ("cpu", torch.float32): 1e-5,
    ("cpu", torch.bfloat16): 2e-2,
    ("cuda", torch.float32): 2e-2,  # TF32
    ("cuda", torch.bfloat16): 2e-2,
}
"""What a step's loss may differ by, relatively, when it is trained again: on as many processes it is bit for bit the
same on a CPU, on others it is rounded differently."""


@dataclass(frozen=True)
class RunResult:
    """How a run ended. finished: all steps done; otherwise it stopped on request and can be resumed."""

    step: int
    finished: bool
    model_dir: Path | None
    num_withheld: int
    """Steps that updated nothing, over all attempts."""


def run(recipe: Recipe, *, console: Console, resume: ResumeOptions | None = None, profile: bool = False) -> RunResult:
    """Prepare, train, export. Everything that can be refused is refused before the process group forms."""
    quiet_libraries()
    job = plan_job(recipe, console=console, resume=resume or ResumeOptions())
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(recipe.run.seed)
    path, world = recipe.run.path, job.world
    explained = explained_out_of_memory(
        packing=recipe.batch.packing,
        longest_example=job.longest_example,
        checkpointing=recipe.model.checkpointing,
    )
    with StopRequest() as stop:
        flight_recorder_env(path, os.environ)
        # The watchdog, which says where each process is, comes before the group's own time limit.
        timeout_s = recipe.train.timeout_s
        needed = job.engine_name.startswith("zero")
        join_process_group(world, job.device, timeout_s=timeout_s + 30, needed=needed)
        record = functools.partial(write_flight_record, path / LOGS / f"nccl-rank-{world.rank}")
        with (
            # First: from here on all files of ranks in the directory are this run's.
            _only_run_in(path, job),
            per_rank_log(path, world),
            Watchdog(path, world, timeout_s=timeout_s, on_hang=record) as watchdog,
            _errors_explained(watchdog),
            explained,
        ):
            return _run(job, console=console, stop=stop, watchdog=watchdog, profile=profile)


@contextlib.contextmanager
def _errors_explained(watchdog: Watchdog) -> Iterator[None]:
    """Turn what a peer's death does to this rank's collectives into a RankLostError that names the peer."""
    try:
        yield
    except SftDistError:
        raise
    except Exception as error:
        lost = watchdog.explain(error)
        if lost is not None:
            raise lost from None
        logger.info("the run ends", exc_info=True)  # to the rank's log; the interpreter prints it
        raise


def _run(job: Job, *, console: Console, stop: StopRequest, watchdog: Watchdog, profile: bool) -> RunResult:
    recipe, world = job.recipe, job.world
    require_agreement(job.identity, world=world, device=job.device)
    on_main(job.require_same_checkpoints, world=world, device=job.device)
    watchdog.watch_peers()
    with watchdog.unhurried("loading the model"):
        engine = start_engine(
            recipe,
            name=job.engine_name,
            world=world,
            dtype=job.dtype,
            device=job.device,
            load_model=job.load_model,
            make_optimizer=functools.partial(build_adamw, optim=recipe.optim),
        )
    watchdog.progress(step=0, phase="checking the model")
    with evaluating(engine.model):
        agreement = require_own_loss(engine.model, job.probe_batch())
    with watchdog.unhurried("resuming"):
        state, continuation = _resume(engine, job) if job.candidates else (job.first_state, None)
    job = job.continuing(state)
    attempt, is_new_curve = _record_start(job, state, continuation, earlier_reason=watchdog.earlier_reason)
    if world.is_main:
        said = show_banner(
            console, job, model=engine.model, agreement=agreement, continuation=continuation, attempt=attempt
        )
        note_start(job, banner=said)
    # Weights that ZeRO-3 gathers and releases would leave holes in what is kept: its peak would be a fifth higher.
    if job.device.type == "cpu" and not job.engine_name.startswith("zero3"):
        keep_freed_pages()
    state = _train(
        engine,
        state,
        job,
        console=console,
        stop=stop,
        watchdog=watchdog,
        profile=profile,
        attempt=attempt,
        new_curve=(continuation.changes.curve if continuation else ()) if is_new_curve else None,
    )
    finished = state.step >= job.schedule.num_steps
    with watchdog.unhurried("exporting"):
        model_dir = _export(engine, job, state) if finished else None
    engine.close()
    watchdog.finish()
    if world.is_main and recipe.run.report:
        write_report_apart(recipe.run.path, console)
    lines = read_counted(recipe.run.path / METRICS, read_starts(recipe.run.path)) if world.is_main else []
    num_withheld = sum(line["event"] == "step" and not line["applied"] for line in lines)
    return RunResult(state.step, finished, model_dir, num_withheld)


def _record_start(
    job: Job, state: RunState, continuation: Continuation | None, *, earlier_reason: str
) -> tuple[int, bool]:
    """Note in run.json that the run goes on from `state`, on rank 0: which start it is, and if its curve is new."""
    changes = continuation.changes if continuation else None

    def record() -> tuple[int, bool]:
        return record_start(
            job.recipe.run.path,
            state,
            num_steps=job.schedule.num_steps,
            came_from=continuation.path if continuation else None,
            asked=job.resume.start,
            changed=[*changes.curve, *changes.other] if changes else [],
            config=job.recipe.to_yaml(),
            earlier_reason=earlier_reason,
        )

    return on_main(record, world=job.world, device=job.device) or (0, False)


def note_start(job: Job, *, banner: Sequence[tuple[str, str]]) -> None:
    """Note in run.json on what this start computes, its data, and what was said of it: for `sft-dist report`."""
    settings = {"engine": job.engine_name, "dtype": str(job.dtype).removeprefix("torch.")}
    if job.device.type == "cuda":
        settings["cuda"] = str(torch.version.cuda)
    environment = describe_environment(
        device=job.device.type,
        device_name=torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else "",
        world=job.world,
        settings=settings | {"attention": job.backend.name},
    )
    notes = {"environment": environment, "data": store_note(job.store), "banner": banner}
    amend_start(job.recipe.run.path, notes | {"planned_memory": job.planned_memory})


@contextlib.contextmanager
def _only_run_in(directory: Path, job: Job) -> Iterator[None]:
    """Hold the run directory's lock on rank 0. Raises ConfigError on every rank when another job holds it."""
    lock = FileLock(directory / LOCK)

    def acquire() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                f"{directory}: another process is training here; wait for it, or choose another run.name"
            ) from None

    on_main(acquire, world=job.world, device=job.device)
    report_at_work()
    try:
        yield
    finally:
        lock.release()


def _train(
    engine: Engine,
    state: RunState,
    job: Job,
    *,
    console: Console,
    stop: StopRequest,
    watchdog: Watchdog,
    profile: bool,
    attempt: int,
    new_curve: tuple[str, ...] | None,
) -> RunState:
    """Lay the steps out, open the trackers, and run the loop.

    new_curve: what changed since the checkpoint, where the curve is not that of the start before.
    """
    recipe, num_steps, run_dir = job.recipe, job.schedule.num_steps, job.recipe.run.path
    cost = CostModel.from_config(engine.model.causal_lm.config.to_dict()) or CostModel()
    held_out = {
        found.name: HeldOutSet(found.store, found.ids, recipe.loss, job.pack_tokens, cost, job.world.size)
        for found in job.held_out
    }
    batches = global_batches(
        job.schedule, first_step=state.step + 1, world_size=job.world.size, pack_tokens=job.pack_tokens, cost=cost
    )
    steps = load_steps(
        job.store, batches, rank=job.world.rank, loss=recipe.loss, pack_tokens=job.pack_tokens, device=job.device
    )
    saver = Saver(engine, run_dir / CHECKPOINTS, settings=recipe.train, on_progress=watchdog.progress)

    def open_trackers() -> Trackers:
        # What was trained on another curve is no measure.
        first = state.step if new_curve is None else num_steps
        tolerance = REPLAY_TOLERANCE[job.device.type, job.dtype]
        replay = Replay(run_dir / METRICS, after_step=first, tolerance=tolerance)
        return start_trackers(recipe, console=console, num_steps=num_steps, done=state.step, replay=replay)

    trackers = on_main(open_trackers, world=job.world, device=job.device) or Trackers([])
    # Inside of the trackers: closing them may take a while, in which this rank must not seem to be at work.
    with (
        trackers,
        watchdog.leaving_on_error(),
        profiled_steps(run_dir / "profile", enabled=profile and job.world.is_main) as profiler,
    ):
        if new_curve is not None:
            trackers.log(ChangeMetrics(state.step, new_curve, attempt))
        measuring = Measuring(recipe, held_out, job.questions, job.tokenizer, trackers, watchdog, attempt)
        if state.step == 0:
            measuring.after(state, engine, is_end=False)
        state = train_loop(
            engine,
            steps,
            state,
            recipe=recipe,
            num_steps=num_steps,
            store=job.store,
            measuring=measuring,
            saver=saver,
            trackers=trackers,
            stop=stop,
            watchdog=watchdog,
            attempt=attempt,
            profiler=profiler,
        )
    on_main(lambda: end_orderly(run_dir, saver, state, stop, num_steps), world=job.world, device=job.device)
    return state


def end_orderly(run_dir: Path, saver: Saver, state: RunState, stop: StopRequest, num_steps: int) -> None:
    """Note how the steps ended. Raises CheckpointError when they were to stop and the state could not be saved."""
    interrupted = state.step < num_steps
    if interrupted and saver.last_step != state.step:
        raise CheckpointError(
            f"{run_dir}: stopped on request after step {state.step}, but its checkpoint could not be written; "
            "the same command goes on from an older one"
        )
    reason = stop.received or "asked by another rank or by a stop file"
    record_end(run_dir, interrupted_after=state.step if interrupted else None, reason=reason)


def _resume(engine: Engine, job: Job) -> tuple[RunState, Continuation]:
    """Restore weights and optimizer from the newest good checkpoint, or the one that was asked for. Collective.

    Raises CheckpointError when none is good, or when the curve would change and that was not allowed.
    """
    options = job.resume
    path, found, wrong = checkpoint.find_good(
        engine,
        job.candidates,
        may_fall_back=options.start is None or len(job.candidates) > 1,
        trust=options.trust,
    )
    state = checkpoint.continued(found, job.first_state, allow_change=options.allow_change, path=path)
    checkpoint.restore(engine, path, state)
    changes = checkpoint.changes_since(found, job.first_state)

    def set_newer_aside() -> list[str]:
        newer = [p for p in commits.steps(job.recipe.run.path / CHECKPOINTS) if commits.step_of(p) > found.step]
        return [f"set aside: {commits.set_aside(p)}" for p in newer]

    aside = on_main(set_newer_aside, world=engine.world, device=engine.device) or []
    warnings = [f"broken: {text}" for text in wrong] + aside
    if not (job.recipe.run.path / METRICS).exists():
        warnings.append(
            f"{METRICS} is gone, and with it the steps before; what is trained again is compared with nothing"
        )
    last = last_commit(job.recipe.run.path / METRICS)
    if options.start is None and last is not None and last > found.step and not wrong:
        warnings.append(f"step {last} was committed, and is not here any more")
    return state, Continuation(path, found.step, tuple(warnings), changes)


def _export(engine: Engine, job: Job, state: RunState) -> Path:
    """Write runs/<name>/model; a crash in the middle leaves no half model under that name.

    Collective: under ZeRO-3 every rank gives its shards.
    """
    run_dir = job.recipe.run.path
    state_dict = engine.state_dict()

    def write() -> None:
        weights = Weights(steps=(state.step,), dtype=str(job.dtype).removeprefix("torch."))
        card = write_card(run_dir, job.recipe, weights=weights, tokenizer=job.tokenizer)
        causal_lm = engine.model.causal_lm
        write_export(causal_lm, run_dir / MODEL, tokenizer=job.tokenizer, card=card, state_dict=state_dict)

    on_main(write, world=job.world, device=job.device)
    return run_dir / MODEL
