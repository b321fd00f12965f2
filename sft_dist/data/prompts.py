"""Rows to prompts: what a model is asked by a row of any format that training reads, with or without its answer.

{"messages": [system, user, assistant]}      asked: system, user
{"messages": [user, assistant, user]}        asked: all three
{"prompt": "..."}  {"instruction": "..."}    the answer of a format may be missing
"""

import json
from dataclasses import dataclass
from typing import Any

from sft_dist.config import Source
from sft_dist.data.conversation import BadRow, Message, Origin, RawRow, Refused
from sft_dist.data.files import iter_rows
from sft_dist.data.row_fields import FORMAT_KEYS
from sft_dist.data.rows import parse_row
from sft_dist.data.strict_json import list_keys, parse_inner_json, parse_json
from sft_dist.errors import DataError

NUM_LISTED = 20
TURN_FORMATS = {"messages": ("role", "content"), "sharegpt": ("from", "value")}
ASSISTANT_ROLES = ("assistant", "gpt", "function_call")
PLACEHOLDER = "?"
"""Stands where the answer will be while a row is read by the rules of training, and goes again."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """row: as it was read. messages: what the model is asked. tools: what it may call."""

    row: dict[str, Any]
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    origin: Origin


def read_prompts(source: Source) -> list[Prompt]:
    """The prompts of all rows of a source, in order.

    Raises DataError listing the first rows that hold none, as `file:line: reason`, or when there is no row at all.
    """
    found = [_prompt(raw) for raw in iter_rows(source)]
    bad = [row for row in found if isinstance(row, BadRow)]
    if bad:
        listed = [str(row) for row in bad[:NUM_LISTED]] + ["..."] * (len(bad) > NUM_LISTED)
        raise DataError("\n".join([f"{len(bad)} of {len(found)} rows cannot be answered; mend them:", *listed]))
    if not found:
        raise DataError(f"{source.path}: no rows; expected one a prompt")
    return [row for row in found if isinstance(row, Prompt)]


def _prompt(raw: RawRow) -> Prompt | BadRow:
    if isinstance(raw.data, BadRow):
        return raw.data
    try:
        row = parse_json(raw.data) if isinstance(raw.data, bytes) else raw.data
        if not isinstance(row, dict):
            raise Refused("bad_structure", "a row is an object with named fields")
        row_format = next((name for name, keys in FORMAT_KEYS.items() if row.get(keys[0]) is not None), None)
        if row_format is None:
            known = ", ".join(keys[0] for keys in FORMAT_KEYS.values())
            raise Refused("bad_structure", f"no prompt: the row's keys are {list_keys(row)}; expected one of {known}")
        answered: Any = _answered(row, row_format)
        # A row of a table may hold JSON text in its cells, one of JSON may not: each is read as what it is.
        data = json.dumps(answered).encode() if isinstance(raw.data, bytes) else answered
        parsed = parse_row(RawRow(raw.origin, data), row_format, turns="last")
        if isinstance(parsed, BadRow):
            return parsed
        if len(parsed.messages) < 2:
            raise Refused("bad_structure", "nothing is asked: the answer is the only turn")
    except Refused as refused:
        return BadRow(raw.origin, refused.cause, refused.reason)
    return Prompt(row, parsed.messages[:-1], parsed.tools, raw.origin)


def _answered(row: dict[str, Any], row_format: str) -> dict[str, Any]:
    """The row with a placeholder for its last answer, given or not."""
    field, *answer = FORMAT_KEYS[row_format]
    if answer:
        return {**row, answer[0]: PLACEHOLDER}
    turns = row[field]
    if isinstance(turns, str):
        turns = parse_inner_json(turns, repr(field), expected="a list")
    if not isinstance(turns, list):
        return row  # refused like any other row of training
    role, text = TURN_FORMATS[row_format]
    if turns and isinstance(turns[-1], dict) and {turns[-1].get("role"), turns[-1].get("from")} & {*ASSISTANT_ROLES}:
        turns = turns[:-1]
    return {**row, field: [*turns, {role: "assistant", text: PLACEHOLDER}]}
