"""The models that are measured, the card, and what a step of a model holds in memory.

T = packed tokens, R = response tokens, S2 = sum of squared document lengths
L = layers, H = hidden size, Hq/Hk = query/key heads, D = head dimension, I = intermediate size, V = vocabulary
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sft_dist.plan import memory_parts
from sft_dist.plan.memory_parts import GRADIENT_BYTES, MASTER_BYTES, MOMENT_BYTES, Training
from sft_dist.shape import ModelShape

BF16_BYTES = 2

RESERVED_BYTES = 2 * 2**30
"""What CUDA, its libraries and a fragmented cache take of a card."""


@dataclass(frozen=True)
class Case:
    """A model by the fields of its config.json, and a step: `packs` packs of at most `pack_tokens` tokens."""

    name: str
    config: dict[str, Any]
    pack_tokens: int
    packs: int

    @property
    def shape(self) -> ModelShape:
        shape = ModelShape.from_config(self.config)
        assert shape is not None
        return shape


def _config(model_type: str, **fields: Any) -> dict[str, Any]:
    shared = {
        "model_type": model_type,
        "vocab_size": 151_936,
        "head_dim": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "max_position_embeddings": 32_768,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
    }
    return shared | fields


CASES = {
    case.name: case
    for case in (
        Case(
            "Qwen2.5-1.5B",
            _config(
                "qwen2",
                hidden_size=1536,
                intermediate_size=8960,
                num_hidden_layers=28,
                num_attention_heads=12,
                num_key_value_heads=2,
                tie_word_embeddings=True,
            ),
            pack_tokens=16_384,
            packs=4,
        ),
        Case(
            "Qwen3-4B",
            _config(
                "qwen3",
                hidden_size=2560,
                intermediate_size=9728,
                num_hidden_layers=36,
                num_attention_heads=32,
                num_key_value_heads=8,
                tie_word_embeddings=True,
            ),
            pack_tokens=8192,
            packs=4,
        ),
        # One pack a step: then gradients need no fp32 sum, and the state is 16 bytes a parameter.
        Case(
            "Qwen3-8B",
            _config(
                "qwen3",
                hidden_size=4096,
                intermediate_size=12_288,
                num_hidden_layers=36,
                num_attention_heads=32,
                num_key_value_heads=8,
                tie_word_embeddings=False,
            ),
            pack_tokens=16_384,
            packs=1,
        ),
    )
}
TINY = Case(
    "tiny",
    _config(
        "qwen3",
        vocab_size=512,
        head_dim=16,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    pack_tokens=384,
    packs=2,
)


def mfu(flops: float, seconds: float, peak: float) -> float:
    """Model FLOPs utilisation: flops are those of `ModelShape.step_flops`, which leave recomputation out."""
    return flops / seconds / peak


@dataclass(frozen=True)
class Plan:
    """Memory of a side before it runs. state: weights, gradients and optimizer; activations: at the peak of a step."""

    checkpointing: str
    state: float
    activations: float

    @property
    def total(self) -> float:
        return self.state + self.activations


def plans(case: Case, *, state: float, room: float, dtype: str, modes: Sequence[str]) -> list[Plan]:
    """What to try of `modes`, which recompute more and more: from the first that should fit into `room` bytes on.

    The last where none should; its state may still say that there is nothing to try.
    """
    each = [
        Plan(mode, state, activation_bytes(case, tokens=case.pack_tokens, checkpointing=mode, dtype=dtype))
        for mode in modes
    ]
    first = next((index for index, plan in enumerate(each) if plan.total <= room), len(each) - 1)
    return each[first:]


def our_state_bytes(case: Case, *, dtype: str) -> float:
    """What engine/local.py keeps; with one pack a step, gradients stay in the dtype of the weights."""
    training = _training(case, tokens=case.pack_tokens, checkpointing="none", dtype=dtype)
    return sum(memory_parts.state_bytes(case.shape.num_params, training).values())


def peer_state_bytes(case: Case, *, dtype: str) -> float:
    """fp32 weights, gradients and moments; autocast keeps a bf16 copy of the weights until the backward ends."""
    cast = BF16_BYTES if dtype == "bf16" else 0
    return case.shape.num_params * (MASTER_BYTES + GRADIENT_BYTES + MOMENT_BYTES + cast)


def activation_bytes(case: Case, *, tokens: int, checkpointing: str, dtype: str) -> float:
    """Activations and the head's own at the fullest moment, of uncompiled layers; every token may be trained."""
    training = _training(case, tokens=tokens, checkpointing=checkpointing, dtype=dtype)
    kept, head = memory_parts.activation_bytes(case.shape, training), memory_parts.head_bytes(case.shape, training)
    return kept + max(head, memory_parts.layer_backward_bytes(case.shape, training))


def _training(case: Case, *, tokens: int, checkpointing: str, dtype: str) -> Training:
    return Training("single", 1, dtype, "cuda", checkpointing, tokens=tokens, responses=tokens, num_micros=case.packs)
