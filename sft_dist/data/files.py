"""Files and hub data sets -> raw rows. Every row keeps the file and line it came from.

Reading is cheap and bounded in memory; what a row means is for `rows.py`, which runs in worker processes.
"""

import glob
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import xxhash

from sft_dist.config import Source
from sft_dist.data.conversation import RawRow
from sft_dist.data.hub import HubSplit, find_split
from sft_dist.data.readers import SUFFIXES, OnRead, open_file, read_rows, suffix_of
from sft_dist.data.row_fields import ROW_FIELDS
from sft_dist.errors import DataError


def list_files(source: Source) -> tuple[Path, ...]:
    """The files of a source in reading order; empty for a hub data set.

    A folder or a pattern stands for all its files of the known kinds but hidden ones.
    Raises DataError if a file, folder or pattern is meant but there is none, or no data file in it, or one whose name
    is not UTF-8.
    """
    path = Path(source.path).expanduser()
    mode = _mode(path)
    if mode is not None and stat.S_ISDIR(mode):
        found = sorted(file for file in _walk(path) if suffix_of(file.name))
        if not found:
            raise DataError(f"{path}: no data file in this folder; expected files ending in {', '.join(SUFFIXES)}")
    elif mode is not None:
        found = [path]
        if suffix_of(path.name) is None:
            raise DataError(f"{path}: unknown kind of file {path.suffix!r}; expected one of {', '.join(SUFFIXES)}")
    elif path.is_symlink():
        raise DataError(f"{path}: a link to {_shown(os.readlink(path))}, which does not exist")
    elif glob.has_magic(source.path):
        found = _match(path)
    elif _looks_like_path(source.path):
        raise DataError(f"{source.path}: no such file (looked in {Path.cwd()}); correct data.train or data.held_out")
    else:
        return ()
    for file in found:
        _require_utf8(file)
        _require_regular(file)
    return tuple(found)


def source_names(source: Source) -> tuple[str, ...]:
    """The `Origin.path` values that rows of a source can have, in reading order."""
    return tuple(str(file) for file in list_files(source)) or _hub_split(source).names


def hash_source(source: Source) -> str:
    """Hex digest of the bytes of every file of a source as they lie on disk; names do not count.

    For a hub data set it is that of its commit and the files of the split.
    """
    files = list_files(source)
    digest = xxhash.xxh3_128()
    for file in files:
        digest.update(f"{suffix_of(file.name)} {_hash_file(file)}\n".encode())
    if not files:
        found = _hub_split(source)
        digest.update("\n".join((f"hub {found.path} {found.commit}", *found.files)).encode())
    return digest.hexdigest()


def count_bytes(source: Source) -> int | None:
    """Bytes of a source's files on disk; None for a hub data set, whose files may have to be fetched."""
    files = list_files(source)
    return sum(file.stat().st_size for file in files) if files else None


def iter_rows(source: Source, *, extra_columns: Sequence[str] = (), on_read: OnRead | None = None) -> Iterator[RawRow]:
    """All rows of a source in order, unparsed. Memory is bounded by a block and the largest row.

    on_read: called with the bytes that were read since the last call, up to `count_bytes`.
    extra_columns: fields that are read from Parquet files besides those of the row formats; `meta.level` reads `meta`.
    Raises DataError where a file is broken beyond its rows, naming the line.
    """
    columns = (*ROW_FIELDS, *extra_columns, *(name.partition(".")[0] for name in extra_columns))
    files = list_files(source)
    for file in files:
        yield from read_rows(file, name=str(file), columns=columns, on_read=on_read)
    if not files:
        found = _hub_split(source)
        for inside, name in zip(found.files, found.names, strict=True):
            yield from read_rows(found.fetch(inside), name=name, columns=columns)


def _hub_split(source: Source) -> HubSplit:
    return find_split(source.path, source.split, source.revision)


def _hash_file(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with open_file(file, str(file)) as stream:
        while block := stream.read(4 * 2**20):
            digest.update(block)
    return digest.hexdigest()


def _walk(folder: Path) -> Iterator[Path]:
    """Files below a folder, hidden ones left out. Links to folders are followed, each folder once."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{_shown(error.filename)}: cannot be read: {error.strerror}")

    seen = set()
    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        status = os.stat(parent)
        is_new = (status.st_dev, status.st_ino) not in seen
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if is_new and not name.startswith("."))
        yield from (Path(parent, name) for name in files if is_new and not name.startswith("."))


def _match(pattern: Path) -> list[Path]:
    found = [Path(name) for name in glob.glob(str(pattern), recursive=True)]
    if not found:
        raise DataError(f"{pattern}: no file matches this pattern (looked in {Path.cwd()})")
    files = sorted(file for file in found if suffix_of(file.name))
    if not files:
        raise DataError(
            f"{pattern}: none of its {len(found)} matches is a data file; "
            f"expected files ending in {', '.join(SUFFIXES)}"
        )
    return files


def _mode(path: Path) -> int | None:
    """Kind and permissions of what a path leads to; None if it leads nowhere."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _require_utf8(path: Path) -> None:
    """Names become origins, which are written to the store and to the terminal."""
    if (shown := _shown(str(path))) != str(path):
        raise DataError(f"{shown}: its name is not UTF-8; rename it")


def _shown(name: str) -> str:
    """The name with `\\xff` for bytes that are not UTF-8, which Python keeps as half surrogate pairs."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    return name


def _require_regular(file: Path) -> None:
    mode = _mode(file)
    if mode is None:
        raise DataError(f"{file}: a link to {_shown(os.readlink(file))}, which does not exist")
    if stat.S_ISDIR(mode):
        raise DataError(f"{file}: is a folder; expected a file (its files match `{file}/*`)")
    if not stat.S_ISREG(mode):
        raise DataError(f"{file}: is a pipe or device, which can be read only once; expected a regular file")


def _looks_like_path(text: str) -> bool:
    return (
        text.startswith((".", "/", "~"))
        or text.count("/") > 1
        or suffix_of(text) is not None
        or Path(text).suffix.lower() in (".txt", ".tsv", ".gz", ".zst")
    )
