"""The README.md of an export: what the model was made from, how, and how good it is, from the files of its run.

Nothing of the machine that trained it goes in: no directory, no host, no secret, no row of the data.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache

from sft_dist import __version__
from sft_dist.config import Recipe
from sft_dist.data.chat import ChatTokenizer
from sft_dist.data.inspect_figures import causes
from sft_dist.data.tokenizer_files import MODEL_CARD
from sft_dist.metrics import read_held_out, read_steps
from sft_dist.redact import redacted, redacted_tree
from sft_dist.run_files import EVALUATION, METRICS, RUN_JSON
from sft_dist.run_record import read_starts

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
LICENSE = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class Weights:
    """What is in an export. steps: those whose weights these are, or whose mean. dtype: as torch calls it."""

    steps: tuple[int, ...]
    dtype: str


def write_card(run_dir: Path, recipe: Recipe, *, weights: Weights, tokenizer: ChatTokenizer) -> str:
    """The card as Markdown. What a run does not know is left out; only the final weights have its evaluation."""
    starts = read_starts(run_dir)
    segments = _read_json(run_dir / RUN_JSON).get("segments") or [{}]
    steps = read_steps(run_dir / METRICS)
    is_final = weights.steps == (starts[-1]["num_steps"],)
    base = base_model(recipe)
    parts = [
        _header(recipe, base),
        f"# {recipe.run.name}",
        _summary(recipe, base, weights, starts),
        _usage(tokenizer),
        _data(recipe, segments),
        _training(recipe, steps, read_held_out(run_dir / METRICS), weights),
        _evaluation(_read_json(run_dir / EVALUATION)) if is_final else "",
        f"## Recipe\n\n```yaml\n{_recipe_text(recipe)}```",
        _environment(starts),
    ]
    return redacted("\n\n".join(part for part in parts if part)) + "\n"


def base_model(recipe: Recipe) -> str | None:
    """The hub id of the model that was trained; None for a directory, also one that is not here any more.

    A model from a hub is in the cache: `demo/model` alone would tell neither from the other.
    """
    path = recipe.model.path
    if not HUB_ID.fullmatch(path) or Path(path).exists():
        return None
    return (
        path if isinstance(try_to_load_from_cache(path, "config.json", revision=recipe.model.revision), str) else None
    )


def license_of(recipe: Recipe) -> str | None:
    """The license that the base model's own card names, if that card is on this machine."""
    path = recipe.model.path
    found = Path(path, MODEL_CARD) if Path(path).is_dir() else None
    if found is None and base_model(recipe):
        cached = try_to_load_from_cache(path, MODEL_CARD, revision=recipe.model.revision)
        found = Path(cached) if isinstance(cached, str) else None
    try:
        text = found.read_text(encoding="utf-8") if found else ""
        header = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return None
    name = header.get("license") if isinstance(header, dict) else None
    return name if isinstance(name, str) and LICENSE.fullmatch(name) else None


def public(value: Any) -> Any:
    """Plain data without secrets, and of paths that say where things lie on a machine only the last part."""
    if isinstance(value, Mapping):
        return {key: public(inner) for key, inner in redacted_tree(value).items()}
    if isinstance(value, (list, tuple)):
        return [public(inner) for inner in value]
    if not isinstance(value, str):
        return value
    parts = PurePath(value).parts
    is_place = bool(parts) and (parts[0] in ("/", "~") or parts[0].startswith("~") or ".." in parts)
    return redacted(parts[-1] if is_place else value)


def _header(recipe: Recipe, base: str | None) -> str:
    fields: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if base:
        fields |= {"base_model": base, "base_model_relation": "finetune"}
    if name := license_of(recipe):
        fields["license"] = name
    fields["tags"] = ["sft", "sft_dist", "conversational"]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def _summary(recipe: Recipe, base: str | None, weights: Weights, starts: Sequence[Mapping[str, Any]]) -> str:
    of = f" of {starts[-1]['num_steps']:,}"
    if len(weights.steps) > 1:
        told = ", ".join(f"{step:,}" for step in weights.steps)
        which = f"These weights are the uniform mean of those after steps {told}{of}"
    else:
        which = f"These are the weights after step {weights.steps[0]:,}{of}"
    revision = f" at revision `{recipe.model.revision}`" if recipe.model.revision else ""
    name = f"[{base}](https://huggingface.co/{base})" if base else f"`{public(recipe.model.path)}`"
    return (
        f"{name}{revision}, all of its weights fine-tuned on chats by sft_dist {__version__}. "
        f"{which}, in {weights.dtype}."
    )


def _usage(tokenizer: ChatTokenizer) -> str:
    stops = ", ".join(f"`{tokenizer.decode([token])}` ({token})" for token in tokenizer.stop_ids)
    return f"""\
## Use

```python
from transformers import pipeline

chat = pipeline("text-generation", model="path/or/name/of/this/model")
answer = chat([{{"role": "user", "content": "..."}}], max_new_tokens=256)
print(answer[0]["generated_text"][-1]["content"])
```

`sft-dist chat DIRECTORY` talks to it in a terminal. Prompts are built with the chat template in
`chat_template.jinja`, the one that the training data was built with. An answer ends with {stops}."""


