"""A recipe's held-out sets: what is measured and never trained, by name."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from sft_dist.config import HELD_OUT, Recipe, Source
from sft_dist.data.prepare import open_or_prepare
from sft_dist.data.steps import held_out_of
from sft_dist.data.store import TokenStore


@dataclass(frozen=True, eq=False)
class HeldOut:
    """One set. store: where its examples lie, with data.held_out_share that of the training data. ids: `[N]`, which."""

    name: str
    sources: tuple[Source, ...]
    store: TokenStore
    ids: NDArray[np.int64]


def open_held_out(
    recipe: Recipe, train: TokenStore, *, console: Console, is_preparer: bool = True
) -> tuple[HeldOut, ...]:
    """The sets of data.held_out in its order, or the one that data.held_out_share takes from the training data."""
    is_held_out = held_out_of(recipe, train)
    if is_held_out.any():
        return (HeldOut(HELD_OUT, recipe.data.train, train, np.flatnonzero(is_held_out)),)
    sets = []
    for name, sources in recipe.data.held_out.items():
        store = open_or_prepare(recipe, sources, console=console, is_preparer=is_preparer)
        sets.append(HeldOut(name, sources, store, np.arange(len(store))))
    return tuple(sets)
