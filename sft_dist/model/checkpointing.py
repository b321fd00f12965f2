"""Activations that are recomputed in the backward instead of kept.

    none        everything the backward needs is kept
    selective   of each layer its input and attention's output, whose cost grows with the length of documents
    full        of each layer its input

The same kernels run again on the same inputs: loss and gradients do not change by a bit.
"""

import functools
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

ATTENTION_OPERATIONS = frozenset(
    {
        "torch_attn::_varlen_attn",
        "flash_attn::_flash_attn_varlen_forward",
        "flash_attn_3::_flash_attn_forward",
        "sft_dist::attend_documents",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
    }
)
"""By torch's names. flash-attn 4 registers none: it attends again, as under `full`."""


def checkpoint_layers(causal_lm: PreTrainedModel, mode: str) -> None:
    """Switch recomputation on. mode: none, selective or full."""
    if mode == "none":
        return
    arguments: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        arguments["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    # The name of transformers below 5.23.
    enable = getattr(causal_lm, "activation_checkpointing_enable", None) or causal_lm.gradient_checkpointing_enable
    enable(arguments)
    # It makes the embedding's output need a gradient, which ours does already, and when measuring it should not.
    causal_lm.disable_input_require_grads()


def _policy(_context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    is_attention = operation.name().split(".")[0] in ATTENTION_OPERATIONS
    return CheckpointPolicy.MUST_SAVE if is_attention else CheckpointPolicy.PREFER_RECOMPUTE
