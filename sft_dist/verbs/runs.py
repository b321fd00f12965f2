"""checkpoints, status, report, sync: of a run that is there."""

import argparse
from pathlib import Path

from sft_dist.verbs.words import Verbs


def add_verbs(verbs: Verbs) -> None:
    """Their parsers."""
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


def _sync(arguments: argparse.Namespace) -> int:
    from sft_dist.wandb_sync import sync_run

    num_lines = sync_run(arguments.run, project=arguments.project, mode=arguments.mode)
    where = "are with wandb" if arguments.mode == "online" else "are written for wandb; `wandb sync` sends them"
    print(f"{num_lines} records of {arguments.run} {where}")
    return 0
