"""Files and hub data sets -> Conversation. Every row keeps the file and line it came from.

Reading is split in two so that parsing can run in worker processes: `iter_rows` is cheap and yields raw rows
(undecoded bytes of a line, or the dict of a Parquet or hub row); `parse_row` does the work and never raises for
bad data: it returns a `BadRow` that says where and why.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import xxhash

from sft_dist.config import Source
from sft_dist.errors import DataError

SUFFIXES = (".jsonl", ".json", ".parquet")
FORMAT_KEYS = {"messages": ("messages",), "sharegpt": ("conversations",), "alpaca": ("instruction", "output")}
ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
# Fields that change what is trained and that no format here can express yet: refused, because ignoring them trains
# something else than what the row says.
ROW_FIELDS_REFUSED = ("tools", "functions", "images", "videos", "audios")
TURN_FIELDS_REFUSED = ("tool_calls", "tool_call_id", "function_call", "reasoning_content", "thinking")
PARQUET_COLUMNS = (
    "messages",
    "conversations",
    "instruction",
    "input",
    "output",
    "system",
    "history",
    *ROW_FIELDS_REFUSED,
)
NUM_ROWS_TO_DETECT = 100
MAX_LINE_BYTES = 256 * 2**20  # a "line" beyond this is a file without line breaks, which must not fill the memory
UTF8_BOM = b"\xef\xbb\xbf"


class Origin(NamedTuple):
    """Where a row comes from. line: 1-based line of the file; the row number in Parquet files and hub data sets."""

    path: str
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. role: system, user or assistant. train: whether its tokens are responses."""

    role: str
    content: str
    train: bool = False


@dataclass(frozen=True, slots=True)
class Conversation:
    messages: tuple[Message, ...]
    origin: Origin


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be trained on. cause: short key to count by; reason: one sentence for the user."""

    origin: Origin
    cause: str
    reason: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}"


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as read: the bytes of its JSON text, or its columns."""

    origin: Origin
    data: bytes | dict[str, Any]


class _Refused(Exception):
    """Carries cause and reason from where a row is found bad to `parse_row`; never leaves this file."""

    def __init__(self, cause: str, reason: str) -> None:
        super().__init__(reason)
        self.cause, self.reason = cause, reason


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


# ---------------------------------------------------------------- row formats


def detect_format(source: Source) -> str:
    """The format of a source: as the recipe says, or under `auto` the one that most of its first 100 rows have.

    Raises DataError if there are no rows or none of them has the keys of a known format.
    """
    if source.format != "auto":
        return source.format
    votes: Counter[str] = Counter()
    seen: list[str] = []
    for raw in islice(iter_rows(source), NUM_ROWS_TO_DETECT):
        try:
            row = _row_object(raw.data)
        except _Refused:
            continue
        votes.update(name for name, keys in FORMAT_KEYS.items() if all(key in row for key in keys))
        seen += [key for key in row if key not in seen]
    if votes:
        return votes.most_common(1)[0][0]
    known = "; ".join(f"{name} ({', '.join(keys)})" for name, keys in FORMAT_KEYS.items())
    keys = f"the first rows have the keys {', '.join(seen[:20])}" if seen else "there is no readable row"
    raise DataError(f"{source.path}: no known row format: {keys}; expected {known}")


def parse_row(row: RawRow, row_format: str) -> Conversation | BadRow:
    """Turn a raw row into a conversation, all of whose assistant turns train, or say what is wrong with it."""
    try:
        fields = _row_object(row.data)
        _refuse_fields(fields, ROW_FIELDS_REFUSED, "the row")
        messages = _PARSERS[row_format](fields)
        _check_structure(messages)
    except _Refused as refused:
        return BadRow(row.origin, refused.cause, refused.reason)
    return Conversation(tuple(messages), row.origin)


def _row_object(data: bytes | dict[str, Any]) -> dict[str, Any]:
    """The fields of a row without those that are null: Arrow fills keys that other rows have with nulls."""
    row = _parse_json(data) if isinstance(data, bytes) else data
    if not isinstance(row, dict):
        raise _Refused("bad_structure", f"a row is an object with named fields, this is {_kind(row)}")
    return _without_nulls(row)


def _parse_json(raw: bytes) -> Any:
    if b"\x00" in raw:
        raise _Refused("control_character", "contains a NUL byte")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Refused("invalid_utf8", f"invalid UTF-8 at byte {error.start} of the row: {error.reason}") from None
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        raise _Refused("malformed_json", f"malformed JSON at column {error.pos + 1}: {error.msg}") from None
    except (RecursionError, ValueError) as error:
        raise _Refused("malformed_json", f"JSON that cannot be read: {_clip(str(error))}") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _Refused("malformed_json", f"the key {twice!r} occurs twice in one object")
    return found


def _parse_messages(row: Mapping[str, Any]) -> list[Message]:
    return _turns(row, "messages", keys=("role", "content"), roles=ROLES)


