"""A model that is trained, as one that can answer: the same weights behind attention that honours a padding mask.

The trained model attends per document of a pack, skips rows of its last layer, may be compiled and checkpointed, and
under ZeRO-3 is in pieces. None of it is touched: a second module without weights of its own is made, and given them.

    single, ddp, zero1, zero2    shares the storage: no memory, and what is trained on is what answers
    zero3                        a whole copy per rank in compute dtype, gathered one weight at a time, while it is used

A copy, not ZeRO-3's own forward in lock-step: that would gather all weights again for every token, on every rank until
the slowest answer is done; and without collectives inside, ranks may have unequal numbers of prompts.
"""

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sft_dist.errors import BackendError
from sft_dist.model.load import PackedModel, whole


def as_answering(model: PackedModel, *, device: torch.device) -> PreTrainedModel:
    """The model for generation, in eval mode, without gradients. Collective where weights are in pieces.

    It has the weights of now: of later ones only where it shares their storage, so it is not to be kept.
    Raises BackendError for a model that has state beside its weights and buffers.
    """
    trained = model.causal_lm
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        twin: PreTrainedModel = type(trained)._from_config(
            copy.deepcopy(trained.config), attn_implementation="sdpa", dtype=trained.dtype
        )
    twin.load_state_dict(_weights(trained, device), strict=False, assign=True)
    for name, buffer in trained.named_buffers():
        parent, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(parent), leaf, buffer)
    if left := [name for name, tensor in [*twin.named_parameters(), *twin.named_buffers()] if tensor.is_meta]:
        raise BackendError(
            f"{type(trained).__name__} cannot be made to answer while it is trained: no value of {left[0]}"
        )
    return twin.requires_grad_(False).eval()


def _weights(trained: PreTrainedModel, device: torch.device) -> dict[str, Tensor]:
    """Every weight by every name it has: views where they are whole, copies where they are in pieces."""
    found: dict[int, Tensor] = {}
    for parameter in trained.parameters():
        with whole(parameter):
            is_in_pieces = hasattr(parameter, "ds_id")
            found[id(parameter)] = parameter.detach().to(device, copy=True) if is_in_pieces else parameter.detach()
    return {name: found[id(parameter)] for name, parameter in trained.named_parameters(remove_duplicate=False)}
