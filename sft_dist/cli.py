"""`sft-dist <verb>`: each verb imports only what it needs, so that `--help` is instant."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from sft_dist import __version__
from sft_dist.errors import SftDistError
from sft_dist.redact import RedactingFilter, redacted

if TYPE_CHECKING:
    from sft_dist.generate import Sampling

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


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
        _say(error)
        return error.exit_code
    except BrokenPipeError:
        return 0
    except OSError as error:  # a directory that cannot be written, a full disk
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _say(error: SftDistError) -> None:
    """One line or several on stderr, by the one process whose word it is."""
    if error.is_local or _is_main():
        lines = redacted(str(error)).splitlines()
        print("\n".join(f"error: {line}" for line in lines), file=sys.stderr, flush=True)


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

    _add_train(verbs)
    _add_plan(verbs)
    _add_data_verbs(verbs)
    _add_model_verbs(verbs)
    _add_other_verbs(verbs)
    return parser


def _add_train(verbs: "Verbs") -> None:
    """train, launch, submit, checkpoints, status, report, sync"""
    train = _recipe_verb(
        verbs,
        "train",
        _train,
        "prepare, train and export; start it through accelerate launch or torchrun for many processes",
    )
    _add_train_flags(train)

    launch = _recipe_verb(
        verbs, "launch", _launch, "train in one process per GPU of this machine; signals stop it in order"
    )
    _add_train_flags(launch)
    launch.add_argument(
        "--processes",
        type=_count_from(1),
        metavar="N",
        help="processes of this host (default: one per visible GPU, or one)",
    )
    launch.add_argument("--hosts", type=_count_from(1), metavar="N", help="hosts, each with this command (default: 1)")
    launch.add_argument("--host-index", type=_count_from(0), metavar="I", help="this one of them, from 0")
    launch.add_argument("--main-host", metavar="ADDRESS", help="address of host 0 that every host can reach")
    launch.add_argument("--port", type=_count_from(1), help="a free port of host 0")
    launch.add_argument(
        "--config-file", type=Path, metavar="FILE", help="your own accelerate config (default: accelerate's, if any)"
    )
    launch.add_argument("--dry-run", action="store_true", help="print the command instead of running it")

    _add_submit(verbs)

    checkpoints = verbs.add_parser("checkpoints", help="list a run's checkpoints and verify every byte of them")
    checkpoints.add_argument("run", type=Path, help="a run's directory, e.g. runs/clinic")
    checkpoints.set_defaults(verb=_checkpoints)

    status = verbs.add_parser("status", help="how a run stands, from its files alone; the run is not disturbed")
    status.add_argument(
        "run", type=Path, nargs="?", default="runs", help="a run's directory, or one that holds runs (default: runs)"
    )
    status.add_argument("--ranks", action="store_true", help="show each process, also when nothing is wrong")
    status.add_argument("--json", action="store_true", help="print JSON: an object for a run, a list for several")
    status.add_argument("--watch", action="store_true", help="show the run live, as its own terminal does")
    status.set_defaults(verb=_status)

    report = verbs.add_parser("report", help="a run as one self-contained page, or several runs compared on one")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's directory, e.g. runs/clinic")
    text = "default: report.html in the run's directory, with curve.png beside it; here for several runs"
    report.add_argument("-o", "--output", type=Path, metavar="PAGE", help=text)
    report.set_defaults(verb=_report)

    sync = verbs.add_parser("sync", help="send a run's metrics to wandb, now or again")
    sync.add_argument("run", type=Path, help="a run's directory, e.g. runs/clinic")
    sync.add_argument("--project", help="default: the recipe's wandb.project")
    sync.add_argument("--mode", choices=("online", "offline"), default="online")
    sync.set_defaults(verb=_sync)


def _add_submit(verbs: "Verbs") -> None:
    text = "prepare, train and evaluate as SLURM jobs, each after the one before"
    submit = _recipe_verb(verbs, "submit", _submit, text)
    _add_train_flags(submit)
    submit.add_argument("--nodes", type=_count_from(1), default=1, metavar="N", help="nodes to train on (default: 1)")
    text = "GPUs of each node, one process each: a number, or with a type, as h100:8"
    submit.add_argument("--gpus-per-node", type=_gpus, metavar="N", help=text)
    submit.add_argument("--processes", type=_count_from(1), metavar="N", help="processes of each node without GPUs")
    submit.add_argument("--time", metavar="T", help="time limit of one attempt, as 04:00:00")
    submit.add_argument(
        "--signal-before",
        type=_count_from(1),
        default=120,
        metavar="S",
        help="seconds before the time limit at which the run is asked to save (default: 120)",
    )
    text = "how often it is queued again (default: the site's, or 20)"
    submit.add_argument("--max-requeues", type=_count_from(0), metavar="N", help=text)
    submit.add_argument("--site", type=Path, metavar="FILE", help="settings of the site (default: slurm/site.sh)")
    text = "more for sbatch, for the training: --sbatch=--mem=0"
    submit.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help=text)
    submit.add_argument("--no-prepare", action="store_true", help="the data and the model are there")
    submit.add_argument("--no-evaluate", action="store_true", help="no job that evaluates the model")
    submit.add_argument("--dry-run", action="store_true", help="print a script that submits the jobs instead")


def _add_plan(verbs: "Verbs") -> None:
    plan = _recipe_verb(
        verbs, "plan", _plan, "memory by part for each engine, disk, steps and time, before anything is loaded"
    )
    text = "plan for 80GB, 4x80GB, 2x8x80GB (nodes x GPUs x memory), H100, 8xH100 (default: this machine)"
    plan.add_argument("--gpus", metavar="G", help=text)
    plan.add_argument("--processes", type=_count_from(1), metavar="N", help="processes on this machine")
    plan.add_argument("--tokens", type=_count_from(1), metavar="N", help="tokens of an epoch, where no store says it")
    plan.add_argument("--examples", type=_count_from(1), metavar="N", help="examples of an epoch")
    rate = plan.add_mutually_exclusive_group()
    rate.add_argument("--tokens-per-s", type=_positive, metavar="X", help="rate of all GPUs together")
    rate.add_argument("--mfu", type=_positive, metavar="PERCENT", help="or: model FLOPs utilisation of a known card")
    plan.add_argument("--picture", type=Path, metavar="FILE", help="also draw the bars, as .png or .svg (matplotlib)")
    plan.add_argument("--json", action="store_true", help="print JSON instead")


def _positive(text: str) -> float:
    """Parses a number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def _add_train_flags(train: argparse.ArgumentParser) -> None:
    """The flags of train, which launch hands on."""
    train.add_argument("--engine", help="shorthand for train.engine=...")
    choice = train.add_mutually_exclusive_group()
    choice.add_argument(
        "--no-resume", action="store_true", help="refuse to go on from checkpoints that the run directory holds"
    )
    choice.add_argument(
        "--resume-from", metavar="WHERE", help="go on from this step, checkpoint directory or `latest`, or refuse"
    )
    train.add_argument(
        "--allow-change", action="store_true", help="go on from a checkpoint although the curve will be another"
    )
    train.add_argument(
        "--trust-checkpoint", action="store_true", help="go on from a checkpoint that others own or may write"
    )
    train.add_argument("--profile", action="store_true", help="profile steps 3 to 5 into <run>/profile")


