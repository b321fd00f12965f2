"""Parameters and FLOPs from a config, against counts by hand and published ones."""

from typing import Any

import pytest

from sft_dist.shape import ModelShape

TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 3,
    "intermediate_size": 16,
    "vocab_size": 32,
}
QWEN2_5_1_5B = {
    "num_hidden_layers": 28,
    "hidden_size": 1536,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
}
QWEN3_4B = {
    "num_hidden_layers": 36,
    "hidden_size": 2560,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 9728,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
}
QWEN3_8B = QWEN3_4B | {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}


def shape_of(config: dict[str, Any]) -> ModelShape:
    shape = ModelShape.from_config(config)
    assert shape is not None
    return shape


def test_matrices_are_counted_as_by_hand() -> None:
    shape = shape_of(TINY)
    query = output = 8 * 4 * 3
    key = value = 8 * 2 * 3
    mlp = 3 * 8 * 16
    assert shape.body_params == 2 * (query + key + value + output + mlp)
    assert shape.head_params == 32 * 8
    assert shape.num_params == shape.body_params + 2 * 32 * 8
    assert shape_of(TINY | {"tie_word_embeddings": True}).num_params == shape.body_params + 32 * 8


def test_flops_are_two_a_weight_forward_and_four_backward() -> None:
    """Two documents of 5 and 3 tokens, 4 of them trained: causal attention scores half of each square."""
    shape = shape_of(TINY)
    matrices = 3 * 2 * (8 * shape.body_params + 4 * shape.head_params)
    scores_and_values = 3 * 2 * 2 * sum(2 * 12 * length**2 / 2 for length in (5, 3))
    assert shape.step_flops(tokens=8, responses=4, sum_squares=34) == matrices + scores_and_values


# Parameters of the published weight files: matrices, norms and biases.
@pytest.mark.parametrize(
    ("config", "published"),
    [(QWEN2_5_1_5B, 1_543_714_304), (QWEN3_4B, 4_022_468_096), (QWEN3_8B, 8_190_735_360)],
    ids=["Qwen2.5-1.5B", "Qwen3-4B", "Qwen3-8B"],
)
def test_published_models_are_counted_within_a_thousandth(config: dict[str, Any], published: int) -> None:
    assert shape_of(config).num_params == pytest.approx(published, rel=1e-3)


def test_heads_of_their_own_size_and_of_keys_have_defaults() -> None:
    shape = shape_of(QWEN2_5_1_5B)
    assert (shape.head_dim, shape.attention_width) == (128, 1536)
    plain = {key: value for key, value in TINY.items() if key != "num_key_value_heads"}
    assert shape_of(plain).num_key_value_heads == 4


@pytest.mark.parametrize(
    "config",
    [TINY | {"num_experts": 8}, TINY | {"num_local_experts": 8}, {"n_embd": 8, "n_layer": 2, "n_head": 2}],
    ids=["experts", "local experts", "GPT-2"],
)
def test_what_is_not_a_plain_dense_decoder_has_no_shape(config: dict[str, Any]) -> None:
    assert ModelShape.from_config(config) is None
