"""The response head against double precision and full logits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sft_dist.model import loss as loss_module
from sft_dist.model.loss import ResponseHead


def reference(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    nll = nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="none")
    return (nll * weights).sum()


def inputs(rows: int, hidden_size: int = 24, vocabulary: int = 50) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, hidden_size, generator=generator)
    weight = torch.randn(vocabulary, hidden_size, generator=generator)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    return hidden, weight, targets, torch.rand(rows, generator=generator)


@pytest.mark.parametrize("rows", [1, 7, 64, 65])
def test_loss_and_gradients_equal_full_logits_in_double_precision(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", 4 * 50 * 16)  # chunks of 16 rows
    monkeypatch.setattr(loss_module, "LEAST_ROWS", 1)
    hidden, weight, targets, weights = inputs(rows)
    head = ResponseHead(nn.Parameter(weight.clone()))
    h = hidden.clone().requires_grad_()
    value = head(h, targets, weights)
    (value * 3).backward()  # an engine scales the loss by the world size

    h64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    expected = reference(h64, w64, targets, weights.double())
    (expected * 3).backward()
    # fp32 against fp64: a few roundings of 6e-8.
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert float((h.grad - h64.grad).norm() / h64.grad.norm()) < 5e-7
    assert float((head.weight.grad - w64.grad).norm() / w64.grad.norm()) < 5e-7


def test_no_rows_gives_a_zero_that_is_connected() -> None:
    head = ResponseHead(nn.Parameter(torch.randn(50, 24)))
    body = torch.randn(4, 24, requires_grad=True)
    value = head(
        body.index_select(0, torch.empty(0, dtype=torch.long)), torch.empty(0, dtype=torch.long), torch.empty(0)
    )
    value.backward()
    assert float(value.detach()) == 0.0
    assert head.weight.grad is not None
    assert float(head.weight.grad.abs().max()) == 0.0
    assert body.grad is not None


def test_without_gradients_none_are_made() -> None:
    hidden, weight, targets, weights = inputs(9)
    head = ResponseHead(nn.Parameter(weight))
    with torch.no_grad():
        value = head(hidden, targets, weights)
    assert float(value) == pytest.approx(float(reference(hidden, weight, targets, weights)), rel=1e-6)


def test_bf16_weight_gradient_is_summed_in_fp32_over_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """512 equal chunks: a bf16 sum stops growing at 256 times the term, an fp32 sum does not."""
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", 4 * 50)  # chunks of one row
    monkeypatch.setattr(loss_module, "LEAST_ROWS", 1)
    hidden = torch.ones(512, 8, dtype=torch.bfloat16)
    head = ResponseHead(nn.Parameter(torch.zeros(50, 8, dtype=torch.bfloat16)))
    head(hidden, torch.zeros(512, dtype=torch.long), torch.ones(512)).backward()
    assert float(head.weight.grad[0, 0]) == pytest.approx(-512 * 49 / 50, rel=0.01)


MEMORY_SCRIPT = Path(__file__).with_name("loss_memory.py")


def peak_bytes(kind: str) -> int:
    """In a process of its own with two threads: most of the time goes into touching fresh pages."""
    command = [sys.executable, str(MEMORY_SCRIPT), kind]
    environ = os.environ | {"OMP_NUM_THREADS": "2"}
    out = subprocess.run(command, env=environ, capture_output=True, text=True, check=True, timeout=120)
    return int(out.stdout)


def test_the_head_peaks_below_a_quarter_of_full_logits() -> None:
    """Hidden 256, vocabulary 152k, 4096 tokens, 30% response; above baseline, weight gradient excluded."""
    ours, full = peak_bytes("ours"), peak_bytes("full")
    print(f"\nloss and backward: ours {ours / 2**20:.0f} MiB, full logits {full / 2**20:.0f} MiB ({full / ours:.1f}x)")
    assert ours < full / 4
