"""Files and hub data sets -> raw rows. Every row keeps the file and line it came from.

Reading is cheap and bounded in memory; what a row means is for `rows.py`, which runs in worker processes.
"""

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from sft_dist.config import Source
from sft_dist.data.conversation import Origin, RawRow
from sft_dist.errors import DataError

SUFFIXES = (".jsonl", ".json", ".parquet")
PARQUET_COLUMNS = (
    "messages",
    "conversations",
    "instruction",
    "input",
    "output",
    "system",
    "history",
    "tools",
    "functions",
    "images",
    "videos",
    "audios",
)
MAX_LINE_BYTES = 256 * 2**20  # a "line" beyond this is a file without line breaks, which must not fill the memory
UTF8_BOM = b"\xef\xbb\xbf"


# ---------------------------------------------------------------- which files


def list_files(source: Source) -> tuple[Path, ...]:
    """The files of a source in reading order; empty for a hub data set.

    Raises DataError if a local file or folder is meant but absent, or a folder holds no data file.
    """
    path = Path(source.path).expanduser()
    if path.is_dir():
        found = sorted(
            file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file() and not _hidden(file, path)
        )
        if not found:
            raise DataError(f"{path}: no data file in this folder; expected files ending in {', '.join(SUFFIXES)}")
        return tuple(found)
    if path.exists():
        if path.suffix not in SUFFIXES:
            raise DataError(f"{path}: unknown kind of file {path.suffix!r}; expected one of {', '.join(SUFFIXES)}")
        return (path,)
    if _looks_like_path(source.path):
        raise DataError(f"{source.path}: no such file (looked in {Path.cwd()}); correct data.train or data.held_out")
    return ()


def source_names(source: Source) -> tuple[str, ...]:
    """The `Origin.path` values that rows of a source can have, in reading order."""
    return tuple(str(file) for file in list_files(source)) or (f"{source.path}[{source.split}]",)


def hash_source(source: Source) -> str:
    """Hex digest of the bytes of every file of a source, or of the version of a hub data set; names do not count."""
    files = list_files(source)
    if not files:
        return xxhash.xxh3_128_hexdigest(
            f"hub {_load_hub(source.path, source.split, source.revision)._fingerprint}".encode()
        )
    digest = xxhash.xxh3_128()
    for file in files:
        digest.update(f"{file.suffix} {_hash_file(file)}\n".encode())
    return digest.hexdigest()


