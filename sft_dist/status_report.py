"""The status of runs as lines for people, or as JSON."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sft_dist.console import print_pairs
from sft_dist.data.shown import safe
from sft_dist.status import RankStatus, RunStatus, duration

STYLES = {"running": "green", "finished": "green", "hanging": "bold red", "failed": "bold red", "lost": "bold red"}
WRONG = ("hanging", "failed", "lost")
NUM_RESTARTS = 3
"""So many restarts are told one by one."""


def to_json(statuses: RunStatus | Sequence[RunStatus]) -> str:
    """The fields of RunStatus as an object, or a list of such."""
    found = asdict(statuses) if isinstance(statuses, RunStatus) else [asdict(status) for status in statuses]
    return json.dumps(found, indent=2, default=str)  # str: the directory


def print_status(status: RunStatus, console: Console, *, with_ranks: bool = False) -> None:
    """One run, a line for each thing that is known; each rank if asked for, or where something is wrong."""
    state = Text.assemble((status.state, STYLES.get(status.state, "bold")), ": ", safe(status.detail))
    lines = ((name, "\n".join(safe(line) for line in text.splitlines())) for name, text in _lines(status))
    print_pairs(console, [("run", safe(str(status.run_dir))), ("state", state), *lines])
    if status.ranks and (with_ranks or status.state in WRONG or status.slow_ranks):
        console.print()
        console.print(_ranks_table(status.ranks), highlight=False)


def print_statuses(statuses: Sequence[RunStatus], console: Console) -> None:
    """One line for each of several runs."""
    table = Table(box=None, pad_edge=False, expand=True)
    for heading in ("run", "state", "step", "loss", "left"):
        table.add_column(heading, justify="right" if heading in ("step", "loss", "left") else "left", no_wrap=True)
    table.add_column("", no_wrap=True, overflow="ellipsis", ratio=1)
    for status in statuses:
        table.add_row(
            Text(safe(status.run_dir.name)),
            Text(status.state, style=STYLES.get(status.state, "bold")),
            f"{status.step:,}" + (f"/{status.num_steps:,}" if status.num_steps else ""),
            "" if status.loss is None else f"{status.loss:.4f}",
            "" if status.left_s is None else duration(status.left_s),
            Text(safe(status.detail)),
        )
    console.print(table, highlight=False)


def _lines(status: RunStatus) -> Iterator[tuple[str, str]]:
    """Name and text of each line below the state."""
    share = f" of {status.num_steps:,} ({status.step / status.num_steps:.0%})" if status.num_steps else ""
    yield "step", f"{status.step:,}{share}"
    if status.steps_per_s and status.tokens_per_s:
        steps = (
            f"{status.steps_per_s:.3g} steps/s" if status.steps_per_s >= 1 else f"{1 / status.steps_per_s:.3g} s/step"
        )
        yield "rate", f"{steps}, {status.tokens_per_s:,.0f} tokens/s"
    if status.left_s is not None:
        yield "time left", duration(status.left_s)
    if status.loss_step is not None:
        was = "not finite" if status.loss is None else f"{status.loss:.4f}"
        yield "loss", was + f" at step {status.loss_step:,}" * (status.loss_step != status.step)
    if status.held_out_step is not None:
        was = "not finite" if status.held_out_loss is None else f"{status.held_out_loss:.4f}"
        yield "held out", f"{was} at step {status.held_out_step:,}"
    if status.num_withheld:
        yield "withheld", f"{status.num_withheld:,} updates"
    age = "" if status.commit_age_s is None else f", {duration(status.commit_age_s)} ago"
    yield "commit", f"step {status.commit_step:,}{age}" if status.commit_step is not None else "none yet"
    if status.starts:
        start = status.starts[-1]
        yield "started", f"{start.time} on {start.host}, {duration(start.age_s)} ago"
    if len(status.starts) > 1:
        again = list(zip(status.starts, status.starts[1:], strict=False))
        told = [
            f"{before.ended or 'ended without a word (killed, or finished)'}; then on from step {start.after_step:,}"
            for before, start in again[-NUM_RESTARTS:]
        ]
        yield "restarts", "\n".join([f"{len(again)}", *told])
    if status.ranks:
        hosts = len({rank.host for rank in status.ranks})
        slow = ", ".join(_slow(rank, status.ranks) for rank in status.slow_ranks)
        num = f"{status.world_size} on {hosts} host{'s' * (hosts > 1)}"
        some = f", {len(status.ranks)} of them heard of" * (len(status.ranks) < status.world_size)
        yield "ranks", f"{num}{some}{f'; slow: {slow}' * bool(slow)}"


def _slow(rank: RankStatus, ranks: Sequence[RankStatus]) -> str:
    fastest = min(other.forward_s or 0.0 for other in ranks)
    return (
        f"rank {rank.rank} on {rank.host} ({_ms(rank.forward_s)} of forward passes a step, the fastest {_ms(fastest)})"
    )


def _ranks_table(ranks: Sequence[RankStatus]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("rank", "host", "pid", "state", "step", "last beat", "idle", "forward", "phase"):
        table.add_column(heading, justify="left" if heading in ("host", "state", "phase") else "right", overflow="fold")
    for rank in ranks:
        table.add_row(
            str(rank.rank),
            Text(safe(rank.host)),
            str(rank.pid),
            "slow" if rank.is_slow and rank.state == "running" else rank.state,
            f"{rank.step:,}",
            duration(rank.silent_s),
            duration(rank.idle_s),
            _ms(rank.forward_s),
            Text(safe(rank.phase)),
        )
    return table


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:,.0f} ms"
