"""The launcher's environment, read once."""

import os
import signal
import time

import pytest

from sft_dist import cli
from sft_dist.engine.start import resolve_engine
from sft_dist.errors import ConfigError
from sft_dist.world import StopRequest, World, check_launcher_agrees, read_world, waited_in_vain_for_rank_0

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
    check_launcher_agrees("zero3_offload", dtype="auto", environ=environ)
    with pytest.raises(ConfigError, match=r"zero_stage=3 contradicts .*train\.engine=zero2"):
        check_launcher_agrees("zero2", dtype="auto", environ=environ)
    with pytest.raises(ConfigError, match=r"mixed_precision=fp16 contradicts .*model\.dtype=fp32"):
        check_launcher_agrees("ddp", dtype="fp32", environ={"ACCELERATE_MIXED_PRECISION": "fp16"})
    with pytest.raises(ConfigError, match=r"FSDP contradicts .*train\.engine=ddp"):
        check_launcher_agrees("ddp", dtype="fp32", environ={"ACCELERATE_USE_FSDP": "true"})


def test_a_signal_is_remembered_and_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with StopRequest() as stop:
        assert stop.received is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.received == "SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) is before


@pytest.mark.parametrize(
    ("change", "waits"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, False),
        ({"RANK": "3"}, False),  # on the second of two hosts
        ({"TORCHELASTIC_RUN_ID": ""}, False),  # nobody would end it
    ],
)
def test_only_neighbours_of_rank_0_wait_for_it(change: dict[str, str], waits: bool) -> None:
    torchrun = {"TORCHELASTIC_RUN_ID": "run", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"}
    meeting = {"RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    environ = {key: value for key, value in (torchrun | meeting | change).items() if value}
    before = time.monotonic()
    assert waited_in_vain_for_rank_0(environ, patience_s=0.2) is waits
    assert (time.monotonic() - before >= 0.2) is waits


@pytest.mark.parametrize("in_vain", [True, False])
def test_an_error_that_rank_0_does_not_say_is_said_by_another(
    in_vain: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for key, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(cli, "waited_in_vain_for_rank_0", lambda: in_vain)
    assert cli.main(["train", "none.yaml"]) == 2
    assert capsys.readouterr().err.count("error: none.yaml") == in_vain
