"""Every metric against worked values, and against references of its own."""

import datetime
import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.errors import DataError
from sft_dist.evaluate_section import TaskSection
from sft_dist.scoring.choice import options_in, score_choice
from sft_dist.scoring.dates import dates_in, score_date
from sft_dist.scoring.json_fields import score_json
from sft_dist.scoring.metrics import score_answer
from sft_dist.scoring.numeric import quantities_in, score_numeric
from sft_dist.scoring.result import FieldCounts, words_of
from sft_dist.scoring.texts import score_exact, score_summary

# ---------------------------------------------------------------- which part of an answer


def test_thinking_is_no_part_of_an_answer() -> None:
    assert words_of("<think>A or B?</think>\n\nB") == "B"
    assert words_of("A or B?</think>B") == "B", "the opening may have been in the prompt"
    assert words_of("<think>A or") == "", "an answer that never came"
    assert words_of(" 5 ") == "5"


def test_white_space_does_not_count_but_case_does() -> None:
    assert score_exact("  64\n mL/min ", "64 mL/min").value == 1
    assert score_exact("64 ml/min", "64 mL/min").value == 0
    assert score_exact("64 ml/min", "64 mL/min", ignore_case=True).value == 1
    assert score_exact("64mL/min", "64 mL/min").value == 0
    assert score_exact("64 mg", "64 mL").why == "differs from character 5"


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("64 mL/min", ["64 mL/min"]),
        ("1,234.5 mg", ["1234.5 mg"]),
        ("1\u202f234 mg", ["1234 mg"]),
        ("22,9", ["22.9"]),
        ("-3.5 \u22123 +2", ["-3.5", "-3", "2"]),
        ("1.5 x 10^9/L or 1.5\u00d710\u2079/L", ["1.5e+09 /L", "1.5e+09 /L"]),
        ("1.5x10^9/L, 1.5\u00d710\u2079/L and 2x10**-3", ["1.5e+09 /L", "1.5e+09 /L", "0.002"]),
        ("1.5 x 10*9/L, 4.5 10*9/L, 4.5 10^9/L", ["1.5e+09 /L", "4.5e+09 /L", "4.5e+09 /L"]),
        ("1.5 x 109/L, 4 x 1012/L, 7 x 10 9/L", ["1.5e+09 /L", "4e+12 /L", "7e+09 /L"]),  # superscripts lost
        ("2 x 10-3 mol, 2 x 10\u207b\u00b3 mol", ["0.002 mol", "0.002 mol"]),
        ("2 x 100 mg, 5 x 1000 mL", ["2", "100 mg", "5", "1000 mL"]),  # doses, not powers of ten
        ("2 x 105 mg, 2 x 10-20 mg, 2 x 10 mg", ["2", "105 mg", "2", "10-20 mg", "2", "10 mg"]),
        ("5 * 10*3 mg", ["5", "10", "3 mg"]),
        ("3x daily", []),
        ("4-11 x 10^9/L, 50 to 1.2 x 10^2", ["4e+09-1.1e+10 /L", "50-120"]),
        ("5\n* 10^2\n* 10-5", ["5", "10", "2", "10", "5"]),  # bullets
        ("0.5 mg to 2 g, 500 mg-2 g", ["0.0005-2 g", "0.5-2 g"]),
        ("30 s to 45 min", ["0.5-45 min"]),
        ("5 mg to 2 mL, 5 g to 2 mg, 5 mg to 10", ["5 mg", "2 mL", "5 g", "2 mg", "5-10 mg"]),
        ("37 degrees Celsius, 98.6 Fahrenheit", ["37 degrees Celsius", "98.6 Fahrenheit"]),
        ("2.5e-3 g", ["0.0025 g"]),
        ("12%", ["12 %"]),
        ("8-10 mEq/L, 8 to 10, 8\u201310", ["8-10 mEq/L", "8-10", "8-10"]),
        ("75 mL/min/1.73 m2", ["75 mL/min/1.73 m2"]),
        ("8 mEq/L per 24 h.", ["8 mEq/L per 24 h"]),
        ("10 mm Hg", ["10 mm Hg"]),
        ("vitamin B12, A1c, 1.2.3 and 1,2,3", []),
        ("5 in the morning, 5 in.", ["5", "5 in"]),
        ("3 days, 4 pm", ["3 days", "4"]),
        ("__import__('os').getcwd()", []),
    ],
)
def test_numbers_are_found_with_their_units(text: str, numbers: list[str]) -> None:
    assert [str(quantity) for quantity in quantities_in(text)] == numbers


