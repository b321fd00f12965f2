"""A training step on one GPU: the card's roofline, then ours and TRL on the same packs, and where the time goes.

Random weights in the shapes of Qwen2.5-1.5B, Qwen3-4B and Qwen3-8B, made on the device; documents as long as chats.
Results are written to a JSON file part by part; a part that fails or does not fit says why, and the rest goes on.

    python benchmarks/gpu_step.py                       everything, in under 8 minutes
    python benchmarks/gpu_step.py --models Qwen3-8B     one model
    python benchmarks/gpu_step.py --sweep               ours under all settings of compile, checkpointing, kernels
    python benchmarks/gpu_step.py --tiny                a tiny model, on a CPU too: that it runs
    python benchmarks/gpu_step.py --report FILE         the tables of an earlier run
"""

import argparse
import functools
import itertools
import json
import os
import platform
import shlex
import sys
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # for all sides; packs differ in size
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil
import torch
from gpu import models, report
from gpu.models import CASES, TINY, Case, Plan
from gpu.packs import make_steps
from gpu.parts import Parts
from gpu.profiling import NUM_STEPS as PROFILED_STEPS
from gpu.profiling import profile_ours
from gpu.roofline import measure_roofline
from gpu.sides import NAMES, SIDES, Measured, Work, default_sides, layers_as_they_were, run_ours

from sft_dist.config import ModelSection
from sft_dist.model.attention import choose_backend
from sft_dist.model.load import compute_dtype
from sft_dist.peaks import peak_flops
from sft_dist.quiet import quiet_libraries

SWEPT = ("compile", "checkpointing", "kernels")
"""Settings of the recipe's section `model` that change how fast a step is, where this version has them."""

SHARES = {"Qwen2.5-1.5B": 0.45, "Qwen3-4B": 0.25, "Qwen3-8B": 0.3}
"""Of the time. What a model leaves over is for the next."""

PACKAGES = ("torch", "transformers", "trl", "liger-kernel", "flash-attn", "triton", "accelerate")


def choices(name: str) -> tuple[str, ...]:
    """The values that a setting of the section `model` takes; none where it is no setting."""
    field = ModelSection.model_fields.get(name)
    return get_args(field.annotation) if field is not None else ()


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--tiny", action="store_true", help="a tiny model instead")
    parser.add_argument("--sides", nargs="+", choices=list(NAMES), help="default: ours, and TRL where it is installed")
    parser.add_argument("--sweep", action="store_true", help="ours under all settings, instead of the sides")
    parser.add_argument("--rounds", type=int, default=2, help="times that the sides take turns")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the clock starts, at least 2")
    parser.add_argument("--steps", type=int, default=4, help="steps that are timed")
    parser.add_argument("--minutes", type=float, default=7.5, help="no part is begun after, or runs on")
    parser.add_argument("--out", type=Path, default=Path("gpu_step.json"), help="results, written as they come")
    parser.add_argument("--report", type=Path, metavar="FILE", help="measure nothing, print the tables of this file")
    parser.add_argument("--dtype", default="auto", choices=choices("dtype"), help="auto: bf16 on a GPU, else fp32")
    for name in (*SWEPT, "attention"):
        if choices(name):
            parser.add_argument(f"--{name}", choices=choices(name), help=f"model.{name} of ours")
    options = parser.parse_args(arguments)
    if options.warmup < 2:
        parser.error(f"--warmup {options.warmup}: at least 2, the last is searched for syncs")
    return options


