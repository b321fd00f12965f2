"""Raw row -> Conversation: the row formats that people have, and what is wrong with a row.

    messages            messages: [{role, content, ...}, ...]
    prompt_completion   prompt, completion: texts, or lists of such turns; turns of the prompt do not train
    alpaca              instruction, input?, output, history?: [[question, answer], ...]
    sharegpt            conversations: [{from, value}, ...]

Every format may have `system` and `tools` beside these, and `reasoning` where the answer is one text. `parse_row` never
raises for bad data: it returns a `BadRow` that says where and why.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from sft_dist.config import Source
from sft_dist.data.conversation import BadRow, Conversation, Message, RawRow, Refused
from sft_dist.data.files import iter_rows
from sft_dist.data.row_fields import FORMAT_KEYS, REFUSED_FIELDS, WEIGHT_FIELDS
from sft_dist.data.strict_json import (
    check_text,
    clip,
    kind_of,
    list_keys,
    parse_inner_json,
    parse_json,
    without_null_fields,
)
from sft_dist.data.turns import find_reasoning, parse_text, parse_tools, parse_turns, refuse_fields
from sft_dist.errors import DataError

NUM_ROWS_TO_DETECT = 100
# What is a list in JSON may be its text in a cell of a table, which CSV cannot write otherwise.
JSON_CELLS = {"messages": ("messages",), "sharegpt": ("conversations",), "alpaca": ("history",)}
# A prompt or a completion may be any text, also one that begins with a bracket.
TURNS_IN_CELL = re.compile(r"""\s*\[\s*\{\s*["'](role|content)["']\s*:""")


def detect_format(source: Source) -> str:
    """The format of a source: as the recipe says, or under `auto` the one that most of its first 100 rows have.

    Raises DataError if there are no rows or none of them has the keys of a known format; it says which keys they have,
    or what is wrong with the first of them.
    """
    if source.format != "auto":
        return source.format
    votes: Counter[str] = Counter()
    seen: list[str] = []
    first_bad: BadRow | None = None
    for raw in islice(iter_rows(source), NUM_ROWS_TO_DETECT):
        row = _readable(raw)
        if isinstance(row, BadRow):
            first_bad = first_bad or row
            continue
        votes.update(_formats_of(row))
        seen += [key for key in row if key not in seen]
    if votes:
        return votes.most_common(1)[0][0]
    known = "; ".join(f"{name} ({', '.join(keys)})" for name, keys in FORMAT_KEYS.items())
    found = f"the first rows have the keys {list_keys(seen)}" if seen else "there is no readable row"
    if first_bad is not None and not seen:
        found += f": {first_bad}"
    raise DataError(f"{source.path}: no known row format: {found}; expected {known}")


def parse_row(
    row: RawRow, row_format: str, *, turns: str = "all", difficulty_field: str | None = None
) -> Conversation | BadRow:
    """Turn a raw row into a conversation, or say what is wrong with it.

    turns: which assistant turns train unless the row says otherwise, all or last.
    difficulty_field: the key of the row's difficulty, dotted where it is nested; every row must have it.
    """
    if isinstance(row.data, BadRow):
        return row.data
    try:
        fields = _row_fields(row.data)
        refuse_fields(fields, REFUSED_FIELDS, "the row")
        _require_keys(fields, row_format)
        is_table = isinstance(row.data, dict)
        if is_table:
            fields = _parse_cells(fields, row_format)
        _check_weight(fields, is_table=is_table)
        messages = _with_reasoning(_PARSERS[row_format](fields), fields, row_format)
        if "system" in fields:
            messages = _with_system(messages, fields["system"])
        _check_structure(messages)
        messages = _choose_trained(messages, turns=turns)
        tools = parse_tools(fields)
        difficulty = None if difficulty_field is None else _difficulty(fields, difficulty_field, is_table=is_table)
    except Refused as refused:
        return BadRow(row.origin, refused.cause, refused.reason)
    return Conversation(tuple(messages), row.origin, tools, difficulty)


def read_field(row: RawRow, field: str) -> Any:
    """A field of a row by its name, dotted where it is nested; None where there is none, or the row cannot be read."""
    fields = _readable(row)
    return None if isinstance(fields, BadRow) else _field(fields, field)


# ---------------------------------------------------------------- the row


def _field(row: Mapping[str, Any], field: str) -> Any:
    value: Any = row.get(field)
    if value is None:
        value = row
        for key in field.split("."):
            value = value.get(key) if isinstance(value, dict) else None
    return value


def _row_fields(data: bytes | dict[str, Any]) -> dict[str, Any]:
    row = parse_json(data) if isinstance(data, bytes) else data
    if not isinstance(row, dict):
        raise Refused("bad_structure", f"a row is an object with named fields, this is {kind_of(row)}")
    return without_null_fields(row)


def _readable(raw: RawRow) -> dict[str, Any] | BadRow:
    if isinstance(raw.data, BadRow):
        return raw.data
    try:
        return _row_fields(raw.data)
    except Refused as refused:
        return BadRow(raw.origin, refused.cause, refused.reason)


def _formats_of(row: Mapping[str, Any]) -> list[str]:
    return [name for name, keys in FORMAT_KEYS.items() if all(key in row for key in keys)]


def _require_keys(row: Mapping[str, Any], row_format: str) -> None:
    for key in FORMAT_KEYS[row_format]:
        if key not in row:
            found = _formats_of(row)
            if not found:
                raise Refused("bad_structure", f"no {key!r}; the row's keys are {list_keys(row)}")
            has = " and ".join(map(repr, FORMAT_KEYS[found[0]]))
            raise Refused(
                "bad_structure",
                f"no {key!r}; the row has {has}, which is the {found[0]} format, and this source is read as "
                f"{row_format}: set its format in the recipe, or split the file",
            )


def _parse_cells(row: dict[str, Any], row_format: str) -> dict[str, Any]:
    """A row of CSV or Parquet with the JSON in its text cells parsed. `tools` may be JSON text in every row.

    Each cell is read by itself: what other columns hold must not change what it means.
    """
    parsed = dict(row)
    for key in JSON_CELLS.get(row_format, ()):
        text = row.get(key)
        if isinstance(text, str) and text.lstrip().startswith("["):
            parsed[key] = parse_inner_json(text, repr(key), expected="a list")
    if row_format == "prompt_completion":
        for key in FORMAT_KEYS[row_format]:
            text = row[key]
            if isinstance(text, str) and TURNS_IN_CELL.match(text):
                parsed[key] = parse_inner_json(text, repr(key), expected="a list of turns")
    return parsed


def _check_weight(row: Mapping[str, Any], *, is_table: bool) -> None:
    """Refuse a weight of the whole row but 1, which says nothing. In tables it may be written as text."""
    for key in WEIGHT_FIELDS:
        if key not in row:
            continue
        value = row[key]
        is_one = isinstance(value, (int, float)) and value == 1
        if not is_one and not (is_table and isinstance(value, str) and value.casefold() in ("1", "1.0", "true")):
            shown = clip(repr(value)) if isinstance(value, (str, bool, int, float)) else kind_of(value)
            raise Refused(
                "bad_weight", f"the row has {key}={shown}; weights are given per turn, or per source in the recipe"
            )


def _difficulty(row: Mapping[str, Any], field: str, *, is_table: bool) -> float:
    value = _field(row, field)
    if value is None:
        raise Refused("bad_difficulty", f"no {field!r}, by which data.order sorts; the row's keys are {list_keys(row)}")
    try:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        # float() takes Python's 1_000 too.
        is_number = is_number or (is_table and isinstance(value, str) and "_" not in value)
        number = float(value) if is_number else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        shown = clip(repr(value)) if isinstance(value, (str, bool, float)) else kind_of(value)
        raise Refused("bad_difficulty", f"{field!r} is {shown}; data.order sorts by it: expected a finite number")
    return number


# ---------------------------------------------------------------- formats


def _parse_messages(row: Mapping[str, Any]) -> list[Message]:
    return parse_turns(row["messages"], "messages")


def _parse_sharegpt(row: Mapping[str, Any]) -> list[Message]:
    return parse_turns(row["conversations"], "conversations", is_sharegpt=True)


def _parse_prompt_completion(row: Mapping[str, Any]) -> list[Message]:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list):
        before = parse_turns(prompt, "prompt", is_prompt=True)
    else:
        before = [Message("user", check_text(prompt, "'prompt'"))]
    if not isinstance(completion, list):
        return [*before, Message("assistant", check_text(completion, "'completion'"), train=True)]
    after = parse_turns(completion, "completion")
    if not after or after[0].role != "assistant":
        first = f"begins with a {after[0].role} turn, which belongs in 'prompt'" if after else "is empty"
        raise Refused("bad_structure", f"'completion' {first}; expected an assistant turn first")
    return [*before, *after]


def _parse_alpaca(row: Mapping[str, Any]) -> list[Message]:
    """The answers of `history` are assistant turns like any other: they train unless data.turns is last."""
    instruction, extra = check_text(row["instruction"], "'instruction'"), check_text(row.get("input", ""), "'input'")
    prompt = f"{instruction}\n\n{extra}" if instruction and extra else instruction or extra
    answer = Message("assistant", check_text(row["output"], "'output'"), train=True)
    return [*_history(row.get("history", [])), Message("user", prompt), answer]


def _history(history: Any) -> list[Message]:
    if not isinstance(history, list):
        raise Refused("bad_structure", f"'history' is {kind_of(history)}; expected a list of [question, answer] pairs")
    turns: list[Message] = []
    for index, pair in enumerate(history):
        where = f"history[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            what = f"a list of {len(pair)}" if isinstance(pair, list) else kind_of(pair)
            raise Refused("bad_structure", f"{where} is {what}; expected a pair [question, answer]")
        turns.append(Message("user", check_text(pair[0], f"{where}[0]")))
        turns.append(Message("assistant", check_text(pair[1], f"{where}[1]"), train=True))
    return turns


_PARSERS: dict[str, Callable[[Mapping[str, Any]], list[Message]]] = {
    "messages": _parse_messages,
    "prompt_completion": _parse_prompt_completion,
    "alpaca": _parse_alpaca,
    "sharegpt": _parse_sharegpt,
}


def _with_reasoning(messages: list[Message], row: Mapping[str, Any], row_format: str) -> list[Message]:
    """The turns with the reasoning that a row has beside its answer, which must be one text and so is the last turn."""
    key, value = find_reasoning(row, "the row")
    if key is None:
        return messages
    if row_format != "alpaca" and not (row_format == "prompt_completion" and isinstance(row["completion"], str)):
        raise Refused(
            "unsupported_field",
            f"the row has {key!r} beside a list of turns; give it to the turn whose reasoning it is",
        )
    return [*messages[:-1], replace(messages[-1], reasoning=check_text(value, repr(key)))]


def _with_system(messages: list[Message], system: Any) -> list[Message]:
    """The turns behind the system prompt that a row has beside them. Said twice in the same words, it counts once."""
    text = parse_text(system, "'system'")
    if not text:
        return messages
    if messages and messages[0].role == "system":
        if messages[0].content != text:
            raise Refused("bad_structure", "the row has 'system' and a first system turn that differs; keep one")
        return messages
    return [Message("system", text), *messages]


# ---------------------------------------------------------------- the conversation


def _choose_trained(messages: list[Message], *, turns: str) -> list[Message]:
    """Leave `train` to the last assistant turn alone if turns is last. Raises Refused if nothing trains."""
    if turns == "last":
        last = max(index for index, message in enumerate(messages) if message.role == "assistant")
        if not messages[last].train:
            raise Refused(
                "no_response",
                f"the last assistant turn (turn {last + 1}) has train: false, and data.turns is last, so that nothing "
                "trains; leave the row out or let the turn train",
            )
        return [
            replace(message, train=False) if message.train and index != last else message
            for index, message in enumerate(messages)
        ]
    if not any([message.train for message in messages]):
        raise Refused(
            "no_response",
            "every assistant turn has train: false, or weight: 0; leave the row out or let a turn train",
        )
    return messages


def _check_structure(messages: Sequence[Message]) -> None:
    if not messages:
        raise Refused("bad_structure", "the conversation is empty")
    is_answered = has_tool_turn = False
    before: Message | None = None
    for index, message in enumerate(messages):
        role, content = message.role, message.content
        if (not content or content.isspace()) and (role == "user" or (role == "assistant" and not message.tool_calls)):
            raise Refused("empty_content", f"turn {index + 1} ({role}) is empty; leave it out or give it a text")
        if role == "assistant":
            is_answered = True
            if before is not None and before.role == role and _says_the_same(message, before):
                raise Refused("bad_structure", f"turn {index + 1} repeats the assistant turn before it")
        has_tool_turn = has_tool_turn or role == "tool"
        before = message
    if not is_answered:
        roles = ", ".join(message.role for message in messages[:8])
        raise Refused("no_assistant_turn", f"no assistant turn, nothing to train on; roles are {roles}")
    if has_tool_turn:
        _check_tool_turns(messages)


def _says_the_same(one: Message, other: Message) -> bool:
    return (one.content, one.reasoning, one.tool_calls) == (other.content, other.reasoning, other.tool_calls)


def _check_tool_turns(messages: Sequence[Message]) -> None:
    """Every tool turn comes after an assistant turn, and names a call that was made if it names one.

    The calls themselves may stand in the text, as in rows that were rendered once already.
    """
    ids: set[str | None] = set()
    is_answered = False
    for index, message in enumerate(messages):
        is_answered = is_answered or message.role == "assistant"
        ids.update(call.id for call in message.tool_calls)
        if message.role != "tool":
            continue
        if not is_answered:
            raise Refused("bad_structure", f"turn {index + 1} (tool) answers nothing: no assistant turn is before it")
        if message.tool_call_id is not None and ids and message.tool_call_id not in ids and None not in ids:
            known = list_keys(sorted(filter(None, ids)))
            raise Refused(
                "bad_structure",
                f"turn {index + 1} (tool) has the tool_call_id {clip(repr(message.tool_call_id), 60)}; "
                f"the calls before it are {known}",
            )
