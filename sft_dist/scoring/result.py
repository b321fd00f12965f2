"""What every metric returns, and which part of an answer it looks at."""

import re
from dataclasses import dataclass

CLOSE_THINKING = "</think>"
OPEN_THINKING = "<think>"


@dataclass(frozen=True, slots=True)
class FieldCounts:
    """Fields of a JSON answer: how many are right, how many it gives, how many the truth has."""

    right: int
    given: int
    expected: int


@dataclass(frozen=True, slots=True)
class Score:
    """value: 0 to 1. why: in a few words, for whoever reads the worst answers. fields: of the metric json.

    is_valid: False where the answer is not of the kind that was asked for: no number, no date, no JSON.
    """

    value: float
    why: str
    is_valid: bool = True
    fields: FieldCounts | None = None


class TruthError(ValueError):
    """The ground truth is not of the kind that the metric compares. The message says what it is instead."""


def words_of(text: str) -> str:
    """The text without the thinking before it; nothing where the thinking was never closed."""
    thought, closed, rest = text.rpartition(CLOSE_THINKING)
    if closed:
        return rest.strip()
    return "" if thought or OPEN_THINKING in rest else rest.strip()


def after_marker(text: str, marker: str) -> tuple[str, bool]:
    """What follows the last `marker`, in any case, and whether there is one; the whole text where there is none."""
    found = list(re.finditer(re.escape(marker), text, re.IGNORECASE)) if marker else []
    return (text[found[-1].end() :], True) if found else (text, False)


def one_space(text: str) -> str:
    """The text with every run of white space as one space, and none at the ends."""
    return " ".join(text.split())