def _add_data_verbs(verbs: "Verbs") -> None:
    """prepare, inspect, lint"""
    prepare = _recipe_verb(verbs, "prepare", _prepare, "tokenise and verify the data of a recipe, without torch")
    prepare.add_argument(
        "--with-model", action="store_true", help="fetch the model's weights too, for machines without a network"
    )

    inspect = _recipe_verb(verbs, "inspect", _inspect, "show what is trained: prompt dimmed, trained tokens coloured")
    inspect.add_argument("--example", type=int, action="append", help="this example, from 0, whole; may be repeated")
    inspect.add_argument(
        "--random", type=_count_from(0), metavar="K", help="random examples to show (default: 1; 3 on a page)"
    )
    inspect.add_argument("--held-out", action="store_true", help="the held-out data instead of the training data")
    inspect.add_argument("--set", metavar="NAME", help="this one of several held-out sets (default: the first)")
    inspect.add_argument(
        "--world-size", type=_count_from(1), default=1, metavar="N", help="lay packs out for N processes (default: 1)"
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
    lint.add_argument("--show", type=_count_from(0), metavar="N", help="places shown per rule (default: 5)")
    lint.add_argument("--json", action="store_true", help="print JSON, with up to 1000 places per rule unless --show")
    lint.add_argument("--strict", action="store_true", help="exit code 1 if there is an error or a warning")
    lint.set_defaults(verb=_lint, overrides=[])


def _add_model_verbs(verbs: "Verbs") -> None:
    """chat, generate, export"""
    chat = verbs.add_parser("chat", help="talk to an exported model in the terminal")
    _add_sampling_flags(chat, max_new_tokens=1024)
    chat.add_argument("--system", help="system prompt")
    chat.set_defaults(verb=_chat)

    generate = verbs.add_parser("generate", help="answer one prompt, or every row of a file, with an exported model")
    _add_sampling_flags(generate, max_new_tokens=256)
    asked = generate.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", help="answer this one prompt")
    asked.add_argument("--input", type=Path, metavar="FILE", help="answer every row of this file, in any row format")
    generate.add_argument("--system", help="system prompt, beside --prompt")
    text = "where the answers to --input go: the rows as JSONL, each with its answer"
    generate.add_argument("--output", type=Path, metavar="FILE", help=text)
    text = "what the answer is called in a row (default: answer)"
    generate.add_argument("--answer-field", default="answer", metavar="NAME", help=text)
    text = "rows that are answered together: speed and memory (default: 32)"
    generate.add_argument("--batch-size", type=_count_from(1), default=32, metavar="N", help=text)
    generate.set_defaults(verb=_generate)

    _add_export(verbs)


def _add_export(verbs: "Verbs") -> None:
    export = verbs.add_parser("export", help="a run's weights in Hugging Face format, with a model card; push them")
    export.add_argument("run", type=Path, help="a run's directory, e.g. runs/clinic")
    text = "the weights after this step (default: the newest)"
    export.add_argument("--checkpoint", type=_count_from(1), metavar="STEP", help=text)
    text = "the mean of the weights of the last K checkpoints"
    export.add_argument("--average", type=_count_from(1), metavar="K", help=text)
    export.add_argument("--dtype", choices=("bf16", "fp32"), help="default: what the run computed in")
    text = "where to; must be new (default: a directory in the run, named for what it holds)"
    export.add_argument("--output", type=Path, metavar="DIR", help=text)
    export.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload it there; the token comes from HF_TOKEN")
    export.add_argument("--private", action="store_true", help="where the hub shows it to nobody else, or not at all")
    export.set_defaults(verb=_export)


def _add_sampling_flags(verb: argparse.ArgumentParser, *, max_new_tokens: int) -> None:
    verb.add_argument("model", type=Path, help="an exported model, or a finished run such as runs/<name>")
    text = f"the longest answer (default: {max_new_tokens})"
    verb.add_argument("--max-new-tokens", type=_count_from(1), default=max_new_tokens, metavar="N", help=text)
    verb.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    verb.add_argument("--top-p", type=float, default=1.0, metavar="P", help="of the most likely tokens, this share")
    verb.add_argument("--top-k", type=_count_from(0), default=0, metavar="K", help="so many of them; 0: all")
    verb.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="1, the default, is none")
    verb.add_argument("--seed", type=_count_from(0), default=0, metavar="N", help="what is drawn above temperature 0")


