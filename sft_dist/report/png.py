"""The curve of a run as a PNG, for a paper, a message or a README."""

from itertools import cycle
from pathlib import Path

import numpy as np

from sft_dist.report.charts import held_out_label
from sft_dist.report.data import RunData
from sft_dist.report.figures import decimate, smoothed

INK, MUTED, RAW, SMOOTH = "#1b2126", "#59636d", "#9fb8ad", "#0a6549"
DOTS = ("#a3470a", "#2f5fc4", "#a1266f", "#6b5900", "#007080", "#6a3fc0", "#4d5964")


def write_png(path: Path, run: RunData) -> str:
    """Loss, held-out losses and lr over the steps. Returns "" or, without matplotlib, how to get it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return f"curve: {path.name} is left out, it needs matplotlib; pip install 'sft-dist[report]'"
    figure = Figure(figsize=(9, 5.4), dpi=150, layout="constrained", facecolor="white")
    top, bottom = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
    raw = run.series("loss")
    smooth = smoothed(raw)
    finite = np.isfinite(raw[1])
    top.plot(*decimate((raw[0][finite], raw[1][finite])), color=RAW, linewidth=0.8, label="each step")
    top.plot(*smooth, color=SMOOTH, linewidth=1.8, label="smoothed")
    looks = zip(cycle("osD^v*"), cycle(DOTS), strict=False)  # six and seven: 42 sets before two look alike
    for (name, series), (marker, colour) in zip(run.held_out().items(), looks, strict=False):
        top.plot(*series, marker, color=colour, markersize=5, label=_plain(held_out_label(name)))
    bottom.plot(*run.series("lr"), color=SMOOTH, linewidth=1.5)
    for axes in (top, bottom):
        for step in run.restarts():
            axes.axvline(step, color=MUTED, linewidth=1, linestyle=(0, (5, 4)))
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.grid(axis="y", color="#dde2df", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=MUTED, labelsize=10)
    top.set_ylabel("loss (nats)", color=INK, fontsize=11)
    bottom.set_ylabel("lr", color=INK, fontsize=11)
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    bottom.set_ylim(bottom=0)
    bottom.set_xlabel("step" + ("; dashed: restart" if run.restarts() else ""), color=INK, fontsize=11)
    top.set_title(_plain(run.name), loc="left", color=INK, fontsize=13, fontweight="bold")
    top.legend(frameon=False, fontsize=10, labelcolor=INK)
    figure.savefig(path, metadata={"Software": None})
    return ""


def _plain(text: str) -> str:
    """A dollar sign would begin a formula."""
    return text.replace("$", r"\$")
