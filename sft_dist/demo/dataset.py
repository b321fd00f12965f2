"""Examples of the six templates, split so that no values are shared, written in three row formats."""

import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import xxhash

from sft_dist.demo.templates import TEMPLATES, Value
from sft_dist.errors import ConfigError

Split = Literal["train", "held_out"]

HELD_OUT_SHARE = 8  # one value tuple in eight belongs to the held-out set

# The sizes that configs/recipes/demo.yaml was tuned for.
NUM_TRAIN = 24_000
NUM_HELD_OUT = 300


@dataclass(frozen=True, slots=True)
class DemoExample:
    """One generated example. `values` fix the answer and decide which split the example belongs to."""

    template: str
    system: str
    user: str
    answer: str
    values: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class DemoFiles:
    """Where a data set was written: training files, one per format, and the held-out file."""

    train: tuple[Path, ...]
    held_out: Path


def split_of(template: str, values: tuple[Value, ...]) -> Split:
    """The split that owns these values: the same in every process, for every seed and size."""
    digest = xxhash.xxh3_64_intdigest(json.dumps([template, *values]).encode())
    return "held_out" if digest % HELD_OUT_SHARE == 0 else "train"


def generate_examples(num_examples: int, seed: int, split: Split) -> Iterator[DemoExample]:
    """Yield examples of one split, the six templates in turn. The same arguments give the same examples everywhere."""
    rng = random.Random(f"sft_dist demo {split} {seed}")  # a str seed is hashed by SHA-512, not by hash()
    names = list(TEMPLATES)
    for index in range(num_examples):
        name = names[index % len(names)]
        system, draft = TEMPLATES[name]
        while split_of(name, (drawn := draft(rng)).values) != split:
            pass
        yield DemoExample(name, system, drawn.user, drawn.answer, drawn.values)


def write_demo_data(directory: Path, *, num_train: int, num_held_out: int, seed: int) -> DemoFiles:
    """Write a third of the training set in each row format, and the held-out set as messages.

    Held-out rows carry a `template` key, by which `sft-dist evaluate` scores them.
    Raises ConfigError for a count that leaves a file empty.
    """
    if num_train < len(ROW_FORMATS) or num_held_out < 1:
        raise ConfigError(
            f"num_train={num_train}, num_held_out={num_held_out} would leave a demo file empty; "
            f"ask for at least {len(ROW_FORMATS)} and 1"
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    examples = generate_examples(num_train, seed, "train")
    paths = []
    for index, (suffix, to_row) in enumerate(ROW_FORMATS.items()):
        # Consecutive blocks, not every third: a stride of three would tie formats to templates.
        size = num_train * (index + 1) // len(ROW_FORMATS) - num_train * index // len(ROW_FORMATS)
        paths.append(directory / f"train.{suffix}.jsonl")
        _write_rows(paths[-1], (to_row(next(examples)) for _ in range(size)))
    held_out = directory / "held_out.jsonl"
    _write_rows(
        held_out,
        ({**messages_row(e), "template": e.template} for e in generate_examples(num_held_out, seed, "held_out")),
    )
    return DemoFiles(tuple(paths), held_out)


def messages_row(example: DemoExample) -> dict[str, object]:
    """The example as a list of messages."""
    turns = (("system", example.system), ("user", example.user), ("assistant", example.answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def alpaca_row(example: DemoExample) -> dict[str, object]:
    """The example as instruction and output, with the system sentence beside them as in the other formats."""
    return {"system": example.system, "instruction": example.user, "output": example.answer}


def sharegpt_row(example: DemoExample) -> dict[str, object]:
    """The example as a ShareGPT conversation."""
    turns = (("system", example.system), ("human", example.user), ("gpt", example.answer))
    return {"conversations": [{"from": speaker, "value": content} for speaker, content in turns]}


ROW_FORMATS: dict[str, Callable[[DemoExample], dict[str, object]]] = {
    "messages": messages_row,
    "alpaca": alpaca_row,
    "sharegpt": sharegpt_row,
}


def _write_rows(path: Path, rows: Iterable[dict[str, object]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def example_texts(examples: Iterable[DemoExample]) -> Iterator[str]:
    """What a tokenizer for these examples is trained on: every part of every example."""
    for example in examples:
        yield from ("system\n" + example.system, "user\n" + example.user, "assistant\n" + example.answer)
