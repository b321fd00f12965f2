"""What is recomputed changes memory and time, never loss or gradients."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from sft_dist.model.checkpointing import ATTENTION_OPERATIONS
from sft_dist.model.load import PackedModel
from tests import tiny
from tests.unit.test_attention import documents, load, pack

MODES = ("none", "selective", "full")
MICRO = pack(documents(20, 130, 2, 300), 0, 1, 2, 3)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("checkpointing"), architecture="qwen3", num_hidden_layers=4)


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_loss_and_gradients_are_those_without(mode: str, dropout: float, tmp_path: Path) -> None:
    path = tiny.write_model(tmp_path, attention_dropout=dropout)
    results = []
    for checkpointing in ("none", mode):
        model = load(path, checkpointing=checkpointing)
        torch.manual_seed(3)
        loss = model(MICRO)
        loss.backward()
        results.append({"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters()})
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def kept_bytes(model: PackedModel) -> int:
    """Host memory that a forward leaves allocated: what the backward needs."""
    model(MICRO).backward()  # gradients, and what is made once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = model(MICRO)
    del loss
    return sum(event.self_cpu_memory_usage for event in profiler.key_averages())


def test_selective_keeps_attention_outputs_and_no_more(model_dir: Path) -> None:
    none, selective, full = (kept_bytes(load(model_dir, checkpointing=mode)) for mode in MODES)
    num_tokens, config = MICRO.input_ids.shape[1], load(model_dir).causal_lm.config
    width = config.num_attention_heads * config.head_dim
    log_sums = num_tokens * config.num_attention_heads
    outputs = 4 * config.num_hidden_layers * (num_tokens * width + log_sums)
    assert full < selective < none / 3
    # Scalars and random states of the attention operation may add a little.
    assert selective - full == pytest.approx(outputs, rel=0.1)


class CountedOperations(TorchDispatchMode):
    """How often each operation of attention runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name().split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("mode", "times"), [("none", 1), ("selective", 1), ("full", 2)])
def test_attention_runs_again_only_under_full(mode: str, times: int, model_dir: Path) -> None:
    model = load(model_dir, checkpointing=mode)
    with CountedOperations() as counted:
        model(MICRO)
    once = sum(counted.counts[name] for name in ATTENTION_OPERATIONS)
    assert once > 0, "no operation of attention is among those that are kept"
    with CountedOperations() as counted:
        model(MICRO).backward()
    assert sum(counted.counts[name] for name in ATTENTION_OPERATIONS) == times * once


def test_measuring_does_not_recompute(model_dir: Path) -> None:
    model = load(model_dir, checkpointing="full").eval()
    with torch.no_grad():
        assert not model(MICRO).requires_grad
