"""The files of a tokenizer: read from a directory or the hub, given ChatML where there is no template, written back."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from tokenizers import AddedToken, Tokenizer

from sft_dist.data.strict_json import clip, kind_of, one_line
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
MODEL_CARD = "README.md"
"""Names the license of the model, which the card of an export repeats."""
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_files(path: str | Path, revision: str | None) -> dict[str, bytes]:
    """The files of a tokenizer by name, from a directory or the hub.

    Raises ConfigError if there is no such place, no tokenizer.json in it, or a file that cannot be read.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        folder = download(str(path), revision, (*TOKENIZER_FILES, MODEL_CARD))
    try:
        files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be read: {error.strerror}") from None
    if "tokenizer.json" not in files:
        raise ConfigError(
            f"{path}: no tokenizer.json, which model.path must hold; make one with "
            f"`AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained(...)` and give that directory"
        )
    return files


def fetch_model(path: str, revision: str | None, *, with_code: bool) -> Path:
    """All that training reads of a model, in the hub's cache or where it lies; machines without a network need no more.

    with_code: the model's own Python files too. Raises ConfigError if there is no such model, or no weights in it.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        code = ("*.py",) if with_code else ()
        folder = download(path, revision, (*TOKENIZER_FILES, MODEL_CARD, "*.json", "*.safetensors", *code))
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"{path}: no *.safetensors, which model.path must hold; make them with "
            f"`AutoModelForCausalLM.from_pretrained({path!r}).save_pretrained(...)` and give that directory"
        )
    return folder


def download(path: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The folder of the hub's cache that holds these files of a model. Raises ConfigError if they cannot be had."""
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ConfigError(f"model.path={path!r}: no such directory (looked in {Path.cwd()})")
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"model.path={path!r}: neither a directory nor a hub model that can be fetched: {one_line(str(error))}"
        ) from None


def read_template(path: Path) -> str:
    """The text of a Jinja file. Raises ConfigError if it cannot be read or is not UTF-8."""
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.chat_template={str(path)!r} cannot be read: {error}; give a Jinja file") from None


def parse_tokenizer(files: Mapping[str, bytes], name: str) -> Tokenizer:
    """The tokenizer of tokenizer.json. Raises ConfigError if that is none, or if a file that goes with it is broken."""
    try:
        tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode("utf-8"))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises Exception itself, and its panics are not even that
        raise ConfigError(f"{name}/tokenizer.json cannot be read: {one_line(str(error))}") from None
    ids = Counter(tokenizer.get_vocab(with_added_tokens=False).values())
    if shared := [number for number, count in ids.items() if count > 1]:
        raise ConfigError(f"{name}/tokenizer.json cannot be read: {ids[shared[0]]} tokens have the id {shared[0]}")
    _check_copied(files, name)
    return tokenizer


def read_json(files: Mapping[str, bytes], file: str, name: str) -> dict[str, Any]:
    """The JSON object in a file, empty without the file. Raises ConfigError if it is not valid JSON, or no object."""
    try:
        found = json.loads(files.get(file, b"{}"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name}/{file} is not valid JSON: {one_line(str(error))}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{name}/{file}: expected an object, got {kind_of(found)}")
    return found


def _check_copied(files: Mapping[str, bytes], name: str) -> None:
    """Refuse files that nothing here reads, but that go into every checkpoint and may get tokens added."""
    for file in ("vocab.json", "added_tokens.json"):
        for token, number in read_json(files, file, name).items():
            if not isinstance(number, int) or isinstance(number, bool) or number < 0:
                raise ConfigError(f"{name}/{file}: the id of {clip(repr(token))} is {clip(repr(number))}, no token id")
    entries = read_json(files, "tokenizer_config.json", name).get("added_tokens_decoder", {})
    if not isinstance(entries, dict):
        raise ConfigError(
            f"{name}/tokenizer_config.json: added_tokens_decoder is {kind_of(entries)}; expected an object"
        )


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
    """The template that comes with the tokenizer, in the order in which transformers looks for it; None without one.

    Raises ConfigError naming the file if what stands there is not a text, or a list of named texts.
    """
    if "chat_template.jinja" in files:
        try:
            return files["chat_template.jinja"].decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{name}/chat_template.jinja is not UTF-8 at byte {error.start}; convert it, or give data.chat_template"
            ) from None
    for file, fields in (
        ("chat_template.json", read_json(files, "chat_template.json", name)),
        ("tokenizer_config.json", config),
    ):
        found = fields.get("chat_template")
        if isinstance(found, list):
            found = _default_template(found, f"{name}/{file}")
        if isinstance(found, str):
            return found
        if found is not None:
            raise ConfigError(
                f"{name}/{file}: chat_template is {kind_of(found)}; expected a text, or a list of named templates"
            )
    return None


def _default_template(named: list[Any], where: str) -> str | None:
    """The template called default in `[{"name": ..., "template": ...}, ...]`."""
    for index, entry in enumerate(named):
        if not (isinstance(entry, dict) and isinstance(entry.get("template"), str)):
            raise ConfigError(
                f"{where}: chat_template[{index}] has no text under 'template'; expected "
                '{"name": ..., "template": ...}'
            )
    return next((entry["template"] for entry in named if entry.get("name") == "default"), None)


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
