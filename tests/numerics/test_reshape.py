"""A run goes on from any engine's checkpoint on any other engine and number of processes, and draws the same curve."""

import numpy as np
import pytest

from tests.numerics.lab import STEPS, Case, Lab

RESHAPED = [
    Case("single", 1, resumed_at=6, resumes=("zero2", 2)),
    Case("ddp", 4, resumed_at=6, resumes=("single", 1)),
    Case("zero3", 4, resumed_at=6, resumes=("zero2", 2)),
    Case("ddp", 2, resumed_at=6, resumes=("zero3", 2)),
    Case("zero1", 2, resumed_at=6, resumes=("ddp", 2)),
    Case("zero2", 4, resumed_at=8, resumes=("zero1", 2)),
    Case("zero2_offload", 2, resumed_at=6, resumes=("zero3", 2)),
    Case("zero3_offload", 2, resumed_at=6, resumes=("zero2_offload", 2)),
    Case("single", 1, resumed_at=6, resumes=("zero3_offload", 2)),
]
IN_BF16 = [
    Case("zero3", 2, dtype="bf16", resumed_at=6, resumes=("zero1", 2)),
    Case("zero1", 2, dtype="bf16", resumed_at=6, resumes=("ddp", 2)),
    Case("ddp", 2, dtype="bf16", resumed_at=6, resumes=("zero3", 2)),
]


@pytest.mark.parametrize("case", RESHAPED, ids=lambda case: case.run_name)
def test_a_reshaped_run_draws_the_same_curve(case: Case, lab: Lab) -> None:
    """Within what two layouts differ by anyway: tests/numerics/test_curve.py has the bars."""
    for key, bar in (("loss", 3e-6), ("lr", 0.0), ("examples", 0), ("response_tokens", 0)):
        difference = lab.series(case, key) - lab.series(case.uninterrupted, key)[case.resumed_at :]
        assert np.abs(difference).max() <= bar, key
    assert lab.column(case, "batch") == lab.column(case.uninterrupted, "batch")[case.resumed_at :]
    weights, whole = lab.weights(case), lab.weights(case.uninterrupted)
    assert weights.keys() == whole.keys()
    assert max(float((weights[name] - whole[name]).abs().max()) for name in whole) <= 1e-5


@pytest.mark.parametrize("case", IN_BF16, ids=lambda case: case.run_name)
def test_master_weights_and_moments_survive_a_change_of_engine_in_bf16(case: Case, lab: Lab) -> None:
    """The first step after it has the very loss of the uninterrupted run: bf16 weights are the same masters, rounded.

    Later steps differ by the order of bf16 sums.
    """
    loss, whole = lab.series(case, "loss"), lab.series(case.uninterrupted, "loss")[case.resumed_at :]
    assert abs(loss[0] - whole[0]) <= 1e-3 * whole[0]
    assert np.abs(loss - whole).max() <= 2e-2
    assert len(loss) == STEPS - (case.resumed_at or 0)
