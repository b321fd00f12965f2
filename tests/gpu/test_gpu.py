"""What only a GPU can show: attention, compiled layers and Liger's kernels against the fp32 reference, and no waits.

    python -m pytest tests/gpu

on a machine with a CUDA device; each test that is skipped says what it lacks. The packages flash-attn, flash-attn-3,
flash-attn-4 and liger-kernel are tested where they are installed.
"""

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from sft_dist.config import ModelSection, parse_recipe
from sft_dist.metrics import read_steps
from sft_dist.model.attention import BACKENDS, choose_backend
from sft_dist.model.load import PackedModel, load_model
from sft_dist.train import run
from tests import tiny
from tests.unit.test_attention import documents, own_logits, pack

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
RANK = str(Path(__file__).with_name("no_sync_rank.py"))
ROWS = documents(2, 90, 33, 700, 64, 128)
PACKS = [(4,), (0,), (0, 1, 2, 3), (5,), (1, 2), (3, 4, 5)]
# bf16 keeps 8 bits. Gradients of these models in bf16 on a CPU differ from fp32 by 0.009 in all, by 0.025 in the worst
# matrix; documents that see each other differ by their own size.
GRADIENT_BAR, MATRIX_BAR = 0.02, 0.06
LOSS_BAR = 5e-3
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this machine shows none"),
]


@pytest.mark.parametrize("name", list(BACKENDS))
@torch.no_grad()
def test_logits_in_a_pack_equal_those_alone(name: str, tmp_path: Path) -> None:
    reason = BACKENDS[name].why_not(CUDA, torch.bfloat16, 0.0)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    path = tiny.write_model(tmp_path, architecture="qwen3", head_dim=64, hidden_size=256, initializer_range=0.05)
    model = load_model(
        ModelSection(path=str(path)),
        backend=BACKENDS[name],
        dtype=torch.bfloat16,
        device=CUDA,
        num_tokens=32,
        added_token_ids=[],
    )
    rows = documents(2, 90, 33, 700)
    together = model(pack(rows, 0, 1, 2, 3).to(CUDA), return_logits=True).float().cpu()
    own = torch.cat([own_logits(path, rows, i) for i in range(4)])
    # bf16 keeps 8 bits; a leak moves logits by their own size.
    assert float((together - own).abs().max() / own.abs().max()) < 0.05


@pytest.mark.parametrize("engine", ["single", "zero2", "zero3"])
def test_bf16_on_a_gpu_draws_the_fp32_curve(engine: str, tmp_path: Path) -> None:
    path = tiny.write_model(tmp_path / "m", hidden_size=256, num_attention_heads=4, head_dim=64)
    tiny.write_chats(tmp_path / "d.jsonl", num_examples=103, seed=0)
    curves = {}
    for dtype in ("fp32", "bf16"):
        recipe = parse_recipe(
            {
                "run": {"name": f"{engine}-{dtype}", "dir": str(tmp_path / "runs"), "report": False},
                "model": {"path": str(path), "dtype": dtype},
                "data": {"train": str(tmp_path / "d.jsonl"), "max_tokens": 1000},
                "batch": {"examples": 32, "pack_tokens": 2048},
                "optim": {"lr": 1e-3, "warmup_steps": 4},
                "train": {"steps": 20, "engine": engine},
            },
            origin="test",
        )
        run(recipe, console=Console(quiet=True))
        steps = read_steps(recipe.run.path / "metrics.jsonl")
        curves[dtype] = torch.tensor([steps[step]["loss"] for step in sorted(steps)])
    assert curves["fp32"][0] - curves["fp32"][-1] > 0.3
    assert float((curves["fp32"] - curves["bf16"]).abs().max()) < 0.02


@pytest.fixture(autouse=True)
def _graphs_of_their_own() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def write_model(directory: Path, architecture: str = "qwen3", **overrides: Any) -> Path:
    settings = {"head_dim": 64, "hidden_size": 256, "initializer_range": 0.05} | overrides
    return tiny.write_model(directory, architecture=architecture, **settings)


