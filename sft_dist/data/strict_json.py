"""JSON as rows hold it: UTF-8 without NULs, no key twice, and errors that say where."""

import json
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from sft_dist.data.conversation import Refused

# Templates and `json.dumps` recurse: far below Python's limit, far above what a tool's arguments need.
MAX_DEPTH = 100


def parse_json(raw: bytes) -> Any:
    """The value of a row's JSON text. Raises Refused."""
    if b"\x00" in raw:
        raise Refused("control_character", "contains a NUL byte")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused("invalid_utf8", f"invalid UTF-8 at byte {error.start} of the row: {error.reason}") from None
    try:
        return _decode(text)
    except json.JSONDecodeError as error:
        raise Refused("malformed_json", f"malformed JSON at column {error.pos + 1}: {error.msg}") from None
    except (RecursionError, ValueError) as error:
        raise Refused("malformed_json", f"JSON that cannot be read: {clip(str(error))}") from None


def parse_inner_json(text: str, where: str, *, expected: str) -> Any:
    """The value of a JSON text that is itself a field of a row. Raises Refused."""
    try:
        return _decode(text)
    except json.JSONDecodeError as error:
        found = f"no JSON at column {error.pos + 1}: {error.msg}"
        # str() of a Python list, which is what a data frame writes into a CSV file.
        hint = "; JSON has double quotes: write it with json.dumps" if text[:3].lstrip("[{").startswith("'") else ""
        raise Refused("bad_structure", f"{where} is {found}; expected the JSON text of {expected}{hint}") from None
    except Refused as refused:
        raise Refused("bad_structure", f"{where} holds malformed JSON: {refused.reason}") from None
    except (RecursionError, ValueError) as error:
        raise Refused("bad_structure", f"{where} holds JSON that cannot be read: {clip(str(error))}") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise Refused("malformed_json", f"the key {clip(repr(twice))} occurs twice in one object")
    return found


# One decoder for all rows: json.loads would make a new one, which costs as much as a short row.
_decode = json.JSONDecoder(object_pairs_hook=_unique_keys).decode


def check_text(value: Any, where: str) -> str:
    """`value` if it is a string that UTF-8 can encode and that has no NUL. Raises Refused."""
    if not isinstance(value, str):
        raise Refused("bad_structure", f"{where} is {kind_of(value)}; expected text")
    if "\x00" in value:
        raise Refused("control_character", f"{where} contains a NUL character")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise Refused("invalid_utf8", f"{where} has half a surrogate pair at character {error.start + 1}") from None
    return value


def check_json(value: Any, where: str) -> None:
    """Refuse a value that has no JSON text, or one that `check_text` refuses somewhere in it."""
    pending = [(value, 0)]
    while pending:
        item, depth = pending.pop()
        if depth > MAX_DEPTH:
            raise Refused("bad_structure", f"{where} is nested more than {MAX_DEPTH} deep")
        if isinstance(item, str):
            check_text(item, where)
        elif isinstance(item, dict):
            for key, inner in item.items():
                check_text(key, f"a key of {where}")
                pending.append((inner, depth + 1))
        elif isinstance(item, list):
            pending += [(inner, depth + 1) for inner in item]
        elif isinstance(item, float):
            if not math.isfinite(item):
                raise Refused("bad_structure", f"{where} holds {item}, a number that JSON does not have")
        elif item is not None and not isinstance(item, int):
            raise Refused("bad_structure", f"{where} holds {kind_of(item)}, which JSON does not have")


def without_null_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a row or turn but those that are null, which count as absent; nulls further inside stay."""
    if None not in fields.values():
        return fields
    return {key: value for key, value in fields.items() if value is not None}


def kind_of(value: Any) -> str:
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


def list_keys(fields: Iterable[str]) -> str:
    return clip(", ".join(map(repr, fields))) or "none"


def one_line(text: str, limit: int = 300) -> str:
    """The text of another library's error, for the middle of a line."""
    return clip(" ".join(text.split()), limit)


def clip(text: str, limit: int = 120) -> str:
    """The text, cut to so many characters, the last of which then says that it was cut."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
