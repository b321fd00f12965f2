"""What a recipe will need on a machine, before anything is loaded: memory, disk, steps, time, and the fastest setting.

The model is never built: its shape comes from a config.json or a table, memory is counted in memory.py, the engine that
`auto` becomes is chosen in engine_choice.py, as `sft-dist launch` does. Without torch.
"""

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sft_dist.config import Recipe
from sft_dist.data.build import StoreSpec, store_fingerprint
from sft_dist.data.steps import schedule_of
from sft_dist.data.store import TokenStore
from sft_dist.engine_choice import USABLE_SHARE, choose_engine, engines_for, find_shape, training_of
from sft_dist.errors import ConfigError, SftDistError
from sft_dist.peaks import peak_flops
from sft_dist.plan.machine import Machine, parse_gpus, this_machine
from sft_dist.plan.memory import Need, need
from sft_dist.plan.memory_parts import BYTES_OF_DTYPE, CHECKPOINT_BYTES
from sft_dist.run_files import METRICS
from sft_dist.run_record import read_starts
from sft_dist.shape import ModelShape
from sft_dist.status import read_tail

MODES = ("none", "selective", "full")

BYTES_PER_TOKEN = 5
"""Of a token store: an int32, and a byte of mask."""


@dataclass(frozen=True)
class Setting:
    """An engine and a checkpointing mode on the machine. why_not: why it does not fit; empty where it does."""

    engine: str
    checkpointing: str
    need: Need
    why_not: str


@dataclass(frozen=True)
class Work:
    """The tokens of the run. source: where they are counted, or what to do where they are not.

    squares: sum of squared lengths. All of an epoch's or a run's, as steps say; None: not known.
    """

    source: str
    tokens: int | None = None
    responses: int | None = None
    squares: int | None = None
    steps: int | None = None


@dataclass(frozen=True)
class Time:
    """tokens_per_s: of all GPUs together. seconds: None where the tokens are not known."""

    tokens_per_s: float
    seconds: float | None
    source: str


@dataclass(frozen=True)
class Plan:
    """All that is said of a recipe on a machine. own: what the recipe runs as. fastest: None where nothing fits."""

    recipe: Recipe
    machine: Machine
    shape: ModelShape
    dtype: str
    settings: tuple[Setting, ...]
    own: Setting
    auto_reason: str
    fastest: Setting | None
    work: Work
    time: Time | None
    disk: dict[str, int]


@dataclass(frozen=True)
class Asked:
    """What the flags of `sft-dist plan` say. mfu: in percent."""

    gpus: str | None = None
    host_memory: str | None = None
    processes: int | None = None
    tokens: int | None = None
    examples: int | None = None
    tokens_per_s: float | None = None
    mfu: float | None = None


def make_plan(recipe: Recipe, asked: Asked) -> Plan:
    """Raises ConfigError for a model whose shape is not known, and for flags that make no sense together."""
    machine = _machine(asked)
    shape = find_shape(recipe, may_fetch=True)
    if shape is None:
        raise ConfigError(
            f"model.path={recipe.model.path!r}: its config.json is not here, cannot be fetched, or is not that of a "
            "plain dense decoder; give a directory that holds it"
        )
    dtype = recipe.model.dtype if recipe.model.dtype != "auto" else "bf16" if machine.device == "cuda" else "fp32"
    settings = tuple(_settings(recipe, machine, shape, dtype))
    engine, reason = _own_engine(recipe, machine, shape, dtype)
    own = _setting(recipe, machine, shape, dtype, engine, recipe.model.checkpointing)
    work = work_of(recipe, asked)
    return Plan(
        recipe=recipe,
        machine=machine,
        shape=shape,
        dtype=dtype,
        settings=settings,
        own=own,
        auto_reason=reason,
        fastest=next((setting for setting in sorted(settings, key=_slowness) if not setting.why_not), None),
        work=work,
        time=time_of(recipe, machine, shape, work, asked),
        disk=disk_bytes(recipe, shape.all_params, dtype, work),
    )


