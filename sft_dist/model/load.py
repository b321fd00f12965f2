"""A Hugging Face model as the loss function of a micro-batch."""

import contextlib
import json
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from sft_dist.config import ModelSection
from sft_dist.data.batch import MicroBatch
from sft_dist.errors import BackendError, ConfigError
from sft_dist.model.attention import Backend, document_bounds, register
from sft_dist.model.checkpointing import checkpoint_layers
from sft_dist.model.compile import CompiledLayers, choose_compile
from sft_dist.model.kernels import apply_kernels
from sft_dist.model.last_layer import is_trimmed, trim_last_layer
from sft_dist.model.loss import ResponseHead

logger = logging.getLogger(__name__)


class PackedModel(nn.Module):
    """body, of whose last layer only response positions come out -> head -> weighted loss.

    The causal model's own `lm_head` is never called in training; its weight lives in `head` (and, when
    tied, in the embedding) as the same Parameter.
    """

    compiled: CompiledLayers | None = None
    """The graphs of the decoder layers, if they are compiled."""

    def __init__(self, causal_lm: PreTrainedModel) -> None:
        super().__init__()
        output = causal_lm.get_output_embeddings()
        if output is None or getattr(output, "bias", None) is not None:
            raise BackendError(
                f"{type(causal_lm).__name__} has {'no output embedding' if output is None else 'a biased lm_head'}; "
                "the response head needs logits = hidden @ weight.T"
            )
        self.causal_lm = causal_lm
        self.head = ResponseHead(output.weight)

    @property
    def num_parameters(self) -> int:
        """Of the whole model; under ZeRO-3 a parameter keeps its real size in ds_numel."""
        return sum(getattr(p, "ds_numel", p.numel()) for p in self.causal_lm.parameters())

    def forward(self, micro: MicroBatch, *, return_logits: bool = False) -> Tensor:
        """Weighted loss of the pack, scalar fp32; or its logits `[R,V]` at response positions."""
        is_short = is_trimmed(self.causal_lm)
        with self.compiled.stable_shapes() if self.compiled is not None else contextlib.nullcontext():
            output = self.causal_lm.base_model(
                input_ids=micro.input_ids,
                position_ids=micro.position_ids,
                use_cache=False,  # a cache would make transformers forget that the row is packed
                **document_bounds(micro, compiled=self.compiled is not None),
                **({"response_index": micro.response_index} if is_short else {}),
            )
        hidden = output.last_hidden_state[0]
        if not is_short:
            hidden = hidden.index_select(0, micro.response_index)
        head_inputs = (hidden,) if return_logits else (hidden, micro.targets, micro.weights)
        result: Tensor = self.head(*head_inputs)
        return result


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of `model.dtype`; auto is bf16 on GPU and fp32 on CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


# Rotary frequencies that follow the longest position of the *pack* carry one document's length into another.
LEAKING_ROPE = ("dynamic", "longrope")


def read_config(section: ModelSection) -> PretrainedConfig:
    """The model's config, checked for what packing cannot reproduce.

    Raises ConfigError when there is no such model, BackendError for rotary embeddings that depend on the pack.
    """
    try:
        config = AutoConfig.from_pretrained(
            section.path, revision=section.revision, trust_remote_code=section.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={section.path!r}: no model config: {str(error).splitlines()[0]}") from None
    for key in ("rope_parameters", "rope_scaling"):
        kind = _rope_type(getattr(config, key, None))
        if kind in LEAKING_ROPE:
            raise BackendError(
                f"model.path={section.path!r}: {key} has rope_type {kind!r}, whose frequencies depend on the longest "
                "document of a pack; this model is not supported"
            )
    return config


def config_digest(config: PretrainedConfig) -> str:
    """16 hex digits over what the model computes: its config without names, versions and dtypes."""
    ignored = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation")
    kept = {key: value for key, value in config.to_dict().items() if key not in ignored}
    return xxhash.xxh3_64_hexdigest(json.dumps(kept, sort_keys=True, default=str).encode())


def dropout_rates(config: PretrainedConfig) -> dict[str, float]:
    """The config's dropout rates above zero."""
    rates = {key: value for key, value in config.to_dict().items() if key.endswith(("dropout", "_pdrop"))}
    return {key: value for key, value in rates.items() if value}


def num_positions(config: PretrainedConfig) -> int | None:
    """The longest text that the model can take, in tokens; None if its config does not say."""
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)


def check_context(config: PretrainedConfig, *, longest_example: int) -> None:
    """Raise ConfigError when an example is longer than the positions the model has."""
    positions = num_positions(config)
    if positions is not None and longest_example > positions:
        raise ConfigError(
            f"the longest example has {longest_example} tokens, the model {positions} positions; "
            f"set data.max_tokens={positions} to drop longer ones"
        )


