"""Which updates are withheld."""

import math

import pytest

from sft_dist.guard import LEAST_RECENT, reason_to_withhold

USUAL = (2.0,) * LEAST_RECENT


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_withheld_with_and_without_a_guard(loss: float) -> None:
    assert reason_to_withhold(loss, (), spike_guard=None) == "loss not finite"
    assert reason_to_withhold(loss, USUAL, spike_guard=2.0) == "loss not finite"


def test_without_a_guard_every_finite_loss_may_update() -> None:
    assert reason_to_withhold(1e30, USUAL, spike_guard=None) is None


def test_a_spike_is_above_so_many_times_the_median_and_says_both() -> None:
    assert reason_to_withhold(6.0, USUAL, spike_guard=3.0) is None
    reason = reason_to_withhold(6.01, USUAL, spike_guard=3.0)
    assert reason == "loss 6.01 is above 3 times the recent median 2"


def test_one_outlier_does_not_raise_the_bar() -> None:
    assert reason_to_withhold(6.01, (*USUAL, 1e9), spike_guard=3.0) is not None


def test_the_guard_waits_until_it_has_seen_enough() -> None:
    assert reason_to_withhold(1e9, USUAL[1:], spike_guard=3.0) is None
