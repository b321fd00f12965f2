"""`sft-dist generate --input`: an answer to each row of a file, in order, and a job that goes on where it was killed.

answers.jsonl                 the rows, each with its answer; appended a batch at a time
answers.jsonl.settings.json   how the answers were made: nothing else may be added to them
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sft_dist.config import Source
from sft_dist.data.prompts import Prompt, read_prompts
from sft_dist.durable import replace_durably, sync
from sft_dist.errors import ConfigError, DataError
from sft_dist.generate import Answerer, Sampling, find_model, hash_model


@dataclass(frozen=True)
class Answered:
    """How many rows have their answer now, and how many had it before."""

    num_rows: int
    num_before: int


def answer_rows(
    model: Path,
    *,
    rows: Path,
    output: Path,
    field: str,
    sampling: Sampling,
    batch_size: int,
    on_progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> Answered:
    """Write every row of `rows` to `output` with the model's answer as `field`.

    batch_size: rows that are answered together. on_progress: called with the rows done and all rows, batch by batch.
    Raises DataError for rows that ask nothing or are longer than the model can take, before any is answered;
    ConfigError when `output` holds anything but answers to the first of these rows, made in the same way.
    """
    prompts = read_prompts(Source(path=str(rows)))
    for prompt in prompts:
        if field in prompt.row:
            raise DataError(f"{prompt.origin}: the row has a field {field!r}; name another with --answer-field")
    made = {
        "model": hash_model(find_model(model)),
        "sampling": asdict(sampling),
        "batch_size": batch_size,
        "field": field,
    }
    num_before = _go_on(output, prompts, made)
    if num_before == len(prompts):
        return Answered(len(prompts), num_before)
    answerer = Answerer.load(model)
    # From the beginning of the batch in which the job was killed: its rows are drawn together, as they were.
    first = num_before - num_before % batch_size
    encoded = _encode(answerer, prompts[first:], sampling.max_new_tokens)
    with output.open("a", encoding="utf-8") as file:
        for start in range(first, len(prompts), batch_size):
            on_progress(max(start, num_before), len(prompts))
            batch = encoded[start - first : start - first + batch_size]
            answers = answerer.complete(batch, sampling=sampling, place=start)
            for index, answer in enumerate(answers, start=start):
                if index >= num_before:
                    file.write(_line({**prompts[index].row, field: answer}))
            file.flush()
            sync(output)
    return Answered(len(prompts), num_before)


def say_now_and_then(*, every_s: float = 15.0) -> Callable[[int, int], None]:
    """Says on stderr how far a job is, the first time and then no more often than that."""
    said_at: list[float] = []

    def say(done: int, of: int) -> None:
        if not said_at or time.monotonic() - said_at[-1] >= every_s:
            said_at[:] = [time.monotonic()]
            print(f"{done:,} of {of:,} rows", file=sys.stderr, flush=True)

    return say


def _encode(answerer: Answerer, prompts: Sequence[Prompt], max_new_tokens: int) -> list[list[int]]:
    encoded = []
    for prompt in prompts:
        try:
            ids = answerer.tokenizer.encode_prompt(prompt.messages, prompt.tools)
        except DataError as error:
            raise DataError(f"{prompt.origin}: {error}") from None
        positions = answerer.num_positions
        if positions is not None and len(ids) + max_new_tokens > positions:
            raise DataError(
                f"{prompt.origin}: a prompt of {len(ids)} tokens and an answer of up to {max_new_tokens} do not fit "
                f"into the model's {positions} positions; shorten the row, or lower --max-new-tokens"
            )
        encoded.append(ids)
    return encoded


def _go_on(output: Path, prompts: Sequence[Prompt], made: dict[str, Any]) -> int:
    """How many rows are answered already. A torn last line is cut off; the settings are written beside a new file."""
    settings = output.with_name(f"{output.name}.settings.json")
    found = output.read_bytes() if output.exists() else b""
    whole = found[: found.rfind(b"\n") + 1]
    if found:
        _require_same_settings(output, settings, made)
    lines = whole.decode("utf-8", "replace").split("\n")[:-1]  # not splitlines: rows may hold U+2028
    for number, (line, prompt) in enumerate(zip(lines, prompts, strict=False), start=1):
        if not _answers(line, prompt, made["field"]):
            raise ConfigError(
                f"{output}:{number} is not the answer to {prompt.origin}; name another --output, or delete this one"
            )
    if len(lines) > len(prompts):
        raise ConfigError(f"{output}: has {len(lines)} rows, the input {len(prompts)}; name another --output")
    if len(whole) < len(found):
        with output.open("r+b") as file:
            file.truncate(len(whole))
    output.parent.mkdir(parents=True, exist_ok=True)
    replace_durably(settings, json.dumps(made, indent=2) + "\n")
    return len(lines)


def _require_same_settings(output: Path, settings: Path, made: dict[str, Any]) -> None:
    try:
        then = json.loads(settings.read_text(encoding="utf-8"))
        changed = [key for key in made if then[key] != made[key]]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{output}: exists, and no {settings.name} says how it was made; name another --output"
        ) from None
    if changed:
        told = "; ".join(f"{key} was {then[key]}, is {made[key]}" for key in changed)
        raise ConfigError(f"{output}: was made otherwise: {told}. Go on as it was, or name another --output")


def _answers(line: str, prompt: Prompt, field: str) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return (
        isinstance(row, dict)
        and isinstance(row.get(field), str)
        and line + "\n" == _line({**prompt.row, field: row[field]})
    )


def _line(row: dict[str, Any]) -> str:
    # Dates and the like of a Parquet file have no JSON; they are written as text.
    line = json.dumps(row, ensure_ascii=False, default=str) + "\n"
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair in a field that nobody reads
        return json.dumps(row, default=str) + "\n"
    return line
