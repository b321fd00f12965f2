"""`sft-dist <verb>`: each verb imports only what it needs, so that `--help` is instant."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from sft_dist import __version__
from sft_dist.errors import SftDistError
from sft_dist.redact import RedactingFilter
from sft_dist.verbs import data, machine, models, runs, training
from sft_dist.verbs.words import say
from sft_dist.world import end_process, report_exit, waited_in_vain_for_rank_0


def run() -> NoReturn:
    """What `sft-dist` and `python -m sft_dist` are: `main`, and the end of the process."""
    code = main()
    report_exit(code)
    end_process(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; errors meant for the user become one line each on stderr and an exit code."""
    arguments = parse(argv)
    console = logging.StreamHandler(sys.stderr)
    console.addFilter(RedactingFilter())
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", handlers=[console])
    verb: Callable[[argparse.Namespace], int] = arguments.verb
    try:
        return verb(arguments)
    except SftDistError as error:
        say(error)
        report_exit(error.exit_code)
        if not error.is_said and waited_in_vain_for_rank_0():
            error.is_local = True
            say(error)
        return error.exit_code
    except BrokenPipeError:
        return 0
    except OSError as error:  # a directory that cannot be written, a full disk
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line; overrides may stand before, between and behind flags, which argparse alone refuses."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and not (hasattr(arguments, "overrides") and all("=" in word and word[0] != "-" for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def build_parser() -> argparse.ArgumentParser:
    """All verbs and their flags."""
    parser = argparse.ArgumentParser(
        prog="sft-dist",
        description="Supervised fine-tuning of chat models with one loss curve on any number of devices.",
    )
    parser.add_argument("--version", action="version", version=f"sft-dist {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    for family in (training, runs, data, models, machine):
        family.add_verbs(verbs)
    return parser
