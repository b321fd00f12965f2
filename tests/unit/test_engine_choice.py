"""Which engine `auto` becomes for lack of memory."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sft_dist import package_files
from sft_dist.engine.local import BUCKET_ELEMENTS
from sft_dist.engine_choice import (
    DDP_BUCKET_BYTES,
    ZERO3_LIVE_ELEMENTS,
    ZERO_BUCKET_ELEMENTS,
    choose_engine,
    count_parameters,
    state_bytes,
)

GB = 10**9


def engine(*, num_gpus: int, gpu_gb: float, billions: float, dtype: str = "bf16") -> str | None:
    choice = choose_engine(
        num_gpus=num_gpus, gpu_bytes=int(gpu_gb * GB), num_parameters=int(billions * GB), dtype=dtype
    )
    return choice.engine if choice else None


def test_bytes_of_a_parameter_by_hand() -> None:
    """weights + master + moments + gradient; fp32 weights are their own master."""
    assert state_bytes("single", num_gpus=1, num_parameters=GB, dtype="bf16") == (2 + 4 + 8 + 4) * GB
    assert state_bytes("single", num_gpus=1, num_parameters=GB, dtype="fp32") == (4 + 8 + 4) * GB
    buckets = 2 * 200e6 * (2 + 4)
    assert state_bytes("zero2", num_gpus=8, num_parameters=8 * GB, dtype="bf16") == 2 * 8e9 + 16 * 1e9 + buckets
    assert state_bytes("zero3", num_gpus=8, num_parameters=8 * GB, dtype="bf16") == 18e9 + 2e9 + buckets
    assert state_bytes("zero2_offload", num_gpus=1, num_parameters=GB, dtype="bf16") == 2e9 + buckets


@pytest.mark.parametrize(
    ("num_gpus", "gpu_gb", "billions", "expected"),
    [
        (1, 80, 1.5, None),
        (1, 24, 1.5, "zero2_offload"),
        (1, 40, 1.6, "zero2_offload"),  # 28.8 GB of state leave too little for activations
        (1, 80, 8.0, "zero2_offload"),
        (1, 24, 14.0, "zero3_offload"),
        (8, 80, 1.5, None),
        (8, 80, 8.0, "zero2"),
        (8, 80, 20.0, "zero3"),
        (8, 80, 70.0, "zero3_offload"),
        (64, 80, 70.0, "zero3"),
    ],
)
def test_the_plainest_engine_that_fits(num_gpus: int, gpu_gb: float, billions: float, expected: str | None) -> None:
    assert engine(num_gpus=num_gpus, gpu_gb=gpu_gb, billions=billions) == expected


def test_more_gpus_never_need_more_memory_each() -> None:
    for name in ("zero2", "zero3"):
        sizes = [state_bytes(name, num_gpus=count, num_parameters=8 * GB, dtype="bf16") for count in (1, 2, 4, 8)]
        assert sizes == sorted(sizes, reverse=True)


def test_the_reason_has_both_numbers() -> None:
    choice = choose_engine(num_gpus=1, gpu_bytes=24 * GB, num_parameters=int(1.5 * GB), dtype="bf16")
    assert choice is not None
    assert choice.reason == (
        "train.engine=auto becomes zero2_offload: the state of 1.50 B parameters under single takes 27.0 GB, of which "
        "a GPU of 24.0 GB has 16.8 GB beside activations; under zero2_offload it takes 5.4 GB, and host memory 27.0 GB "
        "a process"
    )


def test_the_constants_are_those_of_the_engines() -> None:
    assert DDP_BUCKET_BYTES == 4 * BUCKET_ELEMENTS
    for path in package_files.CONFIGS.glob("deepspeed/*.json"):
        zero = json.loads(path.read_text())["zero_optimization"]
        assert zero["reduce_bucket_size"] == ZERO_BUCKET_ELEMENTS
        assert zero.get("stage3_max_live_parameters", ZERO3_LIVE_ELEMENTS) == ZERO3_LIVE_ELEMENTS


def test_parameters_are_counted_without_reading_weights(tmp_path: Path, tied_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tied_model, dtype=torch.float32)
    expected = sum(parameter.numel() for parameter in model.parameters())
    assert count_parameters(str(tied_model)) == expected
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    assert count_parameters(str(tmp_path / "sharded")) == expected


def test_a_model_that_is_not_here_is_not_counted(tmp_path: Path) -> None:
    assert count_parameters("someone/never-downloaded") is None
    assert count_parameters(str(tmp_path)) is None
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    assert count_parameters(str(tmp_path)) is None


def test_a_model_in_the_hubs_cache_is_counted(
    tmp_path: Path, tied_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked = []

    def cached(model: str, name: str, revision: str | None) -> str:
        asked.append((model, name, revision))
        return str(tied_model / name)

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    assert count_parameters("someone/model", revision="v1") == count_parameters(str(tied_model))
    assert asked == [("someone/model", "config.json", "v1")]
