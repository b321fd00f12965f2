"""The last layer works where a token is trained, and computes what the whole layer does there."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sft_dist.model import last_layer
from sft_dist.model.last_layer import MODELS
from sft_dist.model.load import PackedModel
from tests import tiny
from tests.unit.test_attention import documents, load, pack

ROWS = documents(20, 33, 50)


def last_mlp(model: PackedModel) -> nn.Module:
    mlp = model.causal_lm.base_model.layers[-1].mlp
    assert isinstance(mlp, nn.Module)
    return mlp


def rows_seen(module: nn.Module) -> list[int]:
    """Filled, at each call of the module, with the rows of its input."""
    seen: list[int] = []
    module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    return seen


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("architecture", MODELS)
def test_loss_and_gradients_are_those_of_the_whole_layer(
    architecture: str, checkpointing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny.write_model(tmp_path, architecture=architecture)
    trimmed, micro = load(path, checkpointing=checkpointing), pack(ROWS, 0, 1, 2)
    monkeypatch.setattr(last_layer, "MODELS", ())
    whole = load(path, checkpointing=checkpointing)
    assert [len(micro.targets)] != [micro.input_ids.shape[1]]
    losses = [model(micro) for model in (trimmed, whole)]
    for loss in losses:
        loss.backward()
    assert float(losses[0].detach()) == pytest.approx(float(losses[1].detach()), rel=1e-6)
    for (name, found), expected in zip(trimmed.named_parameters(), whole.parameters(), strict=True):
        assert found.grad is not None
        assert expected.grad is not None
        # Matrix products over other numbers of rows round differently.
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_the_last_mlp_sees_trained_rows_alone(tied_model: Path) -> None:
    model, micro = load(tied_model), pack(ROWS, 0, 1, 2)
    last, first = rows_seen(last_mlp(model)), rows_seen(model.causal_lm.base_model.layers[0].mlp)
    model(micro)
    assert last == [len(micro.targets)]
    assert first == [micro.input_ids.shape[1]]


def test_a_model_that_generates_computes_all_rows(tied_model: Path) -> None:
    model = load(tied_model)
    seen = rows_seen(last_mlp(model))
    model.causal_lm.set_attn_implementation("eager")
    model.causal_lm(input_ids=pack(ROWS, 0).input_ids, use_cache=False)
    assert seen == [20]


def test_a_pack_without_trained_tokens_gives_every_weight_a_gradient_of_zero(tied_model: Path) -> None:
    """Collectives need a gradient on every rank, also of weights that saw no row."""
    model, micro = load(tied_model), pack(ROWS, 0)
    nothing = {name: getattr(micro, name)[:0] for name in ("response_index", "targets", "weights")}
    model(type(micro)(**(vars(micro) | nothing))).backward()
    gradients: list[Tensor | None] = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
