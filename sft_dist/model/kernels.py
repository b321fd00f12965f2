"""Liger's Triton kernels for norm, rotary embedding and SwiGLU, in place of torch's several small ones each.

The loss is never Liger's: the response head makes its own. Compiled layers fuse the same operations by themselves.
"""

import importlib

import torch
from transformers import PretrainedConfig

from sft_dist.errors import BackendError

LIGER_MODELS = ("llama", "qwen2", "qwen3")


def apply_kernels(name: str, config: PretrainedConfig, device: torch.device) -> None:
    """Make models that are built from here on in this process use the kernels. name: torch or liger.

    Raises BackendError where Liger cannot be used.
    """
    if name == "torch":
        return
    model_type = config.model_type
    if device.type != "cuda":
        raise BackendError(
            f"model.kernels='liger' runs on CUDA devices, this is {device.type}; use model.kernels: torch"
        )
    if model_type not in LIGER_MODELS:
        raise BackendError(
            f"model.kernels='liger' is for {', '.join(LIGER_MODELS)}, this model is {model_type!r}; "
            "use model.kernels: torch"
        )
    try:
        liger = importlib.import_module("liger_kernel.transformers")
    except ImportError as error:
        raise BackendError(
            f"model.kernels='liger' needs the package liger-kernel, which cannot be imported: {error}; "
            "install it or use model.kernels: torch"
        ) from None
    apply = getattr(liger, f"apply_liger_kernel_to_{model_type}")
    apply(rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False)
