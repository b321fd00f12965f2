"""Which examples an epoch draws, and in what order: from data, seed and epoch alone. Pure numpy.

    examples    0 1 2 3 4 5 | 6 7 8 9      two sources, as they lie in the store
    held out        2       |     8        by a hash of the prompt: never drawn
    cap         . 1   3 . 5 | 6 7   9      the first has cap 3: another subset in every epoch
    weight      1 3 5       | 6 7 9 6 7 9  the second has weight 2: each copy is a draw
    order       9 3 6 7 1 6 5 9 7          shuffled, or easy first

A cap comes before the weight: cap 100 and weight 2.5 make 250 draws of 100 examples.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from sft_dist.errors import ConfigError

# Raised when equal settings come to draw otherwise, so that no run goes on over the change.
DRAWS_VERSION = 1
Ids = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Pool:
    """What may be drawn of a source. ids: its examples that are not held out.

    weight: copies of each in an epoch, and for the fraction a seeded subset. cap: most examples in an epoch, chosen
    before they are copied.
    """

    ids: Ids
    weight: float = 1.0
    cap: int | None = None

    @property
    def num_examples(self) -> int:
        """Examples in an epoch."""
        return len(self.ids) if self.cap is None else min(self.cap, len(self.ids))

    @property
    def num_copies(self) -> int:
        """Whole copies of each example in an epoch."""
        return int(self.weight)

    @property
    def num_extra(self) -> int:
        """Draws of an epoch that the fraction of the weight gives."""
        return round((self.weight - self.num_copies) * self.num_examples)


class Draws:
    """The draws of every epoch: `of_epoch(epoch)` is a function of seed and epoch, in whatever order it is asked."""

    def __init__(self, pools: Sequence[Pool], *, seed: int, ease: NDArray[np.generic] | None = None) -> None:
        """ease: `[n]`, by example: draws are trained in its ascending order, equal ones shuffled. None: all shuffled.

        Raises ConfigError when there is nothing to draw.
        """
        self.num_draws = sum(pool.num_copies * pool.num_examples + pool.num_extra for pool in pools)
        if not self.num_draws:
            given = ", ".join(f"{pool.num_examples} at weight {pool.weight:g}" for pool in pools)
            raise ConfigError(f"data.train gives no draws: examples of each source: {given}; raise a weight")
        self._seed, self._ease = seed, ease
        self._pools = [(pool, _Dealer(pool, seed=seed, place=place)) for place, pool in enumerate(pools)]

    def of_epoch(self, epoch: int) -> Ids:
        """Example ids in the order in which they are trained: `[num_draws]`."""
        draws = _mix([(pool, dealer.deal(epoch)) for pool, dealer in self._pools], seed=self._seed, epoch=epoch)
        if self._ease is None:
            return draws
        # Stable: draws that are equally easy stay in the order of the shuffle, on every machine.
        return draws[np.argsort(self._ease[draws], kind="stable")]


def _mix(dealt: Sequence[tuple[Pool, Ids]], *, seed: int, epoch: int) -> Ids:
    """Copies and seeded subsets of what each source gives to the epoch, permuted together."""
    rng = np.random.Generator(np.random.PCG64([seed, epoch]))
    parts = []
    for pool, ids in dealt:
        parts += [ids] * pool.num_copies
        if pool.num_extra:
            parts.append(rng.choice(ids, size=pool.num_extra, replace=False))
    return rng.permutation(np.concatenate(parts))


class _Dealer:
    """Deals `cap` examples of a source to each epoch, from one shuffled deck of all of them after another.

    cap 3    deck 0 [ 3 1 4 | 0 2 ] [ 4 | 3 0 1 | 2 ... deck 1
    epoch           0         1           2

    So the examples come up as evenly as they can: at any time none has come up more than once oftener than another.
    An epoch that reaches over the end of a deck takes nothing twice.
    """

    def __init__(self, pool: Pool, *, seed: int, place: int) -> None:
        self._pool, self._seed, self._place = pool, seed, place
        self._last: tuple[int, Ids] | None = None

    def deal(self, epoch: int) -> Ids:
        """The pool's examples of an epoch; all of them, in their own order, without a cap below their number."""
        ids, num = self._pool.ids, self._pool.num_examples
        if num == len(ids):
            return ids
        index, offset = divmod(epoch * num, len(ids))
        places = self._deck(index)[offset : offset + num]
        if len(places) < num:
            places = np.concatenate([places, self._deck(index + 1)[: num - len(places)]])
        return ids[places]

    def _deck(self, index: int) -> Ids:
        """Places in the pool, permuted. Each deck depends on the one before it; the last one is kept."""
        if self._last is None or self._last[0] > index:
            self._last = (0, self._shuffled(0))
        while self._last[0] < index:
            before = self._last
            self._last = (before[0] + 1, self._next_deck(before[0] + 1, before[1]))
        return self._last[1]

    def _next_deck(self, index: int, before: Ids) -> Ids:
        """A shuffled deck whose first cards are none of those that the same epoch took from the deck before."""
        deck, num_places, num = self._shuffled(index), len(self._pool.ids), self._pool.num_examples
        num_taken = index * num_places % num
        if not num_taken:
            return deck
        is_free = np.ones(num_places, dtype=bool)
        is_free[before[-num_taken:]] = False
        first = np.flatnonzero(is_free[deck])[: num - num_taken]
        return np.concatenate([deck[first], np.delete(deck, first)])

    def _shuffled(self, index: int) -> Ids:
        # A third word above 0 keeps this stream apart from that of the epoch.
        rng = np.random.Generator(np.random.PCG64([self._seed, index, self._place + 1]))
        return rng.permutation(len(self._pool.ids))


def make_pools(
    ranges: Sequence[tuple[int, int]],
    *,
    weights: Sequence[float],
    caps: Sequence[int | None],
    is_held_out: NDArray[np.bool_],
) -> list[Pool]:
    """What may be drawn of each source: [first, last) of `ranges` without what is held out, `[n]`."""
    return [
        Pool(np.arange(first, last, dtype=np.int64)[~is_held_out[first:last]], weight, cap)
        for (first, last), weight, cap in zip(ranges, weights, caps, strict=True)
    ]


def ease_of(
    order: str,
    *,
    ranges: Sequence[tuple[int, int]],
    num_responses: NDArray[np.integer],
    difficulty: NDArray[np.float64],
) -> NDArray[np.generic] | None:
    """What `data.order` sorts draws by, `[n]`, least first; None for shuffle.

    Raises ConfigError when an example has no difficulty (NaN) and the order is by it.
    """
    if order == "shuffle":
        return None
    if order == "source":
        return np.repeat(np.arange(len(ranges)), [last - first for first, last in ranges])
    if order == "response_length":
        return num_responses
    if missing := int(np.isnan(difficulty).sum()):
        raise ConfigError(
            f"data.order: {order} needs a number in every row; {missing} of {len(difficulty)} examples have none. "
            "Give it to every row, or choose another order"
        )
    return difficulty


def hold_out(prompt_hash: NDArray[np.uint64], *, share: float, seed: int) -> NDArray[np.bool_]:
    """Which examples are held out: `[n]` bool, about `share` of the prompts; none for share 0.

    A function of prompt and seed alone: equal prompts never fall on two sides, and no file that is added or moved
    changes the side of a prompt. A larger share holds out what a smaller one does, and more.
    Raises ConfigError when one side is empty.
    """
    if not share:
        return np.zeros(len(prompt_hash), dtype=bool)
    key = _splitmix64(np.array([seed], dtype=np.uint64))
    is_held_out = _splitmix64(prompt_hash ^ key) < np.uint64(math.ceil(share * 2.0**64))
    num_held_out = int(is_held_out.sum())
    if num_held_out in (0, len(prompt_hash)):
        num_prompts = len(np.unique(prompt_hash))
        mend = "lower" if num_held_out else "raise"
        raise ConfigError(
            f"data.held_out_share={share:g} holds out {num_held_out} of {len(prompt_hash)} examples ({num_prompts} "
            f"different prompts), and both sides need some; {mend} it, or try another data.held_out_seed than {seed}"
        )
    return is_held_out


def _splitmix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of 64 bits in which every bit of the input moves every bit of the output. Wraps around.

    Source: Steele, Lea and Flood 2014, Fast splittable pseudorandom number generators.
    """
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def count_shared_prompts(trained: NDArray[np.uint64], held_out: NDArray[np.uint64]) -> tuple[int, int]:
    """(held-out prompts that are also trained on, held-out prompts), each prompt counted once."""
    return len(np.intersect1d(trained, held_out)), len(np.unique(held_out))


def fingerprint_draws(
    *,
    data_fingerprint: str,
    seed: int,
    weights: Sequence[float],
    caps: Sequence[int | None],
    order: str,
    held_out_share: float,
    held_out_seed: int,
    examples: int | None,
    tokens: int | None,
) -> str:
    """16 hex digits over all that decides the draws and how they are cut into steps; not how many are trained."""
    settings = {
        "version": DRAWS_VERSION,
        "data": data_fingerprint,
        "seed": seed,
        "sources": [[float(weight), cap] for weight, cap in zip(weights, caps, strict=True)],
        "order": order,
        "held_out": [float(held_out_share), held_out_seed if held_out_share else None],
        "step": [examples, tokens],
    }
    return xxhash.xxh3_64_hexdigest(json.dumps(settings, sort_keys=True).encode())