def _add_other_verbs(verbs: "Verbs") -> None:
    """import, doctor, config, evaluate, demo"""
    importing = verbs.add_parser("import", help="a recipe from the YAML file of TRL, LLaMA-Factory or Axolotl")
    importing.add_argument("file", type=Path, help="their file")
    importing.add_argument(
        "--from", dest="origin", choices=("trl", "llamafactory", "axolotl"), help="whose it is (default: by its keys)"
    )
    importing.add_argument("-o", "--output", type=Path, metavar="RECIPE", help="write it there instead of printing it")
    importing.add_argument(
        "--gpus", type=_count_from(1), metavar="N", help="GPUs of the run there; its step grows with them"
    )
    importing.add_argument(
        "--steps", type=_count_from(1), metavar="N", help="optimizer steps of the run there, if you know"
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

    _add_evaluate(verbs)

    demo = verbs.add_parser(
        "demo", help="the whole job on a CPU: data, tiny model, two processes with ZeRO-2, held-out scores, an answer"
    )
    demo.add_argument("--dir", type=Path, default=Path("demo"), help="where everything is written (default: ./demo)")
    demo.add_argument("--steps", type=int, help="train this many steps instead of the recipe's")
    demo.add_argument("--examples", type=int, help="write this many training examples, and an eighth to hold out")
    demo.set_defaults(verb=_demo)


def _add_evaluate(verbs: "Verbs") -> None:
    text = "a finished run's model on held-out data: loss, answers, scores by task, into <run>/evaluation.json"
    evaluate = verbs.add_parser("evaluate", help=text)
    evaluate.add_argument("recipe", nargs="?", help="a YAML file, or the name of a shipped recipe")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. evaluate.max_examples=100")
    choice = evaluate.add_mutually_exclusive_group()
    choice.add_argument(
        "--before", action="store_true", help="evaluate model.path too, once, and say what changed and how surely"
    )
    text = "two runs, or files of scored answers, on the prompts that both answered"
    choice.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help=text)
    evaluate.set_defaults(verb=_evaluate)


