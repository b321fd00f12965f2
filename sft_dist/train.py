"""The one place where all parts meet: `run` builds them, `train_loop` is the training."""

import contextlib
import functools
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from sft_dist import checkpoint
from sft_dist.checkpoint import RunState
from sft_dist.config import Recipe
from sft_dist.data.batch import MicroBatch, StepBatch, build_micro_batch, load_steps, token_weights
from sft_dist.data.chat import ChatTokenizer
from sft_dist.data.prepare import open_or_prepare
from sft_dist.data.schedule import CostModel, Schedule, global_batches
from sft_dist.data.store import TokenStore
from sft_dist.engine.collectives import any_rank, choose_device, sum_over_ranks
from sft_dist.engine.interface import Engine
from sft_dist.engine.start import resolve_engine, start_engine
from sft_dist.errors import CheckpointError, ConfigError
from sft_dist.evaluate import HeldOutSet, evaluating
from sft_dist.metrics import HeldOutMetrics, StepMetrics, peak_memory_bytes
from sft_dist.model.attention import choose_backend
from sft_dist.model.load import PackedModel, align_generation, compute_dtype, export_model, load_model
from sft_dist.model.verify import require_agreement
from sft_dist.oom import explained_out_of_memory
from sft_dist.optim import build_adamw, lr_at
from sft_dist.quiet import quiet_libraries
from sft_dist.trackers import Trackers, start_trackers
from sft_dist.world import StopRequest, World, check_launcher_agrees, read_world

logger = logging.getLogger(__name__)

STOP_FILE = "STOP"


@dataclass(frozen=True)
class RunResult:
    """How a run ended. finished: all steps done; otherwise it stopped on request and can be resumed."""

    step: int
    finished: bool
    model_dir: Path | None


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
    for batch in steps:
        started = time.perf_counter()
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
        seconds = time.perf_counter() - started
        trackers.log(
            StepMetrics(
                step=batch.step,
                epoch=batch.epoch,
                loss=float(sum_over_ranks(loss)),
                lr=lr,
                grad_norm=result.grad_norm,
                applied=result.applied,
                examples=batch.num_examples,
                tokens=batch.num_tokens,
                response_tokens=batch.num_responses,
                tokens_per_s=batch.num_tokens / seconds,
                seconds=seconds,
                pack_fill=batch.pack_fill,
                imbalance=batch.imbalance,
                peak_memory_bytes=peak_memory_bytes(engine.device),
                attempt=attempt,
            )
        )
        if profiler is not None:
            profiler.step()
        is_end = batch.step == num_steps
        if held_out is not None and recipe.train.eval_every and (is_end or batch.step % recipe.train.eval_every == 0):
            measure_held_out(engine, held_out, step=batch.step, trackers=trackers, attempt=attempt)
        asked = stop.received is not None or (recipe.run.path / STOP_FILE).exists()
        stopping = any_rank(asked, engine.device)
        if is_end or stopping or (recipe.train.save_every and batch.step % recipe.train.save_every == 0):
            checkpoint.commit(engine, state, recipe.run.path / "checkpoints", keep=recipe.train.keep_checkpoints)
        if stopping:
            break
    return state


