"""What all three trainers mean alike: the size of a step, its loss, schedules, optimizers, engines, lengths of runs."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_dist.config import RUN_NAME
from sft_dist.migrate.ledger import Ledger

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
TOKEN_MEAN = (
    "their loss divides by the number of trained tokens of the whole step; example_mean, the default here, would be "
    "another objective"
)


THEIR_CHECKPOINTS = "their checkpoints cannot be gone on from; give their exported model as model.path"


def adapters(ledger: Ledger, key: str, *, full: bool, note: str = "") -> None:
    """A file that trains adapters: refused, or with --full imported as full fine-tuning, whose rate is another."""
    if not full:
        ledger.refuse(key, f"{note}sft_dist trains all parameters; --full imports it as that")
        return
    ledger.lack(key, f"{note}all parameters are trained instead, by --full")
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


def put_wandb(ledger: Ledger, *, project_key: str | None = None, project_is_enough: bool = False) -> None:
    """report_to names trackers; wandb is the one here, beside metrics.jsonl.

    project_key: theirs of the project; None where they have none. project_is_enough: it alone turns wandb on.
    """
    named, project = ledger.get("report_to", []), ledger.get(project_key) if project_key else None
    trackers = [str(each) for each in (named if isinstance(named, list) else [named])]
    if "wandb" in trackers or "all" in trackers or (project and project_is_enough):
        ledger.put(
            "wandb.project", str(project or "sft"), theirs=f"{project_key}, report_to" if project else "report_to"
        )
        if not project:
            ledger.ask("report_to", "wandb.project is set to sft: they take it from WANDB_PROJECT")
    elif project_key and project:
        ledger.lack(project_key, "report_to does not ask for wandb; the project alone turns nothing on, there or here")
    if others := [each for each in trackers if each not in ("wandb", "all", "none", "no")]:
        ledger.lack("report_to", f"{', '.join(others)}: metrics.jsonl in the run's directory has every step")
