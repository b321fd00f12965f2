"""The one place where all parts meet: `run` builds them, `train_loop` is the training."""

import contextlib
import functools
import json
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from rich.console import Console

from sft_dist import checkpoint
from sft_dist.banner import show_banner
from sft_dist.checkpoint import RunState
from sft_dist.config import Recipe
from sft_dist.data.batch import StepBatch, load_steps
from sft_dist.data.schedule import CostModel, global_batches
from sft_dist.engine.collectives import on_main, require_agreement, sum_over_ranks
from sft_dist.engine.interface import Engine
from sft_dist.engine.start import start_engine
from sft_dist.errors import ConfigError
from sft_dist.evaluate import HeldOutSet, evaluating
from sft_dist.job import Job, plan_job
from sft_dist.metrics import HeldOutMetrics, read_steps, step_metrics
from sft_dist.model.load import align_generation, export_model
from sft_dist.model.verify import require_own_loss
from sft_dist.oom import explained_out_of_memory
from sft_dist.optim import build_adamw, lr_at
from sft_dist.quiet import quiet_libraries
from sft_dist.trackers import Trackers, start_trackers
from sft_dist.world import StopRequest, World

STOP_FILE = "STOP"


@dataclass(frozen=True)
class RunResult:
    """How a run ended. finished: all steps done; otherwise it stopped on request and can be resumed."""

    step: int
    finished: bool
    model_dir: Path | None
    num_withheld: int
    """Steps whose gradient was not finite, over all attempts."""


def train_loop(
    engine: Engine,
    steps: Iterable[StepBatch],
    state: RunState,
    *,
    recipe: Recipe,
    num_steps: int,
    held_out: HeldOutSet | None,
    trackers: Trackers,
    stop: StopRequest,
    attempt: int,
    profiler: "torch.profiler.profile | None" = None,
) -> RunState:
    """Train until the last step or a stop request; the state it returns is committed."""
    started = time.perf_counter()
    for batch in steps:
        loss = torch.zeros((), dtype=torch.float64, device=engine.device)
        for index, micro in enumerate(batch.micros):
            seed_forward(recipe.run.seed, batch.step, engine.world.rank, index)
            with engine.accumulate(is_last=micro.is_last):
                share = engine(micro)  # this rank's share of the global loss: weights are final
                engine.backward(share)
            loss += share.detach()
        lr = lr_at(batch.step, optim=recipe.optim, num_steps=num_steps)
        result = engine.step(lr=lr)
        state = state.next()  # a withheld step advances too
        asked = torch.full_like(loss, stop_requested(stop, recipe, engine.world))
        global_loss, num_asked = sum_over_ranks(torch.stack([loss, asked])).tolist()
        trackers.log(
            step_metrics(
                batch,
                result,
                loss=global_loss,
                lr=lr,
                seconds=time.perf_counter() - started,
                device=engine.device,
                attempt=attempt,
            )
        )
        if profiler is not None:
            profiler.step()
        is_end = batch.step == num_steps
        if held_out is not None and (is_end or is_due(recipe.train.eval_every, batch.step)):
            measure_held_out(engine, held_out, step=batch.step, trackers=trackers, attempt=attempt)
        if is_end or num_asked or is_due(recipe.train.save_every, batch.step):
            checkpoint.commit(engine, state, recipe.run.path / "checkpoints", keep=recipe.train.keep_checkpoints)
        if num_asked:
            if engine.world.is_main:
                (recipe.run.path / STOP_FILE).unlink(missing_ok=True)  # obeyed
            break
        started = time.perf_counter()
    return state


def run(recipe: Recipe, *, console: Console, resume: bool = True, profile: bool = False) -> RunResult:
    """Prepare, train, export. Everything that can be refused is refused before the process group forms."""
    quiet_libraries()
    job = plan_job(recipe, console=console, resume=resume)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(recipe.run.seed)
    with (
        _only_run_in(recipe.run.path, job.world),
        StopRequest() as stop,
        explained_out_of_memory(
            packing=recipe.batch.packing,
            longest_example=job.longest_example,
            checkpointing=recipe.model.checkpointing,
        ),
    ):
        engine = start_engine(
            recipe,
            name=job.engine_name,
            world=job.world,
            dtype=job.dtype,
            device=job.device,
            load_model=job.load_model,
            make_optimizer=functools.partial(build_adamw, optim=recipe.optim),
        )
        require_agreement(job.identity, world=job.world, device=job.device)
        with evaluating(engine.model):
            agreement = require_own_loss(engine.model, job.probe_batch())
        state = _resume(engine, job.start_from, job.first_state) if job.start_from else job.first_state
        if job.world.is_main:
            show_banner(console, job, model=engine.model, agreement=agreement, done=state.step)
        state = _train(engine, state, job, console=console, stop=stop, profile=profile)
        finished = state.step == job.schedule.num_steps
        model_dir = _export(engine, job) if finished else None
        engine.close()
    steps = read_steps(recipe.run.path / "metrics.jsonl") if job.world.is_main else {}
    return RunResult(state.step, finished, model_dir, sum(not step["applied"] for step in steps.values()))


@contextlib.contextmanager
def _only_run_in(directory: Path, world: World) -> Iterator[None]:
    """Hold the run directory's lock on rank 0. Raises ConfigError when another job holds it."""
    if not world.is_main:
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"{directory}: another process is training here; wait for it, or choose another run.name"
        ) from None
    try:
        yield
    finally:
        lock.release()


