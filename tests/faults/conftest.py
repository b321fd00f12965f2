"""Prints the table of faults after the tests."""

import os
import tempfile
from pathlib import Path

import pytest

from tests.faults.table import TABLE_FILE, to_markdown

if TABLE_FILE not in os.environ:
    os.environ[TABLE_FILE] = str(Path(tempfile.mkdtemp(prefix="faults-")) / "table.jsonl")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("faults")
    terminalreporter.write_line(to_markdown(Path(os.environ[TABLE_FILE])))
