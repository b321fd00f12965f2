"""`sft-dist lint`: the text of a data set checked before it is trained on, without tokenizer or torch.

One pass over the files. Memory holds hashes, lengths and flags of each row and the findings that are shown, never the
texts.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sft_dist.config import Source
from sft_dist.data.conversation import BadRow, Conversation, Origin
from sft_dist.data.draws import hold_out
from sft_dist.data.files import iter_rows
from sft_dist.data.lint_near import NearDuplicates
from sft_dist.data.lint_row import Finding, lint_conversation
from sft_dist.data.lint_set import leakage, lint_data_set, repeats
from sft_dist.data.lint_table import DataSet, RowTable
from sft_dist.data.rows import detect_format, parse_row
from sft_dist.errors import DataError

Severity = Literal["error", "warning", "note"]

# In the order of the report. docs/lint.md says of each what it finds, why that matters and how to mend it.
SEVERITIES: dict[str, Severity] = {
    "bad_row": "error",
    "empty_turn": "error",
    "system_not_first": "error",
    "answer_in_prompt": "error",
    "leakage": "error",
    "near_leakage": "warning",
    "system_missing": "warning",
    "system_variant": "warning",
    "no_trailing_cue": "warning",
    "mixed_formats": "warning",
    "response_is_prompt": "warning",
    "duplicate": "warning",
    "duplicate_prompt_different_answer": "warning",
    "near_duplicate": "warning",
    "length_outlier": "warning",
    "role_order": "warning",
    "cut_answer": "warning",
    "forged_control_token": "warning",
    "invisible_characters": "warning",
    "padded_response": "note",
    "no_system": "note",
    "system_differs": "note",
    "answer_shapes": "note",
    "row_formats": "note",
    "reworded_answer": "note",
    "mixed_languages": "note",
    "mixed_instructions": "note",
}
# What the rules that are not about training rows look at.
OF_HELD_OUT_ROWS = ("leakage", "near_leakage")
OF_ALL_ROWS = ("bad_row", "empty_turn")


@dataclass(slots=True)
class RuleResult:
    """count: all findings; num_rows: rows that they name; first: the first of them, as many as were asked for."""

    count: int = 0
    num_rows: int = 0
    first: list[Finding] = field(default_factory=list)


class Total(NamedTuple):
    """Findings of one severity, and in how many rules."""

    findings: int
    rules: int


@dataclass(frozen=True, slots=True)
class LintReport:
    """results: of the rules that found something, in the order of SEVERITIES.

    rows: those of the training files, bad ones and those that data.held_out_share takes from them too.
    held_out_rows: those taken from them, or those of held-out files. rows_read: of all files.
    """

    rows: int
    held_out_rows: int
    rows_read: int
    results: dict[str, RuleResult]

    def total(self, severity: Severity) -> Total:
        """What was found of one severity."""
        counts = [result.count for rule, result in self.results.items() if SEVERITIES[rule] == severity]
        return Total(sum(counts), len(counts))

    def share(self, rule: str) -> float | None:
        """The rows that a rule names among those that it is about; None where it is about the data set as a whole."""
        rows = self.results[rule].num_rows
        if rule in OF_HELD_OUT_ROWS:
            return rows / self.held_out_rows
        return rows / (self.rows_read if rule in OF_ALL_ROWS else self.rows) if rows else None

    @property
    def is_clean(self) -> bool:
        """No error and no warning; notes never count."""
        return not (self.total("error").findings or self.total("warning").findings)

    @property
    def verdict(self) -> str:
        """One line for people."""
        if self.is_clean:
            return "clean"
        errors, warnings = self.total("error"), self.total("warning")
        said = [
            f"{_number(total.findings, name)} in {_number(total.rules, 'rule')}"
            for name, total in (("error", errors), ("warning", warnings))
            if total.findings
        ]
        text = f"{' and '.join(said)} over {_number(self.rows, 'row')}"
        return f"not fit to train on: {text}" if errors.findings else text


def lint(
    train: Sequence[Source],
    held_out: Sequence[Source] = (),
    *,
    turns: str = "all",
    difficulty_field: str | None = None,
    held_out_share: float = 0.0,
    held_out_seed: int = 0,
    keep: int = 5,
) -> LintReport:
    """Check training data, and held-out data for leakage from it.

    turns, difficulty_field, held_out_share, held_out_seed: as in the recipe; give held-out sources or a share.
    keep: findings kept for each rule; all are counted.
    Raises DataError for files that cannot be read, or that hold no row; ConfigError for a share that leaves one side
    empty.
    """
    found = _Collector(keep)
    with NearDuplicates() as near:
        reader = _Reader(near, turns=turns)
        found.extend(reader.read(train, is_train=True, difficulty_field=difficulty_field))
        num_rows = reader.num_read
        table = reader.finish()
        found.extend(reader.read(held_out, is_train=False))
        held_table = reader.finish()
        found.extend(lint_data_set(table))
        found.extend(_formats(reader.formats))
        found.extend(leakage(table, held_table))
        is_split_off = np.zeros(len(table), dtype=np.bool_)
        if len(table):
            is_split_off = hold_out(table.table["question"], share=held_out_share, seed=held_out_seed)
        found.extend(_near(near, table, held_table, is_split_off))
    results = {rule: found.results[rule] for rule in SEVERITIES if rule in found.results}
    num_held_out = int(is_split_off.sum()) + reader.num_read - num_rows
    return LintReport(num_rows, num_held_out, reader.num_read, results)


class _Collector:
    """Counts findings by rule and keeps the first of each. A rule names all it finds in a row one after another."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._last: dict[str, Origin] = {}
        self.results: dict[str, RuleResult] = {}

    def extend(self, findings: Iterable[Finding]) -> None:
        for finding in findings:
            result = self.results.setdefault(finding.rule, RuleResult())
            result.count += 1
            if finding.origin and finding.origin != self._last.get(finding.rule):
                self._last[finding.rule] = finding.origin
                result.num_rows += 1
            if len(result.first) < self._keep:
                result.first.append(finding)


