"""Scaling on paper: the time of a step on 8 to 1024 GPUs, from an assumed MFU, bytes moved and the speed of links.

    python benchmarks/scaling.py            print the tables of docs/scaling.md
    python benchmarks/scaling.py --write    put them there, and draw docs/scaling.svg (needs matplotlib)

Nothing here was measured on GPUs: docs/scaling.md says what is assumed, and how far published runs agree.
Seconds, bytes and elements throughout; a GPU is a rank.
"""

import argparse
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from sft_dist.data.schedule import CostModel, spread
from sft_dist.shape import ModelShape

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "scaling.md"

WORLD_SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
ASSUMED_MFU = 0.45
PACK_TOKENS = 16_384
WEAK_EXAMPLES = 60  # per GPU and step: two micro-batches
STRONG_EXAMPLES = 512  # per step, however many GPUs
RESPONSE_SHARE = 0.3

LINK_SHARE = 0.8  # of a link's rated speed that a collective reaches on large messages
OVERLAP = 0.9  # of a transfer that can hide behind computing: the first gather and the last reduction cannot
NVLINK_HOP, NETWORK_HOP = 3.4e-6, 14e-6  # a step of a ring in NCCL's own cost table, protocol Simple
WEIGHT_BYTES = 2
# Gradient norm reads 4, clipping 8, AdamW reads 16 and writes 12 of fp32, the bf16 weights are 2.
OPTIMIZER_BYTES = 42


@dataclass(frozen=True)
class Machine:
    """Rated speeds of a GPU and its links, each link in one direction."""

    peak_flops: float
    memory: float
    nvlink: float
    network: float
    gpus_per_host: int = 8


H100 = Machine(peak_flops=989e12, memory=3.35e12, nvlink=450e9, network=50e9)
H100_SLOW = replace(H100, network=12.5e9)
A100 = Machine(peak_flops=312e12, memory=1.555e12, nvlink=300e9, network=25e9)


@dataclass(frozen=True)
class Sharding:
    """A ZeRO stage as configs/deepspeed sets it. gather, reduce: most elements of a message."""

    stage: int
    gather: float
    reduce: float
    gradient_bytes: int = 4


@dataclass(frozen=True)
class Transfer:
    """A tensor of `size` bytes, all-gathered, reduce-scattered or all-reduced over all GPUs in so many messages."""

    collective: str
    size: float
    messages: int
    when: str  # forward or backward: of every micro-batch; end: once a step, with nothing to hide behind

    def sent_bytes(self, world_size: int) -> float:
        """Bytes that each GPU sends, and receives, in a ring."""
        passes = 2 if self.collective == "all-reduce" else 1
        return passes * self.size * (world_size - 1) / world_size

    def seconds(self, world_size: int, machine: Machine) -> float:
        """The slower of both kinds of link, which work at the same time, and the latency of the messages.

        A host receives the parts of the other hosts over the network once, its GPUs side by side.
        """
        local = min(world_size, machine.gpus_per_host)
        hosts = world_size / local
        passes = 2 if self.collective == "all-reduce" else 1
        inside = self.sent_bytes(world_size) / machine.nvlink
        between = passes * self.size * (hosts - 1) / hosts / local / machine.network
        hop = (world_size - hosts) * NVLINK_HOP + (hosts - 1) * NETWORK_HOP
        if passes == 2:  # NCCL has trees for all-reduce only
            hop = min(hop, (local - 1) * NVLINK_HOP + math.log2(hosts) * NETWORK_HOP)
        return max(inside, between) / LINK_SHARE + self.messages * passes * hop


@dataclass(frozen=True)
class Work:
    """What a GPU computes in a step, on average; imbalances are the slowest GPU's over that."""

    flops: float
    micro_steps: int
    imbalance_of_ranks: float = 1.0
    imbalance_of_micro_steps: float = 1.0


