"""Memory and cost of sft_dist.data.build.prepare as rows grow: 10 thousand, 100 thousand, 1 million short chats.

Each size is prepared in a process of its own with one worker per core, while the proportional set size (PSS: shared
pages are divided among those that share them) of that process and all its children is summed every half second. Cost
per row is in CPU-seconds of all these processes. Start-up (workers, imports, tokenizer, first rows) is measured by
preparing as few rows as give every worker one chunk, and is taken off where the table says so. Up to 100 thousand
rows the median of three runs counts.

    python benchmarks/prepare_scale.py [--rows 1000000] [--workers N]
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

from chats import SHORT, write_chats, write_tokenizer
from prepare_vs_trl import cpu_seconds, machine

SAMPLE_EVERY_S = 0.5
MAX_PSS_BYTES = 2 * 10**9
MAX_GROWTH = 0.15  # of the cost per row, from the smallest to the largest size
SIZES = (10_000, 100_000, 1_000_000)
REPEATS = 3  # start-up is half the cost of the smallest size, so one run says little
REPEATED_UP_TO = 100_000
PACKAGES = ("tokenizers", "numpy", "jinja2")


@dataclass(frozen=True)
class Run:
    """What preparing `num_rows` rows took. peak_pss: bytes, summed over processes, 0 where it was not sampled."""

    num_rows: int
    num_tokens: int
    cpu_s: float
    wall_s: float
    peak_pss: int = 0


def main() -> None:
    options = _options()
    if options.file is not None:
        options.result.write_text(json.dumps(asdict(_prepare(options))))
        return
    with tempfile.TemporaryDirectory(prefix="prepare-scale-", dir=options.scratch) as directory:
        work = Path(directory)
        tokenizer = write_tokenizer(work / "tokenizer", shape=SHORT)
        sizes = sorted({*(size for size in SIZES if size < options.rows), options.rows})
        runs = [_median(work, tokenizer, num_rows=num_rows, workers=options.workers) for num_rows in [0, *sizes]]
        print(_report(runs[0], runs[1:], workers=options.workers))


# ---------------------------------------------------------------- one run


def _median(work: Path, tokenizer: Path, *, num_rows: int, workers: int) -> Run:
    """The run of median cost with the highest memory of all: three runs of a small size, one of a large one."""
    num_runs = REPEATS if num_rows <= REPEATED_UP_TO else 1
    runs = [_measure(work, tokenizer, num_rows=num_rows, workers=workers) for _ in range(num_runs)]
    median = sorted(runs, key=lambda run: run.cpu_s)[num_runs // 2]
    return replace(median, peak_pss=max(run.peak_pss for run in runs))


def _measure(work: Path, tokenizer: Path, *, num_rows: int, workers: int) -> Run:
    """Write rows, prepare them in a fresh process and watch its memory. No rows: one chunk for each worker."""
    from sft_dist.data.build import CHUNK_ROWS

    file, result, stores = work / "rows.jsonl", work / "result.json", work / "stores"
    write_chats(file, num_rows=num_rows or workers * CHUNK_ROWS, shape=SHORT)
    arguments = ["--file", file, "--tokenizer", tokenizer, "--result", result, "--stores", stores, "--workers", workers]
    command = [sys.executable, __file__, *map(str, arguments)]
    with (work / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        peak = _watch(process)
    if process.returncode:
        raise SystemExit(f"preparing {num_rows} rows failed:\n{(work / 'log').read_text()[-4000:]}")
    run = Run(**json.loads(result.read_text()) | {"peak_pss": peak})
    print(f"{run.num_rows:,} rows: {run.wall_s:.1f} s, {peak / 1e6:.0f} MB", file=sys.stderr)
    shutil.rmtree(stores)
    return run


def _watch(process: "subprocess.Popen[bytes]") -> int:
    """The highest summed PSS until the process ends."""
    peak = 0
    while process.poll() is None:
        peak = max(peak, _summed_pss(process.pid))
        time.sleep(SAMPLE_EVERY_S)
    return peak


def _summed_pss(pid: int) -> int:
    """Bytes of a process and all its descendants; those that end meanwhile count nothing."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        children = [int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in _words_of(file)]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    own = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
    return own + sum(map(_summed_pss, children))


def _words_of(file: Path) -> list[str]:
    """The words of a file under /proc, none if the thread that it belonged to has ended."""
    try:
        return file.read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _prepare(options: argparse.Namespace) -> Run:
    from sft_dist.config import Source
    from sft_dist.data import build

    build.IN_PROCESS_BYTES = 0  # the start-up that is measured is that of the pool, however few the rows
    spec = build.StoreSpec(sources=(Source(path=str(options.file)),), model_path=str(options.tokenizer))
    begin = time.perf_counter()
    store = build.prepare(spec, store_dir=options.stores, workers=options.workers)
    wall_s = time.perf_counter() - begin
    # Of the whole process: imports are start-up as well.
    return Run(len(store), int(store.lengths.sum()), cpu_seconds(), wall_s)


# ---------------------------------------------------------------- all runs


def _report(start: Run, runs: list[Run], *, workers: int) -> str:
    lines = [
        "| rows | tokens | peak summed PSS, MB | wall s | CPU s | rows/s | CPU µs a row | without start-up |",
        "|---|---|---|---|---|---|---|---|",
    ]
    costs = []
    for run in runs:
        costs.append((run.cpu_s - start.cpu_s) / (run.num_rows - start.num_rows) * 1e6)
        lines.append(
            f"| {run.num_rows:,} | {run.num_tokens:,} | {run.peak_pss / 1e6:,.0f} | {run.wall_s:.1f} | {run.cpu_s:.1f} "
            f"| {run.num_rows / run.wall_s:,.0f} | {run.cpu_s / run.num_rows * 1e6:.0f} | {costs[-1]:.0f} |"
        )
    growth, peak = costs[-1] / costs[0] - 1, max(run.peak_pss for run in runs)
    is_flat, is_small = abs(growth) <= MAX_GROWTH, peak < MAX_PSS_BYTES
    verdicts = [
        f"start-up of {workers} workers and {start.num_rows:,} rows: {start.cpu_s:.1f} CPU s, {start.wall_s:.1f} s",
        f"cost per row from {runs[0].num_rows:,} to {runs[-1].num_rows:,} rows: {growth:+.1%}, "
        f"asked within {MAX_GROWTH:.0%}: {'yes' if is_flat else 'NO'}",
        f"peak {peak / 1e9:.2f} GB, asked below {MAX_PSS_BYTES / 1e9:.0f} GB: {'yes' if is_small else 'NO'}",
    ]
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    command = shlex.join(["python", *sys.argv])
    return "\n".join([*lines, "", *(f"- {line}" for line in verdicts), f"\n{machine()}; {versions}; `{command}`"])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=SIZES[-1], help="the largest size; smaller ones come before it")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="one per core if not given")
    parser.add_argument("--scratch", type=Path, help="where rows and stores are written; some 2 GB for a million rows")
    for name in ("--file", "--tokenizer", "--result", "--stores"):  # how the script calls itself
        parser.add_argument(name, type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
