"""The engine of one process: fp32 sums, withheld updates, and a model that is as it was after evaluating."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sft_dist.config import ModelSection, OptimSection
from sft_dist.engine import local
from sft_dist.engine.local import LocalEngine
from sft_dist.evaluate import evaluating
from sft_dist.model.attention import BACKENDS
from sft_dist.model.load import load_model
from sft_dist.optim import build_adamw
from sft_dist.world import World
from tests.unit.test_attention import documents, pack

CPU = torch.device("cpu")


def start(path: Path, dtype: torch.dtype, max_grad_norm: float = 1.0) -> LocalEngine:
    loaded = load_model(
        ModelSection(path=str(path)), backend=BACKENDS["sdpa"], dtype=dtype, device=CPU, num_tokens=32,
        added_token_ids=[],
    )  # fmt: skip
    return LocalEngine(
        loaded, name="single", world=World(), device=CPU, max_grad_norm=max_grad_norm,
        make_optimizer=functools.partial(build_adamw, optim=OptimSection(lr=1e-3)),
    )  # fmt: skip


def test_bf16_gradients_are_summed_in_fp32_over_micro_batches(tied_model: Path) -> None:
    """600 equal micro-batches: a bf16 sum stops growing at 256 times the term, an fp32 sum does not."""
    engine, micro = start(tied_model, torch.bfloat16), pack(documents(12, 20), 0, 1)
    norms = []
    for count in (1, 600):
        for _ in range(count):
            with engine.accumulate(is_last=False):
                engine.backward(engine(micro))
        norms.append(engine.step(lr=0.0, grad_norm=float(engine.reduce())).grad_norm)
    # 600 fp32 additions round by 6e-8 each.
    assert norms[1] / norms[0] == pytest.approx(600, rel=1e-4)


def test_one_bf16_micro_batch_is_updated_with_as_its_fp32_sum_would_be(
    tied_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient is never held in fp32 as a whole, and the update is the same to the bit."""
    micro, weights = pack(documents(12, 20), 0, 1), []
    for is_known_to_be_last in (True, False):
        engine = start(tied_model, torch.bfloat16, max_grad_norm=0.1)
        monkeypatch.setattr(local, "BUCKET_ELEMENTS", 5000)
        for _ in range(3):
            with engine.accumulate(is_last=is_known_to_be_last):
                engine.backward(engine(micro))
            held = sum(master.grad is not None for master in engine._masters.values())
            assert held == (0 if is_known_to_be_last else len(engine._masters))
            result = engine.step(lr=1e-3, grad_norm=float(engine.reduce()))
            assert result.applied
            assert result.grad_norm > 0.1, "clipped"
        weights.append({name: value.clone() for name, value in engine.state_dict().items()})
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_step_whose_gradient_is_not_finite_is_withheld(tied_model: Path) -> None:
    engine, micro = start(tied_model, torch.float32), pack(documents(12, 20), 0, 1)
    before = engine.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    engine.backward(engine(replace(micro, weights=micro.weights * torch.inf)))
    result = engine.step(lr=1e-3, grad_norm=float(engine.reduce()))
    assert not result.applied
    assert all(torch.equal(value, before[name]) for name, value in engine.state_dict().items())
    engine.backward(engine(micro))
    assert engine.step(lr=1e-3, grad_norm=float(engine.reduce())).applied, "the gradient of the withheld step is gone"
    assert not torch.equal(engine.state_dict()["lm_head.weight"], before["lm_head.weight"])


def test_evaluating_puts_training_mode_back(tied_model: Path) -> None:
    trained = start(tied_model, torch.float32).model
    with evaluating(trained):
        assert not trained.training
        assert not torch.is_grad_enabled()
    assert all(module.training for module in trained.modules())


@pytest.mark.parametrize("at_a_time", [10**9, 10**6 + 1], ids=["whole", "in parts"])
def test_the_gradient_norm_of_a_large_tensor_is_exact(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four million elements: torch's own fp32 norm is off by 1e-5 and more."""
    monkeypatch.setattr(local, "NORM_ELEMENTS", at_a_time)
    gradient = torch.rand(4_000_000, generator=torch.Generator().manual_seed(0))
    exact = float(gradient.double().pow(2).sum().sqrt())
    assert float(local._global_norm([gradient[:1000], gradient[1000:]])) == pytest.approx(exact, rel=1e-9)
