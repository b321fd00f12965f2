"""Compiled layers compute what the layers compute, with one graph for packs of every size."""

import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from sft_dist.config import load_recipe
from sft_dist.data.batch import MicroBatch
from sft_dist.errors import BackendError
from sft_dist.model import attention
from sft_dist.model import compile as compile_module
from sft_dist.model.attention import BACKENDS, document_bounds
from sft_dist.model.compile import MAX_GRAPHS, CompiledLayers, choose_compile
from sft_dist.model.load import PackedModel
from sft_dist.model.verify import require_own_loss
from tests import tiny
from tests.unit.test_attention import documents, load, pack

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROWS = documents(2, 5, 64, 30, 90, 33, 300, 3, 128, 2)
# One document as long as the hidden size, a filler's size, powers of two and not, one document and many.
PACKS = [(2,), (0,), (1, 3), (4, 5, 6), (7,), (8,), (0, 1, 2, 3, 4, 5, 6, 7, 8, 9), (9, 1)]


@pytest.fixture(autouse=True)
def _graphs_of_their_own() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(path: Path, *, compiler: str = "aot_eager", **section: Any) -> PackedModel:
    model = load(path, **section)
    model.compiled = CompiledLayers(model.causal_lm, compiler=compiler)
    return model


def loss_and_gradients(model: PackedModel, micro: MicroBatch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(micro)
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("architecture", "checkpointing"),
    [("qwen2", "none"), ("llama", "none"), ("qwen3", "none"), ("qwen3", "selective"), ("qwen3", "full")],
)
def test_packs_of_every_size_share_one_graph_and_its_results(
    architecture: str, checkpointing: str, tmp_path: Path
) -> None:
    # Two layers that share graphs, and the last, which has none.
    path = tiny.write_model(tmp_path, architecture=architecture, num_hidden_layers=3)
    eager, model = load(path), compiled(path, checkpointing=checkpointing)
    for ids in PACKS:
        micro = pack(ROWS, *ids)
        expected, found = loss_and_gradients(eager, micro), loss_and_gradients(model, micro)
        assert expected.keys() == found.keys()
        # The same kernels in the same order: bit for bit.
        assert all(torch.equal(value, found[name]) for name, value in expected.items()), ids
    assert model.compiled is not None
    assert len(model.compiled.graphs) == 1, model.compiled.graphs
    assert re.match(r"training float32\[1,s\d+,64\]", model.compiled.graphs[0]), "the number of tokens is a symbol"
    model.eval()
    with torch.no_grad():
        for ids in PACKS:
            assert float(model(pack(ROWS, *ids))) == float(eager(pack(ROWS, *ids)))
    require_own_loss(model, pack(ROWS, 1, 3, 5))
    assert len(model.compiled.graphs) == 2, model.compiled.graphs


def test_windowed_and_whole_layers_have_a_graph_each(tmp_path: Path) -> None:
    # Of three, as the last layer has no graph.
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    path = tiny.write_model(tmp_path, num_hidden_layers=3, use_sliding_window=True, sliding_window=8, layer_types=kinds)
    eager, model = load(path), compiled(path, checkpointing="full")
    for ids in PACKS[2:5]:
        micro = pack(ROWS, *ids)
        expected, found = loss_and_gradients(eager, micro), loss_and_gradients(model, micro)
        assert all(torch.equal(value, found[name]) for name, value in expected.items())
    with torch.no_grad():
        model.eval()
        for ids in PACKS[2:5]:
            model(pack(ROWS, *ids))
    assert model.compiled is not None
    assert len(model.compiled.graphs) == MAX_GRAPHS, model.compiled.graphs


