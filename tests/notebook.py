"""Run notebooks/demo.ipynb as on a machine that has only the wheel: in a directory of its own, without the checkout.

    python tests/notebook.py             as `make notebook` does
    python tests/notebook.py --keep DIR  and leave the notebook with its outputs, and all that it wrote, in DIR

The cell that installs is tagged skip-execution. Fails when a cell raises, when a command of a cell fails, and when the
model has not learned.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks" / "demo.ipynb"
TIME_LIMIT_S = 300
LEAST_RIGHT = 180
"""Of 200 held-out answers. Always the more frequent class: about 110."""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--keep", type=Path, metavar="DIR")
    keep = parser.parse_args().keep
    with tempfile.TemporaryDirectory() as scratch:
        directory = keep or Path(scratch, "notebook")
        directory.mkdir(parents=True, exist_ok=True)
        install_wheel(Path(scratch, "site"))
        os.environ |= {
            "PYTHONPATH": str(Path(scratch, "site")),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        started = time.perf_counter()
        notebook = run(directory)
        seconds = time.perf_counter() - started
        nbformat.write(notebook, directory / NOTEBOOK.name)
    said = outputs_of(notebook)
    right = re.search(r"(\d+) of 200 held-out answers are right", said)
    errors = re.findall(r"^error: .*|^Traceback .*|.*command not found.*", said, re.M)
    if errors or right is None or int(right.group(1)) < LEAST_RIGHT:
        print(said, file=sys.stderr)
        print(f"the notebook does not do what it says: {errors or right}", file=sys.stderr)
        return 1
    print(f"{NOTEBOOK.name}: {right.group()}, {seconds:.0f} s")
    return 0


def install_wheel(site: Path) -> None:
    """The files that `pip install sft_dist-*.whl` would put into site-packages, into `site`."""
    python = [sys.executable, "-m"]
    wheels = site.with_name("dist")
    build = [*python, "build", "--wheel", "--no-isolation", "--outdir", str(wheels), str(ROOT)]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*python, "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)], check=True)


def run(directory: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs. Raises CellExecutionError with what the cell said."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=TIME_LIMIT_S,
        startup_timeout=TIME_LIMIT_S,
        kernel_name="python3",
        resources={"metadata": {"path": str(directory)}},
        skip_cells_with_tag="skip-execution",
    )
    return client.execute()


def outputs_of(notebook: nbformat.NotebookNode) -> str:
    """All text that cells printed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output.get("text", "") for output in outputs)


if __name__ == "__main__":
    sys.exit(main())
