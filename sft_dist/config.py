"""The recipe: what is trained, on what, and how. One YAML file, validated before anything else runs.

A recipe says nothing about processes and hosts (the launcher does) and nothing about ZeRO's
buffer sizes (`configs/deepspeed/*.json` do). Unknown keys are refused with the nearest known name.
"""

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from sft_dist.errors import ConfigError
from sft_dist.evaluate_section import EvaluateSection
from sft_dist.redact import redacted_tree
from sft_dist.section import Section

ENGINES = ("single", "ddp", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
EngineName = Literal["auto", "single", "ddp", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]
LossName = Literal["example_mean", "token_mean"]
ScheduleName = Literal["cosine", "linear", "constant"]
RowFormat = Literal["auto", "messages", "prompt_completion", "alpaca", "sharegpt"]

ORDERS = ("shuffle", "source", "response_length")
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")
HELD_OUT = "held_out"
"""The one held-out set of a recipe that names none."""


def _run_name(name: str) -> str:
    if not RUN_NAME.fullmatch(name):
        raise ValueError(
            "use letters, digits, '.', '_' and '-', starting with a letter or digit, at most 100 characters"
        )
    return name


def _order(order: str) -> str:
    if order not in ORDERS and not re.fullmatch(r"field:\S+", order):
        raise ValueError(f"expected one of {', '.join(ORDERS)}, or field:NAME")
    return order


Order = Annotated[str, AfterValidator(_order)]


class RunSection(Section):
    name: Annotated[str, AfterValidator(_run_name)] = Field(description="the run's directory is dir/name")
    dir: Path = Field(Path("runs"), description="where runs live")
    seed: int = Field(0, ge=0, lt=2**31, description="seeds the draw order and every random number")
    report: bool = Field(True, description="write report.html and curve.png into the run's directory when it ends")

    @property
    def path(self) -> Path:
        return self.dir / self.name


class ModelSection(Section):
    path: str = Field(min_length=1, description="a directory or a hub id, as `from_pretrained` takes it")
    revision: str | None = Field(None, description="a hub commit, branch or tag")
    trust_remote_code: bool = Field(
        False, description="run Python code that comes with the model; needs a commit as `revision`"
    )
    dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="compute dtype; auto: bf16 on GPU, fp32 on CPU. Master weights are fp32"
    )
    attention: Literal["auto", "flash_attention", "flash_attention_3", "flash_attention_4", "torch_varlen", "sdpa"] = (
        Field("auto", description="the backend that keeps packed documents apart; auto takes the first that can run")
    )
    checkpointing: Literal["none", "selective", "full"] = Field(
        "none",
        description="recompute activations in the backward to save memory. selective: all but attention's outputs",
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="compiled decoder layers; auto: on a GPU with a working compiler, but not under ZeRO-3"
    )
    kernels: Literal["torch", "liger"] = Field(
        "torch", description="norm, rotary embedding and SwiGLU: torch's own, or Liger's Triton kernels (GPU)"
    )

    @model_validator(mode="after")
    def _remote_code_is_pinned(self) -> "ModelSection":
        if self.trust_remote_code and self.revision is None:
            raise ValueError(
                "model.trust_remote_code needs model.revision, so that the code that runs is the code you read"
            )
        is_local = Path(self.path).is_dir()
        if self.trust_remote_code and not is_local and not re.fullmatch(r"[0-9a-f]{40}", self.revision or ""):
            raise ValueError(
                "model.trust_remote_code needs a commit as model.revision, 40 hex digits: a branch or a tag can move"
            )
        return self


class Source(Section):
    path: str = Field(
        min_length=1,
        description="a file (.jsonl .json .csv, also .gz or .zst; .parquet), a folder, a glob, or a hub data set id",
    )
    format: RowFormat = Field("auto", description="auto recognises the format from the rows and says which")
    weight: float = Field(
        1.0,
        gt=0,
        le=1000,
        description="copies of the source in an epoch: floor(weight), plus a seeded subset for the fraction",
    )
    cap: int | None = Field(
        None, ge=1, description="at most this many examples of the source in an epoch, another seeded subset each time"
    )
    split: str = Field("train", description="split of a hub data set")
    revision: str | None = Field(None, description="revision of a hub data set")


