"""A turn of a row -> Message: roles, text, tool calls, reasoning, and whether it trains.

Keys that change what a row means are understood or refused; any other key (`id`, `timestamp`, a user's `name`)
changes nothing and is ignored. Everything here raises Refused.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sft_dist.data.conversation import REASONING_KEYS, Message, Refused, ToolCall
from sft_dist.data.row_fields import REFUSED_FIELDS
from sft_dist.data.strict_json import (
    check_json,
    check_text,
    clip,
    kind_of,
    list_keys,
    parse_inner_json,
    without_null_fields,
)

ROLES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "developer": "system",
    "function": "tool",
}
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "gpt": "assistant",
    "user": "user",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "function": "tool",
}
TURN_FIELDS_REFUSED = (*REFUSED_FIELDS, "files", "refusal", "tools", "functions")
# Other projects' words for `train`, some of them with the opposite sense: refused even where they are false.
TRAIN_SYNONYMS = ("loss", "loss_weight", "mask", "trainable", "training", "train_detail", "training_detail")


def parse_turns(turns: Any, field: str, *, is_sharegpt: bool = False, is_prompt: bool = False) -> list[Message]:
    """A list of turns. is_sharegpt: ShareGPT's keys and roles are known too. is_prompt: no turn may train."""
    if not isinstance(turns, list):
        raise Refused("bad_structure", f"{field!r} is {kind_of(turns)}; expected a list of turns")
    return [
        _turn(turn, f"{field}[{index}]", is_sharegpt=is_sharegpt, is_prompt=is_prompt)
        for index, turn in enumerate(turns)
    ]


def _turn(turn: Any, where: str, *, is_sharegpt: bool, is_prompt: bool) -> Message:
    role_key, text_key, roles = "role", "content", ROLES
    if is_sharegpt:
        roles = SHAREGPT_ROLES
        if not isinstance(turn, dict) or turn.get("role") is None:
            role_key, text_key = "from", "value"
        elif turn.get("from") is not None:
            raise Refused("bad_structure", f"{where} has both 'from' and 'role'; keep one")
    if not isinstance(turn, dict):
        raise Refused("bad_structure", f"{where} is {kind_of(turn)}; expected an object with {role_key!r}")
    turn = without_null_fields(turn)
    if role_key not in turn:
        raise Refused("bad_structure", f"{where} has no {role_key!r}; its keys are {list_keys(turn)}")
    name = turn[role_key]
    role = roles.get(name) if isinstance(name, str) else None
    if role is None:
        raise Refused("unknown_role", f"{where} has the role {clip(repr(name))}; expected one of {', '.join(roles)}")
    if name == "function_call":
        turn = _call_in_text(turn, f"{where}.{text_key}", text_key)
    if len(turn) == 2 and text_key in turn:  # nothing but a role and a text, as nearly all turns
        content = parse_text(turn[text_key], f"{where}.{text_key}")
        return Message(role, content, train=role == "assistant" and not is_prompt)
    return _rich_turn(turn, where, role=role, text_key=text_key, is_prompt=is_prompt)


def _rich_turn(turn: Mapping[str, Any], where: str, *, role: str, text_key: str, is_prompt: bool) -> Message:
    """A turn with more keys than a role and a text, or without a text."""
    refuse_fields(turn, TURN_FIELDS_REFUSED, where)
    train = _trains(turn, where, role=role, is_prompt=is_prompt)
    tool_calls = _tool_calls(turn, where, role=role)
    reasoning = _reasoning(turn, where, role=role)
    if text_key not in turn and not tool_calls:
        raise Refused("bad_structure", f"{where} has no {text_key!r}; its keys are {list_keys(turn)}")
    if turn.get("tool_call_id") and role != "tool":
        raise Refused("bad_structure", f"{where} has 'tool_call_id', but only tool turns answer a call; this is {role}")
    return Message(
        role,
        parse_text(turn.get(text_key, ""), f"{where}.{text_key}"),
        train=train,
        reasoning=reasoning,
        tool_calls=tool_calls,
        name=_optional_text(turn, "name", where) if role == "tool" else None,
        tool_call_id=_optional_text(turn, "tool_call_id", where) if role == "tool" else None,
    )


