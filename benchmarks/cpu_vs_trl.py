"""Training on a CPU: sft_dist against TRL, packed and not, and a plain loop; the same rows, weights and updates.

Each run is a process of its own (cpu_sides.py says what it does); runs of the sides alternate, and of the repeats of a
side the median counts. Useful tokens are those of the answers, each with its stop token. The floor is what the matrix
products of a step take when each is measured alone, in the same run.

    python benchmarks/cpu_vs_trl.py [--quick | --all | --settings A B-152k ...] [--file rows.json] [--repeats 3]
    python benchmarks/cpu_vs_trl.py --tried        other settings of TRL, on setting A
    ... --check                                    exit 1 when a ratio is a fifth below baseline.json
    ... --write-baseline                           note the ratios of this run there
"""

import argparse
import bisect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from chats import ALPACA, write_alpaca, write_tokenizer
from cpu_floor import ATTENTION, HEAD_GEMMS, LAYER_GEMMS
from cpu_sides import MAX_TOKENS, NUM_UNTIMED, PER_DOCUMENT, Marks, Task, read_messages
from prepare_vs_trl import machine

from sft_dist.shape import ModelShape

BASELINE = Path(__file__).with_name("baseline.json")
ALLOWED_FALL = 0.2
MAX_DIFFERENCE = 0.02
TOKENIZER_VOCAB = 4_000
EXAMPLES_PER_STEP = 20
# The longest row decides how short packs can be: four of them hold what 20 rows have, and two ranks share them.
PACKS_PER_STEP = 4
NUM_PROFILED = 10
PACKAGES = ("torch", "transformers", "trl", "accelerate", "numpy")


@dataclass(frozen=True)
class Setting:
    """A model, and the processes that train it.

    vocabulary: rows of the embedding; the tokenizer has 4,003 tokens. num_rows: made-up rows, unless a file is given.
    """

    hidden: int
    layers: int
    vocabulary: int = 4_096
    threads: int = 1
    ranks: int = 1
    epochs: int = 1
    num_rows: int = 300

    @property
    def shape(self) -> ModelShape:
        return ModelShape(
            num_layers=self.layers,
            hidden=self.hidden,
            num_heads=4,
            num_key_value_heads=2,
            head_dim=self.hidden // 4,
            intermediate=4 * self.hidden,
            vocabulary=self.vocabulary,
            is_tied=True,
        )

    def can_share(self, side: "Side") -> bool:
        """True when each process gets as many whole micro-batches of a step."""
        return (side.packs or EXAMPLES_PER_STEP) % (self.ranks * side.micro) == 0

    def __str__(self) -> str:
        return (
            f"hidden {self.hidden}, {self.layers} layers, vocabulary {self.vocabulary:,}, "
            f"{self.shape.num_params / 1e6:.1f} M parameters, {self.ranks} x {self.threads} threads"
        )


@dataclass(frozen=True)
class Side:
    """packs: so many would hold a step; 0 where rows are not packed. micro: packs or rows in a micro-batch of TRL."""

    label: str
    kind: str = "trl"
    packs: int = 0
    micro: int = 1
    settings: dict[str, Any] = field(default_factory=dict)


A = Setting(hidden=128, layers=2, epochs=2)
B = Setting(hidden=256, layers=4)
QUICK = "quick"
SETTINGS = {
    "A": A,
    "B": B,
    "A-32k": Setting(hidden=128, layers=2, vocabulary=32_768),
    # Fewer rows: TRL takes half a minute for a step.
    "A-152k": Setting(hidden=128, layers=2, vocabulary=151_936, num_rows=100),
    "B-32k": Setting(hidden=256, layers=4, vocabulary=32_768),
    "B-152k": Setting(hidden=256, layers=4, vocabulary=151_936, num_rows=100),
    "A-threads": Setting(hidden=128, layers=2, threads=2, epochs=2),
    "B-threads": Setting(hidden=256, layers=4, threads=2),
    "A-ranks": Setting(hidden=128, layers=2, ranks=2, epochs=2),
    "B-ranks": Setting(hidden=256, layers=4, ranks=2),
    QUICK: Setting(hidden=128, layers=2),
}
COMPILED = "ours-compiled"
"""Not measured unless asked for: it needs a C++ compiler."""

