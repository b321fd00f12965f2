"""Resuming at any step draws the uninterrupted run's curve and ends in its weights, bit for bit."""

import numpy as np
import pytest

from tests.numerics.lab import STEPS, Case, Lab

# Epochs end at steps 4, 8, 12 and 16: every step of the first epoch and across its end, then mid-epoch and end.
RESUMED = [
    *[Case("single", 1, resumed_at=step) for step in (1, 2, 3, 4, 5, STEPS - 1)],
    *[Case(engine, 2, resumed_at=step) for engine in ("ddp", "zero2", "zero3") for step in (6, 8)],
    # In bf16 the weights are masters, rounded: both must come back.
    Case("zero3", 2, dtype="bf16", resumed_at=6),
]
# tests/faults/test_reshape.py has the other pairs.
RESHAPED = [
    Case("single", 1, resumed_at=6, resumes=("zero2", 2)),
    Case("ddp", 2, resumed_at=6, resumes=("zero3", 2)),
]


@pytest.mark.parametrize("case", RESUMED, ids=lambda case: case.run_name)
def test_a_resumed_run_is_the_uninterrupted_run(case: Case, lab: Lab) -> None:
    for key in ("loss", "grad_norm", "lr", "examples", "response_tokens"):
        assert lab.series(case, key).tolist() == lab.series(case.uninterrupted, key)[case.resumed_at :].tolist()
    weights, whole = lab.weights(case), lab.weights(case.uninterrupted)
    assert weights.keys() == whole.keys()
    assert all(weights[name].equal(whole[name]) for name in whole)


@pytest.mark.parametrize("case", RESHAPED, ids=lambda case: case.run_name)
def test_a_run_goes_on_under_another_engine_and_world_with_the_same_curve(case: Case, lab: Lab) -> None:
    """Within what two layouts differ by anyway: test_curve.py has the bars."""
    for key, bar in (("loss", 3e-6), ("lr", 0.0), ("examples", 0), ("response_tokens", 0)):
        difference = lab.series(case, key) - lab.series(case.uninterrupted, key)[case.resumed_at :]
        assert np.abs(difference).max() <= bar, key
    assert lab.column(case, "batch") == lab.column(case.uninterrupted, "batch")[case.resumed_at :]
    weights, whole = lab.weights(case), lab.weights(case.uninterrupted)
    assert weights.keys() == whole.keys()
    assert max(float((weights[name] - whole[name]).abs().max()) for name in whole) <= 1e-5
