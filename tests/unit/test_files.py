"""Files to raw rows: every row once, in order, with its true line, in bounded memory; errors say where."""

import csv
import gzip
import io
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from sft_dist.config import Source
from sft_dist.data import readers
from sft_dist.data.conversation import BadRow, Conversation, Origin, RawRow
from sft_dist.data.files import count_bytes, hash_source, iter_rows, list_files, source_names
from sft_dist.data.row_fields import ROW_FIELDS
from sft_dist.data.rows import detect_format, parse_row
from sft_dist.errors import DataError
from tests.unit import hub_server

ROOT = Path(__file__).resolve().parents[2]
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
ROW = json.dumps(CHAT)
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


def source(path: Path | str, **settings: Any) -> Source:
    return Source(path=str(path), **settings)


def write(path: Path, *lines: str | bytes, newline: bytes = b"\n", start: bytes = b"") -> Path:
    """Lines to a file, compressed as its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = start + b"".join((line.encode() if isinstance(line, str) else line) + newline for line in lines)
    path.write_bytes(PACKERS[path.suffix if path.suffix in PACKERS else ""](text))
    return path


def read(path: Path | str) -> list[RawRow]:
    return list(iter_rows(source(path)))


def lines_of(path: Path) -> list[int]:
    return [row.origin.line for row in read(path)]


def values_of(path: Path) -> list[Any]:
    return [json.loads(row.data) if isinstance(row.data, bytes) else row.data for row in read(path)]


def error_of(path: Path | str) -> str:
    with pytest.raises(DataError) as caught:
        read(path)
    return str(caught.value)


# ---------------------------------------------------------------- lines


def test_lines_are_those_of_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", ROW, "", "  ", "{", ROW)
    rows = read(file)
    assert [row.origin for row in rows] == [Origin(str(file), line) for line in (1, 4, 5)]
    results = [parse_row(row, "messages") for row in rows]
    assert str(results[1]).startswith(f"{file}:4: malformed JSON")


def test_line_separators_inside_strings_do_not_split_rows(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "a\u2028b\x85c"}, {"role": "assistant", "content": "\x0c d"}]}
    file = write(tmp_path / "d.jsonl", json.dumps(row, ensure_ascii=False), ROW)
    assert lines_of(file) == [1, 2]
    assert values_of(file) == [row, CHAT]


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_byte_order_mark_and_crlf_are_tolerated(
    tmp_path: Path, kind: str, newline: bytes, start: bytes, packed: str
) -> None:
    lines = {".jsonl": ["", '{"a": "1"}', '{"a": "2"}'], ".json": ["[", '{"a": "1"},', '{"a": "2"}', "]"]}
    file = write(tmp_path / f"d{kind}{packed}", *lines.get(kind, ["a", "1", "2"]), newline=newline, start=start)
    assert values_of(file) == [{"a": "1"}, {"a": "2"}]
    assert lines_of(file) == [2, 3]


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_last_line_without_newline_is_read(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"d{kind}"
    file.write_text({".jsonl": '{"a": "1"}', ".json": '[{"a": "1"}]', ".csv": "a\n1"}[kind])
    assert values_of(file) == [{"a": "1"}]


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_a_bad_row_deep_in_a_large_file_has_its_true_line(tmp_path: Path, kind: str, packed: str) -> None:
    """Line numbers that are relative to a block look right in small files."""
    lines = ["[", *(f"{ROW}," for _ in range(39_998)), ROW, "]"] if kind == ".json" else [ROW] * 40_000
    if kind == ".csv":
        lines = ["instruction,output", *("hi,yes" for _ in range(39_999))]
    lines[35_000] = {".jsonl": ROW[:-1], ".json": '{"a": tru},', ".csv": "hi,yes,no"}[kind]
    file = write(tmp_path / f"d{kind}{packed}", *lines)
    if kind == ".json":
        assert error_of(file).startswith(f"{file}:35001: malformed JSON")
        return
    rows = read(file)
    bad = [parse_row(row, "messages") for row in rows if row.origin.line == 35_001]
    assert [str(row).startswith(f"{file}:35001: ") for row in bad if isinstance(row, BadRow)] == [True]
    assert [row.origin.line for row in rows] == list(range(2 if kind == ".csv" else 1, 40_001))


# ---------------------------------------------------------------- JSON arrays


def test_json_file_with_one_object_per_line_is_read_as_lines(tmp_path: Path) -> None:
    assert lines_of(write(tmp_path / "d.json", "", ROW, ROW)) == [2, 3]


def test_json_array_rows_have_the_line_where_they_start(tmp_path: Path) -> None:
    rows = [{**CHAT, "n": n} for n in range(40)]
    file = tmp_path / "d.json"
    file.write_text("\n\n" + json.dumps(rows, indent=2))
    lines = file.read_text().split("\n")
    expected = [number for number, line in enumerate(lines, start=1) if line == "  {"]
    assert lines_of(file) == expected
    assert len(expected) == 40


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("[\n{},\n{]", 3, "malformed JSON"),
        ("[\n{}\n\n{}]", 4, "expected ',' or ']'"),
        ("[\n{},\n", 3, "malformed JSON"),
        ("[\n", 2, "malformed JSON"),
        ("[{},\n]", 2, "malformed JSON"),
        ("[{}", 1, "end of file"),
        ("[1,\n2.]", 2, "got '.'"),
        ("[{}]\n]", 2, "text after the end"),
        ('[{},\n{"a": "b}]', 2, "Unterminated string"),
        ('[{},\n{"a":\n "b\n"}]', 3, "Invalid control character"),
        ("[{},\n" + "[" * 100_000, 2, "nested too deeply"),
        ('{"data":\n []}', 1, "neither an array of rows nor one object per line"),
    ],
)
def test_broken_json_files_are_fatal_and_name_the_line(tmp_path: Path, text: str, line: int, reason: str) -> None:
    file = tmp_path / "d.json"
    file.write_text(text)
    message = error_of(file)
    assert message.startswith(f"{file}:{line}: ")
    assert reason in message


def test_a_row_that_is_no_object_or_has_a_huge_number_does_not_end_an_array(tmp_path: Path) -> None:
    values = ["1", '"a"', "null", '{"n": ' + "9" * 5000 + "}", "NaN", ROW]
    rows = read(write(tmp_path / "d.json", "[" + ", ".join(values) + "]"))
    assert [row.data for row in rows] == [value.encode() for value in values]


def test_invalid_utf8_in_an_array_names_the_line(tmp_path: Path) -> None:
    assert error_of(write(tmp_path / "d.json", b"[", b'{"a": "\xff"}]')).startswith(
        f"{tmp_path / 'd.json'}:2: invalid UTF-8"
    )
    assert ":3: invalid UTF-8" in error_of(write(tmp_path / "e.json", b"[", b"{}]", b"\xe2\x82", newline=b"\n"))


def random_value(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.randrange(9 if depth < 3 else 7)
    if kind < 3:
        return "".join(draw.choice('a"\\/{}[],: \n\té€😀\u2028') for _ in range(draw.randrange(12)))
    if kind < 5:
        return draw.choice([draw.randrange(-(10**20), 10**20), draw.random(), -1e-300, 1e21, 0])
    if kind < 7:
        return draw.choice([True, False, None])
    values = [random_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    return values if kind == 7 else {str(index): value for index, value in enumerate(values)}


def random_array(draw: random.Random) -> str:
    def space() -> str:
        return "".join(draw.choice(" \n\t\r") for _ in range(draw.randrange(4)))

    rows = []
    for _ in range(draw.randrange(6)):
        indent, is_ascii = draw.choice([None, 1]), draw.random() < 0.5
        rows.append(space() + json.dumps(random_value(draw), indent=indent, ensure_ascii=is_ascii) + space())
    return space() + "[" + (",".join(rows) or space()) + "]" + space()


def array_by_the_whole_text(text: str) -> list[tuple[int, Any]]:
    """Values of a sound array and their lines, found with the whole text in memory."""
    decoder, found = json.JSONDecoder(), []
    position = text.index("[") + 1
    while True:
        position += len(text[position:]) - len(text[position:].lstrip(" \n\t\r,"))
        if text[position] == "]":
            return found
        value, end = decoder.raw_decode(text, position)
        found.append((1 + text.count("\n", 0, position), value))
        position = end


def outcome(path: Path) -> tuple[list[tuple[int, Any]], str]:
    """What was read before an error, and the error."""
    found = []
    try:
        for row in iter_rows(source(path)):
            found.append((row.origin.line, row.data))
    except DataError as error:
        return found, str(error)
    return found, ""


def test_arrays_read_by_tiny_blocks_are_those_of_the_whole_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, file = random.Random(0), tmp_path / "d.json"
    for number in range(300):
        text = random_array(draw)
        file.write_bytes(text.encode())
        monkeypatch.setattr(readers, "BLOCK_BYTES", draw.choice([1, 2, 3, 7, 40]))
        got = [(row.origin.line, json.loads(row.data)) for row in read(file) if isinstance(row.data, bytes)]
        assert repr(got) == repr(array_by_the_whole_text(text)), f"array {number}: {text!r}"


def test_broken_arrays_fail_alike_whatever_the_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that a block cuts off must not be taken for a malformed one, nor the other way round."""
    draw, file = random.Random(1), tmp_path / "d.json"
    for number in range(400):
        text = random_array(draw)
        start = text.index("[") + 1
        place = draw.randrange(start, len(text))
        broken = text[:place] + draw.choice(["", '"', "}", "]", "\\", "x", "1", text[place + 1 :]]) + text[place + 1 :]
        file.write_bytes((broken if number % 2 else text[:place]).encode())
        monkeypatch.setattr(readers, "BLOCK_BYTES", 2**18)
        expected = outcome(file)
        monkeypatch.setattr(readers, "BLOCK_BYTES", draw.choice([1, 2, 3, 7, 40]))
        assert outcome(file) == expected, f"array {number}: {file.read_text()!r}"


