"""What an epoch draws: copies, caps, orders and seeded splits; and that exactly this is trained, on every layout."""

import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rich.console import Console

from sft_dist.config import Recipe, parse_recipe
from sft_dist.data.batch import MicroBatch, build_step
from sft_dist.data.draws import (
    Draws,
    Pool,
    count_shared_prompts,
    ease_of,
    fingerprint_draws,
    hold_out,
    make_pools,
)
from sft_dist.data.schedule import CostModel, GlobalBatch, Schedule, global_batches
from sft_dist.errors import ConfigError
from sft_dist.evaluate import HeldOutSet
from sft_dist.job import Job, ResumeOptions, plan_job
from sft_dist.world import World
from tests import tiny

COST = CostModel(1.0, 0.2, 0.001)
# A token's id says where it lies: example * STRIDE + position.
STRIDE = 1000


@dataclass
class Row:
    input_ids: np.ndarray
    is_response: np.ndarray


class RandomStore:
    """What schedule and batch builder need of a store. sources: examples of each."""

    def __init__(self, sources: list[int], seed: int) -> None:
        rng, n = np.random.default_rng(seed), sum(sources)
        masks = [np.append(False, rng.random(length - 1) < rng.random()) for length in rng.integers(2, 24, n)]
        for mask in masks:
            mask[-1] |= not mask.any()
        self.rows = [Row(np.arange(len(mask)) + i * STRIDE, mask) for i, mask in enumerate(masks)]
        self.lengths = np.array([len(mask) for mask in masks])
        self.num_responses = np.array([mask.sum() for mask in masks])
        self.prompt_hash = hashes(n, seed)[rng.integers(0, n, n)]
        self.difficulty = rng.integers(0, 4, n).astype(float)
        ends = np.cumsum(sources).tolist()
        self.source_ranges = list(zip([0, *ends], ends, strict=False))

    def example(self, index: int) -> Row:
        return self.rows[index]

    def trained(self, index: int) -> list[int]:
        """The tokens of an example that are trained."""
        row = self.rows[index]
        return row.input_ids[row.is_response].tolist()


@dataclass(frozen=True)
class Case:
    """A random store and what a recipe makes of it."""

    store: RandomStore
    weights: list[float]
    caps: list[int | None]
    order: str
    share: float
    seed: int
    step_size: dict[str, int]
    loss: str
    epochs: int
    world: int
    pack_tokens: int | None

    @cached_property
    def is_held_out(self) -> np.ndarray:
        return hold_out(self.store.prompt_hash, share=self.share, seed=3)

    @cached_property
    def draws_by(self) -> dict[str, Any]:
        """What `Draws` and `Schedule` are made of."""
        store = self.store
        pools = make_pools(store.source_ranges, weights=self.weights, caps=self.caps, is_held_out=self.is_held_out)
        arrays = {"num_responses": store.num_responses, "difficulty": store.difficulty}
        ease = ease_of(self.order, ranges=store.source_ranges, **arrays)
        return {"pools": pools, "ease": ease, "seed": self.seed}

    def batches(self, first_step: int = 1) -> Iterator[GlobalBatch]:
        store, length = self.store, self.step_size | {"epochs": self.epochs}
        schedule = Schedule(store.lengths, store.num_responses, **self.draws_by, **length)
        layout = {"world_size": self.world, "pack_tokens": self.pack_tokens, "cost": COST}
        return global_batches(schedule, first_step=first_step, **layout)

    def micro_batches(self, batch: GlobalBatch) -> list[MicroBatch]:
        """A step's micro-batches on all ranks."""
        settings: dict[str, Any] = {"loss": self.loss, "pack_tokens": self.pack_tokens}
        steps = [build_step(self.store, batch, rank=rank, **settings) for rank in range(self.world)]
        return [micro for step in steps for micro in step.micros]


def hashes(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, n, dtype=np.uint64)


@st.composite
def cases(draw: Any) -> Case:
    sources = draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    one_each = {"min_size": len(sources), "max_size": len(sources)}
    case = Case(
        store=RandomStore(sources, draw(st.integers(0, 10**6))),
        weights=draw(st.lists(st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0, 2.75]), **one_each)),
        caps=draw(st.lists(st.sampled_from([None, 1, 2, 3, 5, 8]), **one_each)),
        order=draw(st.sampled_from(["shuffle", "source", "response_length", "field:hard"])),
        share=draw(st.sampled_from([0.0, 0.3, 0.6])),
        seed=draw(st.integers(0, 2**31 - 1)),
        step_size=draw(st.sampled_from([{"examples": n} for n in (1, 4, 9)] + [{"tokens": n} for n in (1, 20, 90)])),
        loss=draw(st.sampled_from(["example_mean", "token_mean"])),
        epochs=draw(st.integers(1, 3)),
        world=draw(st.integers(1, 4)),
        pack_tokens=draw(st.sampled_from([None, 24, 40, 200])),
    )
    try:
        Draws(**case.draws_by)
    except ConfigError:
        assume(False)  # nothing to hold out, or nothing to train
    return case