def test_a_decimal_comma_is_a_setting() -> None:
    assert [q.low for q in quantities_in("1.234,5 und 22,9", decimal="comma")] == [1234.5, 22.9]
    assert [q.low for q in quantities_in("1,234 and 22,9")] == [1234.0, 22.9]


@given(st.floats(-1e12, 1e12), st.sampled_from([" mg", "", " kg/m2", "%"]))
def test_whatever_is_written_is_read(value: float, unit: str) -> None:
    for text in (f"{value!r}{unit}", f"{value:,.3f}{unit}", f"the result is {value:.6e}{unit}."):
        (found,) = quantities_in(text)
        assert math.isclose(found.low, value, rel_tol=1e-5, abs_tol=1e-3)
        assert (found.unit is not None) == bool(unit)


@pytest.mark.parametrize(
    ("answer", "truth", "options"),
    [
        ("67", "64 mL/min", {"relative": 0.05}),  # 67.2 is 5% above
        ("60.8", "64 mL/min", {"relative": 0.05}),
        ("-1.04", "-1", {"relative": 0.05}),
        ("64.4", "64", {"absolute": 0.5}),
        ("70", "64", {"absolute": 10, "relative": 0.01}),
        ("3.84 L/h", "64 mL/min", {}),  # 64 * 60 / 1000
        ("154.3 lb", "70 kg", {"relative": 0.001}),
        ("5 ft", "152.4 cm", {}),
        ("98.6 F", "37 \u00b0C", {"absolute": 0.01}),
        ("98.6 degrees Fahrenheit", "37 Degrees Celsius", {"absolute": 0.01}),
        ("1 g", "500 mg to 2 g", {}),
        ("6.2x10^9/L", "4.0-11.0 x 10\u2079/L", {}),
        ("1500 mcg", "1.5 mg", {}),
        ("1.5 \u00b5g/kg/min", "0.0015 mg/kg/min", {}),
        ("60 bpm", "1 Hz", {}),
        ("100 mmHg", "13.33 kPa", {"relative": 0.001}),
        ("9 mEq/L", "8-10 mEq/L", {}),
        ("8.5 to 9", "8-10", {}),
        ("0.3", "0.30000000000000004", {}),
        ("Weight 80 kg. Answer: 64 mL/min, from 80 kg", "64 mL/min", {}),
        ("First 80 kg, so 64 mL/min", "64 mL/min", {}),
        ("64 mL/min, as it is 80 kg", "64 mL/min", {"take": "first"}),
        ("64", "64 mL/min", {}),
        ("64 whatever", "64 mL/min", {}),
    ],
)
def test_numbers_that_are_right(answer: str, truth: str, options: dict[str, object]) -> None:
    assert score_numeric(answer, truth, **options).value == 1, score_numeric(answer, truth, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("answer", "truth", "options", "why"),
    [
        ("67.3", "64 mL/min", {"relative": 0.05}, "+5.2%"),
        ("64.1", "64", {}, "64.1, expected 64"),
        ("64 mg", "64 mL/min", {"relative": 0.05}, "mg contradicts the unit mL/min"),
        ("75 mL/min", "75 mL/min/1.73 m2", {}, "contradicts"),
        ("5 mmol/L", "5 mg/dL", {}, "contradicts"),
        ("64", "64 mL/min", {"unit_required": True}, "without the unit"),
        ("60-70", "64", {"relative": 0.1}, "the range 60-70"),
        ("7-9", "8-10", {}, ""),
        ("none", "64", {}, "no number"),
        ("64 * 1", "64", {}, "1, expected 64"),  # parsed, not evaluated: the last number
        ("2 x 100 mg", "200 mg", {}, "100 mg, expected 200 mg"),
        ("0.1 g", "0.5 mg to 2 mg", {}, "100 mg"),
    ],
)
def test_numbers_that_are_wrong(answer: str, truth: str, options: dict[str, object], why: str) -> None:
    score = score_numeric(answer, truth, **options)  # type: ignore[arg-type]
    assert score.value == 0
    assert why in score.why


