"""Rows to conversations: every format gives exactly its turns, and every refused row says what to mend."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.config import Source
from sft_dist.data.conversation import (
    REASONING_KEYS,
    BadRow,
    Conversation,
    Message,
    Origin,
    RawRow,
    ToolCall,
)
from sft_dist.data.rows import detect_format, parse_row
from sft_dist.data.strict_json import clip, one_line
from sft_dist.errors import DataError

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
CHAT = {"messages": [USER, ANSWER]}
EXPECTED = (Message("user", "hi"), Message("assistant", "yes", train=True))
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": null}'}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
SCHEMA = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
BIG = "x" * 10**6


def parse(row: Any, row_format: str = "messages", **settings: Any) -> Conversation | BadRow:
    """row: bytes of a JSON text, or what is to be written as one."""
    data = row if isinstance(row, bytes) else json.dumps(row).encode()
    return parse_row(RawRow(Origin("f.jsonl", 3), data), row_format, **settings)


def parse_columns(row: dict[str, Any], row_format: str, **settings: Any) -> Conversation | BadRow:
    return parse_row(RawRow(Origin("f.csv", 3), row), row_format, **settings)


def accepted(result: Conversation | BadRow) -> Conversation:
    assert isinstance(result, Conversation), str(result)
    return result


def trained(result: Conversation | BadRow) -> list[str]:
    return [message.content for message in accepted(result).messages if message.train]


def check_refused(result: Conversation | BadRow, cause: str, reason: str) -> None:
    assert isinstance(result, BadRow), result
    assert (result.cause, reason in result.reason) == (cause, True), str(result)
    assert len(result.reason) < 350
    assert result.origin.line == 3


def write_rows(path: Path, *rows: dict[str, Any]) -> Source:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(path=str(path))


def messages(*turns: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(turns)}


def answer(**fields: Any) -> dict[str, Any]:
    """A row whose answer has these fields too."""
    return messages(USER, ANSWER | fields)


def called(**fields: Any) -> dict[str, Any]:
    """A row whose one tool call has these fields too."""
    return messages(USER, CALLS | {"tool_calls": [CALL | fields]})


def arguments(value: Any) -> dict[str, Any]:
    return called(function={"name": "add", "arguments": value})


def sharegpt(*turns: tuple[str, str], **fields: Any) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": text} for role, text in turns], **fields}


# ---------------------------------------------------------------- detection


@pytest.mark.parametrize(
    ("row", "row_format"),
    [
        (CHAT, "messages"),
        (CHAT | {"conversations": None, "instruction": None, "output": None}, "messages"),
        (CHAT | {"prompt": "hi", "prompt_id": "7"}, "messages"),
        ({"prompt": "hi", "completion": "yes"}, "prompt_completion"),
        ({"instruction": "hi", "output": "yes"}, "alpaca"),
        ({"instruction": "hi", "input": None, "output": "yes", "messages": None, "id": 3}, "alpaca"),
        (sharegpt(("human", "hi"), ("gpt", "yes")), "sharegpt"),
        (sharegpt(("user", "hi"), ("assistant", "yes"), messages=None), "sharegpt"),
        ({"conversations": [USER, ANSWER | {"from": None, "value": None}]}, "sharegpt"),
    ],
)
def test_formats_are_detected_and_mean_the_same(tmp_path: Path, row: dict[str, Any], row_format: str) -> None:
    assert detect_format(write_rows(tmp_path / "d.jsonl", row)) == row_format
    assert accepted(parse(row, row_format)).messages == EXPECTED


def test_most_common_format_of_the_first_rows_wins(tmp_path: Path) -> None:
    odd = {"instruction": "a", "output": "b"}
    assert detect_format(write_rows(tmp_path / "d.jsonl", odd, CHAT, CHAT)) == "messages"
    assert detect_format(write_rows(tmp_path / "e.jsonl", *[odd] * 51, *[CHAT] * 200)) == "alpaca"


def test_rows_of_another_format_are_refused_and_say_which_they_look_like() -> None:
    result = parse({"instruction": "a", "output": "b"})
    check_refused(result, "bad_structure", "no 'messages'; the row has 'instruction' and 'output', which is the alpaca")
    check_refused(result, "bad_structure", "read as messages: set its format")
    check_refused(parse(CHAT, "sharegpt"), "bad_structure", "'messages', which is the messages format")
    check_refused(parse({"question": "a"}), "bad_structure", "no 'messages'; the row's keys are 'question'")


def test_unknown_format_names_the_keys_that_were_found(tmp_path: Path) -> None:
    known = r"expected messages .*prompt_completion \(prompt, comp"
    with pytest.raises(DataError, match=rf"keys 'question', '\\x1b\[31m'; {known}") as caught:
        detect_format(write_rows(tmp_path / "d.jsonl", {"question": "a", "\x1b[31m": "b"}))
    assert "\x1b" not in str(caught.value)


def test_a_file_without_a_readable_row_says_what_is_wrong_with_the_first(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_bytes(b'\n{"messages": \xff}\n[1]\n')
    with pytest.raises(DataError, match=rf"no readable row: {re.escape(str(file))}:2: invalid UTF-8 at byte 13"):
        detect_format(Source(path=str(file)))
    file = tmp_path / "d.csv"
    file.write_text("instruction,output\na,b,c\n")
    with pytest.raises(DataError, match=r"d\.csv:2: 3 cells under a header of 2"):
        detect_format(Source(path=str(file)))


def test_rows_that_were_refused_while_reading_stay_refused() -> None:
    bad = BadRow(Origin("f.csv", 3), "bad_structure", "3 cells, the header has 2")
    assert parse_row(RawRow(bad.origin, bad), "alpaca") is bad


# ---------------------------------------------------------------- golden rows


def test_messages_row_with_everything() -> None:
    row = {
        "tools": [{"name": "add", "description": None, "parameters": {"type": "object"}}],
        "messages": [
            {"role": "developer", "content": "Be brief.", "timestamp": 12},
            {"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}], "name": "Al"},
            {**CALLS, "reasoning_content": "Add them.", "weight": 0, "id": "m3"},
            {"role": "tool", "content": "", "tool_call_id": "c1", "name": "add"},
            {"role": "assistant", "content": "2", "reasoning": "", "tool_calls": [], "train": True, "weight": 1.0},
            {"role": "user", "content": "Thanks.", "train": False},
        ],
    }
    conversation = accepted(parse(row))
    call = ToolCall("add", {"a": 1, "b": None}, "c1")
    assert conversation.messages == (
        Message("system", "Be brief."),
        Message("user", "1+1?"),
        Message("assistant", "", reasoning="Add them.", tool_calls=(call,)),
        Message("tool", "", name="add", tool_call_id="c1"),
        Message("assistant", "2", train=True),
        Message("user", "Thanks."),
    )
    assert conversation.tools == ({"type": "function", "function": row["tools"][0]},)
    assert conversation.origin == Origin("f.jsonl", 3)


def test_older_function_calls_are_tool_calls() -> None:
    call = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    row = messages(USER, call, {"role": "function", "name": "f", "content": "7"}, ANSWER)
    assert accepted(parse(row | {"functions": [{"name": "f"}]})).messages[1:3] == (
        Message("assistant", "", train=True, tool_calls=(ToolCall("f", {}),)),
        Message("tool", "7", name="f"),
    )


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        CALL["function"],
        {"name": "add", "arguments": {"a": 1, "b": None}, "id": None},
        {"function": {"name": "add", "arguments": {"a": 1, "b": None}}, "type": None, "index": 0},
    ],
)
def test_spellings_of_a_tool_call_mean_the_same(call: dict[str, Any]) -> None:
    (found,) = accepted(parse(messages(USER, CALLS | {"tool_calls": [call]}))).messages[1].tool_calls
    assert (found.name, found.arguments) == ("add", {"a": 1, "b": None})


@pytest.mark.parametrize(
    "tools",
    [
        [SCHEMA],
        SCHEMA,
        [SCHEMA["function"]],
        [{"type": "function"} | SCHEMA["function"]],
        [{"function": SCHEMA["function"]}],
        json.dumps([SCHEMA]),
        json.dumps(SCHEMA["function"]),
    ],
)
@pytest.mark.parametrize("key", ["tools", "functions"])
def test_spellings_of_tools_mean_the_same_in_every_format(tools: Any, key: str) -> None:
    for row, row_format in [(CHAT, "messages"), (sharegpt(("human", "hi"), ("gpt", "yes")), "sharegpt")]:
        assert accepted(parse(row | {key: tools}, row_format)).tools == (SCHEMA,)


@pytest.mark.parametrize("tools", [[], "", "[]", None])
def test_rows_without_tools_offer_none(tools: Any) -> None:
    assert accepted(parse(CHAT | {"tools": tools})).tools == ()


@pytest.mark.parametrize("key", REASONING_KEYS)
def test_reasoning_is_kept_apart_from_the_answer(key: str) -> None:
    assert accepted(parse(answer(**{key: "Hm."}))).messages[1] == Message("assistant", "yes", True, reasoning="Hm.")
    assert accepted(parse(answer(**{key: ""}))).messages == EXPECTED
    assert accepted(parse(answer(**{"reasoning": "Hm.", key: "Hm."}))).messages[1].reasoning == "Hm."


@pytest.mark.parametrize("key", REASONING_KEYS)
@pytest.mark.parametrize(
    ("row", "row_format"),
    [
        ({"prompt": "hi", "completion": "yes"}, "prompt_completion"),
        ({"prompt": [USER], "completion": "yes"}, "prompt_completion"),
        ({"instruction": "hi", "output": "yes"}, "alpaca"),
    ],
)
def test_reasoning_beside_one_text_is_that_of_the_answer(key: str, row: dict[str, Any], row_format: str) -> None:
    expected = (EXPECTED[0], replace(EXPECTED[1], reasoning="Hm."))
    for read_row in (parse, parse_columns):
        assert accepted(read_row(row | {key: "Hm."}, row_format)).messages == expected
        assert accepted(read_row(row | {key: "Hm.", "thinking": "Hm."}, row_format)).messages == expected
        assert accepted(read_row(row | {key: ""}, row_format)).messages == EXPECTED
        check_refused(read_row(row | {key: True}, row_format), "bad_structure", f"'{key}' is a boolean; expected text")
    if key != "thinking":
        check_refused(parse(row | {key: "a", "thinking": "b"}, row_format), "bad_structure", "the row has different te")


def test_reasoning_of_earlier_answers_stays_with_the_last() -> None:
    row = {"instruction": "a", "output": "b", "history": [["hi", "yes"]], "reasoning": "Hm."}
    assert [message.reasoning for message in accepted(parse(row, "alpaca")).messages] == [None, None, None, "Hm."]


@pytest.mark.parametrize("key", REASONING_KEYS)
def test_reasoning_beside_a_list_of_turns_is_refused(key: str) -> None:
    lists = {"prompt": "hi", "completion": [ANSWER]}
    pairs = [(CHAT, "messages"), (sharegpt(("user", "hi"), ("gpt", "yes")), "sharegpt"), (lists, "prompt_completion")]
    for row, row_format in pairs:
        check_refused(parse(row | {key: "Hm."}, row_format), "unsupported_field", f"the row has '{key}' beside a list")
        assert accepted(parse(row | {key: ""}, row_format)).messages == EXPECTED
    cells = {"prompt": "hi", "completion": json.dumps([ANSWER]), key: "Hm."}
    check_refused(parse_columns(cells, "prompt_completion"), "unsupported_field", "beside a list of turns")


def test_prompt_completion_rows() -> None:
    prompt = [{"role": "system", "content": "Be brief."}, USER, ANSWER, USER, ANSWER | {"id": 1, "content": "And?"}]
    completion = [CALLS, {"role": "tool", "content": "2"}, {"role": "assistant", "content": "2"}]
    before = (
        Message("system", "Be brief."),
        EXPECTED[0],
        Message("assistant", "yes"),
        EXPECTED[0],
        Message("assistant", "And?"),
    )
    row = parse({"prompt": prompt, "completion": "It is."}, "prompt_completion")
    assert accepted(row).messages == (*before, Message("assistant", "It is.", train=True))
    row = parse({"system": "Be brief.", "prompt": "hi", "completion": completion}, "prompt_completion")
    assert accepted(row).messages == (
        Message("system", "Be brief."),
        Message("user", "hi"),
        Message("assistant", "", train=True, tool_calls=(ToolCall("add", {"a": 1, "b": None}, "c1"),)),
        Message("tool", "2"),
        Message("assistant", "2", train=True),
    )


def test_alpaca_rows() -> None:
    row = {
        "system": "Be brief.",
        "history": [["hi", "yes"], ["a", "b"]],
        "instruction": "Sum.",
        "input": "1 2",
        "output": "3",
    }
    assert accepted(parse(row, "alpaca")).messages == (
        Message("system", "Be brief."),
        *EXPECTED,
        Message("user", "a"),
        Message("assistant", "b", train=True),
        Message("user", "Sum.\n\n1 2"),
        Message("assistant", "3", train=True),
    )
    assert trained(parse(row, "alpaca", turns="last")) == ["3"]
    assert accepted(parse({"instruction": "", "input": "hi", "output": "yes"}, "alpaca")).messages == EXPECTED


def test_sharegpt_rows() -> None:
    call = {"name": "add", "arguments": {"a": 1}}
    row = sharegpt(
        ("human", "1+1?"),
        ("function_call", json.dumps(call)),
        ("observation", "2"),
        ("gpt", "2"),
        ("user", "Twice."),
        ("function_call", json.dumps([call, {"name": "mul", "arguments": '{"b": 2}'}])),
        ("tool", "2"),
        ("function", "4"),
        ("assistant", "4"),
        system="Be brief.",
        tools=json.dumps([SCHEMA]),
    )
    row["conversations"][3]["weight"] = 0
    conversation = accepted(parse(row, "sharegpt"))
    add = ToolCall("add", {"a": 1})
    assert conversation.messages == (
        Message("system", "Be brief."),
        Message("user", "1+1?"),
        Message("assistant", "", train=True, tool_calls=(add,)),
        Message("tool", "2"),
        Message("assistant", "2"),
        Message("user", "Twice."),
        Message("assistant", "", train=True, tool_calls=(add, ToolCall("mul", {"b": 2}))),
        Message("tool", "2"),
        Message("tool", "4"),
        Message("assistant", "4", train=True),
    )
    assert conversation.tools == (SCHEMA,)


def test_system_prompt_beside_the_turns_counts_once() -> None:
    first = {"role": "system", "content": "Be brief."}
    expected = (Message("system", "Be brief."), *EXPECTED)
    assert accepted(parse(CHAT | {"system": "Be brief."})).messages == expected
    assert accepted(parse(messages(first, USER, ANSWER) | {"system": "Be brief."})).messages == expected
    assert accepted(parse(CHAT | {"system": ""})).messages == EXPECTED
    check_refused(parse(messages(first, USER, ANSWER) | {"system": "No."}), "bad_structure", "first system turn")


# ---------------------------------------------------------------- what trains


def two_answers(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    return messages(USER, ANSWER | first, USER, {"role": "assistant", "content": "no"} | second)


@pytest.mark.parametrize(
    ("first", "second", "of_all", "of_last"),
    [
        ({}, {}, ["yes", "no"], ["no"]),
        ({"train": False}, {}, ["no"], ["no"]),
        ({"weight": 0.0}, {"weight": 1}, ["no"], ["no"]),
        ({"train": True}, {"weight": None}, ["yes", "no"], ["no"]),
        ({}, {"train": False, "weight": 0}, ["yes"], None),
        ({"weight": 0}, {"train": False}, None, None),
    ],
)
def test_rows_say_which_turns_train(first: Any, second: Any, of_all: list[str] | None, of_last: Any) -> None:
    row = two_answers(first, second)
    for turns, expected in (("all", of_all), ("last", of_last)):
        result = parse(row, turns=turns)
        if expected is None:
            check_refused(result, "no_response", "train: false")
        else:
            assert trained(result) == expected


@given(st.lists(st.sampled_from([None, True, False]), min_size=1, max_size=6))
def test_a_turn_trains_unless_it_says_otherwise(flags: list[bool | None]) -> None:
    turns = [{"role": "assistant", "content": str(index), "train": flag} for index, flag in enumerate(flags)]
    expected = [str(index) for index, flag in enumerate(flags) if flag is not False]
    for choice, trains in (("all", expected), ("last", expected[-1:] if flags[-1] is not False else [])):
        result = parse(messages(USER, *turns), turns=choice)
        assert (trained(result) if trains else getattr(result, "cause", None)) == (trains or "no_response")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (answer(weight=0.5), "messages[1] has weight=0.5; expected 0 or 1"),
        (answer(weight=True), "weight=True; expected 0 or 1"),
        (answer(weight="1"), "weight='1'"),
        (b'{"messages": [{"role": "assistant", "content": "a", "weight": NaN}]}', "weight=nan"),
        (answer(train=1), "train=1; expected true or false"),
        (answer(train="false"), "train='false'"),
        (answer(train=True, weight=0), "train=True and weight=0"),
        (messages(USER | {"train": True}, ANSWER), "only assistant turns train; this is user"),
        (messages(USER | {"weight": 1}, ANSWER), "weight=1; only assistant turns train"),
    ],
)
def test_unclear_weights_are_refused(row: Any, reason: str) -> None:
    check_refused(parse(row), "bad_weight", reason)


@pytest.mark.parametrize("key", ["weight", "train"])
def test_rows_have_no_weight_of_their_own_but_one(key: str) -> None:
    for value in (1, 1.0, True, None):
        assert accepted(parse(CHAT | {key: value})).messages == EXPECTED
        assert accepted(parse_columns(CHAT | {key: value}, "messages")).messages == EXPECTED
    for value in ("1", "true", "True", "1.0"):
        assert accepted(parse_columns(CHAT | {key: value}, "messages")).messages == EXPECTED
        check_refused(parse(CHAT | {key: value}), "bad_weight", f"the row has {key}={value!r}; weights are given per t")
    for value in (0, 0.5, False, "", float("nan"), 2, [1], "0"):
        check_refused(parse(CHAT | {key: value}), "bad_weight", f"the row has {key}=")
        check_refused(parse_columns(CHAT | {key: value}, "messages"), "bad_weight", "per source in the recipe")


def test_prompts_never_train() -> None:
    row = {"prompt": [USER, ANSWER | {"weight": 1}, USER], "completion": "no"}
    check_refused(parse(row, "prompt_completion"), "bad_weight", "prompt[1] has weight=1; turns of a prompt do not")
    row["prompt"][1]["weight"] = 0
    assert trained(parse(row, "prompt_completion")) == ["no"]


@pytest.mark.parametrize("key", ["loss", "mask", "training"])
def test_other_words_for_train_are_refused_even_when_false(key: str) -> None:
    check_refused(parse(answer(**{key: False})), "unsupported_field", f"has '{key}'; say which turns train")


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("row", "cause", "reason"),
    [
        (b'{"messages": [', "malformed_json", "malformed JSON at column 15"),
        (b'{"messages": [{"role": "user", "role": "user"}]}', "malformed_json", "'role' occurs twice"),
        (b"[" * 100_000, "malformed_json", "recursion"),
        (b'{"a": ' + b"9" * 5000 + b"}", "malformed_json", "4300 digits"),
        (b'{"messages": "\xff"}', "invalid_utf8", "byte 14"),
        (b'{"messages": "\x00"}', "control_character", "NUL"),
        (b"[1]", "bad_structure", "a row is an object with named fields, this is a list"),
        (messages(), "bad_structure", "empty"),
        ({"messages": {}}, "bad_structure", "'messages' is an object; expected a list"),
        ({"messages": json.dumps([USER, ANSWER])}, "bad_structure", "'messages' is a string; expected a list"),
        ({"messages": ["hi"]}, "bad_structure", "messages[0] is a string"),
        (messages({"role": "user"}), "bad_structure", "messages[0] has no 'content'"),
        (messages({"role": "user", "content": None}), "bad_structure", "messages[0] has no 'content'"),
        (messages({"role": "user", "content": 4}), "bad_structure", "messages[0].content is a number"),
        (messages({"from": "human", "value": "a"}), "bad_structure", "no 'role'; its keys are 'from', 'value'"),
        (messages({"role": "human", "content": "a"}), "unknown_role", "'human'; expected one of system, user, assist"),
        (messages({"role": 4, "content": "a"}), "unknown_role", "role 4"),
        (messages(USER), "no_assistant_turn", "roles are user"),
        (messages(USER, {"role": "assistant", "content": " \n"}), "empty_content", "turn 2 (assistant)"),
        (answer(content=None), "bad_structure", "messages[1] has no 'content'"),
        (answer(content="", reasoning="Hm."), "empty_content", "turn 2 (assistant)"),
        (messages({"role": "user", "content": ""}, ANSWER), "empty_content", "turn 1 (user)"),
        (messages(USER, ANSWER, ANSWER), "bad_structure", "turn 3 repeats"),
        (messages(USER, ANSWER, ANSWER | {"train": False}), "bad_structure", "turn 3 repeats"),
        (answer(content="\ud800"), "invalid_utf8", "surrogate"),
        (answer(content="a\0"), "control_character", "NUL"),
        (answer(content=[{"type": "image_url", "url": "x"}]), "unsupported_field", "content[0] has the type 'image_u"),
        (answer(content=["yes"]), "bad_structure", "messages[1].content[0] is no text part"),
        (answer(content=[{"type": "text"}]), "bad_structure", "messages[1].content[0].text is null"),
        (answer(audio={"id": "x"}), "unsupported_field", "messages[1] has 'audio'"),
        (answer(refusal="No."), "unsupported_field", "messages[1] has 'refusal'"),
        (CHAT | {"images": ["a.png"]}, "unsupported_field", "the row has 'images'"),
    ],
)
def test_bad_rows_say_what_is_wrong(row: Any, cause: str, reason: str) -> None:
    check_refused(parse(row), cause, reason)


def test_fields_that_hold_nothing_are_not_refused() -> None:
    row = answer(refusal=None, images=[], audio="", tool_calls=None, annotations=[1], timestamp=3)
    assert accepted(parse(row | {"images": []})).messages == EXPECTED


@pytest.mark.parametrize(
    ("row", "cause", "reason"),
    [
        (called(type="code"), "unsupported_field", "tool_calls[0] has the type 'code'"),
        (called(function="add"), "bad_structure", "messages[1].tool_calls[0].function is a string"),
        (called(function={"arguments": "{}"}), "bad_structure", "messages[1].tool_calls[0] has no function name"),
        (called(function={"name": " ", "arguments": {}}), "bad_structure", "has no function name"),
        (called(function={"name": "add"}), "bad_structure", "no 'arguments'; write {}"),
        (arguments(None), "bad_structure", "no 'arguments'; write {}"),
        (called(id=7), "bad_structure", "tool_calls[0].id is a number"),
        (called(id="\ud800"), "invalid_utf8", "tool_calls[0].id"),
        (arguments([1]), "bad_structure", "arguments is a list; expected an object"),
        (arguments("[1]"), "bad_structure", "arguments is a list; expected an object"),
        (arguments('{"a": }'), "bad_structure", "arguments is no JSON at column 7"),
        (arguments(""), "bad_structure", "arguments is no JSON at column 1"),
        (arguments("{'a': 1}"), "bad_structure", "double quotes"),
        (arguments('{"a": 1, "a": 2}'), "bad_structure", "'a' occurs twice"),
        (arguments('{"a":' * 5000), "bad_structure", "cannot be read"),
        (arguments({"a": [[]]} | {"b": json.loads("[" * 150 + "]" * 150)}), "bad_structure", "more than 100 deep"),
        (arguments({"a": float("nan")}), "bad_structure", "holds nan"),
        (arguments('{"a": -Infinity}'), "bad_structure", "holds -inf"),
        (arguments('{"a": 1e999}'), "bad_structure", "holds inf"),
        (arguments({"a": ["\ud800"]}), "invalid_utf8", "tool_calls[0].arguments has half a surrogate"),
        (arguments({"\ud800": 1}), "invalid_utf8", "a key of messages[1].tool_calls[0].arguments"),
        (arguments('{"a": "\\u0000"}'), "control_character", "NUL"),
        (messages(USER, CALLS | {"tool_calls": [1]}), "bad_structure", "messages[1].tool_calls[0] is a number"),
        (messages(USER, CALLS | {"tool_calls": {"a": 1}}), "bad_structure", "tool_calls is an object; expected a list"),
        (messages(USER, CALLS | {"function_call": CALL["function"]}), "bad_structure", "keep 'tool_calls'"),
        (messages(USER | {"tool_calls": [CALL]}, ANSWER), "bad_structure", "only assistant turns call tools"),
        (messages(USER | {"reasoning": "Hm."}, ANSWER), "bad_structure", "only assistant turns reason; this is user"),
        (answer(reasoning="a", thinking="b"), "bad_structure", "different texts in 'reasoning' and 'thinking'"),
        (answer(thinking={"effort": "low"}), "bad_structure", "messages[1].thinking is an object; expected text"),
        (answer(thinking="\0"), "control_character", "messages[1].thinking"),
        (answer(tool_call_id="c1"), "bad_structure", "only tool turns answer a call"),
        (messages(USER, {"role": "tool", "content": "2"}, ANSWER), "bad_structure", "turn 2 (tool) answers nothing"),
        (messages(USER, CALLS, {"role": "tool"}), "bad_structure", "messages[2] has no 'content'"),
        (messages(USER, CALLS, {"role": "tool", "content": {"a": 1}}), "bad_structure", "messages[2].content is an ob"),
        (
            messages(USER, CALLS, {"role": "tool", "content": "2", "name": 1}),
            "bad_structure",
            "messages[2].name is a",
        ),
        (
            messages(USER, CALLS, {"role": "tool", "content": "2", "tool_call_id": "c2"}),
            "bad_structure",
            "turn 3 (tool) has the tool_call_id 'c2'; the calls before it are 'c1'",
        ),
    ],
)
def test_bad_tool_calls_and_reasoning_are_refused(row: Any, cause: str, reason: str) -> None:
    check_refused(parse(row), cause, reason)


def test_ids_are_compared_only_where_both_sides_have_them() -> None:
    result = {"role": "tool", "content": "2"}
    assert accepted(parse(messages(USER, CALLS, result, ANSWER)))
    assert accepted(parse(messages(USER, CALLS, result | {"tool_call_id": "c1"}, ANSWER)))
    anonymous = CALLS | {"tool_calls": [CALL["function"]]}
    assert accepted(parse(messages(USER, anonymous, result | {"tool_call_id": "c9"}, ANSWER)))


@pytest.mark.parametrize(
    ("tools", "cause", "reason"),
    [
        ("add", "bad_structure", "'tools' is no JSON at column 1"),
        ("3", "bad_structure", "'tools' is a number; expected a list of functions"),
        (["add"], "bad_structure", "tools[0] is a string"),
        ([{"description": "adds"}], "bad_structure", "tools[0] has no function name"),
        ([{"type": "function", "function": {"name": ""}}], "bad_structure", "tools[0] has no function name"),
        ([{"type": "function", "function": "add"}], "bad_structure", "tools[0].function is a string"),
        ([{"type": "web_search"}], "unsupported_field", "tools[0] has the type 'web_search'"),
        ([{"name": "add", "description": "\ud800"}], "invalid_utf8", "tools[0]"),
        ([{"name": "add", "parameters": {"\ud800": 1}}], "invalid_utf8", "a key of tools[0]"),
        ([{"name": "add", "default": float("inf")}], "bad_structure", "tools[0] holds inf"),
    ],
)
def test_bad_tools_are_refused(tools: Any, cause: str, reason: str) -> None:
    check_refused(parse(CHAT | {"tools": tools}), cause, reason)


def test_tools_said_twice_must_agree() -> None:
    assert accepted(parse(CHAT | {"tools": [SCHEMA], "functions": [SCHEMA]})).tools == (SCHEMA,)
    row = CHAT | {"tools": [SCHEMA], "functions": [{"name": "f"}]}
    check_refused(parse(row), "bad_structure", "'tools' and 'functions', and they differ")


@pytest.mark.parametrize(
    ("row", "row_format", "cause", "reason"),
    [
        ({"instruction": "a"}, "alpaca", "bad_structure", "no 'output'"),
        ({"instruction": "a", "output": None}, "alpaca", "bad_structure", "no 'output'"),
        ({"instruction": "a", "output": ["x"]}, "alpaca", "bad_structure", "'output' is a list; expected text"),
        ({"instruction": "a", "output": ""}, "alpaca", "empty_content", "turn 2 (assistant)"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "alpaca", "bad_structure", "history[0] is a list of"),
        ({"instruction": "a", "output": "b", "history": ["cd"]}, "alpaca", "bad_structure", "history[0] is a string"),
        ({"instruction": "a", "output": "b", "history": "c"}, "alpaca", "bad_structure", "'history' is a string"),
        ({"instruction": "a", "output": "b", "history": [["c", 1]]}, "alpaca", "bad_structure", "history[0][1] is a n"),
        ({"instruction": "a", "output": "b", "system": 1}, "alpaca", "bad_structure", "'system' is a number"),
        ({"prompt": {"a": 1}, "completion": "b"}, "prompt_completion", "bad_structure", "'prompt' is an object"),
        ({"prompt": "a", "completion": 1}, "prompt_completion", "bad_structure", "'completion' is a number"),
        ({"prompt": "a", "completion": []}, "prompt_completion", "bad_structure", "'completion' is empty"),
        (
            {"prompt": "a", "completion": [USER, ANSWER]},
            "prompt_completion",
            "bad_structure",
            "begins with a user",
        ),
        ({"prompt": "a", "completion": ""}, "prompt_completion", "empty_content", "turn 2 (assistant)"),
        ({"prompt": [USER, ANSWER], "completion": [ANSWER]}, "prompt_completion", "bad_structure", "turn 3 repeats"),
        (sharegpt(("bot", "a")), "sharegpt", "unknown_role", "'bot'; expected one of system, human, gpt"),
        (sharegpt(("Human", "a")), "sharegpt", "unknown_role", "'Human'"),
        ({"conversations": [USER | {"from": "human"}]}, "sharegpt", "bad_structure", "both 'from' and 'role'"),
        ({"conversations": [{"content": "a"}]}, "sharegpt", "bad_structure", "conversations[0] has no 'from'"),
        ({"conversations": ["a"]}, "sharegpt", "bad_structure", "conversations[0] is a string"),
        (
            sharegpt(("human", "a"), ("function_call", '{"name"')),
            "sharegpt",
            "bad_structure",
            "[1].value is no JSON",
        ),
        (
            sharegpt(("human", "a"), ("function_call", "[]")),
            "sharegpt",
            "bad_structure",
            "expected a call or a list",
        ),
        (sharegpt(("human", "a"), ("function_call", "3")), "sharegpt", "bad_structure", "expected a call or a list"),
        (sharegpt(("human", "a"), ("function_call", '{"name": "f"}')), "sharegpt", "bad_structure", "no 'arguments'"),
        (
            {"conversations": [{"from": "function_call", "value": json.dumps(CALL), "tool_calls": [CALL]}]},
            "sharegpt",
            "bad_structure",
            "is a call and the turn has 'tool_calls' too",
        ),
        (sharegpt(("human", "a"), ("observation", "b")), "sharegpt", "no_assistant_turn", "roles are user, tool"),
    ],
)
def test_bad_rows_of_other_formats(row: Any, row_format: str, cause: str, reason: str) -> None:
    check_refused(parse(row, row_format), cause, reason)


def test_answers_that_differ_in_calls_or_reasoning_are_no_repetition() -> None:
    other = CALLS | {"tool_calls": [{"name": "mul", "arguments": {}}]}
    assert len(accepted(parse(messages(USER, CALLS, other))).messages) == 3
    assert len(accepted(parse(messages(USER, ANSWER, ANSWER | {"reasoning": "Hm."}))).messages) == 3
    check_refused(parse(messages(USER, CALLS, CALLS)), "bad_structure", "turn 3 repeats")


# ---------------------------------------------------------------- text, numbers, cells


def test_errors_of_other_libraries_become_one_line_of_a_bounded_length() -> None:
    assert one_line(" a\n\tb  c\n") == "a b c"
    assert one_line("a\n" * 500) == "a " * 149 + "a…"
    assert (clip("abc", 3), clip("abcd", 3)) == ("abc", "ab…")


def test_long_texts_and_large_numbers_pass_unchanged() -> None:
    row = messages({"role": "user", "content": BIG + "é"}, CALLS | {"tool_calls": [{"name": "f", "arguments": {}}]})
    row["messages"][1]["tool_calls"][0]["arguments"] = {"n": 10**400, "x": 0.1, "flag": True, "é": ["ü", None]}
    conversation = accepted(parse(row))
    assert conversation.messages[0].content == BIG + "é"
    assert conversation.messages[1].tool_calls[0].arguments == row["messages"][1]["tool_calls"][0]["arguments"]


@given(st.text(), st.text())
def test_any_text_is_kept_exactly_or_refused(question: str, reply: str) -> None:
    result = parse(messages({"role": "user", "content": question}, {"role": "assistant", "content": reply}))
    if isinstance(result, Conversation):
        assert [message.content for message in result.messages] == [question, reply]
    else:
        broken = any("\0" in text or not text.strip() for text in (question, reply))
        assert broken or any("\ud800" <= character <= "\udfff" for character in question + reply)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
KEYS = ["role", "content", "from", "value", "tool_calls", "function_call", "train", "weight", "reasoning", "name"]
TURN = st.fixed_dictionaries({}, optional={key: JSON for key in KEYS} | {"tool_call_id": JSON})


@given(
    st.sampled_from(["messages", "prompt_completion", "alpaca", "sharegpt"]),
    st.dictionaries(
        st.sampled_from(["messages", "conversations", "prompt", "completion", "instruction", "output", "history"])
        | st.sampled_from(["input", "system", "tools", "weight", "reasoning"]),
        JSON | st.lists(TURN, max_size=2) | st.just([USER, CALLS, ANSWER]),
    ),
)
def test_no_row_raises(row_format: str, row: dict[str, Any]) -> None:
    for result in (parse(row, row_format, difficulty_field="input"), parse_columns(row, row_format, turns="last")):
        assert isinstance(result, (Conversation, BadRow))


def test_difficulty_is_a_number_of_the_row() -> None:
    row = CHAT | {"level": 3, "meta": {"level": -0.5}, "meta.b": 7, "a": {"b": {"c": 10**9}}}
    for field, expected in (("level", 3.0), ("meta.level", -0.5), ("meta.b", 7.0), ("a.b.c", 1e9)):
        assert accepted(parse(row, difficulty_field=field)).difficulty == expected
    assert accepted(parse(row)).difficulty is None


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "no 'meta.level'"),
        (True, "'meta.level' is True"),
        ("3", "'meta.level' is '3'"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (10**400, "finite number"),
        ([3], "is a list"),
    ],
)
def test_rows_without_a_difficulty_are_refused(value: Any, reason: str) -> None:
    check_refused(parse(CHAT | {"meta": {"level": value}}, difficulty_field="meta.level"), "bad_difficulty", reason)
    check_refused(parse(CHAT | {"meta": value}, difficulty_field="meta.level"), "bad_difficulty", "no 'meta.level'")


def test_cells_of_text_columns_hold_json_lists_and_numbers() -> None:
    turns = json.dumps([USER, ANSWER])
    row = {"messages": turns, "tools": json.dumps(SCHEMA), "level": "1.5e1"}
    conversation = accepted(parse_columns(row, "messages", difficulty_field="level"))
    assert (conversation.messages, conversation.tools, conversation.difficulty) == (EXPECTED, (SCHEMA,), 15.0)
    row = sharegpt(("human", "hi"), ("gpt", "yes"))
    row["conversations"] = json.dumps(row["conversations"])
    assert accepted(parse_columns(row, "sharegpt")).messages == EXPECTED
    row = {"instruction": "a", "output": "b", "history": '[["hi", "yes"]]'}
    assert accepted(parse_columns(row, "alpaca")).messages[:2] == EXPECTED
    row = {"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])}
    assert accepted(parse_columns(row, "prompt_completion")).messages == EXPECTED


@pytest.mark.parametrize("beside", [{}, {"level": 15.0}, {"flag": True, "level": "15"}, {"history": "[", "level": 15}])
def test_cells_are_read_alike_whatever_the_other_columns_hold(beside: dict[str, Any]) -> None:
    field = "level" if beside else None
    rows = [
        ({"messages": json.dumps([USER, ANSWER])}, "messages"),
        ({"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])}, "prompt_completion"),
        (CHAT | {"prompt": '[{"role": '}, "messages"),
    ]
    for row, row_format in rows:
        conversation = accepted(parse_columns(row | beside, row_format, difficulty_field=field))
        assert conversation.messages == EXPECTED
        assert conversation.difficulty == (15.0 if beside else None)


@pytest.mark.parametrize("text", ["[1] and [2]", "[1, 2]", '[{"a": 1}]', '{"role": "user"}', "[INST] hi"])
def test_cells_that_only_begin_with_a_bracket_stay_text(text: str) -> None:
    row = parse_columns({"prompt": text, "completion": text + "."}, "prompt_completion")
    assert [message.content for message in accepted(row).messages] == [text, text + "."]


@pytest.mark.parametrize(
    ("row", "row_format", "cause", "reason"),
    [
        ({"messages": str([USER, ANSWER])}, "messages", "bad_structure", "'messages' is no JSON at column 3"),
        ({"messages": str([USER, ANSWER])}, "messages", "bad_structure", "write it with json.dumps"),
        ({"messages": "hi"}, "messages", "bad_structure", "'messages' is a string; expected a list of turns"),
        ({"messages": "[" * 10**5}, "messages", "bad_structure", "'messages' holds JSON that cannot be read"),
        ({"prompt": str([USER]), "completion": "a"}, "prompt_completion", "bad_structure", "'prompt' is no JSON"),
        ({"instruction": "a", "output": "b\0"}, "alpaca", "control_character", "'output' contains a NUL"),
        ({"instruction": "a"}, "alpaca", "bad_structure", "no 'output'"),
    ],
)
def test_bad_cells_are_refused(row: dict[str, str], row_format: str, cause: str, reason: str) -> None:
    check_refused(parse_columns(row, row_format), cause, reason)


@pytest.mark.parametrize("text", ["hard", "nan", "1e999", "1_000", "0x10"])
def test_cells_that_are_no_number_are_no_difficulty(text: str) -> None:
    row = {"instruction": "a", "output": "b", "level": text}
    check_refused(parse_columns(row, "alpaca", difficulty_field="level"), "bad_difficulty", repr(text))


def test_columns_of_other_kinds_are_refused_where_json_is_expected() -> None:
    call = CALLS | {"tool_calls": [{"name": "f", "arguments": {"raw": b"x"}}]}
    check_refused(parse_columns(messages(USER, call), "messages"), "bad_structure", "holds a bytes")
    check_refused(parse_columns(messages(USER, ANSWER | {"content": b"x"}), "messages"), "bad_structure", "is a bytes")
