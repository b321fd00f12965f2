"""The schedule: steps from data and seed alone, then a layout that computes the same."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_dist.data.draws import Draws, Pool
from sft_dist.data.schedule import CostModel, Schedule, global_batches, spread, step_bounds
from sft_dist.errors import ConfigError

COST = CostModel(1.0, 0.2, 0.001)
lengths_strategy = st.lists(st.integers(2, 300), min_size=1, max_size=80)


def make_schedule(lengths: list[int], **settings: object) -> Schedule:
    array = np.array(lengths, dtype=np.int64)
    return Schedule(array, np.maximum(1, array // 3), **{"seed": 7, "epochs": 1, "examples": 8, **settings})


@settings(max_examples=60, deadline=None)
@given(lengths_strategy, st.integers(1, 7), st.sampled_from([300, 512, 4096, None]))
def test_every_draw_of_a_step_is_trained_exactly_once(lengths: list[int], world: int, pack_tokens: int | None) -> None:
    array = np.array(lengths, dtype=np.int64)
    ids = np.random.default_rng(0).permutation(len(lengths))
    micro_steps, imbalance = spread(
        ids, lengths=array, num_responses=array // 2, world_size=world, pack_tokens=pack_tokens, cost=COST
    )
    assert sorted(i for row in micro_steps for pack in row for i in pack) == sorted(ids.tolist())
    assert all(len(row) == world for row in micro_steps), "every rank runs every micro-step"
    assert any(pack for pack in micro_steps[-1]), "no micro-step is all filler"
    assert imbalance >= 1.0 - 1e-9
    for row in micro_steps:
        for pack in row:
            assert array[list(pack)].sum() <= (pack_tokens or array.max())
            assert pack_tokens is not None or len(pack) <= 1


@settings(max_examples=40, deadline=None)
@given(lengths_strategy, st.integers(1, 9), st.integers(1, 4))
def test_steps_do_not_depend_on_world_or_pack_size(lengths: list[int], world: int, epochs: int) -> None:
    schedule = make_schedule(lengths, epochs=epochs)
    one = [
        b.example_ids.tolist()
        for b in global_batches(schedule, first_step=1, world_size=1, pack_tokens=None, cost=COST)
    ]
    many = [
        b.example_ids.tolist()
        for b in global_batches(schedule, first_step=1, world_size=world, pack_tokens=300, cost=COST)
    ]
    assert one == many
    assert sorted(i for step in one for i in step) == sorted(list(range(len(lengths))) * epochs)


def test_an_epoch_ends_a_step_and_the_next_is_reshuffled() -> None:
    schedule = make_schedule([10] * 20, epochs=2)
    sizes = [len(schedule.example_ids(step)[1]) for step in range(1, schedule.num_steps + 1)]
    epochs = [schedule.example_ids(step)[0] for step in range(1, schedule.num_steps + 1)]
    assert sizes == [8, 8, 4, 8, 8, 4]
    assert epochs == [0, 0, 0, 1, 1, 1]
    assert schedule.example_ids(1)[1].tolist() != schedule.example_ids(4)[1].tolist()


def test_a_run_can_start_at_any_step() -> None:
    schedule = make_schedule([10] * 37, epochs=3)
    whole = list(global_batches(schedule, first_step=1, world_size=2, pack_tokens=40, cost=COST))
    for first in (2, 5, 6, schedule.num_steps):
        resumed = list(
            global_batches(
                make_schedule([10] * 37, epochs=3), first_step=first, world_size=2, pack_tokens=40, cost=COST
            )
        )
        assert [(b.step, b.micro_steps) for b in resumed] == [(b.step, b.micro_steps) for b in whole[first - 1 :]]


def test_seed_and_epoch_decide_the_draws() -> None:
    def draws(seed: int, epoch: int) -> list[int]:
        return Draws([Pool(np.arange(50))], seed=seed).of_epoch(epoch).tolist()

    assert draws(1, 0) == draws(1, 0)
    assert draws(1, 0) != draws(2, 0)
    assert draws(1, 0) != draws(1, 1)


def test_weights_are_copies_plus_a_seeded_subset() -> None:
    pools = [Pool(np.arange(10), weight=2.5), Pool(np.arange(10, 30), weight=0.25)]
    counts = np.bincount(Draws(pools, seed=3).of_epoch(0), minlength=30)
    assert sorted(counts[:10].tolist()) == [2] * 5 + [3] * 5
    assert sorted(counts[10:].tolist()) == [0] * 15 + [1] * 5


def test_steps_by_tokens_end_with_the_draw_that_reaches_the_total() -> None:
    bounds = step_bounds(np.array([5, 5, 5, 20, 1, 1, 1]), examples=None, tokens=10)
    assert bounds.tolist() == [0, 2, 4, 7]


def test_steps_by_tokens_take_what_the_run_asks_for() -> None:
    schedule = make_schedule([10] * 12, examples=None, tokens=35, epochs=None, steps=7)
    assert schedule.num_steps == 7
    assert [len(schedule.example_ids(step)[1]) for step in range(1, 8)] == [4] * 7


def test_the_number_of_packs_is_the_smallest_that_fits() -> None:
    lengths = np.full(12, 100)
    micro_steps, _ = spread(
        np.arange(12), lengths=lengths, num_responses=lengths // 2, world_size=2, pack_tokens=600, cost=COST
    )
    assert len(micro_steps) == 1
    micro_steps, _ = spread(
        np.arange(12), lengths=lengths, num_responses=lengths // 2, world_size=2, pack_tokens=599, cost=COST
    )
    assert len(micro_steps) == 2


def test_packs_that_run_side_by_side_cost_alike() -> None:
    """Chat-like lengths on a 1.5B model, 256 examples on 8 ranks: the barrier cost stays within 2% of the ideal."""
    cost = CostModel.from_shape(body_params=1_310_000_000, head_params=233_000_000, num_layers=28, attention_width=1536)
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(6, 0.8, 256), 16, 4096).astype(np.int64)
    _, imbalance = spread(
        np.arange(256), lengths=lengths, num_responses=lengths // 3, world_size=8, pack_tokens=16384, cost=cost
    )
    assert imbalance <= 1.02


def test_an_example_longer_than_a_pack_is_refused_not_cut() -> None:
    with pytest.raises(ConfigError, match=r"pack_tokens=50 .* 60 tokens"):
        spread(
            np.arange(1), lengths=np.array([60]), num_responses=np.array([5]), world_size=1, pack_tokens=50, cost=COST
        )


def test_a_million_examples_are_scheduled_quickly() -> None:
    lengths = np.random.default_rng(0).integers(10, 2000, 10**6)
    started = time.perf_counter()
    schedule = Schedule(lengths, lengths // 2, seed=0, examples=512, epochs=1)
    schedule.example_ids(schedule.num_steps)
    assert time.perf_counter() - started < 2.0  # measured 0.05 s; the bar leaves room for a busy machine


def test_a_later_segment_draws_from_its_own_first_step() -> None:
    """After step 7 other data begins: its steps are those of a fresh run, counted on; train.steps counts them all."""
    lengths = np.arange(5, 25)
    fresh = Schedule(lengths, lengths, seed=1, examples=6, steps=13)
    later = Schedule(lengths, lengths, seed=1, examples=6, steps=20, after_step=7)
    assert (later.first_step, later.num_steps) == (8, 20)
    for step in range(1, 14):
        assert later.example_ids(7 + step)[1].tolist() == fresh.example_ids(step)[1].tolist()
    assert Schedule(lengths, lengths, seed=1, examples=6, epochs=2, after_step=7).num_steps == 7 + 2 * 4
    assert Schedule(lengths, lengths, seed=1, examples=6, steps=5, after_step=7).num_steps == 5
