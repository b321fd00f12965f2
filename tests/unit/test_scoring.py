"""Exact match and the best constant answer."""

import pytest

from sft_dist.errors import DataError
from sft_dist.scoring import exact_match, score_by_template


def test_white_space_does_not_count_but_case_does() -> None:
    assert exact_match("  64\n mL/min ", "64 mL/min")
    assert not exact_match("64 ml/min", "64 mL/min")
    assert not exact_match("64mL/min", "64 mL/min")


def test_json_is_compared_as_values_only_when_asked() -> None:
    given, truth = '{"b": [1, 2], "a":5.0}', '{"a": 5, "b": [1, 2]}'
    assert exact_match(given, truth, as_json=True)
    assert not exact_match(given, truth)


@pytest.mark.parametrize(
    "given", ['{"a": [2, 1]}', '{"a": [true, 2]}', '{"a": ["1", 2]}', '{"a": [1, 2]', "NaN", "[" * 100_000, ""]
)
def test_other_or_broken_json_does_not_match(given: str) -> None:
    assert not exact_match(given, '{"a": [1, 2]}', as_json=True)


def test_a_truth_that_is_no_json_is_an_error() -> None:
    with pytest.raises(DataError, match="ground truth 'Normal' is not JSON"):
        exact_match("{}", "Normal", as_json=True)


def test_scores_are_kept_apart_by_template_beside_the_best_constant() -> None:
    templates = ["qa", "json", "qa", "qa", "json", "qa"]
    truths = ["yes", '{"a": 1, "b": 2}', "no", "no ", '{"b":2,"a":1}', "maybe"]
    predictions = ["yes", '{"b": 2, "a": 1}', "yes", "no", "{}", "maybe"]
    scores = score_by_template(templates, predictions, truths, json_templates={"json"})
    assert list(scores) == ["qa", "json"]
    qa, extraction = scores["qa"], scores["json"]
    assert (qa.num_examples, qa.exact_match, qa.constant_answer, qa.constant_exact_match) == (4, 0.75, "no", 0.5)
    assert (extraction.exact_match, extraction.constant_exact_match, extraction.gain) == (0.5, 1.0, -0.5)


def test_columns_of_different_length_are_refused() -> None:
    with pytest.raises(DataError, match="1 predictions against 2 truths of 2 examples"):
        score_by_template(["a", "a"], ["x"], ["x", "y"])


def test_nothing_to_score_gives_no_scores() -> None:
    assert score_by_template([], [], []) == {}