@settings(max_examples=250)
@given(cases())
def test_every_response_token_of_every_draw_is_trained_once_and_nothing_else(case: Case) -> None:
    store, draws = case.store, Draws(**case.draws_by)
    drawn: dict[int, list[int]] = {epoch: [] for epoch in range(case.epochs)}
    trained: dict[int, Counter[int]] = {epoch: Counter() for epoch in range(case.epochs)}
    for batch in case.batches():
        drawn[batch.epoch] += batch.example_ids.tolist()
        weights: Counter[int] = Counter()
        for micro in case.micro_batches(batch):
            # Ids say where tokens lie: each target is predicted from the token before it.
            assert (micro.input_ids[0, micro.response_index] == micro.targets - 1).all()
            trained[batch.epoch].update(micro.targets.tolist())
            for target, weight in zip(micro.targets.tolist(), micro.weights.tolist(), strict=True):
                weights[target] += weight
        times = Counter(batch.example_ids.tolist())
        num_tokens = sum(store.num_responses[i] * times[i] for i in times)
        assert math.fsum(weights.values()) == pytest.approx(1.0, abs=1e-6)  # weights are fp32
        for target, weight in weights.items():
            i = target // STRIDE
            one = 1 / (len(batch.example_ids) * store.num_responses[i])
            expected = one if case.loss == "example_mean" else 1 / num_tokens
            assert weight == pytest.approx(times[i] * expected, rel=1e-6)
    for epoch in range(case.epochs):
        assert drawn[epoch] == draws.of_epoch(epoch).tolist(), "steps hold the draws of their own epoch, in order"
        assert trained[epoch] == Counter(token for i in drawn[epoch] for token in store.trained(i))
        assert not case.is_held_out[drawn[epoch]].any()


@settings(max_examples=250)
@given(cases())
def test_a_source_gives_what_its_cap_leaves_as_often_as_its_weight_says(case: Case) -> None:
    draws = Draws(**case.draws_by)
    for epoch in range(case.epochs):
        times = Counter(draws.of_epoch(epoch).tolist())
        for (first, last), weight, cap in zip(case.store.source_ranges, case.weights, case.caps, strict=True):
            num = int((~case.is_held_out[first:last]).sum())
            num = num if cap is None else min(num, cap)
            of_source = [times[i] for i in range(first, last) if times[i]]
            whole = math.floor(weight)
            assert sum(of_source) == num * whole + round((weight - whole) * num)
            assert all(whole <= count <= whole + 1 for count in of_source)
            assert len(of_source) == num or whole == 0


@settings(max_examples=40)
@given(cases(), st.data())
def test_a_run_goes_on_from_any_step_with_the_same_batches(case: Case, data: st.DataObject) -> None:
    def shown(batches: Iterator[GlobalBatch]) -> list[Any]:
        return [(batch.step, batch.epoch, batch.example_ids.tolist(), batch.micro_steps) for batch in batches]

    whole = shown(case.batches())
    first = data.draw(st.integers(1, len(whole)))
    assert shown(case.batches(first)) == whole[first - 1 :]


def everything(n: int, **settings: Any) -> Pool:
    return Pool(np.arange(n), **settings)


def test_without_caps_and_splits_an_epoch_is_one_seeded_permutation() -> None:
    """Written out, so that the curve of a run does not move when this code does."""
    for seed, epoch in [(0, 0), (3, 0), (3, 7)]:
        rng = np.random.Generator(np.random.PCG64([seed, epoch]))
        extra_of_first = rng.choice(np.arange(10), size=5, replace=False)
        extra_of_second = rng.choice(np.arange(10, 30), size=5, replace=False)
        parts = [np.arange(10), np.arange(10), extra_of_first, extra_of_second]
        pools = make_pools([(0, 10), (10, 30)], weights=[2.5, 0.25], caps=[10, None], is_held_out=np.zeros(30, bool))
        expected = rng.permutation(np.concatenate(parts)).tolist()
        assert Draws(pools, seed=seed).of_epoch(epoch).tolist() == expected