def _data(recipe: Recipe, segments: Sequence[Mapping[str, Any]]) -> str:
    lines = ["## Data", ""]
    for segment in segments:
        since = f" from step {segment['after_step'] + 1:,}" if len(segments) > 1 else ""
        if "data_fingerprint" in segment:
            lines.append(f"Data fingerprint{since}: `{segment['data_fingerprint']}`; draws: `{segment['draws']}`.")
    meta = _read_json(recipe.store_dir / str(segments[-1].get("data_fingerprint")) / "meta.json")
    if not meta:
        return "\n".join([*lines, "", "The tokenised data is not here any more; no counts can be given."])
    rows = [
        (public(source["path"]), source["format"], source["rows_read"], source["rows_kept"], given.weight)
        for source, given in zip(meta["sources"], recipe.data.train, strict=False)
    ]
    lines += ["", *_table(("source", "format", "rows", "kept", "weight"), rows)]
    dropped = [(cause.name, cause.count) for cause in causes(meta, "dropped")]
    lines += ["", *_table(("dropped for", "rows"), dropped)] if dropped else ["", "No row was dropped."]
    noted = ", ".join(f"{cause.count:,} {cause.name}" for cause in causes(meta, "notes"))
    lines += [f"\nNoted: {noted}."] if noted else []
    share = meta["response_tokens"] / max(1, meta["tokens"])
    lines.append(
        f"\n{meta['examples']:,} examples, {meta['tokens']:,} tokens, of which {meta['response_tokens']:,} "
        f"({share:.1%}) are answers and carry loss."
    )
    return "\n".join(lines)


def _training(
    recipe: Recipe,
    steps: Mapping[int, Mapping[str, Any]],
    held_out: Mapping[int, Mapping[str, Any]],
    weights: Weights,
) -> str:
    """Only what had been trained when these weights were saved."""
    steps = {step: line for step, line in steps.items() if step <= weights.steps[-1]}
    if not steps:
        return ""
    rows = [(f"loss, step {step:,}", _number(steps[step]["loss"])) for step in dict.fromkeys([min(steps), max(steps)])]
    late = [line["loss"] for step, line in sorted(steps.items())[-10:] if line["loss"] is not None]
    rows.append((f"loss, mean of the last {len(late)} steps", _number(sum(late) / len(late) if late else None)))
    measured = {step: line for step, line in held_out.items() if step <= weights.steps[-1]}
    rows += [
        (f"held-out loss, after step {step:,}", _number(measured[step]["held_out_loss"]))
        for step in dict.fromkeys([min(measured), max(measured)] if measured else [])
    ]
    rows.append(("tokens trained on", f"{sum(line['tokens'] for line in steps.values()):,}"))
    rows.append(("of them answers", f"{sum(line['response_tokens'] for line in steps.values()):,}"))
    rows.append(("examples, repeats counted", f"{sum(line['examples'] for line in steps.values()):,}"))
    withheld = sum(not line["applied"] for line in steps.values())
    rows += [("updates withheld", f"{withheld:,}")] if withheld else []
    mean_of = "examples" if recipe.loss == "example_mean" else "answer tokens"
    note = f"Losses are in nats, means over {mean_of} (`loss: {recipe.loss}`)."
    if len(weights.steps) > 1:
        note += " They are the run's, measured before its weights were averaged."
    return "\n".join(["## Training", "", *_table(("", ""), rows), "", note])


def _evaluation(found: Mapping[str, Any]) -> str:
    """The sets of evaluation.json and their tasks; one set without a name where it holds no others."""
    sets = found.get("sets") or ({"held_out": found} if "token_mean" in found else {})
    if not sets:
        return ""
    keys = ("examples", "response_tokens", "example_mean", "token_mean", "perplexity")
    rows = [(name, *(_number(values.get(key)) for key in keys)) for name, values in sets.items()]
    lines = ["## Evaluation", "", *_table(("set", "examples", "answer tokens", *keys[2:]), rows)]
    tasks = [
        (name, task, score.get("metric"), _number(score.get("n")), _scored(score), _scored(score.get("before")))
        for name, values in sets.items()
        for task, score in (values.get("tasks") or {}).items()
    ]
    if tasks:
        lines += ["", *_table(("set", "task", "metric", "n", "score", "before training"), tasks)]
    return "\n".join(lines)


def _scored(score: Mapping[str, Any] | None) -> str:
    """0.500 (0.36 to 0.64)"""
    if not score or score.get("score") is None:
        return ""
    low, high = score.get("ci") or (None, None)
    return f"{score['score']:.3f}" + (f" ({low:.2f} to {high:.2f})" if low is not None and high is not None else "")


def _environment(starts: Sequence[Mapping[str, Any]]) -> str:
    last = starts[-1]
    layout = last.get("layout") or {}
    known = {**(last.get("code") or {}), **{key: layout[key] for key in ("processes", "train.engine") if key in layout}}
    known |= {"device": layout["device"]} if "device" in layout else {}
    for key, value in (last.get("environment") or {}).items():
        # A command is full of paths, and the recipe says what it asked for.
        if isinstance(value, (str, int, float)) and "host" not in key and key != "command":
            known[key] = value
    rows = [(key, public(str(value))) for key, value in known.items()]
    return "\n".join(["## Environment", "", *_table(("", ""), rows)])


def _recipe_text(recipe: Recipe) -> str:
    return yaml.safe_dump(public(recipe.model_dump(mode="json")), sort_keys=False, allow_unicode=True)


def _table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = [headings, ["---"] * len(headings), *rows]
    return ["| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines]


def _cell(value: object) -> str:
    text = f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)
    return " ".join(text.split()).replace("|", "\\|")


def _number(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4f}" if isinstance(value, float) and math.isfinite(value) else "not finite"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
