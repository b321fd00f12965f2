"""Kernels of libraries that this machine may lack: called as the libraries declare them, or refused with the reason.

The stand-ins here have the libraries' parameters and compute what their documents say, slowly. So these tests check the
calls; what the kernels themselves compute is for tests/gpu.
"""

import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AutoConfig

from sft_dist.errors import BackendError
from sft_dist.model import attention
from sft_dist.model.attention import BACKENDS, choose_backend, document_bounds
from sft_dist.model.kernels import LIGER_MODELS, apply_kernels
from tests.unit.test_attention import documents, pack

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HOPPER, BLACKWELL, AMPERE, CONSUMER = (9, 0), (10, 0), (8, 0), (12, 0)


def attended(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    causal: bool,
    window: tuple[int | None, int | None],
    scale: float,
) -> Tensor:
    """Attention by its definition, with the flash libraries' window: keys i-left to i+right; -1 or None: all."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    left, right = (None if side is None or side < 0 else side for side in window)
    outputs = []
    for start, end in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False):
        ahead = torch.arange(end - start)[None, :] - torch.arange(end - start)[:, None]
        hidden = (ahead > 0) if causal else torch.zeros_like(ahead, dtype=torch.bool)
        hidden |= (ahead < -left) if left is not None else False
        hidden |= (ahead > right) if right is not None else False
        scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) * scale
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v[start:end]))
    return torch.cat(outputs)


# Parameters of flash-attn 2.8, of flash_attn_interface 3.0 and of flash_attn.cute 4.0, up to the last that is given.
def flash_2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1),
):  # fmt: skip
    assert dropout_p == 0.0
    return checked(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size)


def flash_3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, softmax_scale=None,
    causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
):  # fmt: skip
    assert seqused_q is seqused_k is qv is None
    return checked(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size)


def flash_4(
    q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, seqused_q=None, seqused_k=None,
    page_table=None, softmax_scale=None, causal=False, window_size=(None, None),
):  # fmt: skip
    assert seqused_q is seqused_k is page_table is None
    assert all(side is None or side >= 0 for side in window_size), "a number is a limit here, -1 too"
    out = checked(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size)
    return out, None  # and the log-sum-exp


def varlen(*args: Any, **kwargs: Any) -> Tensor:
    """Called with the parameters of the torch that is installed."""
    given = inspect.signature(varlen_attn).bind(*args, **kwargs).arguments
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        assert given["enable_gqa"]
    names = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k", "scale")
    return checked(*(given[name] for name in names), False, given["window_size"])


def checked(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
    scale: float, causal: bool, window: tuple[int | None, int | None],
) -> Tensor:  # fmt: skip
    assert torch.equal(cu_q, cu_k)
    assert cu_q.dtype == torch.int32
    assert max_q == max_k >= int(cu_q.diff().max())
    return attended(q, k, v, cu_q, causal=causal, window=window, scale=scale)


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, function in (("flash_attn", flash_2), ("flash_attn_interface", flash_3), ("flash_attn.cute", flash_4)):
        module = types.ModuleType(name)
        module.flash_attn_varlen_func = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(attention, "varlen_attn", varlen)


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("window", [None, 1, 8])
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "sdpa"])
def test_a_flash_backend_is_called_for_the_attention_that_sdpa_computes(name: str, window: int | None) -> None:
    (bounds,) = document_bounds(pack(documents(2, 40, 17), 0, 1, 2)).values()
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(59, heads, 16, generator=generator) for heads in (4, 2, 2))
    settings = {"scale": 0.3, "window": window, "dropout": 0.0} | bounds
    expected, found = (BACKENDS[which].attend(q, k, v, **settings) for which in ("sdpa", name))
    assert float((expected - found).abs().max()) < 2e-6  # fp32, sums of 40 terms of order 1


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int]], None]:
    def of_generation(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "a card")

    return of_generation


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize(
    ("name", "capability", "can"),
    [
        ("flash_attention", AMPERE, True),
        ("flash_attention", (7, 5), False),
        ("flash_attention_3", HOPPER, True),
        ("flash_attention_3", AMPERE, False),
        ("flash_attention_3", BLACKWELL, False),
        ("flash_attention_4", HOPPER, True),
        ("flash_attention_4", BLACKWELL, True),
        ("flash_attention_4", CONSUMER, False),
        ("torch_varlen", AMPERE, True),
        ("torch_varlen", (7, 5), False),
    ],
)
def test_a_backend_is_refused_on_cards_that_its_kernels_are_not_for(
    name: str, capability: tuple[int, int], can: bool, on_gpu: Callable[[tuple[int, int]], None]
) -> None:
    on_gpu(capability)
    if can:
        assert choose_backend(name, device=CUDA, dtype=torch.bfloat16).name == name
    else:
        with pytest.raises(BackendError, match=rf"model.attention='{name}' cannot run here: .*a card"):
            choose_backend(name, device=CUDA, dtype=torch.bfloat16)
    with pytest.raises(BackendError, match="bf16 or fp16"):
        choose_backend(name, device=CUDA, dtype=torch.float32)


@pytest.mark.usefixtures("libraries")
def test_auto_takes_what_layers_can_be_compiled_with(
    on_gpu: Callable[[tuple[int, int]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu(HOPPER)
    assert choose_backend("auto", device=CUDA, dtype=torch.bfloat16).name == "flash_attention"
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))  # version 4 alone
    assert choose_backend("auto", device=CUDA, dtype=torch.bfloat16).name == "torch_varlen"
    assert choose_backend("auto", device=CUDA, dtype=torch.bfloat16, dropout=0.1).name == "sdpa"
    with pytest.raises(BackendError, match="flash_attn has no flash_attn_varlen_func"):
        choose_backend("flash_attention", device=CUDA, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["flash_attention_3", "flash_attention_4", "torch_varlen"])
def test_a_backend_without_dropout_is_refused_for_a_model_with_it(name: str) -> None:
    with pytest.raises(BackendError, match=rf"'{name}' cannot run here: it has no dropout.*attention_dropout=0\.1"):
        choose_backend(name, device=CUDA, dtype=torch.bfloat16, dropout=0.1)


@pytest.mark.parametrize(
    ("name", "package"),
    [("flash_attention", "flash-attn"), ("flash_attention_3", "flash-attn-3"), ("flash_attention_4", "flash-attn-4")],
)
def test_a_package_that_is_not_there_is_named(
    name: str, package: str, on_gpu: Callable[[tuple[int, int]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu(HOPPER)
    for module in ("flash_attn", "flash_attn.cute", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BackendError, match=f"the package {package} cannot be imported"):
        choose_backend(name, device=CUDA, dtype=torch.bfloat16)


def test_liger_replaces_norm_rotary_embedding_and_swiglu_and_never_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the call: with the parameters that the functions of liger-kernel have."""
    calls = {}
    liger = types.ModuleType("liger_kernel.transformers")
    for model_type in LIGER_MODELS:

        def apply(
            rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, swiglu=True, model=None,
            *, of=model_type,
        ):  # fmt: skip
            calls[of] = {"body": (rope, rms_norm, swiglu), "loss": (cross_entropy, fused_linear_cross_entropy)}

        setattr(liger, f"apply_liger_kernel_to_{model_type}", apply)
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", liger)
    for model_type in LIGER_MODELS:
        apply_kernels("liger", AutoConfig.for_model(model_type), CUDA)
        assert calls.pop(model_type) == {"body": (True, True, True), "loss": (False, False)}
    assert not calls
    apply_kernels("torch", AutoConfig.for_model("qwen2"), CUDA)
    assert not calls


def test_liger_is_refused_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=r"runs on CUDA devices, this is cpu; use model\.kernels: torch"):
        apply_kernels("liger", AutoConfig.for_model("qwen2"), CPU)
    with pytest.raises(BackendError, match="for llama, qwen2, qwen3, this model is 'gpt2'"):
        apply_kernels("liger", AutoConfig.for_model("gpt2"), CUDA)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    with pytest.raises(BackendError, match=r"needs the package liger-kernel, which cannot be imported: .*; install it"):
        apply_kernels("liger", AutoConfig.for_model("qwen2"), CUDA)
