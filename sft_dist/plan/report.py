"""A plan on a terminal: what the recipe is, a table of all settings by part, stacked bars, and what to take."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sft_dist.console import print_pairs
from sft_dist.plan.memory import PARTS
from sft_dist.plan.planner import Plan, Setting
from sft_dist.status import duration

LOOKS = {
    "weights": ("W", "blue"),
    "gradients": ("G", "cyan"),
    "master": ("M", "green"),
    "moments": ("O", "yellow"),
    "activations": ("A", "red"),
    "logits": ("L", "magenta"),
    "buffers": ("B", "bright_black"),
    "fragmentation": ("F", "white"),
}
"""Letter and colour of a part: a terminal without colours shows the letters."""

SHORT = {
    "weights": "wts",
    "gradients": "grad",
    "master": "mstr",
    "moments": "mom",
    "activations": "act",
    "logits": "log",
    "buffers": "buf",
    "fragmentation": "frag",
}
"""Headings; wider terminals show whole names where they are not longer than numbers are wide."""

WIDE = 100


def print_plan(plan: Plan, console: Console) -> None:
    """All of it; nothing is wider than the console."""
    print_pairs(console, _facts(plan))
    console.print()
    console.print(_table(plan, is_wide=console.width >= WIDE), highlight=False)
    console.print()
    for line in _bars(plan, console):
        console.print(line, no_wrap=True, overflow="crop")
    console.print()
    print_pairs(console, _verdict(plan))


def _facts(plan: Plan) -> Iterator[tuple[str, str]]:
    recipe, machine = plan.recipe, plan.machine
    batch = recipe.batch
    step = f"{batch.examples} examples" if batch.examples is not None else f"{batch.tokens:,} tokens"
    pack = f"packs of up to {recipe.pack_tokens:,} tokens" if batch.packing else "one example a micro-batch"
    yield "model", f"{recipe.model.path}, {plan.shape.all_params / 1e9:,.3f} B parameters, {plan.dtype}"
    yield "machine", f"{machine}, from {machine.source}"
    yield "step", f"{step}, {pack}"
    measured = "checked on CPUs, docs/planning.md" if machine.device == "cpu" else "on GPUs not yet measured"
    yield "memory", f"GB (10^9 bytes) of one process at its fullest moment, counted, {measured}"


def _table(plan: Plan, *, is_wide: bool) -> Table:
    """A row for each engine and checkpointing mode."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("engine", no_wrap=True)
    table.add_column("recomputes" if is_wide else "recomp.", no_wrap=True)
    for part in PARTS:
        heading = part if is_wide and len(part) <= 7 else SHORT[part]
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("total", justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    for setting in plan.settings:
        parts = [_number(setting.need.device[part]) for part in PARTS]
        total = f"{setting.need.device_bytes / 1e9:.1f}"
        row = [setting.engine, setting.checkpointing, *parts, total, "no" if setting.why_not else "yes"]
        table.add_row(*row, style="dim" if setting.why_not else "")
    return table


def _number(size: int) -> str:
    """GB in at most four characters, unless they are ten thousand."""
    return f"{size / 1e9:.0f}" if size >= 99.95e9 else f"{size / 1e9:.1f}"


def _bars(plan: Plan, console: Console) -> Iterator[Text]:
    """One stacked bar a setting, and the memory there is as a line through them; what is over is cut at the edge."""
    label = max(len(name_of(setting)) for setting in plan.settings) + 1
    width = max(20, console.width - label - 9)
    limit = plan.machine.memory_bytes
    largest = max(setting.need.device_bytes for setting in plan.settings)
    scale = width / min(max(largest, 1.05 * limit), 1.6 * limit)
    colours = console.color_system is not None and not console.no_color
    for setting in plan.settings:
        bar = Text(f"{name_of(setting):<{label}}")
        bar.append_text(_bar(setting, scale=scale, width=width, limit=limit, colours=colours))
        bar.append(f" {setting.need.device_bytes / 1e9:6.1f}")
        yield bar
    for parts in (PARTS[:4], PARTS[4:]):
        legend = Text(" " * label)
        for part in parts:
            letter, colour = LOOKS[part]
            legend.append("█ " if colours else f"{letter} ", style=colour)
            legend.append(f"{part}  ")
        yield legend


def _bar(setting: Setting, *, scale: float, width: int, limit: int, colours: bool) -> Text:
    cells: list[tuple[str, str]] = []
    reached = 0.0
    for part in PARTS:
        reached += setting.need.device[part] * scale
        letter, colour = LOOKS[part]
        cells += [("█" if colours else letter, colour)] * (round(reached) - len(cells))
    cells = cells[:width] + [(" ", "")] * (width - len(cells))
    at = min(width - 1, round(limit * scale))
    cells[at] = ("|", "bold")
    if setting.need.device_bytes * scale > width:
        cells[-1] = (">", "bold")
    bar = Text()
    for (letter, style), run in groupby(cells):
        bar.append(letter * len(list(run)), style=style)
    return bar


def name_of(setting: Setting) -> str:
    """Engine and checkpointing mode in few letters."""
    return f"{setting.engine}, {setting.checkpointing}"


def _verdict(plan: Plan) -> Iterator[tuple[str, str]]:
    if plan.fastest is not None:
        need, there = plan.fastest.need, plan.machine.memory_bytes / 1e9
        yield (
            "take",
            f"train.engine={plan.fastest.engine} model.checkpointing={plan.fastest.checkpointing}: the fastest that "
            f"fits, {need.device_bytes / 1e9:.1f} of {there:.1f} GB, fullest in the {need.moment}",
        )
    else:
        yield "take", "nothing fits; set a smaller batch.pack_tokens, or take more or larger GPUs"
    own = plan.own
    why = plan.auto_reason if own.engine != plan.recipe.train.engine else "as the recipe says"
    fits = f"does not fit: {own.why_not}" if own.why_not else f"fits, {own.need.device_bytes / 1e9:.1f} GB"
    yield "the recipe", f"{name_of(own)}, {fits} ({why})"
    for engine, group in groupby(plan.settings, key=lambda setting: setting.engine):
        for setting in group:
            if setting.why_not:
                yield "no", f"{engine}, {setting.checkpointing}: {setting.why_not}"
    yield from _totals(plan)


def _totals(plan: Plan) -> Iterator[tuple[str, str]]:
    """Host memory, disk, work and time of the recipe's own setting."""
    host, machine = plan.own.need.host, plan.machine
    if host:
        parts = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in host.items())
        node = sum(host.values()) * machine.per_node / 1e9
        yield "host memory", f"{node:,.0f} GB a node for {machine.per_node} processes; GB of each: {parts}"
    yield "disk", ", ".join(f"{what} {size / 1e9:,.1f} GB" for what, size in plan.disk.items())
    work = plan.work
    known = [f"{work.tokens:,} tokens"] if work.tokens is not None else []
    known += [f"{work.responses:,} of them trained"] if work.responses is not None else []
    known += [f"{work.steps:,} steps"] if work.steps is not None else []
    yield "work", f"{', '.join(known)} ({work.source})" if known else work.source
    if plan.time is None:
        yield "time", "not known: give --tokens-per-s, or --mfu with a card; a run of this recipe leaves its rate"
    else:
        rate = f"{plan.time.tokens_per_s:,.0f} tokens/s ({plan.time.source})"
        yield "time", rate if plan.time.seconds is None else f"{duration(plan.time.seconds)} at {rate}, without saving"


def to_json(plan: Plan) -> str:
    """All numbers, in bytes and seconds."""

    def setting(each: Setting) -> dict[str, object]:
        return {
            "engine": each.engine,
            "checkpointing": each.checkpointing,
            "device": dict(each.need.device),
            "device_bytes": each.need.device_bytes,
            "host": dict(each.need.host),
            "moment": each.need.moment,
            "fits": not each.why_not,
            "why_not": each.why_not,
        }

    found = {
        "model": plan.recipe.model.path,
        "parameters": plan.shape.all_params,
        "dtype": plan.dtype,
        "machine": asdict(plan.machine),
        "settings": [setting(each) for each in plan.settings],
        "own": setting(plan.own),
        "fastest": setting(plan.fastest) if plan.fastest is not None else None,
        "work": asdict(plan.work),
        "time": asdict(plan.time) if plan.time is not None else None,
        "disk": plan.disk,
    }
    return json.dumps(found, indent=2)