def run(recipe: Recipe, *, console: Console, resume: bool = True, profile: bool = False) -> RunResult:
    """Prepare, train, export. Everything that can be refused is refused before the process group forms."""
    quiet_libraries()
    world = read_world()
    engine_name = resolve_engine(recipe.train.engine, world=world)
    check_launcher_agrees(engine_name)
    if recipe.batch.examples is not None and recipe.batch.examples < world.size:
        raise ConfigError(
            f"batch.examples={recipe.batch.examples} is fewer examples a step than the {world.size} ranks; "
            "raise it or start fewer processes"
        )
    device = choose_device(world)
    dtype = compute_dtype(recipe.model.dtype, device)
    backend = choose_backend(recipe.model.attention, device=device, dtype=dtype)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    store, held_out_store = _open_stores(recipe, world=world, console=console)
    tokenizer = ChatTokenizer.load(
        recipe.model.path, revision=recipe.model.revision, chat_template=recipe.data.chat_template
    )
    pack_tokens = _checked_pack_tokens(recipe, [store, held_out_store])
    schedule = _build_schedule(recipe, store)
    state = RunState(
        step=0,
        data_fingerprint=store.fingerprint,
        curve=checkpoint.curve_of(recipe, num_steps=schedule.num_steps),
        engine=engine_name,
        world_size=world.size,
    )
    start_from = _find_checkpoint(recipe, resume=resume)
    torch.manual_seed(recipe.run.seed)

    def load() -> PackedModel:
        return load_model(
            recipe.model,
            backend=backend,
            dtype=dtype,
            device=device,
            num_tokens=tokenizer.num_tokens,
            added_token_ids=tokenizer.added_token_ids,
        )

    longest = int(store.lengths.max())
    with (
        explained_out_of_memory(
            pack_tokens=recipe.pack_tokens, longest_example=longest, checkpointing=recipe.model.checkpointing
        ),
        StopRequest() as stop,
    ):
        engine = start_engine(
            recipe,
            name=engine_name,
            world=world,
            dtype=dtype,
            device=device,
            load_model=load,
            make_optimizer=functools.partial(build_adamw, optim=recipe.optim),
        )
        cost = _cost_model(engine.model)
        with evaluating(engine.model):
            require_agreement(engine.model, _probe_batch(store, schedule, world).to(device))
        attempt = _record_attempt(recipe, world)
        if start_from is not None:
            state = _resume(engine, start_from, state)
        held_out = HeldOutSet(held_out_store, recipe.loss, pack_tokens, cost) if held_out_store is not None else None
        quiet = not world.is_main
        trackers = (
            Trackers([])
            if quiet
            else start_trackers(recipe, console=console, num_steps=schedule.num_steps, done=state.step)
        )
        with trackers, _profiler(recipe, enabled=profile, world=world) as profiler:
            if held_out is not None and state.step == 0:
                measure_held_out(engine, held_out, step=0, trackers=trackers, attempt=attempt)
            batches = global_batches(
                schedule, first_step=state.step + 1, world_size=world.size, pack_tokens=pack_tokens, cost=cost
            )
            state = train_loop(
                engine,
                load_steps(store, batches, rank=world.rank, loss=recipe.loss, pack_tokens=pack_tokens, device=device),
                state,
                recipe=recipe,
                num_steps=schedule.num_steps,
                held_out=held_out,
                trackers=trackers,
                stop=stop,
                attempt=attempt,
                profiler=profiler,
            )
        finished = state.step == schedule.num_steps
        model_dir = _export(engine, recipe, store, tokenizer) if finished else None
        engine.close()
    return RunResult(state.step, finished, model_dir)


def seed_forward(seed: int, step: int, rank: int, micro_index: int) -> None:
    """Make randomness a function of (seed, step, rank, micro-batch), so that a resume needs no RNG state."""
    mixed = seed
    for part in (step, rank, micro_index):
        mixed = (mixed * 0x9E3779B97F4A7C15 + part + 1) % 2**63
    torch.manual_seed(mixed)


def measure_held_out(engine: Engine, held_out: HeldOutSet, *, step: int, trackers: Trackers, attempt: int) -> float:
    """Log and return the held-out loss after `step` updates."""
    started = time.perf_counter()
    loss = held_out.loss_of(engine)
    store = held_out.store
    metrics = HeldOutMetrics(
        step=step,
        held_out_loss=loss,
        examples=len(store),
        response_tokens=int(store.num_responses.sum()),
        seconds=time.perf_counter() - started,
        attempt=attempt,
    )
    trackers.log(metrics)
    return loss


def _open_stores(recipe: Recipe, *, world: World, console: Console) -> tuple[TokenStore, TokenStore | None]:
    """The training and the held-out store; local rank 0 prepares what is missing, the others wait for its commit."""
    train = open_or_prepare(recipe, recipe.data.train, is_preparer=world.is_local_main, console=console)
    if not recipe.data.held_out:
        return train, None
    return train, open_or_prepare(recipe, recipe.data.held_out, is_preparer=world.is_local_main, console=console)


def _checked_pack_tokens(recipe: Recipe, stores: list[TokenStore | None]) -> int | None:
    """Most tokens in a pack; None for one example a pack. Raises ConfigError below the longest kept example."""
    if not recipe.batch.packing:
        return None
    for store in stores:
        if store is not None and int(store.lengths.max()) > recipe.pack_tokens:
            longest = int(store.lengths.argmax())
            raise ConfigError(
                f"batch.pack_tokens={recipe.pack_tokens} is shorter than an example of "
                f"{int(store.lengths[longest])} tokens ({store.origin(longest)}); "
                "raise it to at least that, or lower data.max_tokens to drop such examples"
            )
    return recipe.pack_tokens