def test_malformed_rows_are_found_where_they_are_and_not_at_the_end_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of 8 GiB whose second row is malformed is not read on."""
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 2**24)
    file = write(tmp_path / "d.json", "[", ROW + ",", '{"a": tru}')
    with file.open("ab") as stream:
        stream.truncate(2**33)  # sparse
    assert error_of(file).startswith(f"{file}:3: malformed JSON in an array, rows after it cannot be read: Expecting")


# ---------------------------------------------------------------- CSV


def test_csv_records_have_the_line_where_they_start(tmp_path: Path) -> None:
    records = ['"a', "", 'b, ""c""",yes', "d,e", '"f', 'g","h', 'i"', "j,k"]
    file = write(tmp_path / "d.csv", "instruction,output", "", *records)
    assert [(row.origin, row.data) for row in read(file)] == [
        (Origin(str(file), 3), {"instruction": 'a\n\nb, "c"', "output": "yes"}),
        (Origin(str(file), 6), {"instruction": "d", "output": "e"}),
        (Origin(str(file), 7), {"instruction": "f\ng", "output": "h\ni"}),
        (Origin(str(file), 10), {"instruction": "j", "output": "k"}),
    ]
    assert detect_format(source(file)) == "alpaca"
    assert isinstance(parse_row(read(file)[0], "alpaca"), Conversation)


