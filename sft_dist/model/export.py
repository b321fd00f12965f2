"""Weights to files in Hugging Face format: what `save_pretrained` writes, whole or not there.

config.json  generation_config.json  model.safetensors, or shards and their index
tokenizer files and chat template as they made the training data  README.md, the card
"""

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from sft_dist.config import ModelSection
from sft_dist.data.chat import ChatTokenizer
from sft_dist.errors import BackendError
from sft_dist.model.load import align_generation, read_config

CARD = "README.md"
SHARD_SIZE = "4GB"


def write_export(
    causal_lm: PreTrainedModel,
    directory: Path,
    *,
    tokenizer: ChatTokenizer,
    card: str,
    state_dict: dict[str, Tensor] | None = None,
    shard_size: str = SHARD_SIZE,
) -> None:
    """Make `directory` an export of the model; what was there is replaced in one go, and a crash leaves it as it was.

    state_dict: the weights, where the model does not hold them all itself. Sets the model's stop and pad tokens to
    those of the tokenizer.
    """
    align_generation(causal_lm, stop_ids=tokenizer.stop_ids, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    directory.parent.mkdir(parents=True, exist_ok=True)
    writing, old = (directory.with_name(f".{directory.name}-{state}") for state in ("new", "old"))
    for leftover in (writing, old):
        shutil.rmtree(leftover, ignore_errors=True)
    causal_lm.save_pretrained(writing, state_dict=state_dict, max_shard_size=shard_size)
    tokenizer.save(writing)
    (writing / CARD).write_text(card, encoding="utf-8")
    if directory.exists():
        directory.rename(old)
    writing.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def empty_model(section: ModelSection, *, num_tokens: int, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a recipe without weights: it takes no memory until `fill` gives it some.

    num_tokens: size of the tokenizer; the embedding has at least so many rows. Raises ConfigError without a config.
    """
    config = read_config(section)
    text_config = config.get_text_config()
    text_config.vocab_size = max(text_config.vocab_size, num_tokens)
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=section.trust_remote_code)
    with contextlib.suppress(OSError):  # a base model may have none
        causal_lm.generation_config = GenerationConfig.from_pretrained(section.path, revision=section.revision)
    return causal_lm


def fill(causal_lm: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Put weights into an empty model. Raises BackendError for one that the model needs and that is not among them."""
    buffers = dict(causal_lm.named_buffers())
    saved = [name for name in causal_lm.state_dict() if name in buffers]
    named = dict(causal_lm.named_parameters())
    if missing := [*(named.keys() - weights.keys()), *saved]:
        raise BackendError(
            f"{sorted(missing)[0]} and {len(missing) - 1} others are no trained weights, so no checkpoint holds them; "
            "only a run that trains all of the model can be exported from its checkpoints"
        )
    for name, weight in weights.items():
        owner, _, last = name.rpartition(".")
        setattr(causal_lm.get_submodule(owner), last, nn.Parameter(weight, requires_grad=False))
    causal_lm.tie_weights()
