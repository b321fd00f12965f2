"""Answers on disk: scored ones to be read, and those of an evaluation under way, so that a killed one goes on.

<run>/answers/model.jsonl            the exported model's, scored; base.jsonl: those of model.path
<run>/answers/step-00000100.jsonl    those of a run after step 100
<run>/answers/model-<fingerprint>/   as they come, a file of each rank; base-<fingerprint>/ is kept as it is
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from sft_dist.data.questions import Question
from sft_dist.durable import replace_durably
from sft_dist.errors import DataError
from sft_dist.evaluate_section import EvaluateSection
from sft_dist.scoring.metrics import score_answer
from sft_dist.scoring.result import FieldCounts, Score

ANSWERS = "answers"


@dataclass(frozen=True)
class Scored:
    """An answer beside the truth. prompt: its turns as {"role", "content"}. why: what the score says."""

    set: str
    id: str
    task: str
    prompt: tuple[dict[str, str], ...]
    truth: str
    answer: str
    metric: str
    score: float
    why: str
    is_valid: bool = True
    fields: FieldCounts | None = None


def score_answers(questions: Sequence[Question], answers: Sequence[str], section: EvaluateSection) -> list[Scored]:
    """Score every answer by the metric of its task. Raises DataError for a truth that its metric cannot compare."""
    return [_scored(question, answer, section) for question, answer in zip(questions, answers, strict=True)]


def require_scorable(questions: Sequence[Question], section: EvaluateSection) -> None:
    """Raise DataError for the first truth that its task's metric cannot compare: before anything is generated."""
    for question in questions:
        _score(question, "", section)


def _score(question: Question, answer: str, section: EvaluateSection) -> Score:
    return score_answer(
        answer, question.truth, section.task(question.task), prompt=question.asks, name=question.task, where=question.id
    )


def _scored(question: Question, answer: str, section: EvaluateSection) -> Scored:
    score = _score(question, answer, section)
    return Scored(
        set=question.set_name,
        id=question.id,
        task=question.task,
        prompt=tuple({"role": message.role, "content": message.content} for message in question.messages),
        truth=question.truth,
        answer=answer,
        metric=section.task(question.task).metric,
        score=score.value,
        why=score.why,
        is_valid=score.is_valid,
        fields=score.fields,
    )


# ---------------------------------------------------------------- scored ones


def step_file(run_dir: Path, step: int) -> Path:
    """Where the answers after a step are."""
    return run_dir / ANSWERS / f"step-{step:08d}.jsonl"


def write_scored(file: Path, answers: Sequence[Scored]) -> None:
    """Write scored answers, one JSON object a line; the file is whole or as it was."""
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_durably(file, "".join(json.dumps(_as_line(answer), ensure_ascii=False) + "\n" for answer in answers))


def read_scored(file: Path) -> list[Scored]:
    """Scored answers. Raises DataError, naming the line, for a file that holds something else."""
    found = []
    for number, text in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            line = json.loads(text)
            fields = line.pop("fields", None)
            line["prompt"] = tuple(line["prompt"])
            found.append(Scored(**line, fields=FieldCounts(*fields) if fields else None))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{file}:{number}: no scored answer of this version: {error}") from None
    return found


def _as_line(answer: Scored) -> dict[str, Any]:
    line = asdict(answer)
    if answer.fields is None:
        del line["fields"]
    else:
        line["fields"] = list(asdict(answer.fields).values())
    return line


# ---------------------------------------------------------------- those under way


def fingerprint_answers(questions: Sequence[Question], **settings: Any) -> str:
    """16 hex digits over all that decides the answers: the prompts in their order, and settings by name.

    Truths, tasks and metrics are not among them: answers are scored anew each time.
    """
    digest = xxhash.xxh3_64()
    for question in questions:
        digest.update(json.dumps([question.set_name, question.id, list(question.ids)]).encode())
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()


class AnswerLog:
    """The answers of an evaluation as they come, by the question's place in the list. Each rank has a file of its own.

    A batch is one write; a line that a crash has cut is no answer, and its batch is answered again.
    """

    def __init__(self, directory: Path, *, rank: int) -> None:
        self.directory, self._file = directory, directory / f"rank-{rank:05d}.jsonl"

    def read(self) -> dict[int, str]:
        """The answers of all ranks of all starts."""
        return {
            line["index"]: line["answer"]
            for file in sorted(self.directory.glob("rank-*.jsonl"))
            for line in _lines(file)
        }

    def append(self, answers: Mapping[int, str]) -> None:
        """Add a batch. What a crash left of the line before is closed first, so that it spoils no other."""
        self.directory.mkdir(parents=True, exist_ok=True)
        text = "".join(
            json.dumps({"index": index, "answer": answer}, ensure_ascii=False) + "\n"
            for index, answer in answers.items()
        ).encode()
        with self._file.open("ab+") as file:
            if file.tell():
                file.seek(-1, 2)
                text = text if file.read(1) == b"\n" else b"\n" + text
            file.write(text)

    def remove_older(self) -> None:
        """Delete the logs of other models, data or settings under the same name."""
        kind = self.directory.name.rpartition("-")[0]
        for other in self.directory.parent.glob(f"{kind}-*/"):
            if other != self.directory:
                shutil.rmtree(other, ignore_errors=True)


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    for text in file.read_bytes().splitlines(keepends=True):
        try:
            line = json.loads(text) if text.endswith(b"\n") else None
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("index"), int) and isinstance(line.get("answer"), str):
            yield line
