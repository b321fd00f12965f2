"""The troubleshooting page: every failure has its parts, and what it quotes is what the program says."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
ENTRIES = re.split(r"^### ", PAGE, flags=re.M)[1:]
QUOTED = re.compile(r'"((?:[^"\n]|\n(?!\n))+)"')  # within a paragraph


def said_by_the_program() -> str:
    """All texts in the code, those between the values of an f-string too."""
    texts = []
    for path in (ROOT / "sft_dist").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_at_least_twenty_failures_each_with_cause_what_is_done_and_what_to_do() -> None:
    assert len(ENTRIES) >= 20
    for number, entry in enumerate(ENTRIES, start=1):
        assert entry.startswith(f"{number}. ")
        parts = [entry.find(f"\n**{part}**") for part in ("Cause.", "Here.", "If you see it.")]
        assert -1 not in parts, entry
        assert parts == sorted(parts), entry


def test_messages_that_are_quoted_are_those_of_the_program() -> None:
    said = said_by_the_program()
    quoted = [" ".join(message.split()) for message in QUOTED.findall(PAGE)]
    assert len(quoted) >= 9
    for message in quoted:
        for part in filter(None, message.split("…")):
            assert part in said, f"{message!r}: nothing in the code says {part!r}"
