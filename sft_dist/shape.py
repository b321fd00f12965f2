"""What a decoder's config says of its size: parameters, and the FLOPs of a step. Without torch.

L = layers, H = hidden size, Hq/Hk = query/key heads, D = head dimension, I = intermediate size, V = vocabulary
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelShape:
    """A plain dense decoder: gated MLP, grouped-query attention, RMS norms (Qwen2, Qwen3, Llama and their like)."""

    num_layers: int
    hidden: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    is_tied: bool
    """The output embedding is the input embedding."""
    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    """Queries and keys are normed, head by head."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ModelShape | None":
        """From the fields of a config.json; None for what is not such a decoder, a mixture of experts for one."""
        if "num_experts" in config or "num_local_experts" in config:
            return None
        try:
            hidden, heads = config["hidden_size"], config["num_attention_heads"]
            return cls(
                num_layers=config["num_hidden_layers"],
                hidden=hidden,
                num_heads=heads,
                num_key_value_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or hidden // heads,
                intermediate=config["intermediate_size"],
                vocabulary=config["vocab_size"],
                is_tied=bool(config.get("tie_word_embeddings", False)),
                has_qkv_bias=config.get("model_type") == "qwen2" or bool(config.get("attention_bias", False)),
                has_qk_norm=config.get("model_type") == "qwen3",
            )
        except (KeyError, TypeError, ZeroDivisionError):
            return None

    @property
    def attention_width(self) -> int:
        """Hq * D."""
        return self.num_heads * self.head_dim

    @property
    def key_value_width(self) -> int:
        """Hk * D."""
        return self.num_key_value_heads * self.head_dim

    @property
    def layer_matrices(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of a layer's matrices: q, k, v, o, gate, up, down."""
        return (
            (self.hidden, self.attention_width),
            (self.hidden, self.key_value_width),
            (self.hidden, self.key_value_width),
            (self.attention_width, self.hidden),
            (self.hidden, self.intermediate),
            (self.hidden, self.intermediate),
            (self.intermediate, self.hidden),
        )

    @property
    def body_params(self) -> int:
        """Elements of all layers' matrices. Norms and biases are a thousandth of them."""
        return self.num_layers * sum(inputs * outputs for inputs, outputs in self.layer_matrices)

    @property
    def head_params(self) -> int:
        """Elements of the output embedding."""
        return self.vocabulary * self.hidden

    @property
    def num_params(self) -> int:
        """Elements of all matrices; the embedding counts once where it is tied."""
        return self.body_params + self.head_params * (1 if self.is_tied else 2)

    @property
    def vector_params(self) -> int:
        """Elements of norms and biases, the last norm included."""
        norms = 2 * self.hidden + 2 * self.head_dim * self.has_qk_norm
        biases = (self.attention_width + 2 * self.key_value_width) * self.has_qkv_bias
        return self.num_layers * (norms + biases) + self.hidden

    @property
    def all_params(self) -> int:
        """Elements of everything that is trained."""
        return self.num_params + self.vector_params

    def step_flops(self, *, tokens: int, responses: int, sum_squares: int) -> float:
        """FLOPs of forward and backward: 6*N_body*T + 6*N_head*R + 6*L*Hq*D*sum(len**2).

        tokens: T. responses: R, rows of the head. sum_squares: of document lengths; causal attention needs half of
        each full square. The embedding lookup costs nothing. What is recomputed does not count.
        """
        matrices = self.body_params * tokens + self.head_params * responses
        return 6.0 * (matrices + self.num_layers * self.attention_width * sum_squares)
