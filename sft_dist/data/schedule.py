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
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft_dist.data.draws import Draws, Pool
from sft_dist.errors import ConfigError
from sft_dist.shape import ModelShape

Lengths = NDArray[np.int64]
Pack = tuple[int, ...]
"""Example ids of one micro-batch, in draw order; empty for a filler."""
_Places = list[int]
"""A pack while it is filled: places in the step, in any order."""

# Micro-steps within this of even are not evened out further.
EVEN_ENOUGH = 1.002
# Swaps are looked for among the examples of so many of the cheapest packs of a micro-step.
NUM_PARTNERS = 8


@dataclass(frozen=True)
class CostModel:
    """Cost of a pack, `linear*T + response*R + square*sum(len**2)`, in units of one token's linear cost.

    T: tokens, R: response tokens, len: document lengths. `from_shape` derives the ratios from FLOPs.
    """

    linear: float = 1.0
    response: float = 0.0
    square: float = 0.0

    @classmethod
    def from_shape(cls, shape: ModelShape) -> "CostModel":
        """FLOPs per token, response token and squared length (`ModelShape.step_flops`), divided by the first."""
        body = shape.body_params
        return cls(1.0, shape.head_params / body, shape.num_layers * shape.attention_width / body)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "CostModel | None":
        """From the fields of a config.json; None for what is not a plain dense decoder."""
        shape = ModelShape.from_config(config)
        return None if shape is None or not shape.body_params else cls.from_shape(shape)

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