def _machine(asked: Asked) -> Machine:
    if asked.gpus is None:
        if asked.host_memory is not None:
            raise ConfigError(f"--host-memory {asked.host_memory} needs --gpus: this machine's memory is known")
        return this_machine(processes=asked.processes)
    if asked.processes is not None:
        raise ConfigError(
            f"--processes {asked.processes} is of this machine, and --gpus {asked.gpus} of another, with a process on "
            "each GPU: leave one of them out"
        )
    return parse_gpus(asked.gpus, host_memory=asked.host_memory)


def _own_engine(recipe: Recipe, machine: Machine, shape: ModelShape, dtype: str) -> tuple[str, str]:
    """What train.engine is on this machine, and why if it is auto: as `sft-dist launch` decides it."""
    if recipe.train.engine != "auto":
        return recipe.train.engine, ""
    choice = None
    if machine.device == "cuda":
        choice = choose_engine(
            recipe,
            num_gpus=machine.num_processes,
            gpu_bytes=machine.memory_bytes / USABLE_SHARE,
            dtype=dtype,
            size=shape,
        )
    if choice is not None:
        return choice.engine, choice.reason
    engine = engines_for(machine.num_processes)[0]
    return engine, f"train.engine=auto is {engine}"


def _settings(recipe: Recipe, machine: Machine, shape: ModelShape, dtype: str) -> Iterator[Setting]:
    for engine in engines_for(machine.num_processes):
        for mode in MODES:
            yield _setting(recipe, machine, shape, dtype, engine, mode)


def _setting(recipe: Recipe, machine: Machine, shape: ModelShape, dtype: str, engine: str, mode: str) -> Setting:
    training = training_of(
        recipe,
        engine=engine,
        num_processes=machine.num_processes,
        dtype=dtype,
        device=machine.device,
        checkpointing=mode,
    )
    needed = need(shape, training)
    return Setting(engine, mode, needed, _why_not(needed, machine))


def _why_not(needed: Need, machine: Machine) -> str:
    """Which memory is too small, and what fills most of it."""
    over = needed.device_bytes - machine.memory_bytes
    if over > 0:
        part, size = max(needed.device.items(), key=lambda item: item[1])
        return f"{over / 1e9:.1f} GB too much, in the {needed.moment}; most is {part}: {size / 1e9:.1f} GB"
    host = needed.host_bytes * machine.per_node
    if machine.host_bytes is not None and host > machine.host_bytes:
        return f"host memory: {host / 1e9:.0f} GB of {machine.host_bytes / 1e9:.0f} GB"
    return ""


