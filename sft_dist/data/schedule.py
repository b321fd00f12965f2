"""Which examples make up each step, and how a step is laid out over ranks and micro-batches.

Pure numpy. The two halves never mix: `Schedule` cuts the draws of data/draws.py into steps, from lengths alone;
`spread` lays one step out for a world size and a pack size. So neither the number of GPUs nor the
packing can change what a step computes.

    draws of an epoch      [ 7 2 9 0 4 | 1 8 3 6 5 | 11 10 ]     a permutation, or easy first, cut into steps
    one step               { 7 2 9 0 4 }                         the global batch, N = 5
    packs, world_size 2    micro-step 0: rank 0 [9], rank 1 [7 0]
                           micro-step 1: rank 0 [2 4], rank 1 filler
"""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft_dist.data.draws import Draws, Pool
from sft_dist.errors import ConfigError

Lengths = NDArray[np.int64]
Pack = tuple[int, ...]
"""Example ids of one micro-batch, in draw order; empty for a filler."""


@dataclass(frozen=True)
class CostModel:
    """Cost of a pack, `linear*T + response*R + square*sum(len**2)`, in units of one token's linear cost.

    T: tokens, R: response tokens, len: document lengths. `from_shape` derives the ratios from FLOPs.
    """

    linear: float = 1.0
    response: float = 0.0
    square: float = 0.0

    @classmethod
    def from_shape(cls, *, body_params: int, head_params: int, num_layers: int, attention_width: int) -> "CostModel":
        """FLOPs per token, response token and squared length, divided by the first.

        attention_width: heads times head dimension. Causal attention costs 6*L*width*len**2 with its
        backward (half of the full square), the body 6 FLOPs per parameter and token.
        """
        return cls(1.0, head_params / body_params, num_layers * attention_width / body_params)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "CostModel | None":
        """From the fields of a config.json; None for what is not a plain dense decoder, such as a mixture of experts.

        Matrices only: norms and biases are a thousandth of the weights. The embedding lookup costs nothing.
        """
        try:
            if "num_experts" in config or "num_local_experts" in config:
                return None
            hidden, heads = config["hidden_size"], config["num_attention_heads"]
            head_dim = config.get("head_dim") or hidden // heads
            key_value = 2 * hidden * (config.get("num_key_value_heads") or heads) * head_dim
            layer = 2 * hidden * heads * head_dim + key_value + 3 * hidden * config["intermediate_size"]
            return cls.from_shape(
                body_params=config["num_hidden_layers"] * layer,
                head_params=config["vocab_size"] * hidden,
                num_layers=config["num_hidden_layers"],
                attention_width=heads * head_dim,
            )
        except (KeyError, TypeError, ZeroDivisionError):
            return None

    def of(self, lengths: NDArray[np.integer], num_responses: NDArray[np.integer]) -> NDArray[np.float64]:
        """Cost of each document: `[n]` float64."""
        length = lengths.astype(np.float64)
        return self.linear * length + self.response * num_responses + self.square * length**2


@dataclass(frozen=True)
class GlobalBatch:
    """One optimizer step.

    step: 1-based. epoch: 0-based. example_ids: `[N]`, in draw order, the same on every layout.
    micro_steps[m][rank]: the pack that `rank` runs in micro-step m; () is a filler.
    """

    step: int
    epoch: int
    example_ids: NDArray[np.int64]
    micro_steps: tuple[tuple[Pack, ...], ...]
    imbalance: float
    """Sum over micro-steps of the slowest rank's cost over the ideal, total cost / world size; 1.0 is perfect."""


