"""Attention that keeps packed documents apart, behind transformers' attention interface.

A pack is one row of T tokens holding S documents; `cu_seqlens` says where they begin. Every backend here
takes those bounds explicitly. Nothing is inferred from position_ids, no mask is built, and no cache: a
backend without document bounds would let documents read each other without a warning.

Compiled layers see attention as one operation: the flash libraries register theirs with torch, and the per-document
loop, which a tracer would unroll for the lengths of one pack, is registered below.

    T = packed tokens, S = documents, Hq/Hk = query/key heads, D = head dimension
"""

import importlib
import inspect
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers.modeling_utils import AttentionInterface

from sft_dist.data.batch import MicroBatch
from sft_dist.errors import BackendError

logger = logging.getLogger(__name__)

DocumentAttention = Callable[..., Tensor]
"""Causal, per document: (q [T,Hq,D], k [T,Hk,D], v [T,Hk,D], *, bounds, scale, window, dropout) -> [T,Hq,D]."""

VARLEN_TAKES_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""torch 2.11 takes unequal head counts as they come; from 2.12 on they must be announced."""


@dataclass(frozen=True)
class Backend:
    """A way to attend per document. `why_not(device, dtype, dropout)` is None where it can run, else the reason."""

    name: str
    attend: DocumentAttention
    why_not: Callable[[torch.device, torch.dtype, float], str | None]
    can_be_traced: bool = True
    """torch.compile can take it into a graph."""
    in_auto: bool = True


def _attend_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None,
    dropout: float,
    **_: Any,
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    left = -1 if window is None else window - 1
    bounds = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    out: Tensor = flash_attn_varlen_func(
        q, k, v, *bounds, dropout_p=dropout, softmax_scale=scale, causal=True, window_size=(left, 0)
    )
    return out


def _attend_flash_3(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int | None, **_: Any
) -> Tensor:
    left = -1 if window is None else window - 1
    bounds = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    attend = importlib.import_module("flash_attn_interface").flash_attn_varlen_func
    return _first(attend(q, k, v, *bounds, softmax_scale=scale, causal=True, window_size=(left, 0)))


def _attend_flash_4(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int | None, **_: Any
) -> Tensor:
    # None, where the other versions take -1, is no limit; what is right of a token is hidden by `causal`.
    sides = (None, None) if window is None else (window - 1, 0)
    # By name: the optional tensors between the bounds and the lengths have changed places between releases.
    bounds = {
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k": cu_seqlens,
        "max_seqlen_q": max_seqlen,
        "max_seqlen_k": max_seqlen,
    }
    attend = importlib.import_module("flash_attn.cute").flash_attn_varlen_func
    return _first(attend(q, k, v, **bounds, softmax_scale=scale, causal=True, window_size=sides))


def _first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The output; some releases return the log-sum-exp beside it."""
    return result[0] if isinstance(result, tuple) else result


def _attend_varlen(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int | None, **_: Any
) -> Tensor:
    left = -1 if window is None else window - 1
    grouped: dict[str, Any] = {"enable_gqa": True} if VARLEN_TAKES_GQA and q.shape[1] != k.shape[1] else {}
    bounds = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    out = varlen_attn(q, k, v, *bounds, scale=scale, window_size=(left, 0), **grouped)
    assert isinstance(out, Tensor)
    return out


def _attend_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    document_lengths: tuple[int, ...],
    scale: float,
    window: int | None,
    dropout: float,
    **_: Any,
) -> Tensor:
    """One SDPA call per document: exact, and never a T x T mask."""
    documents = zip(q.split(document_lengths), k.split(document_lengths), v.split(document_lengths), strict=True)
    return torch.cat([_attend_document(*qkv, scale=scale, window=window, dropout=dropout) for qkv in documents])