def _recipe_verb(
    verbs: "Verbs",
    name: str,
    verb: Callable[[argparse.Namespace], int],
    text: str,
) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=text)
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe such as qwen2.5-1.5b-1x80gb")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. optim.lr=1e-5 batch.pack_tokens=8192")
    parser.set_defaults(verb=verb)
    return parser


def _count_from(least: int) -> Callable[[str], int]:
    """Parses a whole number, `least` or more."""

    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of {least} or more")
        return int(text)

    return count


def _gpus(text: str) -> str:
    """GPUs as sbatch takes them: 8, or h100:8."""
    kind, _, count = text.rpartition(":")
    if not count.isdecimal() or (":" in text and not kind):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor, as in h100:8, a type and a number")
    return text


def _recipe_path(name: str) -> Path:
    """A file as it is; otherwise the shipped recipe of that name."""
    from sft_dist import package_files

    path = Path(name)
    shipped = {recipe.stem: recipe for recipe in package_files.recipes()}
    return path if path.is_file() or name not in shipped else shipped[name]


def _overrides(arguments: argparse.Namespace) -> list[str]:
    """Those of the command line, and what a flag is a shorthand for."""
    return [*arguments.overrides, *([f"train.engine={arguments.engine}"] if arguments.engine else [])]


def _submit(arguments: argparse.Namespace) -> int:
    from sft_dist.config import load_recipe
    from sft_dist.submit import Request, submit

    recipe = load_recipe(_recipe_path(arguments.recipe), _overrides(arguments))
    request = Request(
        nodes=arguments.nodes,
        gpus_per_node=arguments.gpus_per_node,
        processes=arguments.processes,
        time=arguments.time,
        signal_before_s=arguments.signal_before,
        max_requeues=arguments.max_requeues,
        site=arguments.site,
        prepare=not arguments.no_prepare,
        evaluate=not arguments.no_evaluate,
        train_options=tuple(arguments.sbatch),
    )
    words = [arguments.recipe, *_overrides(arguments)]
    arguments.engine = None  # an override, which prepare and evaluate take as well
    return submit(recipe, words, _train_flags(arguments), request=request, dry_run=arguments.dry_run)