def _slowness(setting: Setting) -> tuple[bool, int, int]:
    """Offload waits for the host in every step, recomputation costs a quarter to a third, sharding a few messages."""
    plainest = ("single", "ddp", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
    return setting.engine.endswith("_offload"), MODES.index(setting.checkpointing), plainest.index(setting.engine)


# ---------------------------------------------------------------- tokens, time, disk


def work_of(recipe: Recipe, asked: Asked) -> Work:
    """From the flags, else from the token store of the recipe's data, if it is there."""
    epochs, steps = recipe.train.epochs or 1, recipe.train.steps
    if asked.tokens is None and asked.examples is None:
        return _work_in_store(recipe)
    num_steps = steps
    if num_steps is None and asked.examples is not None and recipe.batch.examples is not None:
        num_steps = epochs * -(-asked.examples // recipe.batch.examples)
    elif num_steps is None and asked.tokens is not None and recipe.batch.tokens is not None:
        num_steps = epochs * -(-asked.tokens // recipe.batch.tokens)
    tokens = asked.tokens * epochs if asked.tokens is not None and steps is None else None
    if tokens is None and num_steps is not None and recipe.batch.tokens is not None:
        tokens = num_steps * recipe.batch.tokens
    given = [f"--{name} {value:,}" for name in ("tokens", "examples") if (value := getattr(asked, name)) is not None]
    return Work(", ".join(given), tokens=tokens, steps=num_steps)


def _work_in_store(recipe: Recipe) -> Work:
    unknown = Work("not known: run sft-dist prepare, or give --tokens or --examples")
    if not recipe.store_dir.is_dir():
        return unknown
    try:
        spec = StoreSpec.of(recipe, recipe.data.train)
        store = TokenStore.open(recipe.store_dir / store_fingerprint(spec, spec.load_tokenizer()))
        schedule = schedule_of(recipe, store)
    except SftDistError:  # no store of this data, or no tokenizer to ask for its name
        return unknown
    drawn = np.concatenate([schedule.example_ids(step)[1] for step in range(1, schedule.num_steps + 1)])
    lengths = store.lengths[drawn]
    return Work(
        f"the token store {store.path}",
        tokens=int(lengths.sum()),
        responses=int(store.num_responses[drawn].sum()),
        squares=int((lengths**2).sum()),
        steps=schedule.num_steps,
    )


def time_of(recipe: Recipe, machine: Machine, shape: ModelShape, work: Work, asked: Asked) -> Time | None:
    """By the rate that is given, by an MFU, or by an earlier run of this recipe; None without any."""
    if asked.tokens_per_s is not None:
        rate, source = asked.tokens_per_s, "--tokens-per-s"
    elif asked.mfu is not None:
        peak = peak_flops(machine.card or "")
        if peak is None:
            raise ConfigError(
                f"--mfu {asked.mfu:g} needs a card whose peak is known, as --gpus 8xH100; or --tokens-per-s"
            )
        rate = asked.mfu / 100 * peak * machine.num_processes / _flops_per_token(recipe, shape, work)
        source = f"--mfu {asked.mfu:g} of {peak / 1e12:g} dense bf16 TFLOP/s, {machine.card}'s data sheet"
    else:
        found = _rate_of_run(recipe)
        if found is None:
            return None
        rate, source = found
    return Time(rate, work.tokens / rate if work.tokens is not None else None, source)


def _flops_per_token(recipe: Recipe, shape: ModelShape, work: Work) -> float:
    """Where the data is not known: all tokens trained, and documents of a quarter of data.max_tokens."""
    tokens = work.tokens or 1_000_000
    responses = work.responses if work.responses is not None else tokens
    squares = work.squares if work.squares is not None else tokens * recipe.data.max_tokens // 4
    return shape.step_flops(tokens=tokens, responses=responses, sum_squares=squares) / tokens


def _rate_of_run(recipe: Recipe) -> tuple[float, str] | None:
    """The median of an earlier run in this recipe's directory, whatever it ran on."""
    path = recipe.run.path
    steps = [line for line in read_tail(path / METRICS) if line["event"] == "step"]
    rates = [line["tokens_per_s"] for line in steps if line["attempt"] == steps[-1]["attempt"]]
    if not rates:
        return None
    starts = read_starts(path)
    processes = starts[-1].get("layout", {}).get("processes") if starts else None
    where = f" on {processes} processes" if processes else ""
    return statistics.median(rates), f"the median of {len(rates):,} steps of {path}{where}"


def disk_bytes(recipe: Recipe, num_params: int, dtype: str, work: Work) -> dict[str, int]:
    """Checkpoints that are kept and the one that is being written, the exported model, the token store.

    train.keep_every counts where the number of steps is known, by `work` or by train.steps: its multiples at which the
    run saves, beside the newest ones.
    """
    train, steps = recipe.train, work.steps or recipe.train.steps
    kept = train.keep_checkpoints + train.keep_best
    if train.keep_every is not None and steps is not None and train.save_every is not None:
        kept += steps // math.lcm(train.keep_every, train.save_every)
    one = CHECKPOINT_BYTES * num_params
    found = {"a checkpoint": one, f"{kept} kept and one being written": (kept + 1) * one}
    found["the model"] = num_params * BYTES_OF_DTYPE[dtype]
    if work.tokens is not None and train.steps is None:
        found["the token store, about"] = BYTES_PER_TOKEN * work.tokens // (train.epochs or 1)
    return found


def planned_memory(recipe: Recipe, config: Mapping[str, Any], **found: Any) -> dict[str, int]:
    """Bytes by part for a process of a run that starts; empty for a model whose shape is not known.

    found: what `training_of` takes.
    """
    shape = ModelShape.from_config(config)
    return dict(need(shape, training_of(recipe, **found)).device) if shape is not None else {}