def _hash_file(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with _open(file) as stream:
        while block := stream.read(4 * 2**20):
            digest.update(block)
    return digest.hexdigest()


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _looks_like_path(text: str) -> bool:
    return (
        text.startswith((".", "/", "~"))
        or text.count("/") > 1
        or Path(text).suffix in (*SUFFIXES, ".csv", ".txt", ".gz", ".zst")
    )


def _open(file: Path) -> BinaryIO:
    try:
        return file.open("rb")
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None


# ---------------------------------------------------------------- raw rows


def iter_rows(source: Source) -> Iterator[RawRow]:
    """All rows of a source in order, unparsed.

    Memory is bounded by a line (JSONL), a batch of 512 rows (Parquet) or a file (JSON array).
    Raises DataError where a file is broken beyond its rows: an array that cannot be parsed past some line,
    a damaged Parquet file.
    """
    files = list_files(source)
    if not files:
        yield from _hub_rows(source)
    for file in files:
        if file.suffix == ".parquet":
            yield from _parquet_rows(file)
        elif file.suffix == ".json" and _starts_with_array(file):
            yield from _array_rows(file)
        else:
            yield from _line_rows(file)


def _line_rows(file: Path) -> Iterator[RawRow]:
    with _open(file) as stream:
        _skip_bom(stream, file)
        line = 0
        while text := stream.readline(MAX_LINE_BYTES):
            line += 1
            if len(text) == MAX_LINE_BYTES and not text.endswith(b"\n"):
                raise DataError(
                    f"{file}:{line}: a line of more than {MAX_LINE_BYTES} bytes; JSONL has one row per line"
                )
            if line == 1 and file.suffix == ".json":
                _require_object(text, file)
            if text.strip():
                yield RawRow(Origin(str(file), line), text)


def _skip_bom(stream: BinaryIO, file: Path) -> None:
    start = stream.read(3)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{file}: is UTF-16; expected UTF-8: convert it, e.g. `iconv -f UTF-16 -t UTF-8`")
    stream.seek(3 if start == UTF8_BOM else 0)


def _require_object(text: bytes, file: Path) -> None:
    """A .json file that is no array must hold an object per line; a pretty-printed one would give an error a line."""
    try:
        whole = isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        whole = False
    if not whole:
        raise DataError(f"{file}:1: neither an array of rows nor one object per line; write `[row, row, ...]` or JSONL")


def _starts_with_array(file: Path) -> bool:
    with _open(file) as stream:
        _skip_bom(stream, file)
        while block := stream.read(4096):
            if text := block.lstrip():
                return text.startswith(b"[")
    return False


def _array_rows(file: Path) -> Iterator[RawRow]:
    """Rows of a JSON array, each with the line on which it starts. The file is held in memory while it is read."""
    text = _read_text(file)
    decoder = json.JSONDecoder()
    position, line, counted = text.index("[") + 1, 1, 0
    is_first = True
    while True:
        position = _skip_space(text, position)
        line, counted = line + text.count("\n", counted, position), position
        if text.startswith("]", position) and is_first:
            position += 1
            break
        try:
            _, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{file}:{_error_line(error, line)}: malformed JSON in an array, rows after it cannot be read: {error}"
            ) from None
        yield RawRow(Origin(str(file), line), text[position:end].encode("utf-8"))
        is_first = False
        position = _skip_space(text, end)
        separator = text[position : position + 1]
        if separator not in (",", "]"):
            line += text.count("\n", counted, position)
            raise DataError(
                f"{file}:{line}: malformed JSON in an array: expected ',' or ']' after a row, "
                f"got {separator or 'end of file'!r}"
            )
        position += 1
        if separator == "]":
            break
    if text[position:].strip():
        line += text.count("\n", counted, _skip_space(text, position))
        raise DataError(f"{file}:{line}: text after the end of the array")


def _read_text(file: Path) -> str:
    with _open(file) as stream:
        _skip_bom(stream, file)
        raw = stream.read()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = 1 + raw.count(b"\n", 0, error.start)
        raise DataError(f"{file}:{line}: invalid UTF-8 in an array: {error.reason}") from None


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _error_line(error: Exception, line: int) -> int:
    return getattr(error, "lineno", line)


def _parquet_rows(file: Path) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        columns = [name for name in table.schema_arrow.names if name in PARQUET_COLUMNS]
        if not columns:
            raise DataError(
                f"{file}: none of its columns {', '.join(table.schema_arrow.names)} "
                f"is one of {', '.join(PARQUET_COLUMNS)}"
            )
        line = 0
        for batch in table.iter_batches(batch_size=512, columns=columns):
            for row in batch.to_pylist():
                line += 1
                yield RawRow(Origin(str(file), line), row)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: cannot be read as Parquet: {error}") from None


def _hub_rows(source: Source) -> Iterator[RawRow]:
    (name,) = source_names(source)
    for index, row in enumerate(_load_hub(source.path, source.split, source.revision)):
        yield RawRow(Origin(name, index + 1), {key: row[key] for key in row if key in PARQUET_COLUMNS})


@lru_cache(maxsize=8)
def _load_hub(path: str, split: str, revision: str | None) -> Any:
    import datasets  # seconds to import, and only hub data needs it

    try:
        return datasets.load_dataset(path, split=split, revision=revision)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        cause = " ".join(str(error).split())[:300]
        raise DataError(
            f"{path}: neither a local file nor a hub data set with split {split!r} that can be loaded: {cause}"
        ) from None