# ---------------------------------------------------------------- text


def parse_text(value: Any, where: str) -> str:
    """A string, or a list of `{"type": "text", "text": ...}` parts joined."""
    if isinstance(value, list):
        return "".join([_part(part, f"{where}[{index}]") for index, part in enumerate(value)])
    return check_text(value, where)


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise Refused("bad_structure", f'{where} is no text part; expected {{"type": "text", "text": ...}}')
    if kind != "text":
        raise Refused("unsupported_field", f"{where} has the type {clip(repr(kind))}; only text can be trained on")
    return check_text(part.get("text"), f"{where}.text")


def _optional_text(fields: Mapping[str, Any], key: str, where: str) -> str | None:
    """The text under a key, None if it is absent or empty."""
    return check_text(fields[key], f"{where}.{key}") or None if key in fields else None


def _reasoning(turn: Mapping[str, Any], where: str, *, role: str) -> str | None:
    key, value = find_reasoning(turn, where)
    if key is None:
        return None
    if role != "assistant":
        raise Refused("bad_structure", f"{where} has {key!r}, but only assistant turns reason; this is {role}")
    return check_text(value, f"{where}.{key}")


def find_reasoning(fields: Mapping[str, Any], where: str) -> tuple[str | None, Any]:
    """The key under which a row or turn says what the assistant thought, and its value; no key if it says nothing."""
    given = {key: fields[key] for key in REASONING_KEYS if fields.get(key)}
    if not given:
        return None, None
    key, value = next(iter(given.items()))
    if any(other != value for other in given.values()):
        raise Refused("bad_structure", f"{where} has different texts in {' and '.join(map(repr, given))}; keep one")
    return key, value


# ---------------------------------------------------------------- what trains


def _trains(turn: Mapping[str, Any], where: str, *, role: str, is_prompt: bool) -> bool:
    """What `train` or `weight` says; without them an assistant turn trains, unless it belongs to a prompt."""
    for key in TRAIN_SYNONYMS:
        if key in turn:
            raise Refused(
                "unsupported_field", f"{where} has {key!r}; say which turns train with 'train': true or false"
            )
    says: dict[str, bool] = {}
    if "train" in turn:
        if not isinstance(turn["train"], bool):
            raise _bad_weight(turn, "train", where, "expected true or false")
        says["train"] = turn["train"]
    if "weight" in turn:
        weight = turn["weight"]
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or weight not in (0, 1):
            raise _bad_weight(turn, "weight", where, "expected 0 or 1")
        says["weight"] = weight == 1
    if not says:
        return role == "assistant" and not is_prompt
    if len(set(says.values())) > 1:
        raise Refused("bad_weight", f"{where} has train={turn['train']} and weight={turn['weight']}; keep one of them")
    key, train = next(iter(says.items()))
    if train and role != "assistant":
        raise _bad_weight(turn, key, where, f"only assistant turns train; this is {role}: leave it out")
    if train and is_prompt:
        raise _bad_weight(turn, key, where, "turns of a prompt do not train: move it to 'completion', or leave it out")
    return train


def _bad_weight(turn: Mapping[str, Any], key: str, where: str, mend: str) -> Refused:
    return Refused("bad_weight", f"{where} has {key}={clip(repr(turn[key]))}; {mend}")


# ---------------------------------------------------------------- tools


def parse_tools(row: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """The functions that a row offers, each as `{"type": "function", "function": {"name": ...}}`."""
    given = [key for key in ("tools", "functions") if row.get(key)]
    if not given:
        return ()
    if len(given) == 2 and row["tools"] != row["functions"]:
        raise Refused("bad_structure", "the row has 'tools' and 'functions', and they differ; keep one")
    key = given[0]
    tools = row[key]
    if isinstance(tools, str):
        tools = parse_inner_json(tools, f"'{key}'", expected="a list of functions") if tools.strip() else []
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list):
        raise Refused("bad_structure", f"{key!r} is {kind_of(tools)}; expected a list of functions")
    return tuple([_tool(tool, f"{key}[{index}]") for index, tool in enumerate(tools)])


