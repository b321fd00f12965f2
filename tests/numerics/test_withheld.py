"""A gradient that is not finite on one rank withholds the update on all, and the run goes on as if it had not been."""

import math

import pytest

from sft_dist.metrics import read_lines
from tests.numerics.lab import Case, Lab

ENGINES = ("ddp", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
POISONED = [
    Case("single", 1, checks=("poisoned",)),
    *[Case(engine, 2, checks=("poisoned",)) for engine in ENGINES],
    *[Case(engine, 2, dtype="bf16", checks=("poisoned",)) for engine in ("zero3", "zero2_offload")],
]


@pytest.mark.parametrize("case", POISONED, ids=lambda case: case.run_name)
def test_a_poisoned_step_is_withheld_and_the_next_one_applied(case: Case, lab: Lab) -> None:
    steps = list(read_lines(lab.run_dir(case) / "metrics.jsonl"))
    assert [step["applied"] for step in steps] == [True, True, False, True, True]
    assert steps[2]["grad_norm"] is None, "infinity is not JSON"
    assert all(math.isfinite(step["loss"]) and step["grad_norm"] > 0 for step in steps if step["step"] != 3)
    if case.dtype == "fp32":
        alone = list(read_lines(lab.run_dir(POISONED[0]) / "metrics.jsonl"))
        others = [(step["loss"], other["loss"]) for step, other in zip(steps, alone, strict=True) if step["step"] != 3]
        assert all(abs(loss - other) <= 3e-6 for loss, other in others)