BY_LENGTH = {"train_sampling_strategy": "group_by_length"}
SIDES = {
    "ours": Side("sft_dist", kind="ours", packs=PACKS_PER_STEP // 2),
    COMPILED: Side("sft_dist, model.compile: on", "ours", packs=PACKS_PER_STEP // 2, settings={"compile": "on"}),
    "trl": Side("TRL, packed", packs=PACKS_PER_STEP),
    "trl-same": Side("TRL, packed, packs as long as ours", packs=PACKS_PER_STEP // 2),
    "trl-long": Side("TRL, packed, packs as long as a step", packs=1),
    "trl-padded": Side("TRL, padded: rows of like length in twos", micro=2, settings=BY_LENGTH),
    "trl-rows": Side("TRL, one row at a time: no padding", micro=1),
    "reference": Side("plain loop", kind="reference"),
}
TRIED = {
    "trl": SIDES["trl"],
    "same": SIDES["trl-same"],
    "two": Side("packed, two packs in a micro-batch", packs=PACKS_PER_STEP, micro=2),
    "eager": Side("packed, attention eager", packs=PACKS_PER_STEP, settings={"attention": "eager"}),
    "unfused": Side("packed, optim adamw_torch", packs=PACKS_PER_STEP, settings={"optim": "adamw_torch"}),
    "compiled": Side("packed, torch_compile", packs=PACKS_PER_STEP, settings={"torch_compile": True}),
    "documents": Side(
        "packed, with attention per document added to transformers",
        packs=PACKS_PER_STEP,
        settings={"attention": PER_DOCUMENT},
    ),
    "padded": Side("padded, 20 rows in a micro-batch", micro=20),
    "padded-4": Side("padded, 4 rows", micro=4),
    "padded-4-length": Side("padded, 4 rows of like length", micro=4, settings=BY_LENGTH),
    "padded-2-length": Side("padded, 2 rows of like length", micro=2, settings=BY_LENGTH),
    "free-4": Side("padding_free, 4 rows", micro=4, settings={"padding_free": True}),
    "free-2": Side("padding_free, 2 rows", micro=2, settings={"padding_free": True}),
    "rows": SIDES["trl-rows"],
    "rows-compiled": Side("one row at a time, torch_compile", settings={"torch_compile": True}),
}
Ratios = Mapping[str, Mapping[str, float]]
"""By setting and name."""

SPEED = "useful tokens per CPU-second, over TRL packed"
MEMORY = "peak memory of TRL packed, over ours"


@dataclass(frozen=True)
class Run:
    """What one run measured behind its untimed steps, over all its processes; memory of the largest of them."""

    steps: int
    all_tokens: int
    all_responses: int
    tokens: int
    responses: int
    cpu_s: float
    wall_s: float
    peak_bytes: int
    prepare_cpu_s: float
    first_loss: float
    last_loss: float

    @classmethod
    def of(cls, ranks: Sequence[Marks], *, steps_per_epoch: int) -> "Run":
        """last_loss: the mean over the last epoch, the same rows on every side."""
        losses = [statistics.mean(of_ranks) for of_ranks in zip(*(marks.losses for marks in ranks), strict=True)]
        timed = slice(NUM_UNTIMED, None)
        return cls(
            steps=len(losses),
            all_tokens=sum(sum(marks.tokens) for marks in ranks),
            all_responses=sum(sum(marks.responses) for marks in ranks),
            tokens=sum(sum(marks.tokens[timed]) for marks in ranks),
            responses=sum(sum(marks.responses[timed]) for marks in ranks),
            cpu_s=sum(marks.cpu_s[-1] - marks.cpu_s[NUM_UNTIMED - 1] for marks in ranks),
            wall_s=max(marks.wall_s[-1] - marks.wall_s[NUM_UNTIMED - 1] for marks in ranks),
            peak_bytes=max(marks.peak_bytes for marks in ranks),
            prepare_cpu_s=sum(marks.prepare_cpu_s for marks in ranks),
            first_loss=losses[0],
            last_loss=statistics.mean(losses[-steps_per_epoch:]),
        )

    @property
    def speed(self) -> float:
        return self.responses / self.cpu_s


@dataclass(frozen=True)
class Rows:
    """What the sides train on. lengths: tokens of each row."""

    path: Path
    lengths: tuple[int, ...]

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.lengths) // EXAMPLES_PER_STEP)


def main() -> None:
    options = _options()
    sides = TRIED if options.tried else {name: SIDES[name] for name in options.sides}
    baseline = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    measured: dict[str, dict[str, float]] = {}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="cpu-vs-trl-") as directory:
        work = Path(directory)
        for name in options.settings:
            bench = Bench(name, SETTINGS[name], work / name, file=options.file and options.file.resolve())
            shared = {side: sides[side] for side in sides if bench.setting.can_share(sides[side])}
            runs = bench.measure(shared, repeats=options.repeats)
            print(bench.report(runs, shared, explain=not (options.tried or name == QUICK)), flush=True)
            measured[name] = ratios(runs)
    print(f"{machine()}; {', '.join(f'{package} {version(package)}' for package in PACKAGES)}; ", end="")
    print(f"{time.perf_counter() - started:.0f} s in all")
    if options.write_baseline:
        BASELINE.write_text(json.dumps(baseline | measured, indent=2) + "\n")
    if options.check and (fallen := fallen_ratios(measured, baseline)):
        sys.exit("\n".join(fallen))


# ---------------------------------------------------------------- the check


def ratios(runs: Mapping[str, Sequence[Run]]) -> dict[str, float]:
    """What the baseline holds; both are better when they are larger. Empty without both sides."""
    if not {"ours", "trl"} <= runs.keys():
        return {}
    ours, trl = runs["ours"], runs["trl"]
    return {
        SPEED: round(middle(ours, lambda run: run.speed) / middle(trl, lambda run: run.speed), 2),
        MEMORY: round(middle(trl, lambda run: run.peak_bytes) / middle(ours, lambda run: run.peak_bytes), 2),
    }


def fallen_ratios(
    measured: Mapping[str, Mapping[str, float]], baseline: Mapping[str, Mapping[str, float]]
) -> list[str]:
    """A line for each ratio that is a fifth or more below the baseline, or that it does not hold."""
    lines = []
    for setting, found in measured.items():
        for name, ratio in found.items():
            expected = baseline.get(setting, {}).get(name)
            if expected is None:
                lines.append(f"{setting}: {name}: no baseline; note one with --write-baseline")
            elif ratio <= (1 - ALLOWED_FALL) * expected:
                lines.append(
                    f"{setting}: {name}: {ratio:.2f}, and {expected:.2f} in {BASELINE.name}: it fell by "
                    f"{1 - ratio / expected:.0%}, less than {ALLOWED_FALL:.0%} is noise; find the cause, or note the "
                    "new ratio with --write-baseline and say why"
                )
    return lines


def middle(runs: Sequence[Run], of: Callable[[Run], float]) -> float:
    return statistics.median(map(of, runs))


# ---------------------------------------------------------------- one setting


class Bench:
    """One setting, measured in a directory of its own."""

    def __init__(self, name: str, setting: Setting, directory: Path, *, file: Path | None) -> None:
        """file: an Alpaca file to train on instead of made-up rows."""
        directory.mkdir()
        if file is None:
            file = directory / "rows.jsonl"
            write_alpaca(file, num_rows=setting.num_rows)
        self.name, self.setting, self._directory = name, setting, directory
        self._model = write_model(directory / "model", setting)
        self.rows = Rows(file, row_lengths(file, self._model))

    def measure(self, sides: Mapping[str, Side], *, repeats: int) -> dict[str, list[Run]]:
        """Runs by side, alternating."""
        runs: dict[str, list[Run]] = {side: [] for side in sides}
        for repeat in range(repeats):
            for name, side in sides.items():
                run = Run.of(self._spawn(side), steps_per_epoch=self.rows.steps_per_epoch)
                runs[name].append(run)
                progress = f"{self.name} {name} {repeat + 1}/{repeats}: {run.speed:,.0f} useful tokens per CPU-s"
                print(progress, file=sys.stderr, flush=True)
        require_same_work(runs)
        return runs

    def _spawn(self, side: Side, *, task: Mapping[str, Any] | None = None) -> list[Marks]:
        """Run one side in fresh processes; what each rank marked."""
        setting = self.setting
        with tempfile.TemporaryDirectory(prefix="run-", dir=self._directory) as directory:
            num_packs = self.rows.steps_per_epoch * side.packs
            whole = Task(
                kind=side.kind,
                rows=str(self.rows.path),
                model=str(self._model),
                directory=directory,
                epochs=setting.epochs,
                examples=EXAMPLES_PER_STEP,
                packs=side.packs,
                pack_tokens=shortest_pack(self.rows.lengths, num_packs=num_packs) if num_packs else 0,
                micro=side.micro,
                settings=side.settings,
            )
            launcher = [sys.executable]
            if setting.ranks > 1:
                launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={setting.ranks}"]
            script = str(Path(__file__).with_name("cpu_sides.py"))
            command = [*launcher, script, json.dumps(asdict(whole) | dict(task or {}))]
            environment = os.environ | {
                "OMP_NUM_THREADS": str(setting.threads),
                "TOKENIZERS_PARALLELISM": "false",
                "HF_HUB_OFFLINE": "1",
                "HF_HOME": str(Path(directory, "hf")),
            }
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
            if done.returncode:
                raise SystemExit(f"{side.label} failed:\n{done.stderr[-4000:]}")
            files = [Path(directory, f"marks-{rank}.json") for rank in range(setting.ranks)]
            return [Marks(**json.loads(file.read_text())) for file in files]

    # ------------------------------------------------------------ what it says

    def report(self, runs: Mapping[str, Sequence[Run]], sides: Mapping[str, Side], *, explain: bool) -> str:
        lines = [f"### {self.name}: {self.setting}", "", *_table(runs, sides), ""]
        some = next(iter(runs.values()))[0]
        lines.append(
            f"{some.steps} steps of {EXAMPLES_PER_STEP} rows, the first {NUM_UNTIMED} not timed; {some.all_tokens:,} "
            f"tokens, {some.all_responses:,} of them useful."
        )
        lines += [f"{name}: {ratio:.2f}" for name, ratio in ratios(runs).items()]
        if explain and "ours" in runs and self.setting.threads == self.setting.ranks == 1:
            lines += ["", *self._explained(runs)]
        return "\n".join([*lines, ""])

    def _explained(self, runs: Mapping[str, Sequence[Run]]) -> list[str]:
        """The floor, and where the time of ours goes."""
        shape, ours = self.setting.shape, SIDES["ours"]
        num_steps = self.rows.steps_per_epoch * self.setting.epochs
        some = runs["ours"][0]
        tokens, responses = some.all_tokens / num_steps, some.all_responses / num_steps
        squares = sum(length**2 for length in self.rows.lengths) / self.rows.steps_per_epoch
        sizes = {"tokens": round(tokens), "responses": round(responses)}
        gemms = self._spawn(ours, task={"kind": "floor", "settings": sizes})[0].gemms
        num_profiled = min(NUM_PROFILED, num_steps - NUM_UNTIMED)  # a setting with few rows has few steps
        groups = self._spawn(ours, task={"num_profiled": num_profiled})[0].groups
        flops = shape.step_flops(**sizes, sum_squares=round(squares))
        rate = sum(work for _, work in gemms.values()) / sum(seconds for seconds, _ in gemms.values())
        floor_s = flops / rate
        step_s = middle(runs["ours"], lambda run: run.cpu_s) / (num_steps - NUM_UNTIMED)
        lines = [
            f"A step has {flops / 1e9:.2f} GFLOP. Its matrix products, each alone, run at {rate / 1e9:.0f} GFLOP/s: "
            f"the floor is {1e3 * floor_s:.0f} ms, {responses / floor_s:,.0f} useful tokens per CPU-s"
        ]
        if "trl" in runs:
            lines[0] += f", {responses / floor_s / middle(runs['trl'], lambda run: run.speed):.1f}x TRL packed"
        lines[0] += f". sft_dist takes {1e3 * step_s:.0f} ms, {floor_s / step_s:.0%} of that speed."
        floors = {
            LAYER_GEMMS: gemms[LAYER_GEMMS][0],
            HEAD_GEMMS: gemms[HEAD_GEMMS][0],
            ATTENTION: shape.step_flops(tokens=0, responses=0, sum_squares=round(squares)) / rate,
            "all": floor_s,
        }
        profiled_s = sum(groups.values())
        lines += ["", "| where a step of sft_dist goes, profiled | CPU ms | share | floor, ms |", "|---|---|---|---|"]
        for group, seconds in [*sorted(groups.items(), key=lambda item: -item[1]), ("all", profiled_s)]:
            floor = f"{1e3 * floors[group]:.1f}" if group in floors else ""
            lines.append(f"| {group} | {1e3 * seconds:.1f} | {seconds / profiled_s:.0%} | {floor} |")
        return lines


def _table(runs: Mapping[str, Sequence[Run]], sides: Mapping[str, Side]) -> list[str]:
    columns = (
        "",
        "useful tokens per CPU-s, median (all)",
        "sft_dist is faster by",
        "useful tokens/s",
        "tokens per CPU-s",
        "peak MB",
        "preparation, CPU s",
        "loss of step 1",
        "mean of the last epoch",
    )
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for name, found in runs.items():
        speed = middle(found, lambda run: run.speed)
        faster = (
            f"{middle(runs['ours'], lambda run: run.speed) / speed:.2f}x" if "ours" in runs and name != "ours" else ""
        )
        cells = (
            sides[name].label,
            f"{speed:,.0f} ({', '.join(f'{run.speed:,.0f}' for run in found)})",
            faster,
            f"{middle(found, lambda run: run.responses / run.wall_s):,.0f}",
            f"{middle(found, lambda run: run.tokens / run.cpu_s):,.0f}",
            f"{middle(found, lambda run: run.peak_bytes) / 1e6:,.0f}",
            f"{middle(found, lambda run: run.prepare_cpu_s):.2f}",
            f"{found[0].first_loss:.3f}",
            f"{found[0].last_loss:.3f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def require_same_work(runs: Mapping[str, Sequence[Run]]) -> None:
    """Exit unless steps, tokens and useful tokens of all runs agree within MAX_DIFFERENCE."""
    for key in ("steps", "all_tokens", "all_responses"):
        found = {side: getattr(run, key) for side, each in runs.items() for run in each}
        if max(found.values()) > (1 + MAX_DIFFERENCE) * min(found.values()):
            raise SystemExit(f"the sides did not do the same work: {key} {found}, expected within {MAX_DIFFERENCE:.0%}")


# ---------------------------------------------------------------- rows, model, packs


def write_model(directory: Path, setting: Setting) -> Path:
    """Random weights of a small Qwen2, and a tokenizer trained on rows of the same kind."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    write_tokenizer(directory, shape=ALPACA, vocab_size=TOKENIZER_VOCAB)
    tokenizer, shape = AutoTokenizer.from_pretrained(directory), setting.shape
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_key_value_heads,
        max_position_embeddings=2 * MAX_TOKENS,
        tie_word_embeddings=shape.is_tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def row_lengths(file: Path, tokenizer_dir: Path) -> tuple[int, ...]:
    """Tokens of each row. Exits when one is longer than what the sides are told to keep."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    chats = read_messages(str(file))
    lengths = tuple(len(tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]) for chat in chats)
    if max(lengths) > MAX_TOKENS:
        raise SystemExit(f"{file}: a row has {max(lengths)} tokens; leave out those above {MAX_TOKENS}")
    return lengths


def shortest_pack(lengths: Sequence[int], *, num_packs: int) -> int:
    """The shortest packs with which best-fit decreasing needs no more than num_packs, and cuts no row."""
    size = max(max(lengths), -(-sum(lengths) // num_packs))
    while best_fit_packs(lengths, size) > num_packs:
        size += 1
    return size


def best_fit_packs(lengths: Sequence[int], size: int) -> int:
    """How many packs of `size` best-fit decreasing needs: the longest first, each where it leaves the least room."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        index = bisect.bisect_left(free, length)
        room = free.pop(index) if index < len(free) else size
        bisect.insort(free, room - length)
    return len(free)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--settings", nargs="+", default=["A", "B"], choices=list(SETTINGS))
    what.add_argument("--quick", action="store_true", help="setting A with fewer steps, TRL packed only")
    what.add_argument("--all", action="store_true", help="every setting")
    what.add_argument("--tried", action="store_true", help="other settings of TRL, on setting A")
    parser.add_argument("--sides", nargs="+", default=[side for side in SIDES if side != COMPILED], choices=list(SIDES))
    parser.add_argument("--file", type=Path, help="an Alpaca file, .jsonl or .json, instead of made-up rows")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--check", action="store_true", help="exit 1 when a ratio fell by a fifth")
    parser.add_argument("--write-baseline", action="store_true", help=f"note the ratios in {BASELINE.name}")
    options = parser.parse_args()
    if options.quick:
        options.settings, options.sides = [QUICK], ["ours", "trl"]
    elif options.all:
        options.settings = [name for name in SETTINGS if name != QUICK]
    elif options.tried:
        options.settings = ["A"]
    return options


if __name__ == "__main__":
    main()
