"""The console of every verb."""

from rich.console import Console


def make_console() -> Console:
    """As wide as the terminal; in a pipe or a log file 120 columns, where nobody can widen the window."""
    console = Console()
    return console if console.is_terminal else Console(width=120)
