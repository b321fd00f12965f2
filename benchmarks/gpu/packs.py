"""Packs to measure on: made-up token ids in documents as long as chats are, the same for every side."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gpu.models import Case

from sft_dist.data.schedule import GlobalBatch
from sft_dist.data.store import TokenStore
from sft_dist.shape import ModelShape

MEDIAN_TOKENS = 350
SPREAD = 1.0
"""Document lengths are log-normal, most between 100 and 1000 tokens, cut at a quarter of a pack."""

LEAST_TOKENS = 16
RESPONSE_SHARE = (1.5, 3.5)
"""Of a document's tokens, the share that is trained: a beta distribution with the mean 0.3."""


@dataclass(frozen=True)
class Counts:
    """Of some packs: T, R, and the sum of squared document lengths."""

    tokens: int
    responses: int
    sum_squares: int

    def flops(self, shape: ModelShape) -> float:
        """Forward and backward, `ModelShape.step_flops`."""
        return shape.step_flops(tokens=self.tokens, responses=self.responses, sum_squares=self.sum_squares)


@dataclass(frozen=True)
class Steps:
    """The global batches of a measurement, one rank, each of the same number of packs."""

    store: TokenStore
    batches: tuple[GlobalBatch, ...]

    def count(self, batches: Sequence[GlobalBatch]) -> Counts:
        ids = np.concatenate([batch.example_ids for batch in batches])
        lengths = self.store.lengths[ids]
        return Counts(int(lengths.sum()), int(self.store.num_responses[ids].sum()), int((lengths**2).sum()))


def make_steps(case: Case, *, num_steps: int, seed: int = 0) -> Steps:
    """`num_steps` steps of `case.packs` packs. A pack ends before the document that would not fit: sizes differ."""
    rng = np.random.default_rng(seed)
    longest = case.pack_tokens // 4
    median = min(MEDIAN_TOKENS, longest // 4)
    lengths: list[int] = []
    batches = []
    for step in range(1, num_steps + 1):
        first, rows = len(lengths), []
        for _ in range(case.packs):
            pack, room = [], case.pack_tokens
            while True:
                length = int(np.clip(rng.lognormal(np.log(median), SPREAD), LEAST_TOKENS, longest))
                if length > room:
                    break
                pack.append(len(lengths))
                lengths.append(length)
                room -= length
            rows.append((tuple(pack),))
        batches.append(GlobalBatch(step, 0, np.arange(first, len(lengths)), tuple(rows), 1.0))
    return Steps(_make_store(np.asarray(lengths), case.config["vocab_size"], rng), tuple(batches))


def _make_store(lengths: np.ndarray, vocabulary: int, rng: np.random.Generator) -> TokenStore:
    """In memory, as if it had been read: each document is a prompt and then a response."""
    num_responses = np.clip((lengths * rng.beta(*RESPONSE_SHARE, len(lengths))).astype(np.int32), 1, lengths - 1)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    zeros = np.zeros(len(lengths), np.int64)
    return TokenStore(
        path=Path("made-up"),
        fingerprint="",
        meta={"files": ["made-up"], "sources": []},
        lengths=lengths.astype(np.int64),
        num_responses=num_responses,
        prompt_hash=zeros.astype(np.uint64),
        difficulty=np.full(len(lengths), np.nan),
        _offsets=offsets,
        _tokens=rng.integers(0, vocabulary, offsets[-1], dtype=np.int32),
        _response=place >= np.repeat(lengths - num_responses, lengths),
        _origin_file=zeros,
        _origin_line=np.arange(len(lengths)),
    )