@given(st.floats(0.01, 1e6), st.floats(0, 0.2), st.floats(-0.4, 0.4))
def test_a_relative_tolerance_is_a_share_of_the_truth(truth: float, relative: float, off: float) -> None:
    answer = truth * (1 + off)
    if abs(abs(off) - relative) > 1e-6:  # at the edge rounding decides
        assert score_numeric(repr(answer), repr(truth), relative=relative).value == (abs(off) < relative)


# ---------------------------------------------------------------- choices

PROMPT = "Which diagnosis?\nA. Pneumonia\nB. Pulmonary embolism\nC. Myocardial infarction\nAnswer:"


def test_options_are_read_from_the_prompt() -> None:
    assert options_in(PROMPT) == {"A": "Pneumonia", "B": "Pulmonary embolism", "C": "Myocardial infarction"}
    assert options_in("(A) yes\n(B) no") == {"A": "yes", "B": "no"}


@pytest.mark.parametrize(
    "answer",
    ["B", "(B)", "b)", "B.", "[B]", "**B**", "B. Pulmonary embolism", "B) aspirin", "Answer: B", "B - it is common",
     "The answer is B.", "I think it is option (B).", "pulmonary embolism", "A pulmonary embolism is likely",
     "Not A; the answer is B", "It is not pneumonia.\nAnswer: b", "<think>A. or C.</think>B"],
)  # fmt: skip
def test_a_choice_in_many_forms(answer: str) -> None:
    assert score_choice(answer, "B. Pulmonary embolism", prompt=PROMPT).value == 1


@pytest.mark.parametrize("answer", ["A", "C. Myocardial infarction", "A or B", "B and C", "D", "", "Pneumonia"])
def test_another_choice_several_or_none_are_wrong(answer: str) -> None:
    assert score_choice(answer, "B. Pulmonary embolism", prompt=PROMPT).value == 0


@pytest.mark.parametrize(
    "answer",
    ["A, C", "A; C", "A) or C)", "A\nC", "A/C", "A & C", "(A), (C)", "A - C", "**A** and **C**", "a, c", "A. C.",
     "A.\n\nC.", "A, B and C", "A, B or C is right", "A, C are both right", "A) Pneumonia, C) Myocardial infarction",
     "A. Pneumonia\nC. Myocardial infarction", "Answer: A, C", "The answer is A or C.", "The answer is A, C",
     "I would say A/C", "A (lungs) or C (heart)", "Pneumonia or myocardial infarction"],
)  # fmt: skip
def test_a_list_of_options_chooses_none(answer: str) -> None:
    for truth in ("A", "C"):
        score = score_choice(answer, truth, prompt=PROMPT)
        assert (score.value, score.is_valid, score.why) == (0, False, "no single choice")


@pytest.mark.parametrize(
    "answer",
    ["A. Because C is wrong.", "A. C is wrong.", "A; C is too late", "A\nC is wrong", "A. B and C are less likely.",
     "A\n\nB: too late\nC: no pain", "A. Pneumonia\n\nB. Pulmonary embolism is less likely", "A) a lung disease",
     "A, a lung disease, and so not B", "A. Pneumonia. C-reactive protein is high", "A: C-reactive protein is high",
     "A, Z", "A, A", "The answer is A. C is wrong.", "The answer is A, as B would begin at once",
     "A - B is rare in the young", "A, C\nAnswer: A"],
)  # fmt: skip
def test_prose_behind_a_choice_is_no_list(answer: str) -> None:
    assert score_choice(answer, "A", prompt=PROMPT).value == 1