def test_empty_csv_cells_are_left_out(tmp_path: Path) -> None:
    file = write(tmp_path / "d.csv", "a,b,c", "1,,3", ",,", '"",2,')
    assert values_of(file) == [{"a": "1", "c": "3"}, {}, {"b": "2"}]


def test_csv_cells_may_be_long(tmp_path: Path) -> None:
    text = "x" * 200_000
    assert values_of(write(tmp_path / "d.csv", "a,b", f"{text},2")) == [{"a": text, "b": "2"}]


@pytest.mark.parametrize(
    ("record", "cause", "reason"),
    [
        (b"1", "bad_structure", "1 cells under a header of 2"),
        (b"1,2,3", "bad_structure", "3 cells under a header of 2"),
        (b'"1\n2"', "bad_structure", "1 cells under a header of 2"),
        (b"1,\xff", "invalid_utf8", "invalid UTF-8 at byte 2 of line 3"),
        (b'1,"\n\xe2"', "invalid_utf8", "invalid UTF-8 at byte 0 of line 4"),
        (b"1,a\x00b", "control_character", "NUL"),
    ],
)
def test_a_bad_csv_record_is_refused_with_its_line_and_the_next_are_read(
    tmp_path: Path, record: bytes, cause: str, reason: str
) -> None:
    file = write(tmp_path / "d.csv", "instruction,output", "a,b", record, "c,d")
    results = [parse_row(row, "alpaca") for row in read(file)]
    assert [isinstance(result, BadRow) for result in results] == [False, True, False]
    assert isinstance(results[1], BadRow)
    assert results[1].cause == cause
    assert str(results[1]).startswith(f"{file}:3: ")
    assert reason in results[1].reason


@pytest.mark.parametrize(
    ("records", "line", "reason"),
    [
        ([b"a,b", b"1,2", b'"3'], 3, "unexpected end of data"),
        ([b"a,b", b'"1"x,2', b"3,4"], 2, "',' expected after '\"'"),
        ([b"a,b", b"1,2\r3,4"], 2, "new-line character"),
        ([b"a,b\r1,2"], 1, "new-line character"),
        ([b"", b"a,,c"], 2, "column 2 has no name"),
        ([b"a,b,a"], 1, "two columns are called 'a'"),
        ([b"instruction;output"], 1, "separated by ';'"),
        ([b"a,\xff"], 1, "invalid UTF-8"),
    ],
)
def test_csv_that_cannot_be_told_apart_is_fatal(tmp_path: Path, records: list[bytes], line: int, reason: str) -> None:
    message = error_of(write(tmp_path / "d.csv", *records))
    assert message.startswith(f"{tmp_path / 'd.csv'}:{line}: ")
    assert reason in message


def test_csv_tables_are_those_that_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, file = random.Random(2), tmp_path / "d.csv"
    for number in range(100):
        names = [f"c{index}" for index in range(1, 1 + draw.randrange(2, 5))]
        text, expected = io.StringIO(), []
        # A writer of "\n" leaves a carriage return unquoted unless it quotes all.
        style = draw.choice([{"lineterminator": "\n", "quoting": csv.QUOTE_ALL}, {"lineterminator": "\r\n"}])
        writer = csv.writer(text, **style)  # type: ignore[arg-type]
        writer.writerow(names)
        for _ in range(draw.randrange(6)):
            cells = ["".join(draw.choice('ab,"\n\r é€') for _ in range(draw.randrange(6))) for _ in names]
            line = 1 + text.getvalue().count("\n")
            writer.writerow(cells)
            expected.append((line, {name: cell for name, cell in zip(names, cells, strict=True) if cell}))
        file.write_bytes(text.getvalue().encode())
        monkeypatch.setattr(readers, "BLOCK_BYTES", draw.choice([1, 2, 7, 2**18]))
        assert [(row.origin.line, row.data) for row in read(file)] == expected, f"table {number}: {text.getvalue()!r}"


# ---------------------------------------------------------------- compression


