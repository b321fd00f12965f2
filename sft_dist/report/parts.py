"""What the report says of memory, data, recipe and environment."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from sft_dist.data.chat import ChatTokenizer
from sft_dist.data.inspect_figures import Bins
from sft_dist.data.inspect_page import length_chart, shown_sample
from sft_dist.data.inspect_sample import pick_samples
from sft_dist.data.shown import escape, safe
from sft_dist.redact import redacted
from sft_dist.report.data import RunData
from sft_dist.report.numbers import peak_memory

GIB = 2**30
NUM_SAMPLES = 3


def memory_part(run: RunData) -> dict[str, Any]:
    planned = {safe(str(name)): size / GIB for name, size in run.planned_memory.items()}
    peak = peak_memory(run)
    sizes = dict(planned)
    if planned:
        sizes["planned in all"] = sum(planned.values())
    if planned and peak is not None:
        sizes["peak that was measured"] = peak
    rows = [{"name": name, "value": size, "text": f"{size:,.2f}"} for name, size in sizes.items()]
    kind = "device memory" if run.environment.get("device") == "cuda" else "resident set of the process"
    text = "No step has told of memory." if peak is None else f"Peak of rank 0, {kind}: {peak:,.2f} GiB."
    if not planned:
        text += " run.json has no plan of memory to compare it with."
    return {"rows": rows, "most": max(sizes.values(), default=0), "text": text}


def data_part(run: RunData) -> dict[str, Any]:
    """Lengths and counts as run.json notes them; nothing for a run of before it did."""
    data = run.data
    if not data:
        return {"data_facts": {}, "length_chart": None, "causes": []}
    lengths = data["lengths"]
    bins = Bins(tuple(lengths["edges"]), bool(lengths["is_log"]), int(lengths["cut"]))
    caption = f"Prompt and response together, longest {lengths['longest']:,} tokens."
    return {
        "data_facts": {
            "Examples": f"{data['examples']:,}",
            "Rows": f"{data['rows_kept']:,} kept of {data['rows_read']:,}",
            "Tokens": f"{data['tokens']:,}, {data['response_tokens'] / data['tokens']:.1%} trained",
            "Fingerprint": str(data["fingerprint"]),
            "Store": safe(str(data["store"])),
        },
        "length_chart": length_chart("lengths", "Lengths", lengths["examples"], bins, caption=caption),
        "causes": [
            ("dropped", "Dropped rows", {safe(name): count for name, count in data["dropped"].items()}),
            ("notes", "Notes on rows that were kept", {safe(name): count for name, count in data["notes"].items()}),
        ],
    }


def mask_samples(run: RunData) -> list[dict[str, Any]]:
    """Three examples, drawn token by token; none where the store has gone."""
    store = run.store
    if store is None:
        return []
    tokenizer = ChatTokenizer.load(store.tokenizer_dir)
    samples = pick_samples(store, num_random=NUM_SAMPLES, seed=0, with_extremes=False)
    return [shown_sample(store, sample, tokenizer) for sample in samples]


def environment_facts(run: RunData) -> dict[str, str]:
    """Of the newest start."""
    found, code = run.environment, run.last_start.get("code") or {}
    peak = found.get("peak_flops")
    facts = {
        "Command": found.get("command"),
        "Launcher": found.get("launcher"),
        "Device": found.get("device_name"),
        "Peak": f"{peak / 1e12:,.0f} TFLOP/s dense bf16 a device" if peak else None,
        "Processes": f"{found['world_size']} on {found['hosts']} host(s)" if "world_size" in found else None,
        "Engine": found.get("engine"),
        "Compute": ", ".join(str(found[key]) for key in ("dtype", "attention") if key in found) or None,
        "Versions": ", ".join(f"{name} {version}" for name, version in code.items()) or None,
        "CUDA": found.get("cuda"),
        "System": found.get("system"),
        "Cores": found.get("cores"),
    }
    return {name: safe(redacted(str(value))) for name, value in facts.items() if value is not None}


def shown_starts(run: RunData) -> list[dict[str, str]]:
    rows = []
    for start, before in zip(run.starts, (None, *run.starts), strict=False):
        environment = start.get("environment") or {}
        layout = f", {environment['engine']} on {environment['world_size']}" if "engine" in environment else ""
        why = "" if before is None else str(before.get("ended") or "without a word (killed, or finished)")
        rows.append(
            {
                "attempt": f"{start['attempt']}",
                "time": safe(str(start.get("time", ""))),
                "host": safe(str(start.get("host", ""))),
                "layout": safe(layout),
                "first": f"{int(start['after_step']) + 1:,}",
                "why": safe(redacted(why)),
            }
        )
    return rows


def recipe_text(run: RunData) -> str:
    """The resolved recipe; its secrets were taken out when it was read."""
    return escape(yaml.safe_dump(dict(run.recipe), sort_keys=False, allow_unicode=True)) if run.recipe else ""


def flat(recipe: Any, key: str = "") -> dict[str, str]:
    """A recipe as `section.key: value`."""
    if isinstance(recipe, Mapping):
        parts = [flat(value, f"{key}.{name}".lstrip(".")) for name, value in recipe.items()]
    elif isinstance(recipe, list) and recipe and isinstance(recipe[0], Mapping):
        parts = [flat(value, f"{key}[{place}]") for place, value in enumerate(recipe)]
    else:
        return {key: safe(_plain(recipe))}
    return {name: text for part in parts for name, text in part.items()}


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and math.isfinite(value) else "–" if value is None else str(value)


def differences(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """Keys of the recipes whose values are not the same everywhere; the run's own name is no difference."""
    recipes = [flat(run.recipe) for run in runs]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe if key not in ("run.name", "run.dir"))
    return [
        {"key": key, "cells": [(run.name, recipe.get(key, "–")) for run, recipe in zip(runs, recipes, strict=True)]}
        for key in keys
        if len({recipe.get(key) for recipe in recipes}) > 1
    ]
