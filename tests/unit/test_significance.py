"""Intervals and tests against the definitions they follow, in the obvious and slow way."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sft_dist.significance import (
    EXACT_UP_TO,
    Z_95,
    bootstrap_mean,
    interval,
    mcnemar,
    p_text,
    paired_test,
    permutation,
    wilson,
)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_ends_of_a_wilson_interval_are_as_far_as_the_normal_deviate(counts: tuple[int, int]) -> None:
    """An end p solves |share - p| = z sqrt(p (1 - p) / n)."""
    right, n = counts
    low, high = wilson(right, n)
    share = right / n
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1
    for end in (low, high):
        if 1e-9 < end < 1 - 1e-9:
            assert abs(share - end) == pytest.approx(Z_95 * math.sqrt(end * (1 - end) / n), abs=1e-9)


def test_a_published_wilson_interval() -> None:
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998, table I
    assert wilson(0, 0) == (0, 1)


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (5, 1), (1, 5), (4, 4), (9, 2)])
def test_mcnemar_counts_all_ways_in_which_the_changes_may_fall(better: int, worse: int) -> None:
    n, least = better + worse, min(better, worse)
    ways = list(itertools.product((0, 1), repeat=n))
    extreme = sum(min(sum(way), n - sum(way)) <= least for way in ways)
    assert mcnemar(better, worse) == pytest.approx(extreme / len(ways))


@example([-0.5, 0.1, 0.3, 0.3, -0.5, 0.3])  # cancel, but for the rounding of their sum
@given(st.lists(st.sampled_from([-0.5, -0.25, 0.0, 0.1, 0.3, 1.0]), max_size=9))
def test_a_few_differences_are_tried_under_every_sign(differences: list[float]) -> None:
    observed = abs(math.fsum(differences))
    signed = itertools.product((-1, 1), repeat=len(differences))
    sums = [abs(math.fsum(s * d for s, d in zip(signs, differences, strict=True))) for signs in signed]
    expected = sum(total >= observed - 1e-12 for total in sums) / len(sums)
    assert permutation(differences, seed=0) == pytest.approx(expected)


def test_many_differences_are_drawn_and_agree_with_the_normal_limit() -> None:
    differences = np.random.default_rng(1).normal(0.05, 1.0, size=400)
    assert len(differences) > EXACT_UP_TO
    z = abs(differences.sum()) / math.sqrt(float((differences**2).sum()))
    expected = math.erfc(z / math.sqrt(2))
    found = permutation(differences, seed=0)
    assert found == pytest.approx(expected, abs=0.02)  # 10,000 draws: standard error below 0.005
    assert found == permutation(differences, seed=0)
    assert permutation(differences, seed=1) != found


def test_a_bootstrapped_mean_has_the_width_of_its_standard_error() -> None:
    values = np.random.default_rng(2).uniform(size=300).tolist()
    low, high = bootstrap_mean(values, seed=0)
    error = float(np.std(values)) / math.sqrt(300)
    assert (low, high) == pytest.approx(
        (np.mean(values) - 1.96 * error, np.mean(values) + 1.96 * error), abs=0.1 * error
    )
    assert (low, high) == bootstrap_mean(values, seed=0)
    assert bootstrap_mean([0.5] * 9, seed=0) == (0.5, 0.5)
    assert bootstrap_mean([0.5], seed=0) == (0, 1)


def test_the_kind_of_score_decides_interval_and_test() -> None:
    before, after = [0.0] * 8, [1.0] * 7 + [0.0]
    assert interval(after, is_right_or_wrong=True, seed=0) == wilson(7, 8)
    assert interval(after, is_right_or_wrong=False, seed=0) == bootstrap_mean(after, seed=0)
    assert paired_test(before, after, is_right_or_wrong=True, seed=0) == (2 / 2**7, "mcnemar")
    assert paired_test(before, after, is_right_or_wrong=False, seed=0) == (2 / 2**7, "permutation")
    assert paired_test(after, after, is_right_or_wrong=True, seed=0) == (1.0, "mcnemar")


def test_a_small_p_value_is_shown_as_a_bound() -> None:
    assert [p_text(p) for p in (1.0, 0.25, 0.00049, 1e-4, 9e-5)] == ["1", "0.25", "0.00049", "0.0001", "< 0.0001"]
