"""Rows prepared per CPU-second: sft_dist.data.build.prepare against the preparation inside TRL's SFTTrainer.

Both read the same JSONL file with the same tokenizer and Qwen2.5's chat template, train the assistant's turns only,
truncate nothing, and end with tokens and masks on disk. Each run is a process of its own with one thread; runs of the
sides alternate. The clock starts before the first byte of the rows is read and counts this process and its children;
imports, making a model and loading the tokenizer are outside it. TRL gets its own training template, Arrow files
without a cache to look in, no truncation pass and no progress bars. Here every mask is verified and control tokens
are neutralised, as always.

    python benchmarks/prepare_vs_trl.py [--rows 10000] [--file rows.jsonl] [--repeats 3]
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
from typing import Any

import numpy as np
import xxhash
from chats import LONG, trl_template, write_chats, write_tokenizer

SIDES = {"ours": "sft_dist", "trl": "TRL", "trl-packed": "TRL, packing on"}
# Above the longest row, so that nothing is cut; packs of TRL are this long.
MAX_TOKENS = 8192
ONE_THREAD = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
# The newline behind `<|im_start|>assistant` and the one behind `<|im_end|>`: TRL trains both, we train neither.
EXTRA_TOKENS_PER_ANSWER = 2
PACKAGES = ("trl", "transformers", "datasets", "tokenizers", "torch", "numpy")


@dataclass
class Clock:
    """Seconds by stage of work: cpu_s of this process and the children that have ended, and wall_s."""

    cpu_s: dict[str, float] = field(default_factory=dict)
    wall_s: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        cpu, wall = cpu_seconds(), time.perf_counter()
        try:
            yield
        finally:
            self.cpu_s[stage] = self.cpu_s.get(stage, 0.0) + cpu_seconds() - cpu
            self.wall_s[stage] = self.wall_s.get(stage, 0.0) + time.perf_counter() - wall


@dataclass(frozen=True)
class Run:
    """What one process measured. digest: of all token ids in the order of the rows, None where rows are packed."""

    cpu_s: float
    wall_s: float
    stages: dict[str, float]
    num_rows: int
    num_tokens: int
    num_trained: int
    digest: str | None


def main() -> None:
    options = _options()
    if options.side is not None:
        run = _run_ours(options) if options.side == "ours" else _run_trl(options, packing=options.side == "trl-packed")
        options.result.write_text(json.dumps(asdict(run)))
        return
    with tempfile.TemporaryDirectory(prefix="prepare-vs-trl-") as directory:
        work = Path(directory)
        file = options.file.resolve() if options.file else work / "rows.jsonl"
        if not options.file:
            write_chats(file, num_rows=options.rows, shape=LONG)
        tokenizer = write_tokenizer(work / "tokenizer", shape=LONG)
        runs: dict[str, list[Run]] = {side: [] for side in SIDES}
        for repeat in range(options.repeats):
            for side in SIDES:
                runs[side].append(_spawn(side, file, tokenizer, work / f"{side}-{repeat}"))
                print(f"{side} {repeat + 1}/{options.repeats}: {runs[side][-1].cpu_s:.2f} CPU-s", file=sys.stderr)
        relation = _compare(runs, num_answers=_num_answers(file))
        print(_report(runs, relation, size_bytes=file.stat().st_size))


def cpu_seconds() -> float:
    """CPU time of this process, its threads and the children that it has waited for."""
    return sum(used.ru_utime + used.ru_stime for used in map(getrusage, (RUSAGE_SELF, RUSAGE_CHILDREN)))


def machine() -> str:
    """Processor and number of cores."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    return f"{names[0] if names else 'unknown processor'}, {len(os.sched_getaffinity(0))} cores"


# ---------------------------------------------------------------- one run


def _spawn(side: str, file: Path, tokenizer: Path, directory: Path) -> Run:
    """Measure one side in a fresh process."""
    directory.mkdir()
    result = directory / "result.json"
    command = [sys.executable, __file__, "--side", side, "--file", file, "--tokenizer", tokenizer, "--result", result]
    # Empty caches: nothing of an earlier run is found.
    environment = os.environ | ONE_THREAD | {"HF_HOME": str(directory / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=3600)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-4000:]}")
    return Run(**json.loads(result.read_text()))


def _run_ours(options: argparse.Namespace) -> Run:
    from sft_dist.config import Source
    from sft_dist.data.build import StoreSpec, prepare
    from sft_dist.data.chat import ChatTokenizer

    clock = Clock()
    load = ChatTokenizer.load

    def timed_load(*args: Any, **kwargs: Any) -> ChatTokenizer:
        with clock.timed("load"):
            return load(*args, **kwargs)

    # `prepare` loads the tokenizer itself, once for the plan and once as it was saved; that is taken off.
    ChatTokenizer.load = timed_load
    spec = StoreSpec(
        sources=(Source(path=str(options.file)),), model_path=str(options.tokenizer), max_tokens=MAX_TOKENS
    )
    with clock.timed("all"):
        store = prepare(spec, store_dir=options.result.parent / "stores", workers=1)
    tokens = np.fromfile(store.path / "tokens.bin", dtype="<i4")
    return Run(
        cpu_s=clock.cpu_s["all"] - clock.cpu_s["load"],
        wall_s=clock.wall_s["all"] - clock.wall_s["load"],
        stages={"tokenizer loading, not counted": clock.cpu_s["load"]},
        num_rows=len(store),
        num_tokens=len(tokens),
        num_trained=int(store.num_responses.sum()),
        digest=xxhash.xxh3_128_hexdigest(tokens.tobytes()),
    )


