"""bf16: layouts spread the curve no more than twice as much as another order of the same documents does."""

import json

import numpy as np
import pytest

from tests.numerics.lab import ONE_PACK, Case, Lab

BASE = Case("single", 1, dtype="bf16")
ORDERS = [Case("single", 1, dtype="bf16", checks=("reversed",)), Case("single", 1, dtype="bf16", checks=("rotated",))]
LAYOUTS = [
    Case("single", 1, ONE_PACK, dtype="bf16"),
    Case("ddp", 2, dtype="bf16"),
    Case("zero1", 2, dtype="bf16"),
    Case("zero2", 2, dtype="bf16"),
    Case("zero3", 2, dtype="bf16"),
    Case("zero2_offload", 2, dtype="bf16"),
]


def spread(lab: Lab, case: Case) -> float:
    """Largest difference of any step's loss to the base layout, in nats."""
    return float(np.abs(lab.series(case, "loss") - lab.series(BASE, "loss")).max())


@pytest.mark.parametrize("case", [BASE, *ORDERS, *LAYOUTS], ids=lambda case: case.run_name)
def test_layouts_spread_a_bf16_curve_at_most_twice_as_much_as_orders_do(case: Case, lab: Lab) -> None:
    by_order = max(spread(lab, order) for order in ORDERS)
    assert by_order > 0, "another order must show, or there is no measure"
    print(f"\n{case.run_name}: {spread(lab, case):.1e}, by order {by_order:.1e}")
    assert spread(lab, case) <= 2 * by_order
    assert np.abs(lab.series(case, "loss") - lab.series(case.single, "loss")).max() < 0.02, (
        "and it is the fp32 curve, roughly"
    )


@pytest.mark.parametrize(
    "case",
    [Case(engine, 2, dtype="bf16", checks=("accumulates",)) for engine in ("zero1", "zero2", "zero3", "zero2_offload")],
    ids=lambda case: case.run_name,
)
def test_zero_adds_bf16_gradients_up_in_fp32(case: Case, lab: Lab) -> None:
    """256 times a gradient, then 16 times 1: a bf16 sum stays at 256 times it, an fp32 sum reaches 272."""
    once, summed = json.loads((lab.run_dir(case) / "norms.json").read_text())
    assert summed / once == pytest.approx(272, rel=1e-4)
