"""One data file -> raw rows. Memory is bounded by a block and the largest row, whatever the size of the file."""

import codecs
import csv
import io
import json
import re
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from sft_dist.data.conversation import BadRow, Origin, RawRow
from sft_dist.data.strict_json import list_keys, one_line
from sft_dist.errors import DataError

COMPRESSED = (".gz", ".zst")
SUFFIXES = (*(kind + packed for kind in (".jsonl", ".json", ".csv") for packed in ("", *COMPRESSED)), ".parquet")
# A "line" or row of an array beyond this is a file without line breaks, which must not fill the memory.
MAX_LINE_BYTES = 256 * 2**20
# Of CSV, whose reader holds four bytes a character; an open quote takes in all that follows.
MAX_RECORD_BYTES = 64 * 2**20
BLOCK_BYTES = 256 * 2**10
OnRead = Callable[[int], None]
UTF8_BOM = b"\xef\xbb\xbf"


def suffix_of(name: str) -> str | None:
    """The end of a file's name that says how it is read, such as `.jsonl.gz`; None for kinds that are not read."""
    return next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), None)


def read_rows(file: Path, *, name: str, columns: Sequence[str], on_read: OnRead | None = None) -> Iterator[RawRow]:
    """All rows of a file in order, unparsed.

    name: what errors and origins call the file. columns: which columns of a Parquet file are read, if it has them.
    on_read: called with bytes of the file, as it lies on disk, that were read since the last call.
    Raises DataError where a file is broken beyond its rows: an array that cannot be parsed past some line, an open
    quote in CSV, a damaged Parquet or compressed file.
    """
    suffix = suffix_of(file.name)
    if suffix is None:
        raise DataError(f"{name}: unknown kind of file; expected one of {', '.join(SUFFIXES)}")
    if suffix == ".parquet":
        yield from _parquet_rows(file, name, columns, on_read)
    elif suffix.startswith(".csv"):
        with _Stream(file, name, on_read) as stream:
            yield from _csv_rows(stream)
    elif suffix.startswith(".jsonl") or not _starts_with_array(file, name):
        with _Stream(file, name, on_read) as stream:
            yield from _line_rows(stream, objects_only=not suffix.startswith(".jsonl"))
    else:
        with _Stream(file, name, on_read) as stream:
            yield from _array_rows(_Window(stream))


# ---------------------------------------------------------------- bytes


class _Told(io.FileIO):
    """A file that tells how many bytes of it are read."""

    def __init__(self, file: Path, on_read: OnRead) -> None:
        super().__init__(file)
        self._on_read = on_read

    def readinto(self, target: Any) -> int:
        count = super().readinto(target)
        self._on_read(count)
        return count


