"""The launcher's environment, read once."""

import os
import signal

import pytest

from sft_dist.config import OptimSection
from sft_dist.engine.start import resolve_engine
from sft_dist.errors import ConfigError
from sft_dist.optim import lr_at, needs_decay
from sft_dist.train import seed_forward
from sft_dist.world import StopRequest, World, check_launcher_agrees, read_world

FOUR = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "h",
    "MASTER_PORT": "1",
}


def test_no_launcher_is_one_process() -> None:
    assert read_world({}) == World(0, 1, 0, 1)


def test_a_launcher_is_read() -> None:
    assert read_world(FOUR) == World(3, 4, 1, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "4"}, "outside"),
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE='x'"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is missing"),
        ({"RANK": None}, "RANK=None"),
    ],
)
def test_half_a_world_is_refused(change: dict[str, str | None], message: str) -> None:
    environ = {key: value for key, value in (FOUR | change).items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        read_world(environ)


def test_auto_is_single_for_one_and_ddp_for_many() -> None:
    assert resolve_engine("auto", world=World()) == "single"
    assert resolve_engine("auto", world=World(0, 2)) == "ddp"
    with pytest.raises(ConfigError, match="started as 2 processes"):
        resolve_engine("single", world=World(0, 2))


def test_an_accelerate_config_with_another_stage_is_refused() -> None:
    environ = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    check_launcher_agrees("zero3_offload", environ)
    with pytest.raises(ConfigError, match=r"zero_stage=3 contradicts .*train\.engine=zero2"):
        check_launcher_agrees("zero2", environ)


def test_a_signal_is_remembered_and_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with StopRequest() as stop:
        assert stop.received is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.received == "SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) is before


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
    import torch

    def draw(*place: int) -> float:
        seed_forward(*place)
        return float(torch.rand(1))

    places = [(0, 1, 0, 0), (0, 1, 0, 1), (0, 1, 1, 0), (0, 2, 0, 0), (1, 1, 0, 0)]
    assert len({draw(*place) for place in places}) == len(places)
    assert draw(*places[0]) == draw(*places[0])
