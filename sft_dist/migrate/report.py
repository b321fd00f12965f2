"""What an import tells: taken over, needs your word, no counterpart."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sft_dist.migrate.convert import NAMES, Migration
from sft_dist.migrate.ledger import Said, Taken
from sft_dist.redact import redacted


def print_migration(migration: Migration, console: Console) -> None:
    """The three lists, and the keys that nobody here knows."""
    ledger = migration.ledger
    console.print(Text(f"taken over from {NAMES[migration.origin]}", style="bold"))
    _print_taken(ledger.taken, console)
    if ledger.idle:
        console.print(Text(f"nothing to do for: {', '.join(dict.fromkeys(ledger.idle))}", style="dim"))
    _print_said("needs your word", ledger.asked, console, style="yellow")
    _print_said("no counterpart", ledger.lacking, console, style="cyan")
    unknown = [Said(key, "not a key that this import knows: look up what it did") for key in ledger.unknown]
    _print_said("unknown", unknown, console, style="yellow")


def _print_taken(taken: Sequence[Taken], console: Console) -> None:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(overflow="fold", ratio=4)
    table.add_column(overflow="fold", ratio=6)
    for each in taken:
        ours = Text(redacted(each.ours))
        if each.meaning:
            ours.append(f"\n{each.meaning}", style="italic")
        table.add_row(Text(redacted(each.theirs), style="dim"), ours)
    console.print(table)


def _print_said(title: str, said: Sequence[Said], console: Console, *, style: str) -> None:
    if not said:
        return
    console.print(Text(f"\n{title}", style="bold"))
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(overflow="fold", ratio=4, style=style)
    table.add_column(overflow="fold", ratio=6)
    for each in said:
        table.add_row(Text(redacted(each.key)), Text(each.text))
    console.print(table)
