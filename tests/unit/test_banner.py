"""What the banner says of balance."""

import numpy as np
import pytest

from sft_dist.banner import balance_lines
from sft_dist.data.conversation import Origin
from sft_dist.data.schedule import CostModel, Schedule


def lines(lengths: list[int], *, step: int = 1, world_size: int = 4, epochs: int = 2) -> list[tuple[str, str]]:
    array = np.array(lengths, dtype=np.int64)
    schedule = Schedule(array, array // 2, seed=3, examples=16, epochs=epochs)
    return list(
        balance_lines(
            schedule,
            step=step,
            world_size=world_size,
            pack_tokens=4096,
            cost=CostModel(),
            origin=lambda index: Origin("chats.jsonl", index + 1),
        )
    )


def test_even_steps_are_told_without_a_warning() -> None:
    assert lines([100] * 64) == [
        ("balance", "the slowest process takes 1.000 times the mean, by cost, in steps 1 to 8"),
    ]


def test_an_example_that_dominates_its_step_is_named() -> None:
    """3000 tokens beside 15 times 100: a process's share of 4500 is 1125."""
    (_, balance), (name, warning) = lines([100] * 40 + [3000] + [100] * 23)
    assert float(balance.split(" times")[0].split()[-1]) == pytest.approx(1 + 2 * (3000 / 1125 - 1) / 8, abs=1e-3)
    assert name == "warning"
    assert warning.startswith("1 of 4 steps of this epoch cannot be balanced")
    assert "at worst 2.7 times, chats.jsonl:41 (3,000 tokens) in step " in warning


@pytest.mark.parametrize(("world_size", "step"), [(1, 1), (4, 9)], ids=["one process", "behind the last step"])
def test_where_nothing_is_spread_nothing_is_said(world_size: int, step: int) -> None:
    assert lines([100] * 40 + [3000] + [100] * 23, world_size=world_size, step=step) == []