def _parse_sharegpt(row: Mapping[str, Any]) -> list[Message]:
    turns = _turns(row, "conversations", keys=("from", "value"), roles=SHAREGPT_ROLES)
    system = _text(row.get("system", ""), "'system'")
    return [Message("system", system), *turns] if system else turns


def _parse_alpaca(row: Mapping[str, Any]) -> list[Message]:
    if row.get("history"):
        raise _Refused(
            "unsupported_field",
            "has earlier turns in 'history', which Alpaca rows cannot hold here; use the messages format",
        )
    for key in FORMAT_KEYS["alpaca"]:
        if key not in row:
            raise _Refused("bad_structure", f"no {key!r}, which an Alpaca row needs; its keys are {_keys(row)}")
    instruction, extra = _text(row["instruction"], "'instruction'"), _text(row.get("input", ""), "'input'")
    system = _text(row.get("system", ""), "'system'")
    prompt = f"{instruction}\n\n{extra}" if extra else instruction
    turns = [Message("user", prompt), Message("assistant", _text(row["output"], "'output'"), train=True)]
    return [Message("system", system), *turns] if system else turns


_PARSERS: dict[str, Callable[[Mapping[str, Any]], list[Message]]] = {
    "messages": _parse_messages,
    "sharegpt": _parse_sharegpt,
    "alpaca": _parse_alpaca,
}


def _turns(row: Mapping[str, Any], field: str, *, keys: tuple[str, str], roles: Mapping[str, str]) -> list[Message]:
    if field not in row:
        raise _Refused("bad_structure", f"no {field!r}; the row's keys are {_keys(row)}")
    turns = row[field]
    if not isinstance(turns, list):
        raise _Refused("bad_structure", f"{field!r} is {_kind(turns)}; expected a list of turns")
    return [_turn(turn, f"{field}[{index}]", keys=keys, roles=roles) for index, turn in enumerate(turns)]


def _turn(turn: Any, where: str, *, keys: tuple[str, str], roles: Mapping[str, str]) -> Message:
    if not isinstance(turn, dict):
        raise _Refused(
            "bad_structure", f"{where} is {_kind(turn)}; expected an object with {keys[0]!r} and {keys[1]!r}"
        )
    turn = _without_nulls(turn)
    _refuse_fields(turn, TURN_FIELDS_REFUSED, where)
    for key in ("weight", "train"):
        if turn.get(key) not in (None, 1):  # True == 1
            raise _Refused("unsupported_field", f"{where} has {key}={turn[key]!r}; all turns train")
    for key in keys:
        if key not in turn:
            raise _Refused("bad_structure", f"{where} has no {key!r}; its keys are {_keys(turn)}")
    name = turn[keys[0]]
    role = roles.get(name) if isinstance(name, str) else None
    if role is None:
        raise _Refused("unknown_role", f"{where} has the role {_clip(repr(name))}; expected one of {', '.join(roles)}")
    return Message(role, _text(turn[keys[1]], f"{where}.{keys[1]}"), train=role == "assistant")


def _check_structure(messages: Sequence[Message]) -> None:
    if not messages:
        raise _Refused("bad_structure", "the conversation is empty")
    if not any(message.train for message in messages):
        raise _Refused(
            "no_assistant_turn",
            f"no assistant turn, nothing to train on; roles are {', '.join(m.role for m in messages[:8])}",
        )
    for index, message in enumerate(messages):
        if message.role != "system" and not message.content.strip():
            raise _Refused("empty_content", f"turn {index + 1} ({message.role}) is empty")
        if index and message.role == "assistant" and message == messages[index - 1]:
            raise _Refused("bad_structure", f"turn {index + 1} repeats the assistant turn before it")


def _text(value: Any, where: str) -> str:
    """A string, or a list of `{"type": "text", "text": ...}` parts joined; UTF-8 can encode it and it has no NUL."""
    if isinstance(value, list):
        value = "".join(_part(part, f"{where}[{index}]") for index, part in enumerate(value))
    if not isinstance(value, str):
        raise _Refused("bad_structure", f"{where} is {_kind(value)}; expected text")
    if "\x00" in value:
        raise _Refused("control_character", f"{where} contains a NUL character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _Refused("invalid_utf8", f"{where} has half a surrogate pair at character {error.start + 1}") from None
    return value


def _part(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise _Refused("bad_structure", f'{where} is not {{"type": "text", "text": ...}}; only text can be trained on')
    return text


def _refuse_fields(fields: Mapping[str, Any], refused: Sequence[str], where: str) -> None:
    for key in refused:
        if fields.get(key):
            raise _Refused(
                "unsupported_field",
                f"{where} has {key!r}, which is not supported; leaving it out would train something else",
            )


def _without_nulls(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}


def _kind(value: Any) -> str:
    names = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), f"a {type(value).__name__}")


def _keys(fields: Mapping[str, Any]) -> str:
    return _clip(", ".join(map(repr, fields))) or "none"


def _clip(text: str, limit: int = 120) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
