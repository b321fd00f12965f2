"""config, import, doctor, demo: before there is a recipe."""

import argparse
import sys
from pathlib import Path

from sft_dist.verbs.words import Verbs, count_from, recipe_path


def add_verbs(verbs: Verbs) -> None:
    """Their parsers."""
    importing = verbs.add_parser("import", help="a recipe from the YAML file of TRL, LLaMA-Factory or Axolotl")
    importing.add_argument("file", type=Path, help="their file")
    importing.add_argument(
        "--from", dest="origin", choices=("trl", "llamafactory", "axolotl"), help="whose it is (default: by its keys)"
    )
    importing.add_argument("-o", "--output", type=Path, metavar="RECIPE", help="write it there instead of printing it")
    importing.add_argument(
        "--gpus", type=count_from(1), metavar="N", help="GPUs of the run there; its step grows with them"
    )
    importing.add_argument(
        "--steps", type=count_from(1), metavar="N", help="optimizer steps of the run there, if you know"
    )
    importing.add_argument("--full", action="store_true", help="train all parameters although the file trains adapters")
    importing.add_argument("--force", action="store_true", help="write over a recipe that is there")
    importing.set_defaults(verb=_import)

    doctor = verbs.add_parser("doctor", help="what is wrong with this machine, and how it is mended")
    doctor.add_argument("recipe", nargs="?", help="look at what this recipe needs, too")
    doctor.add_argument("overrides", nargs="*", metavar="key=value")
    doctor.add_argument("--quick", action="store_true", help="leave out the all-reduce and the three training steps")
    doctor.add_argument("--offline", action="store_true", help="send no request to the hub and to wandb")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.set_defaults(verb=_doctor)

    config = verbs.add_parser("config", help="print the resolved recipe, or what comes with the package")
    config.add_argument("recipe", nargs="?", help="a YAML file, or the name of a shipped recipe")
    config.add_argument("overrides", nargs="*", metavar="key=value")
    config.add_argument("--schema", action="store_true", help="print the recipe's JSON schema")
    config.add_argument("--run-dir", action="store_true", help="print the directory of the recipe's run only")
    config.add_argument("--list", action="store_true", help="list the recipes that come with the package")
    config.set_defaults(verb=_config)

    demo = verbs.add_parser(
        "demo", help="the whole job on a CPU: data, tiny model, two processes with ZeRO-2, held-out scores, an answer"
    )
    demo.add_argument("--dir", type=Path, default=Path("demo"), help="where everything is written (default: ./demo)")
    demo.add_argument("--steps", type=count_from(1), metavar="N", help="train this many steps instead of the recipe's")
    demo.add_argument(
        "--examples",
        type=count_from(1),
        metavar="N",
        help="write this many training examples, and an eighth to hold out",
    )
    demo.set_defaults(verb=_demo)


def _import(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from sft_dist.console import make_console
    from sft_dist.errors import ConfigError
    from sft_dist.migrate.convert import migrate
    from sft_dist.migrate.report import print_migration

    output: Path | None = arguments.output
    if output is not None and output.exists() and not arguments.force:
        raise ConfigError(f"{output} exists already; choose another name, or --force writes over it")
    found = migrate(
        arguments.file, origin=arguments.origin, gpus=arguments.gpus, steps=arguments.steps, full=arguments.full
    )
    if output is None:
        print(found.commented, end="", flush=True)
        print_migration(found, Console(stderr=True))  # the recipe alone goes where output is sent
    else:
        output.write_text(found.commented, encoding="utf-8")
        print_migration(found, make_console())
        print(f"\nrecipe: {output}; next: sft-dist prepare {output}, then sft-dist inspect {output}")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from sft_dist.console import make_console
    from sft_dist.doctor.examine import examine
    from sft_dist.doctor.finding import Verdict
    from sft_dist.doctor.report import print_findings, to_json

    def say(what: str) -> None:
        print(f"looking at: {what} ...", file=sys.stderr, flush=True)

    findings = examine(
        recipe_path(arguments.recipe) if arguments.recipe else None,
        arguments.overrides,
        quick=arguments.quick,
        offline=arguments.offline,
        say=say,
    )
    if arguments.json:
        print(to_json(findings))
    else:
        print_findings(findings, make_console())
    return 1 if any(finding.verdict is Verdict.PROBLEM for finding in findings) else 0


def _config(arguments: argparse.Namespace) -> int:
    from sft_dist import package_files
    from sft_dist.config import load_recipe, recipe_schema
    from sft_dist.errors import ConfigError

    if arguments.schema:
        print(recipe_schema())
    elif arguments.list:
        print("\n".join(recipe.stem for recipe in package_files.recipes()))
    elif arguments.recipe is None:
        raise ConfigError("name a recipe, or use --schema or --list")
    else:
        recipe = load_recipe(recipe_path(arguments.recipe), arguments.overrides)
        print(recipe.run.path if arguments.run_dir else recipe.to_yaml().removesuffix("\n"))
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from sft_dist.demo_run import run_demo

    return run_demo(arguments.dir, steps=arguments.steps, num_train=arguments.examples)