def main() -> None:
    options = parse(sys.argv[1:])
    if options.report:
        print(report.render(json.loads(options.report.read_text(encoding="utf-8"))))
        return
    if not torch.cuda.is_available() and not options.tiny:
        sys.exit("no CUDA device here; --tiny runs the same path on a tiny model, on this CPU")
    quiet_libraries()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    dtype = compute_dtype(options.dtype, device)
    head = {
        "card": card,
        "memory_bytes": memory_of(device),
        "peak_flops": peak_flops(card) if device.type == "cuda" else None,
        "dtype": "bf16" if dtype == torch.bfloat16 else "fp32",
        "versions": {name: found for name in PACKAGES if (found := installed(name))},
        "command": shlex.join(["python", "benchmarks/gpu_step.py", *sys.argv[1:]]),
    }
    parts = Parts(options.out, device=device, head=head)
    cases = [TINY] if options.tiny else [CASES[name] for name in options.models]
    began, total = time.monotonic(), sum(SHARES.get(case.name, 1.0) for case in cases)
    used = 0.0
    for case in cases:
        used += SHARES.get(case.name, 1.0)
        until = began + 60 * options.minutes * used / total
        measure(case, parts, options, device=device, dtype=dtype, until=until)
    print(report.render(parts.results))
    disagreeing = [
        f"{case.name} {side}"
        for case in cases
        for side, found in report.parities(parts.results, case.name).items()
        if not found["agrees"]
    ]
    if disagreeing:
        sys.exit(f"losses differ from ours, so the sides did not do the same work: {', '.join(disagreeing)}")


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def memory_of(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def measure(
    case: Case, parts: Parts, options: argparse.Namespace, *, device: torch.device, dtype: torch.dtype, until: float
) -> None:
    """All parts of one model, until its share of the time is used."""
    num_steps = options.warmup + max(options.steps, PROFILED_STEPS)
    work = Work(
        case,
        make_steps(case, num_steps=num_steps),
        device=device,
        dtype=dtype,
        warmup=options.warmup,
        timed=options.steps,
    )
    backend = choose_backend(getattr(options, "attention", None) or "auto", device=device, dtype=dtype)
    roofline = functools.partial(measure_roofline, case, work.steps, backend=backend, device=device, dtype=dtype)
    parts.run(f"{case.name}/roofline", roofline, until=until)
    chosen = {name: value for name in (*SWEPT, "attention") if (value := getattr(options, name, None))}
    if options.sweep:
        sweep(work, parts, model=chosen, until=until)
        return
    for number in range(1, options.rounds + 1):
        for side in options.sides or default_sides():
            if number > 1 and side.endswith("_default"):  # many times slower; the others need the time more
                continue
            mode = run_side(f"{case.name}/side/{side}/{number}", side, work, parts, model=chosen, until=until)
            if side == "ours" and number == 1 and mode is not None:
                model = chosen | {"checkpointing": mode}
                parts.run(f"{case.name}/profile", functools.partial(profiled, work, model=model), until=until)


def profiled(work: Work, *, model: dict[str, Any]) -> dict[str, Any]:
    with layers_as_they_were(work.case):
        return profile_ours(work, model=model)


def run_side(part: str, side: str, work: Work, parts: Parts, *, model: dict[str, Any], until: float) -> str | None:
    """One round of one side; returns the mode of checkpointing that it ran under, None where it did not.

    A mode that does not fit after all is a part of its own, and the next is tried.
    """
    tried = plans_of(side, work, memory=parts.results["memory_bytes"], asked=model.get("checkpointing"))
    for plan in tried:
        name = part if plan is tried[0] else f"{part},{plan.checkpointing}"
        if plan.state > parts.results["memory_bytes"]:
            parts.note(name, "does not fit", reason=too_large(plan, work, memory=parts.results["memory_bytes"]))
        elif parts.run(name, functools.partial(measure_side, side, work, plan, model=model), until=until):
            return plan.checkpointing
        elif parts.results["parts"][name]["status"] != "does not fit":
            return None
    return None


def plans_of(side: str, work: Work, *, memory: float, asked: str | None = None) -> list[Plan]:
    """How a side may fill the card. asked: checkpointing of ours, where not the least that fits."""
    modes = {"ours": (asked,) if asked else choices("checkpointing")}
    state = models.our_state_bytes if side == "ours" else models.peer_state_bytes
    return models.plans(
        work.case,
        state=state(work.case, dtype=work.dtype_name),
        room=memory - models.RESERVED_BYTES,
        dtype=work.dtype_name,
        modes=modes.get(side, ("full",) if side.endswith("_default") else ("none", "full")),
    )


def too_large(plan: Plan, work: Work, *, memory: float) -> str:
    parameters = work.case.shape.num_params
    return (
        f"{plan.state / parameters:.0f} bytes for each of {parameters / 1e9:.2f} B parameters are "
        f"{plan.state / 2**30:.0f} GiB, the card has {memory / 2**30:.0f}"
    )


def measure_side(side: str, work: Work, plan: Plan, *, model: dict[str, Any]) -> dict[str, Any]:
    with layers_as_they_were(work.case):
        if side == "ours":
            return described(run_ours(work, model=model | {"checkpointing": plan.checkpointing}), work, plan)
        return described(SIDES[side](work, checkpointing=plan.checkpointing == "full"), work, plan)


def described(measured: Measured, work: Work, plan: Plan) -> dict[str, Any]:
    """A measurement with what was planned, and what the timed steps held."""
    timed = work.steps.batches[work.warmup : work.warmup + work.timed]
    return asdict(measured) | {
        "steps": work.timed,
        "counts": asdict(work.steps.count(timed)),
        "checkpointing": plan.checkpointing,
        "planned_bytes": plan.total,
    }


def sweep(work: Work, parts: Parts, *, model: dict[str, Any], until: float) -> None:
    """Ours under every combination of the settings that this version has."""
    names = [name for name in SWEPT if choices(name)]
    for values in itertools.product(*(choices(name) for name in names)):
        setting = dict(zip(names, values, strict=True))
        if setting.get("compile") == "auto":  # on or off by itself
            continue
        part = f"{work.case.name}/sweep/" + ",".join(f"{name}={value}" for name, value in setting.items())
        run_side(part, "ours", work, parts, model=model | setting, until=until)


if __name__ == "__main__":
    main()
