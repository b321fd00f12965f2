"""What all three trainers mean alike: schedules, optimizers, the length of a run, what comes every so many steps."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sft_dist.config import Source
from sft_dist.data.files import iter_rows, list_files
from sft_dist.errors import SftDistError
from sft_dist.migrate.ledger import Ledger
from sft_dist.migrate.shared import Step, number

ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adamw_torch_xla")
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}
NEVER_BINDS = 1.0e9


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
    is_off = strategy in ("no", "False") or (strategy == "steps" and every is not None and number(every) <= 0)
    if is_off:
        ledger.idle += [name for name in (*strategies, key) if name in ledger.given]
    elif theirs and not can_come(ledger, what, theirs):
        return
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


def can_come(ledger: Ledger, what: str, theirs: str) -> bool:
    """Whether it makes sense every so many steps; held-out losses without held-out data are their owner's to mend."""
    if what == "save" or not ledger.recipe.keys().isdisjoint(("data.held_out", "data.held_out_share")):
        return True
    ledger.ask(theirs, "there is no held-out data: set data.held_out or data.held_out_share, and train.eval_every")
    return False


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