@pytest.mark.parametrize("packed", [".gz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_files_of_several_members_or_frames_are_read_whole(tmp_path: Path, kind: str, packed: str) -> None:
    values = [{"a": str(number)} for number in range(3000)]
    text = {
        ".jsonl": "".join(json.dumps(value) + "\n" for value in values),
        ".json": json.dumps(values),
        ".csv": "a\n" + "".join(f"{value['a']}\n" for value in values),
    }[kind].encode()
    parts = [text[start : start + 5001] for start in range(0, len(text), 5001)]
    file = tmp_path / f"d{kind}{packed}"
    file.write_bytes(b"".join(map(PACKERS[packed], [*parts, b""])))
    assert values_of(file) == values


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_truncated_files_say_after_which_line(tmp_path: Path, packed: str) -> None:
    draw = random.Random(3)
    lines = [json.dumps({"n": draw.random()}).encode() + b"\n" for _ in range(20_000)]
    whole = PACKERS[packed](b"".join(lines))
    file = tmp_path / f"d.jsonl{packed}"
    numbers = set()
    for size in (1, 5, len(whole) // 3, len(whole) // 2, len(whole) - 9, len(whole) - 1):
        file.write_bytes(whole[:size])
        rows, error = outcome(file)
        assert error.startswith(f"{file}: cannot be decompressed after line {len(rows)}: "), (size, error)
        assert [data for _, data in rows] == lines[: len(rows)]
        numbers.add(len(rows))
    assert {0, 20_000} < numbers


@pytest.mark.parametrize("packed", [".gz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_files_that_are_not_compressed_as_named_are_refused(tmp_path: Path, kind: str, packed: str) -> None:
    file = tmp_path / f"d{kind}{packed}"
    file.write_text(ROW + "\n")
    assert error_of(file).startswith(f"{file}: cannot be decompressed after line 0: ")
    file.write_bytes(PACKERS[packed](b"[{}]\n") + b"garbage")
    assert error_of(file).startswith(f"{file}: cannot be decompressed after line 1: ")


@pytest.mark.parametrize("num_nuls", [1, 4096, 10_000])
def test_nuls_behind_a_member_of_a_gz_file_are_padding(tmp_path: Path, num_nuls: int) -> None:
    """As on tapes, and as gzip reads it. Before the first member they are damage, and in zst everywhere."""
    member, nuls, line = gzip.compress(f"{ROW}\n".encode()), bytes(num_nuls), f"{ROW}\n".encode()
    file = tmp_path / "d.jsonl.gz"
    for whole in (member + nuls, member + nuls + member, member + nuls + member + nuls):
        file.write_bytes(whole)
        assert b"".join(row.data for row in read(file)) == gzip.decompress(whole)  # type: ignore[misc]
    cut_off = member + nuls + member[:9]
    for damaged, num_lines in ((nuls + member, 0), (nuls, 0), (member + nuls + b"x", 1), (cut_off, 1)):
        file.write_bytes(damaged)
        assert error_of(file).startswith(f"{file}: cannot be decompressed after line {num_lines}: ")
    file = tmp_path / "d.jsonl.zst"
    file.write_bytes(PACKERS[".zst"](line) + nuls)
    assert error_of(file).startswith(f"{file}: cannot be decompressed after line 1: ")


def test_damaged_bytes_of_a_gz_file_are_found(tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl.gz", *[ROW] * 100)
    whole = bytearray(file.read_bytes())
    whole[-6] ^= 1  # in the checksum
    file.write_bytes(whole)
    assert "incorrect data check" in error_of(file)


def test_hash_is_of_the_bytes_on_disk_and_not_of_the_place(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name / "d.jsonl.gz", ROW) for name in "ab")
    second.write_bytes(first.read_bytes())
    assert hash_source(source(first)) == hash_source(source(second))
    second.write_bytes(gzip.compress(f"{ROW}\n".encode(), compresslevel=1, mtime=1))
    assert values_of(first) == values_of(second)
    assert hash_source(source(first)) != hash_source(source(second))
    third, fourth = (write(tmp_path / name, "a,b") for name in ("d.jsonl", "d.csv"))
    assert hash_source(source(third)) != hash_source(source(fourth))


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.json.zst", "d.csv", "d.parquet"])
def test_reading_tells_how_many_bytes_of_the_files_it_has_read(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    if name == "d.parquet":
        pa.parquet.write_table(pa.Table.from_pylist([CHAT] * 1200), file)
    else:
        write(file, *(["prompt,completion", *["q,a"] * 1200] if name == "d.csv" else [ROW] * 1200))
    told: list[int] = []
    assert len(list(iter_rows(source(file), on_read=told.append))) == 1200
    assert sum(told) == pytest.approx(count_bytes(source(file)), abs=len(told))


# ---------------------------------------------------------------- Parquet


def test_parquet_rows_are_numbered_and_null_fill_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "d.parquet"
    rows = [{**CHAT, "tools": None, "score": 0.5, "system": "s"}] * 1200
    turns = [{"role": "user", "content": None}, {"role": "assistant", "content": "a", "parts": [{"x": 1, "y": None}]}]
    rows[1100] = {"messages": turns, "tools": None, "score": None}
    pa.parquet.write_table(pa.Table.from_pylist(rows), file, row_group_size=500)
    found = read(file)
    assert [row.origin for row in found] == [Origin(str(file), number) for number in range(1, 1201)]
    assert found[0].data == {**CHAT, "system": "s"}
    turns = [{"role": "user"}, {"role": "assistant", "content": "a", "parts": [{"x": 1}]}]
    assert found[1100].data == {"messages": turns}


def test_json_keeps_its_nulls(tmp_path: Path) -> None:
    (row,) = read(write(tmp_path / "d.jsonl", '{"tools": null}'))
    assert row.data == b'{"tools": null}\n'


def test_parquet_columns_that_no_format_has_are_read_when_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "d.parquet"
    pa.parquet.write_table(
        pa.Table.from_pylist([{**CHAT, "meta": {"level": 3, "x": 1}, "score": 0.5, "b": b"0"}]), file
    )
    assert [list(row.data) for row in read(file)] == [["messages"]]  # type: ignore[arg-type]
    for column, expected in (("meta.level", {"meta": {"level": 3, "x": 1}}), ("score", {"score": 0.5})):
        (row,) = iter_rows(source(file), extra_columns=[column])
        assert row.data == CHAT | expected


def test_parquet_text_that_is_no_utf8_refuses_its_row(tmp_path: Path) -> None:
    texts = pa.array([b"a", b"\xff", b"c"], pa.binary()).view(pa.string())
    file = tmp_path / "d.parquet"
    pa.parquet.write_table(pa.table({"instruction": texts, "output": texts}), file)
    results = [parse_row(row, "alpaca") for row in read(file)]
    assert [isinstance(result, Conversation) for result in results] == [True, False, True]
    assert str(results[1]).startswith(f"{file}:2: invalid UTF-8")


def test_damaged_or_foreign_parquet_is_named(tmp_path: Path) -> None:
    assert error_of(write(tmp_path / "d.parquet", "PAR1 no")).startswith(
        f"{tmp_path / 'd.parquet'}: cannot be read as Parquet"
    )
    file = tmp_path / "e.parquet"
    pa.parquet.write_table(pa.table({"text": ["a"]}), file)
    assert "none of its columns 'text' is one of messages" in error_of(file)


FIELDS: dict[str, Any] = {
    "messages": CHAT["messages"],
    "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}],
    "prompt": "hi",
    "completion": "yes",
    "instruction": "hi",
    "output": "yes",
    "input": "there",
    "history": [["a", "b"]],
    "system": "Be brief.",
    "tools": [{"name": "add"}],
    "functions": [{"name": "add"}],
    "reasoning_content": "Hm.",
    "reasoning": "Hm.",
    "thinking": "Hm.",
    "weight": 0.5,
    "train": False,
    "images": ["a.png"],
    "image": {"bytes": b"x", "path": None},
    "videos": ["a.mp4"],
    "video": "a.mp4",
    "audios": ["a.wav"],
    "audio": "a.wav",
}


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    ("keys", "row_format"),
    [
        (["messages"], "messages"),
        (["prompt", "completion"], "prompt_completion"),
        (["instruction", "output"], "alpaca"),
        (["conversations"], "sharegpt"),
    ],
)
def test_a_row_of_parquet_means_what_it_means_in_jsonl(
    tmp_path: Path, field: str, keys: list[str], row_format: str
) -> None:
    row = {key: FIELDS[key] for key in (*keys, field)}
    pa.parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "d.parquet")
    write(tmp_path / "d.jsonl", json.dumps(row, default=repr))
    results = [parse_row(read(tmp_path / name)[0], row_format) for name in ("d.parquet", "d.jsonl")]
    one, other = (
        (found.cause, found.reason) if isinstance(found, BadRow) else (found.messages, found.tools) for found in results
    )
    assert one == other
    is_refused = field in ("weight", "train", "images", "image", "videos", "video", "audios", "audio")
    assert isinstance(results[0], BadRow) or not is_refused


def test_every_field_that_means_something_is_compared_between_parquet_and_jsonl() -> None:
    assert set(FIELDS) == set(ROW_FIELDS)


# ---------------------------------------------------------------- which files


def test_folders_are_read_in_sorted_order_and_may_mix_kinds(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    write(folder / "b.json", json.dumps([CHAT, CHAT]))
    write(folder / "a.jsonl", ROW)
    write(folder / "d" / "x.jsonl.zst", ROW)
    write(folder / "e.CSV.gz", "a", "1")
    write(folder / "README.md", "text")
    write(folder / ".cache" / "z.jsonl", "{")
    write(folder / ".z.jsonl", "{")
    (folder / "f.jsonl").mkdir()
    pa.parquet.write_table(pa.Table.from_pylist([CHAT]), folder / "c.parquet")
    names = ["a.jsonl", "b.json", "b.json", "c.parquet", "d/x.jsonl.zst", "e.CSV.gz"]
    assert [os.path.relpath(row.origin.path, folder) for row in read(folder)] == names
    assert [os.path.relpath(name, folder) for name in source_names(source(folder))] == list(dict.fromkeys(names))


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "b.jsonl", ROW)
    write(tmp_path / "data" / "a.jsonl", ROW)
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "data")
    assert [file.name for file in list_files(source(tmp_path / "data"))] == ["a.jsonl", "b.jsonl"]


def test_patterns_are_sorted_and_leave_hidden_files_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.jsonl", "a.jsonl", ".c.jsonl", "x/d.jsonl", "x/y/e.jsonl.gz", "x/.z/f.jsonl", "readme.txt"):
        write(tmp_path / name, ROW)
    monkeypatch.chdir(tmp_path)

    def names(pattern: str) -> list[str]:
        return [str(file) for file in list_files(source(pattern))]

    assert names("*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert names("[!a].jsonl") == ["b.jsonl"]
    assert names("**/*.jsonl*") == ["a.jsonl", "b.jsonl", "x/d.jsonl", "x/y/e.jsonl.gz"]
    assert names("*") == ["a.jsonl", "b.jsonl"]
    assert names(f"{tmp_path}/x/*") == [f"{tmp_path}/x/d.jsonl"]
    with pytest.raises(DataError, match=rf"^no\*\.jsonl: no file matches this pattern \(looked in {tmp_path}\)"):
        names("no*.jsonl")
    with pytest.raises(DataError, match="none of its 1 matches is a data file"):
        names("*.txt")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="is a folder; expected a file"):
        names("f*.jsonl")


def test_a_file_whose_name_is_a_pattern_is_a_file(tmp_path: Path) -> None:
    file = write(tmp_path / "a[1].jsonl", ROW)
    write(tmp_path / "a1.jsonl", "{")
    assert list_files(source(file)) == (file,)


def test_names_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    for name, inside in (("file", b"a\xff.jsonl"), ("folder", b"b\xff/a.jsonl"), ("link", b"c\xff.jsonl")):
        folder = tmp_path / name
        file = folder / os.fsdecode(inside)
        file.parent.mkdir(parents=True)
        if folder.name == "link":
            file.symlink_to(os.fsdecode(b"\xff"))
        else:
            file.write_text(ROW)
        shown = os.fsencode(file).decode("utf-8", "backslashreplace")
        for place in (folder, f"{folder}/**"):
            assert error_of(place) == f"{shown}: its name is not UTF-8; rename it"
    (tmp_path / "d.jsonl").symlink_to(os.fsdecode(b"\xff"))
    for place in (tmp_path / "d.jsonl", f"{tmp_path}/*.jsonl"):
        assert r"a link to \xff, which does not exist" in error_of(place)


@pytest.mark.parametrize("name", ["absent.jsonl", "./absent", "a/b/c", "/absent/x", "absent.csv.gz", "a/b.PARQUET"])
def test_absent_paths_are_not_taken_for_hub_ids(name: str) -> None:
    with pytest.raises(DataError, match="no such file"):
        list_files(Source(path=name))


def test_unknown_kinds_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"unknown kind of file '\.txt'; expected one of \.jsonl, \.jsonl\.gz, "):
        list_files(source(write(tmp_path / "d.txt", "a,b")))
    (tmp_path / "empty.jsonl").mkdir()
    with pytest.raises(DataError, match="no data file in this folder"):
        list_files(source(tmp_path / "empty.jsonl"))


@pytest.mark.parametrize("suffix", [suffix for suffix in readers.SUFFIXES if suffix != ".parquet"])
def test_empty_files_have_no_rows(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"d{suffix}"
    file.write_bytes(b"")
    assert read(file) == []
    assert read(write(file, "", " ") if not suffix.startswith(".csv") else write(file, "", "")) == []
    with pytest.raises(DataError, match="there is no readable row"):
        detect_format(source(file))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".json.gz", ".jsonl.zst"])
def test_utf16_is_named(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"d{suffix}"
    file.write_bytes(PACKERS[file.suffix if file.suffix in PACKERS else ""](ROW.encode("utf-16")))
    assert error_of(file).startswith(f"{file}: is UTF-16; expected UTF-8")


@pytest.mark.parametrize("suffix", [".jsonl", ".json.gz", ".parquet"])
def test_what_is_no_readable_file_is_refused_at_once(tmp_path: Path, suffix: str) -> None:
    for number, target in enumerate(("/dev/zero", tmp_path / "nowhere", "/proc/self/mem", tmp_path / "pipe")):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / f"d{suffix}").symlink_to(target)
    os.mkfifo(tmp_path / "pipe")
    expected = ["pipe or device", "nowhere, which does not exist", "", "pipe or device"]
    for number, reason in enumerate(expected):
        for path in (tmp_path / str(number), tmp_path / str(number) / f"d{suffix}", f"{tmp_path}/{number}/*"):
            message = error_of(path)
            assert message.startswith(f"{tmp_path}/{number}/d{suffix}: ")
            assert (reason or "cannot be ") in message
    assert "cannot be read" in error_of("x" * 5000 + ".jsonl")


# ---------------------------------------------------------------- memory


def test_lines_are_streamed(tmp_path: Path) -> None:
    """Reading the first row of a large file must not read the file: the second line is one that would raise."""
    file = write(tmp_path / "d.jsonl", ROW)
    with file.open("ab") as stream:
        stream.truncate(2**33)  # sparse: 8 GiB of NULs without a line break
    row = next(iter_rows(source(file)))
    assert row.origin.line == 1


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_rows_above_the_limit_are_refused_with_their_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, packed: str
) -> None:
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(readers, "MAX_RECORD_BYTES", 1000)
    long = '{"a": "' + "x" * 1000 + '"}'
    lines = {".jsonl": ['{"a": 1}', long], ".json": ['[{"a": 1},', long + "]"], ".csv": ["a,b", '1,"' + "\n" * 1000]}
    file = write(tmp_path / f"d{kind}{packed}", *lines[kind])
    assert error_of(file).startswith(f"{file}:2: a ")
    assert "more than 1000 bytes" in error_of(file)
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", len(long) + 1)
    if kind != ".csv":
        assert len(read(file)) == 2


