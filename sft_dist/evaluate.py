"""The held-out loss: the training loss over a whole held-out set, whatever the batching and the rank count."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sft_dist.config import LossName
from sft_dist.data.batch import MicroBatch, build_micro_batch, token_weights
from sft_dist.data.schedule import CostModel, Pack, spread
from sft_dist.data.store import TokenStore
from sft_dist.engine.collectives import sum_over_ranks
from sft_dist.model.load import PackedModel
from sft_dist.world import World


@contextmanager
def evaluating(model: PackedModel) -> Iterator[None]:
    """Dropout and checkpointing off, no gradients; the model is as it was afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


class Measurable(Protocol):
    """What a held-out loss needs of an engine; a model without an optimizer has it too."""

    @property
    def world(self) -> World: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def model(self) -> PackedModel: ...
    def __call__(self, micro: MicroBatch) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class HeldOutSet:
    """Examples of a store that are only measured, laid out once for this world.

    example_ids: `[N]`, which of the store. `loss_of(engine)` is -sum w log P over every response token, with the
    weights that `loss` gives the set as one global batch.
    """

    store: TokenStore
    example_ids: NDArray[np.int64]
    loss: LossName
    pack_tokens: int | None
    cost: CostModel
    world_size: int

    @cached_property
    def micro_steps(self) -> tuple[tuple[Pack, ...], ...]:
        """micro_steps[m][rank]: the pack that `rank` measures in micro-step m."""
        layout, _ = spread(
            self.example_ids,
            lengths=self.store.lengths,
            num_responses=self.store.num_responses,
            world_size=self.world_size,
            pack_tokens=self.pack_tokens,
            cost=self.cost,
        )
        return layout

    @property
    def num_responses(self) -> NDArray[np.integer]:
        """Trained tokens of each example: `[N]`."""
        return np.asarray(self.store.num_responses)[self.example_ids]

    def loss_of(self, engine: Measurable, *, on_progress: Callable[[], None] = lambda: None) -> float:
        """Held-out loss in nats, the same on every rank. Touches neither gradients nor random state.

        on_progress: called before each micro-batch.
        """
        store, rank = self.store, engine.world.rank
        weights = token_weights(self.num_responses, loss=self.loss)
        weight_of = dict(zip(self.example_ids.tolist(), weights.tolist(), strict=True))
        total = torch.zeros((), dtype=torch.float64, device=engine.device)
        with evaluating(engine.model):
            for row in self.micro_steps:
                on_progress()
                total += engine(build_micro_batch(store, row[rank], weight_of, is_last=False).to(engine.device))
        return float(sum_over_ranks(total))