class DataSection(Section):
    train: tuple[Source, ...] = Field(min_length=1, description="what is trained on")
    held_out: dict[str, tuple[Source, ...]] = Field(
        default_factory=dict,
        description="what is measured and never trained: sources as in data.train, which are the set `held_out`, or "
        "several named sets of them; the first one decides which checkpoint is best unless evaluate.keep_best_by does",
    )
    held_out_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="or: hold this share of data.train out. Rows with equal prompts always fall on the same side",
    )
    held_out_seed: int = Field(0, ge=0, lt=2**31, description="which rows data.held_out_share holds out")
    order: Order = Field(
        "shuffle",
        description="shuffle: a new permutation each epoch. Easy first: source, response_length, or field:NAME, "
        "a number in each row; draws that are equally easy are shuffled",
    )
    turns: Literal["all", "last", "each"] = Field(
        "all",
        description="which assistant turns train. each: every turn is an example of its own, rendered with its history "
        "as at inference, for templates that drop the thinking of earlier turns",
    )
    control_tokens: Literal["neutralise", "error", "trust"] = Field(
        "neutralise",
        description="control tokens in the text of a row: encode them as text, refuse the row, or let them be control",
    )
    max_tokens: int = Field(
        4096, ge=2, le=2**24, description="examples longer than this are too long; part of the data fingerprint"
    )
    too_long: Literal["drop", "truncate", "error"] = Field(
        "drop", description="drop: counted and reported. truncate: leave the oldest turns out until the rest fits"
    )
    bad_rows: Literal["error", "drop"] = Field(
        "error", description="error: the first 20 bad rows are listed and nothing is trained"
    )
    chat_template: Path | None = Field(None, description="a Jinja file to use instead of the tokenizer's own template")
    store: Path | None = Field(None, description="where tokenised data is kept; default: <run.dir>/stores")
    workers: int | None = Field(None, ge=1, le=1024, description="tokeniser processes; default: one per core")

    @property
    def difficulty_field(self) -> str | None:
        """The field of each row that a curriculum sorts by, if the order names one."""
        return self.order.removeprefix("field:") if self.order.startswith("field:") else None

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> "DataSection":
        if self.held_out and self.held_out_share:
            raise ValueError("give either data.held_out or data.held_out_share")
        return self

    @property
    def held_out_sources(self) -> tuple[Source, ...]:
        """The sources of all held-out sets."""
        return tuple(source for sources in self.held_out.values() for source in sources)

    @field_validator("train", mode="before")
    @classmethod
    def _paths_are_sources(cls, value: Any) -> Any:
        """Accept `train: data.jsonl` and `train: [a.jsonl, {path: b, weight: 2}]`."""
        entries = value if isinstance(value, (list, tuple)) else [value]
        return tuple({"path": entry} if isinstance(entry, (str, Path)) else entry for entry in entries)

    @field_validator("held_out", mode="before")
    @classmethod
    def _one_set_or_several(cls, value: Any) -> Any:
        """Accept what `train` does, and `held_out: {clinic: a.jsonl, general: [b.jsonl]}`."""
        is_source = isinstance(value, dict) and "path" in value and not isinstance(value["path"], (dict, list))
        sets = value if isinstance(value, dict) and not is_source else {HELD_OUT: value} if value else {}
        return {name: cls._paths_are_sources(sources) for name, sources in sets.items()}

    @field_validator("held_out")
    @classmethod
    def _sets_are_named_and_not_empty(cls, sets: dict[str, tuple[Source, ...]]) -> dict[str, tuple[Source, ...]]:
        for name, sources in sets.items():
            if not SET_NAME.fullmatch(name):
                raise ValueError(f"the set {name!r}: use letters, digits, '.', '_' and '-', at most 40 characters")
            if not sources:
                raise ValueError(f"the set {name!r} has no source")
        return sets