def test_the_limit_of_an_array_row_is_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "d.json", '["a",', '"ééé"]')
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 8)
    assert len(read(file)) == 2
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 7)
    assert error_of(file) == f"{file}:2: a row of more than 7 bytes"


MEMORY = """
import sys
from pathlib import Path
from sft_dist.config import Source
from sft_dist.data import readers
from sft_dist.data.files import iter_rows
from sft_dist.errors import DataError

def resident_mib(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024

def peak(path):
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = resident_mib("VmRSS")
    try:
        num_rows = sum(1 for _ in iter_rows(Source(path=path)))
    except DataError as error:
        num_rows = str(error)
    return num_rows, resident_mib("VmHWM") - before

folder = Path(sys.argv[1])
names = ["d.jsonl", "d.json", "d.csv", "d.jsonl.gz"]
for name in names:
    peak(str(folder / "small" / name))
    print("large", name, *peak(str(folder / "large" / name)), sep="|")
loaded = {"pyarrow", "zstandard", "datasets", "huggingface_hub", "pandas"} & set(sys.modules)
assert not loaded, loaded
for name in ["d.json.zst", "d.parquet"]:
    peak(str(folder / "small" / name))
    print("large", name, *peak(str(folder / "large" / name)), sep="|")
readers.MAX_LINE_BYTES = 2**20
for name in ["d.jsonl.gz", "d.json.gz", "d.jsonl.zst"]:
    print("bomb", name, *peak(str(folder / "bomb" / name)), sep="|")
"""


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Files of 32 MB and more; a reader that holds one needs as much. Arrow takes 20 MB to start with."""
    text = "x" * 1000
    row = {"instruction": text, "output": text}
    for folder, count in (("small", 10), ("large", 16_000)):
        lines = [json.dumps(row)] * count
        write(tmp_path / folder / "d.jsonl", *lines)
        write(tmp_path / folder / "d.json", "[" + ",\n".join(lines) + "]")
        write(tmp_path / folder / "d.json.zst", "[" + ",".join(lines) + "]")
        write(tmp_path / folder / "d.csv", "instruction,output", *[f"{text},{text}"] * count)
        (tmp_path / folder / "d.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode(), 1))
        table = pa.Table.from_pylist([{**row, "output": f"{number:2000}"} for number in range(count)])
        pa.parquet.write_table(table, tmp_path / folder / "d.parquet", compression="none", use_dictionary=False)
    zeros = bytes(64 * 2**20)
    (tmp_path / "bomb").mkdir()
    for name in ("d.jsonl.gz", "d.json.gz"):
        start = b'[{"a": "' if ".json." in name else b""
        (tmp_path / "bomb" / name).write_bytes(gzip.compress(start + zeros.replace(b"\0", b"x"), 1))
    (tmp_path / "bomb" / "d.jsonl.zst").write_bytes(PACKERS[".zst"](zeros))
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], cwd=ROOT, timeout=120, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    found = [line.split("|") for line in result.stdout.splitlines()]
    assert len(found) == 9
    for case, name, num_rows, growth_mib in found:
        if case == "large":
            assert int(num_rows) == 16_000, name
        else:
            assert "more than 1048576 bytes" in num_rows, name
        assert float(growth_mib) < 26, found


# ---------------------------------------------------------------- the hub

HUB_READER = """
import json, sys, time
from sft_dist.config import Source
from sft_dist.data import hub
from sft_dist.data.files import hash_source, iter_rows, list_files, source_names
from sft_dist.errors import DataError