def _launch(arguments: argparse.Namespace) -> int:
    from sft_dist.config import load_recipe
    from sft_dist.launch import Asked, launch

    recipe = load_recipe(_recipe_path(arguments.recipe), _overrides(arguments))
    words = [arguments.recipe, *arguments.overrides, *_train_flags(arguments)]
    asked = Asked(
        arguments.processes,
        arguments.hosts,
        arguments.host_index,
        arguments.main_host,
        arguments.port,
        arguments.config_file,
    )
    return launch(recipe, words, asked=asked, dry_run=arguments.dry_run)


def _train_flags(arguments: argparse.Namespace) -> list[str]:
    """The flags of train that were given, to be handed on."""
    names = ("no_resume", "allow_change", "trust_checkpoint", "profile")
    flags = [f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name)]
    for name in ("engine", "resume_from"):
        if (value := getattr(arguments, name)) is not None:
            flags += [f"--{name.replace('_', '-')}", value]
    return flags


def _sync(arguments: argparse.Namespace) -> int:
    from sft_dist.wandb_sync import sync_run

    num_lines = sync_run(arguments.run, project=arguments.project, mode=arguments.mode)
    where = "are with wandb" if arguments.mode == "online" else "are written for wandb; `wandb sync` sends them"
    print(f"{num_lines} records of {arguments.run} {where}")
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from sft_dist.world import read_world, report_exit, stop_when_orphaned

    stop_when_orphaned()
    from sft_dist.config import load_recipe

    recipe = load_recipe(_recipe_path(arguments.recipe), _overrides(arguments))

    from sft_dist.affinity import keep_near_gpu
    from sft_dist.console import make_console, nobody_need_listen
    from sft_dist.engine.collectives import leave_process_group
    from sft_dist.job import ResumeOptions
    from sft_dist.train import run

    resume = ResumeOptions(
        forbid=arguments.no_resume,
        start=arguments.resume_from,
        allow_change=arguments.allow_change,
        trust=arguments.trust_checkpoint,
    )
    with nobody_need_listen(sys.stdout):
        try:
            keep_near_gpu(read_world().local_rank)
            result = run(recipe, console=make_console(), resume=resume, profile=arguments.profile)
        except SftDistError as error:
            _say(error)  # before the group is left, which may take long when a peer has died
            report_exit(error.exit_code)
            return error.exit_code
        finally:
            leave_process_group()
        if _is_main():
            if result.finished:
                withheld = f", {result.num_withheld} updates WITHHELD" * bool(result.num_withheld)
                print(f"done: step {result.step}{withheld}, model in {result.model_dir}")
            else:
                print(f"stopped on request after step {result.step}; the same command goes on from there")
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from sft_dist.config import load_recipe
    from sft_dist.console import make_console
    from sft_dist.plan.picture import draw_plan
    from sft_dist.plan.planner import Asked, make_plan
    from sft_dist.plan.report import print_plan, to_json

    recipe = load_recipe(_recipe_path(arguments.recipe), arguments.overrides)
    asked = {
        name: getattr(arguments, name) for name in ("gpus", "processes", "tokens", "examples", "tokens_per_s", "mfu")
    }
    plan = make_plan(recipe, Asked(**asked))
    if arguments.picture:
        draw_plan(plan, arguments.picture)
    if arguments.json:
        print(to_json(plan))
    else:
        print_plan(plan, make_console())
        if arguments.picture:
            print(f"picture: {arguments.picture}")
    return 0 if plan.fastest is not None else 1


