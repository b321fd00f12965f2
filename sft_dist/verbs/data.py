"""prepare, inspect, lint: the data of a recipe."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sft_dist.verbs.words import Verbs, add_recipe_verb, count_from, recipe_path

if TYPE_CHECKING:
    from sft_dist.config import Recipe, Source


def add_verbs(verbs: Verbs) -> None:
    """Their parsers."""
    prepare = add_recipe_verb(verbs, "prepare", _prepare, "tokenise and verify the data of a recipe, without torch")
    prepare.add_argument(
        "--with-model", action="store_true", help="fetch the model's weights too, for machines without a network"
    )

    inspect = add_recipe_verb(
        verbs, "inspect", _inspect, "show what is trained: prompt dimmed, trained tokens coloured"
    )
    inspect.add_argument("--example", type=int, action="append", help="this example, from 0, whole; may be repeated")
    inspect.add_argument(
        "--random", type=count_from(0), metavar="K", help="random examples to show (default: 1; 3 on a page)"
    )
    inspect.add_argument("--held-out", action="store_true", help="the held-out data instead of the training data")
    inspect.add_argument("--set", metavar="NAME", help="this one of several held-out sets (default: the first)")
    inspect.add_argument(
        "--world-size", type=count_from(1), default=1, metavar="N", help="lay packs out for N processes (default: 1)"
    )
    inspect.add_argument(
        "--html", type=Path, metavar="PAGE", help="write one self-contained page instead of printing examples"
    )

    lint = verbs.add_parser("lint", help="check the text of a data set for what spoils training, without a tokenizer")
    lint.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="a recipe, with key=value overrides, or data files and folders"
    )
    lint.add_argument(
        "--held-out", action="append", default=[], metavar="FILE", help="look for leakage into this file; repeatable"
    )
    lint.add_argument("--show", type=count_from(0), metavar="N", help="places shown per rule (default: 5)")
    lint.add_argument("--json", action="store_true", help="print JSON, with up to 1000 places per rule unless --show")
    lint.add_argument("--strict", action="store_true", help="exit code 1 if there is an error or a warning")
    lint.set_defaults(verb=_lint, overrides=[])


def _prepare(arguments: argparse.Namespace) -> int:
    from sft_dist.config import HELD_OUT, load_recipe
    from sft_dist.console import make_console
    from sft_dist.data.inspect import summary
    from sft_dist.data.prepare import open_or_prepare
    from sft_dist.data.tokenizer_files import fetch_model

    recipe = load_recipe(recipe_path(arguments.recipe), arguments.overrides)
    console = make_console()
    for name, sources in {"train": recipe.data.train, **recipe.data.held_out}.items():
        title = {"train": "train", HELD_OUT: "held out"}.get(name, f"held out {name}")
        console.print(title, style="bold", markup=False)
        summary(open_or_prepare(recipe, sources, console=console), console)
    if arguments.with_model:
        section = recipe.model
        print(f"model: {fetch_model(section.path, section.revision, with_code=section.trust_remote_code)}")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from sft_dist.config import load_recipe
    from sft_dist.console import make_console
    from sft_dist.data.inspect import show_layout, show_lengths, show_samples, summary
    from sft_dist.data.inspect_figures import Layout, lay_out
    from sft_dist.data.inspect_page import write_page
    from sft_dist.data.inspect_sample import pick_samples
    from sft_dist.data.prepare import open_or_prepare
    from sft_dist.errors import ConfigError

    recipe = load_recipe(recipe_path(arguments.recipe), arguments.overrides)
    sources = _inspected(recipe, held_out=arguments.held_out, name=arguments.set)
    console = make_console()
    store = open_or_prepare(recipe, sources, console=console)
    for index in arguments.example or ():
        if not 0 <= index < len(store):
            raise ConfigError(f"--example {index}: the store holds examples 0 to {len(store) - 1}")
    asked, num_random = arguments.example or (), arguments.random
    if num_random is None:
        num_random = 3 if arguments.html else 0 if asked else 1
    samples = pick_samples(
        store,
        num_random=num_random,
        seed=recipe.run.seed,
        asked=asked,
        with_extremes=bool(arguments.html or not asked),
    )
    layout: Layout | str = "Packs are laid out for the training data."
    if sources is recipe.data.train:
        try:
            layout = lay_out(recipe, store, world_size=arguments.world_size)
        except ConfigError as error:  # what training will refuse can still be looked at
            layout = f"Packs cannot be laid out: {error}"
    if arguments.html:
        part = "training data" if sources is recipe.data.train else "held-out data"
        write_page(arguments.html, recipe, store, samples, layout=layout, part=part)
    else:
        show_samples(store, samples, console)
        show_lengths(store, console)
    summary(store, console)
    show_layout(layout, console)
    if arguments.html:
        print(f"page: {arguments.html} ({arguments.html.stat().st_size / 1e3:,.0f} kB)")
    return 0


def _inspected(recipe: "Recipe", *, held_out: bool, name: str | None) -> Sequence["Source"]:
    """The sources of the training data or of a held-out set, of which the first is meant where none is named."""
    from sft_dist.errors import ConfigError

    sets = recipe.data.held_out
    if not held_out and name is None:
        return recipe.data.train
    if name is not None and name not in sets:
        raise ConfigError(f"--set {name}: data.held_out has the sets {', '.join(sets) or 'none'}")
    sources = sets[name] if name is not None else next(iter(sets.values()), ())
    if not sources:
        also = "; rows that data.held_out_share holds out are among those shown without --held-out"
        raise ConfigError(
            "data.held_out is empty: there is nothing held out to inspect" + also * bool(recipe.data.held_out_share)
        )
    return sources


def _lint(arguments: argparse.Namespace) -> int:
    from sft_dist.config import DataSection, Source, load_recipe
    from sft_dist.console import make_console
    from sft_dist.data.lint import lint
    from sft_dist.data.lint_report import print_report, to_json
    from sft_dist.errors import ConfigError

    words = [*arguments.inputs, *arguments.overrides]
    path = recipe_path(words[0])
    if path.suffix in (".yaml", ".yml"):
        stray = [word for word in words[1:] if "=" not in word]
        if stray:
            raise ConfigError(f"{stray[0]}: stands beside the recipe {words[0]}; give one recipe, or data files only")
        data = load_recipe(path, words[1:]).data
        if data.held_out_share and arguments.held_out:
            raise ConfigError(
                f"--held-out {arguments.held_out[0]} stands beside data.held_out_share={data.held_out_share:g} of "
                f"{words[0]}; leave one out, as by data.held_out_share=0"
            )
    else:
        data = DataSection(train=tuple(Source(path=word) for word in words))
    report = lint(
        data.train,
        (*data.held_out_sources, *(Source(path=path) for path in arguments.held_out)),
        turns=data.turns,
        difficulty_field=data.difficulty_field,
        held_out_share=data.held_out_share,
        held_out_seed=data.held_out_seed,
        keep=arguments.show if arguments.show is not None else 1000 if arguments.json else 5,
    )
    if arguments.json:
        print(to_json(report))
    else:
        print_report(report, make_console())
    return 1 if arguments.strict and not report.is_clean else 0
