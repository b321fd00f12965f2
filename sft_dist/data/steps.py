"""A recipe's steps: what of its store is held out, what is drawn, and how that is cut into steps."""

import numpy as np
from numpy.typing import NDArray

from sft_dist.config import Recipe
from sft_dist.data.draws import ease_of, fingerprint_draws, hold_out, make_pools
from sft_dist.data.schedule import Schedule
from sft_dist.data.store import TokenStore


def held_out_of(recipe: Recipe, store: TokenStore) -> NDArray[np.bool_]:
    """Which examples data.held_out_share keeps from training: `[n]`. Raises ConfigError when one side is empty."""
    return hold_out(store.prompt_hash, share=recipe.data.held_out_share, seed=recipe.data.held_out_seed)


def schedule_of(recipe: Recipe, store: TokenStore, *, after_step: int = 0) -> Schedule:
    """The steps of training; nothing that is held out is in them. Raises ConfigError when there is nothing to draw.

    after_step: the last step of what was drawn before the data changed; train.steps counts it, train.epochs does not.
    """
    sources, steps = recipe.data.train, recipe.train.steps
    return Schedule(
        store.lengths,
        store.num_responses,
        seed=recipe.run.seed,
        pools=make_pools(
            store.source_ranges,
            weights=[source.weight for source in sources],
            caps=[source.cap for source in sources],
            is_held_out=held_out_of(recipe, store),
        ),
        ease=ease_of(
            recipe.data.order,
            ranges=store.source_ranges,
            num_responses=store.num_responses,
            difficulty=store.difficulty,
        ),
        examples=recipe.batch.examples,
        tokens=recipe.batch.tokens,
        epochs=None if steps else recipe.train.epochs or 1,
        steps=steps,
        after_step=after_step,
    )


def fingerprint_of(recipe: Recipe, store: TokenStore) -> str:
    """16 hex digits over all that decides the draws and how they are cut into steps."""
    sources = recipe.data.train
    return fingerprint_draws(
        data_fingerprint=store.fingerprint,
        seed=recipe.run.seed,
        weights=[source.weight for source in sources],
        caps=[source.cap for source in sources],
        order=recipe.data.order,
        held_out_share=recipe.data.held_out_share,
        held_out_seed=recipe.data.held_out_seed,
        examples=recipe.batch.examples,
        tokens=recipe.batch.tokens,
    )