def _run_trl(options: argparse.Namespace, *, packing: bool) -> Run:
    import datasets
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    clock = Clock()

    class Timed(SFTTrainer):
        def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
            with clock.timed("prepare"):
                return super()._prepare_dataset(*args, **kwargs)

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
    )
    arguments = SFTConfig(
        output_dir=str(options.result.parent / "trainer"),
        use_cpu=True,
        report_to="none",
        assistant_only_loss=True,
        max_length=MAX_TOKENS if packing else None,
        packing=packing,
        # None works in this process; 1 starts a pool of one process for each pass over the rows, which costs more.
        dataset_num_proc=None,
    )
    with clock.timed("read"):
        rows = datasets.load_dataset("json", data_files=str(options.file), split="train")
    trainer = Timed(model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    if trainer.chat_template != trl_template("qwen2_5_training"):
        raise SystemExit("TRL did not take its training variant of the template")
    return _measured_trl(trainer.train_dataset, clock, packing=packing)


def _measured_trl(prepared: Any, clock: Clock, *, packing: bool) -> Run:
    table = prepared.data
    tokens, labels = (
        np.concatenate([part.values.to_numpy()[_bounds(part)] for part in table.column(name).chunks])
        for name in ("input_ids", "labels")
    )
    return Run(
        cpu_s=sum(clock.cpu_s.values()),
        wall_s=sum(clock.wall_s.values()),
        stages=clock.cpu_s,
        num_rows=sum(map(len, prepared["seq_lengths"])) if packing else len(prepared),
        num_tokens=len(tokens),
        num_trained=int((labels != -100).sum()),
        digest=None if packing else xxhash.xxh3_128_hexdigest(tokens.astype("<i4").tobytes()),
    )


def _bounds(part: Any) -> slice:
    """Where the values of an Arrow list array lie in its buffer."""
    return slice(part.offsets[0].as_py(), part.offsets[-1].as_py())


# ---------------------------------------------------------------- all runs


def _num_answers(file: Path) -> int:
    with file.open(encoding="utf-8") as lines:
        rows = (json.loads(line) for line in lines if not line.isspace())
        return sum(turn["role"] == "assistant" for row in rows for turn in row["messages"])


def _compare(runs: dict[str, list[Run]], *, num_answers: int) -> str:
    """Say how the results of the sides relate. Exits if they are not of the same work."""
    found = {side: {(run.num_rows, run.num_tokens, run.num_trained, run.digest) for run in runs[side]} for side in runs}
    if any(len(results) != 1 for results in found.values()):
        raise SystemExit(f"repeats of one side differ: {found}")
    (ours,), (trl,), (packed,) = (found[side] for side in SIDES)
    num_extra = EXTRA_TOKENS_PER_ANSWER * num_answers
    if ours[:2] != trl[:2] or ours[3] != trl[3] or packed[:3] != trl[:3] or trl[2] != ours[2] + num_extra:
        raise SystemExit(
            f"the sides prepared different things, (rows, tokens, trained, digest): {found}; expected the same rows "
            f"and tokens, and {num_extra} more trained tokens in TRL (fewer where an answer begins with a line break)"
        )
    return (
        f"Both kept all {ours[0]:,} rows with the same {ours[1]:,} token ids; trained tokens {ours[2]:,} here and "
        f"{trl[2]:,} in TRL, which is exactly {EXTRA_TOKENS_PER_ANSWER} more for each of {num_answers:,} answers."
    )


def _report(runs: dict[str, list[Run]], relation: str, *, size_bytes: int) -> str:
    median = {side: statistics.median(run.cpu_s for run in runs[side]) for side in runs}
    lines = [
        "| | CPU s, median (all) | wall s | rows per CPU-s | tokens per CPU-s | here is faster by |",
        "|---|---|---|---|---|---|",
    ]
    for side, name in SIDES.items():
        first = runs[side][0]
        each = ", ".join(f"{run.cpu_s:.2f}" for run in runs[side])
        wall = statistics.median(run.wall_s for run in runs[side])
        faster = "" if side == "ours" else f"{median[side] / median['ours']:.2f}x"
        rates = f"{first.num_rows / median[side]:,.0f} | {first.num_tokens / median[side]:,.0f}"
        lines.append(f"| {name} | {median[side]:.2f} ({each}) | {wall:.2f} | {rates} | {faster} |")
    for side in SIDES:
        stages = {name: statistics.median(run.stages[name] for run in runs[side]) for name in runs[side][0].stages}
        lines.append(f"\n{SIDES[side]}, CPU s: " + ", ".join(f"{name} {cost:.2f}" for name, cost in stages.items()))
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    command = shlex.join(["python", *sys.argv])
    return "\n".join([*lines, f"\n{relation}", f"\n{size_bytes:,} bytes; {machine()}; {versions}; `{command}`"])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000, help="synthetic rows")
    parser.add_argument("--file", type=Path, help="JSONL in the messages format instead of synthetic rows")
    parser.add_argument("--repeats", type=int, default=3)
    for name in ("--side", "--tokenizer", "--result"):  # how the script calls itself
        parser.add_argument(name, type=str if name == "--side" else Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
