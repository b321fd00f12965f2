"""The schedule: steps from data and seed alone, then a layout that computes the same."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import schedule as bench
from sft_dist.data.draws import Draws, Pool
from sft_dist.data.schedule import CostModel, Schedule, dominated_steps, global_batches, spread, step_bounds
from sft_dist.errors import ConfigError

COST = CostModel(1.0, 0.2, 0.001)
lengths_strategy = st.lists(st.integers(2, 300), min_size=1, max_size=80)


def make_schedule(lengths: list[int], **settings: object) -> Schedule:
    array = np.array(lengths, dtype=np.int64)
    return Schedule(array, np.maximum(1, array // 3), **{"seed": 7, "epochs": 1, "examples": 8, **settings})


@settings(max_examples=60)
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


@pytest.mark.parametrize("kind", [bench.CHAT, bench.LONG_TAIL], ids=lambda kind: kind.name)
@pytest.mark.parametrize("world_size", [2, 16])
def test_no_pack_is_overfilled_when_examples_change_places(kind: bench.Lengths, world_size: int) -> None:
    for seed in range(20):
        lengths, responses = kind.draw(128, seed=seed)
        pack_tokens = max(int(lengths.max()), int(lengths.sum() / world_size * 1.02))
        micro_steps, _ = spread(
            np.arange(128),
            lengths=lengths,
            num_responses=responses,
            world_size=world_size,
            pack_tokens=pack_tokens,
            cost=bench.COST,
        )
        assert max(lengths[list(pack)].sum() for row in micro_steps for pack in row) <= pack_tokens, seed


@settings(max_examples=40)
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


@pytest.mark.parametrize("world_size", [8, 16, 32, 64])
@pytest.mark.parametrize("kind", bench.KINDS, ids=lambda kind: kind.name)
def test_steps_are_as_even_as_can_be(kind: bench.Lengths, world_size: int) -> None:
    """By the costs of a 1.5B model: within 0.6% of what no layout can beat, and ahead of every other way."""
    for examples in (32, 64, 128, 256, 512):
        cell = bench.measure_cell(kind, examples=examples, world_size=world_size, num_steps=8)
        windows = bench.measure_windows(kind, world_size=world_size, examples=examples, num_steps=8)
        others = (cell.best_fit, cell.random, float(np.mean([dealt for _, dealt, _, _ in windows])))
        assert cell.ours <= 1.006 * cell.bound, examples
        # With a rank for every example, one each is the best there is, and dealing finds that, too.
        assert cell.ours < min(others) or cell.ours == pytest.approx(cell.bound, rel=1e-6), examples
        assert cell.ours <= min(others) * (1 + 1e-6), examples


def test_packs_that_hold_as_much_as_they_can_are_evened_out_too() -> None:
    """On the steps that windowed best-fit itself makes, a full pack a rank, and four."""
    for packs in (8, 32):
        for examples, dealt, ours, _ in bench.measure_windows(bench.CHAT, world_size=8, packs=packs, num_steps=5):
            assert ours < min(dealt, 1.01), examples


def test_a_thousand_ranks_are_balanced() -> None:
    """Measured 1.002 and 0.13 s: it is made while the step before it runs."""
    cell = bench.measure_cell(bench.CHAT, examples=16384, world_size=1024, num_steps=1)
    assert cell.ours < 1.01
    assert cell.ms < 1000


def best_layout(lengths: list[int], world_size: int, pack_tokens: int, num_rows: int) -> float:
    """The smallest imbalance of all layouts in `num_rows` micro-steps, tried one after another."""
    best = float("inf")
    for packs in product(range(world_size * num_rows), repeat=len(lengths)):
        loads = np.bincount(packs, weights=lengths, minlength=world_size * num_rows).reshape(num_rows, world_size)
        if loads.max() <= pack_tokens:
            best = min(best, loads.max(axis=1).sum())
    return best * world_size / sum(lengths)


@pytest.mark.parametrize("seed", range(6))
def test_small_steps_are_near_the_best_of_all_layouts(seed: int) -> None:
    """6 examples on 2 ranks. The bound of the benchmark is below the best, and the schedule hardly above."""
    lengths = np.random.default_rng(seed).integers(10, 100, 6)
    pack_tokens = 120
    micro_steps, imbalance = spread(
        np.arange(6), lengths=lengths, num_responses=lengths, world_size=2, pack_tokens=pack_tokens, cost=CostModel()
    )
    best = best_layout(lengths.tolist(), 2, pack_tokens, len(micro_steps))
    bound = bench.lower_bound(lengths, lengths.astype(float), world_size=2, pack_tokens=pack_tokens)
    assert bound - 1e-9 <= best <= imbalance + 1e-5  # costs are rounded to a millionth of the largest
    assert imbalance <= 1.12 * best


def test_beside_a_long_example_the_other_ranks_get_as_much_to_do() -> None:
    """One document of 4000 beside 60 of 100, two ranks: the first micro-step is filled up to it, nobody waits."""
    lengths = np.array([4000] + [100] * 60)
    micro_steps, imbalance = spread(
        np.arange(61), lengths=lengths, num_responses=lengths, world_size=2, pack_tokens=4000, cost=CostModel()
    )
    assert len(micro_steps) == 2
    assert sorted(int(lengths[list(pack)].sum()) for pack in micro_steps[0]) == [4000, 4000]
    assert imbalance == 1.0


def test_ties_are_broken_by_place() -> None:
    """Equal examples are laid out alike wherever: in draw order, first place first."""
    lengths = np.full(8, 10)
    micro_steps, _ = spread(
        np.arange(8)[::-1], lengths=lengths, num_responses=lengths, world_size=2, pack_tokens=20, cost=COST
    )
    assert micro_steps == (((7, 3), (6, 2)), ((5, 1), (4, 0)))


def test_a_pack_keeps_the_order_of_the_draws() -> None:
    lengths = np.random.default_rng(0).integers(10, 300, 64)
    ids = np.random.default_rng(1).permutation(64)
    place = {example_id: index for index, example_id in enumerate(ids.tolist())}
    micro_steps, _ = spread(ids, lengths=lengths, num_responses=lengths, world_size=4, pack_tokens=900, cost=COST)
    for row in micro_steps:
        for pack in row:
            assert [place[i] for i in pack] == sorted(place[i] for i in pack)


def test_costs_of_a_model_are_its_flops() -> None:
    """Qwen2.5-1.5B, 6*N_body*T + 6*N_head*R + 6*L*Hq*D*sum(len**2): whatever a pack holds, cost times 6*N_body."""
    for lengths, responses in (([100], [0]), ([100, 4000], [90, 7])):
        tokens, trained = np.array(lengths), np.array(responses)
        flops = bench.QWEN.step_flops(
            tokens=int(tokens.sum()), responses=int(trained.sum()), sum_squares=int((tokens**2).sum())
        )
        cost = float(bench.COST.of(tokens, trained).sum())
        assert cost * 6 * bench.QWEN.body_params == pytest.approx(flops, rel=1e-12)


def test_measured_costs_are_fitted_and_never_negative() -> None:
    rng = np.random.default_rng(0)
    measures = rng.uniform(1, 100, (60, 3))
    assert bench.fit(measures, measures @ [2.0, 0.5, 0.1]) == pytest.approx([2.0, 0.5, 0.1], rel=1e-9)
    held_at_zero = bench.fit(measures, measures @ [2.0, 0.5, -0.01])
    assert held_at_zero[2] == 0
    assert held_at_zero[:2] == pytest.approx([2.0, 0.5], rel=0.05)


def test_steps_that_one_example_dominates_are_counted_and_the_worst_is_named() -> None:
    """Epoch 1 of two, steps of 10 draws and a last of 5: what a loop over the steps finds."""
    lengths = np.random.default_rng(5).integers(10, 100, 95)
    lengths[[3, 50]] = 900, 1500
    schedule = Schedule(lengths, lengths // 2, seed=0, examples=10, epochs=2)
    found = {}
    for step in range(11, 21):
        ids = schedule.example_ids(step)[1]
        costs = COST.of(lengths[ids], lengths[ids] // 2)
        found[step] = (costs.max() / (costs.sum() / 4), int(ids[costs.argmax()]))
    dominated = dominated_steps(schedule, step=14, world_size=4, cost=COST)
    assert dominated is not None
    assert dominated.num_steps == sum(share > 2 for share, _ in found.values()) > 0
    assert dominated.num_all == 10
    assert (dominated.share, dominated.example_id) == pytest.approx(max(found.values()))
    assert found[dominated.step] == max(found.values())
    assert dominated_steps(schedule, step=14, world_size=1, cost=COST) is None


def test_dominated_steps_are_counted_from_where_a_later_segment_begins() -> None:
    lengths = np.array([10] * 19 + [500])
    fresh = Schedule(lengths, lengths, seed=1, examples=10, epochs=1)
    later = Schedule(lengths, lengths, seed=1, examples=10, epochs=1, after_step=7)
    first = dominated_steps(fresh, step=1, world_size=4, cost=COST)
    then = dominated_steps(later, step=8, world_size=4, cost=COST)
    assert first is not None
    assert then is not None
    assert (then.step, then.example_id) == (first.step + 7, 19)


def test_an_example_longer_than_a_pack_is_refused_not_cut() -> None:
    with pytest.raises(ConfigError, match=r"pack_tokens=50 .* 60 tokens"):
        spread(
            np.arange(1), lengths=np.array([60]), num_responses=np.array([5]), world_size=1, pack_tokens=50, cost=COST
        )


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
