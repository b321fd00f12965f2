"""What all three trainers mean alike: the size of a step, its loss, schedules, optimizers, engines, lengths of runs."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_dist.config import RUN_NAME, Source
from sft_dist.data.files import iter_rows, list_files
from sft_dist.errors import SftDistError
from sft_dist.migrate.ledger import Ledger

ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adamw_torch_xla")
ATTENTION = {
    "flash_attention_2": "flash_attention",
    "fa2": "flash_attention",
    "flash_attention_3": "flash_attention_3",
    "fa3": "flash_attention_3",
    "sdpa": "sdpa",
    "eager": "sdpa",
    "disabled": "sdpa",
    "auto": "auto",
}
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}
NEVER_BINDS = 1.0e9
TOKEN_MEAN = (
    "their loss divides by the number of trained tokens of the whole step; example_mean, the default here, would be "
    "another objective"
)


THEIR_CHECKPOINTS = "their checkpoints cannot be gone on from; give their exported model as model.path"


def adapters(ledger: Ledger, key: str, kind: str, *, full: bool) -> None:
    """A file that trains adapters: refused, or with --full imported as full fine-tuning, whose rate is another."""
    if not full:
        ledger.refuse(key, f"{kind}: sft_dist trains all parameters; --full imports it as that")
        return
    ledger.lack(key, f"{kind}: all parameters are trained instead, by --full")
    ledger.ask(
        "learning_rate", "rates of adapters are ten times or more too high for all parameters: choose anew, as 1e-5"
    )


def quantised(ledger: Ledger, keys: Sequence[str], *, full: bool) -> None:
    """Weights of few bits, which only adapters are trained beside."""
    for key in keys:
        if ledger.is_on(key):
            (ledger.lack if full else ledger.refuse)(key, "quantised weights cannot be trained in full")


def number(value: Any) -> float:
    """YAML reads 1e-5 as a text."""
    return float(value)


@dataclass(frozen=True)
class Step:
    """A step as they count it. rows: micro-batch x accumulation x GPUs. packed: a row is a pack of max_tokens."""

    per_device: int
    accumulation: int
    packed: bool
    max_tokens: int
    gpus: int

    @property
    def rows(self) -> int:
        return self.per_device * self.accumulation * self.gpus


def put_step(ledger: Ledger, *, keys: str, per_device: int, accumulation: int, packed: bool, max_tokens: int) -> Step:
    """batch.* from the micro-batch, which here decides nothing. keys: theirs, for the report."""
    step = Step(per_device, accumulation, packed, max_tokens, ledger.gpus or 1)
    sum_of = f"{per_device} x {accumulation} x {step.gpus} GPU{'s' * (step.gpus > 1)}"
    if ledger.gpus is None:
        ledger.ask(
            "--gpus N", "not given: one GPU was assumed; their step grows with the number of GPUs, ours does not"
        )
    if packed:
        meaning = f"{sum_of} packs of {max_tokens}; here a step is examples in draw order until it has so many tokens"
        ledger.put(
            "batch.tokens",
            step.rows * max_tokens,
            theirs=keys,
            meaning=meaning,
            remark=f"{sum_of} packs of {max_tokens}",
        )
    else:
        meaning = f"{sum_of}; here the number of GPUs does not change it"
        ledger.put("batch.examples", step.rows, theirs=keys, meaning=meaning, remark=sum_of)
    room = per_device * max_tokens
    ledger.put("batch.pack_tokens", room, remark="what one micro-batch there held at most: memory, never the curve")
    ledger.put("loss", "token_mean", meaning=TOKEN_MEAN, remark="what their loss is")
    return step


def put_run(ledger: Ledger, *, output: str, name_key: str) -> None:
    """run.name and run.dir from where they write."""
    where = Path(str(ledger.get("output_dir", output)))
    name = str(ledger.get(name_key) or where.name)
    clean = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:100]
    ledger.put("run.name", clean if RUN_NAME.fullmatch(clean) else "imported", theirs=name_key)
    ledger.put(
        "run.dir", str(where.parent), theirs="output_dir", meaning="checkpoints and model go to run.dir/run.name"
    )


def put_schedule(ledger: Ledger, key: str, *, default: str) -> None:
    """optim.schedule and min_lr; optim.lr is there."""
    name = str(ledger.get(key, default))
    kwargs = ledger.get("lr_scheduler_kwargs", {})
    options = json.loads(kwargs) if isinstance(kwargs, str) and kwargs else dict(kwargs or {})
    if name == "cosine_with_min_lr":
        lr = ledger.recipe["optim.lr"]
        floor = options.pop("min_lr", None)
        rate = options.pop("min_lr_rate", 0.0)
        ledger.put("optim.schedule", "cosine", theirs=key)
        ledger.put(
            "optim.min_lr", number(floor) if floor is not None else lr * number(rate), theirs="lr_scheduler_kwargs"
        )
    elif name in SCHEDULES:
        given = key in ledger.given
        ledger.put(
            "optim.schedule",
            SCHEDULES[name],
            theirs=key,
            meaning="" if given else "their default",
            remark="" if given else "their default",
        )
    else:
        ledger.put("optim.schedule", "cosine", theirs=key, meaning=f"there is no {name}; cosine stands in for it")
        ledger.ask(key, f"{name} has no counterpart; choose among cosine, linear and constant, and optim.min_lr")
    if options:
        ledger.lack("lr_scheduler_kwargs", f"no counterpart for {', '.join(options)}")


def put_optimizer(ledger: Ledger, key: str) -> None:
    """AdamW is the one optimizer here."""
    name = str(ledger.get(key, "adamw_torch_fused"))
    if name in ADAMW:
        if key in ledger.given:
            ledger.idle.append(key)
    else:
        ledger.lack(key, "the optimizer here is AdamW with fp32 master weights and moments")
        ledger.ask(key, f"{name} becomes AdamW: check optim.lr, and that its states fit into memory (sft-dist doctor)")
    if "adam_beta1" in ledger.given or "adam_beta2" in ledger.given:
        betas = [number(ledger.get("adam_beta1", 0.9)), number(ledger.get("adam_beta2", 0.999))]
        ledger.put("optim.betas", betas, theirs="adam_beta1, adam_beta2")
    ledger.seen |= {"adam_beta1", "adam_beta2"}
    norm = ledger.get("max_grad_norm")
    if norm is not None:
        off = number(norm) <= 0
        meaning = "0 turned clipping off; a bound that never binds does" if off else ""
        ledger.put("optim.max_grad_norm", NEVER_BINDS if off else number(norm), theirs="max_grad_norm", meaning=meaning)


def count_rows(sources: Sequence[dict[str, Any]], share: float) -> int | None:
    """Rows that are trained in an epoch, where all sources are files that can be read; else None."""
    total = 0.0
    for given in sources:
        source = Source(**given)
        try:
            if not list_files(source):
                return None
            rows = sum(1 for _ in iter_rows(source))
        except SftDistError:
            return None
        total += min(rows, source.cap or rows) * source.weight
    return math.floor(total * (1 - share)) or None


@dataclass(frozen=True)
class Length:
    """Optimizer steps of their run, where they can be told."""

    per_epoch: int | None
    total: int | None


def put_length(ledger: Ledger, step: Step, *, epochs_key: str, default_epochs: float, num_rows: int | None) -> Length:
    """train.epochs or train.steps."""
    most = ledger.get("max_steps", -1)
    epochs = number(ledger.get(epochs_key, default_epochs))
    per_epoch = math.ceil(num_rows / step.rows) if num_rows and not step.packed else None
    if most is not None and int(most) > 0:
        ledger.put(
            "train.steps", int(most), theirs=f"max_steps, {epochs_key}" if epochs_key in ledger.given else "max_steps"
        )
        return Length(per_epoch, int(most))
    if epochs == int(epochs) and epochs >= 1:
        given = epochs_key in ledger.given
        ledger.put(
            "train.epochs",
            int(epochs),
            theirs=epochs_key,
            meaning="" if given else "their default",
            remark="" if given else "their default",
        )
        total = int(epochs) * per_epoch if per_epoch else None
        return Length(per_epoch, ledger.steps or total)
    total = ledger.steps or (math.ceil(epochs * per_epoch) if per_epoch else None)
    if total:
        ledger.put("train.steps", total, theirs=epochs_key, meaning=f"{epochs:g} epochs; epochs are whole here")
    else:
        ledger.put("train.epochs", max(1, math.ceil(epochs)), theirs=epochs_key, meaning="epochs are whole here")
        ledger.ask(
            epochs_key, f"{epochs:g} epochs were rounded up; give --steps N, the steps of their run, to keep its length"
        )
    return Length(per_epoch, total)


def put_warmup(ledger: Ledger, length: Length, *, default_share: float = 0.0, default_most: int = 0) -> None:
    """optim.warmup_steps: theirs, or a share of all steps, which for them a number below 1 is under either key.

    default_share, default_most: what they take where neither key is given.
    """
    if ledger.given.get("warmup_steps") is None and ledger.given.get("warmup_ratio") is None and default_share:
        if length.total:
            count = min(int(default_share * length.total), default_most)
            ledger.put(
                "optim.warmup_steps", count, theirs="warmup_ratio", meaning="their default", remark="their default"
            )
        else:
            ledger.ask(
                "warmup_ratio",
                f"not given: {default_share:g} of all steps there, at most {default_most}; set optim.warmup_steps",
            )
    steps, share = number(ledger.get("warmup_steps", 0)), number(ledger.get("warmup_ratio", 0))
    key = "warmup_steps" if steps else "warmup_ratio"
    if 0 < steps < 1:
        share, steps = steps, 0
    if steps:
        ledger.put("optim.warmup_steps", int(steps), theirs=key, meaning="the first step has a rate above 0 here")
    elif share and length.total:
        count = math.ceil(share * length.total)
        ledger.put("optim.warmup_steps", count, theirs=key, meaning=f"{share:g} of {length.total} steps")
    elif share:
        ledger.put("optim.warmup_steps", 0, theirs=key, remark=f"YOURS TO SET: {share:g} of all steps")
        ledger.ask(
            key,
            f"{share:g} of all steps, whose number sft-dist inspect tells: set optim.warmup_steps, or import "
            "again with --steps N",
        )


def put_every(ledger: Ledger, what: str, length: Length, *, strategies: Sequence[str]) -> None:
    """train.eval_every or save_every, from <what>_strategy and <what>_steps. what: eval or save."""
    key, ours = f"{what}_steps", f"train.{what}_every"
    named = next((name for name in strategies if ledger.get(name) is not None), None)
    strategy, every = str(ledger.given[named]) if named else "steps", ledger.get(key)
    theirs = ", ".join(name for name in (key, named) if name and name in ledger.given)
    if strategy in ("no", "False"):
        ledger.idle += [name for name in (*strategies, key) if name in ledger.given]
    elif named and strategy == "epoch" and length.per_epoch:
        ledger.put(ours, length.per_epoch, theirs=named, meaning="an epoch's steps")
    elif named and strategy == "epoch":
        ledger.ask(named, f"once an epoch: set {ours} to the steps of an epoch, which sft-dist inspect tells")
    elif named and strategy != "steps":
        ledger.lack(named, f"set {ours} to a number of steps")
    elif every is None and named:
        ledger.ask(named, f"{key} is not given: set {ours} to a number of steps")
    elif every is not None and number(every) >= 1:
        ledger.put(ours, int(number(every)), theirs=theirs)
    elif every is not None and length.total:
        count = max(1, math.ceil(number(every) * length.total))
        ledger.put(ours, count, theirs=theirs, meaning=f"{number(every):g} of {length.total} steps")
    elif every is not None:
        ledger.ask(key, f"{number(every):g} of all steps: set {ours}, or import again with --steps N")


def put_saves(ledger: Ledger) -> None:
    """How many checkpoints are kept."""
    limit = ledger.get("save_total_limit")
    if limit is not None and int(limit) > 0:
        ledger.put("train.keep_checkpoints", int(limit), theirs="save_total_limit")
    if ledger.is_on("load_best_model_at_end"):
        ledger.lack(
            "load_best_model_at_end",
            "the model after the last step is exported; train.keep_best keeps the best checkpoints",
        )
        if "train.eval_every" in ledger.recipe:
            ledger.put("train.keep_best", 1, remark="load_best_model_at_end")


def put_dtype(ledger: Ledger) -> None:
    """bf16 here is bf16 weights beside fp32 master weights and gradients."""
    if ledger.is_on("bf16") and ledger.given["bf16"] != "auto":
        ledger.put(
            "model.dtype", "bf16", theirs="bf16", meaning="master weights, moments and summed gradients are fp32"
        )
    elif ledger.is_on("fp16"):
        ledger.lack("fp16", "there is no fp16: model.dtype auto is bf16 on GPUs, which needs no loss scaling")
    ledger.seen |= {"bf16", "fp16"}


def put_attention(ledger: Ledger, key: str) -> None:
    """Backends that keep documents apart."""
    name = ledger.get(key)
    if name is None:
        return
    if name in ATTENTION:
        ledger.put(
            "model.attention",
            ATTENTION[name],
            theirs=key,
            meaning="documents of a pack never see each other, whatever it is",
        )
    else:
        ledger.put(
            "model.attention",
            "auto",
            theirs=key,
            meaning=f"{name} is none of the backends here; auto says which it takes",
        )


def put_remote_code(ledger: Ledger, key: str) -> None:
    """Code of a model runs here only at a commit that somebody read."""
    if not ledger.is_on(key):
        return
    revision = str(ledger.recipe.get("model.revision") or "")
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        ledger.put("model.trust_remote_code", True, theirs=key)
    else:
        ledger.ask(
            key,
            "runs the model's own code: set model.revision to the commit you read, then model.trust_remote_code",
        )


def put_checkpointing(ledger: Ledger, key: str, *, default: bool) -> None:
    """Recomputing saves memory and changes nothing else."""
    if "activation_checkpointing" in ledger.given and key not in ledger.given:
        key = "activation_checkpointing"  # transformers' newer name
    ledger.seen |= {"activation_checkpointing", "gradient_checkpointing"}
    value = ledger.get(key, default)
    if value in ("offload", "offload_disk"):
        ledger.lack(key, "activations are not offloaded; model.checkpointing: full recomputes them")
    if value:
        given = key in ledger.given
        ledger.put(
            "model.checkpointing",
            "full",
            theirs=key,
            meaning="" if given else "on by default there; none is faster where it fits",
            remark="" if given else "their default; none is faster where it fits",
        )


def put_engine(ledger: Ledger) -> None:
    """train.engine from a DeepSpeed file or its name, or from fsdp."""
    given = ledger.get("deepspeed")
    if given:
        engine = engine_of(given)
        if engine is None:
            ledger.ask("deepspeed", f"{given}: its ZeRO stage cannot be told; set train.engine")
        else:
            meaning = "ZeRO knobs come from configs/deepspeed; train.deepspeed names a file of your own"
            ledger.put("train.engine", engine, theirs="deepspeed", meaning=meaning)
    elif any(ledger.is_on(key) for key in ("fsdp", "fsdp_config", "fsdp_version")):
        key = "fsdp" if "fsdp" in ledger.given else "fsdp_config"
        ledger.put(
            "train.engine",
            "zero3",
            theirs=key,
            meaning="weights, gradients and optimizer are sharded, as by full_shard",
        )
        ledger.ask(key, "FSDP has no counterpart of its own; zero3 shards the same, zero2 suffices where weights fit")
    ledger.seen |= {"fsdp", "fsdp_config", "fsdp_version"}


def engine_of(given: Any) -> str | None:
    """The engine of a DeepSpeed config, given as a mapping, or as a file that is here, or by its name alone."""
    config: Any = given
    if isinstance(given, str):
        try:
            config = json.loads(Path(given).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = re.search(r"(?:zero|z|stage)[_-]?([123])", Path(given).name, re.I)
            if not found:
                return None
            offload = "_offload" if "offload" in given.lower() and found[1] != "1" else ""
            return f"zero{found[1]}{offload}"
    zero = config.get("zero_optimization", {}) if isinstance(config, dict) else {}
    stage = zero.get("stage", 0)
    if stage not in (1, 2, 3):
        return "ddp" if stage == 0 and isinstance(config, dict) else None
    device = (zero.get("offload_optimizer") or {}).get("device", "none")
    return f"zero{stage}" + ("_offload" if device in ("cpu", "nvme") and stage > 1 else "")


def put_wandb(ledger: Ledger, *, project: str | None) -> None:
    """report_to names trackers; wandb is the one here, beside metrics.jsonl."""
    named = ledger.get("report_to", [])
    trackers = [str(each) for each in (named if isinstance(named, list) else [named])]
    if "wandb" in trackers or "all" in trackers or project:
        ledger.put("wandb.project", str(project or "sft"), theirs="report_to")
        if not project:
            ledger.ask("report_to", "wandb.project is set to sft: they take it from WANDB_PROJECT")
    if others := [each for each in trackers if each not in ("wandb", "all", "none", "no")]:
        ledger.lack("report_to", f"{', '.join(others)}: metrics.jsonl in the run's directory has every step")