@dataclass(frozen=True)
class Step:
    """Where the time of a step goes, in seconds."""

    compute: float
    waiting: float
    communication: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.compute + self.waiting + self.communication + self.optimizer

    @property
    def efficiency(self) -> float:
        """The share of the step in which all GPUs compute."""
        return self.compute / self.total


def zero(stage: int) -> Sharding:
    """What DeepSpeed does with bf16 weights and this project's settings."""
    knobs = json.loads((ROOT / f"configs/deepspeed/zero{stage}.json").read_text(encoding="utf-8"))["zero_optimization"]
    if stage == 1:
        # Its optimizer for bf16 with fp32 gradients takes neither bucket size: 500 million elements, a built-in number.
        return Sharding(1, math.inf, 5e8)
    return Sharding(stage, knobs.get("stage3_prefetch_bucket_size", math.inf), knobs["reduce_bucket_size"])


def transfers(sharding: Sharding, num_params: int) -> tuple[Transfer, ...]:
    """What moves: stage 1 reduces once a step, 2 and 3 every micro-batch; stage 3 also gathers weights twice there."""
    gradients = sharding.gradient_bytes * num_params
    reductions = math.ceil(num_params / sharding.reduce)
    weights = WEIGHT_BYTES * num_params
    if sharding.stage == 3:
        gathers = math.ceil(num_params / sharding.gather)
        return (
            Transfer("all-gather", weights, gathers, "forward"),
            Transfer("all-gather", weights, gathers, "backward"),
            Transfer("reduce-scatter", gradients, reductions, "backward"),
        )
    return (
        # DeepSpeed's stage 2 all-reduces whole buckets, and each rank keeps its part.
        Transfer("all-reduce", gradients, reductions, "backward" if sharding.stage == 2 else "end"),
        Transfer("all-gather", weights, 2, "end"),  # one message for each parameter group
    )


def step_time(
    work: Work, sharding: Sharding, num_params: int, machine: Machine, world_size: int, mfu: float, overlap: float
) -> Step:
    """The time of one step. mfu: of forward and backward alone, on one GPU; what is recomputed lowers it."""
    compute = work.flops / (mfu * machine.peak_flops)
    windows = {"forward": compute / 3 / work.micro_steps, "backward": 2 * compute / 3 / work.micro_steps, "end": 0.0}
    communication = 0.0
    for when, window in windows.items():
        seconds = sum(t.seconds(world_size, machine) for t in transfers(sharding, num_params) if t.when == when)
        times = 1 if when == "end" else work.micro_steps
        communication += times * (seconds - min(overlap * seconds, window))
    # A collective in every micro-batch makes each of them a barrier.
    imbalance = work.imbalance_of_ranks if sharding.stage == 1 else work.imbalance_of_micro_steps
    optimizer = OPTIMIZER_BYTES * num_params / world_size / machine.memory
    return Step(compute, (imbalance - 1) * compute, communication, optimizer)


def state_bytes(stage: int, num_params: int, world_size: int) -> float:
    """Weights, gradients, master weights and moments on a GPU; without activations and buckets."""
    # Whole under stage 1: bf16 weights and gradients, and the fp32 sums of gradients; under stage 2: bf16 weights.
    whole, sharded = {1: (8, 12), 2: (2, 16), 3: (0, 18)}[stage]
    return num_params * (whole + sharded / world_size)


def chat_lengths(num_examples: int) -> NDArray[np.int64]:
    """Lengths like those of chats: log-normal, median 350, at most 4096; the same everywhere."""
    # Only `random()`, whose numbers no version of numpy changes.
    uniform = np.random.Generator(np.random.PCG64(0)).random(num_examples)
    normal = np.array([NormalDist().inv_cdf(u) for u in uniform])
    lengths: NDArray[np.int64] = np.clip(350 * np.exp(0.8 * normal), 16, 4096).astype(np.int64)
    return lengths