@settings(max_examples=60)
@given(st.integers(2, 40), st.data(), st.integers(0, 1000))
def test_under_a_cap_all_examples_come_up_as_evenly_as_they_can(num: int, data: st.DataObject, seed: int) -> None:
    cap = data.draw(st.integers(1, num - 1))
    draws, times = Draws([everything(num, cap=cap)], seed=seed), np.zeros(num, int)
    for epoch in range(2 * num):
        ids = draws.of_epoch(epoch)
        assert len(set(ids.tolist())) == len(ids) == cap
        times[ids] += 1
        assert times.max() - times.min() <= 1, f"after epoch {epoch}: {times.tolist()}"


def test_a_cap_takes_another_seeded_subset_in_every_epoch() -> None:
    draws = Draws([everything(100, cap=30)], seed=1)
    epochs = [draws.of_epoch(epoch).tolist() for epoch in range(12)]
    assert len({tuple(sorted(ids)) for ids in epochs}) == 12
    assert sorted(i for ids in epochs[:10] for i in ids) == sorted(list(range(100)) * 3), "three decks in ten epochs"
    fresh = Draws([everything(100, cap=30)], seed=1)
    assert [fresh.of_epoch(epoch).tolist() for epoch in (11, 3, 7, 0)] == [epochs[epoch] for epoch in (11, 3, 7, 0)]
    assert set(Draws([everything(100, cap=30)], seed=2).of_epoch(0).tolist()) != set(epochs[0])


def test_two_sources_of_the_same_size_are_capped_by_different_subsets() -> None:
    pools = make_pools([(0, 50), (50, 100)], weights=[1, 1], caps=[25, 25], is_held_out=np.zeros(100, bool))
    ids = Draws(pools, seed=0).of_epoch(0)
    assert set(ids[ids < 50].tolist()) != set((ids[ids >= 50] - 50).tolist())


def test_the_cap_comes_before_the_copies() -> None:
    times = Counter(Draws([everything(50, weight=2.5, cap=10)], seed=0).of_epoch(0).tolist())
    assert sorted(times.values()) == [2] * 5 + [3] * 5


def test_sources_come_in_the_order_of_the_recipe_shuffled_inside() -> None:
    ranges = [(0, 10), (10, 30)]
    ease = ease_of("source", ranges=ranges, num_responses=np.ones(30, int), difficulty=np.full(30, np.nan))
    pools = make_pools(ranges, weights=[2, 1], caps=[None, None], is_held_out=np.zeros(30, bool))
    draws = Draws(pools, seed=0, ease=ease)
    first, second = draws.of_epoch(0).tolist(), draws.of_epoch(1).tolist()
    assert sorted(first[:20]) == sorted([*range(10)] * 2)
    assert sorted(first[20:]) == list(range(10, 30))
    assert first[:20] != sorted(first[:20])
    assert first[:20] != second[:20]
    assert first[20:] != second[20:]


@pytest.mark.parametrize("order", ["response_length", "field:hard"])
def test_easy_first_and_what_is_equally_easy_is_shuffled_anew(order: str) -> None:
    key = np.arange(40)[::-1] // 10
    given_arrays = {
        "num_responses": key if order == "response_length" else np.arange(40),
        "difficulty": key - 1.5 if order == "field:hard" else np.full(40, np.nan),
    }
    draws = Draws([everything(40, weight=2)], seed=0, ease=ease_of(order, ranges=[(0, 40)], **given_arrays))
    first, second = draws.of_epoch(0), draws.of_epoch(1)
    for ids in (first, second):
        assert key[ids].tolist() == sorted(key.tolist() * 2)
        assert sorted(ids.tolist()) == sorted([*range(40)] * 2)
    for start in range(0, 80, 20):
        tied = first[start : start + 20].tolist()
        assert tied != second[start : start + 20].tolist()
        assert tied != sorted(tied)


def test_draws_that_are_equally_easy_stay_in_the_order_of_the_shuffle() -> None:
    """So no sorting routine of another machine or version orders them otherwise."""
    ease = np.arange(5000) % 3
    shuffled = Draws([everything(5000)], seed=0).of_epoch(1).tolist()
    assert Draws([everything(5000)], seed=0, ease=ease).of_epoch(1).tolist() == sorted(shuffled, key=lambda i: ease[i])


