"""A recipe's token stores: made once by one process, opened by all."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from sft_dist.config import Recipe, Source
from sft_dist.data.build import Progress as RowsDone
from sft_dist.data.build import StoreSpec, prepare, wait_for_store
from sft_dist.data.store import TokenStore


def open_or_prepare(
    recipe: Recipe, sources: Sequence[Source], *, console: Console, is_preparer: bool = True
) -> TokenStore:
    """Open the store of `sources`, which `is_preparer` makes if there is none; the others poll for its commit.

    Raises DataError for bad rows, an empty source or a preparation that failed; ConfigError for a bad tokenizer.
    """
    spec = StoreSpec.of(recipe, sources)
    if not is_preparer:
        return wait_for_store(spec, store_dir=recipe.store_dir)
    with _rows_done(console) as progress:
        return prepare(spec, store_dir=recipe.store_dir, workers=recipe.data.workers, progress=progress)


@contextmanager
def _rows_done(console: Console) -> Iterator[RowsDone]:
    """A count of rows on a terminal; silent elsewhere, where the summary says it all."""
    columns = (TextColumn("tokenising"), TextColumn("{task.completed:,} rows"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("rows", total=None)
        yield lambda rows: progress.update(task, completed=rows)