def _attend_document(q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None, dropout: float) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1,H,L,D]
    length = q.shape[2]
    mask = None
    if window is not None and length > window:
        distance = torch.arange(length, device=q.device)[:, None] - torch.arange(length, device=q.device)
        mask = (distance >= 0) & (distance < window)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def _attend_sdpa_traced(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    document_lengths: tuple[int, ...] | None = None,
    host_cu_seqlens: Tensor | None = None,
    scale: float,
    window: int | None,
    dropout: float,
    **_: Any,
) -> Tensor:
    """The loop over documents, or the operation that stands for it in a compiled layer."""
    if host_cu_seqlens is None:
        assert document_lengths is not None
        return _attend_sdpa(q, k, v, document_lengths=document_lengths, scale=scale, window=window, dropout=dropout)
    out: Tensor = torch.ops.sft_dist.attend_documents(q, k, v, host_cu_seqlens, scale, window)
    return out


@torch.library.custom_op("sft_dist::attend_documents", mutates_args=())
def _attend_documents(
    q: Tensor, k: Tensor, v: Tensor, host_cu_seqlens: Tensor, scale: float, window: int | None
) -> Tensor:
    """`_attend_sdpa` as one operation. host_cu_seqlens: on the host whatever the device, so reading it waits for none.

    Without dropout: the backward attends once more, and would draw other random numbers.
    """
    lengths = tuple(host_cu_seqlens.diff().tolist())
    return _attend_sdpa(q, k, v, document_lengths=lengths, scale=scale, window=window, dropout=0.0).contiguous()


@torch.library.custom_op("sft_dist::attend_documents_backward", mutates_args=())
def _attend_documents_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, host_cu_seqlens: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    keys = torch._C.DispatchKey
    with (
        # Inside of an operation torch leaves autograd out; these two put it back.
        torch._C._SetExcludeDispatchKeyGuard(keys.AutogradFunctionality, False),
        torch._C._SetExcludeDispatchKeyGuard(keys.ADInplaceOrView, False),
        torch.enable_grad(),
    ):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        lengths = tuple(host_cu_seqlens.diff().tolist())
        out = _attend_sdpa(*leaves, document_lengths=lengths, scale=scale, window=window, dropout=0.0)
        grad_q, grad_k, grad_v = (g.contiguous() for g in torch.autograd.grad(out, leaves, grad))
    return grad_q, grad_k, grad_v


@_attend_documents.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@_attend_documents_backward.register_fake
def _(_grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(*tensors)


def _backward_of_documents(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.sft_dist.attend_documents_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.window)
    return *grads, None, None, None


_attend_documents.register_autograd(_backward_of_documents, setup_context=_keep_for_backward)


def _needs_half_precision_gpu(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"it runs on CUDA devices, this is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bf16 or fp16, this run computes in {dtype}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"it needs compute capability 8.0 (Ampere) or newer, {torch.cuda.get_device_name(device)} is older"
    return None


def _why_not_flash(device: torch.device, dtype: torch.dtype, _dropout: float) -> str | None:
    return _needs_half_precision_gpu(device, dtype) or _why_not_package("flash_attn", "flash-attn")


def _why_not_flash_3(device: torch.device, dtype: torch.dtype, dropout: float) -> str | None:
    return (
        _why_not_dropout(dropout)
        or _needs_half_precision_gpu(device, dtype)
        or _why_not_generation(device, (9,))
        or _why_not_package("flash_attn_interface", "flash-attn-3")
    )


def _why_not_flash_4(device: torch.device, dtype: torch.dtype, dropout: float) -> str | None:
    return (
        _why_not_dropout(dropout)
        or _needs_half_precision_gpu(device, dtype)
        or _why_not_generation(device, (9, 10))
        or _why_not_package("flash_attn.cute", "flash-attn-4")
    )


def _why_not_dropout(dropout: float) -> str | None:
    return f"it has no dropout, and the model's config asks for attention_dropout={dropout}" if dropout else None


def _why_not_generation(device: torch.device, majors: tuple[int, ...]) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    if major in majors:
        return None
    wanted = " or ".join(f"{major}.x" for major in majors)
    return f"it needs compute capability {wanted}, {torch.cuda.get_device_name(device)} has {major}.{minor}"


def _why_not_package(module: str, package: str) -> str | None:
    try:
        found = importlib.import_module(module)
    except ImportError as error:  # not installed, or built for another torch
        return f"the package {package} cannot be imported: {error}"
    # Versions 2 and 4 share the name flash_attn; one may be installed without the other.
    return None if hasattr(found, "flash_attn_varlen_func") else f"{module} has no flash_attn_varlen_func"


def _why_not_varlen(device: torch.device, dtype: torch.dtype, dropout: float) -> str | None:
    return _why_not_dropout(dropout) or _needs_half_precision_gpu(device, dtype)


def _runs_everywhere(_device: torch.device, _dtype: torch.dtype, _dropout: float) -> None:
    return None


# In the order in which `auto` prefers them. Versions 3 and 4 only by name: they cannot be traced, and layers that are
# not compiled lose more on chat-length documents than these kernels gain.
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("flash_attention", _attend_flash, _why_not_flash),
        Backend("flash_attention_3", _attend_flash_3, _why_not_flash_3, can_be_traced=False, in_auto=False),
        Backend("flash_attention_4", _attend_flash_4, _why_not_flash_4, can_be_traced=False, in_auto=False),
        Backend("torch_varlen", _attend_varlen, _why_not_varlen),
        Backend("sdpa", _attend_sdpa_traced, _runs_everywhere),
    )
}