@pytest.mark.parametrize(("checkpointing", "times"), [("none", 1), ("selective", 1), ("full", 2)])
def test_a_graph_recomputes_what_was_asked(
    checkpointing: str, times: int, tied_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = compiled(tied_model, checkpointing=checkpointing)
    calls = []
    attend = attention._attend_sdpa
    monkeypatch.setattr(attention, "_attend_sdpa", lambda *args, **kwargs: calls.append(1) or attend(*args, **kwargs))
    loss_and_gradients(model, pack(ROWS, 4, 5))
    in_backward_operation = 1  # which attends once more for its own gradient
    assert len(calls) == (times + in_backward_operation) * model.causal_lm.config.num_hidden_layers


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor makes C++ for a CPU, and there is no g++")
def test_generated_kernels_agree_with_the_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    path = tiny.write_model(tmp_path / "m", architecture="qwen3")
    eager, model = load(path), load(path, compile="on")
    for ids in PACKS[:4]:
        micro = pack(ROWS, *ids)
        expected, found = loss_and_gradients(eager, micro), loss_and_gradients(model, micro)
        for name, value in expected.items():
            # fp32: fused sums round differently, by some 6e-8 of the largest term each.
            assert float((value - found[name]).norm() / value.norm().clamp(min=1e-12)) < 5e-6, name
    assert model.compiled is not None
    assert len(model.compiled.graphs) == 1


def test_a_run_that_needs_more_graphs_says_what_varied(tied_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = compiled(tied_model)
    assert model.compiled is not None
    with caplog.at_level(logging.WARNING, logger="sft_dist.model.compile"):
        for scale in range(MAX_GRAPHS + 1):
            # A constant of the layer that is another for every pack.
            for layer in model.causal_lm.base_model.layers:
                layer.self_attn.scaling = 0.1 + scale
            assert not caplog.messages
            model(pack(ROWS, 1, 3))
    (said,) = caplog.messages
    assert f"{MAX_GRAPHS + 1} graphs" in said
    assert "training float32[1," in said
    assert "TORCH_LOGS=recompiles" in said


def test_nothing_that_is_another_for_every_pack_reaches_a_graph() -> None:
    (bounds,) = document_bounds(pack(ROWS, 4, 5), compiled=True).values()
    assert set(bounds) == {"cu_seqlens", "max_seqlen", "host_cu_seqlens"}
    assert bounds["host_cu_seqlens"].tolist() == bounds["cu_seqlens"].tolist() == [0, 90, 123]


@pytest.mark.parametrize(("longest", "bound"), [(2, 2), (3, 4), (64, 64), (65, 128)])
def test_the_longest_document_is_rounded_up_to_a_power_of_two(longest: int, bound: int) -> None:
    micro = pack(documents(2, longest), 0, 1)
    for compiled in (True, False):
        assert document_bounds(micro, compiled=compiled)["document_bounds"]["max_seqlen"] == bound


def chosen(name: str, device: torch.device = CUDA, **changed: Any) -> bool:
    settings: dict[str, Any] = {
        "backend": BACKENDS["torch_varlen"],
        "kernels": "torch",
        "is_partitioned": False,
    } | changed
    config = settings.pop("config", None) or AutoConfig.for_model("qwen2")
    return choose_compile(name, config, device=device, **settings)


@pytest.fixture
def with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU machine's compilers, as far as the choice looks at them."""
    monkeypatch.setattr(compile_module, "find_spec", lambda _name: object())
    monkeypatch.setattr(compile_module, "which", lambda name: f"/bin/{name}")


@pytest.mark.usefixtures("with_triton")
def test_auto_compiles_on_a_gpu_with_a_compiler(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="sft_dist.model.compile"):
        assert chosen("auto")
    assert caplog.messages == ["compile: auto chose on"]
    assert chosen("on")
    assert not chosen("off")


@pytest.mark.usefixtures("with_triton")
@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"is_partitioned": True}, "ZeRO-3"),
        ({"kernels": "liger"}, r"model\.kernels='liger' are chosen"),
        ({"backend": BACKENDS["flash_attention_3"]}, "attention flash_attention_3 cannot be traced"),
        (
            {"backend": BACKENDS["sdpa"], "config": AutoConfig.for_model("qwen2", attention_dropout=0.5)},
            r"attention_dropout=0\.5",
        ),
    ],
)
def test_where_it_cannot_be_auto_is_off_and_says_why_and_on_is_refused(
    changed: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="sft_dist.model.compile"):
        assert not chosen("auto", **changed)
    (said,) = caplog.messages
    with pytest.raises(BackendError, match=f"model.compile='on' cannot be: .*{reason}.*auto"):
        chosen("on", **changed)
    assert said.startswith("compile: auto chose off: ")


def test_without_a_compiler_auto_is_off_and_on_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_module, "find_spec", lambda _name: None)
    assert not chosen("auto")
    with pytest.raises(BackendError, match="triton"):
        chosen("on")
    monkeypatch.setattr(compile_module, "which", lambda _name: None)
    with pytest.raises(BackendError, match=r"no compiler was found .*CXX"):
        chosen("on", CPU)


def test_auto_is_off_on_a_cpu_and_for_models_that_nobody_calls_traceable(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_module, "_why_no_compiler", lambda _device: None)
    with caplog.at_level(logging.INFO, logger="sft_dist.model.compile"):
        assert not chosen("auto", CPU)
        assert not chosen("auto", config=AutoConfig.for_model("ctrl"))
    assert "on a CPU" in caplog.messages[0]
    assert "'ctrl'" in caplog.messages[1]


def test_a_bare_on_or_off_in_yaml_is_the_word(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    for word in ("on", "off", "auto"):
        model = f"model: {{path: m, compile: {word}}}"
        path.write_text(f"run: {{name: a}}\n{model}\ndata: {{train: t}}\nbatch: {{examples: 8}}\noptim: {{lr: 1}}")
        recipe = load_recipe(path)
        assert recipe.model.compile == word
        path.write_text(recipe.to_yaml())
        assert load_recipe(path) == recipe
