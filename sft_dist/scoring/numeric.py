"""Numbers with units in an answer, compared within a tolerance. Parsed, never evaluated.

    1,234.5   1 234.5 (no-break spaces)   -3   2.5e-3   1.5 x 10^9   64 mL/min   12%   8-10 mEq/L   8 to 10

A comma before exactly three digits separates thousands, any other comma is a decimal point: 1,234 is 1234, 22,9 is
22.9. With `decimal="comma"` comma and point change places.

A product is two numbers, 2 x 100 mg being 2 and 100 mg: whether two doses or their sum is meant, it does not say.
"""

import re
from dataclasses import dataclass, replace
from typing import Literal

from sft_dist.scoring.result import Score, TruthError, after_marker, words_of
from sft_dist.scoring.units import Unit, unit_at

SLACK = 1e-9
"""Of binary fractions: 0.1 + 0.2 is no wrong 0.3."""


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number, or a range from low to high, with its unit if it has a known one."""

    low: float
    high: float
    unit: Unit | None = None

    @property
    def is_range(self) -> bool:
        return self.low != self.high

    def __str__(self) -> str:
        numbers = f"{self.low:g}-{self.high:g}" if self.is_range else f"{self.low:g}"
        return f"{numbers} {self.unit.text}" if self.unit else numbers


_SPACES = "\u00a0\u202f\u2009"
_NUMBER = re.compile(
    rf"(?<![\w.,])[-+\u2212]?(?:\d{{1,3}}(?:[{_SPACES}]\d{{3}})+(?:[.,]\d+)?|\d+(?:[.,]\d+)*|\.\d+)"
    r"(?:[eE][-+\u2212]?\d+(?!\w))?"
)
_TIMES = rf"[ {_SPACES}]*[x\u00d7*][ {_SPACES}]*"  # on one line: a star may begin the next one as a bullet
_PER = r"(?=\s?/\s?[^\W\d])"
# 1.5 x 10^9, 10**9, superscripts and, as units are coded (UCUM), 10*9/L; these also without the x: 1.5 10^9/L. Where a
# text has lost the superscript, x 109/L is a power only before a solidus and x 10-3 only with one digit: 2 x 100 mg and
# 2 x 105 mg are doses, 2 x 10-20 mg ends in a range.
_POWER_OF_TEN = re.compile(
    rf"(?:{_TIMES}|[ {_SPACES}])10"
    rf"(?:(?:\^|\*\*)\s*([-+\u2212]?\d{{1,3}})|(\u207b?[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+)|\*([1-9]\d?){_PER})"
    rf"|{_TIMES}10(?:[ {_SPACES}]?([1-9]\d?){_PER}|([-\u2212][1-9])(?!\d|[.,]\d))"
)
_SUPERSCRIPTS = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b", "0123456789-")
_TO = re.compile(r"(?:\s*(?:\u2013|\u2014|\bto\b)\s*|[-\u2212]|\s+[-\u2212]\s+)(?=[\d.+])")  # 5 -3 are two numbers


def quantities_in(text: str, *, decimal: Literal["point", "comma"] = "point") -> list[Quantity]:
    """Every number or range of a text, in order. A number inside a word (B12, A1c) or of a unit (1.73 m2) is none."""
    found: list[Quantity] = []
    at = 0
    while (match := _NUMBER.search(text, at)) is not None:
        first, power, at = _quantity_at(text, match, decimal)
        if first is None:
            continue
        if (to := _TO.match(text, at)) is not None and (second := _NUMBER.match(text, to.end())) is not None:
            last, last_power, end = _quantity_at(text, second, decimal)
            shared = last_power if power == 1 and first.unit is None else 1.0  # 4-11 x 10^9/L
            if last is not None and (
                whole := _range(replace(first, low=first.low * shared), last) or _range(first, last)
            ):
                first, at = whole, end
        found.append(first)
    return found


def _range(first: Quantity, last: Quantity) -> Quantity | None:
    """From one number to the other, in the last one's unit; None where they do not ascend, or their units differ."""
    low, unit = first.low, last.unit or first.unit
    if first.unit is not None and last.unit is not None:
        if first.unit.dimension != last.unit.dimension:
            return None
        low = first.unit.convert(low, last.unit)
    return Quantity(low, last.low, unit) if last.low > low else None


