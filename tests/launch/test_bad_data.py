"""Bad data through the front door: each case ends in `file:line: reason` with the true line, and nothing is trained."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sft_dist.cli import main
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]


def chat(question: str = "q", answer: str = "a", **extra: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]} | extra


def turns(*messages: Any, **extra: Any) -> str:
    return json.dumps({"messages": list(messages)} | extra)


GOOD = json.dumps(chat("good", "yes"))
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


class Case(NamedTuple):
    """content: of a file of that name. line: where the fault is, None for the file as a whole."""

    name: str
    file: str
    content: bytes
    line: int | None
    reason: str


def row(name: str, text: str | bytes, reason: str, *, before: int = 2, file: str = "d.jsonl") -> Case:
    """A bad row behind `before` good ones and in front of another."""
    bad = text if isinstance(text, bytes) else text.encode()
    good = GOOD.encode()
    return Case(name, file, b"\n".join([*[good] * before, bad, good]) + b"\n", before + 1, reason)


CASES = [
    # JSON
    row("half an object", '{"messages": [', "malformed JSON"),
    row("no JSON", "hello there", "malformed JSON"),
    row("single quotes", "{'messages': []}", "malformed JSON"),
    row("trailing comma", GOOD[:-1] + ",}", "malformed JSON"),
    row("two rows on a line", GOOD + " " + GOOD, "malformed JSON"),
    row("NUL byte", GOOD.encode().replace(b"good", b"go\x00od"), "NUL"),
    row("escaped NUL", GOOD.replace("good", r"go\u0000od"), "NUL"),
    row("half a surrogate pair", GOOD.replace("good", r"\ud83d oops"), "surrogate"),
    row("Latin-1 bytes", GOOD.encode().replace(b"good", b"gr\xfc\xdf"), "invalid UTF-8"),
    row("duplicate key in a turn", GOOD.replace('"content": "yes"', '"content": "no", "content": "yes"'), "twice"),
    row("duplicate key in the row", GOOD[:-1] + ', "messages": []}', "twice"),
    row("deep nesting", '{"messages": ' + "[" * 100_000 + "]" * 100_000 + "}", "cannot be read"),
    row("a number too long to read", turns(USER, ANSWER | {"weight": 0}).replace("0}", "1" * 5000 + "}"), "JSON"),
    row("CRLF line ends", '{"messages": [\r', "malformed JSON"),
    # structure
    row("a list for a row", "[1, 2]", "a row is an object"),
    row("a string for a row", '"hello"', "a row is an object"),
    row("messages is a string", '{"messages": "hi"}', "expected a list of turns"),
    row("messages is null", '{"messages": null}', "no 'messages'"),
    row("no messages at all", '{"text": "hello"}', "no 'messages'"),
    row("no turns", '{"messages": []}', "empty"),
    row("a turn is a string", turns("hi", ANSWER), "messages[0] is a string"),
    row("content is a number", turns(USER, ANSWER | {"content": 4}), "is a number; expected text"),
    row("content is an object", turns(USER | {"content": {"text": "x"}}, ANSWER), "expected text"),
    row("no content", turns(USER, {"role": "assistant"}), "no 'content'"),
    row("no role", turns({"content": "x"}, ANSWER), "no 'role'"),
    row("an image part", turns(USER | {"content": [{"type": "image", "url": "x"}]}, ANSWER), "only text"),
    row("an unknown role", turns(USER, {"role": "bot", "content": "x"}, ANSWER), "role 'bot'"),
    row("a role in capitals", turns({"role": "User", "content": "x"}, ANSWER), "role 'User'"),
    row("no assistant turn", turns(USER), "no assistant turn"),
    row("an empty answer", turns(USER, ANSWER | {"content": ""}), "is empty"),
    row("an answer of white space", turns(USER, ANSWER | {"content": " \n\t"}), "is empty"),
    row("a weight of one half", turns(USER, ANSWER | {"weight": 0.5}), "weight"),
    row("train as text", turns(USER, ANSWER | {"train": "no"}), "train"),
    row("every answer untrained", turns(USER, ANSWER | {"train": False}), "train: false"),
    row("tool arguments that are no JSON", turns(
        USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{a: 1}"}}]}), "arguments"),
    row("a tool result before any call", turns({"role": "tool", "content": "3"}, USER, ANSWER), "turn 1 (tool)"),
    row("a result of another call", turns(
        USER, {"role": "assistant", "tool_calls": [{"id": "c1", "function": {"name": "f", "arguments": {}}}]},
        {"role": "tool", "content": "3", "tool_call_id": "c2"}, ANSWER), "tool_call_id"),
    row("NaN among the arguments", turns(
        USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": float("nan")}}}]}),
        "JSON does not have"),
    row("tools without a name", turns(USER, ANSWER, tools=[{"type": "function", "function": {}}]), "name"),
    row("images beside the text", turns(USER, ANSWER, images=["a.png"]), "images"),
    row("a row of another format", json.dumps({"instruction": "a", "output": "b"}), "alpaca format"),
    row("a tool that the template cannot write", turns(USER, ANSWER, tools=[{"name": "look"}]), "leaves out the tools"),
    # files
    Case("an empty file", "d.jsonl", b"", None, "no readable row"),
    Case("only line breaks", "d.jsonl", b"\n\n\n", None, "no readable row"),
    Case("UTF-16", "d.jsonl", GOOD.encode("utf-16"), None, "UTF-16"),
    Case("a BOM and a bad row", "d.jsonl", b"\xef\xbb\xbf" + f"{GOOD}\n{{\n".encode(), 2, "malformed JSON"),
    Case("an array cut off", "d.json", f"[\n{GOOD},\n{GOOD},\n{{".encode(), 4, "malformed JSON in an array"),
    Case("an array with a bad row", "d.json", f"[\n{GOOD},\n\n{GOOD},\n4]".encode(), 5, "a row is an object"),
    Case("text behind an array", "d.json", f"[{GOOD}]\nmore".encode(), 2, "after the end of the array"),
    Case("a pretty-printed object", "d.json", b'{\n"messages": []\n}', 1, "neither an array"),
    Case("gz cut off", "d.jsonl.gz", gzip.compress(f"{GOOD}\n".encode() * 4000)[:-20], None, "cannot be decompressed"),
    Case("no gz at all", "d.jsonl.gz", f"{GOOD}\n".encode(), None, "cannot be decompressed"),
    Case("not Parquet", "d.parquet", b"PAR1 and nothing else", None, "Parquet"),
    Case("CSV with a cell too many", "d.csv", b"prompt,completion\nq,a\nq,a,b\n", 3, "cell"),
    Case("CSV with an empty answer", "d.csv", b'prompt,completion\n"q\nq",a\nq,\n', 4, "no 'completion'"),
    Case("CSV with two columns of a name", "d.csv", b"prompt,prompt\nq,a\n", None, "prompt"),
    Case("ShareGPT with an unknown speaker", "d.jsonl", b"\n".join(
        json.dumps({"conversations": [{"from": who, "value": "x"}, {"from": "gpt", "value": "y"}]}).encode()
        for who in ("human", "human", "narrator")), 3, "role 'narrator'"),
    Case("a folder without data", "d/readme.txt", b"hello", None, "no data file"),
]  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """The command line that prepares a file."""
    folder = tmp_path_factory.mktemp("model")
    model = tiny.write_tokenizer(folder / "model")

    def command(data: Path, *overrides: str) -> list[str]:
        path = data.parent / "recipe.yaml"
        path.write_text(
            f"run: {{name: r, dir: {data.parent / 'runs'}}}\nmodel: {{path: {model}}}\ndata: {{train: {data}}}\n"
            "batch: {examples: 1}\noptim: {lr: 0.001}\n"
        )
        return ["prepare", str(path), *overrides]

    return command


def test_there_are_at_least_forty_kinds() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 40


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_data_is_refused_with_its_line(
    case: Case, recipe: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / case.file
    data.parent.mkdir(exist_ok=True)
    data.write_bytes(case.content)
    source = data if case.reason != "no data file" else data.parent
    assert main(recipe(source)) == 2
    errors = capsys.readouterr().err
    assert all(line.startswith("error: ") for line in errors.splitlines())
    where = str(source) if case.line is None else f"{data}:{case.line}: "
    assert [line for line in errors.splitlines() if where in line and case.reason in line], errors
    assert not [path for path in (tmp_path / "runs" / "stores").glob("*") if path.suffix != ".lock"]


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.line == 3 and case.file == "d.jsonl"], ids=lambda c: c.name
)
def test_a_dropped_row_is_counted_and_not_trained(
    case: Case, recipe: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / case.file
    data.write_bytes(case.content)
    assert main(recipe(data, "data.bad_rows=drop")) == 0
    num_rows = len([line for line in case.content.split(b"\n") if line.strip()])
    shown = capsys.readouterr().out
    assert f"{num_rows} read, {num_rows - 1} kept, 1 dropped" in shown
    assert f"{data}:3: " in shown


def test_a_message_of_a_million_characters_is_too_long_and_nothing_worse(
    recipe: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text(f"{GOOD}\n{json.dumps(chat('a' * 1_000_000))}\n")
    assert main(recipe(data)) == 0
    assert f"1 too_long, e.g. {data}:2: 1000004 tokens" in capsys.readouterr().out
    assert main(recipe(data, "data.too_long=error")) == 2
    assert f"{data}:2: 1000004 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "jsonl.gz"])
def test_line_35001_of_40000_is_named_right(
    kind: str, recipe: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / f"d.{kind}"
    if kind == "csv":
        lines = ["prompt,completion", *["q,a"] * 34_999, "q,a,b", *["q,a"] * 4_999]
    elif kind == "json":
        lines = ["[", *[GOOD + ","] * 34_999, "{},", *[GOOD + ","] * 4_998, GOOD, "]"]
    else:
        lines = [*[GOOD] * 35_000, "{}", *[GOOD] * 4_999]
    content = ("\n".join(lines) + "\n").encode()
    data.write_bytes(gzip.compress(content, 1) if kind.endswith("gz") else content)
    assert main(recipe(data, "data.workers=1")) == 2
    assert f"{data}:35001: " in capsys.readouterr().err


def test_a_bad_row_ends_a_real_process_with_one_line_and_no_traceback(
    recipe: Callable[..., list[str]], tmp_path: Path
) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text("\n".join([*[GOOD] * 3000, '{"messages": ['] * 10))  # large enough for worker processes
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "300"}
    command = [sys.executable, "-m", "sft_dist", *recipe(data, "data.workers=2")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    first, *listed = done.stderr.splitlines()
    assert first.startswith("error: 10 bad rows of 30010 (10 malformed_json)")
    assert listed[0].startswith(f"error:   {data}:3001: malformed JSON")
