"""What each fault did, printed at the end of the tests and kept in docs/faults.md."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

TABLE_FILE = "SFT_DIST_FAULT_TABLE"
"""Names the file that lines are gathered in; without it nothing is gathered."""


def engines(*quick: str) -> tuple[str, ...]:
    """Engines that a fault is tried on: `quick`, or with FAULTS=full all that matter."""
    return ("ddp", "zero2", "zero3") if os.environ.get("FAULTS") == "full" else quick


class Outcome:
    """What a test says of its fault: set `text` before the block ends."""

    text = ""


@contextlib.contextmanager
def fault(name: str, *, engine: str) -> Iterator[Outcome]:
    """Time a fault and gather its line once the test has passed this far. engine: as `zero2 x 2`."""
    outcome, started = Outcome(), time.perf_counter()
    yield outcome
    assert outcome.text, "a fault whose outcome is not told"
    line = {"fault": name, "engine": engine, "outcome": outcome.text, "seconds": time.perf_counter() - started}
    if TABLE_FILE in os.environ:
        with Path(os.environ[TABLE_FILE]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def to_markdown(file: Path) -> str:
    """The gathered lines as a table, in the order of the tests."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    rows = [f"| {x['fault']} | {x['engine']} | {x['outcome']} | {x['seconds']:.1f} |" for x in lines]
    return "\n".join(["| fault | engine | what happened | seconds |", "|---|---|---|---|", *rows])
