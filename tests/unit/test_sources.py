"""Files to conversations: every accepted row is exact, every refused one has its file, line and reason."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from sft_dist.config import Source
from sft_dist.data.conversation import BadRow, Conversation, Message, Origin, RawRow
from sft_dist.data.files import hash_source, iter_rows, list_files
from sft_dist.data.rows import detect_format, parse_row
from sft_dist.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
EXPECTED = (Message("user", "hi"), Message("assistant", "yes", train=True))


def source(path: Path, **settings: Any) -> Source:
    return Source(path=str(path), **settings)


def write(path: Path, *lines: str | bytes, newline: bytes = b"\n", start: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(start + b"".join((line.encode() if isinstance(line, str) else line) + newline for line in lines))
    return path


def read(path: Path, **settings: Any) -> list[Conversation | BadRow]:
    chosen = source(path, **settings)
    row_format = detect_format(chosen)
    return [parse_row(row, row_format) for row in iter_rows(chosen)]


def parse(row: Any, row_format: str = "messages") -> Conversation | BadRow:
    data = row if isinstance(row, bytes) else json.dumps(row).encode()
    return parse_row(RawRow(Origin("f.jsonl", 3), data), row_format)


def refused(row: Any, row_format: str = "messages") -> BadRow:
    result = parse(row, row_format)
    assert isinstance(result, BadRow), result
    assert str(result).startswith("f.jsonl:3: ")
    return result


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize(
    ("row", "row_format"),
    [
        (CHAT, "messages"),
        ({"instruction": "hi", "output": "yes"}, "alpaca"),
        ({"instruction": "hi", "input": "", "output": "yes", "id": 3}, "alpaca"),
        ({"instruction": "hi", "input": None, "output": "yes", "messages": None}, "alpaca"),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}, "sharegpt"),
        (
            {"conversations": [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "yes", "role": None}]},
            "sharegpt",
        ),
    ],
)
def test_formats_are_detected_and_mean_the_same(tmp_path: Path, row: dict[str, Any], row_format: str) -> None:
    file = write(tmp_path / "d.jsonl", json.dumps(row))
    assert detect_format(source(file)) == row_format
    (result,) = read(file)
    assert isinstance(result, Conversation)
    assert result.messages == EXPECTED


def test_alpaca_input_follows_the_instruction_after_a_blank_line() -> None:
    result = parse({"instruction": "Sum.", "input": "1 2", "output": "3"}, "alpaca")
    assert isinstance(result, Conversation)
    assert result.messages[0].content == "Sum.\n\n1 2"


def test_system_turns_are_kept_in_every_format() -> None:
    system = Message("system", "Be brief.")
    rows = [
        ({"messages": [{"role": "system", "content": "Be brief."}, *CHAT["messages"]]}, "messages"),
        ({"system": "Be brief.", "instruction": "hi", "output": "yes"}, "alpaca"),
        (
            {
                "system": "Be brief.",
                "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}],
            },
            "sharegpt",
        ),
    ]
    for row, row_format in rows:
        result = parse(row, row_format)
        assert isinstance(result, Conversation)
        assert result.messages == (system, *EXPECTED)


def test_text_parts_are_joined_and_other_parts_refused() -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    result = parse({"messages": [{"role": "user", "content": parts}, CHAT["messages"][1]]})
    assert isinstance(result, Conversation)
    assert result.messages == EXPECTED
    bad = refused({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, CHAT["messages"][1]]})
    assert "messages[0].content[0]" in bad.reason


def test_most_common_format_of_the_first_rows_wins_and_others_are_refused(tmp_path: Path) -> None:
    odd = json.dumps({"instruction": "a", "output": "b"})
    results = read(write(tmp_path / "d.jsonl", odd, json.dumps(CHAT), json.dumps(CHAT)))
    assert isinstance(results[0], BadRow)
    assert "no 'messages'" in results[0].reason
    assert "'instruction'" in results[0].reason
    assert all(isinstance(result, Conversation) for result in results[1:])


def test_unknown_format_names_the_keys_that_were_found(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"keys prompt, completion; expected messages"):
        detect_format(source(write(tmp_path / "d.jsonl", '{"prompt": "a", "completion": "b"}')))


# ---------------------------------------------------------------- bad rows


@pytest.mark.parametrize(
    ("row", "cause", "reason"),
    [
        (b'{"messages": [', "malformed_json", "malformed JSON at column"),
        (b'{"messages": [{"role": "user", "role": "user"}]}', "malformed_json", "'role' occurs twice"),
        (b"[" * 100_000, "malformed_json", ""),
        (b'{"a": ' + b"9" * 5000 + b"}", "malformed_json", ""),
        (b'{"messages": "\xff"}', "invalid_utf8", "byte 14"),
        (b'{"messages": "\x00"}', "control_character", "NUL"),
        (b"[1]", "bad_structure", "a row is an object with named fields, this is a list"),
        ({"messages": []}, "bad_structure", "empty"),
        ({"messages": {}}, "bad_structure", "'messages' is an object; expected a list"),
        ({"messages": ["hi"]}, "bad_structure", "messages[0] is a string"),
        ({"messages": [{"role": "user"}]}, "bad_structure", "messages[0] has no 'content'"),
        ({"messages": [{"role": "user", "content": None}]}, "bad_structure", "messages[0] has no 'content'"),
        ({"messages": [{"role": "user", "content": 4}]}, "bad_structure", "messages[0].content is a number"),
        (
            {"messages": [{"role": "human", "content": "a"}]},
            "unknown_role",
            "'human'; expected one of system, user, assistant",
        ),
        ({"messages": [{"role": "tool", "content": "a"}]}, "unknown_role", "'tool'"),
        ({"messages": [{"role": 4, "content": "a"}]}, "unknown_role", "role 4"),
        ({"messages": CHAT["messages"][:1]}, "no_assistant_turn", "roles are user"),
        (
            {"messages": [CHAT["messages"][0], {"role": "assistant", "content": " \n"}]},
            "empty_content",
            "turn 2 (assistant)",
        ),
        ({"messages": [{"role": "user", "content": ""}, CHAT["messages"][1]]}, "empty_content", "turn 1 (user)"),
        ({"messages": [*CHAT["messages"], CHAT["messages"][1]]}, "bad_structure", "turn 3 repeats"),
        ({"messages": [CHAT["messages"][0], {"role": "assistant", "content": "\ud800"}]}, "invalid_utf8", "surrogate"),
        ({"messages": [CHAT["messages"][0], {"role": "assistant", "content": "a\0"}]}, "control_character", "NUL"),
        ({**CHAT, "tools": [{"name": "f"}]}, "unsupported_field", "'tools'"),
        (
            {"messages": [{"role": "assistant", "content": "a", "tool_calls": [1]}]},
            "unsupported_field",
            "messages[0] has 'tool_calls'",
        ),
    ],
)
def test_bad_rows_say_what_is_wrong(row: Any, cause: str, reason: str) -> None:
    bad = refused(row)
    assert bad.cause == cause
    assert reason in bad.reason
    assert len(bad.reason) < 300


@pytest.mark.parametrize(
    ("row", "row_format", "reason"),
    [
        ({"instruction": "a"}, "alpaca", "no 'output'"),
        ({"instruction": "a", "output": ["x"]}, "alpaca", "'output'[0]"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "alpaca", "history"),
        ({"conversations": [{"from": "bot", "value": "a"}]}, "sharegpt", "'bot'; expected one of system, human"),
        ({"conversations": [{"role": "user", "content": "a"}]}, "sharegpt", "conversations[0] has no 'from'"),
    ],
)
def test_bad_rows_of_other_formats(row: Any, row_format: str, reason: str) -> None:
    assert reason in refused(row, row_format).reason


# ---------------------------------------------------------------- files and lines


def test_lines_are_those_of_the_file(tmp_path: Path) -> None:
    good = json.dumps(CHAT)
    file = write(tmp_path / "d.jsonl", good, "", "  ", "{", good)
    results = read(file)
    assert [result.origin for result in results] == [Origin(str(file), line) for line in (1, 4, 5)]
    assert str(results[1]).startswith(f"{file}:4: malformed JSON")


def test_line_separators_inside_strings_do_not_split_rows(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "a\u2028b\x85c"}, {"role": "assistant", "content": "\x0c d"}]}
    results = read(write(tmp_path / "d.jsonl", json.dumps(row, ensure_ascii=False), json.dumps(CHAT)))
    assert [result.origin.line for result in results] == [1, 2]
    assert isinstance(results[0], Conversation)
    assert results[0].messages[0].content == "a\u2028b\x85c"


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("as_array", [False, True])
def test_byte_order_mark_and_crlf_are_tolerated(tmp_path: Path, start: bytes, newline: bytes, as_array: bool) -> None:
    row = json.dumps(CHAT)
    lines = ["[", row + ",", row, "]"] if as_array else [row, row]
    results = read(write(tmp_path / ("d.json" if as_array else "d.jsonl"), *lines, newline=newline, start=start))
    assert [result.messages for result in results if isinstance(result, Conversation)] == [EXPECTED] * 2
    assert [result.origin.line for result in results] == ([2, 3] if as_array else [1, 2])


def test_last_line_without_newline_is_read(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_bytes(json.dumps(CHAT).encode())
    assert len(read(file)) == 1


def test_json_file_with_one_object_per_line_is_read_as_lines(tmp_path: Path) -> None:
    results = read(write(tmp_path / "d.json", json.dumps(CHAT), json.dumps(CHAT)))
    assert [result.origin.line for result in results] == [1, 2]


def test_json_array_rows_have_the_line_where_they_start(tmp_path: Path) -> None:
    rows = [{**CHAT, "n": n} for n in range(40)]
    file = tmp_path / "d.json"
    file.write_text("\n\n" + json.dumps(rows, indent=2))
    lines = file.read_text().split("\n")
    expected = [number for number, line in enumerate(lines, start=1) if line == "  {"]
    assert [result.origin.line for result in read(file)] == expected
    assert len(expected) == 40


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("[\n{},\n{]", 3, "malformed JSON"),
        ("[\n{}\n\n{}]", 4, "expected ',' or ']'"),
        ("[\n{},\n", 3, "malformed JSON"),
        ("[{}", 1, "end of file"),
        ("[{}]\n]", 2, "text after the end"),
        ('{"data":\n []}', 1, "neither an array of rows nor one object per line"),
    ],
)
def test_broken_json_files_are_fatal_and_name_the_line(tmp_path: Path, text: str, line: int, reason: str) -> None:
    file = tmp_path / "d.json"
    file.write_text(text)
    with pytest.raises(DataError) as caught:
        list(iter_rows(source(file)))
    assert str(caught.value).startswith(f"{file}:{line}: ")
    assert reason in str(caught.value)


def test_invalid_utf8_in_an_array_names_the_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"d\.json:2: invalid UTF-8"):
        list(iter_rows(source(write(tmp_path / "d.json", b"[", b'{"a": "\xff"}]'))))


def test_utf16_is_named(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps(CHAT), encoding="utf-16")
    with pytest.raises(DataError, match="is UTF-16"):
        read(file)


def test_parquet_rows_are_numbered_and_null_fill_is_ignored(tmp_path: Path) -> None:
    file = tmp_path / "d.parquet"
    rows = [{**CHAT, "tools": None, "score": 0.5}] * 1200
    rows[1100] = {"messages": [{"role": "user", "content": None}], "tools": None, "score": None}
    pa.parquet.write_table(pa.Table.from_pylist(rows), file, row_group_size=500)
    results = read(file)
    assert [result.origin for result in results] == [Origin(str(file), number) for number in range(1, 1201)]
    assert [index for index, result in enumerate(results) if isinstance(result, BadRow)] == [1100]
    assert isinstance(results[0], Conversation)
    assert results[0].messages == EXPECTED


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"d\.parquet: cannot be read as Parquet"):
        read(write(tmp_path / "d.parquet", "PAR1 no"))


def test_folders_are_read_in_sorted_order_and_may_mix_kinds(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    write(folder / "b.json", json.dumps([CHAT, CHAT]))
    write(folder / "a.jsonl", json.dumps(CHAT))
    write(folder / "README.md", "text")
    write(folder / ".cache" / "z.jsonl", "{")
    pa.parquet.write_table(pa.Table.from_pylist([CHAT]), folder / "c.parquet")
    assert [file.name for file in list_files(source(folder))] == ["a.jsonl", "b.json", "c.parquet"]
    results = read(folder)
    assert [Path(result.origin.path).name for result in results] == ["a.jsonl", "b.json", "b.json", "c.parquet"]


@pytest.mark.parametrize("name", ["absent.jsonl", "./absent", "a/b/c", "/absent/x"])
def test_absent_paths_are_not_taken_for_hub_ids(name: str) -> None:
    with pytest.raises(DataError, match="no such file"):
        list_files(Source(path=name))


def test_unknown_kinds_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"unknown kind of file '\.csv'"):
        list_files(source(write(tmp_path / "d.csv", "a,b")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data file in this folder"):
        list_files(source(tmp_path / "empty"))
    with pytest.raises(DataError, match="there is no readable row"):
        detect_format(source(write(tmp_path / "e.jsonl")))


def test_hash_follows_the_bytes_and_not_the_place(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name / "d.jsonl", json.dumps(CHAT)) for name in "ab")
    assert hash_source(source(first)) == hash_source(source(second))
    write(second, json.dumps(CHAT), "")
    assert hash_source(source(first)) != hash_source(source(second))


def test_lines_are_streamed(tmp_path: Path) -> None:
    """Reading the first row of a large file must not read the file: the second line is one that would raise."""
    file = write(tmp_path / "d.jsonl", json.dumps(CHAT))
    with file.open("ab") as stream:
        stream.truncate(2**33)  # sparse: 8 GiB of NULs without a line break
    row = next(iter_rows(source(file)))
    assert row.origin.line == 1


def test_hub_id_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    script = (
        "from sft_dist.config import Source\n"
        "from sft_dist.data.rows import detect_format\n"
        "from sft_dist.errors import DataError\n"
        "try:\n    detect_format(Source(path='no-such-owner/no-such-set'))\n"
        "except DataError as error:\n    print(error)\n"
    )
    # A process of its own: the libraries read HF_HUB_OFFLINE when they are imported.
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert found.stdout.startswith("no-such-owner/no-such-set: neither a local file nor a hub data set")