@pytest.mark.parametrize(
    ("answer", "letter"),
    [("Aspirin and clopidogrel", "B"), ("It is aspirin and clopidogrel.", "B"), ("B", "B"), ("aspirin", "A"),
     ("Give aspirin", "A"), ("Aspirin, not aspirin and clopidogrel", None), ("Vitamin B", "C"), ("D. B", "D"),
     ("E. coli", "E"), ("D. B, A", None), ("Answer: vitamin b.", "C")],
)  # fmt: skip
def test_an_options_text_may_hold_another_ones_or_a_letter(answer: str, letter: str | None) -> None:
    prompt = "Which?\nA) Aspirin\nB) Aspirin and clopidogrel\nC) Vitamin B\nD) B\nE) E. coli"
    for truth in options_in(prompt):
        assert score_choice(answer, truth, prompt=prompt).value == (truth == letter)
    if letter is not None:
        assert score_choice(letter, answer, prompt=prompt).value == 1, "as a truth it is the same option"


def test_options_that_differ_in_signs_alone_are_not_told_apart_by_their_words() -> None:
    assert not score_choice("It is >5 mg", "B", prompt="Which?\nA) <5 mg\nB) >5 mg").is_valid


def test_a_truth_that_lists_options_is_compared_as_words() -> None:
    assert score_choice("A; C", "A, C", prompt=PROMPT).value == 1
    assert score_choice("A", "A, C", prompt=PROMPT).value == 0


def test_a_label_without_options_is_compared_as_text() -> None:
    assert score_choice("Stage 2 hypertension.", "stage 2 hypertension", prompt="Which stage?").value == 1
    assert score_choice("Stage 1 hypertension", "stage 2 hypertension", prompt="Which stage?").value == 0
    assert score_choice("vitamin d deficiency", "Vitamin D deficiency", prompt="Which?").value == 1
    assert score_choice("Hepatitis D", "Hepatitis B", prompt="Which?").value == 0, "a letter in a name is no choice"
    assert score_choice("C", "Myocardial infarction", prompt=PROMPT).value == 1


# ---------------------------------------------------------------- dates


@pytest.mark.parametrize(
    "text",
    ["2024-03-12", "2024/3/12", "12 March 2024", "12th of Mar., 2024", "March 12, 2024", "on 03/12/2024.",
     "2024-03-12T10:00:00Z", "mar 12 2024"],
)  # fmt: skip
def test_dates_in_many_forms(text: str) -> None:
    assert dates_in(text) == [datetime.date(2024, 3, 12)]


@given(st.dates(datetime.date(1900, 1, 1), datetime.date(2099, 12, 31)))
def test_a_date_is_read_back_in_every_form(day: datetime.date) -> None:
    forms = ["%Y-%m-%d", "%d %B %Y", "%B %d, %Y", "%d %b %Y", "%m/%d/%Y"]
    assert [dates_in(day.strftime(form)) for form in forms] == [[day]] * 5
    assert dates_in(day.strftime("%d.%m.%Y"), day_first=True) == [day]


def test_day_and_month_are_never_guessed() -> None:
    assert score_date("12/03/2024", "2024-03-12").value == 0
    assert score_date("12/03/2024", "2024-03-12", day_first=True).value == 1
    assert dates_in("13/25/2024, 31 April 2024, 3/4/24") == []
    assert not score_date("soon", "2024-03-12").is_valid
    assert score_date("From 1 May 2024.\nAnswer: 2 May 2024 to 3 May 2024", "2024-05-02").value == 1


# ---------------------------------------------------------------- JSON


def test_fields_are_counted_one_by_one() -> None:
    truth = {"age": 58, "sex": "female", "drugs": ["metformin", "amlodipine"], "bp": {"sys": 120}}
    answer = {"age": 58.0, "sex": "Female ", "drugs": ["amlodipine", "aspirin"], "bp": {"sys": "120"}}
    score = score_json(f"```json\n{json.dumps(answer)}\n```", json.dumps(truth))
    assert score.fields == FieldCounts(right=3, given=5, expected=5)  # age, sex, amlodipine
    assert score.value == pytest.approx(3 / 5)
    assert "wrong" in score.why
    assert score_json('{"sex": "Female"}', '{"sex": "female"}', ignore_case=False).value == 0


