"""A recipe's token stores: made once by one process, opened by all."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from sft_dist.config import Recipe, Source
from sft_dist.data.build import Progress, StoreSpec, prepare, wait_for_store
from sft_dist.data.store import TokenStore

LINE_EVERY_S = 15.0


def open_or_prepare(
    recipe: Recipe, sources: Sequence[Source], *, console: Console, is_preparer: bool = True
) -> TokenStore:
    """Open the store of `sources`, which `is_preparer` makes if there is none; the others poll for its commit.

    Raises DataError for bad rows, an empty source or a preparation that failed; ConfigError for a bad tokenizer.
    """
    spec = StoreSpec.of(recipe, sources)
    if not is_preparer:
        return wait_for_store(spec, store_dir=recipe.store_dir)
    with _showing(console) as progress:
        return prepare(spec, store_dir=recipe.store_dir, workers=recipe.data.workers, progress=progress)


@contextmanager
def _showing(console: Console) -> Iterator[Progress]:
    """Rows, rate and time left: a bar on a terminal, elsewhere a line now and then, nothing for what takes seconds."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = (TextColumn("preparing"), BarColumn(), TextColumn("{task.fields[text]}"))
    with Bar(*columns, console=console, transient=True) as bar:
        task, started = bar.add_task("rows", total=None, text=""), time.monotonic()

        def show(rows: int, share: float | None) -> None:
            text = describe_progress(rows, share, elapsed_s=time.monotonic() - started)
            bar.update(task, total=None if share is None else 1.0, completed=share or 0.0, text=text)

        yield show


class _Lines:
    """Progress for a log."""

    def __init__(self, console: Console) -> None:
        self._console, self._started = console, time.monotonic()
        self._last = self._started

    def __call__(self, rows: int, share: float | None) -> None:
        now = time.monotonic()
        if now - self._last >= LINE_EVERY_S:
            self._last = now
            self._console.print(f"preparing: {describe_progress(rows, share, elapsed_s=now - self._started)}")


def describe_progress(rows: int, share: float | None, *, elapsed_s: float) -> str:
    """Rows done, rows a second, and the time left if it is known how much there is."""
    text = f"{rows:,} rows, {rows / max(elapsed_s, 1e-9):,.0f} rows/s"
    if share:
        left_s = round(elapsed_s * (1 - share) / share)
        text += f", {share:.0%}, {left_s // 60}:{left_s % 60:02d} left"
    return text
