"""What the verbs print, in a terminal and in a file."""

import io

import pytest
from rich.console import Console
from rich.text import Text

from sft_dist.console import print_pairs

PATH = "/data/" + "/".join(f"folder-{n}" for n in range(20))


@pytest.fixture
def pairs() -> list[tuple[str, str | Text]]:
    return [("store", PATH), ("a [bold] name", Text.assemble(("red", "red"), " [dim]first\nsecond"))]


def test_a_file_gets_each_text_whole_however_long(pairs: list[tuple[str, str | Text]]) -> None:
    file = io.StringIO()
    print_pairs(Console(file=file, width=40), pairs)
    assert file.getvalue().splitlines() == [
        f"store          {PATH}",
        "a [bold] name  red [dim]first",
        "               second",
    ]


def test_a_terminal_folds_at_its_edge_and_loses_nothing(pairs: list[tuple[str, str | Text]]) -> None:
    file = io.StringIO()
    print_pairs(Console(file=file, width=40, force_terminal=True, color_system=None), pairs)
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= 40
    assert "".join(line[15:].rstrip() for line in lines[:-2]) == PATH
    assert [line.rstrip() for line in lines[-2:]] == ["a [bold] name  red [dim]first", "               second"]
