"""A plan as stacked bars in a picture file."""

from pathlib import Path

from sft_dist.errors import ConfigError
from sft_dist.plan.memory import PARTS
from sft_dist.plan.planner import Plan
from sft_dist.plan.report import name_of

COLOURS = {
    "weights": "#4269d0",
    "gradients": "#6cc5b0",
    "master": "#3ca951",
    "moments": "#efb118",
    "activations": "#ff725c",
    "logits": "#a463f2",
    "buffers": "#9498a0",
    "fragmentation": "#d5d7db",
}


def draw_plan(plan: Plan, path: Path) -> None:
    """Write a .png or .svg file. Raises ConfigError for another kind of file, and without matplotlib."""
    if path.suffix not in (".png", ".svg"):
        raise ConfigError(f"--picture {path}: expected a file that ends in .png or .svg")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "--picture needs the package matplotlib; install it with: pip install 'sft-dist[report]'"
        ) from None
    figure = Figure(figsize=(10, 1.6 + 0.32 * len(plan.settings)), layout="constrained")
    axes = figure.add_subplot()
    names = [name_of(setting) for setting in plan.settings]
    left = [0.0] * len(names)
    for part in PARTS:
        sizes = [setting.need.device[part] / 1e9 for setting in plan.settings]
        axes.barh(names, sizes, left=left, color=COLOURS[part], label=part, height=0.75)
        left = [reached + size for reached, size in zip(left, sizes, strict=True)]
    limit = plan.machine.memory_bytes / 1e9
    axes.axvline(limit, color="black", linewidth=1.5, linestyle="--", label=f"there is: {limit:.0f} GB")
    for index, (setting, total) in enumerate(zip(plan.settings, left, strict=True)):
        mark = "" if setting.why_not else ", fits"
        axes.annotate(
            f"{total:.1f}{mark}",
            (total, index),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(*left, limit))
    axes.set_xlabel("GB of one process at its fullest moment, counted")
    axes.set_title(f"{plan.recipe.model.path} on {plan.machine}, packs of {plan.recipe.pack_tokens:,} tokens")
    figure.legend(loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
