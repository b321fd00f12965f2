"""The training itself: micro-batches, one reduction, one update, and what is due after a step."""

import json
import time
from collections.abc import Iterable, Sequence

import torch

from sft_dist.checkpoint import Commit, Saver
from sft_dist.commits import RunState
from sft_dist.config import Recipe
from sft_dist.data.batch import StepBatch
from sft_dist.data.store import TokenStore
from sft_dist.engine.collectives import gather_texts, on_device, sum_over_ranks
from sft_dist.engine.interface import Engine
from sft_dist.errors import NotFiniteError
from sft_dist.forward_time import ForwardTime
from sft_dist.guard import reason_to_withhold
from sft_dist.measuring import Measuring, is_due
from sft_dist.metrics import CommitMetrics
from sft_dist.optim import lr_at
from sft_dist.run_files import STOP_FILE
from sft_dist.shape import ModelShape
from sft_dist.step_measure import step_metrics
from sft_dist.trackers import Trackers
from sft_dist.watchdog import Watchdog
from sft_dist.world import StopRequest, World

NUM_NAMED = 20
"""Examples that are named when the training stops because of them."""


def train_loop(
    engine: Engine,
    steps: Iterable[StepBatch],
    state: RunState,
    *,
    recipe: Recipe,
    num_steps: int,
    store: TokenStore,
    measuring: Measuring,
    saver: Saver,
    trackers: Trackers,
    stop: StopRequest,
    watchdog: Watchdog,
    attempt: int,
    profiler: "torch.profiler.profile | None" = None,
) -> RunState:
    """Train until the last step or a stop request; the state it returns is committed."""
    forward_time = ForwardTime(engine.device)
    shape = ModelShape.from_config(engine.model.causal_lm.config.to_dict())
    started = time.perf_counter()
    for batch in steps:
        shares = []
        for index, micro in enumerate(batch.micros):
            watchdog.progress(step=batch.step, phase=f"micro-batch {index + 1} of {len(batch.micros)}")
            seed_forward(recipe.run.seed, batch.step, engine.world.rank, index)
            with engine.accumulate(is_last=micro.is_last):
                with forward_time.measured():
                    share = engine(micro)  # this rank's share of the global loss: weights are final
                engine.backward(share)
            shares.append(share.detach().double())
        asked = stop_requested(stop, recipe, engine.world)
        told = on_device([asked, *saver.flags()], engine.device)
        # The one reduction of a step besides the gradients': its loss, who was asked to stop, who has saved.
        told = sum_over_ranks(torch.cat([torch.stack(shares).sum()[None], told]))
        # And the one time that the host waits for the device.
        loss, num_asked, *saved, grad_norm = torch.cat([told, engine.reduce()[None]]).tolist()
        watchdog.progress(forward_s=forward_time.end_step())
        withheld = reason_to_withhold(loss, state.recent_losses, spike_guard=recipe.train.spike_guard)
        lr = lr_at(batch.step, optim=recipe.optim, num_steps=num_steps)
        result = engine.step(lr=lr, grad_norm=grad_norm, withhold=withheld is not None)
        if not result.applied:
            withheld = withheld or "gradient not finite"
        state = state.after(loss, applied=result.applied)
        metrics = step_metrics(
            batch,
            result,
            loss=loss,
            withheld=withheld,
            lr=lr,
            seconds=time.perf_counter() - started,
            shape=shape,
            device=engine.device,
            attempt=attempt,
        )
        trackers.log(metrics)
        log_commit(saver.settle(*saved), trackers, attempt=attempt)
        if profiler is not None:
            profiler.step()
        if state.withheld_in_a_row >= recipe.train.max_withheld:
            log_commit(saver.finish(), trackers, attempt=attempt)
            raise not_finite(engine, batch, shares, store=store, reason=withheld or "", state=state)
        is_end = batch.step == num_steps
        state = measuring.after(state, engine, is_end=is_end)
        if is_end or num_asked or is_due(recipe.train.save_every, batch.step):
            watchdog.progress(step=batch.step, phase="saving")
            log_commit(saver.start(state), trackers, attempt=attempt)
        if num_asked:
            break
        started = time.perf_counter()
    log_commit(saver.finish(), trackers, attempt=attempt)
    return state


def seed_forward(seed: int, step: int, rank: int, micro_index: int) -> None:
    """Make randomness a function of (seed, step, rank, micro-batch), so that a resume needs no RNG state."""
    mixed = seed
    for part in (step, rank, micro_index):
        mixed = (mixed * 0x9E3779B97F4A7C15 + part + 1) % 2**63
    torch.manual_seed(mixed)


def stop_requested(stop: StopRequest, recipe: Recipe, world: World) -> bool:
    """A signal on this rank, or the stop file seen by rank 0."""
    return stop.received is not None or (world.is_main and (recipe.run.path / STOP_FILE).is_file())


def log_commit(commit: Commit | None, trackers: Trackers, *, attempt: int) -> None:
    """Log a checkpoint, if one was committed."""
    if commit is not None:
        trackers.log(CommitMetrics(**vars(commit), attempt=attempt))


def not_finite(
    engine: Engine,
    batch: StepBatch,
    shares: Sequence[torch.Tensor],
    *,
    store: TokenStore,
    reason: str,
    state: RunState,
) -> NotFiniteError:
    """The error that ends a run whose updates are withheld again and again. Collective: ranks tell what they trained.

    It names the packs whose loss is not finite, or the whole step where all of them are.
    """
    guilty = [pack for pack, share in zip(batch.packs, shares, strict=True) if not share.isfinite()]
    mine = json.dumps([int(example) for pack in guilty for example in pack])
    ids = [example for text in gather_texts(mine, world=engine.world) for example in json.loads(text)]
    ids = ids or batch.example_ids.tolist()
    named = ", ".join(str(store.origin(example)) for example in ids[:NUM_NAMED])
    more = f" and {len(ids) - NUM_NAMED} more" * (len(ids) > NUM_NAMED)
    return NotFiniteError(
        f"{state.withheld_in_a_row} updates in a row were withheld, the last at step {batch.step}: {reason}. "
        f"Its examples: {named}{more}. The weights are those before the first of them; "
        "look at these rows, lower optim.lr, or raise train.max_withheld. Where an update before them has spoiled the "
        "weights, no later step helps: --resume-from an older checkpoint, or begin again under another run.name"
    )
