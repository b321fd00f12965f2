"""The schedule against other ways to lay out a step, and its seconds. Prints the tables of docs/schedule.md.

    python benchmarks/schedule.py          seconds and balance: pure numpy, half a minute
    python benchmarks/schedule.py --fit    costs fitted to a small model's packs, timed here: three minutes

Balance is the sum over micro-steps of the slowest rank's cost over the ideal, total cost / ranks: 1 is perfect. Costs
are those of Qwen2.5-1.5B. Every way gets the same lengths, and the same number of examples a step.
"""

import argparse
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from prepare_vs_trl import machine

from sft_dist.data.draws import Pool
from sft_dist.data.schedule import CostModel, Schedule, dominated_steps, spread
from sft_dist.shape import ModelShape

QWEN = ModelShape(
    num_layers=28,
    hidden=1536,
    num_heads=12,
    num_key_value_heads=2,
    head_dim=128,
    intermediate=8960,
    vocabulary=151_936,
    is_tied=True,
)
COST = CostModel.from_shape(QWEN)
NUM_STEPS = 40
WINDOW = 1000  # rows that TRL packs at a time
Array = NDArray[np.int64]
Rows = list[list[list[int]]]
"""rows[m][rank]: places of the examples that `rank` runs in micro-step m."""


@dataclass(frozen=True)
class Lengths:
    """Log-normal lengths. median, longest: tokens; sigma: of the logarithm."""

    name: str
    median: float
    sigma: float
    longest: int
    pack_tokens: int

    def draw(self, num: int, *, seed: int) -> tuple[Array, Array]:
        """Tokens and trained tokens of each example."""
        rng = np.random.default_rng(seed)
        lengths = np.clip(self.median * np.exp(self.sigma * rng.standard_normal(num)), 16, self.longest)
        return lengths.astype(np.int64), np.maximum(1, lengths * rng.beta(2, 3, num)).astype(np.int64)


CHAT = Lengths("chat, up to 4k, packs of 8k", 400, 0.8, 4096, 8192)
CHAT_16K = Lengths("chat, up to 4k, packs of 16k", 400, 0.8, 4096, 16384)
LONG_TAIL = Lengths("long tail, up to 32k, packs of 32k", 490, 1.35, 32768, 32768)
LONG_TAIL_64K = Lengths("long tail, up to 32k, packs of 64k", 490, 1.35, 32768, 65536)
KINDS = (CHAT, CHAT_16K, LONG_TAIL, LONG_TAIL_64K)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="time a small model's packs instead")
    options = parser.parse_args()
    for lines in (fit_report(),) if options.fit else (seconds_table(), balance_table(), window_table(), large_table()):
        print("\n".join(lines), end="\n\n", flush=True)
    packages = [f"{package} {version(package)}" for package in (("torch", "numpy") if options.fit else ("numpy",))]
    print(f"{machine()}; {', '.join(packages)}; `python {shlex.join(sys.argv)}`")


# Ways to lay out a step


def best_fit(lengths: Sequence[int], pack_tokens: int) -> list[list[int]]:
    """Packs of places: the longest first, into the fullest pack that has room."""
    packs: list[list[int]] = []
    room = np.full(len(lengths), pack_tokens)  # of packs not opened yet, too
    for place in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        has_room = np.where(room[: len(packs) + 1] >= lengths[place], room[: len(packs) + 1], pack_tokens + 1)
        pack = int(has_room.argmin())
        if pack == len(packs):
            packs.append([])
        packs[pack].append(place)
        room[pack] -= lengths[place]
    return packs


def next_fit(places: Sequence[int], lengths: Sequence[int], pack_tokens: int) -> list[list[int]]:
    """Packs of `places` in their order: a new one where the next example has no room."""
    packs: list[list[int]] = []
    room = 0
    for place in places:
        if lengths[place] > room:
            packs.append([])
            room = pack_tokens
        packs[-1].append(place)
        room -= lengths[place]
    return packs


def deal(packs: list[list[int]], world_size: int) -> Rows:
    """Packs in their order, to one rank after another."""
    packs = packs + [[] for _ in range(-len(packs) % world_size)]
    return [packs[first : first + world_size] for first in range(0, len(packs), world_size)]


def best_fit_then_dealing(lengths: Sequence[int], world_size: int, pack_tokens: int) -> Rows:
    """A step's examples packed as tightly as they go, and the packs dealt out."""
    return deal(best_fit(lengths, pack_tokens), world_size)


def random_dealing(lengths: Sequence[int], world_size: int, pack_tokens: int) -> Rows:
    """Examples dealt to ranks as they are drawn; each rank packs its own in that order."""
    of_rank = [next_fit(range(rank, len(lengths), world_size), lengths, pack_tokens) for rank in range(world_size)]
    num_rows = max(map(len, of_rank))
    return [[packs[m] if m < len(packs) else [] for packs in of_rank] for m in range(num_rows)]