class BatchSection(Section):
    examples: int | None = Field(None, ge=1, description="examples in a step, over all ranks")
    tokens: int | None = Field(None, ge=1, description="or: examples in draw order until this many tokens are reached")
    pack_tokens: int | None = Field(
        None,
        ge=2,
        description="most tokens in one micro-batch: speed and memory, never the curve. Default: data.max_tokens",
    )
    packing: bool = Field(True, description="false: one example per micro-batch")

    @model_validator(mode="after")
    def _one_measure(self) -> "BatchSection":
        if (self.examples is None) == (self.tokens is None):
            raise ValueError("give either batch.examples or batch.tokens: one of them says what a step is")
        return self


class OptimSection(Section):
    lr: float = Field(gt=0, description="peak learning rate")
    min_lr: float = Field(0.0, ge=0, description="the floor that cosine and linear schedules end at")
    schedule: ScheduleName = "cosine"
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up from 0")
    weight_decay: float = Field(0.0, ge=0, description="not applied to norms and biases")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this global L2 norm")

    @model_validator(mode="after")
    def _floor_below_peak(self) -> "OptimSection":
        if self.min_lr > self.lr:
            raise ValueError(f"optim.min_lr={self.min_lr:g} is above optim.lr={self.lr:g}")
        return self


class TrainSection(Section):
    epochs: int | None = Field(None, ge=1, description="passes over the draws; default 1 unless `steps` is given")
    steps: int | None = Field(None, ge=1, description="or: stop after this many optimizer steps")
    engine: EngineName = Field("auto", description="auto: single for one process, ddp for more")
    deepspeed: Path | None = Field(
        None, description="a DeepSpeed file of ZeRO knobs to use instead of configs/deepspeed/<engine>.json"
    )
    eval_every: int | None = Field(
        None, ge=1, description="steps between held-out losses; also before step 1 and after the last"
    )
    save_every: int | None = Field(
        None, ge=1, description="steps between checkpoints; one is always made after the last step"
    )
    save_in_background: bool = Field(
        True, description="copy to host memory, train on, and write behind; false: training waits for the disk"
    )
    on_save_error: Literal["stop", "go_on"] = Field(
        "stop", description="when a checkpoint cannot be written, as on a full disk; older ones are kept either way"
    )
    keep_checkpoints: int = Field(2, ge=1, description="older ones are deleted after a newer one is committed")
    keep_every: int | None = Field(None, ge=1, description="keep those of every so many steps for ever")
    keep_best: int = Field(
        0, ge=0, description="keep so many with the best held-out loss, or score, measured at their step"
    )
    max_withheld: int = Field(10, ge=1, description="stop when so many updates in a row had to be withheld")
    spike_guard: float | None = Field(
        None, gt=1, description="withhold an update whose loss is above so many times the median of the last 32"
    )
    tensorboard: bool = Field(
        False, description="write event files for TensorBoard into <run>/tensorboard; needs the package tensorboard"
    )
    timeout_s: float = Field(
        1800.0, gt=0, description="longest time without progress on any process, in seconds; then the run is ended"
    )

    @model_validator(mode="after")
    def _one_length(self) -> "TrainSection":
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give either train.epochs or train.steps")
        if self.deepspeed is not None and not self.engine.startswith("zero"):
            raise ValueError(f"train.deepspeed is a file for the zero engines, and train.engine is {self.engine}")
        return self


class WandbSection(Section):
    project: str
    mode: Literal["online", "offline"] = "online"


