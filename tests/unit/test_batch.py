"""Micro-batches: positions restart, targets are the next token of the same document, weights are final."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from sft_dist.data.batch import build_micro_batch, build_step, load_steps, token_weights
from sft_dist.data.schedule import CostModel, Schedule, global_batches


@dataclass
class Row:
    input_ids: np.ndarray
    is_response: np.ndarray


class Rows:
    """What the batch builder needs of a store, held in memory."""

    def __init__(self, *rows: tuple[list[int], list[int]]) -> None:
        self.rows = [Row(np.array(ids, np.int32), np.array(mask, bool)) for ids, mask in rows]
        self.lengths = np.array([len(row.input_ids) for row in self.rows])
        self.num_responses = np.array([int(row.is_response.sum()) for row in self.rows])

    def example(self, index: int) -> Row:
        return self.rows[index]


ROWS = Rows(([10, 11, 12, 13, 14], [0, 0, 0, 1, 1]), ([20, 21, 22], [0, 1, 0]), ([30, 31], [0, 1]))


def test_a_pack_is_its_documents_end_to_end() -> None:
    micro = build_micro_batch(ROWS, (0, 1, 2), {0: 0.5, 1: 0.25, 2: 0.125}, is_last=True)
    assert micro.input_ids.tolist() == [[10, 11, 12, 13, 14, 20, 21, 22, 30, 31]]
    assert micro.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1]]
    assert micro.cu_seqlens.tolist() == [0, 5, 8, 10]
    assert micro.cu_seqlens.dtype == torch.int32
    assert micro.max_seqlen == 5
    assert micro.is_last


def test_a_trained_token_is_predicted_from_the_position_before_it() -> None:
    micro = build_micro_batch(ROWS, (0, 1, 2), {0: 0.5, 1: 0.25, 2: 0.125}, is_last=False)
    assert micro.response_index.tolist() == [2, 3, 5, 8]
    assert micro.targets.tolist() == [13, 14, 21, 31]
    assert micro.weights.tolist() == [0.5, 0.5, 0.25, 0.125]


def test_a_filler_is_a_document_without_responses() -> None:
    micro = build_micro_batch(ROWS, (), {}, is_last=True)
    assert micro.is_filler
    assert micro.input_ids.shape == (1, 2)
    assert len(micro.response_index) == len(micro.targets) == len(micro.weights) == 0


def test_example_mean_gives_every_example_the_same_total() -> None:
    counts = np.array([1, 300, 7])
    assert (token_weights(counts, loss="example_mean") * counts).tolist() == pytest.approx([1 / 3] * 3, rel=1e-15)


def test_token_mean_gives_every_token_the_same() -> None:
    assert token_weights(np.array([1, 3]), loss="token_mean").tolist() == [0.25, 0.25]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_weights_sum_to_one_over_all_ranks_and_micro_batches(world: int) -> None:
    rng = np.random.default_rng(0)
    rows = Rows(*[([1] * n, [0] + [1] * (n - 1)) for n in rng.integers(2, 40, 13)])
    schedule = Schedule(rows.lengths, rows.num_responses, seed=0, examples=13, epochs=1)
    (batch,) = global_batches(schedule, first_step=1, world_size=world, pack_tokens=64, cost=CostModel())
    steps = [build_step(rows, batch, rank=rank, loss="example_mean", pack_tokens=64) for rank in range(world)]
    assert len({len(step.micros) for step in steps}) == 1, "ranks with unequal counts deadlock"
    assert [micro.is_last for micro in steps[0].micros] == [False] * (len(steps[0].micros) - 1) + [True]
    # fp32 weights, 200 of them: rounding of 6e-8 each.
    assert sum(float(micro.weights.double().sum()) for step in steps for micro in step.micros) == pytest.approx(
        1.0, abs=1e-6
    )


def test_steps_are_built_one_ahead_in_order() -> None:
    schedule = Schedule(ROWS.lengths, ROWS.num_responses, seed=0, examples=2, epochs=3)
    batches = global_batches(schedule, first_step=1, world_size=1, pack_tokens=16, cost=CostModel())
    steps = list(load_steps(ROWS, batches, rank=0, loss="token_mean", pack_tokens=16, device=torch.device("cpu")))
    assert [step.step for step in steps] == [1, 2, 3, 4, 5, 6]
    assert [step.num_examples for step in steps] == [2, 1, 2, 1, 2, 1]


def test_a_rank_without_an_example_runs_a_filler() -> None:
    schedule = Schedule(ROWS.lengths, ROWS.num_responses, seed=0, examples=3, epochs=1)
    (batch,) = global_batches(schedule, first_step=1, world_size=2, pack_tokens=None, cost=CostModel())
    steps = [build_step(ROWS, batch, rank=rank, loss="example_mean", pack_tokens=None) for rank in range(2)]
    assert [len(step.micros) for step in steps] == [2, 2], "ranks with unequal counts deadlock"
    assert sorted(micro.is_filler for step in steps for micro in step.micros) == [False, False, False, True]
