"""train, launch, submit, plan: from a recipe to a run."""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from sft_dist.errors import SftDistError
from sft_dist.verbs.words import (
    Verbs,
    add_recipe_verb,
    count_from,
    gpus,
    is_main,
    overrides_of,
    positive,
    recipe_path,
    say,
)


def add_verbs(verbs: Verbs) -> None:
    """Their parsers."""
    train = add_recipe_verb(
        verbs,
        "train",
        _train,
        "prepare, train and export; start it through accelerate launch or torchrun for many processes",
    )
    _add_train_flags(train)

    launch = add_recipe_verb(
        verbs, "launch", _launch, "train in one process per GPU of this machine; signals stop it in order"
    )
    _add_train_flags(launch)
    launch.add_argument(
        "--processes",
        type=count_from(1),
        metavar="N",
        help="processes of this host (default: one per visible GPU, or one)",
    )
    launch.add_argument("--hosts", type=count_from(1), metavar="N", help="hosts, each with this command (default: 1)")
    launch.add_argument("--host-index", type=count_from(0), metavar="I", help="this one of them, from 0")
    launch.add_argument("--main-host", metavar="ADDRESS", help="address of host 0 that every host can reach")
    launch.add_argument("--port", type=count_from(1), help="a free port of host 0")
    launch.add_argument(
        "--config-file", type=Path, metavar="FILE", help="your own accelerate config (default: accelerate's, if any)"
    )
    launch.add_argument("--dry-run", action="store_true", help="print the command instead of running it")

    _add_submit(verbs)
    _add_plan(verbs)


def _add_submit(verbs: Verbs) -> None:
    text = "prepare, train and evaluate as SLURM jobs, each after the one before"
    submit = add_recipe_verb(verbs, "submit", _submit, text)
    _add_train_flags(submit)
    submit.add_argument("--nodes", type=count_from(1), default=1, metavar="N", help="nodes to train on (default: 1)")
    text = "GPUs of each node, one process each: a number, or with a type, as h100:8"
    submit.add_argument("--gpus-per-node", type=gpus, metavar="N", help=text)
    submit.add_argument("--processes", type=count_from(1), metavar="N", help="processes of each node without GPUs")
    submit.add_argument("--time", metavar="T", help="time limit of one attempt, as 04:00:00")
    submit.add_argument(
        "--signal-before",
        type=count_from(1),
        default=120,
        metavar="S",
        help="seconds before the time limit at which the run is asked to save (default: 120)",
    )
    text = "how often it is queued again (default: the site's, or 20)"
    submit.add_argument("--max-requeues", type=count_from(0), metavar="N", help=text)
    submit.add_argument("--site", type=Path, metavar="FILE", help="settings of the site (default: slurm/site.sh)")
    text = "more for sbatch, for the training: --sbatch=--mem=0"
    submit.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help=text)
    submit.add_argument("--no-prepare", action="store_true", help="the data and the model are there")
    submit.add_argument("--no-evaluate", action="store_true", help="no job that evaluates the model")
    submit.add_argument("--dry-run", action="store_true", help="print a script that submits the jobs instead")


def _add_plan(verbs: Verbs) -> None:
    plan = add_recipe_verb(
        verbs, "plan", _plan, "memory by part for each engine, disk, steps and time, before anything is loaded"
    )
    text = "plan for 80GB, 4x80GB, 2x8x80GB (nodes x GPUs x memory), H100, 8xH100 (default: this machine)"
    plan.add_argument("--gpus", metavar="G", help=text)
    plan.add_argument("--host-memory", metavar="M", help="with --gpus: memory of each node, as 64GB (default: enough)")
    plan.add_argument("--processes", type=count_from(1), metavar="N", help="processes on this machine")
    plan.add_argument("--tokens", type=count_from(1), metavar="N", help="tokens of an epoch, where no store says it")
    plan.add_argument("--examples", type=count_from(1), metavar="N", help="examples of an epoch")
    rate = plan.add_mutually_exclusive_group()
    rate.add_argument("--tokens-per-s", type=positive, metavar="X", help="rate of all GPUs together")
    rate.add_argument("--mfu", type=positive, metavar="PERCENT", help="or: model FLOPs utilisation of a known card")
    plan.add_argument("--picture", type=Path, metavar="FILE", help="also draw the bars, as .png or .svg (matplotlib)")
    plan.add_argument("--json", action="store_true", help="print JSON instead")


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


def _train(arguments: argparse.Namespace) -> int:
    from sft_dist.world import read_world, report_exit, stop_when_orphaned

    stop_when_orphaned()
    from sft_dist.config import load_recipe

    recipe = load_recipe(recipe_path(arguments.recipe), overrides_of(arguments))

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
            say(error)  # before the group is left, which may take long when a peer has died
            report_exit(error.exit_code)
            raise
        finally:
            leave_process_group()
        if is_main():
            if result.finished:
                withheld = f", {result.num_withheld} updates WITHHELD" * bool(result.num_withheld)
                print(f"done: step {result.step}{withheld}, model in {result.model_dir}")
            else:
                print(f"stopped on request after step {result.step}; the same command goes on from there")
    return 0


def _launch(arguments: argparse.Namespace) -> int:
    from sft_dist.config import load_recipe
    from sft_dist.launch import Asked, launch

    recipe = load_recipe(recipe_path(arguments.recipe), overrides_of(arguments))
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


def _submit(arguments: argparse.Namespace) -> int:
    from sft_dist.config import load_recipe
    from sft_dist.submit import Request, submit

    recipe = load_recipe(recipe_path(arguments.recipe), overrides_of(arguments))
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
    words = [arguments.recipe, *overrides_of(arguments)]
    arguments.engine = None  # an override, which prepare and evaluate take as well
    return submit(recipe, words, _train_flags(arguments), request=request, dry_run=arguments.dry_run)


def _train_flags(arguments: argparse.Namespace) -> list[str]:
    """The flags of train that were given, to be handed on."""
    names = ("no_resume", "allow_change", "trust_checkpoint", "profile")
    flags = [f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name)]
    for name in ("engine", "resume_from"):
        if (value := getattr(arguments, name)) is not None:
            flags += [f"--{name.replace('_', '-')}", value]
    return flags


def _plan(arguments: argparse.Namespace) -> int:
    from sft_dist.config import load_recipe
    from sft_dist.console import make_console
    from sft_dist.plan.picture import draw_plan
    from sft_dist.plan.planner import Asked, make_plan
    from sft_dist.plan.report import print_plan, to_json

    recipe = load_recipe(recipe_path(arguments.recipe), arguments.overrides)
    plan = make_plan(recipe, Asked(**{field.name: getattr(arguments, field.name) for field in fields(Asked)}))
    if arguments.picture:
        draw_plan(plan, arguments.picture)
    if arguments.json:
        print(to_json(plan))
    else:
        print_plan(plan, make_console())
        if arguments.picture:
            print(f"picture: {arguments.picture}")
    return 0 if plan.fastest is not None else 1
