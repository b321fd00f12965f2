"""JSON answers, field by field: precision, recall and F1 over (path, value) pairs.

    {"age": 58, "drugs": ["Metformin", "Amlodipine"]}   ->   age = 58, drugs[] = metformin, drugs[] = amlodipine

Items of a list are a bag: their order does not matter, how often one occurs does. Objects in a list are told apart by
their position. Texts are compared without case and runs of white space; 5.0 is 5, and no text is a number or `true`.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator

from sft_dist.scoring.result import FieldCounts, Score, TruthError, words_of

_FENCED = re.compile(r"```(?:json)?[ \t]*\n?(.*?)```", re.DOTALL | re.IGNORECASE)

Field = tuple[str, str]


def score_json(answer: str, truth: str, *, ignore_case: bool = True) -> Score:
    """F1 of the answer's fields; 0 for what is no JSON. One code fence around it is allowed, other words are not.

    Raises TruthError for a truth that is no JSON.
    """
    try:
        expected = fields_of(truth, ignore_case=ignore_case)
    except (ValueError, RecursionError):
        raise TruthError("is no JSON") from None
    total = sum(expected.values())
    try:
        given = fields_of(_unfenced(words_of(answer)), ignore_case=ignore_case)
    except (ValueError, RecursionError):
        return Score(0.0, "no JSON", is_valid=False, fields=FieldCounts(0, 0, total))
    right = sum((given & expected).values())
    counts = FieldCounts(right, sum(given.values()), total)
    wrong = [f"{path}={value}" for path, value in (given - expected)]
    missing = [f"{path}={value}" for path, value in (expected - given)]
    why = "; ".join(f"{what} {', '.join(some[:3])}" for what, some in (("wrong", wrong), ("missing", missing)) if some)
    return Score(f1(counts), why or "every field", fields=counts)


def f1(counts: FieldCounts) -> float:
    """2PR / (P + R); 1 where nothing was to be said and nothing was."""
    total = counts.given + counts.expected
    return 2 * counts.right / total if total else 1.0


def fields_of(text: str, *, ignore_case: bool) -> "Counter[Field]":
    """The fields of a JSON text. Raises ValueError or RecursionError for what is no standard JSON."""
    value = json.loads(text, parse_constant=_refuse_constant)
    return Counter(_flatten(value, "", ignore_case=ignore_case))


def _flatten(value: object, path: str, *, ignore_case: bool) -> Iterator[Field]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{path}.{key}" if path else str(key), ignore_case=ignore_case)
    elif isinstance(value, list) and value:
        for index, inner in enumerate(value):
            is_object = isinstance(inner, (dict, list))
            yield from _flatten(inner, f"{path}[{index if is_object else ''}]", ignore_case=ignore_case)
    else:
        yield path, _normalised(value, ignore_case=ignore_case)


def _normalised(value: object, *, ignore_case: bool) -> str:
    if isinstance(value, str):
        text = " ".join(value.split())
        return json.dumps(text.casefold() if ignore_case else text, ensure_ascii=False)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value)


def _unfenced(text: str) -> str:
    fenced = _FENCED.fullmatch(text.strip())
    return fenced[1] if fenced else text


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")
