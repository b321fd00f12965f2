"""What a recipe needs of this machine: its model, its data, its attention, its engine, room for its checkpoints."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sft_dist.config import Recipe, Source
from sft_dist.data.files import list_files
from sft_dist.doctor.environment import is_on
from sft_dist.doctor.finding import Finding, Group
from sft_dist.doctor.probe import Answer, ask_python
from sft_dist.engine_choice import count_parameters
from sft_dist.errors import SftDistError
from sft_dist.launch import Asked, plan_launch
from sft_dist.plan import planner
from sft_dist.plan.planner import Work, disk_bytes, work_of

GROUP = Group("recipe")
IMPORT_S = 180.0

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.06, "float16": 0.01}
"""Largest difference of attention to fp32 for random inputs: a few roundings of values of about 1 to 3."""


@dataclass(frozen=True)
class Needs:
    """A recipe's demands on the disk: bytes of its checkpoints and model; None where the model is not here.

    is_least: those of train.keep_every are not among them, as the number of steps is not known.
    """

    num_parameters: int | None
    num_bytes: int | None
    is_least: bool = False


def needs_of(recipe: Recipe) -> Needs:
    """By the plan's count; model.dtype: auto may be fp32, as on a CPU."""
    count = count_parameters(recipe.model.path, revision=recipe.model.revision)
    if count is None:
        return Needs(None, None)
    dtype = "bf16" if recipe.model.dtype == "bf16" else "fp32"
    steps, keeps_for_ever = recipe.train.steps, recipe.train.keep_every is not None
    if keeps_for_ever and steps is None and Path(recipe.model.path).is_dir():  # else the hub would be asked
        steps = work_of(recipe, planner.Asked()).steps
    found = disk_bytes(recipe, count, dtype, Work("", steps=steps))  # without tokens: a store is there already
    return Needs(count, sum(found.values()) - found["a checkpoint"], is_least=keeps_for_ever and steps is None)


def ask_training(words: Sequence[str]) -> Answer:
    """Attention that a run gets; its facts are those of `doctor.ask_training`. words: recipe and overrides."""
    environ = os.environ | {"HF_HUB_OFFLINE": "1"}  # the network has a group of its own
    return ask_python("doctor.ask_training", *words, timeout_s=IMPORT_S, environ=environ)


def check_recipe(recipe: Recipe, needs: Needs, environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Model, data and launch, without torch in this process."""
    yield _model(recipe, needs, environ)
    if needs.is_least:
        seen = f"{recipe.train.keep_every}: no number of steps is known, and what it keeps is not in the disk's count"
        yield GROUP.note(
            "train.keep_every", seen, "sft-dist prepare recipe.yaml, then sft-dist plan recipe.yaml counts it"
        )
    for name, sources in (("data.train", recipe.data.train), ("data.held_out", recipe.data.held_out_sources)):
        yield from (_source(name, source) for source in sources)
    for key, file in (("data.chat_template", recipe.data.chat_template), ("train.deepspeed", recipe.train.deepspeed)):
        if file is not None and not file.expanduser().is_file():
            yield GROUP.problem(key, f"{file} is no file", f"correct {key}, or leave it out")
    yield from _launch(recipe)


def _model(recipe: Recipe, needs: Needs, environ: Mapping[str, str]) -> Finding:
    path = recipe.model.path
    folder = Path(path).expanduser()
    if needs.num_parameters is not None:
        where = "in its directory" if folder.is_dir() else "in the hub's cache"
        return GROUP.ok("model", f"{path}: {needs.num_parameters / 1e6:,.1f} M parameters, {where}")
    if folder.is_dir():
        missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
        what = f"no {', '.join(missing)}" if missing else "no weights (*.safetensors) that can be read"
        return GROUP.problem("model", f"{path}: {what} in it", "save the model there with save_pretrained")
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        return GROUP.problem("model", f"{path}: no such directory (looked in {Path.cwd()})", "correct model.path")
    if is_on(environ.get("HF_HUB_OFFLINE", "")):
        mend = "on a machine with a network: sft-dist prepare recipe.yaml --with-model"
        return GROUP.problem("model", f"{path} is not in the hub's cache, and HF_HUB_OFFLINE is set", mend)
    mend = "sft-dist prepare recipe.yaml --with-model fetches it before GPUs wait for it"
    return GROUP.note("model", f"{path} is not in the hub's cache; the run downloads it", mend)


def _source(name: str, source: Source) -> Finding:
    try:
        files = list_files(source)
        size = sum(file.stat().st_size for file in files)
    except (SftDistError, OSError) as error:
        return GROUP.problem(name, str(error), f"correct {name}")
    if not files:
        mend = "sft-dist prepare recipe.yaml fetches and tokenises it before GPUs wait for it"
        return GROUP.note(name, f"{source.path} is a data set of the hub", mend)
    if not size:
        return GROUP.problem(name, f"{source.path} is empty", f"correct {name}")
    return GROUP.ok(name, f"{source.path}: {len(files)} file{'s' * (len(files) > 1)}, {size / 1e6:,.1f} MB")


def _launch(recipe: Recipe) -> Iterator[Finding]:
    """How `sft-dist launch` would start it, without starting anything."""
    try:
        plan = plan_launch(recipe, ["recipe.yaml"], Asked())
    except SftDistError as error:
        yield GROUP.problem("launch", str(error), "sft-dist launch recipe.yaml --dry-run shows what it would do")
        return
    engine = plan.words[-1] if "--engine" in plan.words else recipe.train.engine
    said = "; ".join(plan.notes)
    count = plan.num_processes
    processes = f"{count} process{'es' * (count > 1)} on {'GPUs' if plan.on_gpus else 'the CPU'}, engine {engine}"
    yield GROUP.ok("launch", f"sft-dist launch starts {processes}" + (f" ({said})" if said else ""))
    num_examples = recipe.batch.examples
    if num_examples is not None and num_examples < count:
        mend = "raise batch.examples, or start fewer processes (--processes)"
        yield GROUP.problem("batch.examples", f"{num_examples} examples a step for {count} processes", mend)


def training_findings(answer: Answer, group: Group) -> Iterator[Finding]:
    """Attention, and what else training would refuse. answer: of `ask_training`."""
    facts = answer.facts
    if answer.failure or not facts:
        mend = "what is not ok among the versions is the cause; training would end the same way"
        yield group.problem("attention", f"could not be asked: {answer.failure or 'no answer'}", mend)
        return
    others = facts.get("others", {}).items()
    told = "; ".join(f"not {name}: {why}" for name, why in others if why and "this is cpu" not in why)
    told = f" ({told})" if told else ""
    if facts["error"]:
        yield group.problem("attention", facts["error"], f"change that key of the recipe{told}")
        return
    name, difference = facts["attention"], facts["difference"]
    text = f"{name}, {facts['dtype']} on {facts['device']}"
    if difference > TOLERANCE[facts["dtype"]]:
        mend = "use model.attention: sdpa, and report the versions above to the package's makers"
        yield group.problem("attention", f"{text}: documents of a pack are off by {difference:.2g}", mend)
        return
    yield group.ok("attention", f"{text}; two documents in a pack, each as alone within {difference:.1g}{told}")
    if "compiled" in facts:
        yield group.ok("compile", f"decoder layers are {'compiled' if facts['compiled'] else 'not compiled'} here")
