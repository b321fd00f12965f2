"""The Python that the documentation shows prints what the documentation says."""

import contextlib
import io
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
MARK = "<!-- run by tests/unit/test_doc_examples.py -->"
EXAMPLE = re.compile(rf"{MARK}\n```python\n(?P<code>.*?)```\n\n```text\n(?P<output>.*?)```", re.S)
EXAMPLES = [
    pytest.param(found["code"], found["output"], id=f"{page.stem}{index}")
    for page in sorted(DOCS.glob("*.md"))
    for index, found in enumerate(EXAMPLE.finditer(page.read_text(encoding="utf-8")))
]
NUMBER = re.compile(r"\d+\.\d+(?:e[+-]\d+)?")
ROUNDING = 1e-5
"""Smaller numbers are rounding errors, and those of another machine are others."""


@pytest.mark.parametrize(("code", "output"), EXAMPLES)
def test_an_example_prints_what_the_page_says(code: str, output: str) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "example", "exec"), {})
    assert NUMBER.sub("#", printed.getvalue()) == NUMBER.sub("#", output)
    for found, said in zip(*(map(float, NUMBER.findall(text)) for text in (printed.getvalue(), output)), strict=True):
        # Half a unit of the last digit that pages print, or another machine's sums.
        assert found == pytest.approx(said, rel=0.02) or max(found, said) < ROUNDING, printed.getvalue()


def test_every_marked_example_is_found() -> None:
    marked = sum(page.read_text(encoding="utf-8").count(MARK) for page in DOCS.glob("*.md"))
    assert marked == len(EXAMPLES) > 0
