"""Bytes of a training, by part: against published counts, what autograd keeps, and sums by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sft_dist import package_files
from sft_dist.config import ModelSection
from sft_dist.data.batch import MicroBatch
from sft_dist.engine.local import BUCKET_ELEMENTS, NORM_ELEMENTS
from sft_dist.model import loss
from sft_dist.model.attention import choose_backend
from sft_dist.model.load import load_model
from sft_dist.plan.known_models import CONFIGS, find_config, known_config
from sft_dist.plan.memory import PARTS, moments_of, need
from sft_dist.plan.memory_parts import (
    HEAD_CHUNK_BYTES,
    HEAD_LEAST_ROWS,
    LOCAL_BUCKET_ELEMENTS,
    NORM_BYTES,
    Buckets,
    Training,
    activation_bytes,
    buffer_bytes,
    host_state_bytes,
    layer_token_bytes,
    state_bytes,
)
from sft_dist.shape import ModelShape
from tests import tiny

CPU = torch.device("cpu")
P = 10**9

# Of the published weight files; a tied output embedding counts once.
PUBLISHED = {
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Llama-3-8B": 8_030_261_248,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.1-8B": 8_030_261_248,
}


def known_shape(name: str) -> ModelShape:
    shape = ModelShape.from_config(CONFIGS[name])
    assert shape is not None
    return shape


def training(engine: str = "single", num_processes: int = 1, dtype: str = "bf16", **others: object) -> Training:
    plain = Training(engine, num_processes, dtype, "cuda", "none", tokens=4096, responses=4096)
    return replace(plain, **others)  # type: ignore[arg-type]


def test_known_models_have_the_published_number_of_parameters() -> None:
    assert {name: known_shape(name).all_params for name in CONFIGS} == PUBLISHED


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Qwen/Qwen2.5-1.5B-Instruct", "Qwen2.5-1.5B"),
        ("Qwen/Qwen3-4B-Instruct-2507", "Qwen3-4B"),
        ("Qwen/Qwen3-8B-Base", "Qwen3-8B"),
        ("meta-llama/Llama-3.2-3B-Instruct", "Llama-3.2-3B"),
        ("meta-llama/Meta-Llama-3-8B", "Llama-3-8B"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "Llama-3-8B"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "Llama-3.1-8B"),
    ],
)
def test_variants_of_a_model_have_its_shape(path: str, name: str) -> None:
    assert known_config(path) == CONFIGS[name]


@pytest.mark.parametrize("path", ["someone/Qwen3-4B", "Qwen/Qwen3-4B-GGUF", "Qwen/Qwen3-40B", "Qwen/Meta-Qwen3-4B"])
def test_a_name_that_is_not_in_the_table_is_not_guessed(path: str) -> None:
    assert known_config(path) is None


def test_any_other_config_is_read_from_its_directory(tied_model: Path) -> None:
    config = find_config(str(tied_model))
    assert config == json.loads((tied_model / "config.json").read_text())
    shape = ModelShape.from_config(config)
    model = load(tied_model)
    assert shape is not None
    assert shape.all_params == model.num_parameters


def load(path: Path, dtype: torch.dtype = torch.float32) -> "loss.nn.Module":
    return load_model(
        ModelSection(path=str(path)),
        backend=choose_backend("sdpa", device=CPU, dtype=dtype),
        dtype=dtype,
        device=CPU,
        num_tokens=1,
        added_token_ids=(),
    )


def micro(*, tokens: int, responses: int, documents: int = 4) -> MicroBatch:
    length = tokens // documents
    ids, index = torch.arange(tokens) % 32, torch.arange(tokens)[-responses:]
    return MicroBatch(
        input_ids=ids[None],
        position_ids=(torch.arange(tokens) % length)[None],
        cu_seqlens=torch.arange(0, tokens + 1, length, dtype=torch.int32),
        max_seqlen=length,
        response_index=index,
        targets=ids[index],
        weights=torch.full((responses,), 1 / responses),
        document_lengths=(length,) * documents,
        is_last=True,
    )


def kept_bytes(model: "loss.nn.Module", batch: MicroBatch) -> int:
    """Bytes of all storages that autograd keeps of a forward, parameters left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    held: list[torch.Tensor] = []  # a storage that is freed would be handed out, and counted, again
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: held.append(saved) or saved, lambda saved: saved):
        model(batch)
    storages = {saved.untyped_storage().data_ptr(): saved.untyped_storage().nbytes() for saved in held}
    return sum(size for pointer, size in storages.items() if pointer not in own)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_activations_are_what_autograd_keeps(architecture: str, dtype: str, tmp_path: Path) -> None:
    """Exactly, for another layer, and for other numbers of response tokens but for their indices."""
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    sizes = {}
    for layers in (2, 3):
        path = tiny.write_model(tmp_path / str(layers), architecture=architecture, num_hidden_layers=layers)
        model = load(path, torch_dtype)
        for responses in (16, 48):
            sizes[layers, responses] = kept_bytes(model, micro(tokens=64, responses=responses))
    shape = ModelShape.from_config(json.loads((path / "config.json").read_text()))
    assert shape is not None
    assert sizes[3, 16] - sizes[2, 16] == 64 * layer_token_bytes(shape, dtype=dtype, device="cpu")
    planned = [
        activation_bytes(shape, training(dtype=dtype, device="cpu", tokens=64, responses=responses))
        for responses in (16, 48)
    ]
    # The head keeps the gradient of its input; indices are 8 bytes each.
    head_input = (48 - 16) * shape.hidden * torch_dtype.itemsize
    found = sizes[3, 48] - sizes[3, 16]
    assert found == pytest.approx(planned[1] - planned[0] + head_input, abs=(48 - 16) * 16)