def windowed_packs(lengths: Array, pack_tokens: int, *, seed: int) -> Iterator[list[int]]:
    """Packs as TRL makes them: best-fit in windows of a thousand rows, then all shuffled."""
    packs = [
        [first + place for place in pack]
        for first in range(0, len(lengths), WINDOW)
        for pack in best_fit(lengths[first : first + WINDOW].tolist(), pack_tokens)
    ]
    yield from (packs[index] for index in np.random.default_rng(seed).permutation(len(packs)))


def imbalance(rows: Rows, costs: NDArray[np.float64], world_size: int) -> float:
    """Sum over micro-steps of the slowest rank's cost over the ideal."""
    loads = np.array([[costs[pack].sum() if pack else 0.0 for pack in row] for row in rows])
    return float(loads.max(axis=1).sum() * world_size / loads.sum())


def lower_bound(lengths: Array, costs: NDArray[np.float64], *, world_size: int, pack_tokens: int) -> float:
    """What no layout of these examples can be better than, as `imbalance` counts.

    A rank runs the costliest example; some rank runs j+1 of the j*world_size+1 costliest; and beside the costliest, the
    other ranks have room for so many tokens only, in the best case those that cost most for their length.
    """
    total, ranked = costs.sum(), np.sort(costs)[::-1]
    shared = [ranked[j * world_size - j : j * world_size + 1].sum() for j in range((len(costs) - 1) // world_size + 1)]
    dense = np.argsort(-costs / lengths, kind="stable")
    dense = dense[dense != costs.argmax()]
    beside = np.diff(np.minimum(np.cumsum(lengths[dense]), (world_size - 1) * pack_tokens), prepend=0)
    cost_beside = min((beside * costs[dense] / lengths[dense]).sum(), (world_size - 1) * ranked[0])
    capped = ranked[0] + max(0.0, total - ranked[0] - cost_beside) / world_size
    return float(max(total / world_size, capped, *shared) * world_size / total)


@dataclass(frozen=True)
class Cell:
    """Means over steps of one kind, size and world. ms: median of spread's milliseconds; micro_steps: of ours."""

    ours: float
    best_fit: float
    random: float
    bound: float
    micro_steps: float
    ms: float
    worst_ms: float


def measure_cell(kind: Lengths, *, examples: int, world_size: int, num_steps: int = NUM_STEPS) -> Cell:
    """Lay `num_steps` steps out, each in every way but the windows."""
    rows, seconds = [], []
    for seed in range(num_steps):
        lengths, responses = kind.draw(examples, seed=seed)
        costs, listed = COST.of(lengths, responses), lengths.tolist()
        started = time.perf_counter()
        layout, ours = _spread(lengths, responses, world_size=world_size, pack_tokens=kind.pack_tokens)
        seconds.append(time.perf_counter() - started)
        others = (
            imbalance(way(listed, world_size, kind.pack_tokens), costs, world_size)
            for way in (best_fit_then_dealing, random_dealing)
        )
        bound = lower_bound(lengths, costs, world_size=world_size, pack_tokens=kind.pack_tokens)
        rows.append((ours, *others, bound, len(layout)))
    return Cell(*np.mean(rows, axis=0).tolist(), 1e3 * statistics.median(seconds), 1e3 * max(seconds))


def measure_windows(
    kind: Lengths, *, world_size: int, examples: int | None = None, packs: int = 0, num_steps: int = NUM_STEPS
) -> list[tuple[int, float, float, float]]:
    """(examples, windowed, ours, bound) of steps that hold `packs` of TRL's packs, or as many as reach `examples`.

    Ours lays out the same examples.
    """
    lengths, responses = kind.draw(WINDOW * 50, seed=0)
    costs = COST.of(lengths, responses)
    drawn, found = windowed_packs(lengths, kind.pack_tokens, seed=1), []
    for _ in range(num_steps):
        step: list[list[int]] = []
        while len(step) < packs or sum(map(len, step)) < (examples or 0):
            step.append(next(drawn))
        ids = np.sort(np.concatenate(step))
        _, ours = _spread(lengths[ids], responses[ids], world_size=world_size, pack_tokens=kind.pack_tokens)
        bound = lower_bound(lengths[ids], costs[ids], world_size=world_size, pack_tokens=kind.pack_tokens)
        found.append((len(ids), imbalance(deal(step, world_size), costs, world_size), ours, bound))
    return found


def _spread(
    lengths: Array, responses: Array, *, world_size: int, pack_tokens: int, cost: CostModel = COST
) -> tuple[tuple[tuple[tuple[int, ...], ...], ...], float]:
    return spread(
        np.arange(len(lengths)),
        lengths=lengths,
        num_responses=responses,
        world_size=world_size,
        pack_tokens=pack_tokens,
        cost=cost,
    )


# Tables


def balance_table() -> Iterator[str]:
    yield "| lengths | examples | ranks | here | bound | best-fit, dealt | windowed best-fit | random | ms, worst |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for kind in KINDS:
        for examples in (32, 64, 128, 256, 512):
            for world_size in (8, 16, 32, 64):
                cell = measure_cell(kind, examples=examples, world_size=world_size)
                windows = measure_windows(kind, world_size=world_size, examples=examples)
                windowed = statistics.mean(dealt for _, dealt, _, _ in windows)
                yield (
                    f"| {kind.name} | {examples} | {world_size} | **{cell.ours:.3f}** | {cell.bound:.3f} | "
                    f"{cell.best_fit:.3f} | {windowed:.3f} | {cell.random:.3f} | {cell.ms:.2f}, {cell.worst_ms:.2f} |"
                )


def window_table() -> Iterator[str]:
    yield "| lengths | ranks | packs a rank | examples | windowed best-fit | here, same examples | bound |"
    yield "|---|---|---|---|---|---|---|"
    for kind in KINDS:
        for world_size, packs in ((8, 1), (8, 4), (64, 1)):
            steps = measure_windows(kind, world_size=world_size, packs=packs * world_size, num_steps=10)
            examples, dealt, ours, bound = np.mean(steps, axis=0)
            figures = f"{examples:.0f} | {dealt:.3f} | **{ours:.3f}** | {bound:.3f}"
            yield f"| {kind.name} | {world_size} | {packs} | {figures} |"


def large_table() -> Iterator[str]:
    yield "| lengths | ranks | examples | here | bound | best-fit, dealt | micro-steps | ms, worst |"
    yield "|---|---|---|---|---|---|---|---|"
    for kind in (CHAT, LONG_TAIL_64K):
        for examples in (512, 1024, 2048, 4096, 8192, 16384):
            cell = measure_cell(kind, examples=examples, world_size=1024, num_steps=4)
            yield (
                f"| {kind.name} | 1024 | {examples} | **{cell.ours:.3f}** | {cell.bound:.3f} | {cell.best_fit:.3f} | "
                f"{cell.micro_steps:.1f} | {cell.ms:.0f}, {cell.worst_ms:.0f} |"
            )


def seconds_table(num: int = 1_000_000) -> Iterator[str]:
    yield f"| {num:,} lengths | s, median of 5 | steps |"
    yield "|---|---|---|"
    lengths, responses = CHAT.draw(num, seed=0)
    first, second = num // 3, num // 2
    pools = [
        Pool(np.arange(first), weight=1.5),
        Pool(np.arange(first, second), weight=1.0, cap=num // 10),
        Pool(np.arange(second, num), weight=0.3),
    ]
    for name, settings in {
        "steps of 512 examples": {"examples": 512, "epochs": 1},
        "steps of 512 examples, ten epochs": {"examples": 512, "epochs": 10},
        "three sources with weights and a cap": {"examples": 512, "epochs": 1, "pools": pools},
        "steps of 256k tokens": {"tokens": 262_144, "epochs": 1},
        "steps of 8k tokens": {"tokens": 8192, "epochs": 1},
        "steps of 256k tokens, ten epochs": {"tokens": 262_144, "epochs": 10},
        "steps of 256k tokens, easy first": {"tokens": 262_144, "epochs": 1, "ease": responses},
    }.items():
        schedules, seconds = [], []
        for _ in range(5):
            started = time.perf_counter()
            schedule = Schedule(lengths, responses, seed=0, **settings)
            schedule.example_ids(schedule.num_steps)
            seconds.append(time.perf_counter() - started)
            schedules.append(schedule)
        yield f"| {name} | {statistics.median(seconds):.3f} | {schedules[0].num_steps:,} |"
    schedule = Schedule(lengths, responses, seed=0, examples=512, epochs=1)
    schedule.example_ids(1)
    started = time.perf_counter()
    dominated_steps(schedule, step=1, world_size=8, cost=COST)
    yield f"| steps that no layout balances, counted | {time.perf_counter() - started:.3f} | {schedule.num_steps:,} |"


# Costs that are measured


def fit(measures: NDArray[np.float64], seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Coefficients >= 0 of the columns of `measures`, least squares of the relative error.

    With few columns every subset can be tried: the best one without a negative coefficient is the optimum.
    """
    scaled, best, least = measures / seconds[:, None], np.zeros(measures.shape[1]), np.inf
    for size in range(1, measures.shape[1] + 1):
        for columns in map(list, combinations(range(measures.shape[1]), size)):
            found = np.linalg.lstsq(scaled[:, columns], np.ones(len(scaled)), rcond=None)[0]
            error = float(((scaled[:, columns] @ found - 1) ** 2).sum())
            if found.min() >= 0 and error < least:
                best, least = np.zeros(measures.shape[1]), error
                best[columns] = found
    return best


def fit_report(num_packs: int = 80, num_steps: int = 8) -> Iterator[str]:
    """Fit costs to packs of a small model, then balance other examples by them, and time that."""
    lengths, responses = Lengths("chat", 200, 0.9, 2048, 4096).draw(num_packs * 16, seed=0)
    run, from_shape = small_model(lengths, responses)
    rng = np.random.default_rng(1)
    packs = [rng.choice(len(lengths), rng.integers(1, 14), replace=False).tolist() for _ in range(num_packs)]
    packs = [next_fit(pack, lengths.tolist(), 4096)[0] for pack in packs]
    measures = np.array([[lengths[p].sum(), responses[p].sum(), (lengths[p] ** 2).sum(), 1] for p in packs], float)
    seconds = timed(run, packs)
    linear, response, square, fixed = fit(measures, seconds)
    fitted = CostModel(linear, response, square)
    error = np.abs(measures @ [linear, response, square, fixed] / seconds - 1)
    yield f"- {num_packs} packs of {measures[:, 0].min():.0f} to {measures[:, 0].max():.0f} tokens"
    yield f"- response token over token: {from_shape.response:.3f} from shape, {response / linear:.3f} fitted"
    yield f"- squared length over token: {from_shape.square:.2e} from shape, {square / linear:.2e} fitted"
    yield f"- a pack's fixed cost: {fixed / linear:.0f} tokens; error of the fit: median {np.median(error):.1%}"
    costs = {"tokens alone": CostModel(), "from shape": from_shape, "fitted": fitted}
    yield ""
    yield f"| costs | slowest of 8 packs over their mean, in seconds, {num_steps} steps of 128 examples | expected |"
    yield "|---|---|---|"
    steps = [rng.choice(len(lengths), 128, replace=False) for _ in range(num_steps)]
    for name, cost in costs.items():
        found, expected = [], []
        for ids in steps:
            rows, thought = _spread(lengths[ids], responses[ids], world_size=8, pack_tokens=16384, cost=cost)
            times = timed(run, [ids[list(pack)].tolist() for row in rows for pack in row])
            found.append(times.max() / times.mean())
            expected.append(thought)
        yield f"| {name} | {statistics.mean(found):.3f} | {statistics.mean(expected):.3f} |"


def timed(run: Callable[[list[int]], None], packs: list[list[int]], repeats: int = 3) -> NDArray[np.float64]:
    """Seconds of each pack, median of rounds over all of them."""
    rounds = []
    for _ in range(repeats):
        ends = [time.perf_counter()]
        for pack in packs:
            run(pack)
            ends.append(time.perf_counter())
        rounds.append([last - first for first, last in pairwise(ends)])
    return np.median(rounds, axis=0)


def small_model(lengths: Array, responses: Array) -> tuple[Callable[[list[int]], None], CostModel]:
    """Forward and backward of a pack on one thread, by a small Qwen2 of random weights; also the costs of its shape."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from sft_dist.config import ModelSection
    from sft_dist.data.batch import build_micro_batch
    from sft_dist.model.attention import choose_backend
    from sft_dist.model.load import load_model

    torch.set_num_threads(1)
    device, dtype = torch.device("cpu"), torch.float32
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    with tempfile.TemporaryDirectory(prefix="schedule-fit-") as directory:
        AutoModelForCausalLM.from_config(config).save_pretrained(Path(directory))
        section = ModelSection(path=directory)
        backend = choose_backend(section.attention, device=device, dtype=dtype)
        model = load_model(section, backend=backend, dtype=dtype, device=device, num_tokens=0, added_token_ids=())
    store = _Store(lengths, responses)

    def run(pack: list[int]) -> None:
        micro = build_micro_batch(store, tuple(pack), dict.fromkeys(pack, 1e-4), is_last=True)  # type: ignore[arg-type]
        model(micro).backward()

    shape = ModelShape.from_config(config.to_dict())
    assert shape is not None
    return run, CostModel.from_shape(shape)


@dataclass(frozen=True)
class _Example:
    input_ids: Array
    is_response: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class _Store:
    """What the batch builder needs of a store: the last tokens of each example are trained."""

    lengths: Array
    responses: Array

    def example(self, index: int) -> _Example:
        places = np.arange(self.lengths[index])
        return _Example(places % 4096, places > self.lengths[index] - 1 - self.responses[index])


if __name__ == "__main__":
    main()