def _build_schedule(recipe: Recipe, store: TokenStore) -> Schedule:
    train = recipe.train
    return Schedule(
        store.lengths,
        store.num_responses,
        seed=recipe.run.seed,
        sources=store.source_ranges,
        weights=[source.weight for source in recipe.data.train],
        examples=recipe.batch.examples,
        tokens=recipe.batch.tokens,
        epochs=train.epochs if train.steps is None and train.epochs else None if train.steps else 1,
        steps=train.steps,
    )


def _cost_model(model: PackedModel) -> CostModel:
    config = model.causal_lm.config
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    head = config.vocab_size * config.hidden_size
    # Under ZeRO-3 a parameter keeps its real size in ds_numel; the embedding lookup costs nothing.
    total = sum(getattr(p, "ds_numel", p.numel()) for p in model.causal_lm.parameters())
    embeddings = head if config.tie_word_embeddings else 2 * head
    return CostModel.from_shape(
        body_params=max(1, total - embeddings),
        head_params=head,
        num_layers=config.num_hidden_layers,
        attention_width=width,
    )


def _probe_batch(store: TokenStore, schedule: Schedule, world: World) -> MicroBatch:
    """A pack of the three shortest examples of step 1 (of the store, if the step has fewer); equal on all ranks."""
    _, ids = schedule.example_ids(1)
    pool = ids if len(ids) >= 3 else range(len(store))
    chosen = sorted(dict.fromkeys(int(i) for i in pool), key=lambda i: int(store.lengths[i]))[:3]
    weights = token_weights(store.num_responses[chosen], loss="example_mean")
    return build_micro_batch(store, tuple(chosen), dict(zip(chosen, weights.tolist(), strict=True)), is_last=False)


def _find_checkpoint(recipe: Recipe, *, resume: bool) -> Path | None:
    found = checkpoint.committed(recipe.run.path / "checkpoints")
    if found and not resume:
        raise CheckpointError(
            f"{recipe.run.path} already holds checkpoints up to {found[-1].name}; resume it, or choose another run.name"
        )
    return found[-1] if found else None


def _resume(engine: Engine, path: Path, expected: RunState) -> RunState:
    """Restore weights and optimizer, bit for bit, and return the state to go on from."""
    failure: CheckpointError | None = None
    found = expected
    if engine.world.is_main:
        try:
            found = checkpoint.read_state(path)
            checkpoint.require_same_run(found, expected, path)
        except CheckpointError as error:
            failure = error
    if any_rank(failure is not None, engine.device):
        raise failure or CheckpointError(f"{path}: refused by rank 0")
    step = int(
        sum_over_ranks(
            torch.tensor(float(found.step) if engine.world.is_main else 0.0, dtype=torch.float64, device=engine.device)
        )
    )
    engine.load(path)
    logger.info("resumed from %s", path)
    return RunState(**(vars(expected) | {"step": step}))


def _record_attempt(recipe: Recipe, world: World) -> int:
    """Count this start in run.json, beside the resolved recipe. Attempts count from 1; rank 0 keeps the count."""
    if not world.is_main:
        return 0
    path = recipe.run.path / "run.json"
    recipe.run.path.mkdir(parents=True, exist_ok=True)
    (recipe.run.path / STOP_FILE).unlink(missing_ok=True)
    attempt = 1 + (json.loads(path.read_text(encoding="utf-8"))["attempts"] if path.exists() else 0)
    writing = path.with_suffix(".tmp")
    writing.write_text(json.dumps({"attempts": attempt, "world_size": world.size}), encoding="utf-8")
    writing.replace(path)
    (recipe.run.path / "config.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    return attempt


def _export(engine: Engine, recipe: Recipe, store: TokenStore, tokenizer: ChatTokenizer) -> Path:
    """Write runs/<name>/model; a crash in the middle leaves no half model under that name."""
    final = recipe.run.path / "model"
    state_dict = engine.state_dict()
    if engine.world.is_main:
        causal_lm = engine.model.causal_lm
        align_generation(causal_lm, stop_ids=tokenizer.stop_ids, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
        writing = final.with_name(f".model-{os.getpid()}")
        export_model(causal_lm, state_dict, writing, tokenizer_dir=store.tokenizer_dir)
        if final.exists():
            final.rename(final.with_name(f".model-old-{os.getpid()}"))
        writing.rename(final)
    any_rank(False, engine.device)
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