def test_recomputing_more_keeps_less() -> None:
    shape = known_shape("Qwen3-8B")
    each = [layer_token_bytes(shape, dtype="bf16", device="cuda", mode=mode) for mode in ("full", "selective", "none")]
    assert each[:2] == [2 * 4096, 2 * (4096 + 32 * 128) + 4 * 32]
    assert each == sorted(each)


def test_bytes_of_a_parameter_by_hand() -> None:
    """weights, gradients, master, moments; fp32 weights of single and ddp are their own master."""

    def state(engine: str, n: int, dtype: str = "bf16", **others: object) -> list[float]:
        sizes = state_bytes(P, training(engine, n, dtype, **others))
        return [sizes[part] / P for part in ("weights", "gradients", "master", "moments")]

    assert state("single", 1) == [2, 4, 4, 8]
    assert state("single", 1, "fp32") == [4, 4, 0, 8]
    assert state("single", 1, num_micros=1) == [2, 2, 4, 8]
    assert state("ddp", 8) == [2, 4, 4, 8]
    assert state("zero1", 8) == [2, 4, 0.5, 1]
    assert state("zero2", 8) == [2, 0.5, 0.5, 1]
    assert state("zero3", 8) == [0.25, 0.5, 0.5, 1]
    assert state("zero2_offload", 1) == [2, 0, 0, 0]
    assert state("zero3_offload", 1) == [0, 0, 0, 0]
    host = host_state_bytes(P, training("zero3_offload", 2))
    assert host == {"weights": P, "gradients": 4 * P, "master": 2 * P, "moments": 4 * P}
    assert host_state_bytes(P, training("zero3", 2)) == {}


def test_more_gpus_never_need_more_memory_each() -> None:
    shape = known_shape("Qwen3-8B")
    for engine in ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"):
        sizes = [need(shape, training(engine, count)).device_bytes for count in (2, 4, 8, 64)]
        assert sizes == sorted(sizes, reverse=True)


def test_the_need_is_the_fullest_moment_part_by_part() -> None:
    shape = known_shape("Qwen2.5-1.5B")
    for engine, device in (("single", "cuda"), ("zero3", "cuda"), ("zero2_offload", "cpu")):
        one = training(engine, 2, device=device)
        moments, found = moments_of(shape, one), need(shape, one)
        assert tuple(found.device) == PARTS
        assert found.device_bytes == pytest.approx(max(sum(parts.values()) for parts in moments.values()), abs=8)
        assert bool(found.host) == (device == "cuda")


def test_a_copy_of_a_checkpoint_is_in_host_memory() -> None:
    shape = known_shape("Qwen2.5-1.5B")
    behind, waits = (need(shape, training("ddp", 4, saves_in_background=each)) for each in (True, False))
    assert behind.host_bytes - waits.host_bytes == pytest.approx(12 * shape.all_params / 4, abs=1)
    assert behind.device == waits.device
    on_cpu = need(shape, training("ddp", 4, "fp32", device="cpu", saves_in_background=True))
    assert on_cpu.moment == "saving" or on_cpu.device["buffers"] == 0


def test_the_constants_are_those_of_the_engines() -> None:
    assert LOCAL_BUCKET_ELEMENTS == BUCKET_ELEMENTS
    assert NORM_BYTES == 8 * NORM_ELEMENTS
    assert (HEAD_CHUNK_BYTES, HEAD_LEAST_ROWS) == (loss.CHUNK_BYTES, loss.LEAST_ROWS)


def test_buckets_are_read_from_the_deepspeed_file() -> None:
    zero3 = Buckets.from_knobs(json.loads(package_files.find("deepspeed/zero3.json").read_text()))
    assert zero3 == Buckets(reduce=200_000_000, prefetch=50_000_000, live=1_000_000_000, num_reduce=2)
    small, large = (
        buffer_bytes(P, 10**6, training("zero2", 8, buckets=Buckets(reduce=size)))["backward"]
        for size in (10**7, 2 * 10**7)
    )
    assert large == 2 * small
