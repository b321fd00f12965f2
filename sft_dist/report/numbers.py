"""The figures of a run that stand alone: what its tiles and its row in a comparison say."""

import numpy as np

from sft_dist.data.shown import safe
from sft_dist.environment import all_peak_flops
from sft_dist.live.view import flops_text
from sft_dist.report.data import RunData, Series
from sft_dist.report.figures import exact_text, smoothed
from sft_dist.status import duration

GIB = 2**30


def mean_tokens_per_s(run: RunData) -> float | None:
    seconds = sum(line["seconds"] for line in run.steps)
    return sum(line["tokens"] for line in run.steps) / seconds if seconds else None


def flops_per_s(run: RunData) -> float | None:
    """Of all devices, over the steps of the newest start that has done some: an earlier one may have had others."""
    known = [line for line in run.newest_steps if line.get("flops")]
    return sum(line["flops"] for line in known) / sum(line["seconds"] for line in known) if known else None


def utilisation(run: RunData) -> str:
    """MFU where the peak is known, else FLOP/s of a device; empty where neither is."""
    done = flops_per_s(run)
    if done is None:
        return ""
    if peak := all_peak_flops(run.steps_start):
        return f"MFU {done / peak:.1%}"
    environment = run.steps_start.get("environment") or {}
    return f"{flops_text(done / (environment.get('world_size') or 1))} a device"


def last_of(series: Series) -> str:
    return exact_text(float(series[1][-1]), 4) if len(series[1]) else "–"


def least_of(series: Series) -> tuple[str, str]:
    """The least value and its step, as text."""
    steps, values = series
    if not np.isfinite(values).any():
        return "–", ""
    place = int(np.nanargmin(values))
    return exact_text(float(values[place]), 4), f"{int(steps[place]):,}"


def peak_memory(run: RunData) -> float | None:
    """GiB of rank 0."""
    return max((line["peak_memory_bytes"] for line in run.steps), default=0) / GIB or None


def tiles(run: RunData) -> list[dict[str, str]]:
    smooth = smoothed(run.series("loss"))
    first = exact_text(float(smooth[1][0]), 4) if len(smooth[1]) else "–"
    entries = [("Loss", last_of(smooth), f"smoothed; {first} at first")]
    for name, series in list(run.held_out().items())[:2]:
        least, at = least_of(series)
        begun = f"{exact_text(float(series[1][0]), 4)} before; " if series[0][0] == 0 else ""
        title = "Held-out loss" if name == "held_out" else f"Held out: {safe(name)}"
        entries.append((title, last_of(series), f"{begun}least {least} at step {at}"))
    tokens = sum(line["tokens"] for line in run.steps)
    trained = sum(line["response_tokens"] for line in run.steps)
    seconds = sum(line["seconds"] for line in run.steps)
    entries.append(("Tokens", count_text(tokens), f"{trained / tokens:.0%} of them trained" if tokens else ""))
    entries.append(("Time in steps", duration(seconds), f"{len(run.starts) or 1} start{'s' * (len(run.starts) > 1)}"))
    if (speed := mean_tokens_per_s(run)) is not None:
        entries.append(("Tokens per second", f"{speed:,.0f}", utilisation(run)))
    if (peak := peak_memory(run)) is not None:
        planned = sum(run.planned_memory.values()) / GIB
        entries.append(("Peak memory", f"{peak:,.2f} GiB", f"{planned:,.2f} GiB planned" if planned else "of rank 0"))
    if withheld := run.withheld():
        entries.append(("Updates withheld", f"{len(withheld):,}", f"the last at step {withheld[-1]:,}"))
    return [{"name": name, "value": value, "note": note} for name, value, note in entries]


def count_text(count: float) -> str:
    """1,234 as it is, 12,345,678 as "12.3 M"."""
    power, unit = next(((p, u) for p, u in ((1e12, " T"), (1e9, " G"), (1e6, " M")) if count >= p), (1, ""))
    return f"{count / power:.3g}{unit}" if unit else f"{count:,.0f}"