def test_a_row_without_a_difficulty_is_refused_by_an_order_that_needs_one() -> None:
    known = {"ranges": [(0, 3)], "num_responses": np.ones(3, int), "difficulty": np.array([1.0, np.nan, np.nan])}
    with pytest.raises(ConfigError, match=r"data\.order: field:hard .* 2 of 3 examples have none"):
        ease_of("field:hard", **known)
    assert ease_of("shuffle", **known) is None


def test_the_side_of_a_prompt_is_a_hash_of_seed_and_prompt() -> None:
    """Written out in Python's integers, so that no version of numpy moves an example to the other side."""

    def finalised(value: int) -> int:
        value = (value + 0x9E3779B97F4A7C15) % 2**64
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        return value ^ value >> 31

    assert finalised(0) == 0xE220A8397B1DCDAF, "the published generator's first number for seed 0"
    prompts = hashes(200)
    for seed, share in [(0, 0.3), (17, 0.5), (2**31 - 1, 0.9)]:
        expected = [Fraction(finalised(int(p) ^ finalised(seed)), 2**64) < Fraction(share) for p in prompts]
        assert hold_out(prompts, share=share, seed=seed).tolist() == expected


@settings(max_examples=60)
@given(st.integers(0, 2**31 - 1), st.floats(0.2, 0.8), st.integers(0, 1000))
def test_equal_prompts_fall_on_one_side_whatever_is_added_or_moved(seed: int, share: float, content: int) -> None:
    rng = np.random.default_rng(content)
    prompts = hashes(100, content)
    rows = prompts[rng.integers(0, 100, 300)]
    is_held_out = hold_out(rows, share=share, seed=seed)
    assert not np.intersect1d(rows[is_held_out], rows[~is_held_out]).size
    order = rng.permutation(300)
    moved = np.concatenate([hashes(50, content + 1), rows[order]])
    assert (hold_out(moved, share=share, seed=seed)[50:] == is_held_out[order]).all()


def test_the_share_is_met_and_a_larger_one_holds_out_more_of_the_same() -> None:
    prompts = hashes(100_000)
    small, large = hold_out(prompts, share=0.05, seed=1), hold_out(prompts, share=0.2, seed=1)
    # Four standard deviations of a binomial.
    assert abs(small.mean() - 0.05) < 4 * math.sqrt(0.05 * 0.95 / 1e5)
    assert abs(large.mean() - 0.2) < 4 * math.sqrt(0.2 * 0.8 / 1e5)
    assert not (small & ~large).any()
    other = hold_out(prompts, share=0.2, seed=2)
    assert abs((large & other).mean() - 0.04) < 4 * math.sqrt(0.04 * 0.96 / 1e5), "another seed, another split"
    assert not hold_out(prompts, share=0.0, seed=1).any()


def test_a_split_with_an_empty_side_is_refused_with_counts() -> None:
    with pytest.raises(ConfigError, match=r"holds out 0 of 20 examples \(20 different prompts\).*raise it"):
        hold_out(hashes(20), share=1e-9, seed=0)
    # One prompt, on the side that another seed would not choose for it.
    prompt = hashes(1)
    sides = [hold_out(np.append(prompt, hashes(99, 1)), share=0.5, seed=seed)[0] for seed in range(20)]
    with pytest.raises(ConfigError, match=r"holds out 7 of 7 examples \(1 different prompts\).*lower it"):
        hold_out(np.repeat(prompt, 7), share=0.5, seed=sides.index(True))


def test_prompts_on_both_sides_are_counted_once() -> None:
    trained = np.array([1, 1, 2, 3, 4], np.uint64)
    assert count_shared_prompts(trained, np.array([1, 1, 3, 9], np.uint64)) == (2, 3)
    assert count_shared_prompts(trained, np.array([8, 9], np.uint64)) == (0, 2)


def test_nothing_to_draw_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"no draws: .*3 at weight 0\.01.*raise a weight"):
        Draws([everything(3, weight=0.01)], seed=0)


SETTINGS: dict[str, Any] = {
    "data_fingerprint": "f",
    "seed": 0,
    "weights": [1.0, 2.0],
    "caps": [None, 5],
    "order": "shuffle",
    "held_out_share": 0.1,
    "held_out_seed": 0,
    "examples": 8,
    "tokens": None,
}


@pytest.mark.parametrize(
    "changed",
    [
        {"data_fingerprint": "g"},
        {"seed": 1},
        {"weights": [2.0, 1.0]},
        {"caps": [5, None]},
        {"order": "source"},
        {"held_out_share": 0.2},
        {"held_out_seed": 1},
        {"examples": None, "tokens": 8},
    ],
    ids=lambda changed: "-".join(changed),
)
def test_whatever_changes_the_draws_changes_the_fingerprint(changed: dict[str, Any]) -> None:
    assert fingerprint_draws(**SETTINGS | changed) != fingerprint_draws(**SETTINGS)
    assert fingerprint_draws(**SETTINGS) == fingerprint_draws(**SETTINGS | {"weights": [1, 2]})