def load(path: Path, *, backend: str = "auto", device: torch.device = CUDA, **section: Any) -> PackedModel:
    """In bf16 on a GPU; on a CPU the fp32 reference, with the same weights: rounded to bf16."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = load_model(
        ModelSection(path=str(path), **({"compile": "off"} | section)),
        backend=choose_backend(backend, device=device, dtype=dtype),
        dtype=torch.bfloat16,
        device=device,
        num_tokens=32,
        added_token_ids=[],
    )
    return model if device.type == "cuda" else model.float()


def loss_and_gradients(model: PackedModel, *ids: int) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(pack(ROWS, *ids).to(next(model.parameters()).device))
    loss.backward()
    found = {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: value.float().cpu().clone() for name, value in found.items()}


def require_close(
    found: dict[str, torch.Tensor],
    reference: dict[str, torch.Tensor],
    *,
    bar: float = GRADIENT_BAR,
    matrix_bar: float = MATRIX_BAR,
) -> None:
    """Gradients as a whole, and each matrix but those that hold next to nothing, as under a document of two tokens."""
    assert found.keys() == reference.keys()
    names = [name for name in reference if name != "loss"]
    whole, error = (
        torch.cat([value.flatten() for value in some]).norm()
        for some in ([reference[n] for n in names], [found[n] - reference[n] for n in names])
    )
    assert float(error / whole) < bar
    for name in names:
        size = reference[name].norm()
        assert size < 1e-3 * whole or float((found[name] - reference[name]).norm() / size) < matrix_bar, name


def skip_without(name: str) -> None:
    reason = BACKENDS[name].why_not(CUDA, torch.bfloat16, 0.0)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")


def skip_without_compiler() -> None:
    if importlib.util.find_spec("triton") is None or not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("compiled layers need triton and a C compiler")


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("name", list(BACKENDS))
def test_loss_and_gradients_agree_with_the_fp32_reference(name: str, window: int | None, tmp_path: Path) -> None:
    skip_without(name)
    windowed = {"use_sliding_window": True, "sliding_window": window, "layer_types": ["sliding_attention"] * 2}
    path = write_model(tmp_path, **(windowed if window else {}))
    model, reference = load(path, backend=name), load(path, device=CPU)
    for ids in PACKS:
        found, expected = loss_and_gradients(model, *ids), loss_and_gradients(reference, *ids)
        assert float(found["loss"]) == pytest.approx(float(expected["loss"]), rel=LOSS_BAR)
        require_close(found, expected)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("name", [name for name, backend in BACKENDS.items() if backend.can_be_traced])
def test_compiled_layers_agree_with_the_fp32_reference(name: str, checkpointing: str, tmp_path: Path) -> None:
    skip_without(name)
    skip_without_compiler()
    path = write_model(tmp_path)
    model = load(path, backend=name, compile="on", checkpointing=checkpointing)
    reference = load(path, device=CPU)
    for ids in PACKS:
        found, expected = loss_and_gradients(model, *ids), loss_and_gradients(reference, *ids)
        assert float(found["loss"]) == pytest.approx(float(expected["loss"]), rel=LOSS_BAR)
        require_close(found, expected)
    model.eval()
    with torch.no_grad():
        for ids in PACKS:
            model(pack(ROWS, *ids).to(CUDA))
    assert model.compiled is not None
    assert len(model.compiled.graphs) == 2, model.compiled.graphs


def test_auto_compiles_where_it_can(tmp_path: Path) -> None:
    skip_without_compiler()
    assert load(write_model(tmp_path), compile="auto").compiled is not None


@pytest.mark.parametrize("name", list(BACKENDS))
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_recomputing_changes_nothing(checkpointing: str, name: str, tmp_path: Path) -> None:
    skip_without(name)
    path = write_model(tmp_path)
    kept, recomputed = (load(path, backend=name, checkpointing=mode) for mode in ("none", checkpointing))
    for ids in PACKS:
        expected, found = loss_and_gradients(kept, *ids), loss_and_gradients(recomputed, *ids)
        assert torch.equal(expected["loss"], found["loss"])
        # The flash backwards add to dq in any order: a rounding of bf16.
        require_close(found, expected, bar=5e-3, matrix_bar=1e-2)


def test_memory_lies_between(tmp_path: Path) -> None:
    path = write_model(tmp_path, num_hidden_layers=8)
    peaks = []
    for mode in ("full", "selective", "none"):
        model = load(path, checkpointing=mode)
        loss_and_gradients(model, 3, 4, 5)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss_and_gradients(model, 3, 4, 5)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del model
    assert peaks[0] < peaks[1] < peaks[2], peaks


LIGER = """
import sys, torch
from pathlib import Path
from tests.gpu import test_gpu as gpu
path = Path(sys.argv[1])
reference = gpu.load(path, device=gpu.CPU)  # before the kernels take the place of torch's
expected = [gpu.loss_and_gradients(reference, *ids) for ids in gpu.PACKS]
model = gpu.load(path, kernels="liger")
assert "Liger" in type(model.causal_lm.base_model.norm).__name__, type(model.causal_lm.base_model.norm)
for ids, values in zip(gpu.PACKS, expected, strict=True):
    gpu.require_close(gpu.loss_and_gradients(model, *ids), values)
print("agrees")
"""


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
def test_ligers_kernels_agree_with_the_fp32_reference(architecture: str, tmp_path: Path) -> None:
    """In a process of its own: they stay in transformers for as long as a process lives."""
    if importlib.util.find_spec("liger_kernel") is None:
        pytest.skip("needs the package liger-kernel")
    path = write_model(tmp_path, architecture=architecture)
    assert "agrees" in tiny.run_ranks(["-c", LIGER, str(path)], world_size=1, timeout_s=300)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("compile_", ["off", "auto"])
@pytest.mark.parametrize(("engine", "world_size"), [("single", 1), ("ddp", 1), ("ddp", 2), ("ddp", 4), ("ddp", 8)])
def test_the_host_never_waits_from_first_forward_to_last_backward(
    engine: str, world_size: int, compile_: str, checkpointing: str, tmp_path: Path
) -> None:
    if world_size > torch.cuda.device_count():
        pytest.skip(f"needs {world_size} GPUs; this machine shows {torch.cuda.device_count()}")
    path = write_model(tmp_path)
    command = [RANK, str(path), engine, "auto", compile_, checkpointing]
    assert "losses" in tiny.run_ranks(command, world_size=world_size, timeout_s=400)
