"""What is about to be trained, on what and how: said once, before step 1."""

from collections.abc import Callable, Iterator
from itertools import islice
from statistics import mean

from rich.console import Console

from sft_dist import __version__
from sft_dist.checkpoint import Continuation
from sft_dist.config import HELD_OUT
from sft_dist.console import print_pairs
from sft_dist.data.conversation import Origin
from sft_dist.data.draws import count_shared_prompts
from sft_dist.data.held_out import HeldOut
from sft_dist.data.inspect_figures import causes
from sft_dist.data.schedule import CostModel, Schedule, dominated_steps, global_batches
from sft_dist.job import Job
from sft_dist.model.load import PackedModel, dropout_rates
from sft_dist.model.verify import Agreement
from sft_dist.redact import redacted

# Steps that are laid out to say how even they are.
NUM_STEPS_LAID_OUT = 8


def show_banner(
    console: Console,
    job: Job,
    *,
    model: PackedModel,
    agreement: Agreement,
    continuation: Continuation | None,
    attempt: int,
) -> list[tuple[str, str]]:
    """Print run, model, engine, batch arithmetic, the check before step 1, and what a resumed run goes on from.

    Returns what was printed, as name and text of each line.
    """
    recipe, schedule = job.recipe, job.schedule
    _, first_ids = schedule.example_ids(schedule.first_step)
    start = f"resumed after step {continuation.step}" if continuation else "from step 1"
    attention = f"{job.backend.name}{' (auto)' if recipe.model.attention == 'auto' else ''}"
    tokens, trained = int(job.store.lengths.sum()), int(job.store.num_responses.sum())
    step_tokens = int(job.store.lengths[first_ids].sum())
    packs = f"packs of up to {job.pack_tokens:,} tokens" if job.pack_tokens else "one example a micro-batch"
    lines = {
        f"sft_dist {__version__}": f"{recipe.run.path}, {start} to {schedule.num_steps}",
        "model": f"{type(model.causal_lm).__name__}, {model.num_parameters / 1e6:,.2f} M parameters, "
        f"{recipe.model.path}",
        "compute": f"{_name(job.dtype)} on {job.device.type}, fp32 master weights, attention {attention}, "
        f"checkpointing {recipe.model.checkpointing}{', compiled layers' if model.compiled is not None else ''}",
        "engine": f"{job.engine_name} on {job.world.size} process{'es' * (job.world.size > 1)}",
        "data": f"{len(job.store):,} examples, {tokens:,} tokens, {trained / tokens:.1%} trained",
        "draws": f"{schedule.num_draws:,} an epoch, order {recipe.data.order}, fingerprint {job.draws}",
        "step": f"{len(first_ids)} examples in step {schedule.first_step} ({step_tokens:,} tokens), "
        f"{recipe.loss}, {packs}",
        "check": f"packed loss {agreement.packed_loss:.6f}, "
        f"the model's own document by document {agreement.own_loss:.6f}",
    }
    if noted := causes(job.store.meta, "notes"):
        lines["noted"] = "\n".join(map(str, noted))
    if planned := job.planned_memory:
        lines["memory"] = f"planned peak {sum(planned.values()) / 1e9:,.2f} GB a process, on its {job.device.type}"
    for held_out in job.held_out:
        named = f" {held_out.name}" * (held_out.name != HELD_OUT)
        lines[f"held out{named}"] = _held_out(held_out, job)
    if job.questions:
        every = recipe.evaluate.generate_every if recipe.evaluate else None
        lines["answers"] = f"to {len(job.questions):,} held-out prompts, every {every} steps and after the last"
    if dropout := ", ".join(f"{key}={rate}" for key, rate in dropout_rates(job.model_config).items()):
        lines["dropout"] = f"{dropout}: the curve is the same only for the same engine, processes and pack_tokens"
    if attempt > 1 and continuation is None:
        lines["restart"] = f"start {attempt} of this run, and none before it committed a checkpoint: from step 1 again"
    balance = balance_lines(
        schedule,
        step=continuation.step + 1 if continuation else schedule.first_step,
        world_size=job.world.size,
        pack_tokens=job.pack_tokens,
        cost=CostModel.from_config(model.causal_lm.config.to_dict()) or CostModel(),
        origin=job.store.origin,
    )
    lines_all = [*lines.items(), *balance, *(_continuation(continuation) if continuation else ())]
    rows = [(name, redacted(text)) for name, text in lines_all]
    print_pairs(console, rows)
    return rows


def balance_lines(
    schedule: Schedule,
    *,
    step: int,
    world_size: int,
    pack_tokens: int | None,
    cost: CostModel,
    origin: Callable[[int], Origin],
) -> Iterator[tuple[str, str]]:
    """How even the steps from `step` on are, and a warning about examples that no layout evens out."""
    if world_size == 1 or step > schedule.num_steps:
        return
    batches = global_batches(schedule, first_step=step, world_size=world_size, pack_tokens=pack_tokens, cost=cost)
    found = [batch.imbalance for batch in islice(batches, NUM_STEPS_LAID_OUT)]
    steps = f"steps {step} to {step + len(found) - 1}" if len(found) > 1 else f"step {step}"
    yield "balance", f"the slowest process takes {mean(found):.3f} times the mean, by cost, in {steps}"
    dominated = dominated_steps(schedule, step=step, world_size=world_size, cost=cost)
    if dominated is not None:
        example_id, share = dominated.example_id, dominated.share
        yield (
            "warning",
            f"{dominated.num_steps:,} of {dominated.num_all:,} steps of this epoch cannot be balanced: one example "
            f"costs more than twice a process's share; at worst {share:.1f} times, {origin(example_id)} "
            f"({schedule.lengths[example_id]:,} tokens) in step {dominated.step}. "
            "More examples a step or fewer processes help",
        )


def _continuation(continuation: Continuation) -> Iterator[tuple[str, str]]:
    """What is gone on from, what was wrong with newer checkpoints, and what is not as it was."""
    yield "resumed", f"from {continuation.path}, every byte of it verified"
    for text in continuation.warnings:
        yield "warning", text
    for text in continuation.changes.curve:
        yield "changed", f"{text}: the curve is another from here (--allow-change)"
    for text in continuation.changes.other:
        yield "changed", f"{text}; steps that are trained again are compared with what they were"


def _held_out(held_out: HeldOut, job: Job) -> str:
    """What is measured and not trained; a warning instead where files share prompts with the training data."""
    if share := job.recipe.data.held_out_share:
        return f"{len(held_out.ids):,} of {len(job.store):,} examples (data.held_out_share={share:g}), by prompt"
    num_shared, num_prompts = count_shared_prompts(job.store.prompt_hash, held_out.store.prompt_hash)
    if num_shared:
        return f"warning: {num_shared:,} of {num_prompts:,} prompts are also trained on; see sft-dist lint"
    return f"{len(held_out.ids):,} examples, no prompt of them trained on"


def _name(dtype: object) -> str:
    return {"torch.float32": "fp32", "torch.bfloat16": "bf16"}[str(dtype)]
