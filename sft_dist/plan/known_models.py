"""A model's config.json: of a directory, from a table of well-known models, from the hub's cache or from the hub.

Without torch: nothing of the model is built, and of its files only the config is read.
"""

import json
from pathlib import Path
from typing import Any

from sft_dist.errors import ConfigError


def _qwen2(
    hidden: int, intermediate: int, layers: int, heads: int, keys: int, tied: bool, vocab: int
) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 32_768,
    }


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int, tied: bool) -> dict[str, Any]:
    config = _qwen2(hidden, intermediate, layers, heads, 8, tied, 151_936)
    return config | {"model_type": "qwen3", "head_dim": 128, "max_position_embeddings": 40_960}


def _llama3(
    hidden: int, intermediate: int, layers: int, heads: int, tied: bool, positions: int = 131_072
) -> dict[str, Any]:
    config = _qwen2(hidden, intermediate, layers, heads, 8, tied, 128_256)
    return config | {"model_type": "llama", "max_position_embeddings": positions}


CONFIGS = {
    "Qwen2.5-0.5B": _qwen2(896, 4864, 24, 14, 2, True, 151_936),
    "Qwen2.5-1.5B": _qwen2(1536, 8960, 28, 12, 2, True, 151_936),
    "Qwen2.5-3B": _qwen2(2048, 11_008, 36, 16, 2, True, 151_936),
    "Qwen2.5-7B": _qwen2(3584, 18_944, 28, 28, 4, False, 152_064),
    "Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, True),
    "Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, True),
    "Qwen3-4B": _qwen3(2560, 9728, 36, 32, True),
    "Qwen3-8B": _qwen3(4096, 12_288, 36, 32, False),
    "Llama-3-8B": _llama3(4096, 14_336, 32, 32, False, 8192),
    "Llama-3.2-1B": _llama3(2048, 8192, 16, 32, True),
    "Llama-3.2-3B": _llama3(3072, 8192, 28, 24, True),
    "Llama-3.1-8B": _llama3(4096, 14_336, 32, 32, False),
}
"""What decides the size of models that are often trained, as their config.json say it; tests hold the counts."""

_OWNERS = ("Qwen", "meta-llama")
_SUFFIXES = ("", "-Instruct", "-Base", "-Instruct-2507", "-Thinking-2507")
"""Variants of a size have one shape. Qwen2.5 and Llama call the base model by the bare name, Qwen3 the chat model.
Llama's repositories up to 3.1 may be called Meta-Llama."""


def known_config(path: str) -> dict[str, Any] | None:
    """The config of a hub id in the table; None for another."""
    owner, _, name = path.replace("meta-llama/Meta-", "meta-llama/").rpartition("/")
    if owner not in _OWNERS:
        return None
    return next(
        (
            config
            for known, config in CONFIGS.items()
            if name.removeprefix(known) in _SUFFIXES and name.startswith(known)
        ),
        None,
    )


def find_config(path: str, *, revision: str | None = None, may_fetch: bool = True) -> dict[str, Any] | None:
    """The fields of a model's config.json; None where it is not here and cannot be fetched.

    path: a directory or a hub id. Raises ConfigError for a directory or a file that holds no config.
    """
    if Path(path).is_dir():
        return _read(Path(path) / "config.json")
    if (known := known_config(path)) is not None:
        return known
    file = cached_file(path, "config.json", revision=revision) or (_fetch(path, revision) if may_fetch else None)
    return _read(file) if file is not None else None


def cached_file(model: str, name: str, *, revision: str | None) -> Path | None:
    """A file of a hub model that was downloaded before."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, name, revision=revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _fetch(model: str, revision: str | None) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(model, "config.json", revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return None


def _read(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read as a model's config: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{file}: a model's config is an object, this is {type(config).__name__}")
    return config
