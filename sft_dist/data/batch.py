"""Example ids to the tensors of a micro-batch. Targets are shifted here, once per document, and nowhere else.

pack            doc A = [u u u R R]      doc B = [u R R]
position_ids    0 1 2 3 4                0 1 2
cu_seqlens      0                   5            8
response_index  2 3                      5 6         the position that predicts each R
targets         R R                      R R
weights         1/(N*2) each             1/(N*2) each
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sft_dist.config import LossName
from sft_dist.data.schedule import GlobalBatch, Pack
from sft_dist.data.store import TokenStore

FILLER_TOKENS = 2


@dataclass(frozen=True)
class MicroBatch:
    """One pack on one rank. T = packed tokens, S = documents, R = response tokens.

    input_ids [1,T], position_ids [1,T] int64; cu_seqlens [S+1] int32, cu_seqlens[-1] == T; max_seqlen: int.
    response_index [R] int64: positions whose next token is trained. targets [R] int64. weights [R] fp32,
    final: they sum to 1 over the whole global batch. A filler has T == 2 and R == 0.
    document_lengths: the S lengths as Python numbers, so that nobody reads cu_seqlens back from a device.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    response_index: Tensor
    targets: Tensor
    weights: Tensor
    document_lengths: tuple[int, ...]
    is_last: bool = False
    is_filler: bool = False

    def to(self, device: torch.device) -> "MicroBatch":
        """The same batch on `device`; from pinned memory the copies do not block the host."""
        tensors = {
            name: value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return MicroBatch(**(vars(self) | tensors))


@dataclass(frozen=True)
class StepBatch:
    """What one rank runs in one step, and what the step holds over all ranks. sum_squares: of document lengths."""

    step: int
    epoch: int
    micros: tuple[MicroBatch, ...]
    num_examples: int
    num_tokens: int
    num_responses: int
    sum_squares: int
    pack_fill: float
    imbalance: float
    example_ids: np.ndarray
    packs: tuple[Pack, ...]


def token_weights(num_responses: np.ndarray, *, loss: LossName) -> np.ndarray:
    """Weight of each response token of each example of a global batch: `[N]` float64.

    example_mean: 1 / (N * |y_i|), the SFT loss -1/N sum_i 1/|y_i| sum_t log P(y_t | x, y_<t).
    token_mean: 1 / sum_i |y_i|.
    """
    if loss == "example_mean":
        return 1.0 / (len(num_responses) * num_responses.astype(np.float64))
    return np.full(len(num_responses), 1.0 / num_responses.sum(dtype=np.float64))


def build_micro_batch(store: TokenStore, pack: Pack, weight_of: dict[int, float], *, is_last: bool) -> MicroBatch:
    """Lay the pack's examples end to end. An empty pack gives a filler document without responses.

    weight_of: weight of each response token, by example id.
    """
    if not pack:
        return _assemble([np.zeros(FILLER_TOKENS, np.int64)], [np.zeros(FILLER_TOKENS, bool)], [0.0], is_last, True)
    examples = [store.example(i) for i in pack]
    return _assemble(
        [np.asarray(example.input_ids, np.int64) for example in examples],
        [np.asarray(example.is_response, bool) for example in examples],
        [weight_of[i] for i in pack],
        is_last,
        False,
    )


def _assemble(
    ids: list[np.ndarray], masks: list[np.ndarray], weights: list[float], is_last: bool, is_filler: bool
) -> MicroBatch:
    lengths = [len(document) for document in ids]
    cu_seqlens = np.concatenate(([0], np.cumsum(lengths)))
    trained = [np.flatnonzero(mask) for mask in masks]
    # A token is predicted from the position before it, within its own document: position 0 is never trained.
    index = [start + positions - 1 for start, positions in zip(cu_seqlens, trained, strict=False)]
    targets = [document[positions] for document, positions in zip(ids, trained, strict=True)]
    per_token = [
        np.full(len(positions), weight, np.float32) for positions, weight in zip(trained, weights, strict=True)
    ]
    return MicroBatch(
        input_ids=torch.from_numpy(np.concatenate(ids))[None],
        position_ids=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))[None],
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        max_seqlen=max(lengths),
        response_index=torch.from_numpy(np.concatenate(index)),
        targets=torch.from_numpy(np.concatenate(targets)),
        weights=torch.from_numpy(np.concatenate(per_token)),
        document_lengths=tuple(lengths),
        is_last=is_last,
        is_filler=is_filler,
    )


def build_step(
    store: TokenStore, batch: GlobalBatch, *, rank: int, loss: LossName, pack_tokens: int | None
) -> StepBatch:
    """This rank's micro-batches of a step, with weights that are final."""
    ids = batch.example_ids
    num_responses = store.num_responses[ids]
    # A draw may occur twice in a step (source weights above 1): both copies carry the same weight.
    weight_of = dict(zip(ids.tolist(), token_weights(num_responses, loss=loss).tolist(), strict=True))
    last = len(batch.micro_steps) - 1
    micros = tuple(
        build_micro_batch(store, row[rank], weight_of, is_last=m == last) for m, row in enumerate(batch.micro_steps)
    )
    num_tokens = int(store.lengths[ids].sum())
    num_packs = sum(len(row) for row in batch.micro_steps)
    capacity = num_packs * pack_tokens if pack_tokens else num_tokens
    return StepBatch(
        step=batch.step,
        epoch=batch.epoch,
        micros=micros,
        num_examples=len(ids),
        num_tokens=num_tokens,
        num_responses=int(num_responses.sum()),
        sum_squares=int((store.lengths[ids] ** 2).sum()),
        pack_fill=num_tokens / capacity,
        imbalance=batch.imbalance,
        example_ids=ids,
        packs=tuple(row[rank] for row in batch.micro_steps),
    )


def load_steps(
    store: TokenStore,
    batches: Iterator[GlobalBatch],
    *,
    rank: int,
    loss: LossName,
    pack_tokens: int | None,
    device: torch.device,
) -> Iterator[StepBatch]:
    """Steps in order, each laid out, built and on its way to the device while the one before it runs."""

    def build_next() -> StepBatch | None:
        batch = next(batches, None)
        if batch is None:
            return None
        step = build_step(store, batch, rank=rank, loss=loss, pack_tokens=pack_tokens)
        return StepBatch(**(vars(step) | {"micros": tuple(micro.to(device) for micro in step.micros)}))

    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        ahead = pool.submit(build_next)
        while (step := ahead.result()) is not None:
            ahead = pool.submit(build_next)
            yield step
