"""Answers against ground truth. Plain text in, plain numbers out: no model, no torch."""

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sft_dist.errors import DataError


@dataclass(frozen=True, slots=True)
class TemplateScore:
    """Exact match of the answers to one template, beside what a model without the prompt could reach.

    `exact_match` and `constant_exact_match` are shares in 0..1. `constant_answer` is the most frequent truth:
    no answer that ignores the prompt matches more often.
    """

    num_examples: int
    exact_match: float
    constant_answer: str
    constant_exact_match: float

    @property
    def gain(self) -> float:
        """Exact match above the best constant answer, in -1..1."""
        return self.exact_match - self.constant_exact_match


def exact_match(prediction: str, truth: str, *, as_json: bool = False) -> bool:
    """Whether two answers are the same text, every run of white space counted as one space and none at the ends.

    as_json: compare parsed values instead, so that spacing and the order of keys do not matter.
    A prediction that is no JSON does not match; a truth that is none raises DataError.
    """
    if not as_json:
        return _normalised(prediction) == _normalised(truth)
    expected = _parsed_truth(truth)
    try:
        given = _parse_json(prediction)
    except (ValueError, RecursionError):
        return False
    return _canonical_json(given) == _canonical_json(expected)


def score_by_template(
    templates: Sequence[str], predictions: Sequence[str], truths: Sequence[str], *, json_templates: Collection[str] = ()
) -> dict[str, TemplateScore]:
    """Score answers template by template, in order of first appearance.

    templates, predictions, truths: one entry per example. json_templates: those whose answers are compared as JSON.
    Raises DataError when the three differ in length, or for a truth of a JSON template that is no JSON.
    """
    if not len(templates) == len(predictions) == len(truths):
        raise DataError(
            f"cannot score {len(predictions)} predictions against {len(truths)} truths of {len(templates)} examples; "
            "give one of each per example"
        )
    rows: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for template, prediction, truth in zip(templates, predictions, truths, strict=True):
        rows[template].append((prediction, truth))
    return {name: _score(pairs, as_json=name in json_templates) for name, pairs in rows.items()}


def _score(pairs: Sequence[tuple[str, str]], *, as_json: bool) -> TemplateScore:
    matched = sum(exact_match(prediction, truth, as_json=as_json) for prediction, truth in pairs)
    keys = [_canonical_json(_parsed_truth(truth)) if as_json else _normalised(truth) for _, truth in pairs]
    # most_common keeps the order of first appearance among equals: the same constant every time.
    constant, count = Counter(keys).most_common(1)[0]
    return TemplateScore(len(pairs), matched / len(pairs), pairs[keys.index(constant)][1], count / len(pairs))


def _normalised(text: str) -> str:
    return " ".join(text.split())


def _parsed_truth(truth: str) -> object:
    try:
        return _parse_json(truth)
    except (ValueError, RecursionError):
        raise DataError(f"the ground truth {truth!r} is not JSON; mend the data or compare it as text") from None


def _canonical_json(value: object) -> str:
    """One text per JSON value: keys sorted, 5.0 as 5, and true apart from 1, which Python calls equal."""
    return json.dumps(_whole_as_int(value), sort_keys=True)


def _whole_as_int(value: object) -> object:
    if isinstance(value, list):
        return [_whole_as_int(item) for item in value]
    if isinstance(value, dict):
        return {key: _whole_as_int(item) for key, item in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _parse_json(text: str) -> object:
    """Parse standard JSON: NaN and Infinity, which Python accepts, are refused."""
    return json.loads(text, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")