@cache
def chat_work(shape: ModelShape, num_examples: int, world_size: int) -> Work:
    """A step of chats, laid out by the real schedule."""
    lengths = chat_lengths(num_examples)
    sizes = {"lengths": lengths, "num_responses": (RESPONSE_SHARE * lengths).astype(np.int64)}
    cost = CostModel.from_shape(shape)
    ids = np.arange(num_examples)
    micro_steps, imbalance = spread(ids, **sizes, world_size=world_size, pack_tokens=PACK_TOKENS, cost=cost)
    costs = cost.of(*sizes.values())
    ranks = [sum(costs[list(row[rank])].sum() for row in micro_steps) for rank in range(world_size)]
    tokens, responses = (int(values.sum()) for values in sizes.values())
    flops = shape.step_flops(tokens=tokens, responses=responses, sum_squares=int((lengths**2).sum()))
    return Work(flops / world_size, len(micro_steps), float(max(ranks) * world_size / costs.sum()), imbalance)


MODELS = {
    "Qwen2.5-1.5B": ModelShape(28, 1536, 12, 2, 128, 8960, 151_936, is_tied=True),
    "Qwen3-4B": ModelShape(36, 2560, 32, 8, 128, 9728, 151_936, is_tied=True),
    "Qwen3-8B": ModelShape(36, 4096, 32, 8, 128, 12_288, 151_936, is_tied=False),
}


@dataclass(frozen=True)
class Published:
    """A published run with fully sharded data parallelism, one message for each layer.

    points: GPUs -> (tokens/s a GPU, sequences of a micro-batch, micro-batches a step).
    """

    name: str
    shape: ModelShape
    machine: Machine
    sequence: int
    gradient_bytes: int
    points: Mapping[int, tuple[float, int, int]]

    def predict(self, world_size: int, mfu: float) -> float:
        """Tokens/s a GPU."""
        _, sequences, micro_steps = self.points[world_size]
        tokens = self.sequence * sequences * micro_steps
        flops = self.shape.step_flops(tokens=tokens, responses=tokens, sum_squares=tokens * self.sequence)
        layer = self.shape.num_params / self.shape.num_layers
        sharding = Sharding(3, layer, layer, self.gradient_bytes)
        work, num_params = Work(flops, micro_steps), self.shape.num_params
        return tokens / step_time(work, sharding, num_params, self.machine, world_size, mfu, OVERLAP).total

    def calibrated_mfu(self) -> float:
        """The MFU with which the smallest point comes out right, by bisection."""
        smallest = min(self.points)
        low, high = 0.01, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if self.predict(smallest, middle) < self.points[smallest][0] else (low, middle)
        return low


