"""The numbers that `inspect` draws: lengths in bins, rows by source and by cause, and the packs of the first steps."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from sft_dist.config import Recipe
from sft_dist.data.schedule import CostModel, global_batches
from sft_dist.data.shown import safe
from sft_dist.data.steps import held_out_of, schedule_of
from sft_dist.data.store import TokenStore
from sft_dist.errors import ConfigError

NUM_STEPS_LAID_OUT = 200
# Beyond it a step of very many examples would make a look at the data take minutes.
NUM_DRAWS_LAID_OUT = 200_000
# Where the longest example is a smaller part of the cut, an axis to the cut would be mostly empty.
AXIS_TO_CUT_ABOVE = 1 / 2
# Where half of all examples are shorter than this part of the axis, linear bins would hold them in one or two.
LOG_BELOW = 1 / 16


@dataclass(frozen=True)
class Bins:
    """Ranges of token counts. edges: `[n+1]`, bin i holds edges[i] <= count < edges[i+1]; cut: most tokens kept."""

    edges: tuple[int, ...]
    is_log: bool
    cut: int

    @property
    def ends_at_cut(self) -> bool:
        """Whether the cut lies on the axis, at its end."""
        return self.edges[-1] > self.cut

    def counts(self, values: np.ndarray) -> list[int]:
        """How many values fall into each bin."""
        return [int(count) for count in np.histogram(values, bins=np.asarray(self.edges))[0]]

    def label(self, index: int) -> str:
        """A bin as `first-last` tokens."""
        first, last = self.edges[index], self.edges[index + 1] - 1
        return f"{first:,}" if first == last else f"{first:,}–{last:,}"

    def position(self, value: float) -> float:
        """Where a value lies on the axis, 0 to 1."""
        low, high = self.edges[0], self.edges[-1]
        if self.is_log:
            return float(np.log(value / low) / np.log(high / low))
        return (value - low) / (high - low)

    def ticks(self) -> list[int]:
        """Round values inside the axis."""
        high = self.edges[-1]
        if self.is_log:
            return [10**power for power in range(len(str(high))) if 10**power < high]
        step = _round_up(high / 5)
        return list(range(step, high, step))


@dataclass(frozen=True)
class Cause:
    """Rows by what befell them. examples: `file:line: reason` of the first of them."""

    name: str
    count: int
    examples: tuple[str, ...]

    def __str__(self) -> str:
        """One line, with the first example."""
        return f"{self.count} {self.name}" + "".join(f", e.g. {safe(example)}" for example in self.examples[:1])


@dataclass(frozen=True)
class SourceCount:
    """What a source gave."""

    path: str
    row_format: str
    rows_read: int
    kept: int
    tokens: int
    response_tokens: int


@dataclass(frozen=True)
class Layout:
    """The first steps as training will lay them out. fills: of each pack, 0 to 1; empty without packing."""

    num_laid_out: int
    num_steps: int
    num_held_out: int
    """Examples of the training data that data.held_out_share holds out."""
    world_size: int
    pack_tokens: int | None
    examples_per_step: float
    tokens_per_step: float
    micro_batches: float
    """Micro-batches of each process in a step, on average."""
    fills: tuple[float, ...]
    imbalance: float
    worst_imbalance: float
    knows_model: bool
    """Whether costs come from the model's shape; otherwise a pack costs its tokens."""

    @property
    def fill(self) -> float:
        """Tokens over room, in all packs together."""
        return float(np.mean(self.fills)) if self.fills else 1.0


def length_bins(store: TokenStore, *, max_bins: int = 32) -> Bins:
    """Bins from 1 token up, which prompts and responses share; to the cut, or to the longest where it is far below."""
    cut, longest = max(int(store.meta["max_tokens"]), store.max_length), store.max_length
    end = cut if longest > cut * AXIS_TO_CUT_ABOVE else longest
    is_log = float(np.median(store.lengths)) < end * LOG_BELOW
    if is_log:
        halves = [edge for power in range(end.bit_length() + 1) for edge in (2**power, 3 * 2**power // 2)]
        inner = halves if len(halves) <= max_bins else halves[::2]
    else:
        width = _round_up(end / max_bins)
        inner = list(range(width, end + width + 1, width))
    last = cut + 1 if end == cut else next(edge for edge in inner if edge > longest)
    return Bins(tuple(sorted({1, *(edge for edge in inner if edge < last), last})), is_log, cut)


def causes(meta: Mapping[str, Any], key: str) -> list[Cause]:
    """meta["dropped"] or meta["notes"], the most frequent cause first."""
    found = [Cause(name, entry["count"], tuple(entry.get("examples", ()))) for name, entry in meta.get(key, {}).items()]
    return sorted(found, key=lambda cause: (-cause.count, cause.name))


def source_counts(store: TokenStore) -> list[SourceCount]:
    """In the order of the recipe."""
    return [
        SourceCount(
            path=source["path"],
            row_format=source["format"],
            rows_read=source["rows_read"],
            kept=source["rows_kept"],
            tokens=int(store.lengths[first:last].sum()),
            response_tokens=int(store.num_responses[first:last].sum()),
        )
        for source, (first, last) in zip(store.meta["sources"], store.source_ranges, strict=True)
    ]


def lay_out(recipe: Recipe, store: TokenStore, *, world_size: int) -> Layout:
    """Lay the first steps of the training data out. Raises ConfigError where training would."""
    if recipe.batch.examples is not None and recipe.batch.examples < world_size:
        raise ConfigError(f"batch.examples={recipe.batch.examples} is fewer examples a step than {world_size} ranks")
    schedule = schedule_of(recipe, store)
    pack_tokens = recipe.pack_tokens if recipe.batch.packing else None
    cost = _cost_of_model(Path(recipe.model.path).expanduser())
    batches, num_draws = [], 0
    for batch in islice(
        global_batches(
            schedule, first_step=1, world_size=world_size, pack_tokens=pack_tokens, cost=cost or CostModel()
        ),
        NUM_STEPS_LAID_OUT,
    ):
        batches.append(batch)
        num_draws += len(batch.example_ids)
        if num_draws >= NUM_DRAWS_LAID_OUT:
            break
    packs = [pack for batch in batches for row in batch.micro_steps for pack in row]
    num_tokens = sum(int(store.lengths[batch.example_ids].sum()) for batch in batches)
    return Layout(
        num_laid_out=len(batches),
        num_steps=schedule.num_steps,
        num_held_out=int(held_out_of(recipe, store).sum()),
        world_size=world_size,
        pack_tokens=pack_tokens,
        examples_per_step=num_draws / len(batches),
        tokens_per_step=num_tokens / len(batches),
        micro_batches=float(np.mean([len(batch.micro_steps) for batch in batches])),
        fills=tuple(int(store.lengths[list(pack)].sum()) / pack_tokens for pack in packs) if pack_tokens else (),
        imbalance=float(np.mean([batch.imbalance for batch in batches])),
        worst_imbalance=max(batch.imbalance for batch in batches),
        knows_model=cost is not None,
    )


def _cost_of_model(directory: Path) -> CostModel | None:
    """Costs from config.json without loading torch; None where it is not at hand or not a plain dense decoder."""
    try:
        return CostModel.from_config(json.loads((directory / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def _round_up(value: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ..."""
    power: int = 10 ** (len(str(max(1, int(value)))) - 1)
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value)


def fill_counts(fills: Sequence[float]) -> list[int]:
    """Packs by fill, ten bins of ten percent each; a full pack is in the last."""
    return [int(count) for count in np.histogram(np.asarray(fills), bins=10, range=(0.0, 1.0))[0]]