class Schedule:
    """The steps of a run, from data, seed and lengths alone: no world size, no pack size in sight.

    Steps are counted from `first_step`, which is 1 unless others were trained before, and never straddle epochs.
    """

    def __init__(
        self,
        lengths: Lengths,
        num_responses: Lengths,
        *,
        seed: int,
        pools: Sequence[Pool] | None = None,
        ease: NDArray[np.generic] | None = None,
        examples: int | None = None,
        tokens: int | None = None,
        epochs: int | None = None,
        steps: int | None = None,
        after_step: int = 0,
    ) -> None:
        """Cut the draws of every epoch into steps.

        lengths, num_responses: `[n]`, tokens and trained tokens of each example.
        pools: what is drawn of each source, default every example once. ease: `[n]`, what draws are sorted by.
        examples or tokens: what a step is. epochs or steps: how long the run is; steps counts those before, too.
        after_step: steps that were trained before the first of this schedule.
        Raises ConfigError when there is nothing to draw.
        """
        self.lengths = lengths
        self.num_responses = num_responses
        pools = [Pool(np.arange(len(lengths), dtype=np.int64))] if pools is None else pools
        self._draws = Draws(pools, seed=seed, ease=ease)
        self._examples, self._tokens = examples, tokens
        self._cached: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None
        self.first_step = after_step + 1
        self._epoch_ends = self._count_steps(epochs, None if steps is None else steps - after_step)
        self.num_steps = steps if steps is not None else after_step + self._epoch_ends[-1]

    @property
    def num_draws(self) -> int:
        """Draws of an epoch."""
        return self._draws.num_draws

    def example_ids(self, step: int) -> tuple[int, NDArray[np.int64]]:
        """(epoch, ids `[N]` in draw order) of a step in first_step..num_steps."""
        step -= self.first_step - 1
        epoch = int(np.searchsorted(self._epoch_ends, step, side="left"))
        first = self._epoch_ends[epoch - 1] if epoch else 0
        draws, bounds = self._epoch(epoch)
        index = step - first - 1
        return epoch, draws[bounds[index] : bounds[index + 1]]

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if self._cached is None or self._cached[0] != epoch:
            draws = self._draws.of_epoch(epoch)
            bounds = step_bounds(self.lengths[draws], examples=self._examples, tokens=self._tokens)
            self._cached = (epoch, draws, bounds)
        return self._cached[1], self._cached[2]

    def _count_steps(self, epochs: int | None, steps: int | None) -> list[int]:
        """Last step of each epoch that the run touches. Token-sized steps differ in number from epoch to epoch."""
        ends = [0]
        while len(ends) <= epochs if epochs is not None else ends[-1] < (steps or 1):
            ends.append(ends[-1] + self._num_steps_of(len(ends) - 1))
        return ends[1:]

    def _num_steps_of(self, epoch: int) -> int:
        if self._examples is not None:
            return -(-self.num_draws // self._examples)
        return len(self._epoch(epoch)[1]) - 1


def step_bounds(draw_lengths: Lengths, *, examples: int | None, tokens: int | None) -> NDArray[np.int64]:
    """Where steps begin and end within an epoch's draws: `[num_steps + 1]`.

    By examples: every `examples` draws. By tokens: a step ends with the draw that reaches `tokens`.
    The last step of an epoch takes what is left.
    """
    n = len(draw_lengths)
    if examples is not None:
        return np.append(np.arange(0, n, examples, dtype=np.int64), n)
    assert tokens is not None
    total = np.concatenate(([0], np.cumsum(draw_lengths)))
    bounds = [0]
    while bounds[-1] < n:
        reached = int(np.searchsorted(total, total[bounds[-1]] + tokens, side="left"))
        bounds.append(min(reached, n))
    return np.asarray(bounds, dtype=np.int64)


def spread(
    example_ids: NDArray[np.int64],
    *,
    lengths: Lengths,
    num_responses: Lengths,
    world_size: int,
    pack_tokens: int | None,
    cost: CostModel,
) -> tuple[tuple[tuple[Pack, ...], ...], float]:
    """Lay one step's examples out as micro_steps[m][rank] packs; also the imbalance (1.0 is perfect).

    Longest-processing-time first under the cap: the costliest example goes to the pack with the least
    cost so far that has room, over k * world_size packs with the smallest k that fits. Packs are then
    ranked by cost and dealt to micro-steps in that order, so that packs run side by side cost alike.
    pack_tokens: most tokens in a pack; None puts every example alone in one.
    Raises ConfigError when an example is longer than pack_tokens: no example is ever cut.
    Source: Graham 1969, Bounds on multiprocessing timing anomalies (the LPT rule).
    """
    ids = np.asarray(example_ids, dtype=np.int64)
    if pack_tokens is not None and len(ids) and int(lengths[ids].max()) > pack_tokens:
        raise ConfigError(
            f"batch.pack_tokens={pack_tokens} is shorter than an example of {int(lengths[ids].max())} tokens; raise it"
        )
    costs = cost.of(lengths[ids], num_responses[ids])
    order = np.argsort(-costs, kind="stable").tolist()
    if pack_tokens is None:
        packs = [[place] for place in order]
        packs += [[] for _ in range(-len(packs) % world_size)]
    else:
        packs = _fill_packs(order, lengths[ids].tolist(), costs.tolist(), world_size, pack_tokens)
    return _deal(packs, ids.tolist(), costs.tolist(), world_size)


def _fill_packs(
    order: list[int], lengths: list[int], costs: list[float], world_size: int, pack_tokens: int
) -> list[list[int]]:
    """k * world_size packs of places in the step, k the smallest for which every example finds room."""
    k = max(1, -(-sum(lengths) // (pack_tokens * world_size)))
    while True:
        packs = _try_fill(order, lengths, costs, k * world_size, pack_tokens)
        if packs is not None:
            return packs
        k += 1


def _try_fill(
    order: list[int], lengths: list[int], costs: list[float], num_packs: int, pack_tokens: int
) -> list[list[int]] | None:
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    room = [pack_tokens] * num_packs
    heap = [(0.0, pack) for pack in range(num_packs)]  # least cost first; already a heap
    for place in order:
        skipped = []
        while heap and room[heap[0][1]] < lengths[place]:
            skipped.append(heapq.heappop(heap))
        if not heap:
            return None
        load, pack = heap[0]
        packs[pack].append(place)
        room[pack] -= lengths[place]
        heapq.heapreplace(heap, (load + costs[place], pack))
        for entry in skipped:
            heapq.heappush(heap, entry)
    return packs


def _deal(
    packs: list[list[int]], ids: list[int], costs: list[float], world_size: int
) -> tuple[tuple[tuple[Pack, ...], ...], float]:
    loads = [sum(costs[place] for place in pack) for pack in packs]
    by_load = sorted(range(len(packs)), key=lambda pack: (-loads[pack], pack))
    rank_load = [0.0] * world_size
    micro_steps, barrier = [], 0.0
    for first in range(0, len(by_load), world_size):
        side_by_side = by_load[first : first + world_size]
        # The costliest pack of a micro-step goes to the rank with the least work so far: without
        # a barrier between micro-steps (DDP), it is the sum per rank that counts.
        ranks = sorted(range(world_size), key=lambda rank: (rank_load[rank], rank))
        row: list[Pack] = [()] * world_size
        for rank, pack in zip(ranks, side_by_side, strict=True):
            row[rank] = tuple(ids[place] for place in sorted(packs[pack]))
            rank_load[rank] += loads[pack]
        micro_steps.append(tuple(row))
        barrier += loads[side_by_side[0]]
    total = sum(loads)
    return tuple(micro_steps), barrier * world_size / total if total else 1.0


def global_batches(
    schedule: Schedule, *, first_step: int, world_size: int, pack_tokens: int | None, cost: CostModel
) -> Iterator[GlobalBatch]:
    """The steps from `first_step` to the end of the run, laid out for this world."""
    for step in range(first_step, schedule.num_steps + 1):
        epoch, ids = schedule.example_ids(step)
        micro_steps, imbalance = spread(
            ids,
            lengths=schedule.lengths,
            num_responses=schedule.num_responses,
            world_size=world_size,
            pack_tokens=pack_tokens,
            cost=cost,
        )
        yield GlobalBatch(step, epoch, ids, micro_steps, imbalance)