def mpt(layers: int, hidden: int) -> ModelShape:
    """MPT has two matrices of 4H in its MLP: as many elements as three of 8H/3."""
    return ModelShape(layers, hidden, hidden // 128, hidden // 128, 128, round(8 * hidden / 3), 50_368, True)


LLAMA_8B = ModelShape(32, 4096, 32, 8, 128, 14_336, 128_256, is_tied=False)
# fmt: off
PUBLISHED = (
    Published("MPT-1B, A100", mpt(24, 2048), A100, 2048, 2, {
        8: (19_271, 8, 8), 16: (19_085, 8, 1), 32: (15_555, 10, 1), 64: (19_001, 10, 1), 128: (18_647, 10, 1)}),
    Published("MPT-3B, A100", mpt(32, 2560), A100, 2048, 2, {
        8: (10_065, 5, 8), 16: (9_750, 5, 1), 32: (9_914, 6, 1), 64: (9_736, 6, 1), 128: (9_538, 6, 1)}),
    Published("MPT-7B, A100", mpt(32, 4096), A100, 2048, 2, {
        8: (3_679, 12, 4), 16: (3_645, 16, 1), 32: (3_725, 18, 1), 64: (3_665, 18, 1), 128: (3_623, 18, 1)}),
    Published("MPT-1B, H100", mpt(24, 2048), H100, 2048, 4, {
        8: (45_455, 14, 1), 16: (46_037, 20, 1), 32: (45_130, 20, 1), 64: (44_402, 20, 1)}),
    Published("MPT-3B, H100", mpt(32, 2560), H100, 2048, 4, {
        16: (24_142, 10, 3), 32: (23_021, 6, 3), 64: (22_525, 6, 3)}),
    Published("MPT-13B, H100", mpt(40, 5120), H100, 2048, 4, {
        8: (4_792, 2, 1), 16: (4_767, 2, 1), 32: (4_811, 2, 1), 64: (4_800, 2, 1)}),
    Published("Llama-8B, H100", LLAMA_8B, H100, 8192, 4, {8: (5_762, 2, 1), 128: (5_605, 2, 1)}),
    Published("Llama-8B compiled, H100", LLAMA_8B, H100, 8192, 4, {8: (6_667, 2, 1), 128: (6_514, 2, 1)}),
)
# fmt: on


def chat_step(
    model: str,
    stage: int,
    world_size: int,
    *,
    strong: bool = False,
    machine: Machine = H100,
    mfu: float = ASSUMED_MFU,
    overlap: float = OVERLAP,
) -> Step:
    """A step of chats: so many a step if strong, so many a GPU if not."""
    shape = MODELS[model]
    work = chat_work(shape, STRONG_EXAMPLES if strong else WEAK_EXAMPLES * world_size, world_size)
    return step_time(work, zero(stage), shape.num_params, machine, world_size, mfu, overlap)


def table(header: str, rows: Iterable[Sequence[object]]) -> str:
    columns = header.split(" | ")
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def published_table() -> str:
    rows = []
    for run in PUBLISHED:
        mfu, smallest = run.calibrated_mfu(), min(run.points)
        for world_size, (measured, sequences, micro_steps) in run.points.items():
            row = [run.name, world_size, f"{sequences} x {micro_steps}", f"{measured:,}"]
            if world_size == smallest:
                rows.append([*row, f"(MFU {mfu:.1%})", "", ""])
                continue
            predicted = run.predict(world_size, mfu)
            errors = [f"{value / measured - 1:+.1%}" for value in (predicted, run.points[smallest][0])]
            rows.append([*row, f"{predicted:,.0f}", *errors])
    return table(
        "run | GPUs | micro-batch x accumulation | published tokens/s a GPU | predicted | error | "
        'error of "as on the fewest GPUs"',
        rows,
    )


def moved_table(world_size: int = 64) -> str:
    rows = []
    for model, shape in MODELS.items():
        for stage in (1, 2, 3):
            moves = transfers(zero(stage), shape.num_params)
            often, once = ([t for t in moves if (t.when == "end") == is_end] for is_end in (False, True))
            sent = [f"{sum(t.sent_bytes(world_size) for t in group) / 1e9:.1f}" for group in (often, once)]
            messages = [sum(t.messages for t in group) for group in (often, once)]
            states = [f"{state_bytes(stage, shape.num_params, n) / 2**30:.1f}" for n in (8, 64, 1024)]
            rows.append([model, f"ZeRO-{stage}", sent[0], messages[0], sent[1], messages[1], *states])
    return table(
        "model | engine | GB a micro-batch | messages | GB once a step | messages | state GiB, 8 GPUs | 64 | 1024", rows
    )


def steps_table(*, strong: bool) -> str:
    rows = []
    for model, shape in MODELS.items():
        for n in WORLD_SIZES:
            work = chat_work(shape, STRONG_EXAMPLES if strong else WEAK_EXAMPLES * n, n)
            fast, slow = (
                [chat_step(model, stage, n, strong=strong, machine=machine) for stage in (1, 2, 3)]
                for machine in (H100, H100_SLOW)
            )
            times = [f"{step.total:.2f} s, {step.efficiency:.0%}" for step in fast]
            imbalance = f"{work.imbalance_of_micro_steps:.2f}"
            rows.append([model, n, work.micro_steps, imbalance, *times, *(f"{step.efficiency:.0%}" for step in slow)])
    return table(
        "model | GPUs | micro-batches | imbalance | ZeRO-1 | ZeRO-2 | ZeRO-3 | 100 Gbit/s: ZeRO-1 | ZeRO-2 | ZeRO-3",
        rows,
    )


def sweep_table() -> str:
    cases = [(model, n) for model in ("Qwen2.5-1.5B", "Qwen3-8B") for n in (64, 512)]
    settings = [(mfu, OVERLAP) for mfu in (0.3, 0.45, 0.6)] + [(ASSUMED_MFU, overlap) for overlap in (0.5, 0.0)]
    rows = []
    for mfu, overlap in settings:
        row = [f"{mfu:.0%}", f"{overlap:.0%}"]
        for model, n in cases:
            steps = [chat_step(model, stage, n, mfu=mfu, overlap=overlap) for stage in (1, 2, 3)]
            row.append(", ".join(f"{step.efficiency:.0%}" for step in steps))
        rows.append(row)
    return table(" | ".join(["assumed MFU", "overlap", *(f"{model}, {n} GPUs" for model, n in cases)]), rows)


def tables() -> dict[str, str]:
    return {
        "published": published_table(),
        "moved": moved_table(),
        "weak": steps_table(strong=False),
        "strong": steps_table(strong=True),
        "sweep": sweep_table(),
    }


def write(page: Path) -> None:
    """The tables in the page, between their marks, and the plot beside it."""
    text = page.read_text(encoding="utf-8")
    for name, lines in tables().items():
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", rf"\g<1>{lines}\n\g<2>", text, flags=re.DOTALL)
    page.write_text(text, encoding="utf-8")
    draw(page.with_suffix(".svg"))


def draw(file: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    # Grey text on no background: readable on white and on black.
    for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"):
        pyplot.rcParams[key] = "#808080"
    pyplot.rcParams.update({"svg.hashsalt": "scaling", "svg.fonttype": "none", "font.size": 9})
    figure, grid = pyplot.subplots(2, len(MODELS), figsize=(9, 4.8), sharex=True, sharey=True, layout="constrained")
    for axes, strong in zip(grid, (False, True), strict=True):
        for axis, model in zip(axes, MODELS, strict=True):
            for stage, colour in zip((1, 2, 3), ("#d97706", "#2f81f7", "#2da44e"), strict=True):
                for machine, style in ((H100, "-"), (H100_SLOW, ":")):
                    shares = [
                        chat_step(model, stage, n, strong=strong, machine=machine).efficiency for n in WORLD_SIZES
                    ]
                    label = f"ZeRO-{stage}, {machine.network * 8e-9:.0f} Gbit/s"
                    axis.plot(WORLD_SIZES, [100 * share for share in shares], style, color=colour, label=label)
            axis.set(xscale="log", ylim=(0, 100), xticks=WORLD_SIZES[::2], xticklabels=WORLD_SIZES[::2])
            axis.minorticks_off()
            axis.grid(color="#808080", alpha=0.25)
            if not strong:
                axis.set_title(model, fontsize=9)
    grid[0][0].set_ylabel("efficiency, %\n60 chats a GPU")
    grid[1][0].set_ylabel("efficiency, %\n512 chats a step")
    grid[1][1].set_xlabel("GPUs")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(file, transparent=True, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--write",
        nargs="?",
        type=Path,
        const=DOCS,
        metavar="PAGE",
        help="put the tables into docs/scaling.md, or a copy of it, and draw the plot beside it",
    )
    page: Path | None = parser.parse_args().write
    if page is None:
        print("\n\n".join(tables().values()))
    else:
        write(page)


if __name__ == "__main__":
    main()
