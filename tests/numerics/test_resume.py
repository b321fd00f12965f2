"""Resuming at any step draws the uninterrupted run's curve and ends in its weights, bit for bit."""

import pytest

from tests.numerics.lab import STEPS, Case, Lab

# Epochs end at steps 4, 8, 12 and 16: every step of the first epoch and across its end, then mid-epoch and end.
RESUMED = [
    *[Case("single", 1, resumed_at=step) for step in (1, 2, 3, 4, 5, STEPS - 1)],
    *[Case(engine, 2, resumed_at=step) for engine in ("ddp", "zero2", "zero3") for step in (6, 8)],
]


@pytest.mark.parametrize("case", RESUMED, ids=lambda case: case.run_name)
def test_a_resumed_run_is_the_uninterrupted_run(case: Case, lab: Lab) -> None:
    for key in ("loss", "grad_norm", "lr", "examples", "response_tokens"):
        assert lab.series(case, key).tolist() == lab.series(case.uninterrupted, key)[case.resumed_at :].tolist()
    weights, whole = lab.weights(case), lab.weights(case.uninterrupted)
    assert weights.keys() == whole.keys()
    assert all(weights[name].equal(whole[name]) for name in whole)