def _rope_type(parameters: object) -> str | None:
    """The rope type of a config entry, which may hold one entry per kind of layer."""
    if not isinstance(parameters, dict):
        return None
    kinds = [parameters.get("rope_type", parameters.get("type")), *map(_rope_type, parameters.values())]
    return next((kind for kind in kinds if kind in LEAKING_ROPE), None)


def load_model(
    section: ModelSection,
    *,
    backend: Backend,
    dtype: torch.dtype,
    device: torch.device,
    num_tokens: int,
    added_token_ids: Sequence[int],
) -> PackedModel:
    """Read weights with `from_pretrained` and make them ready to train.

    num_tokens: size of the tokenizer; the embedding grows to it. added_token_ids: tokens that the model has
    never seen; their rows start at the mean of the others.
    Raises ConfigError when there is no such model, BackendError when its attention cannot be replaced or the recipe
    asks for compiled layers or kernels that cannot be had here.
    """
    config = read_config(section)
    compiles = choose_compile(
        section.compile,
        config,
        device=device,
        backend=backend,
        kernels=section.kernels,
        is_partitioned=is_deepspeed_zero3_enabled(),
    )
    apply_kernels(section.kernels, config, device)
    try:
        causal_lm, info = AutoModelForCausalLM.from_pretrained(
            section.path,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
            dtype=dtype,
            attn_implementation=register(backend),
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if "memory" in str(error).lower():
            raise
        if isinstance(error, ValueError) and "attention" in str(error).lower():
            raise BackendError(
                f"model.path={section.path!r}: its attention cannot be replaced, so documents would leak: {error}"
            ) from None
        raise ConfigError(f"model.path={section.path!r}: cannot be loaded: {str(error).splitlines()[0]}") from None
    if missing := sorted(info["missing_keys"]):
        raise ConfigError(
            f"model.path={section.path!r}: {len(missing)} weights are missing and would start at random, "
            f"{', '.join(missing[:3])}{', ...' * (len(missing) > 3)}; the files do not fit config.json"
        )
    grow_vocabulary(causal_lm, num_tokens=num_tokens, added_token_ids=added_token_ids)
    trim_last_layer(causal_lm)
    checkpoint_layers(causal_lm, section.checkpointing)
    causal_lm.train()
    model = PackedModel(causal_lm.to(device) if not _is_partitioned(causal_lm) else causal_lm)
    if compiles:
        model.compiled = CompiledLayers(causal_lm)
    return model


def grow_vocabulary(causal_lm: PreTrainedModel, *, num_tokens: int, added_token_ids: Sequence[int]) -> None:
    """Make room for every token, and start the new ones at the mean embedding, not at noise."""
    embedding = causal_lm.get_input_embeddings()
    if embedding.num_embeddings < num_tokens:
        logger.info("embeddings: resized from %d to %d tokens", embedding.num_embeddings, num_tokens)
        causal_lm.resize_token_embeddings(num_tokens, mean_resizing=False)
    if not added_token_ids:
        return
    matrices = {id(m.weight): m.weight for m in (causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings())}
    for weight in matrices.values():
        with whole(weight, modify=True), torch.no_grad():
            new = torch.zeros(weight.shape[0], dtype=torch.bool, device=weight.device)
            new[list(added_token_ids)] = True
            weight[new] = weight[~new].float().mean(0).to(weight.dtype)


def align_generation(
    causal_lm: PreTrainedModel, *, stop_ids: Sequence[int], eos_id: int | None, pad_id: int | None
) -> None:
    """Make the exported model stop where it was trained to stop."""
    generation = causal_lm.generation_config or GenerationConfig()
    known = generation.eos_token_id
    known = [] if known is None else [known] if isinstance(known, int) else list(known)
    generation.eos_token_id = list(dict.fromkeys([*stop_ids, *known]))
    generation.pad_token_id = pad_id if pad_id is not None else generation.pad_token_id
    if not generation.do_sample:  # a base model's stray sampling settings would make the export refuse to save
        generation.temperature = generation.top_p = generation.top_k = None
    causal_lm.generation_config = generation
    if eos_id is not None:
        causal_lm.config.eos_token_id = eos_id
    if pad_id is not None:
        causal_lm.config.pad_token_id = pad_id


def _is_partitioned(causal_lm: PreTrainedModel) -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in causal_lm.parameters())


def whole(weight: nn.Parameter, *, modify: bool = False) -> AbstractContextManager[Any]:
    """The full weight for a moment, on every rank, whoever holds it.

    modify: what is written is kept; under ZeRO-3 every rank writes, and rank 0's is kept.
    """
    if not hasattr(weight, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
        [weight], modifier_rank=0 if modify else None
    )
    return gathered
