"""The console of every verb."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any, TextIO, cast

from rich.console import Console


def make_console() -> Console:
    """As wide as the terminal; in a pipe or a log file 120 columns, where nobody can widen the window."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


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
