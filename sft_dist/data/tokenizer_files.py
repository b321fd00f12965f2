"""The files of a tokenizer: read from a directory or the hub, given ChatML where there is no template, written back."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from tokenizers import AddedToken, Tokenizer

from sft_dist.errors import ConfigError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_files(path: str | Path, revision: str | None) -> dict[str, bytes]:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        folder = _download(str(path), revision)
    files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    if "tokenizer.json" not in files:
        raise ConfigError(
            f"{path}: no tokenizer.json, which model.path must hold; make one with "
            f"`AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained(...)` and give that directory"
        )
    return files


def _download(path: str, revision: str | None) -> Path:
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ConfigError(f"model.path={path!r}: no such directory (looked in {Path.cwd()})")
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=list(TOKENIZER_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        cause = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"model.path={path!r}: neither a directory nor a hub model that can be fetched: {cause}"
        ) from None


def read_template(path: Path) -> str:
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.chat_template={str(path)!r} cannot be read: {error}; give a Jinja file") from None


def parse_tokenizer(files: Mapping[str, bytes], name: str) -> Tokenizer:
    try:
        return Tokenizer.from_str(files["tokenizer.json"].decode("utf-8"))
    except Exception as error:
        raise ConfigError(f"{name}/tokenizer.json cannot be read: {error}") from None


def read_json(files: Mapping[str, bytes], file: str, name: str) -> dict[str, Any]:
    try:
        found = json.loads(files.get(file, b"{}"))
    except ValueError as error:
        raise ConfigError(f"{name}/{file} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{name}/{file}: expected an object, got {type(found).__name__}")
    return found


def special_tokens(config: Mapping[str, Any], special_map: Mapping[str, Any]) -> dict[str, str]:
    """Named special tokens as text. They are given as a string or as an object with `content`."""
    found = {}
    for name in SPECIAL_NAMES:
        value = config.get(name) or special_map.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            found[name] = value
    return found


def own_template(files: Mapping[str, bytes], config: Mapping[str, Any], name: str) -> str | None:
    """The template that comes with the tokenizer, in the order in which transformers looks for it."""
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode("utf-8")
    for found in (read_json(files, "chat_template.json", name).get("chat_template"), config.get("chat_template")):
        if isinstance(found, list):
            found = next((entry["template"] for entry in found if entry.get("name") == "default"), None)
        if isinstance(found, str):
            return found
    return None


def install_chatml(tokenizer: Tokenizer, specials: Mapping[str, str]) -> dict[str, str]:
    """Add ChatML's control tokens where absent. Returns the special tokens that change: eos and perhaps pad.

    pad differs from eos if any other special token exists: a pad that is eos tempts code to mask the stop token.
    """
    before = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (IM_START, IM_END)])
    candidates = [specials.get("pad_token"), specials.get("eos_token"), *before, IM_START]
    usable = [text for text in candidates if text and text != IM_END and tokenizer.token_to_id(text) is not None]
    return {"eos_token": IM_END, "pad_token": usable[0]}


def final_files(
    files: Mapping[str, bytes],
    changed: Tokenizer | None,
    config: Mapping[str, Any],
    special_map: Mapping[str, Any],
    specials: Mapping[str, str],
    template: str,
) -> dict[str, bytes]:
    """The files to save: as read, but for the template in its own file and, if tokens were added, what names them."""
    config = {key: value for key, value in config.items() if key != "chat_template"}
    config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    final = {name: content for name, content in files.items() if name != "chat_template.json"}
    if changed is not None:
        final["tokenizer.json"] = changed.to_str(pretty=True).encode("utf-8")
        config |= {name: specials[name] for name in ("eos_token", "pad_token")}
        ids = {text: changed.token_to_id(text) for text in (IM_START, IM_END)}
        if "added_tokens_decoder" in config:
            config["added_tokens_decoder"] = config["added_tokens_decoder"] | {
                str(ids[text]): _added_entry(text) for text in ids
            }
        if "special_tokens_map.json" in files:
            final["special_tokens_map.json"] = _to_json(
                {**special_map, **{n: specials[n] for n in ("eos_token", "pad_token")}}
            )
        if "added_tokens.json" in files:
            final["added_tokens.json"] = _to_json(json.loads(files["added_tokens.json"]) | ids)
    final["tokenizer_config.json"] = _to_json(config)
    final["chat_template.jinja"] = template.encode("utf-8")
    return final


def _added_entry(text: str) -> dict[str, Any]:
    return {
        "content": text,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }


def _to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def encoder_of(tokenizer: Tokenizer) -> Tokenizer:
    """A copy for encoding whole renders: no truncation, no padding, and offsets that keep white space.

    A byte-level post-processor may trim offsets, which would hide tokens of white space from the mask. All else it
    does is add special tokens, which the template writes itself.
    """
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.post_processor = None
    return copy