def open_file(file: Path, name: str, on_read: OnRead | None = None) -> io.FileIO:
    """A regular file, opened. Raises DataError for what cannot be read, or cannot be read twice, such as a pipe."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise DataError(f"{name}: is a folder, pipe or device; expected a regular file")
        return io.FileIO(file) if on_read is None else _Told(file, on_read)
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from None


class _Decompressed(io.RawIOBase):
    """What a .gz or .zst file holds, all members or frames of it. Damage is an OSError.

    Compressed bytes go in by so few at a time that even the densest (1 to 1,000 in gz, 1 to 32,000 in zst) come out
    as a few MB. The decompressors' own stream readers take a file that is cut off for a whole one.
    """

    def __init__(self, file: io.FileIO, suffix: str) -> None:
        self._file = io.BufferedReader(file, BLOCK_BYTES)
        self._new: Callable[[], Any]
        self._error: type[Exception]
        self._is_gz = suffix.endswith(".gz")
        if self._is_gz:
            self._new, self._error, self._step = lambda: zlib.decompressobj(wbits=31), zlib.error, 4096
        else:
            import zstandard  # only .zst files need it

            self._new, self._error = zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError
            self._step = 256
        self._member: Any = None
        self._padding = b""  # what may stand before the next member: NULs behind the first one in gz, as gzip has it
        self._rest = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._ready:
            block, self._rest = self._rest or self._file.read(self._step), b""
            if not block and self._member is None:
                return 0
            if not block:
                raise OSError("it ends in the middle")
            if self._member is None:
                block = block.lstrip(self._padding)
                if not block:
                    continue
                self._member = self._new()
            try:
                self._ready = memoryview(self._member.decompress(block))
            except self._error as error:
                raise OSError(str(error)) from None
            if self._member.eof:
                self._rest = self._member.unused_data
                self._member = None
                self._padding = b"\0" if self._is_gz else b""
        count = min(len(target), len(self._ready))
        target[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class _Stream:
    """The bytes of a file, decompressed, without a byte order mark. num_lines: how many line ends were handed out."""

    def __init__(self, file: Path, name: str, on_read: OnRead | None = None) -> None:
        self.name, self.num_lines = name, 0
        self._is_compressed = file.name.lower().endswith(COMPRESSED)
        opened = open_file(file, name, on_read)
        raw = _Decompressed(opened, file.name.lower()) if self._is_compressed else opened
        self._buffer = io.BufferedReader(raw, BLOCK_BYTES)
        self._is_start = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._buffer.close()

    def readline(self, limit: int) -> bytes:
        """The next line with its line end, empty at the end of the file. Raises DataError if it is above the limit."""
        try:
            line = self._buffer.readline(limit + 1)
        except OSError as error:
            raise self._damage(error) from None
        if self._is_start:
            line = self._without_mark(line)
        if len(line) > limit:
            raise DataError(f"{self.name}:{self.num_lines + 1}: a line of more than {limit} bytes")
        self.num_lines += bool(line)
        return line

    def read(self) -> bytes:
        """The next block of at most BLOCK_BYTES, empty at the end of the file."""
        try:
            # read1: what was decompressed before a damaged place is handed out first
            block = self._buffer.read1(BLOCK_BYTES)
            while self._is_start and 0 < len(block) < len(UTF8_BOM) and (more := self._buffer.read1(BLOCK_BYTES)):
                block += more
        except OSError as error:
            raise self._damage(error) from None
        if self._is_start:
            block = self._without_mark(block)
        self.num_lines += block.count(b"\n")
        return block

    def _without_mark(self, start: bytes) -> bytes:
        self._is_start = False
        if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise DataError(f"{self.name}: is UTF-16; expected UTF-8: convert it, e.g. `iconv -f UTF-16 -t UTF-8`")
        return start.removeprefix(UTF8_BOM)

    def _damage(self, error: OSError) -> DataError:
        what = "cannot be decompressed" if self._is_compressed else "cannot be read"
        mend = "; is it whole, and of the kind that its name says?" if self._is_compressed else ""
        return DataError(f"{self.name}: {what} after line {self.num_lines}: {error.strerror or error}{mend}")


# ---------------------------------------------------------------- JSON


def _line_rows(stream: _Stream, *, objects_only: bool) -> Iterator[RawRow]:
    is_first = True
    while text := stream.readline(MAX_LINE_BYTES):
        if text.isspace():
            continue
        if is_first and objects_only:
            _require_object(text, stream)
        is_first = False
        yield RawRow(Origin(stream.name, stream.num_lines), text)


def _require_object(text: bytes, stream: _Stream) -> None:
    """A .json file that is no array must hold an object per line; a pretty-printed one would give an error a line."""
    try:
        whole = isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        whole = False
    if not whole:
        raise DataError(
            f"{stream.name}:{stream.num_lines}: neither an array of rows nor one object per line; "
            "write `[row, row, ...]` or JSONL"
        )


def _starts_with_array(file: Path, name: str) -> bool:
    with _Stream(file, name) as stream:
        while block := stream.read():
            if text := block.lstrip():
                return text.startswith(b"[")
    return False


class _Window:
    """The part of a JSON text that is looked at. position: of the next character in `text`."""

    def __init__(self, stream: _Stream) -> None:
        self.stream, self.text, self.position = stream, "", 0
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._line, self._counted = 1, 0
        self._is_ended = False

    @property
    def line(self) -> int:
        """1-based line of the file that `position` is on."""
        self._line += self.text.count("\n", self._counted, self.position)
        self._counted = self.position
        return self._line

    def peek(self) -> str:
        """The next character that is no white space; empty at the end of the file."""
        while True:
            self.position = _SPACE.match(self.text, self.position).end()  # type: ignore[union-attr]
            if self.position < len(self.text) or not self._grow():
                return self.text[self.position : self.position + 1]

    def take(self) -> bytes:
        """The text of the JSON value that starts at the position, which moves behind it."""
        while True:
            is_whole = self._is_ended
            found = self._value_end()
            if isinstance(found, int):
                value = self.text[self.position : found].encode("utf-8")
                if len(value) > MAX_LINE_BYTES:
                    raise self._too_long()
                self.position = found
                return value
            line = self.line + self.text.count("\n", self.position, found.pos)
            # Text that is cut off fails where it was cut, but for strings, which fail where they start.
            is_cut_off = found.pos + _LONGEST_WORD >= len(self.text) or found.msg.startswith("Unterminated string")
            if is_whole or not is_cut_off:
                raise DataError(
                    f"{self.stream.name}:{line}: malformed JSON in an array, rows after it cannot be read: {found.msg}"
                )
            self._grow()

    def _value_end(self) -> int | json.JSONDecodeError:
        try:
            _, end = _DECODER.raw_decode(self.text, self.position)
        except json.JSONDecodeError as error:
            return error
        except RecursionError:
            raise DataError(f"{self.stream.name}:{self.line}: JSON that is nested too deeply to be read") from None
        if self.text[self.position] in '{["' or self._is_ended or _AFTER_WORD.search(self.text, self.position):
            return end
        return json.JSONDecodeError("a word that may go on", self.text, len(self.text))

    def _grow(self) -> bool:
        """Let go of what is before the position and read at least as much as is left again. False: there is no more.

        Doubling keeps the parsing of a row that is longer than a block linear in its length.
        """
        line, rest = self.line, self.text[self.position :]
        if len(rest) > MAX_LINE_BYTES:  # characters, which are no more than its bytes
            raise self._too_long()
        parts, wanted = [rest], min(max(len(rest), BLOCK_BYTES), MAX_LINE_BYTES + 1 - len(rest))
        while wanted > 0 and not self._is_ended:
            parts.append(self._next_block())
            wanted -= len(parts[-1])
        self.text, self.position, self._line, self._counted = "".join(parts), 0, line, 0
        return len(self.text) > len(rest)

    def _next_block(self) -> str:
        block = self.stream.read()
        self._is_ended = not block
        try:
            return self._decoder.decode(block, final=self._is_ended)
        except UnicodeDecodeError as error:
            before = self.stream.num_lines - block.count(b"\n")
            line = before + error.object.count(b"\n", 0, error.start) + 1
            raise DataError(f"{self.stream.name}:{line}: invalid UTF-8 in an array: {error.reason}") from None

    def _too_long(self) -> DataError:
        return DataError(f"{self.stream.name}:{self.line}: a row of more than {MAX_LINE_BYTES} bytes")


_SPACE = re.compile(r"[ \t\r\n]*")
_AFTER_WORD = re.compile(r"[ \t\r\n,\]]")
_LONGEST_WORD = 16  # more than `-Infinity` or an escaped surrogate pair has
# Only where a value ends counts; int() refuses long numbers.
_DECODER = json.JSONDecoder(parse_int=str, parse_float=str)


def _array_rows(window: _Window) -> Iterator[RawRow]:
    """Rows of a JSON array, each with the line on which it starts."""
    name = window.stream.name
    window.peek()
    window.position += 1
    separator = window.peek()
    if separator == "]":
        window.position += 1
    while separator != "]":
        window.peek()
        origin = Origin(name, window.line)
        yield RawRow(origin, window.take())
        separator = window.peek()
        if separator not in (",", "]"):
            raise DataError(
                f"{name}:{window.line}: malformed JSON in an array: expected ',' or ']' after a row, "
                f"got {separator or 'end of file'!r}"
            )
        window.position += 1
    if window.peek():
        raise DataError(f"{name}:{window.line}: text after the end of the array")


# ---------------------------------------------------------------- CSV


class _Record:
    """The lines of one CSV record at a time. fault: what is wrong with the bytes of the record."""

    def __init__(self, stream: _Stream) -> None:
        self._stream = stream
        self.begin()

    def begin(self) -> None:
        self.line, self.num_bytes, self.fault = self._stream.num_lines + 1, 0, ""

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        raw = self._stream.readline(MAX_RECORD_BYTES)
        self.num_bytes += len(raw)
        if self.num_bytes > MAX_RECORD_BYTES:
            raise DataError(
                f"{self._stream.name}:{self.line}: a CSV record of more than {MAX_RECORD_BYTES} bytes; "
                "is there a quote that is not closed?"
            )
        if not raw:
            raise StopIteration
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            self.fault = f"invalid UTF-8 at byte {error.start} of line {self._stream.num_lines}: {error.reason}"
            return raw.decode("utf-8", "replace")


_CSV_ADVICE = " - do you need to open the file in universal-newline mode?"  # csv's own, to programmers


def _csv_rows(stream: _Stream) -> Iterator[RawRow]:
    """Records by the names in the header, without empty cells. A record that fits no header is passed on as refused."""
    csv.field_size_limit(MAX_RECORD_BYTES)
    record = _Record(stream)
    reader = csv.reader(record, strict=True)
    header: list[str] = []
    while True:
        record.begin()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason = str(error).replace(_CSV_ADVICE, "; quote the cell, or convert the line ends")
            raise DataError(
                f"{stream.name}:{record.line}: malformed CSV, rows after it cannot be read: {reason}"
            ) from None
        origin = Origin(stream.name, record.line)
        if not cells:
            continue
        if not header:
            _check_header(cells, origin, record.fault)
            header = cells
        elif record.fault:
            yield RawRow(origin, BadRow(origin, "invalid_utf8", record.fault))
        elif len(cells) != len(header):
            reason = f"{len(cells)} cells under a header of {len(header)}; cells with commas or line breaks need quotes"
            yield RawRow(origin, BadRow(origin, "bad_structure", reason))
        else:
            yield RawRow(origin, {name: cell for name, cell in zip(header, cells, strict=True) if cell})


def _check_header(header: Sequence[str], origin: Origin, fault: str) -> None:
    for index, name in enumerate(header):
        if not name.strip():
            fault = f"column {index + 1} has no name; name it or leave it out (pandas: to_csv(index=False))"
        elif name in header[:index]:
            fault = f"two columns are called {name!r}"
    if len(header) == 1 and (separator := next((sign for sign in ";\t|" if sign in header[0]), "")):
        fault = f"cells seem to be separated by {separator!r}; expected commas"
    if fault:
        raise DataError(f"{origin}: the CSV header cannot be used: {fault}")


# ---------------------------------------------------------------- Parquet


def _parquet_rows(file: Path, name: str, columns: Sequence[str], on_read: OnRead | None) -> Iterator[RawRow]:
    """Rows by number, without the nulls that Arrow fills in."""
    open_file(file, name).close()
    import pyarrow  # a third of a second, and only Parquet needs it
    import pyarrow.parquet

    try:
        # buffer_size: columns are read by pieces, not by row groups, which may be as large as the file
        table = pyarrow.parquet.ParquetFile(file, buffer_size=2**20, pre_buffer=False)
        names = table.schema_arrow.names
        wanted = [column for column in names if column in columns]
        if not wanted:
            raise DataError(f"{name}: none of its columns {list_keys(names)} is one of {', '.join(columns)}")
        if len(set(wanted)) < len(wanted):
            raise DataError(f"{name}: two columns have the same name; its columns are {list_keys(names)}")
        number = 0
        row_bytes = file.stat().st_size / max(1, table.metadata.num_rows)
        for batch in table.iter_batches(batch_size=512, columns=wanted, use_threads=False):
            if on_read is not None:
                on_read(round(batch.num_rows * row_bytes))
            for row in _batch_rows(batch):
                number += 1
                origin = Origin(name, number)
                fault = BadRow(origin, "invalid_utf8", f"invalid UTF-8: {row}") if isinstance(row, str) else None
                yield RawRow(origin, fault or _without_nulls_at_any_depth(row))
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{name}: cannot be read as Parquet: {one_line(str(error))}") from None


def _batch_rows(batch: Any) -> list[Any]:
    """The rows of an Arrow batch; the reason in the place of one that Python cannot hold."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [error.reason]
    return [row for index in range(batch.num_rows) for row in _batch_rows(batch.slice(index, 1))]


def _without_nulls_at_any_depth(value: Any) -> Any:
    """Arrow gives all objects of a column the same keys; one that was absent cannot be told from one that was null."""
    if isinstance(value, dict):
        return {key: _without_nulls_at_any_depth(item) for key, item in value.items() if item is not None}
    return [_without_nulls_at_any_depth(item) for item in value] if isinstance(value, list) else value
