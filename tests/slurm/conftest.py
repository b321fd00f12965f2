"""One cluster for all tests, and the table of what they saw."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LINES: list[tuple[str, str, float]] = []
HOW = "runs on a cluster of its own: `make slurm`, as root, with slurmctld slurmd slurm-client munge iproute2 installed"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "CLUSTER" not in os.environ:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=HOW))


class Outcome:
    """What a test says of its scenario: set `text` before the block ends."""

    text = ""


Scenario = Callable[[str], AbstractContextManager[Outcome]]


@pytest.fixture
def scenario() -> Scenario:
    """Times what is done within it, and gathers its line once the test has passed this far."""

    @contextlib.contextmanager
    def tell(name: str) -> Iterator[Outcome]:
        outcome, started = Outcome(), time.monotonic()
        yield outcome
        assert outcome.text, "a scenario whose outcome is not told"
        LINES.append((name, outcome.text, time.monotonic() - started))

    return tell


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if LINES:
        terminalreporter.section("SLURM")
        rows = [f"| {name} | {text} | {seconds:.0f} |" for name, text, seconds in LINES]
        terminalreporter.write_line("\n".join(["| scenario | what happened | seconds |", "|---|---|---|", *rows]))
