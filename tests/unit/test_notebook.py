"""The notebook as it lies in the repository; `make notebook` runs it."""

import ast
import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
CELLS = json.loads((ROOT / "notebooks" / "demo.ipynb").read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def test_outputs_are_clean_and_cells_are_few() -> None:
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CODE)
    assert len(CODE) <= 12


def test_only_the_cell_that_installs_is_left_out() -> None:
    skipped = [cell for cell in CODE if "skip-execution" in cell["metadata"].get("tags", ())]
    assert ["pip install" in "".join(cell["source"]) for cell in skipped] == [True]


def test_cells_are_python_and_commands() -> None:
    for cell in CODE:
        source = "".join(cell["source"]).replace("\\\n", "")  # a command may go on in the next line
        ast.parse("\n".join(line for line in source.splitlines() if not line.startswith(("!", "%"))))
