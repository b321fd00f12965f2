"""The rows that the documentation shows are rows that are read, as it says."""

import re
from pathlib import Path

import pytest

from sft_dist.data.conversation import Conversation, Origin, RawRow
from sft_dist.data.rows import parse_row

DOCS = Path(__file__).parents[2] / "docs" / "data.md"
BLOCKS = re.findall(r"`(\w+)`: [^`]*?.*?```json\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.S)
ROWS = [(row_format, line) for row_format, block in BLOCKS for line in block.splitlines()]


def test_every_format_is_shown() -> None:
    assert [row_format for row_format, _ in BLOCKS] == ["messages", "prompt_completion", "alpaca", "sharegpt"]


@pytest.mark.parametrize(("row_format", "line"), ROWS)
def test_rows_in_the_docs_are_read(row_format: str, line: str) -> None:
    parsed = parse_row(RawRow(Origin("docs", 1), line.encode()), row_format)
    assert isinstance(parsed, Conversation), parsed
    assert parsed.messages[-1].content == "22.9 kg/m2"
    assert parsed.messages[-1].train
    assert bool(parsed.tools) == ('"tools"' in line)
