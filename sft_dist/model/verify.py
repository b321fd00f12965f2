"""Before step 1: does the packed loss equal what the model itself says of each document alone?"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from sft_dist.data.batch import MicroBatch
from sft_dist.errors import BackendError
from sft_dist.model.load import PackedModel

# Largest logit difference over largest logit. fp32 on a CPU measured 1e-7 to 3e-6, a leak between documents
# or a soft cap 1e-4 and more; bf16 and TF32 keep 8 to 10 bits, so there only gross disagreement shows.
FP32_TOLERANCE = 2e-5
LOW_PRECISION_TOLERANCE = 5e-2


@dataclass(frozen=True)
class Agreement:
    """Packed against alone: both losses in nats, and the largest logit difference over the largest logit."""

    packed_loss: float
    own_loss: float
    logit_error: float


@torch.no_grad()
def compare_with_own_logits(model: PackedModel, micro: MicroBatch) -> Agreement:
    """Run the pack through our path, and each of its documents through the model's own, eager and unpacked."""
    packed_loss = float(model(micro))
    packed_logits = model(micro, return_logits=True)
    own_loss = error = largest = 0.0
    for start, length in zip(accumulate(micro.document_lengths, initial=0), micro.document_lengths, strict=False):
        inside = (micro.response_index >= start) & (micro.response_index < start + length)
        own = _own_logits(model, micro.input_ids[:, start : start + length], micro.response_index[inside] - start)
        if not len(own):
            continue
        nll = torch.nn.functional.cross_entropy(own, micro.targets[inside], reduction="none")
        own_loss += float((micro.weights[inside] * nll).sum())
        largest = max(largest, float(own.abs().max()))
        error = max(error, float(own.sub_(packed_logits[inside]).abs().max()))
    return Agreement(packed_loss, own_loss, error / max(largest, 1e-6))


def require_own_loss(model: PackedModel, micro: MicroBatch) -> Agreement:
    """Raise BackendError, with both numbers, when the packed loss is not the model's own."""
    agreement = compare_with_own_logits(model, micro)
    exact = micro.weights.device.type == "cpu" and model.head.weight.dtype == torch.float32
    tolerance = FP32_TOLERANCE if exact else LOW_PRECISION_TOLERANCE
    loss_error = abs(agreement.packed_loss - agreement.own_loss) / max(1.0, abs(agreement.own_loss))
    if not (agreement.logit_error <= tolerance and loss_error <= tolerance):
        raise BackendError(
            f"{type(model.causal_lm).__name__} computes a packed loss of {agreement.packed_loss:.7f} where its own "
            f"logits, document by document, give {agreement.own_loss:.7f} (largest logit difference "
            f"{agreement.logit_error:.1e} of the largest logit, at most {tolerance:.0e} expected): its attention or "
            "logits do something that packing does not reproduce (soft caps, scaled logits, state-space layers, ...); "
            "this model is not supported"
        )
    return agreement


def _own_logits(model: PackedModel, input_ids: Tensor, positions: Tensor) -> Tensor:
    """The model's own logits at some positions `[r]` of a document `[1,L]`: `[r,V]` fp32."""
    causal_lm = model.causal_lm
    packed_implementation = causal_lm.config._attn_implementation
    causal_lm.set_attn_implementation("eager")
    try:
        with torch.compiler.set_stance("force_eager"):  # the model's own, and no graphs for its masks
            logits: Tensor = causal_lm(input_ids=input_ids, use_cache=False, logits_to_keep=positions).logits[0]
            return logits.float()
    finally:
        causal_lm.set_attn_implementation(packed_implementation)