class Recipe(Section):
    """A whole recipe. `sft-dist config recipe.yaml` prints it with every default filled in."""

    run: RunSection
    model: ModelSection
    data: DataSection
    batch: BatchSection
    loss: LossName = Field(
        "example_mean",
        description="example_mean: -1/N sum_i 1/|y_i| sum_t log P. token_mean: every trained token counts the same",
    )
    optim: OptimSection
    train: TrainSection = Field(default_factory=TrainSection)
    evaluate: EvaluateSection | None = Field(
        None, description="answers generated to the prompts of held-out data and scored; without it, the loss alone"
    )
    wandb: WandbSection | None = None

    @model_validator(mode="after")
    def _what_is_best_is_measured(self) -> "Recipe":
        evaluate = self.evaluate or EvaluateSection()
        best = evaluate.best
        if best.set_name is not None and best.set_name not in self.set_names:
            raise ValueError(
                f"evaluate.keep_best_by={best} names the set {best.set_name!r}; "
                f"data.held_out has {', '.join(self.set_names) or 'none'}"
            )
        if self.train.keep_best and best.is_loss and self.train.eval_every is None:
            raise ValueError("train.keep_best needs train.eval_every: it keeps what the held-out loss calls best")
        if self.train.keep_best and not best.is_loss and evaluate.generate_every is None:
            raise ValueError(f"train.keep_best by {best} needs evaluate.generate_every: scores are of answers")
        if not self.set_names:
            held_out = "data.held_out or data.held_out_share"
            if evaluate.generate_every is not None:
                raise ValueError(f"evaluate.generate_every needs {held_out}: prompts to answer")
            if self.train.eval_every is not None:
                raise ValueError(f"train.eval_every needs {held_out}: it measures their loss")
        return self

    @property
    def set_names(self) -> tuple[str, ...]:
        """The held-out sets by name; the first one decides unless evaluate.keep_best_by says otherwise."""
        return tuple(self.data.held_out) or ((HELD_OUT,) if self.data.held_out_share else ())

    @property
    def pack_tokens(self) -> int:
        return self.batch.pack_tokens or self.data.max_tokens

    @property
    def store_dir(self) -> Path:
        return self.data.store or self.run.dir / "stores"

    def to_yaml(self) -> str:
        """The resolved recipe, every default filled in."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class _UniqueKeys(yaml.SafeLoader):
    """YAML, safe, that refuses a key given twice instead of taking the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply `section.key=value` overrides, whose values are YAML too.

    Raises ConfigError naming file, key, value and mend.
    """
    path = Path(path)
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such recipe; `sft-dist config --list` names those that come with the package"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path}: a recipe is a mapping of sections (run, model, data, ...), this is {type(raw).__name__}"
        )
    for override in overrides:
        _apply_override(raw, override)
    return parse_recipe(raw, origin=str(path))


def parse_recipe(raw: dict[str, Any], *, origin: str) -> Recipe:
    """Validate a recipe given as plain data. Raises ConfigError with one line per problem."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{origin}: {line}" for line in _describe(error))) from None


def recipe_schema() -> str:
    """JSON schema of the recipe, for editors."""
    return json.dumps(Recipe.model_json_schema(), indent=2)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} is not of the form section.key=value, e.g. optim.lr=1e-5")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        parsed = value
    *parents, last = key.split(".")
    node = raw
    for parent in parents:
        if node.get(parent) is None:  # as a resolved recipe says of a section that is not there
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {parent!r} is not a section")
    node[last] = parsed


def _describe(error: ValidationError) -> Iterator[str]:
    problems = error.errors()
    for problem in problems:
        if problem["type"] == "too_short" and len(problems) > 1:
            continue  # an entry of the list was refused already, and is said below
        location = [str(part) for part in problem["loc"]]
        key = ".".join(location) or "recipe"
        given = problem.get("input")
        if problem["type"] == "extra_forbidden":
            known = _known_keys(location[:-1])
            near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
            mend = (
                f"did you mean {'.'.join([*location[:-1], near[0]])!r}?"
                if near
                else f"known keys here: {', '.join(known)}"
            )
            shown = redacted_tree({location[-1]: given})[location[-1]]
            yield f"unknown key {key!r} (value {shown!r}); {mend}"
        elif problem["type"] == "missing":
            yield f"{key!r} is missing; every recipe needs it"
        elif problem["type"] == "value_error":
            reason = str(problem["ctx"]["error"])
            yield f"{key}: {reason}" if isinstance(given, dict) else f"{key}={given!r}: {reason}"
        else:
            yield f"{key}={given!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _known_keys(location: Sequence[str]) -> list[str]:
    section: Any = Recipe
    for part in location:
        if part not in section.model_fields:  # the index of a list, the key of a mapping
            continue
        annotation = section.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), section)
    return list(section.model_fields)
