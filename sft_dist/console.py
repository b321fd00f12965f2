"""The console of every verb."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, cast

from rich.console import Console
from rich.table import Table
from rich.text import Text


def make_console() -> Console:
    """As wide as the terminal; in a pipe or a log file 120 columns, where nobody can widen the window."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def print_pairs(console: Console, pairs: Iterable[tuple[str, str | Text]], *, style: str = "") -> None:
    """Names and, aligned behind them, texts, which may hold several lines and what looks like markup.

    A terminal folds long lines at its edge. Elsewhere each stays whole, so that a path in it can be searched for.
    """
    rows = [(name, text if isinstance(text, Text) else Text(text)) for name, text in pairs]
    if console.is_terminal:
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True, style=style)
        table.add_column(overflow="fold")
        for name, text in rows:
            table.add_row(Text(name), text)
        console.print(table, highlight=False)
        return
    width = max(len(name) for name, _ in rows) + 2
    for name, text in rows:
        lines = (name.ljust(width) + text.plain).replace("\n", "\n" + " " * width)
        console.print(Text(lines), soft_wrap=True)


@contextlib.contextmanager
def nobody_need_listen(stream: TextIO) -> Iterator[None]:
    """Standard output whose reader may go away, or whose disk may fill up: what is printed is lost, the run is not."""
    with contextlib.redirect_stdout(cast(TextIO, _Tolerant(stream))):
        yield


class _Tolerant:
    """A stream that turns to nowhere when it cannot be written any more."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._turn_to_nowhere()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._turn_to_nowhere()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _turn_to_nowhere(self) -> None:
        """What is still in the buffer goes there, too: the interpreter flushes it when it ends."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