@pytest.mark.parametrize("answer", ['{"a": [1, 2]', "NaN", "[" * 100_000, "", 'here: {"a": 1}', '{"a": NaN}'])
def test_what_is_no_json_scores_nothing_and_is_counted(answer: str) -> None:
    score = score_json(answer, '{"a": [1, 2]}')
    assert (score.value, score.is_valid, score.fields) == (0, False, FieldCounts(0, 0, 2))


@pytest.mark.parametrize("answer", ['{"a": [true, 2]}', '{"a": ["1", 2]}', '{"a": [1, 2, 2]}', '{"b": [1, 2]}'])
def test_other_types_counts_and_keys_are_other_fields(answer: str) -> None:
    assert score_json(answer, '{"a": [1, 2]}').value < 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(JSON, st.randoms())
def test_json_is_itself_in_any_order(value: object, rng: random.Random) -> None:
    def shuffled(value: object) -> object:
        if isinstance(value, dict):
            items = [(key, shuffled(inner)) for key, inner in value.items()]
            rng.shuffle(items)
            return dict(items)
        return value

    assert score_json(json.dumps(shuffled(value)), json.dumps(value)).value == 1


# ---------------------------------------------------------------- summaries


def longest_common(a: list[str], b: list[str]) -> int:
    """Of two sequences, in the obvious way."""
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return 1 + longest_common(a[:-1], b[:-1])
    return max(longest_common(a[:-1], b), longest_common(a, b[:-1]))


@given(st.lists(st.sampled_from("abc"), max_size=6), st.lists(st.sampled_from("abc"), min_size=1, max_size=6))
def test_rouge_l_is_the_longest_common_subsequence(answer: list[str], truth: list[str]) -> None:
    common = longest_common(answer, truth)
    expected = 2 * common / (len(answer) + len(truth))
    assert score_summary(" ".join(answer), " ".join(truth)).value == pytest.approx(expected)


def test_summaries_are_compared_in_any_script() -> None:
    assert score_summary("Пациент выписан.", "пациент Выписан").value == 1
    assert score_summary("<think>a b</think>c", "a b").value == 0


# ---------------------------------------------------------------- by task


@pytest.mark.parametrize(
    ("metric", "truth", "reason"),
    [("json", "Normal", "is no JSON"), ("numeric", "high", "has no number"), ("date", "5", "has no date"),
     ("summary", "...", "has no word"), ("choice", " ", "is empty")],
)  # fmt: skip
def test_a_truth_that_its_metric_cannot_compare_is_an_error(metric: str, truth: str, reason: str) -> None:
    task = TaskSection(metric=metric)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=rf"d\.jsonl:3: the ground truth {truth!r} {reason}, and the task 'x'"):
        score_answer("1", truth, task, prompt="", name="x", where="d.jsonl:3")


def test_settings_of_a_task_reach_its_metric() -> None:
    def score(answer: str, truth: str, **options: object) -> float:
        return score_answer(answer, truth, TaskSection(**options), prompt=PROMPT, name="x", where="").value  # type: ignore[arg-type]

    assert score("67", "64", metric="numeric", relative=0.05) == 1
    assert score("64", "64 mg", metric="numeric", unit="required") == 0
    assert score("1.000", "1000", metric="numeric", decimal="comma") == 1
    assert score("= 5 of 6", "= 5", metric="numeric", marker="=") == 1
    assert score("5 of 6", "5", metric="numeric", take="first") == 1
    assert score("12/03/2024", "2024-03-12", metric="date", day_first=True) == 1
    assert score("B", "B. Pulmonary embolism", metric="choice") == 1
    assert score("A", "a", metric="exact", ignore_case=True) == 1
    assert score('"A"', '"a"', metric="json") == 1
    assert score("a b", "a c", metric="summary") == 0.5