def choose_backend(name: str, *, device: torch.device, dtype: torch.dtype, dropout: float = 0.0) -> Backend:
    """The backend called `name`, or for `auto` the first that can run here; the choice is logged.

    dropout: of attention weights, as the model's config gives it.
    Raises BackendError when a named one cannot run, or cannot keep documents apart.
    """
    if name == "auto":
        backend = next(b for b in BACKENDS.values() if b.in_auto and b.why_not(device, dtype, dropout) is None)
        logger.info("attention: auto chose %s for %s on %s", backend.name, dtype, device.type)
        return backend
    if name not in BACKENDS:
        raise BackendError(
            f"model.attention={name!r} does not keep the documents of a pack apart; "
            f"use one of auto, {', '.join(BACKENDS)}"
        )
    reason = BACKENDS[name].why_not(device, dtype, dropout)
    if reason is not None:
        raise BackendError(f"model.attention={name!r} cannot run here: {reason}; use model.attention: auto")
    return BACKENDS[name]


def register(backend: Backend) -> str:
    """Make the backend known to transformers and return the `attn_implementation` that selects it.

    No mask function is registered under the same name, so the model builds no mask at all.
    """

    def attention_forward(
        module: nn.Module,
        query: Tensor,  # [1,Hq,T,D]
        key: Tensor,  # [1,Hk,T,D]
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        document_bounds: dict[str, Any] | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        if document_bounds is None or attention_mask is not None or query.shape[0] != 1:
            raise BackendError(
                f"attention {implementation!r} was called without document bounds; call the model on a MicroBatch"
            )
        out = backend.attend(
            *(x[0].transpose(0, 1) for x in (query, key, value)),
            scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
            window=sliding_window,
            dropout=dropout,
            **document_bounds,
        )
        return out[None], None

    # A number, not the backend's name: transformers looks for "sdpa" and "flash" in names and applies its own rules.
    implementation = f"sft_dist_per_document_{list(BACKENDS).index(backend.name)}"
    AttentionInterface.register(implementation, attention_forward)
    return implementation


def document_bounds(micro: MicroBatch, *, compiled: bool = False) -> dict[str, Any]:
    """What every backend needs to know of a pack; travels through the model as one keyword argument.

    compiled: bounds that a graph can take as inputs; the tuple of lengths would make another graph for every pack.
    """
    host_cu_seqlens = torch.tensor([0, *itertools.accumulate(micro.document_lengths)]) if compiled else None
    lengths = {"host_cu_seqlens": host_cu_seqlens} if compiled else {"document_lengths": micro.document_lengths}
    return {
        "document_bounds": {
            "cu_seqlens": micro.cu_seqlens,
            # The kernels take any bound that is not below the longest document. Never 1, which a graph treats apart.
            "max_seqlen": max(2, 1 << (micro.max_seqlen - 1).bit_length()),
            **lengths,
        }
    }
