"""Which engine `auto` becomes for lack of memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sft_dist.config import Recipe, load_recipe
from sft_dist.engine_choice import USABLE_SHARE, choose_engine, count_parameters, training_of
from sft_dist.plan.known_models import find_config
from sft_dist.plan.memory import need
from sft_dist.shape import ModelShape
from tests import tiny

GB = 10**9


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Packs of 4096 tokens, every activation kept."""
    batch = {"examples": 8, "pack_tokens": 4096}
    return load_recipe(tiny.write_recipe(tmp_path, "someone/model", data={"max_tokens": 4096}, batch=batch))


def shape_of(model: str) -> ModelShape:
    config = find_config(model)
    assert config is not None
    shape = ModelShape.from_config(config)
    assert shape is not None
    return shape


@pytest.mark.parametrize(
    ("num_gpus", "gpu_gb", "billions", "expected"),
    [
        (1, 80, 1.5, None),
        (1, 24, 1.5, "zero2_offload"),
        (1, 40, 1.6, "zero2_offload"),  # 28.8 GB of state leave too little for activations
        (1, 80, 8.0, "zero2_offload"),
        (1, 24, 14.0, "zero3_offload"),
        (8, 80, 1.5, None),
        (8, 80, 6.0, "zero1"),
        (8, 80, 8.0, "zero2"),
        (8, 80, 20.0, "zero3"),
        (8, 80, 70.0, "zero3_offload"),
        (64, 80, 70.0, "zero3"),
    ],
)
def test_the_plainest_engine_whose_state_leaves_room_for_activations(
    recipe: Recipe, num_gpus: int, gpu_gb: float, billions: float, expected: str | None
) -> None:
    """Where the shape of the model is not known."""
    choice = choose_engine(recipe, num_gpus=num_gpus, gpu_bytes=int(gpu_gb * GB), size=int(billions * GB), dtype="bf16")
    assert (choice.engine if choice else None) == expected


@pytest.mark.parametrize("gpu_gb", [16, 24, 32, 48, 80, 141])
@pytest.mark.parametrize("num_gpus", [1, 8])
def test_of_a_known_shape_the_first_engine_that_fits_with_its_activations(
    recipe: Recipe, num_gpus: int, gpu_gb: int
) -> None:
    shape = shape_of("Qwen/Qwen3-4B")
    choice = choose_engine(recipe, num_gpus=num_gpus, gpu_bytes=gpu_gb * GB, size=shape, dtype="bf16")
    spread = ["ddp", "zero1", "zero2", "zero3"] if num_gpus > 1 else ["single"]
    order = [*spread, "zero2_offload", "zero3_offload"]
    taken = choice.engine if choice else order[0]
    for engine in order[: order.index(taken) + 1]:
        training = training_of(recipe, engine=engine, num_processes=num_gpus, dtype="bf16")
        fits = need(shape, training).device_bytes <= USABLE_SHARE * gpu_gb * GB
        assert fits == (engine == taken) or taken == order[-1]


def test_the_reason_has_both_numbers(recipe: Recipe) -> None:
    choice = choose_engine(recipe, num_gpus=1, gpu_bytes=24 * GB, size=int(1.5 * GB), dtype="bf16")
    assert choice is not None
    assert choice.reason == (
        "train.engine=auto becomes zero2_offload: the state of 1.50 B parameters under single takes 27.0 GB, of which "
        "a GPU of 24.0 GB has 16.8 GB beside activations; under zero2_offload it takes 3.0 GB, and host memory 30.0 GB "
        "a process"
    )


@pytest.mark.parametrize(
    ("batch", "is_one"),
    [
        ({"examples": 4, "pack_tokens": 400}, True),
        ({"examples": 4, "pack_tokens": 399}, False),
        ({"tokens": 301, "pack_tokens": 400}, True),  # the example that reaches 301 may come at 300
        ({"tokens": 302, "pack_tokens": 400}, False),
        ({"examples": 4, "pack_tokens": 400, "packing": False}, False),
    ],
)
def test_gradients_stay_as_they_are_only_where_a_step_is_one_pack_for_sure(
    tmp_path: Path, batch: dict[str, Any], is_one: bool
) -> None:
    path = tiny.write_recipe(tmp_path, "someone/model", data={"max_tokens": 100})
    overrides = [f"batch={json.dumps(batch)}"]
    alone = training_of(load_recipe(path, overrides), engine="single", num_processes=1, dtype="bf16")
    assert (alone.num_micros == 1) == is_one
    assert training_of(load_recipe(path, overrides), engine="ddp", num_processes=2, dtype="bf16").num_micros > 1


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