def seed_forward(seed: int, step: int, rank: int, micro_index: int) -> None:
    """Make randomness a function of (seed, step, rank, micro-batch), so that a resume needs no RNG state."""
    mixed = seed
    for part in (step, rank, micro_index):
        mixed = (mixed * 0x9E3779B97F4A7C15 + part + 1) % 2**63
    torch.manual_seed(mixed)


def is_due(every: int | None, step: int) -> bool:
    """True at every `every`-th step; never for None."""
    return every is not None and step % every == 0


def stop_requested(stop: StopRequest, recipe: Recipe, world: World) -> bool:
    """A signal on this rank, or the stop file seen by rank 0."""
    return stop.received is not None or (world.is_main and (recipe.run.path / STOP_FILE).exists())


def measure_held_out(engine: Engine, held_out: HeldOutSet, *, step: int, trackers: Trackers, attempt: int) -> None:
    """Log the held-out loss after `step` updates."""
    started = time.perf_counter()
    loss = held_out.loss_of(engine)
    metrics = HeldOutMetrics(
        step=step,
        held_out_loss=loss,
        examples=len(held_out.example_ids),
        response_tokens=int(held_out.num_responses.sum()),
        seconds=time.perf_counter() - started,
        attempt=attempt,
    )
    trackers.log(metrics)


def _train(
    engine: Engine, state: RunState, job: Job, *, console: Console, stop: StopRequest, profile: bool
) -> RunState:
    """Lay the steps out, open the trackers, and run the loop."""
    recipe, num_steps = job.recipe, job.schedule.num_steps
    cost = CostModel.from_config(engine.model.causal_lm.config.to_dict()) or CostModel()
    attempt = on_main(functools.partial(_record_attempt, recipe, job.world), world=job.world, device=job.device) or 0
    held_out = None
    if job.held_out_store is not None:
        held_out = HeldOutSet(job.held_out_store, job.held_out_ids, recipe.loss, job.pack_tokens, cost, job.world.size)
    batches = global_batches(
        job.schedule, first_step=state.step + 1, world_size=job.world.size, pack_tokens=job.pack_tokens, cost=cost
    )
    steps = load_steps(
        job.store, batches, rank=job.world.rank, loss=recipe.loss, pack_tokens=job.pack_tokens, device=job.device
    )
    trackers = Trackers([])
    if job.world.is_main:
        trackers = start_trackers(recipe, console=console, num_steps=num_steps, done=state.step)
    with trackers, _profiler(recipe, enabled=profile, world=job.world) as profiler:
        if held_out is not None and state.step == 0:
            measure_held_out(engine, held_out, step=0, trackers=trackers, attempt=attempt)
        return train_loop(
            engine,
            steps,
            state,
            recipe=recipe,
            num_steps=num_steps,
            held_out=held_out,
            trackers=trackers,
            stop=stop,
            attempt=attempt,
            profiler=profiler,
        )


def _resume(engine: Engine, path: Path, expected: RunState) -> RunState:
    """Restore weights and optimizer, bit for bit, and return the state to go on from.

    Raises CheckpointError for a damaged checkpoint or another run's, on every rank.
    """

    def verify() -> None:
        checkpoint.require_same_run(checkpoint.read_state(path), expected, path)

    # One rank reads every byte; the others would read the same ones.
    on_main(verify, world=engine.world, device=engine.device)
    engine.load(path)
    return replace(expected, step=checkpoint.step_of(path))


def _record_attempt(recipe: Recipe, world: World) -> int:
    """Count this start in run.json, beside the resolved recipe. Attempts count from 1; only rank 0 counts."""
    path = recipe.run.path / "run.json"
    attempt = 1 + (json.loads(path.read_text(encoding="utf-8"))["attempts"] if path.exists() else 0)
    writing = path.with_suffix(".tmp")
    writing.write_text(json.dumps({"attempts": attempt, "world_size": world.size}), encoding="utf-8")
    writing.replace(path)
    (recipe.run.path / "config.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    return attempt


def _export(engine: Engine, job: Job) -> Path:
    """Write runs/<name>/model; a crash in the middle leaves no half model under that name.

    Collective: under ZeRO-3 every rank gives its shards.
    """
    final = job.recipe.run.path / "model"
    state_dict = engine.state_dict()

    def write() -> None:
        causal_lm, tokenizer = engine.model.causal_lm, job.tokenizer
        align_generation(causal_lm, stop_ids=tokenizer.stop_ids, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
        for leftover in final.parent.glob(".model-*"):
            shutil.rmtree(leftover)
        writing, old = final.with_name(".model-new"), final.with_name(".model-old")
        export_model(causal_lm, state_dict, writing, tokenizer_dir=job.store.tokenizer_dir)
        if final.exists():
            final.rename(old)
        writing.rename(final)
        shutil.rmtree(old, ignore_errors=True)

    on_main(write, world=job.world, device=job.device)
    return final


@contextlib.contextmanager
def _profiler(recipe: Recipe, *, enabled: bool, world: World) -> Iterator["torch.profiler.profile | None"]:
    """Profile steps 3 to 5 of rank 0 into <run>/profile: a Chrome trace and a table by kernel."""
    if not enabled or not world.is_main:
        yield None
        return
    directory = recipe.run.path / "profile"
    directory.mkdir(parents=True, exist_ok=True)

    def write(profiler: torch.profiler.profile) -> None:
        profiler.export_chrome_trace(str(directory / "trace.json"))
        key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        (directory / "table.txt").write_text(profiler.key_averages().table(sort_by=key, row_limit=40), encoding="utf-8")

    window = torch.profiler.schedule(wait=1, warmup=1, active=3, repeat=1)
    with torch.profiler.profile(schedule=window, on_trace_ready=write, profile_memory=True) as profiler:
        yield profiler
