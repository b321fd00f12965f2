"""The learning rate as a function of the step, what decays, and where randomness comes from."""

import pytest
import torch

from sft_dist.config import OptimSection
from sft_dist.loop import seed_forward
from sft_dist.optim import lr_at, needs_decay


def rates(**settings: object) -> list[float]:
    optim = OptimSection(**{"lr": 1.0, **settings})
    return [lr_at(step, optim=optim, num_steps=10) for step in range(1, 11)]


def test_warm_up_rises_to_the_peak_and_cosine_falls_to_the_floor() -> None:
    found = rates(warmup_steps=4, min_lr=0.1)
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert found[5:] == sorted(found[5:], reverse=True)
    assert 0.1 < found[-1] < 0.2
    assert found[7] == pytest.approx(0.1 + 0.9 * 0.5), "half way down at half time"


def test_linear_and_constant() -> None:
    assert rates(schedule="linear") == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert rates(schedule="constant", warmup_steps=1) == [0.5] + [1.0] * 9


def test_a_run_of_one_step_learns() -> None:
    assert lr_at(1, optim=OptimSection(lr=1.0), num_steps=1) == 1.0


def test_norms_and_biases_do_not_decay() -> None:
    assert needs_decay("model.layers.0.mlp.up_proj.weight", 2)
    assert not needs_decay("model.norm.weight", 1)
    assert not needs_decay("model.layers.0.self_attn.q_proj.bias", 1)


def test_randomness_is_a_function_of_where_it_is_drawn() -> None:
    def draw(*place: int) -> float:
        seed_forward(*place)
        return float(torch.rand(1))

    places = [(0, 1, 0, 0), (0, 1, 0, 1), (0, 1, 1, 0), (0, 2, 0, 0), (1, 1, 0, 0)]
    assert len({draw(*place) for place in places}) == len(places)
    assert draw(*places[0]) == draw(*places[0])
