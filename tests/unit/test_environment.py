"""What run.json notes of a start, and the table that an MFU is quoted against."""

import json
import platform
from pathlib import Path

import pytest

from sft_dist.environment import all_peak_flops, cpu_name, describe_environment
from sft_dist.peaks import peak_flops
from sft_dist.run_record import amend_start
from sft_dist.world import World, launcher_name


@pytest.mark.parametrize(
    ("card", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA A10G", None),
        ("AMD EPYC 9V74", None),
    ],
)
def test_a_peak_is_that_of_the_whole_card_or_not_known(card: str, peak: float | None) -> None:
    assert peak_flops(card) == peak


def test_an_environment_has_a_peak_on_known_gpus_only_and_no_secret() -> None:
    argv = ["x", "train", "r.yaml", "model.path=https://ann:opensesame@host/m"]
    world = World(rank=0, size=16, local_rank=0, local_size=8)
    found = describe_environment(
        device="cuda", device_name="NVIDIA H200", world=world, settings={"engine": "zero2"}, argv=argv, environ={}
    )
    assert (found["peak_flops"], found["world_size"], found["hosts"], found["engine"]) == (989e12, 16, 2, "zero2")
    assert found["command"] == "sft-dist train r.yaml model.path=https://ann:***@host/m"
    assert all_peak_flops({"environment": found}) == 16 * 989e12
    cpu = describe_environment(device="cpu", device_name="", world=World(), settings={}, argv=["x"], environ={})
    assert cpu["peak_flops"] is None
    assert cpu["device_name"] == cpu_name()
    assert all_peak_flops({"environment": cpu}) is None
    assert all_peak_flops({}) is None, "a run of before it was noted"


def test_the_cpus_name_is_the_kernels_and_else_the_architecture(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU 9000\nmodel name\t: Other\n")
    assert cpu_name(tmp_path / "cpuinfo") == "Some CPU 9000"
    assert cpu_name(tmp_path / "gone") == platform.machine()


def test_the_launcher_is_told_from_the_environment() -> None:
    assert launcher_name({}) == "none, one process"
    assert launcher_name({"TORCHELASTIC_RUN_ID": "x", "RANK": "0"}) == "torchrun or accelerate"
    both = {"SLURM_JOB_ID": "17", "SFT_DIST_EXIT_CODES": "/x", "RANK": "0"}
    assert launcher_name(both) == "SLURM job 17, sft-dist launch"


def test_notes_go_into_the_newest_start_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "abracadabra")
    starts = [{"attempt": 1, "after_step": 0}, {"attempt": 2, "after_step": 3}]
    (tmp_path / "run.json").write_text(json.dumps({"attempts": 2, "starts": starts}))
    amend_start(tmp_path, {"banner": [("model", "from abracadabra")]})
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["starts"] == [starts[0], starts[1] | {"banner": [["model", "from ***"]]}]
    assert record["attempts"] == 2
