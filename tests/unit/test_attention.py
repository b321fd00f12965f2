"""Documents in a pack never see each other, whatever the model's config says."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sft_dist.config import ModelSection
from sft_dist.data.batch import MicroBatch, build_micro_batch
from sft_dist.errors import BackendError
from sft_dist.model import loss
from sft_dist.model.attention import BACKENDS, choose_backend, register
from sft_dist.model.load import PackedModel, load_model, read_config
from sft_dist.model.verify import require_own_loss
from tests import tiny
from tests.unit.test_batch import Rows

CPU = torch.device("cpu")
ON_CPU = [name for name, backend in BACKENDS.items() if backend.why_not(CPU, torch.float32, 0.0) is None]
ISOLATION_BAR = 4e-6  # logits of order 1, fp32: rounding differs with the length of the batched matmuls


def documents(*lengths: int) -> Rows:
    rng = np.random.default_rng(0)
    return Rows(*[(rng.integers(0, 26, n).tolist(), [0, *[1] * (n - 1)]) for n in lengths])


def pack(rows: Rows, *ids: int) -> MicroBatch:
    return build_micro_batch(rows, ids, dict.fromkeys(ids, 0.01), is_last=True)


def load(path: Path, backend: str = "sdpa", **section: object) -> PackedModel:
    return load_model(
        ModelSection(path=str(path), **section),
        backend=BACKENDS[backend],
        dtype=torch.float32,
        device=CPU,
        num_tokens=32,
        added_token_ids=[],
    )


def test_a_backend_runs_on_this_cpu() -> None:
    assert ON_CPU == ["sdpa"]


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_logits_in_a_pack_equal_those_alone(architecture: str, use_cache: bool, backend: str, tmp_path: Path) -> None:
    model = load(
        tiny.write_model(tmp_path, architecture=architecture, use_cache=use_cache, initializer_range=0.1), backend
    )
    assert model.causal_lm.config.use_cache is use_cache
    rows = documents(2, 90, 33, 5)
    together = model(pack(rows, 0, 1, 2, 3), return_logits=True)
    alone = torch.cat([model(pack(rows, i), return_logits=True) for i in range(4)])
    own = torch.cat([own_logits(tmp_path, rows, i) for i in range(4)])
    assert own.abs().max() > 1, "logits near zero would hide a leak"
    assert float((together - alone).abs().max()) <= ISOLATION_BAR
    assert float((together - own).abs().max()) <= ISOLATION_BAR


def own_logits(path: Path, rows: Rows, index: int) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    return model(input_ids=torch.tensor(rows.rows[index].input_ids)[None].long(), use_cache=False).logits[0, :-1]


@pytest.mark.parametrize("backend", ON_CPU)
@torch.no_grad()
def test_perturbing_one_document_leaves_the_others_unchanged(backend: str, tied_model: Path) -> None:
    model = load(tied_model, backend)
    rows = documents(20, 30, 40)
    before = model(pack(rows, 0, 1, 2), return_logits=True)
    rows.rows[1].input_ids = (rows.rows[1].input_ids + 3) % 26
    after = model(pack(rows, 0, 1, 2), return_logits=True)
    assert torch.equal(before[:19], after[:19])
    assert torch.equal(before[19 + 29 :], after[19 + 29 :])
    assert not torch.equal(before[19 : 19 + 29], after[19 : 19 + 29])


@torch.no_grad()
def test_a_sliding_window_is_honoured_inside_each_document(tmp_path: Path) -> None:
    path = tiny.write_model(
        tmp_path, use_sliding_window=True, sliding_window=8, max_window_layers=0, initializer_range=0.1,
        layer_types=["sliding_attention", "sliding_attention"],
    )  # fmt: skip
    model = load(path)
    rows = documents(40, 12)
    own = torch.cat([own_logits(path, rows, i) for i in range(2)])
    assert float((model(pack(rows, 0, 1), return_logits=True) - own).abs().max()) <= ISOLATION_BAR


def test_checkpointing_does_not_change_loss_or_gradients(tied_model: Path) -> None:
    rows = documents(20, 30)
    results = []
    for checkpointing in ("none", "full"):
        model = load(tied_model, checkpointing=checkpointing)
        assert model.causal_lm.is_gradient_checkpointing is (checkpointing == "full")
        loss = model(pack(rows, 0, 1))
        loss.backward()
        results.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(g, results[1][1][n]) for n, g in results[0][1].items())


def test_auto_takes_what_can_run_and_an_explicit_name_that_cannot_raises() -> None:
    assert choose_backend("auto", device=CPU, dtype=torch.float32).name == "sdpa"
    with pytest.raises(BackendError, match=r"torch_varlen.*CUDA.*auto"):
        choose_backend("torch_varlen", device=CPU, dtype=torch.float32)
    with pytest.raises(BackendError, match=r"eager.*apart"):
        choose_backend("eager", device=CPU, dtype=torch.float32)


def test_a_call_without_document_bounds_is_refused(tied_model: Path) -> None:
    model = load(tied_model)
    with pytest.raises(BackendError, match="without document bounds"):
        model.causal_lm(input_ids=torch.arange(6)[None], use_cache=False)


def test_a_soft_capped_model_is_refused_with_both_numbers(tmp_path: Path) -> None:
    """Gemma 2 caps its logits; on random weights the losses differ by little, and still it is seen."""
    model = load(tiny.write_model(tmp_path, architecture="gemma2", hidden_activation="gelu_pytorch_tanh"))
    model.eval()
    with torch.no_grad(), pytest.raises(BackendError, match=r"packed loss of \d+\.\d+ .* give \d+\.\d+ .*soft caps"):
        require_own_loss(model, pack(documents(12, 20, 9), 0, 1, 2))


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
def test_supported_models_agree_with_their_own_logits(architecture: str, tmp_path: Path) -> None:
    model = load(tiny.write_model(tmp_path, architecture=architecture)).eval()
    agreement = require_own_loss(model, pack(documents(12, 20, 9), 0, 1, 2))
    assert agreement.packed_loss == pytest.approx(agreement.own_loss, rel=1e-6)
    assert model.causal_lm.config._attn_implementation == register(BACKENDS["sdpa"]), (
        "the check leaves the backend in place"
    )


def test_a_loss_that_disagrees_is_refused_even_when_the_logits_agree(
    tied_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tied_model).eval()
    original = loss._chunk_loss
    monkeypatch.setattr(loss, "_chunk_loss", lambda *arguments: 1.01 * original(*arguments))
    with torch.no_grad(), pytest.raises(BackendError, match="packed loss of"):
        require_own_loss(model, pack(documents(12, 20, 9), 0, 1, 2))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "rope_theta": 10000.0},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_frequencies_that_depend_on_the_pack_are_refused(rope: dict[str, object], tmp_path: Path) -> None:
    path = tiny.write_model(tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    with pytest.raises(BackendError, match=f"rope_type '{rope['rope_type']}'"):
        read_config(ModelSection(path=str(path)))


def test_dropout_acts_in_training_and_not_in_evaluation(tmp_path: Path) -> None:
    model = load(tiny.write_model(tmp_path, attention_dropout=0.5, initializer_range=0.1))
    micro = pack(documents(20, 30), 0, 1)
    with torch.no_grad():
        losses = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            losses.append(float(model(micro)))
        assert losses[0] == losses[1] != losses[2]
        model.eval()
        assert float(model(micro)) == float(model(micro))
    with pytest.raises(BackendError, match=r"attention_dropout=0\.5"):
        choose_backend("torch_varlen", device=CPU, dtype=torch.bfloat16, dropout=0.5)