class _Reader:
    """Reads sources once; leaves behind a table, and texts to compare in `near`."""

    def __init__(self, near: NearDuplicates, *, turns: str) -> None:
        self._near, self._turns = near, turns
        self._table = RowTable()
        self.num_read = 0
        self.formats: dict[str, str] = {}

    def read(
        self, sources: Sequence[Source], *, is_train: bool, difficulty_field: str | None = None
    ) -> Iterator[Finding]:
        """Yield what rules over one row find. In held-out data only bad rows are looked for."""
        extra = [difficulty_field] if difficulty_field else []
        for source in sources:
            row_format = detect_format(source)
            if is_train:
                self.formats.setdefault(row_format, source.path)
            before = self.num_read
            for raw in iter_rows(source, extra_columns=extra):
                self.num_read += 1
                row = parse_row(raw, row_format, turns=self._turns, difficulty_field=difficulty_field)
                if isinstance(row, BadRow):
                    yield Finding("empty_turn" if row.cause == "empty_content" else "bad_row", row.origin, row.reason)
                    continue
                if is_train:
                    yield from lint_conversation(row)
                self._table.add(row)
                self._near.add(_compared_text(row))
            if self.num_read == before:
                raise DataError(f"{source.path}: holds no row; give a file with at least one")

    def finish(self) -> DataSet:
        """The table of what was read since the last call."""
        table, self._table = self._table, RowTable()
        return table.finish()


def _compared_text(conversation: Conversation) -> str:
    """What near-duplicates are looked for in: all but the system prompt, which many rows share."""
    return "\n".join(message.content for message in conversation.messages if message.role != "system")


def _formats(formats: dict[str, str]) -> Iterator[Finding]:
    if len(formats) > 1:
        named = ", ".join(f"{row_format} ({path})" for row_format, path in formats.items())
        yield Finding("row_formats", None, f"several row formats: {named}")


def _near(
    near: NearDuplicates, table: DataSet, held_table: DataSet, is_split_off: NDArray[np.bool_]
) -> Iterator[Finding]:
    """Near-duplicates but for those that the rules of exact duplicates report.

    is_split_off: rows of `table` that are not trained on.
    """
    num_rows = len(table)
    repeated = [row for row, _ in repeats(table.table["conversation"])]
    leaked = [num_rows + row for row in held_table.rows_in(table, "question")]
    is_held_out = np.concatenate([is_split_off, np.ones(len(held_table), dtype=np.bool_)])
    for first, second, similarity in near.pairs(is_held_out, skip=np.array(repeated + leaked, dtype=np.int64)):
        origin = table.origin(second) if second < num_rows else held_table.origin(second - num_rows)
        detail = f"shares {similarity:.0%} of its word sequences with {table.origin(first)}"
        if is_held_out[second]:
            yield Finding("near_leakage", origin, f"held out, {detail}")
        else:
            yield Finding("near_duplicate", origin, detail)


def _number(count: int, name: str) -> str:
    return f"{count} {name}" if count == 1 else f"{count} {name}s"