def _checkpoints(arguments: argparse.Namespace) -> int:
    from rich.table import Table

    from sft_dist.commits import list_checkpoints
    from sft_dist.console import make_console
    from sft_dist.errors import ConfigError
    from sft_dist.run_files import CHECKPOINTS

    directory = arguments.run / CHECKPOINTS
    if not directory.is_dir():
        raise ConfigError(f"{directory}: no such directory; name a run's directory, such as runs/<name>")
    table = Table(box=None, pad_edge=False)
    for heading in ("checkpoint", "size", "loss", "held-out", "verdict"):
        table.add_column(heading, justify="left" if heading in ("checkpoint", "verdict") else "right")
    all_good = True
    for found in list_checkpoints(directory):
        all_good &= found.is_good or found.step is None
        losses = (found.state.loss, found.state.held_out_loss) if found.state else (None, None)
        numbers = ["" if loss is None else f"{loss:.4f}" for loss in losses]
        table.add_row(found.path.name, f"{found.size_bytes / 1e6:,.1f} MB", *numbers, found.verdict)
    make_console().print(table, markup=False, highlight=False)
    return 0 if all_good else 1


def _status(arguments: argparse.Namespace) -> int:
    from sft_dist.console import make_console
    from sft_dist.status import is_run, read_statuses, runs_at
    from sft_dist.status_report import print_status, print_statuses, to_json

    if arguments.watch:
        return _watch(arguments)
    statuses = read_statuses(runs_at(arguments.run))
    if is_run(arguments.run):
        if arguments.json:
            print(to_json(statuses[0]))
        else:
            print_status(statuses[0], make_console(), with_ranks=arguments.ranks)
    elif arguments.json:
        print(to_json(statuses))
    else:
        print_statuses(statuses, make_console())
    return 0


def _watch(arguments: argparse.Namespace) -> int:
    from sft_dist.console import make_console
    from sft_dist.errors import ConfigError
    from sft_dist.live.tracker import watch
    from sft_dist.status import runs_at

    runs = runs_at(arguments.run)
    if len(runs) > 1:
        raise ConfigError(f"{arguments.run}: holds {len(runs)} runs; --watch shows one: name its directory")
    watch(runs[0], make_console())
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from sft_dist.report.pages import write_report

    print("\n".join(write_report(arguments.runs, output=arguments.output)))
    return 0


def _prepare(arguments: argparse.Namespace) -> int:
    from sft_dist.config import HELD_OUT, load_recipe
    from sft_dist.console import make_console
    from sft_dist.data.inspect import summary
    from sft_dist.data.prepare import open_or_prepare
    from sft_dist.data.tokenizer_files import fetch_model

    recipe = load_recipe(_recipe_path(arguments.recipe), arguments.overrides)
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

    recipe = load_recipe(_recipe_path(arguments.recipe), arguments.overrides)
    sources = recipe.data.train
    if arguments.held_out or arguments.set is not None:
        sets = recipe.data.held_out
        if arguments.set is not None and arguments.set not in sets:
            raise ConfigError(f"--set {arguments.set}: data.held_out has the sets {', '.join(sets) or 'none'}")
        sources = sets[arguments.set] if arguments.set is not None else next(iter(sets.values()), ())
    if not sources:
        also = "; rows that data.held_out_share holds out are among those shown without --held-out"
        raise ConfigError(
            "data.held_out is empty: there is nothing held out to inspect" + also * bool(recipe.data.held_out_share)
        )
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


