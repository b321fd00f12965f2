"""What only a GPU can show: the flash backends keep documents apart, and bf16 training draws the fp32 curve."""

from pathlib import Path

import pytest
import torch
from rich.console import Console

from sft_dist.config import ModelSection, parse_recipe
from sft_dist.metrics import read_steps
from sft_dist.model.attention import BACKENDS
from sft_dist.model.load import load_model
from sft_dist.train import run
from tests import tiny
from tests.unit.test_attention import documents, own_logits, pack

CUDA = torch.device("cuda")
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
                "run": {"name": f"{engine}-{dtype}", "dir": str(tmp_path / "runs")},
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