def _tool(tool: Any, where: str) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise Refused("bad_structure", f"{where} is {kind_of(tool)}; expected an object that describes a function")
    check_json(tool, where)
    _require_function(tool, where)
    function = tool.get("function")
    if function is None:
        function = {key: value for key, value in tool.items() if key not in ("type", "function")}
        tool = {"type": "function", "function": function}
    elif not isinstance(function, dict):
        raise Refused("bad_structure", f"{where}.function is {kind_of(function)}; expected an object with 'name'")
    _function_name(function, where)
    return {"type": "function", **tool}


def _tool_calls(turn: Mapping[str, Any], where: str, *, role: str) -> tuple[ToolCall, ...]:
    calls, older = turn.get("tool_calls"), turn.get("function_call")
    if not calls and not older:
        return ()
    key = "tool_calls" if calls else "function_call"
    if role != "assistant":
        raise Refused("bad_structure", f"{where} has {key!r}, but only assistant turns call tools; this is {role}")
    if calls and older:
        raise Refused("bad_structure", f"{where} has both 'tool_calls' and 'function_call'; keep 'tool_calls'")
    if older:
        return (_tool_call(older, f"{where}.function_call"),)
    if not isinstance(calls, list):
        raise Refused("bad_structure", f"{where}.tool_calls is {kind_of(calls)}; expected a list of calls")
    return tuple([_tool_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)])


def _tool_call(call: Any, where: str) -> ToolCall:
    """`{"id"?, "type": "function", "function": {"name", "arguments"}}`, or what is in its function alone."""
    if not isinstance(call, dict):
        raise Refused("bad_structure", f"{where} is {kind_of(call)}; expected an object with 'name' and 'arguments'")
    call = without_null_fields(call)
    _require_function(call, where)
    function = call.get("function", call)
    if not isinstance(function, dict):
        raise Refused("bad_structure", f"{where}.function is {kind_of(function)}; expected an object with 'name'")
    function = without_null_fields(function)
    name = _function_name(function, where)
    if "arguments" not in function:
        raise Refused(
            "bad_structure", f"{where} has no 'arguments'; write {{}} for a call of {clip(name)!r} without any"
        )
    arguments = function["arguments"]
    if isinstance(arguments, str):
        arguments = parse_inner_json(arguments, f"{where}.arguments", expected="an object")
    if not isinstance(arguments, dict):
        raise Refused(
            "bad_structure", f"{where}.arguments is {kind_of(arguments)}; expected an object or its JSON text"
        )
    check_json(arguments, f"{where}.arguments")
    return ToolCall(name, arguments, _optional_text(call, "id", where))


def _call_in_text(turn: Mapping[str, Any], where: str, text_key: str) -> dict[str, Any]:
    """A ShareGPT function_call turn, whose text is the JSON of a call or a list of calls, as a turn with tool_calls."""
    text = turn.get(text_key)
    if not isinstance(text, str):
        raise Refused("bad_structure", f"{where} is {kind_of(text)}; expected the JSON text of a call")
    calls = parse_inner_json(text, where, expected='{"name": ..., "arguments": {...}} or a list of these')
    if not calls or not isinstance(calls, (dict, list)):
        raise Refused("bad_structure", f"{where} holds {clip(repr(text))}; expected a call or a list of calls")
    if turn.get("tool_calls") or turn.get("function_call"):
        raise Refused("bad_structure", f"{where} is a call and the turn has 'tool_calls' too; keep one")
    return {**turn, text_key: "", "tool_calls": calls if isinstance(calls, list) else [calls]}


def _require_function(fields: Mapping[str, Any], where: str) -> None:
    if fields.get("type") not in (None, "function"):
        raise Refused("unsupported_field", f"{where} has the type {clip(repr(fields['type']))}; expected 'function'")


def _function_name(function: Mapping[str, Any], where: str) -> str:
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        raise Refused("bad_structure", f"{where} has no function name; expected text under 'name'")
    return check_text(name, f"{where}.name")


def refuse_fields(fields: Mapping[str, Any], refused: Sequence[str], where: str) -> None:
    """Refuse the first of these keys that holds something."""
    for key in refused:
        if fields.get(key):
            raise Refused(
                "unsupported_field",
                f"{where} has {key!r}, which is not supported; leaving it out would train something else",
            )