def _lint(arguments: argparse.Namespace) -> int:
    from sft_dist.config import DataSection, Source, load_recipe
    from sft_dist.console import make_console
    from sft_dist.data.lint import lint
    from sft_dist.data.lint_report import print_report, to_json
    from sft_dist.errors import ConfigError

    words = [*arguments.inputs, *arguments.overrides]
    recipe_path = _recipe_path(words[0])
    if recipe_path.suffix in (".yaml", ".yml"):
        stray = [word for word in words[1:] if "=" not in word]
        if stray:
            raise ConfigError(f"{stray[0]}: stands beside the recipe {words[0]}; give one recipe, or data files only")
        data = load_recipe(recipe_path, words[1:]).data
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
        _recipe_path(arguments.recipe) if arguments.recipe else None,
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
        recipe = load_recipe(_recipe_path(arguments.recipe), arguments.overrides)
        print(recipe.run.path if arguments.run_dir else recipe.to_yaml().removesuffix("\n"))
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from sft_dist.config import load_recipe
    from sft_dist.console import make_console
    from sft_dist.errors import ConfigError

    if arguments.compare is not None:
        from sft_dist.evaluation.comparison import compare, print_comparison

        if arguments.recipe is not None:
            raise ConfigError(f"{arguments.recipe}: --compare reads answers that are there and takes no recipe")
        print_comparison(compare(*arguments.compare), make_console())
        return 0
    if arguments.recipe is None:
        raise ConfigError("name a recipe, or two runs with --compare")

    from sft_dist.world import stop_when_orphaned

    stop_when_orphaned()
    recipe = load_recipe(_recipe_path(arguments.recipe), arguments.overrides)

    from sft_dist.engine.collectives import leave_process_group
    from sft_dist.evaluation.report import print_evaluation
    from sft_dist.measure import evaluate_run

    try:
        evaluation = evaluate_run(recipe, console=make_console(), before=arguments.before)
    except SftDistError as error:
        _say(error)  # before the group is left, which may take long when a peer has died
        return error.exit_code
    finally:
        leave_process_group()
    if _is_main():
        print_evaluation(evaluation, make_console())
    return 0


def _sampling(arguments: argparse.Namespace) -> "Sampling":
    from sft_dist.generate import Sampling

    return Sampling(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed,
    )


def _chat(arguments: argparse.Namespace) -> int:
    from sft_dist.generate import Answerer
    from sft_dist.terminal_chat import run_chat

    sampling = _sampling(arguments)
    run_chat(Answerer.load(arguments.model), name=str(arguments.model), system=arguments.system, sampling=sampling)
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    from sft_dist.answer_rows import answer_rows, say_now_and_then
    from sft_dist.data.conversation import Message
    from sft_dist.errors import ConfigError
    from sft_dist.generate import Answerer

    sampling = _sampling(arguments)
    if (arguments.input is None) != (arguments.output is None):
        raise ConfigError("--input and --output go together: rows to answer, and where the answers go")
    if arguments.input is None:
        first = [Message("system", arguments.system)] if arguments.system else []
        print(
            next(
                Answerer.load(arguments.model).answer([[*first, Message("user", arguments.prompt)]], sampling=sampling)
            )
        )
        return 0
    if arguments.system is not None:
        raise ConfigError("--system stands beside --input; rows say their own system prompt")
    done = answer_rows(
        arguments.model,
        rows=arguments.input,
        output=arguments.output,
        field=arguments.answer_field,
        sampling=sampling,
        batch_size=arguments.batch_size,
        on_progress=say_now_and_then(),
    )
    before = f", {done.num_before:,} of them before" * bool(done.num_before)
    print(f"{arguments.output}: {done.num_rows:,} rows answered{before}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from sft_dist.errors import ConfigError
    from sft_dist.export import export_run
    from sft_dist.push import push

    if arguments.private and not arguments.push_to_hub:
        raise ConfigError("--private says how to push; name a repository with --push-to-hub OWNER/NAME")
    done = export_run(
        arguments.run,
        step=arguments.checkpoint,
        average=arguments.average,
        dtype=arguments.dtype,
        output=arguments.output,
    )
    steps = ", ".join(map(str, done.steps))
    what = f"mean of the weights after steps {steps}" if len(done.steps) > 1 else f"weights after step {steps}"
    print(
        f"{done.directory}: {what}, {done.dtype}" + ("" if done.is_new else "; as it was, with a new card"), flush=True
    )
    if arguments.push_to_hub:
        url = push(done.directory, arguments.push_to_hub, private=arguments.private, message=f"sft-dist export: {what}")
        print(f"pushed to {url}")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from sft_dist.demo_run import run_demo

    return run_demo(arguments.dir, steps=arguments.steps, num_train=arguments.examples)


def _is_main() -> bool:
    """True on rank 0, and where the launcher's environment makes no sense: somebody has to say so."""
    from sft_dist.world import read_world

    try:
        return read_world().is_main
    except SftDistError:
        return True


if __name__ == "__main__":
    sys.exit(main())
