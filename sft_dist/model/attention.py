"""Attention that keeps packed documents apart, behind transformers' attention interface.

A pack is one row of T tokens holding S documents; `cu_seqlens` says where they begin. Every backend here
takes those bounds explicitly. Nothing is inferred from position_ids, no mask is built, and no cache: a
backend without document bounds would let documents read each other without a warning.

    T = packed tokens, S = documents, Hq/Hk = query/key heads, D = head dimension
"""

import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

from sft_dist.data.batch import MicroBatch
from sft_dist.errors import BackendError

logger = logging.getLogger(__name__)

DocumentAttention = Callable[..., Tensor]
"""Causal, per document: (q [T,Hq,D], k [T,Hk,D], v [T,Hk,D], *, bounds, scale, window, dropout) -> [T,Hq,D]."""


@dataclass(frozen=True)
class Backend:
    """A way to attend per document. `why_not(device, dtype, dropout)` is None where it can run, else the reason."""

    name: str
    attend: DocumentAttention
    why_not: Callable[[torch.device, torch.dtype, float], str | None]


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


def _attend_varlen(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int | None, **_: Any
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    left = -1 if window is None else window - 1
    grouped: dict[str, Any] = {"enable_gqa": True} if _varlen_takes_gqa() and q.shape[1] != k.shape[1] else {}
    bounds = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    out = varlen_attn(q, k, v, *bounds, scale=scale, window_size=(left, 0), **grouped)
    assert isinstance(out, Tensor)
    return out


@cache
def _varlen_takes_gqa() -> bool:
    """torch 2.11 takes unequal head counts as they come; from 2.12 on they must be announced."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


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


def _needs_half_precision_gpu(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"it runs on CUDA devices, this is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bf16 or fp16, this run computes in {dtype}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"it needs compute capability 8.0 (Ampere) or newer, {torch.cuda.get_device_name(device)} is older"
    return None


def _why_not_flash(device: torch.device, dtype: torch.dtype, _dropout: float) -> str | None:
    if reason := _needs_half_precision_gpu(device, dtype):
        return reason
    try:
        importlib.import_module("flash_attn")
    except ImportError as error:  # not installed, or built for another torch
        return f"the package flash-attn cannot be imported: {error}"
    return None


def _why_not_varlen(device: torch.device, dtype: torch.dtype, dropout: float) -> str | None:
    if dropout:
        return f"it has no dropout, and the model's config asks for attention_dropout={dropout}"
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return "this torch has no torch.nn.attention.varlen"
    return _needs_half_precision_gpu(device, dtype)


def _runs_everywhere(_device: torch.device, _dtype: torch.dtype, _dropout: float) -> None:
    return None


# In the order in which `auto` prefers them.
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("flash_attention", _attend_flash, _why_not_flash),
        Backend("torch_varlen", _attend_varlen, _why_not_varlen),
        Backend("sdpa", _attend_sdpa, _runs_everywhere),
    )
}


def choose_backend(name: str, *, device: torch.device, dtype: torch.dtype, dropout: float = 0.0) -> Backend:
    """The backend called `name`, or for `auto` the first that can run here; the choice is logged.

    dropout: of attention weights, as the model's config gives it.
    Raises BackendError when a named one cannot run, or cannot keep documents apart.
    """
    if name == "auto":
        backend = next(b for b in BACKENDS.values() if b.why_not(device, dtype, dropout) is None)
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


def document_bounds(micro: MicroBatch) -> dict[str, Any]:
    """What every backend needs to know of a pack; travels through the model as one keyword argument."""
    return {
        "document_bounds": {
            "cu_seqlens": micro.cu_seqlens,
            "max_seqlen": micro.max_seqlen,
            "document_lengths": micro.document_lengths,
        }
    }
