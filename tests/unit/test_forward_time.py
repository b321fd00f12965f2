"""The seconds that a rank computes by itself: its forward passes, and nothing else of the step."""

import time

import pytest
import torch

from sft_dist.forward_time import LEAST_STEPS, NUM_STEPS, ForwardTime

CPU = torch.device("cpu")


def one_step(forward_time: ForwardTime, seconds: float, *, passes: int = 1) -> float:
    """A step of `passes` forward passes, with as much time spent behind each."""
    for _ in range(passes):
        with forward_time.measured():
            time.sleep(seconds)
        time.sleep(seconds)
    return forward_time.end_step()


def test_all_passes_of_a_step_count_and_what_is_between_them_does_not() -> None:
    forward_time = ForwardTime(CPU)
    found = [one_step(forward_time, 0.02, passes=2) for _ in range(LEAST_STEPS + 1)]
    assert found[:-1] == [0.0] * LEAST_STEPS
    assert 0.04 <= found[-1] < 0.075


def test_the_first_step_which_warms_up_is_left_out() -> None:
    forward_time = ForwardTime(CPU)
    one_step(forward_time, 0.5)
    assert [one_step(forward_time, 0.0) for _ in range(LEAST_STEPS)][-1] < 0.1


def test_only_the_newest_steps_count() -> None:
    forward_time = ForwardTime(CPU)
    for _ in range(3):
        one_step(forward_time, 0.1)
    assert min(one_step(forward_time, 0.0) for _ in range(NUM_STEPS)) < 0.003


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_passes_are_timed_on_the_device() -> None:
    device = torch.device("cuda")
    forward_time, square = ForwardTime(device), torch.ones(2048, 2048, device=device)
    found = 0.0
    for _ in range(LEAST_STEPS + 1):
        with forward_time.measured():
            for _ in range(50):
                square = square @ square * 1e-4
        float(square.sum())  # as the loop reads its loss
        found = forward_time.end_step()
    started = time.perf_counter()
    for _ in range(50):
        square = square @ square * 1e-4
    float(square.sum())
    assert 0.2 * found < time.perf_counter() - started < 5 * found
