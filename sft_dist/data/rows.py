"""Raw row -> Conversation: the row formats that people have, and what is wrong with a row.

`parse_row` never raises for bad data: it returns a `BadRow` that says where and why.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

from sft_dist.config import Source
from sft_dist.data.conversation import BadRow, Conversation, Message, RawRow, Refused
from sft_dist.data.files import iter_rows
from sft_dist.errors import DataError

FORMAT_KEYS = {"messages": ("messages",), "sharegpt": ("conversations",), "alpaca": ("instruction", "output")}
ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
# Fields that change what is trained and that no format here can express yet: refused, because ignoring them trains
# something else than what the row says.
ROW_FIELDS_REFUSED = ("tools", "functions", "images", "videos", "audios")
TURN_FIELDS_REFUSED = ("tool_calls", "tool_call_id", "function_call", "reasoning_content", "thinking")
NUM_ROWS_TO_DETECT = 100


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
        except Refused:
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
    except Refused as refused:
        return BadRow(row.origin, refused.cause, refused.reason)
    return Conversation(tuple(messages), row.origin)


def _row_object(data: bytes | dict[str, Any]) -> dict[str, Any]:
    """The fields of a row without those that are null: Arrow fills keys that other rows have with nulls."""
    row = _parse_json(data) if isinstance(data, bytes) else data
    if not isinstance(row, dict):
        raise Refused("bad_structure", f"a row is an object with named fields, this is {_kind(row)}")
    return _without_nulls(row)


def _parse_json(raw: bytes) -> Any:
    if b"\x00" in raw:
        raise Refused("control_character", "contains a NUL byte")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused("invalid_utf8", f"invalid UTF-8 at byte {error.start} of the row: {error.reason}") from None
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        raise Refused("malformed_json", f"malformed JSON at column {error.pos + 1}: {error.msg}") from None
    except (RecursionError, ValueError) as error:
        raise Refused("malformed_json", f"JSON that cannot be read: {_clip(str(error))}") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise Refused("malformed_json", f"the key {twice!r} occurs twice in one object")
    return found


def _parse_messages(row: Mapping[str, Any]) -> list[Message]:
    return _turns(row, "messages", keys=("role", "content"), roles=ROLES)


def _parse_sharegpt(row: Mapping[str, Any]) -> list[Message]:
    turns = _turns(row, "conversations", keys=("from", "value"), roles=SHAREGPT_ROLES)
    system = _text(row.get("system", ""), "'system'")
    return [Message("system", system), *turns] if system else turns


def _parse_alpaca(row: Mapping[str, Any]) -> list[Message]:
    if row.get("history"):
        raise Refused(
            "unsupported_field",
            "has earlier turns in 'history', which Alpaca rows cannot hold here; use the messages format",
        )
    for key in FORMAT_KEYS["alpaca"]:
        if key not in row:
            raise Refused("bad_structure", f"no {key!r}, which an Alpaca row needs; its keys are {_keys(row)}")
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
        raise Refused("bad_structure", f"no {field!r}; the row's keys are {_keys(row)}")
    turns = row[field]
    if not isinstance(turns, list):
        raise Refused("bad_structure", f"{field!r} is {_kind(turns)}; expected a list of turns")
    return [_turn(turn, f"{field}[{index}]", keys=keys, roles=roles) for index, turn in enumerate(turns)]


def _turn(turn: Any, where: str, *, keys: tuple[str, str], roles: Mapping[str, str]) -> Message:
    if not isinstance(turn, dict):
        raise Refused("bad_structure", f"{where} is {_kind(turn)}; expected an object with {keys[0]!r} and {keys[1]!r}")
    turn = _without_nulls(turn)
    _refuse_fields(turn, TURN_FIELDS_REFUSED, where)
    for key in ("weight", "train"):
        if turn.get(key) not in (None, 1):  # True == 1
            raise Refused("unsupported_field", f"{where} has {key}={turn[key]!r}; all turns train")
    for key in keys:
        if key not in turn:
            raise Refused("bad_structure", f"{where} has no {key!r}; its keys are {_keys(turn)}")
    name = turn[keys[0]]
    role = roles.get(name) if isinstance(name, str) else None
    if role is None:
        raise Refused("unknown_role", f"{where} has the role {_clip(repr(name))}; expected one of {', '.join(roles)}")
    return Message(role, _text(turn[keys[1]], f"{where}.{keys[1]}"), train=role == "assistant")


def _check_structure(messages: Sequence[Message]) -> None:
    if not messages:
        raise Refused("bad_structure", "the conversation is empty")
    if not any(message.train for message in messages):
        raise Refused(
            "no_assistant_turn",
            f"no assistant turn, nothing to train on; roles are {', '.join(m.role for m in messages[:8])}",
        )
    for index, message in enumerate(messages):
        if message.role != "system" and not message.content.strip():
            raise Refused("empty_content", f"turn {index + 1} ({message.role}) is empty")
        if index and message.role == "assistant" and message == messages[index - 1]:
            raise Refused("bad_structure", f"turn {index + 1} repeats the assistant turn before it")


def _text(value: Any, where: str) -> str:
    """A string, or a list of `{"type": "text", "text": ...}` parts joined; UTF-8 can encode it and it has no NUL."""
    if isinstance(value, list):
        value = "".join(_part(part, f"{where}[{index}]") for index, part in enumerate(value))
    if not isinstance(value, str):
        raise Refused("bad_structure", f"{where} is {_kind(value)}; expected text")
    if "\x00" in value:
        raise Refused("control_character", f"{where} contains a NUL character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Refused("invalid_utf8", f"{where} has half a surrogate pair at character {error.start + 1}") from None
    return value


def _part(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise Refused("bad_structure", f'{where} is not {{"type": "text", "text": ...}}; only text can be trained on')
    return text


def _refuse_fields(fields: Mapping[str, Any], refused: Sequence[str], where: str) -> None:
    for key in refused:
        if fields.get(key):
            raise Refused(
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