def test_a_split_that_is_off_has_no_seed() -> None:
    assert fingerprint_draws(**SETTINGS | {"held_out_share": 0}) == fingerprint_draws(
        **SETTINGS | {"held_out_share": 0.0, "held_out_seed": 5}
    )


class SumOfWeights:
    """An engine whose loss is the sum of weight times target, so that a test can tell what was measured."""

    world, device, model = World(), torch.device("cpu"), torch.nn.Identity()

    def __call__(self, micro: Any) -> torch.Tensor:
        return (micro.weights.double() * micro.targets).sum()


def test_a_held_out_set_measures_its_own_examples_and_no_other() -> None:
    store, ids = RandomStore([12], seed=5), np.array([2, 3, 7])
    held_out = HeldOutSet(store, ids, "example_mean", 40, COST, 1)  # type: ignore[arg-type]
    expected = np.mean([np.mean(store.trained(i)) for i in ids])
    assert held_out.loss_of(SumOfWeights()) == pytest.approx(expected, rel=1e-6)  # type: ignore[arg-type]
    assert held_out.num_responses.tolist() == store.num_responses[ids].tolist()


def make_recipe(tmp_path: Path, model: Path, **data: Any) -> Recipe:
    tiny.write_chats(tmp_path / "train.jsonl", num_examples=60, seed=0, longest=60)
    raw = {
        "run": {"name": "r", "dir": str(tmp_path / "runs")},
        "model": {"path": str(model)},
        "data": {"train": str(tmp_path / "train.jsonl"), "workers": 1, **data},
        "batch": {"examples": 8},
        "optim": {"lr": 1e-3},
        "train": {"epochs": 2},
    }
    return parse_recipe(raw, origin="recipe")


def plan(recipe: Recipe) -> Job:
    return plan_job(recipe, console=Console(quiet=True), resume=ResumeOptions())


def test_a_run_measures_what_it_holds_out_and_trains_the_rest(tmp_path: Path, tied_model: Path) -> None:
    job = plan(make_recipe(tmp_path, tied_model, held_out_share=0.25, order="response_length"))
    held_out = job.held_out[0]
    assert held_out.store is job.store
    drawn = {i for step in range(1, job.schedule.num_steps + 1) for i in job.schedule.example_ids(step)[1].tolist()}
    assert sorted([*drawn, *held_out.ids.tolist()]) == list(range(len(job.store)))
    assert len(held_out.ids) >= 5
    first = job.schedule.example_ids(1)[1]
    assert job.store.num_responses[first].max() <= np.sort(job.store.num_responses[sorted(drawn)])[len(first) - 1]


def test_the_draws_are_part_of_what_ranks_agree_on_and_of_the_curve(tmp_path: Path, tied_model: Path) -> None:
    train = str(tmp_path / "train.jsonl")
    plain, capped = (plan(make_recipe(tmp_path, tied_model, train=[{"path": train, "cap": cap}])) for cap in (None, 20))
    assert plain.store.fingerprint == capped.store.fingerprint
    assert plain.draws != capped.draws
    assert plain.identity != capped.identity
    assert capped.first_state.segment.draws == capped.draws
    assert capped.first_state.curve["data.train.cap"] == [20]
    assert (plain.schedule.num_draws, capped.schedule.num_draws) == (60, 20)


def test_a_million_draws_with_caps_and_an_order_are_scheduled_quickly() -> None:
    n, rng = 10**6, np.random.default_rng(0)
    lengths, prompts, difficulty = rng.integers(10, 2000, n), hashes(n), rng.random(n)
    started = time.perf_counter()
    ranges = [(0, n // 2), (n // 2, n)]
    is_held_out = hold_out(prompts, share=0.01, seed=0)
    pools = make_pools(ranges, weights=[1.5, 1.0], caps=[300_000, 400_000], is_held_out=is_held_out)
    ease = ease_of("field:hard", ranges=ranges, num_responses=lengths, difficulty=difficulty)
    schedule = Schedule(lengths, lengths // 2, seed=0, pools=pools, ease=ease, tokens=500_000, epochs=1)
    schedule.example_ids(schedule.num_steps)
    assert time.perf_counter() - started < 3.0  # measured 0.3 s; the bar leaves room for a busy machine
