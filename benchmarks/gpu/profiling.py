"""Where the time of a step goes: kernels of two steps by group, the longest of them, and the gaps between."""

import contextlib
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gpu.clock import Clock
from gpu.sides import HEAD_RANGE, OPTIMIZER_RANGE, Trainer, Work, our_recipe, our_trainer
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

NUM_STEPS = 2
NUM_LONGEST = 20

GROUPS = (
    ("attention", r"flash|fmha|attention|attn|sdpa"),
    ("GEMM", r"gemm|nvjet|cutlass|cublas|splitk|aten::(mm|addmm|bmm|linear|matmul)"),
    ("copies", r"memcpy|memset|copy|aten::(_to_copy|to|clone|cat|zero_|fill_)|CatArray"),
    ("optimizer", r"adam|multi_tensor|foreach|vector_norm"),
    (
        "norm, rotary, activation",
        r"triton|elementwise|reduce|norm|rope|silu|swiglu|softmax|index|gather|scatter|aten::",
    ),
)
"""A kernel's group is the first whose pattern is in its name; inside of the head or the optimizer, where it ran."""


@dataclass(frozen=True)
class Kernel:
    """A kernel on a GPU, or an operator on a CPU. Microseconds; busy_us is its own, without what it calls."""

    name: str
    start_us: float
    end_us: float
    busy_us: float


def profile_ours(work: Work, *, model: dict[str, Any]) -> dict[str, Any]:
    """Profile NUM_STEPS steps after the warm-up."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (work.device.type == "cuda")
    clock = Clock(work.device)
    with our_trainer(work, our_recipe(work, model)) as trainer, _head_marked(trainer):
        for _ in range(work.warmup):
            trainer.step()
        with profile(activities=activities) as profiler:
            clock.start()
            for _ in range(NUM_STEPS):
                trainer.step()
            seconds = clock.stop()
    kernels, ranges = split_events(profiler.events() or (), on_cuda=work.device.type == "cuda")
    return table_of(kernels, ranges, seconds=seconds)


@contextlib.contextmanager
def _head_marked(trainer: Trainer) -> Iterator[None]:
    """The head's forward holds its whole work: it makes its gradients there."""
    opened: list[record_function] = []

    def begin(_module: nn.Module, _inputs: Any) -> None:
        opened.append(record_function(HEAD_RANGE))
        opened[-1].__enter__()

    def end(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        opened.pop().__exit__(None, None, None)

    head = trainer.engine.model.head
    hooks = [head.register_forward_pre_hook(begin), head.register_forward_hook(end)]
    yield
    for hook in hooks:
        hook.remove()


def split_events(events: Sequence[Any], *, on_cuda: bool) -> tuple[list[Kernel], list[Kernel]]:
    """(kernels, marked stretches) on the device's own time line."""
    wanted = DeviceType.CUDA if on_cuda else DeviceType.CPU
    kernels, ranges = [], []
    for event in events:
        if event.device_type != wanted:
            continue
        start, end = event.time_range.start, event.time_range.end
        if event.name in (HEAD_RANGE, OPTIMIZER_RANGE):
            ranges.append(Kernel(event.name, start, end, 0.0))
        elif not getattr(event, "is_user_annotation", False):
            kernels.append(Kernel(event.name, start, end, end - start if on_cuda else event.self_cpu_time_total))
    return kernels, ranges


def group_of(kernel: Kernel, ranges: Sequence[Kernel]) -> str:
    """The part of a step that a kernel belongs to."""
    place = next((r.name for r in ranges if r.start_us <= kernel.start_us < r.end_us), None)
    if place == OPTIMIZER_RANGE:
        return "optimizer"
    group = next((name for name, pattern in GROUPS if re.search(pattern, kernel.name, re.IGNORECASE)), "other")
    if place == HEAD_RANGE:
        return "head GEMM" if group == "GEMM" else "head softmax"
    return group


def table_of(kernels: Sequence[Kernel], ranges: Sequence[Kernel], *, seconds: float) -> dict[str, Any]:
    """Seconds by group and by name; idle is the wall's time in which no kernel ran."""
    groups: dict[str, float] = defaultdict(float)
    names: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        groups[group_of(kernel, ranges)] += kernel.busy_us / 1e6
        names[kernel.name].append(kernel.busy_us / 1e6)
    idle = max(0.0, seconds - covered_us(kernels) / 1e6)
    longest = sorted(names.items(), key=lambda item: -sum(item[1]))[:NUM_LONGEST]
    return {
        "seconds": seconds,
        "groups": dict(sorted(groups.items(), key=lambda item: -item[1])) | {"idle": idle},
        "longest": [{"name": name, "seconds": sum(each), "calls": len(each)} for name, each in longest],
    }


def covered_us(kernels: Sequence[Kernel]) -> float:
    """Microseconds in which at least one kernel ran."""
    total, reached = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel.start_us):
        total += max(0.0, kernel.end_us - max(reached, kernel.start_us))
        reached = max(reached, kernel.end_us)
    return total
