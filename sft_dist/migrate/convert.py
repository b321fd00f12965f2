"""From a file to a recipe: which trainer it is for, its keys, and the recipe as commented YAML."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sft_dist.config import parse_recipe
from sft_dist.errors import ConfigError
from sft_dist.migrate import axolotl, llamafactory, trl
from sft_dist.migrate.ledger import SECTIONS, Ledger
from sft_dist.redact import redacted

NAMES = {"trl": "TRL", "llamafactory": "LLaMA-Factory", "axolotl": "Axolotl"}
SIGNS = {"axolotl": axolotl.SIGNS, "llamafactory": llamafactory.SIGNS, "trl": trl.SIGNS}


@dataclass(frozen=True)
class Migration:
    """origin: the trainer's name as --from takes it. recipe: plain data; commented: the same as YAML with comments."""

    origin: str
    ledger: Ledger
    recipe: dict[str, Any]
    commented: str


def migrate(path: Path, *, origin: str | None, gpus: int | None, steps: int | None, full: bool) -> Migration:
    """Convert a file. origin: None to tell by its keys.

    Raises ConfigError for a file that is none, or cannot be told apart, or that trains something else than all weights
    on answers, with every reason.
    """
    given = read_mapping(path)
    origin = origin or detect(given, path)
    ledger = Ledger(given, gpus=gpus, steps=steps)
    try:
        if origin == "llamafactory":
            llamafactory.convert(ledger, full=full, directory=path.parent)
        elif origin == "axolotl":
            axolotl.convert(ledger, full=full)
        else:
            trl.convert(ledger, full=full)
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: a value is not what {NAMES[origin]} takes there: {error}") from None
    if ledger.refused:
        reasons = "\n".join(f"{path}: {redacted(said.key)}: {said.text}" for said in ledger.refused)
        raise ConfigError(f"{reasons}\n{path}: not imported; nothing was written")
    recipe = ledger.nested()
    parse_recipe(recipe, origin=f"the recipe made from {path}")
    return Migration(origin, ledger, recipe, to_yaml(ledger, origin=origin, file=path.name))


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict) or not raw:
        raise ConfigError(f"{path}: expected the mapping of keys that TRL, LLaMA-Factory or Axolotl take")
    return {str(key): value for key, value in raw.items()}


def detect(given: dict[str, Any], path: Path) -> str:
    """The trainer most of whose own keys are there. Raises ConfigError where none is, or two are alike."""
    scores = {name: sum(key in given for key in keys) for name, keys in SIGNS.items()}
    best = max(scores.values())
    found = [name for name, score in scores.items() if score == best]
    if best == 0 or len(found) > 1:
        raise ConfigError(f"{path}: whose file it is cannot be told by its keys; say so with --from {'|'.join(NAMES)}")
    return found[0]


def to_yaml(ledger: Ledger, *, origin: str, file: str) -> str:
    """The recipe, each key with where it comes from."""
    whose = f"{_one_line(file)}, a file for {NAMES[origin]}"
    lines = [f"# From {whose}, by sft-dist import. docs/migrating.md says what differs."]
    for said in ledger.asked:
        lines.append(f"# NEEDS YOUR WORD  {_one_line(said.key)}: {_one_line(said.text)}")
    for section in SECTIONS:
        keys = [key for key in ledger.recipe if key == section or key.startswith(f"{section}.")]
        if keys and keys != [section]:
            lines.append(f"{section}:")
        for key in keys:
            lines += _entry(key, ledger.recipe[key], ledger.remarks.get(key, ""))
    return "\n".join(lines) + "\n"


def _entry(key: str, value: Any, remark: str) -> list[str]:
    section, _, name = key.partition(".")
    indent, comment = "  " if name else "", f"  # {_one_line(remark)}" if remark else ""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        listed = [f"{indent}  - {_flow(source)}" for source in value]
        return [f"{indent}{name or section}:{comment}", *listed]
    return [f"{indent}{name or section}: {_flow(value)}{comment}"]


def _one_line(text: str) -> str:
    """For a comment, whatever of their values is in it; without secrets."""
    return redacted(" ".join(text.split()))


def _flow(value: Any) -> str:
    """YAML on one line; a float keeps its dot, without which 1e-05 would be a text."""
    if isinstance(value, float):
        text = f"{value:.10g}"
        mantissa, e, exponent = text.partition("e")
        return f"{mantissa if '.' in mantissa else mantissa + '.0'}{e}{exponent}"
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True, sort_keys=False).strip()
    return text.removesuffix("...").strip()