@dataclass(frozen=True)
class Dominated:
    """Steps of an epoch that no layout balances: one example costs more than twice a rank's share of its step.

    num_steps: how many, of `num_all`. step, example_id, share: the worst, and its cost over a rank's share.
    """

    num_steps: int
    num_all: int
    step: int
    example_id: int
    share: float


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
        epoch, before = self._place(step)
        draws, bounds = self._epoch(epoch)
        index = step - before - 1
        return epoch, draws[bounds[index] : bounds[index + 1]]

    def epoch_of(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """(draws, bounds of its steps, steps before it) of the epoch that `step` is in."""
        epoch, before = self._place(step)
        return *self._epoch(epoch), before

    def _place(self, step: int) -> tuple[int, int]:
        """(epoch of a step, steps before that epoch)."""
        after_step = self.first_step - 1
        epoch = int(np.searchsorted(self._epoch_ends, step - after_step, side="left"))
        return epoch, after_step + (self._epoch_ends[epoch - 1] if epoch else 0)

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


def dominated_steps(schedule: Schedule, *, step: int, world_size: int, cost: CostModel) -> Dominated | None:
    """What cannot be balanced in the epoch that `step` is of; None where everything can."""
    draws, bounds, before = schedule.epoch_of(step)
    costs = cost.of(schedule.lengths[draws], schedule.num_responses[draws])
    rank_costs = np.add.reduceat(costs, bounds[:-1]) / world_size
    shares = np.maximum.reduceat(costs, bounds[:-1]) / rank_costs
    num_steps = int(np.count_nonzero(shares > 2))
    if not num_steps:
        return None
    worst = int(shares.argmax())
    first, last = bounds[worst : worst + 2]
    example_id = int(draws[first + costs[first:last].argmax()])
    return Dominated(num_steps, len(shares), before + worst + 1, example_id, float(shares[worst]))


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
        reached = int(total.searchsorted(total[bounds[-1]] + tokens, side="left"))
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

    pack_tokens: most tokens in a pack; None puts every example alone in one.
    Raises ConfigError when an example is longer than pack_tokens: no example is ever cut.
    """
    ids = np.asarray(example_ids, dtype=np.int64)
    if pack_tokens is not None and len(ids) and int(lengths[ids].max()) > pack_tokens:
        raise ConfigError(
            f"batch.pack_tokens={pack_tokens} is shorter than an example of {int(lengths[ids].max())} tokens; raise it"
        )
    costs = _whole(cost.of(lengths[ids], num_responses[ids]))
    order = np.argsort(-costs, kind="stable").tolist()
    step = _Step(lengths[ids].tolist(), costs.tolist(), world_size, pack_tokens)
    if pack_tokens is None:
        packs = [[place] for place in order]
        rows = _side_by_side(step, packs + [[] for _ in range(-len(packs) % world_size)])
    else:
        rows = [_swap(step, row) for row in _fill(step, order)]
    return _deal(step, rows, ids.tolist())


def _whole(costs: NDArray[np.float64]) -> NDArray[np.int64]:
    """Costs as whole numbers, the largest a million: sums and ties are then the same on every machine."""
    whole: NDArray[np.int64] = np.rint(costs * (1e6 / costs.max(initial=1e-300))).astype(np.int64)
    return whole


@dataclass(frozen=True)
class _Step:
    """What a step's packs are filled with, by place in the step, and within what limits."""

    lengths: list[int]
    costs: list[int]
    world_size: int
    pack_tokens: int | None

    def load(self, pack: _Places) -> int:
        """Cost of a pack."""
        return sum(self.costs[place] for place in pack)


def _fill(step: _Step, order: list[int]) -> list[list[_Places]]:
    """Rows of world_size packs, one row for each micro-step, the fewest for which every example finds room.

    Longest-processing-time first: the costliest example goes to the pack with the least cost so far that has
    room. Packs are then ranked by cost, so that those run side by side cost alike. Where an example costs more than
    the mean pack, its micro-step lasts as long as it does: the other packs of that row are filled up to it before any
    other row is begun, and so on until what is left can be evened out.
    Source: Graham 1969, Bounds on multiprocessing timing anomalies (the LPT rule).
    """
    costs, world_size = step.costs, step.world_size
    num_rows = _fewest_rows(step)
    while (even := _fill_packs(step, order, num_rows * world_size))[1]:
        num_rows += 1
    best = _side_by_side(step, even[0])
    rows: list[list[_Places]] = []
    left, cost_left = order, sum(costs)
    for num_left in range(num_rows - 1, 0, -1):
        dearest = costs[left[0]]
        is_even = _barrier(step, best) * world_size <= EVEN_ENOUGH * sum(costs)
        if is_even or dearest * world_size * (num_left + 1) <= cost_left:
            break
        row, left = _fill_packs(step, left, world_size, level=dearest)
        rows.append(row)
        cost_left -= sum(map(step.load, row))
        packs, without_room = _fill_packs(step, left, num_left * world_size)
        if not without_room:
            best = min(best, rows + _side_by_side(step, packs), key=lambda rows: _barrier(step, rows))
        if not left:
            break
    return best


def _fewest_rows(step: _Step) -> int:
    """A lower bound: tokens must fit, and no two examples of more than half a pack share one."""
    assert step.pack_tokens is not None
    num_packs = -(-sum(step.lengths) // step.pack_tokens)
    num_large = sum(2 * length > step.pack_tokens for length in step.lengths)
    return max(1, -(-max(num_packs, num_large) // step.world_size))


def _fill_packs(
    step: _Step, order: list[int], num_packs: int, *, level: float = math.inf
) -> tuple[list[_Places], list[int]]:
    """Packs that cost at most `level`, costliest example first, least pack first; also what finds no room in them."""
    assert step.pack_tokens is not None
    packs: list[_Places] = [[] for _ in range(num_packs)]
    left = []
    room = [step.pack_tokens] * num_packs
    least = [(0, pack) for pack in range(num_packs)]  # by cost; already a heap
    # By room, most first: a pack that has none for an example is set aside until a shorter one comes.
    aside: list[tuple[int, int, int]] = []
    for place in order:
        length, cost = step.lengths[place], step.costs[place]
        while aside and -aside[0][0] >= length:
            heapq.heappush(least, heapq.heappop(aside)[1:])
        while least and room[least[0][1]] < length:
            load, pack = heapq.heappop(least)
            heapq.heappush(aside, (-room[pack], load, pack))
        if least and least[0][0] + cost <= level:
            load, pack = least[0]
            packs[pack].append(place)
            room[pack] -= length
            heapq.heapreplace(least, (load + cost, pack))
        else:
            left.append(place)
    return packs, left


def _side_by_side(step: _Step, packs: list[_Places]) -> list[list[_Places]]:
    """Packs in rows of world_size, costliest first."""
    ranked = sorted(packs, key=step.load, reverse=True)
    rows = [ranked[first : first + step.world_size] for first in range(0, len(ranked), step.world_size)]
    return [row for row in rows if any(row)]


def _barrier(step: _Step, rows: list[list[_Places]]) -> int:
    """Sum over micro-steps of the slowest rank's cost."""
    return sum(max(map(step.load, row)) for row in rows)


def _swap(step: _Step, row: list[_Places]) -> list[_Places]:
    """A micro-step's packs after swaps that make its costliest pack cheaper.

    An example of the costliest pack changes places with a cheaper one, or with none, of another pack: each time the
    pair that leaves the two packs' larger cost the smallest.
    """
    if len(row) == 1:
        return row
    assert step.pack_tokens is not None
    row = [list(pack) for pack in row]
    loads = [step.load(pack) for pack in row]
    rooms = [step.pack_tokens - sum(step.lengths[place] for place in pack) for pack in row]
    enough = max(EVEN_ENOUGH * sum(loads) / len(row), max(step.costs[place] for pack in row for place in pack))
    for _ in range(2 * len(row)):
        ranked = sorted(range(len(row)), key=lambda pack: (loads[pack], pack))
        top, partners = ranked[-1], ranked[:-1][:NUM_PARTNERS]
        if loads[top] <= enough:
            break
        # [examples of the costliest pack, examples of partners and none of each]
        theirs = [(pack, place) for pack in partners for place in (*row[pack], None)]
        cost, length = _differences(step, row[top], [place for _, place in theirs])
        load, room = (np.asarray([of[pack] for pack, _ in theirs]) for of in (loads, rooms))
        fits = (length <= room) & (-length <= rooms[top])
        larger = np.where(fits & (cost > 0), np.maximum(loads[top] - cost, load + cost), loads[top])
        mine, other = divmod(int(np.argmin(larger)), len(theirs))
        if larger[mine, other] >= loads[top]:
            break
        pack, place = theirs[other]
        row[pack].append(row[top].pop(mine))
        if place is not None:
            row[pack].remove(place)
            row[top].append(place)
        for changed, sign in ((pack, 1), (top, -1)):
            loads[changed] += sign * int(cost[mine, other])
            rooms[changed] -= sign * int(length[mine, other])
    return row


def _differences(
    step: _Step, places: list[int], others: list[int | None]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cost and length of each of `places` less those of each of `others`; None is nothing."""
    cost, length = (
        np.subtract.outer([values[place] for place in places], [0 if p is None else values[p] for p in others])
        for values in (step.costs, step.lengths)
    )
    return cost, length


def _deal(step: _Step, rows: list[list[_Places]], ids: list[int]) -> tuple[tuple[tuple[Pack, ...], ...], float]:
    """Give each micro-step's packs to ranks; also the imbalance."""
    work = [0] * step.world_size
    micro_steps = []
    for packs in rows:
        # The costliest pack of a micro-step goes to the rank with the least work so far: without
        # a barrier between micro-steps (DDP), it is the sum per rank that counts.
        ranks = sorted(range(step.world_size), key=lambda rank: (work[rank], rank))
        row: list[Pack] = [()] * step.world_size
        for rank, pack in zip(ranks, sorted(packs, key=step.load, reverse=True), strict=True):
            row[rank] = tuple(ids[place] for place in sorted(pack))
            work[rank] += step.load(pack)
        micro_steps.append(tuple(row))
    total = sum(step.costs)
    return tuple(micro_steps), _barrier(step, rows) * step.world_size / total if total else 1.0


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