def score_numeric(
    answer: str,
    truth: str,
    *,
    absolute: float | None = None,
    relative: float | None = None,
    unit_required: bool = False,
    marker: str = "Answer:",
    take: Literal["first", "last"] = "last",
    decimal: Literal["point", "comma"] = "point",
) -> Score:
    """1 where the answer's number is within the tolerance of the truth's, in the truth's unit; else 0.

    absolute: in the truth's unit. relative: 0.05 is 5% of the truth. With both, within either is right; with neither,
    the numbers must be equal. A truth that is a range takes every number, and every range, inside of it.
    What is compared: the first number behind the last `marker`; without a marker, the `take` number of the text.
    Raises TruthError for a truth without a number.
    """
    expected = _pick(truth, marker=marker, take=take, decimal=decimal)
    if expected is None:
        raise TruthError("has no number")
    given = _pick(words_of(answer), marker=marker, take=take, decimal=decimal)
    if given is None:
        return Score(0.0, "no number", is_valid=False)
    if given.is_range and not expected.is_range:
        return Score(0.0, f"the range {given}, expected {expected}")
    if expected.unit is not None:
        if given.unit is None and unit_required:
            return Score(0.0, f"{given} without the unit {expected.unit.text}")
        if given.unit is not None:
            if given.unit.dimension != expected.unit.dimension:
                return Score(0.0, f"{given.unit.text} contradicts the unit {expected.unit.text}")
            given = replace(
                given,
                low=given.unit.convert(given.low, expected.unit),
                high=given.unit.convert(given.high, expected.unit),
                unit=expected.unit,
            )
    slack = [
        max(_tolerance(edge, absolute, relative), SLACK * max(abs(edge), abs(expected.high)))
        for edge in (expected.low, expected.high)
    ]
    if expected.low - slack[0] <= given.low and given.high <= expected.high + slack[1]:
        return Score(1.0, f"{given}, expected {expected}")
    return Score(0.0, f"{given}, expected {expected}{_how_far(given, expected)}")


def _tolerance(truth: float, absolute: float | None, relative: float | None) -> float:
    return max(absolute or 0.0, (relative or 0.0) * abs(truth))


def _how_far(given: Quantity, expected: Quantity) -> str:
    if expected.is_range or not expected.low:
        return ""
    return f" ({(given.low - expected.low) / abs(expected.low):+.1%})"


def _pick(text: str, *, marker: str, take: str, decimal: Literal["point", "comma"]) -> Quantity | None:
    behind, is_marked = after_marker(text, marker)
    found = quantities_in(behind, decimal=decimal)
    if is_marked and not found:
        found = quantities_in(text, decimal=decimal)
        is_marked = False
    if not found:
        return None
    return found[0] if is_marked or take == "first" else found[-1]


def _quantity_at(
    text: str, match: "re.Match[str]", decimal: Literal["point", "comma"]
) -> tuple[Quantity | None, float, int]:
    """The number there with its unit, the power of ten in it, and where it ends; None for what is no single number."""
    end, power = match.end(), 1.0
    value = _value(match[0], decimal)
    if value is not None and (written := _POWER_OF_TEN.match(text, end)) is not None:
        power = float("1e" + next(filter(None, written.groups())).translate(_SUPERSCRIPTS).replace("\u2212", "-"))
        end = written.end()
    elif value is None or (re.match(r"[A-Za-z_]", text[end : end + 1]) and unit_at(text, end) is None):
        return None, power, end
    unit, end = unit_at(text, end) or (None, end)
    return Quantity(value * power, value * power, unit), power, end


def _value(text: str, decimal: Literal["point", "comma"]) -> float | None:
    """A number as it is written, without its separators of thousands; None for a list such as 1,2,3 or a version."""
    text = re.sub(f"[{_SPACES}]", "", text).replace("\u2212", "-")
    mantissa, e, exponent = text.replace("E", "e").partition("e")
    thousands, point = (",", ".") if decimal == "point" else (".", ",")
    whole, pointed, fraction = mantissa.partition(point)
    if pointed and (point in fraction or thousands in fraction):
        return None
    if thousands in whole:
        groups = whole.lstrip("+-").split(thousands)
        if all(len(group) == 3 for group in groups[1:]) and 1 <= len(groups[0]) <= 3:
            whole = whole.replace(thousands, "")
        elif len(groups) == 2 and not pointed and thousands == ",":
            whole, fraction = whole.split(thousands)  # 22,9
        else:
            return None
    try:
        return float(f"{whole or '0'}.{fraction or '0'}{e}{exponent}")
    except (ValueError, OverflowError):
        return None
