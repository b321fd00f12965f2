"""What the verbs share: recipes and overrides on the command line, numbers, and who may speak."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from sft_dist.errors import SftDistError
from sft_dist.redact import redacted

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def say(error: SftDistError) -> None:
    """One line or several on stderr, once, by the one process whose word it is."""
    if not error.is_said and (error.is_local or is_main()):
        error.is_said = True
        lines = redacted(str(error)).splitlines()
        print("\n".join(f"error: {line}" for line in lines), file=sys.stderr, flush=True)


def is_main() -> bool:
    """True on rank 0, and where the launcher's environment makes no sense: somebody has to say so."""
    from sft_dist.world import read_world

    try:
        return read_world().is_main
    except SftDistError:
        return True


def add_recipe_verb(
    verbs: Verbs,
    name: str,
    verb: Callable[[argparse.Namespace], int],
    text: str,
) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=text)
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe such as qwen2.5-1.5b-1x80gb")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. optim.lr=1e-5 batch.pack_tokens=8192")
    parser.set_defaults(verb=verb)
    return parser


def recipe_path(name: str) -> Path:
    """A file as it is; otherwise the shipped recipe of that name."""
    from sft_dist import package_files

    path = Path(name)
    shipped = {recipe.stem: recipe for recipe in package_files.recipes()}
    return path if path.is_file() or name not in shipped else shipped[name]


def overrides_of(arguments: argparse.Namespace) -> list[str]:
    """Those of the command line, and what a flag is a shorthand for."""
    return [*arguments.overrides, *([f"train.engine={arguments.engine}"] if arguments.engine else [])]


def count_from(least: int) -> Callable[[str], int]:
    """Parses a whole number, `least` or more."""

    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of {least} or more")
        return int(text)

    return count


def positive(text: str) -> float:
    """Parses a number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def gpus(text: str) -> str:
    """GPUs as sbatch takes them: 8, or h100:8."""
    kind, _, count = text.rpartition(":")
    if not count.isdecimal() or (":" in text and not kind):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor, as in h100:8, a type and a number")
    return text
