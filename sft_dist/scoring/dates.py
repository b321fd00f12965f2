"""Dates in an answer, compared as days of the calendar.

    2024-03-12   2024/3/12   12 March 2024   12th of Mar., 2024   March 12, 2024   12/03/2024   12.03.2024

Of day and month as numbers the setting `day_first` says which is which; nothing is guessed, and a year has four digits.
"""

import datetime
import re

from sft_dist.scoring.result import Score, TruthError, after_marker, words_of

_MONTHS = ("january", "february", "march", "april", "may", "june", "july", "august", "september", "october",
           "november", "december")  # fmt: skip
_NUMBER_OF = {name[:3]: number for number, name in enumerate(_MONTHS, start=1)}
_MONTH = r"(" + "|".join(f"{name[:3]}(?:{name[3:]})?" for name in _MONTHS) + r"|sept)\.?"
_DAY = r"(\d{1,2})(?:st|nd|rd|th)?"
_FORMS = re.compile(
    rf"(?<![\w/-])(?:(?P<iso>\d{{4}}[-/.]\d{{1,2}}[-/.]\d{{1,2}})(?:T[\d:.]+Z?)?"
    rf"|(?P<day>{_DAY}\s+(?:of\s+)?{_MONTH},?\s+\d{{4}})"
    rf"|(?P<month>{_MONTH}\s+{_DAY},?\s+\d{{4}})"
    r"|(?P<numbers>\d{1,2}(?P<separator>[/.-])\d{1,2}(?P=separator)\d{4}))(?![\w/-]|\.\d)",
    re.IGNORECASE,
)


def dates_in(text: str, *, day_first: bool = False) -> list[datetime.date]:
    """Every date of a text, in order; what is none in the calendar, such as 31 April, is left out."""
    found = []
    for match in _FORMS.finditer(text):
        kind = next(name for name in ("iso", "day", "month", "numbers") if match[name])
        numbers = [int(number) for number in re.findall(r"\d+", match[kind])]
        if kind == "iso":
            year, month, day = numbers
        elif kind == "numbers":
            day, month, year = numbers if day_first else (numbers[1], numbers[0], numbers[2])
        else:
            day, year = numbers
            name = re.search(r"[a-z]{3,}", re.sub(r"\d(?:st|nd|rd|th)|\bof\b", "", match[kind].casefold()))
            month = _NUMBER_OF[name[0][:3]] if name else 0
        try:
            found.append(datetime.date(year, month, day))
        except ValueError:
            continue
    return found


def score_date(answer: str, truth: str, *, day_first: bool = False, marker: str = "Answer:") -> Score:
    """1 where the answer gives the truth's date: the first behind the last `marker`, without one the last of the text.

    Raises TruthError for a truth without a date.
    """
    expected = _pick(truth, day_first=day_first, marker=marker)
    if expected is None:
        raise TruthError("has no date")
    given = _pick(words_of(answer), day_first=day_first, marker=marker)
    if given is None:
        return Score(0.0, "no date", is_valid=False)
    return Score(float(given == expected), f"{given}, expected {expected}")


def _pick(text: str, *, day_first: bool, marker: str) -> datetime.date | None:
    behind, is_marked = after_marker(text, marker)
    found = dates_in(behind, day_first=day_first)
    if is_marked and found:
        return found[0]
    found = found or dates_in(text, day_first=day_first)
    return found[-1] if found else None
