"""The tables of a results file, as Markdown."""

import math
from typing import Any

from gpu.models import CASES, TINY, mfu
from gpu.packs import Counts
from gpu.roofline import Floor
from gpu.sides import NAMES

PARITY = {"bf16": 1e-3, "fp32": 1e-5}
"""Relative difference of losses. bf16 keeps 8 bits of a logit; over thousands of tokens the roundings cancel."""


def render(results: dict[str, Any]) -> str:
    """All tables of what was measured, and what was not with its reason."""
    models = list(dict.fromkeys(name.split("/")[0] for name in results["parts"]))
    texts = [_machine(results)]
    texts += [text for model in models for text in (_rates(results, model), _sides(results, model)) if text]
    texts += [_parity(results, model) for model in models]
    texts += [_profile(results, model) for model in models]
    texts += [_sweep(results, model) for model in models]
    texts.append(_missing(results))
    return "\n\n".join(text for text in texts if text) + "\n"


def side_figures(results: dict[str, Any], model: str, side: str) -> dict[str, Any] | None:
    """The figures of a side's median round, of two the faster; None where no round was measured."""
    rounds = [part["result"] for part in _of(results, f"{model}/side/{side}/").values() if part["status"] == "done"]
    if not rounds:
        return None
    return figures(results, model, sorted(rounds, key=lambda found: found["seconds"])[(len(rounds) - 1) // 2])


def figures(results: dict[str, Any], model: str, found: dict[str, Any]) -> dict[str, Any]:
    """Rates of one measurement. Fractions of the roofline are None where there is none."""
    counts, seconds = Counts(**found["counts"]), found["seconds"]
    case = CASES.get(model, TINY)
    roofline = results["parts"].get(f"{model}/roofline", {}).get("result")
    peak = results["peak_flops"] or (roofline or {}).get("best_flops_per_s")
    flops = counts.flops(case.shape)
    floor = floor_without = None
    if roofline:
        best = Floor(**roofline["floor"])
        floor = best.step(counts, num_steps=found["steps"], checkpointing=found["checkpointing"])
        floor_without = best.step(counts, num_steps=found["steps"], checkpointing="none")
    return {
        "responses_per_s": counts.responses / seconds,
        "tokens_per_s": counts.tokens / seconds,
        "mfu": mfu(flops, seconds, peak) if peak else None,
        "step_s": seconds / found["steps"],
        "of_floor": floor / seconds if floor else None,
        "mode_floor_mfu": mfu(flops, floor, peak) if floor and peak else None,
        "floor_mfu": mfu(flops, floor_without, peak) if floor_without and peak else None,
        "syncs": None if found["syncs"] is None else sum(found["syncs"].values()),
        "peak_bytes": found["peak_bytes"],
        "planned_bytes": found["planned_bytes"],
        "checkpointing": found["checkpointing"],
        "settings": found["settings"],
    }


def parity(ours: list[float], theirs: list[float], *, dtype: str) -> dict[str, Any]:
    """Losses of two sides, step by step; of the first, the weights are the same."""
    differences = [abs(a - b) / abs(a) for a, b in zip(ours, theirs, strict=True)]
    agrees = max(differences) <= PARITY[dtype] and all(math.isfinite(loss) for loss in ours + theirs)
    return {"ours": ours[0], "theirs": theirs[0], "first": differences[0], "worst": max(differences), "agrees": agrees}


def parities(results: dict[str, Any], model: str) -> dict[str, dict[str, Any]]:
    """Each peer's losses against ours, from the first round of each."""
    losses = {
        side: rounds[0]["losses"]
        for side in NAMES
        if (rounds := [p["result"] for p in _of(results, f"{model}/side/{side}/").values() if p["status"] == "done"])
    }
    ours = losses.pop("ours", None)
    return {side: parity(ours, each, dtype=results["dtype"]) for side, each in losses.items()} if ours else {}


def _of(results: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name: part for name, part in results["parts"].items() if name.startswith(prefix)}


def _machine(results: dict[str, Any]) -> str:
    peak = results["peak_flops"]
    against = (
        f"{peak / 1e12:.0f} TFLOP/s, the card's bf16 peak by its data sheet"
        if peak
        else "the fastest matrix multiplication measured here, as this card is not in the table of peaks"
    )
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return f"{results['card']}; {versions}; `{results['command']}`. MFU is against {against}."


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _rates(results: dict[str, Any], model: str) -> str:
    roofline = results["parts"].get(f"{model}/roofline", {}).get("result")
    if not roofline:
        return ""
    rows = [
        [line["name"], f"{line['seconds'] * 1e3:.3f}", f"{line['flops_per_s'] / 1e12:,.3g}"]
        for line in roofline["rates"]
    ]
    copy = f"Copies on the device: {roofline['copy_bytes_per_s'] / 1e12:.3g} TB/s, read and written."
    return f"**{model}, roofline**\n\n" + _table(["what", "ms", "TFLOP/s"], rows) + "\n\n" + copy


def _sides(results: dict[str, Any], model: str) -> str:
    head = ["side", "response tokens/s", "tokens/s", "ours over it", "MFU", "step s", "of the floor", "floor's MFU"]
    head += ["checkpointing", "peak GiB", "planned GiB", "syncs a step"]
    measured = {side: found for side in NAMES if (found := side_figures(results, model, side))}
    ours = measured.get("ours")
    rows = []
    for side, found in measured.items():
        ratio = ours["tokens_per_s"] / found["tokens_per_s"] if ours and side != "ours" else None
        rows.append(
            [
                NAMES[side],
                f"{found['responses_per_s']:,.0f}",
                f"{found['tokens_per_s']:,.0f}",
                f"{ratio:.2f}x" if ratio else "",
                _percent(found["mfu"]),
                f"{found['step_s']:.3f}",
                _percent(found["of_floor"]),
                _floors(found),
                found["checkpointing"],
                _gib(found["peak_bytes"]),
                _gib(found["planned_bytes"]),
                "" if found["syncs"] is None else str(found["syncs"]),
            ]
        )
    settings = [
        f"- {NAMES[side]}: {', '.join(f'{key} {value}' for key, value in found['settings'].items())}"
        for side, found in measured.items()
    ]
    return f"**{model}**\n\n" + _table(head, rows) + "\n\n" + "\n".join(settings) if rows else ""


def _floors(found: dict[str, Any]) -> str:
    if found["mode_floor_mfu"] is None:
        return ""
    with_recompute = f" ({_percent(found['mode_floor_mfu'])} with recompute)" * (found["checkpointing"] != "none")
    return _percent(found["floor_mfu"]) + with_recompute


def _parity(results: dict[str, Any], model: str) -> str:
    rows = [
        [
            NAMES[side],
            f"{found['ours']:.5f}",
            f"{found['theirs']:.5f}",
            f"{found['first']:.1e}",
            f"{found['worst']:.1e}",
            "yes" if found["agrees"] else "NO",
        ]
        for side, found in parities(results, model).items()
    ]
    head = ["side", "our first loss", "its first loss", "relative difference", "worst of all steps", "agree"]
    return f"**{model}, losses**\n\n" + _table(head, rows) if rows else ""


def _profile(results: dict[str, Any], model: str) -> str:
    found = results["parts"].get(f"{model}/profile", {}).get("result")
    if not found:
        return ""
    seconds = found["seconds"]
    groups = [[name, f"{s:.4f}", _percent(s / seconds)] for name, s in found["groups"].items()]
    longest = [
        [f"`{line['name'][:90]}`", str(line["calls"]), f"{line['seconds']:.4f}", _percent(line["seconds"] / seconds)]
        for line in found["longest"]
    ]
    return (
        f"**{model}, where the time of ours goes** ({seconds:.3f} s under the profiler)\n\n"
        + _table(["group", "s", "of the wall"], groups)
        + "\n\n"
        + _table(["kernel", "calls", "s", "of the wall"], longest)
    )


def _sweep(results: dict[str, Any], model: str) -> str:
    rows = []
    for name, part in _of(results, f"{model}/sweep/").items():
        if part["status"] == "done":
            found = figures(results, model, part["result"])
            rates = [f"{found['tokens_per_s']:,.0f}", _percent(found["mfu"]), _percent(found["of_floor"])]
            memory = [_gib(found["peak_bytes"]), _gib(found["planned_bytes"])]
            loss, graphs = part["result"]["losses"][-1], found["settings"]["graphs"]
            rows.append([name.rsplit("/", 1)[1], *rates, *memory, str(graphs), f"{loss:.5f}"])
    head = ["settings", "tokens/s", "MFU", "of the floor", "peak GiB", "planned GiB", "graphs", "last loss"]
    return f"**{model}, settings of ours**\n\n" + _table(head, rows) if rows else ""


def _missing(results: dict[str, Any]) -> str:
    rows = [
        [name, part["status"], part.get("reason", "")]
        for name, part in results["parts"].items()
        if part["status"] != "done"
    ]
    return "**Not measured**\n\n" + _table(["part", "", "why"], rows) if rows else ""


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _gib(size: float | None) -> str:
    return "" if size is None else f"{size / 2**30:.1f}"
