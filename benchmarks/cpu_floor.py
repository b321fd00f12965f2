"""How fast a step could be, and where its time goes: GEMM rates at the model's own shapes, and ops by what they do."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

from sft_dist.shape import ModelShape

REPEATS = 7
LAYER_GEMMS = "layers, matrix products"
HEAD_GEMMS = "head, matrix products"
HEAD = "head, softmax and loss"
ATTENTION = "attention"
REST = "Python, batches, the profiler itself"
# In this order the first that fits an op, or what the op was called by, says where its time belongs.
GROUPS: dict[str, tuple[str, ...]] = {
    "optimizer": ("Optimizer.", "aten::_fused_adamw"),
    "clipping": ("aten::linalg_vector_norm", "aten::norm", "aten::_foreach_norm", "aten::_foreach_mul", "clip_grad"),
    HEAD: ("_WeightedNLL", "response_head"),
    ATTENTION: ("scaled_dot_product", "flash_attention", "Attention", "attend"),
    "embedding": ("aten::embedding", "EmbeddingBackward"),
}
GEMMS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::matmul", "aten::linear")


def gemm_seconds(shape: ModelShape, *, tokens: int, responses: int) -> dict[str, tuple[float, float]]:
    """Seconds and FLOPs of the matrix products of one step, forward and backward, each measured alone.

    tokens: rows of the layers' matrices. responses: rows of the head.
    """
    layer = [(tokens, *matrix) for matrix in shape.layer_matrices]
    measured = {LAYER_GEMMS: _all_three(layer), HEAD_GEMMS: _all_three([(responses, shape.hidden, shape.vocabulary)])}
    seconds, flops = measured[LAYER_GEMMS]
    return measured | {LAYER_GEMMS: (shape.num_layers * seconds, shape.num_layers * flops)}


def _all_three(matrices: Iterable[tuple[int, int, int]]) -> tuple[float, float]:
    """Seconds and FLOPs of y = x w, dx = dy w^T and dw = x^T dy for each (rows, inputs, outputs)."""
    products = [
        product
        for rows, inputs, outputs in matrices
        for product in ((rows, inputs, outputs), (rows, outputs, inputs), (inputs, rows, outputs))
    ]
    seconds = {product: _product_seconds(*product) for product in dict.fromkeys(products)}
    return sum(seconds[product] for product in products), sum(2.0 * m * k * n for m, k, n in products)


def _product_seconds(m: int, k: int, n: int) -> float:
    """Median CPU time of a product `[m,k] @ [k,n]`."""
    import torch

    left, right, out = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
    taken = []
    for _ in range(1 + REPEATS):
        started = time.process_time()
        torch.mm(left, right, out=out)
        taken.append(time.process_time() - started)
    return median(taken[1:])  # the first one makes the library's own buffers


@contextmanager
def profiled(*, num_steps: int) -> Iterator[dict[str, float]]:
    """Profile the num_steps steps that run inside; what it yields holds, afterwards, CPU seconds a step by group."""
    import torch

    groups: dict[str, float] = {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        started = time.process_time()
        yield groups
        cpu_s = time.process_time() - started
    found = by_group((event.name, _callers(event), event.self_cpu_time_total) for event in profiler.events())
    found[REST] = cpu_s - sum(found.values())
    groups.update({group: seconds / num_steps for group, seconds in found.items()})


def _callers(event: Any) -> list[str]:
    names = []
    while (event := event.cpu_parent) is not None:
        names.append(event.name)
    return names


def by_group(ops: Iterable[tuple[str, Sequence[str], float]]) -> dict[str, float]:
    """Seconds by group. ops: name, the names of what called it, and its own microseconds."""
    seconds: dict[str, float] = {}
    for name, callers, own_us in ops:
        group = group_of(name, callers)
        seconds[group] = seconds.get(group, 0.0) + own_us / 1e6
    return seconds


def group_of(name: str, callers: Sequence[str]) -> str:
    """The group of an op, by its name and the names of what called it."""
    names = (name, *callers)
    for group, marks in GROUPS.items():
        if any(mark in each for mark in marks for each in names):
            return HEAD_GEMMS if group == HEAD and name in GEMMS else group
    return LAYER_GEMMS if name in GEMMS else "layers, element by element"