hub.PROBE_TIMEOUT_S = 2.0
for path, split, revision in json.loads(sys.argv[1]):
    source, begin = Source(path=path, split=split, revision=revision), time.monotonic()
    answer = {}
    try:
        answer["rows"] = [
            [str(row.origin), row.data if isinstance(row.data, dict) else json.loads(row.data)]
            for row in iter_rows(source)
        ]
        answer["names"], answer["hash"] = source_names(source), hash_source(source)
        assert list_files(source) == ()
    except DataError as error:
        answer["error"] = str(error)
    answer["seconds"] = time.monotonic() - begin
    answer["torch"] = "torch" in sys.modules
    print(json.dumps(answer))
"""


def ask_hub(url: str, home: Path, *asked: tuple[str, str, str | None], is_offline: bool = False) -> list[Any]:
    """Read data sets in a process of its own: the libraries read the environment when they are imported."""
    environment = os.environ | {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": str(int(is_offline)),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(ROOT),
        "NO_PROXY": "127.0.0.1",
    }
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_TOKEN", "HF_TOKEN_PATH"):
        environment.pop(name, None)
    command = [sys.executable, "-c", HUB_READER, json.dumps(asked)]
    result = subprocess.run(command, cwd=home, env=environment, timeout=120, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def chat_lines(*answers: str) -> bytes:
    return b"".join(
        json.dumps({"messages": [{"role": "assistant", "content": text}]}).encode() + b"\n" for text in answers
    )


def answers_of(found: dict[str, Any]) -> list[str]:
    assert "error" not in found, found
    return [row["messages"][0]["content"] for _, row in found["rows"]]


def repositories() -> dict[str, dict[str, hub_server.Files]]:
    table = io.BytesIO()
    rows = [json.loads(line) for line in chat_lines("p1", "p2").splitlines()]
    pa.parquet.write_table(pa.Table.from_pylist([{**row, "other": 1} for row in rows]), table)
    card = (
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - {split: train, path: a/*.jsonl}\n  - {split: extra, path: [b.json, c.csv.gz]}\n---\n# Title\n"
    )
    return {
        "org/chat": {
            "main": {
                "README.md": b"# Title\n",
                ".gitattributes": b"",
                "data/train.jsonl": chat_lines("new") + b"\n" + b'{"tools": null}\n',
                "data/test.jsonl": chat_lines("test"),
            },
            "v1": {"data/train.jsonl": chat_lines("old"), "data/test.jsonl": chat_lines("old test")},
        },
        "org/table": {
            "main": {f"data/{split}-00000-of-00001.parquet": table.getvalue() for split in ("train", "test")}
        },
        "org/card": {
            "main": {
                "README.md": card.encode(),
                "a/2.jsonl": chat_lines("a2"),
                "a/1.jsonl": chat_lines("a1"),
                "b.json": b"[\n" + chat_lines("b") + b"]",
                "c.csv.gz": gzip.compress(b"instruction,output\nhi,yes\n"),
                "d.jsonl": chat_lines("d"),
            }
        },
        "org/text": {"main": {"train.txt": b"hello\n"}},
    }


def test_hub_splits_are_read_from_the_files_of_their_commit(tmp_path: Path) -> None:
    with hub_server.serve(repositories()) as hub:
        commit = hub.commit("org/chat", "main")
        new, pinned, old, test, table, card, extra = ask_hub(
            hub.url,
            tmp_path,
            ("org/chat", "train", None),
            ("org/chat", "train", commit),
            ("org/chat", "train", "v1"),
            ("org/chat", "test", "v1"),
            ("org/table", "test", None),
            ("org/card", "train", None),
            ("org/card", "extra", None),
        )
        name = f"org/chat/data/train.jsonl@{commit[:7]}"
        assert new["rows"][0] == [f"{name}:1", json.loads(chat_lines("new"))]
        assert new["rows"][1] == [f"{name}:3", {"tools": None}]  # JSON does not pass through Arrow
        assert new["names"] == [name]
        assert not new["torch"]
        assert answers_of(old) == ["old"]
        assert answers_of(test) == ["old test"]
        assert len({found["hash"] for found in (new, old, test, table, card, extra)}) == 6
        assert new["hash"] == pinned["hash"]
        file = f"org/table/data/test-00000-of-00001.parquet@{hub.commit('org/table', 'main')[:7]}"
        assert [origin for origin, _ in table["rows"]] == [f"{file}:1", f"{file}:2"]
        assert table["rows"][1][1] == json.loads(chat_lines("p2"))
        assert answers_of(card) == ["a1", "a2"]
        assert [row for _, row in extra["rows"]] == [
            json.loads(chat_lines("b")),
            {"instruction": "hi", "output": "yes"},
        ]
        assert [origin.rsplit(":")[-1] for origin, _ in extra["rows"]] == ["2", "2"]
        fetched = [request for request in hub.requests if request.startswith("GET") and "resolve" in request]
        assert not [request for request in fetched if request.endswith("d.jsonl")], "only the split is downloaded"


def test_hub_data_moves_on_and_a_copy_is_read_offline(tmp_path: Path) -> None:
    asked = ("org/chat", "train", None)
    with hub_server.serve(repositories()) as hub:
        commit = hub.commit("org/chat", "main")
        pinned = ("org/chat", "train", commit)
        (before,) = ask_hub(hub.url, tmp_path, asked)
        hub.repositories["org/chat"]["main"] = {"data/train.jsonl": chat_lines("newest")}
        hub.requests.clear()
        offline, missing, unknown = ask_hub(
            hub.url, tmp_path, asked, ("org/chat", "test", None), ("org/table", "train", None), is_offline=True
        )
        assert hub.requests == []
        assert (offline["rows"], offline["hash"]) == (before["rows"], before["hash"])
        assert "data/test.jsonl" in missing["error"]
        assert "cannot be downloaded" in missing["error"]
        assert "HF_HUB_OFFLINE is set, and it was not read here before" in unknown["error"]
        (after,) = ask_hub(hub.url, tmp_path, asked)
        assert answers_of(after) == ["newest"]
        assert after["hash"] != before["hash"]
        (offline,) = ask_hub(hub.url, tmp_path, asked, is_offline=True)
        assert offline["rows"] == after["rows"]
    # The hub is gone. A commit cannot change, so its copy is used; a branch may have changed, so it is not, in silence.
    still, gone = ask_hub(hub.url, tmp_path, pinned, asked)
    assert (still["rows"], still["hash"]) == (before["rows"], before["hash"])
    assert "HF_HUB_OFFLINE=1 takes the version that was read here before" in gone["error"]


def test_reading_again_what_is_there_writes_nothing(tmp_path: Path) -> None:
    """The folder may be shared and not writable. Its owner may write even so, hence the comparison."""

    def entries() -> dict[Path, tuple[int, int]]:
        found = {path: path.stat() for path in tmp_path.rglob("*")}
        return {path: (status.st_ino, status.st_mtime_ns) for path, status in found.items()}

    asked = [("org/chat", "train", None), ("org/chat", "train", "v1")]
    with hub_server.serve(repositories()) as hub:
        before = ask_hub(hub.url, tmp_path, *asked)
        written, modes = entries(), {path: path.stat().st_mode for path in (tmp_path, *tmp_path.rglob("*"))}
        for path in modes:
            path.chmod(0o555 if path.is_dir() else 0o444)
        try:
            after = ask_hub(hub.url, tmp_path, *asked)
        finally:
            for path, mode in modes.items():
                path.chmod(mode)
    assert entries() == written
    assert [found["rows"] for found in after] == [found["rows"] for found in before]
    assert answers_of(after[1]) == ["old"]


def test_hub_errors_say_what_is_there(tmp_path: Path) -> None:
    with hub_server.serve(repositories()) as hub:
        split, revision, kind, absent, word, odd = ask_hub(
            hub.url,
            tmp_path,
            ("org/chat", "dev", None),
            ("org/chat", "train", "v9"),
            ("org/text", "train", None),
            ("org/nothing", "train", None),
            ("csv", "train", None),
            ("my data", "train", None),
        )
    assert split["error"] == "org/chat: the hub data set has no split 'dev'; it has train, test"
    assert revision["error"] == "org/chat: the hub data set has no revision 'v9'"
    assert kind["error"].startswith("org/text/train.txt: unknown kind of file in split 'train'; expected files ending")
    for name, found in (("org/nothing", absent), ("csv", word), ("my data", odd)):
        assert found["error"].startswith(
            f"{name}: neither a file (looked in {tmp_path}) nor a reachable hub data set: "
        )


def test_a_mistyped_name_fails_quickly_when_the_hub_is_out_of_reach(tmp_path: Path) -> None:
    """Clients retry with growing pauses, for half a minute and more. A second is for imports, on a busy machine."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    (refused,) = ask_hub(f"http://127.0.0.1:{port}", tmp_path, ("trian", "train", None))
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        (unanswered,) = ask_hub(f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path, ("trian", "train", None))
    for found in (refused, unanswered):
        assert found["error"].startswith(f"trian: neither a file (looked in {tmp_path}) nor a reachable hub data set: ")
    assert refused["seconds"] < 5
    assert unanswered["seconds"] < 8  # the limit is 2 s here
