"""Each lint rule finds what it is for, leaves its near misses alone, and the report says it to people and machines."""

import io
import json
import random
import re
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from rich.console import Console

from sft_dist.cli import main
from sft_dist.config import Source
from sft_dist.data.conversation import Conversation, Message, Origin, ToolCall, prompt_hash
from sft_dist.data.draws import hold_out
from sft_dist.data.lint import SEVERITIES, LintReport, lint
from sft_dist.data.lint_near import NearDuplicates, shingles
from sft_dist.data.lint_report import print_report, to_json
from sft_dist.data.lint_row import RULES as ROW_RULES
from sft_dist.data.lint_row import lint_conversation
from sft_dist.data.lint_set import RULES as SET_RULES
from sft_dist.data.lint_table import features, how_cut
from sft_dist.data.lint_text import answer_given, has_trailing_cue, language, response_shape, skeleton
from sft_dist.data.shown import safe
from sft_dist.demo.dataset import generate_examples, messages_row
from sft_dist.errors import ConfigError, DataError

DOCS = Path(__file__).parents[2] / "docs" / "lint.md"
REPEATED = "a long text of many words, and then of many more, which is longer than a name or an option"
SYSTEM = "You are a clinical calculator. Return only the number with its unit."
WORDS = [f"{start}{end}" for start in "ba ce di fo gu ha je ki lo mu".split() for end in "rn st lm nd pt ck".split()]


def chat(*turns: tuple[str, str]) -> Conversation:
    return Conversation(
        tuple(Message(role, text, train=role == "assistant") for role, text in turns), Origin("data.jsonl", 1)
    )


def asked(prompt: str, response: str) -> Conversation:
    return chat(("user", prompt), ("assistant", response))


def row(prompt: str, response: str, *, system: str | None = SYSTEM) -> dict[str, Any]:
    turns = [("system", system)] if system else []
    turns += [("user", prompt), ("assistant", response)]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def rules_of(conversation: Conversation) -> list[str]:
    return [finding.rule for finding in lint_conversation(conversation)]


def linted(
    path: Path, rows: Iterable[object], *, held_out: Iterable[object] = (), keep: int = 100, **settings: Any
) -> LintReport:
    def written(name: str, rows: list[object]) -> list[Source]:
        file = path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [Source(path=str(file))] if rows else []

    return lint(written("data.jsonl", list(rows)), written("held_out.jsonl", list(held_out)), keep=keep, **settings)


def lines(report: LintReport, rule: str) -> list[int]:
    """The lines that a rule names."""
    found = report.results[rule].first if rule in report.results else []
    return [finding.origin.line for finding in found if finding.origin]


def sentence(rng: random.Random, num_words: int) -> str:
    return " ".join(rng.choices(WORDS, k=num_words)).capitalize() + "."


def plain_rows(num: int, *, seed: int = 0, num_words: int = 30) -> list[dict[str, Any]]:
    """Rows in which there is nothing to find."""
    rng = random.Random(seed)
    return [row(sentence(rng, 12) + "\nAnswer:", sentence(rng, num_words)) for _ in range(num)]


# ---------------------------------------------------------------- one conversation


FOUND = [
    ("system_not_first", chat(("user", "a"), ("system", "late"), ("assistant", "b"))),
    ("answer_in_prompt", asked("Weight 70 kg.\nAnswer: 64 mL/min", "64 mL/min")),
    ("answer_in_prompt", asked("Weight 70 kg.\nAnswer: 64 mL/min\nAnswer:", "64 mL/min")),
    ("answer_in_prompt", asked("Which one is it? Answer: B", "B")),
    ("response_is_prompt", asked("Say it again and again.", "Say it again and again.")),
    ("response_is_prompt", asked(f"Tidy up: {REPEATED}", REPEATED)),
    ("role_order", chat(("user", "a"), ("user", "b"), ("assistant", "c"))),
    ("role_order", chat(("user", "a"), ("assistant", "b"), ("assistant", "c"))),
    ("role_order", chat(("system", "s"), ("assistant", "b"), ("user", "a"), ("assistant", "c"))),
    ("role_order", chat(("user", "a"), ("assistant", "b"), ("user", "c"))),
    ("role_order", chat(("user", "a"), ("tool", "result"), ("assistant", "c"))),
    ("forged_control_token", asked("a<|im_end|>", "b")),
    ("forged_control_token", asked("a", "<start_of_turn>b")),
    ("forged_control_token", asked("[INST] a [/INST]", "b")),
    ("forged_control_token", asked("a", "b</s>")),
    ("forged_control_token", asked("<s>a", "<s>b</s>")),
    ("forged_control_token", asked("a", "<s>[INST] b</s>")),
    ("forged_control_token", asked("a", "`x` <eos> `y`")),
    ("invisible_characters", asked("\u200e", "b")),
    ("invisible_characters", asked("zero\u200bwidth", "b")),
    ("invisible_characters", asked("a", "\u202eb")),
    ("invisible_characters", asked("soft\u00adhyphen", "b")),
    ("invisible_characters", asked("broken \ufffd", "b")),
    ("invisible_characters", asked("cafÃ© and crÃ¨me", "b")),
    ("invisible_characters", asked("itâ€™s", "b")),
    ("padded_response", asked("a", "b\n")),
    ("mixed_languages", chat(("system", "Answer briefly."), ("user", "什么是发烧"), ("assistant", "体温升高"))),
    ("mixed_languages", asked("Что такое лихорадка?", "A rise of body temperature.")),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "conversation"), FOUND)
def test_a_row_with_one_fault_has_that_finding_and_no_other(rule: str, conversation: Conversation) -> None:
    assert set(rules_of(conversation)) == {rule}


FINE = [
    asked("What is 2 + 2?\nAnswer:", "4"),
    asked("Answer: B is wrong, why?\nA. x\nB. y\nAnswer:", "B"),
    asked("Q: one?\nAnswer: yes\n\nQ: two?\nAnswer:", "yes"),  # an example's short answer may be this one's too
    asked("Pick one.\nA. Pneumonia\nB. Pulmonary embolism", "B. Pulmonary embolism"),
    asked(f"Pick one.\nA. Pneumonia\nB. {REPEATED}", REPEATED),
    asked("Is the patient well? The note says yes", "yes"),
    asked("Repeat: cat", "cat"),
    asked("Write 5 < 6 and a<b>c</b>, <sup>2</sup> and x|y", "array[INSTANCE] <string> | <s3>"),
    asked("It was <s>free</s> of charge", "<s>ten</s> <s>nine</s> eight"),
    asked("What is `<eos>`?", "It ends a text, as in\n```\n<bos>text<eos>\n```"),
    asked("\u200eשלום\u200e abc\u200f", "שלום"),
    asked("Grüße an São Paulo, NÃO, Â, 20 °C, naïve “quoted” – €5", "Überraschung, bien sûr"),
    asked("family 👩‍👩‍👧 and क्‍ष and می‌خواهم", "ok 👍🏽"),  # joiners that belong to the spelling
    chat(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
    asked("Add 2 µg and 3 µg, then 5 ≥ 4", "5 µg"),
]


@pytest.mark.parametrize("conversation", FINE)
def test_a_near_miss_is_no_finding(conversation: Conversation) -> None:
    assert rules_of(conversation) == []


def test_a_long_answer_among_the_examples_of_a_prompt_is_found() -> None:
    answer = "Correct at no more than eight millimoles per litre a day, and check every two hours."
    assert rules_of(asked(f"Q: one?\nAnswer: {answer}\n\nQ: two?\nAnswer:", answer)) == ["answer_in_prompt"]


def test_tool_results_follow_their_calls() -> None:
    call = Message("assistant", "", train=True, tool_calls=(ToolCall("now", {}), ToolCall("where", {})))
    results, answer = (Message("tool", "noon"), Message("tool", "Oslo")), Message("assistant", "Noon.", train=True)
    turns = (Message("user", "time?"), call, *results, answer)
    assert rules_of(Conversation(turns, Origin("data.jsonl", 1))) == []


def test_reasoning_is_looked_at_too() -> None:
    answer = Message("assistant", "b", train=True, reasoning="so <|im_end|>")
    assert rules_of(Conversation((Message("user", "a"), answer), Origin("x", 1))) == ["forged_control_token"]


# ---------------------------------------------------------------- what is read off a text


@pytest.mark.parametrize(
    ("response", "shape"),
    [
        ('{"age": 58}', "json"),
        ("[1, 2]", "json"),
        ("{not json}", "prose"),
        ("B", "choice letter"),
        ("(c)", "choice letter"),
        ("B. Pulmonary embolism", "choice letter"),
        ("A dog barks.", "prose"),
        ("I", "choice letter"),
        ("64 mL/min", "number"),
        ("36 mL/min/1.73 m2", "number"),
        ("-1,200.5", "number"),
        ("$5", "number"),
        ("22.9%", "number"),
        ("5 apples were eaten by the two of them.", "prose"),
        ("Metformin", "prose"),
    ],
)
def test_answer_shapes(response: str, shape: str) -> None:
    assert response_shape(response) == shape


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("What?\nAnswer:", True),
        ("Note.\n\nSummary: ", True),
        ("### Instruction:\nDo.\n\n### Response:", True),
        ("What is it? Answer:", True),
        ("质问。\n答案：", True),
        ("Text\nDiagnosis:", True),
        ("Rewrite the following sentence:", False),
        ("What?", False),
        ("Answer: B", False),
        ("Answer: B\n## **Final answer:", True),
        ("Answer:** \nAnswer:", True),
        ("This is the answer:", False),
        ("Fill in.\nThe name of the first president of the country was:", False),
    ],
)
def test_trailing_cues(prompt: str, expected: bool) -> None:
    assert has_trailing_cue(prompt) is expected


def test_an_open_cue_gives_nothing_away() -> None:
    assert answer_given("Question: x\nAnswer:") == ""
    assert answer_given("no cue") == ""
    assert answer_given("Answer: 4\nAnswer:") == "4"
    assert answer_given("**Answer:** **B**\n\n**Answer:") == "**B**"
    assert answer_given("Answer:  \nAnswer: B") == "B"
    assert answer_given("Answer: 1\nAnswer:\nAnswer:") == ""


def test_a_skeleton_is_what_prompts_of_one_template_share() -> None:
    one, other = (
        "Patient: 70 kg, 1.2 mg/dL.\nCompute the BMI of 5.\n",
        "Patient: a man of 80.\nCompute the BMI of 61.\n",
    )
    assert (
        skeleton(one + "A. x\nAnswer:")
        == skeleton(other + "A. y\nAnswer:")
        == "patient:\ncompute the bmi of #.\noption\nanswer:"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What is the treatment of this disease and how is it given to you?", "English"),
        ("Was ist die Behandlung, und wie wird sie mit dem Patienten besprochen?", "German"),
        ("Quel est le traitement de la maladie et que faire avec les patients?", "French"),
        ("¿Cuál es el tratamiento de la enfermedad y cómo se administra con los niños?", "Spanish"),
        ("Qual è il trattamento della malattia e come si usa nel paziente?", "Italian"),
        ("Qual é o tratamento da doença e como se faz em uma criança?", "Portuguese"),
        ("什么是发烧 A", "CJK"),
        ("Что это?", "Cyrillic"),
        ("BMI 22.9 kg/m2", "unknown"),
        ("the of and is it, der die und ist nicht", "unknown"),
        ("123", "unknown"),
    ],
)
def test_languages(text: str, expected: str) -> None:
    assert language(text) == expected


LONG = "This is a sentence of a response, which goes on and on without an end in sight. " * 4


@pytest.mark.parametrize(
    ("response", "is_cut"),
    [
        (LONG + "It serves as a reminder of the importance of", True),
        (LONG + "and so the last sentence, which has many words too, breaks off in the mid", True),
        (LONG + "and so the last sentence, which has many words too, has a list (one, two,", True),
        (LONG, False),
        (LONG + "\nSincerely yours,\nJohn", False),
        (LONG + "\n10. Acknowledgments and the names of everybody who has ever helped us with the book", False),
        (LONG + "Read on at https://example.org/a/long/path/of/a/page/that/explains/all/of/it", False),
        ("Short and without a full stop", False),
        ("```python\nprint(1)\n", True),
        ("```python\nprint(1)\n```", False),
        ("Here is code: ```c\nint x;\n```", False),
        ("Here is code: ```c int x;\nint y;\n```\nDone.", False),
        ("Here is code: ```c\nint x;", True),
        ("One.\n```\n1\n```\nTwo.\n```js", True),
        ("````md\n```py\n1\n```\n````", False),
        ("Wrap it in ``` if you can.", False),
        ("Wrap it in ``` like this:\n```\n1\n```", False),
        ('{"age": 58, "conditions": ["a"', True),
        ('{"age": 58, "brace": "{"}', False),
        ("[see the note", False),
    ],
)
def test_cut_responses(response: str, is_cut: bool) -> None:
    assert bool(how_cut(response)) is is_cut


# ---------------------------------------------------------------- the data set


def test_plain_data_is_clean(tmp_path: Path) -> None:
    report = linted(tmp_path, plain_rows(300), held_out=plain_rows(50, seed=1))
    assert report.results == {}
    assert (report.verdict, report.rows, report.held_out_rows) == ("clean", 300, 50)


def test_six_templates_with_a_system_prompt_each_give_notes_only(tmp_path: Path) -> None:
    """The six differ in cue, answer shape and length, each announced by its system prompt."""
    rows = {json.dumps(messages_row(example)): None for example in generate_examples(1200, 0, "train")}
    held_out = {json.dumps(messages_row(example)): None for example in generate_examples(200, 0, "held_out")}
    report = linted(tmp_path, map(json.loads, rows), held_out=map(json.loads, held_out))
    assert report.verdict == "clean", report.results
    assert set(report.results) == {"system_differs", "answer_shapes"}
    assert report.results["system_differs"].first[0].detail == "6 different system prompts"
    assert "json" in report.results["answer_shapes"].first[0].detail


HOSTILE = [
    *(
        " ",
        "\n",
        "\t",
        "#",
        "\n# ",
        "*",
        "* ",
        "1",
        "1 ",
        "1.",
        '"',
        '"a',
        "“",
        "“a",
        "`",
        "`a",
        "```",
        "```a ",
        "```\n",
    ),
    *("[", "[ ", "{", '{"', "(", ":", "\nx:\n", "a", "a ", "\na ", "answer", "answer ", "answer:", "\nAnswer:", "the "),
    *("the\n", ". #", "\nA.", "\n(A) ", "<", "<|a", "<s>", "<s>a", "</s>", "<｜a", "\u200e", "\u200d", "\ufffd", "Ã"),
]


@pytest.mark.parametrize("unit", HOSTILE)
def test_no_text_takes_long(unit: str) -> None:
    """All rules over one row, and all that is kept of it, take far less than the bounds.

    The short texts come first: what takes the square of the length fails there, and not after minutes.
    """
    for num_chars, bound_s in ((10_000, 1), (100_000, 5)):
        started = time.process_time()
        for start, end in (("Text:\n", ""), ("Text:\n", ":"), ("A. ", "\nx"), ("the ", "\nA.\n")):
            text = start + (unit * num_chars)[:num_chars] + end
            for conversation in (asked(text, text), asked(text + REPEATED, REPEATED), asked("a", text)):
                list(lint_conversation(conversation))
                features(conversation)
                assert time.process_time() - started < bound_s
            shingles(text)
        assert time.process_time() - started < bound_s


def test_a_word_is_missing_from_a_turn_of_whatever_format(tmp_path: Path) -> None:
    file = tmp_path / "d.csv"
    file.write_text("instruction,output\nWhy?,So.\n ,So.\nWho?, \n")
    report = lint([Source(path=str(file))])
    assert lines(report, "empty_turn") == [3, 4]
    assert "(user) is empty" in report.results["empty_turn"].first[0].detail
    rows = [{"prompt": "a", "completion": "\n\u2003"}, {"prompt": "a", "completion": "b"}]
    assert lines(linted(tmp_path, rows), "empty_turn") == [1]
    calling = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "now", "arguments": {}}}]}
    turns = [{"role": "user", "content": "a"}, calling, {"role": "tool", "content": ""}]
    assert "empty_turn" not in linted(tmp_path, [{"messages": turns}]).results


def test_rows_are_read_by_the_settings_of_the_recipe(tmp_path: Path) -> None:
    """What preparation refuses because of data.turns or data.order is bad here; nothing sorts held-out rows."""
    rows = [row | {"meta": {"level": index}} for index, row in enumerate(plain_rows(4))]
    del rows[2]["meta"]["level"]
    rows[3]["messages"] += [
        {"role": "user", "content": "Go on."},
        {"role": "assistant", "content": "No.", "train": False},
    ]
    held_out = plain_rows(2, seed=1)
    assert linted(tmp_path, rows, held_out=held_out).results == {}
    report = linted(tmp_path, rows, held_out=held_out, turns="last", difficulty_field="meta.level")
    assert lines(report, "bad_row") == [3, 4]
    assert "meta.level" in report.results["bad_row"].first[0].detail
    assert "data.turns is last" in report.results["bad_row"].first[1].detail


def test_the_field_that_sorts_is_read_from_parquet_too(tmp_path: Path) -> None:
    file = tmp_path / "d.parquet"
    pa.parquet.write_table(pa.Table.from_pylist([row | {"level": 2} for row in plain_rows(3)]), file)
    assert lint([Source(path=str(file))], difficulty_field="level").results == {}


def test_bad_rows_and_empty_turns_carry_their_reason(tmp_path: Path) -> None:
    rows = [*plain_rows(3), {"messages": [{"role": "user", "content": "a"}]}, row("a", " ")]
    report = linted(tmp_path, rows, held_out=[*plain_rows(2, seed=1), {"messages": 3}])
    assert lines(report, "bad_row") == [4, 3]
    assert "no assistant turn" in report.results["bad_row"].first[0].detail
    assert lines(report, "empty_turn") == [5]
    assert report.rows == 5
    assert report.verdict == "not fit to train on: 3 errors in 2 rules over 5 rows"


def test_rows_without_the_usual_system_prompt_are_named(tmp_path: Path) -> None:
    rows = plain_rows(10)
    rows[4]["messages"] = rows[4]["messages"][1:]
    report = linted(tmp_path, rows)
    assert lines(report, "system_missing") == [5]
    assert report.verdict == "1 warning in 1 rule over 10 rows"


def test_data_without_any_system_prompt_is_a_note(tmp_path: Path) -> None:
    report = linted(tmp_path, [row("Why?", "So.", system=None), row("Who?", "Me.", system=None)])
    assert set(report.results) == {"no_system"}
    assert report.is_clean


def test_system_prompts_that_differ_in_punctuation_are_a_warning_with_both_lines(tmp_path: Path) -> None:
    rows = plain_rows(10)
    rows[3]["messages"][0]["content"] = SYSTEM.upper().replace(".", " .")
    rows[6]["messages"][0]["content"] = "Something else."
    report = linted(tmp_path, rows)
    assert lines(report, "system_variant") == [4]
    assert "data.jsonl:1)" in report.results["system_variant"].first[0].detail
    assert report.results["system_differs"].first[0].detail == "3 different system prompts"


@pytest.mark.parametrize(
    ("num_cues", "expected"), [(0, []), (1, []), (8, [*range(1, 9)]), (33, [*range(34, 41)]), (40, [])]
)
def test_the_fewer_with_or_without_a_cue_are_named(tmp_path: Path, num_cues: int, expected: list[int]) -> None:
    rng = random.Random(0)
    rows = [row(sentence(rng, 9) + "\nAnswer:" * (i < num_cues), sentence(rng, 9)) for i in range(40)]
    assert lines(linted(tmp_path, rows), "no_trailing_cue") == expected


def test_a_cue_that_goes_with_the_system_prompt_is_consistent(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [
        row(sentence(rng, 9) + "\nAnswer:" * (i % 2), sentence(rng, 9), system=("Summarise.", "Calculate.")[i % 2])
        for i in range(40)
    ]
    assert lines(linted(tmp_path, rows), "no_trailing_cue") == []


def test_an_answer_of_another_shape_than_its_template_is_named(tmp_path: Path) -> None:
    answers = ['{"age": %d}' % i for i in range(40)]  # noqa: UP031, braces
    answers[7] = "The patient is 7 years old."
    rows = [row(f"Note: aged {i}.\nOutput:", answer) for i, answer in enumerate(answers)]
    report = linted(tmp_path, rows)
    assert lines(report, "mixed_formats") == [8]
    assert "prose where 97.5% of 40 prompts" in report.results["mixed_formats"].first[0].detail
    assert report.results["answer_shapes"].first[0].detail == "json 97.5%, prose 2.5%"


def test_a_number_among_answers_in_words_is_no_finding(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [row(f"Question: {sentence(rng, 9)}\nAnswer:", "42" if i == 3 else sentence(rng, 9)) for i in range(40)]
    assert "mixed_formats" not in linted(tmp_path, rows).results


def test_duplicates_and_conflicting_answers_name_the_first_row(tmp_path: Path) -> None:
    rows = [
        *plain_rows(5),
        row("Sodium 118?\nAnswer:", "8 mEq/L"),
        row("sodium  118?\nANSWER:", "8 mEq/l"),
        row("Sodium 118?\nAnswer:", "10 mEq/L"),
        row("First drug?\nAnswer:", "Metformin"),
        row("First drug?\nAnswer:", "Insulin"),
        row("How are you?\nAnswer:", "I am very well today, thank you."),
        row("How are you?\nAnswer:", "Thank you, all is well with me."),
        row("Sodium 118?\nAnswer:", "10 mEq/L", system="Another task."),
    ]
    report = linted(tmp_path, rows)
    assert lines(report, "duplicate") == [7]
    rows[-1]["tools"] = [{"type": "function", "function": {"name": "now"}}]
    rows[-1]["messages"][0]["content"] = SYSTEM  # other tools may answer otherwise too
    assert linted(tmp_path, rows).results.keys() == report.results.keys() - {"system_differs"}
    assert lines(report, "duplicate_prompt_different_answer") == [8, 10]
    assert (
        report.results["duplicate_prompt_different_answer"]
        .first[0]
        .detail.startswith(f"the prompt of {tmp_path}/data.jsonl:6 ")
    )
    assert lines(report, "reworded_answer") == [12]
    assert lines(report, "near_duplicate") == []


def test_length_outliers_stand_out_of_many_rows_only(tmp_path: Path) -> None:
    rng = random.Random(3)
    long = row(sentence(rng, 10) + "\nAnswer:", sentence(rng, 3000))
    assert lines(linted(tmp_path, [*plain_rows(60), long]), "length_outlier") == [61]
    assert lines(linted(tmp_path, [*plain_rows(10), long]), "length_outlier") == []
    short = row(sentence(rng, 10) + "\nAnswer:", sentence(rng, 120))
    assert lines(linted(tmp_path, [*plain_rows(60, num_words=1), short]), "length_outlier") == []


def test_the_longest_of_several_responses_counts(tmp_path: Path) -> None:
    rng = random.Random(3)
    long = row(sentence(rng, 10) + "\nAnswer:", sentence(rng, 20))
    middle = [{"role": "assistant", "content": sentence(rng, 20)}, {"role": "user", "content": sentence(rng, 9)}]
    long["messages"][2:2] = [{"role": "assistant", "content": sentence(rng, 3000)}, {"role": "user", "content": "Why?"}]
    long["messages"][2:2] = middle
    report = linted(tmp_path, [*plain_rows(60), long])
    assert "a response of" in " ".join(finding.detail for finding in report.results["length_outlier"].first)


def test_a_row_with_two_outlying_lengths_is_named_once(tmp_path: Path) -> None:
    rng = random.Random(3)
    report = linted(tmp_path, [*plain_rows(60), row(sentence(rng, 3000) + "\nAnswer:", sentence(rng, 3000))])
    assert lines(report, "length_outlier") == [61]
    detail = report.results["length_outlier"].first[0].detail
    assert "a prompt of" in detail
    assert "a response of" in detail


def test_at_most_twenty_outliers_are_listed_the_longest_first(tmp_path: Path) -> None:
    rng = random.Random(3)
    rows = plain_rows(200) + [row(sentence(rng, 10) + "\nAnswer:", sentence(rng, 3000 + 10 * i)) for i in range(25)]
    found = lines(linted(tmp_path, rows), "length_outlier")
    assert len(found) == 20
    assert found[0] >= 220


def test_cut_answers_are_told_from_data_that_never_ends_in_punctuation(tmp_path: Path) -> None:
    rows = plain_rows(30, num_words=80)
    rows[11]["messages"][2]["content"] = rows[11]["messages"][2]["content"][:-1]
    assert lines(linted(tmp_path, rows), "cut_answer") == [12]
    for each in rows[:15]:
        each["messages"][2]["content"] = each["messages"][2]["content"].rstrip(".")
    assert lines(linted(tmp_path, rows), "cut_answer") == []


def test_responses_cut_at_one_length_are_found(tmp_path: Path) -> None:
    rows = plain_rows(30, num_words=60)
    rng = random.Random(9)
    for each in rows[20:24]:
        each["messages"][2]["content"] = sentence(rng, 200)[:600].strip().ljust(600, "x")
    report = linted(tmp_path, rows)
    assert lines(report, "cut_answer") == [21, 22, 23, 24]
    assert "exactly 600 characters" in report.results["cut_answer"].first[0].detail


def test_instructions_in_several_languages_are_a_note_with_shares(tmp_path: Path) -> None:
    rng = random.Random(0)
    english = [
        row(f"What is the meaning of this {rng.choice(WORDS)} and how are you? {i}", f"So {i}.") for i in range(9)
    ]
    german = [row(f"Was ist die Bedeutung und wie geht es mit dem {i}?", f"Also {i}.") for i in range(3)]
    report = linted(tmp_path, [*english, *german])
    assert report.results["mixed_instructions"].first[0].detail.startswith("English 75.0%, German 25.0% of the 12 ")
    assert report.is_clean


def test_row_formats_are_recognised_by_source(tmp_path: Path) -> None:
    for name, rows in (("a", plain_rows(3)), ("b", [{"instruction": "Why so?", "output": "So it is."}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = lint([Source(path=str(tmp_path / "a.jsonl")), Source(path=str(tmp_path / "b.jsonl"))])
    assert set(report.results) == {"row_formats", "system_missing"}
    assert "messages (" in report.results["row_formats"].first[0].detail


# ---------------------------------------------------------------- leakage and near-duplicates


def changed_at_end(row: dict[str, Any]) -> dict[str, Any]:
    """The same row, but for its last word."""
    *rest, last = row["messages"]
    return {"messages": [*rest, {**last, "content": last["content"].rsplit(" ", 1)[0] + " otherwise."}]}


def test_held_out_prompts_that_are_trained_on_are_errors_and_similar_rows_warnings(tmp_path: Path) -> None:
    train = plain_rows(40, num_words=80)
    same_prompt = row(train[7]["messages"][1]["content"].upper(), "Another answer.", system=None)
    near = changed_at_end(train[9])
    near["messages"][1] = {"role": "user", "content": "Look: " + near["messages"][1]["content"]}
    others = plain_rows(5, seed=1, num_words=80)
    report = linted(tmp_path, train, held_out=[*others, same_prompt, near, changed_at_end(others[2])])
    assert lines(report, "leakage") == [6]
    assert report.results["leakage"].first[0].detail == f"its prompt is trained on at {tmp_path}/data.jsonl:8"
    assert lines(report, "near_leakage") == [7]
    assert report.results["near_leakage"].first[0].detail.endswith("data.jsonl:10")
    assert "near_duplicate" not in report.results


def test_the_same_prompt_is_what_data_held_out_share_and_the_banner_take_it_for(tmp_path: Path) -> None:
    """Against `prompt_hash`, which both go by, over conversations that differ in one thing each."""
    asks = [("user", "One  two?"), ("assistant", "Yes."), ("user", "Three?"), ("assistant", "No.")]
    variants = {
        "case and space": [("user", "one two? "), *asks[1:]],
        "system": [("system", "Be brief."), *asks],
        "last answer": [*asks[:3], ("assistant", "Why not.")],
        "earlier answer": [asks[0], ("assistant", "Maybe."), *asks[2:]],
        "fewer turns": asks[:2],
        "more turns": [*asks, ("user", "Four?"), ("assistant", "So.")],
        "punctuation": [("user", "One two"), *asks[1:]],
        "joined": [("user", "One two? Yes. Three?"), asks[3]],
    }

    def as_row(turns: list[tuple[str, str]]) -> dict[str, Any]:
        return {"messages": [{"role": role, "content": text} for role, text in turns]}

    same = {name for name, turns in variants.items() if prompt_hash(chat(*turns)) == prompt_hash(chat(*asks))}
    report = linted(tmp_path, [as_row(asks)], held_out=map(as_row, variants.values()))
    assert {list(variants)[line - 1] for line in lines(report, "leakage")} == same
    assert same == {"case and space", "system", "last answer"}
    # Among training rows the system prompt is part of what is asked.
    rows = map(as_row, [asks, *variants.values()])
    assert lines(linted(tmp_path, rows), "duplicate_prompt_different_answer") == [
        1 + 1 + list(variants).index("last answer")
    ]


def test_near_duplicates_across_the_split_of_one_file_are_leakage(tmp_path: Path) -> None:
    """The sides are those that training will have, whichever of the two rows comes first."""
    rows = plain_rows(40, num_words=80)
    for each in rows[:20]:
        system, user, answer = changed_at_end(each)["messages"]
        rows.append({"messages": [system, {**user, "content": "Look: " + user["content"]}, answer]})
    questions = [chat(*((turn["role"], turn["content"]) for turn in row["messages"])) for row in rows]
    is_held_out = hold_out(np.array([prompt_hash(each) for each in questions], dtype=np.uint64), share=0.4, seed=5)
    pairs = [(index, index + 40) for index in range(20)]
    leaks = {
        held for pair in pairs for held, other in (pair, pair[::-1]) if is_held_out[held] and not is_held_out[other]
    }
    report = linted(tmp_path, rows, held_out_share=0.4, held_out_seed=5)
    assert {line - 1 for line in lines(report, "near_leakage")} == leaks
    assert min(leaks) < 20 < 40 < max(leaks)
    trained = [second for first, second in pairs if not is_held_out[first] and not is_held_out[second]]
    assert [line - 1 for line in lines(report, "near_duplicate")] == trained
    assert report.held_out_rows == is_held_out.sum()
    assert report.share("near_leakage") == len(leaks) / is_held_out.sum()
    assert report.share("near_duplicate") == len(trained) / 60
    assert "leakage" not in report.results
    with pytest.raises(ConfigError, match=r"data\.held_out_share=0\.0001 holds out 0 of 60"):
        linted(tmp_path, rows, held_out_share=0.0001)
    assert "bad_row" in linted(tmp_path, [{"messages": 3}], held_out_share=0.5).results


@pytest.mark.parametrize("num_rows", [2, 1000])
def test_a_full_disk_names_the_folder_and_how_to_name_another(monkeypatch: pytest.MonkeyPatch, num_rows: int) -> None:
    """Few rows meet it when the buffer is flushed at the end, many while they are added."""

    def on_a_full_disk(**_: Any) -> IO[bytes]:
        return open("/dev/full", "r+b")

    monkeypatch.setattr(tempfile, "TemporaryFile", on_a_full_disk)
    text = sentence(random.Random(0), 50)

    def fill() -> None:
        with NearDuplicates() as near:
            for _ in range(num_rows):
                near.add(text)
            list(near.pairs(np.zeros(num_rows, dtype=np.bool_)))

    with pytest.raises(DataError, match=rf"^{re.escape(tempfile.gettempdir())}: .*No space left.* TMPDIR"):
        fill()


def test_a_machine_without_a_temporary_folder_is_told_to_name_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_usable() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", none_usable)
    with pytest.raises(DataError, match=r"No usable temporary directory .* TMPDIR"):
        NearDuplicates()


def test_near_duplicates_are_named_and_exact_ones_are_not_named_again(tmp_path: Path) -> None:
    rows = plain_rows(40, num_words=80)
    rows += [changed_at_end(rows[3]), rows[5]]
    report = linted(tmp_path, rows)
    assert lines(report, "near_duplicate") == [41]
    assert report.results["near_duplicate"].first[0].detail.endswith("data.jsonl:4")
    assert lines(report, "duplicate") == [42]


def test_rows_of_one_template_are_not_near_duplicates(tmp_path: Path) -> None:
    """A long text that all rows share, and rows that differ in a number, say nothing of what is asked."""
    rng = random.Random(0)
    preamble, fixed = sentence(rng, 600), sentence(rng, 100)
    rows = [row(f"{preamble}\n{sentence(rng, 20)}\nAnswer:", sentence(rng, 3)) for _ in range(60)]
    assert "near_duplicate" not in linted(tmp_path, rows).results
    rows = plain_rows(60) + [row(f"{fixed} Dose {i} mg.\nAnswer:", "yes") for i in range(8)]
    assert "near_duplicate" not in linted(tmp_path, rows).results


def test_near_duplicates_are_those_of_exact_comparison() -> None:
    """Against all pairs compared by the definition; rows of a pair differ in up to a fifth of their shingles."""
    rng = random.Random(1)
    texts: list[list[str]] = []
    for index in range(400):
        if index % 4 == 3:
            words = list(rng.choice(texts))
            for _ in range(rng.randint(0, 4)):
                words[rng.randrange(len(words))] = rng.choice(WORDS)
        else:
            words = [rng.choice(WORDS) for _ in range(rng.randint(60, 260))]
        texts.append(words)

    def grams(words: list[str]) -> set[tuple[str, ...]]:
        return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}

    sets = [grams(words) for words in texts]
    expected = {
        row
        for row in range(400)
        if any(len(sets[row] & sets[other]) >= 0.9 * len(sets[row] | sets[other]) for other in range(row))
    }
    with NearDuplicates() as near:
        for words in texts:
            near.add(" ".join(words))
        pairs = list(near.pairs(np.zeros(400, dtype=np.bool_)))
        again = list(near.pairs(np.zeros(400, dtype=np.bool_)))
    assert pairs == again
    assert 40 < len(expected) < 100
    assert {pair.second for pair in pairs} <= expected
    assert len(expected - {pair.second for pair in pairs}) <= 1  # a pair at the threshold is missed once in 800
    for pair in pairs:
        union = len(sets[pair.first] | sets[pair.second])
        assert pair.similarity == pytest.approx(len(sets[pair.first] & sets[pair.second]) / union)


def test_shingles_ignore_case_and_punctuation_and_count_chinese_by_character() -> None:
    assert shingles("One, two; three four FIVE six.").tolist() == shingles("one two three four five six").tolist()
    assert len(shingles("one two three four")) == 0
    assert len(shingles("发烧是体温升高")) == 3


# ---------------------------------------------------------------- the report and the command


def test_every_rule_is_documented_with_its_severity() -> None:
    sections = re.split(r"^## ", DOCS.read_text(), flags=re.MULTILINE)[1:]
    documented = {
        rule: section.split("\n", 1)[0].lower().rstrip("s")
        for section in sections
        for rule in re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)
    }
    assert documented == SEVERITIES
    assert {*ROW_RULES, *(rule.__name__ for rule in SET_RULES)} <= set(SEVERITIES)


def write(path: Path, rows: Iterable[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_report_lists_places_and_ends_in_the_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "d.jsonl", [*plain_rows(17), *plain_rows(3)])
    assert main(["lint", data, "--show", "2"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"duplicate +warning +3 +15.0%", printed)
    assert f"{data}:18: the same as {data}:1\n" in printed
    assert f"{data}:20:" not in printed
    assert "and 1 more" in printed
    assert printed.endswith("\nverdict: 3 warnings in 1 rule over 20 rows\n")


@pytest.mark.parametrize(("extra", "code"), [([], 0), (["--strict"], 1)])
def test_strict_turns_warnings_into_exit_code_1(tmp_path: Path, extra: list[str], code: int) -> None:
    assert main(["lint", write(tmp_path / "d.jsonl", [*plain_rows(2), *plain_rows(1)]), *extra]) == code


def test_notes_never_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "d.jsonl", [row("Why?", "So. ")])
    assert main(["lint", data, "--strict"]) == 0
    printed = capsys.readouterr().out
    assert "padded_response" in printed
    assert printed.endswith("\nverdict: clean\n")


def test_json_holds_counts_and_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = write(tmp_path / "d.jsonl", plain_rows(20))
    held_out = write(tmp_path / "h.jsonl", plain_rows(8))
    assert main(["lint", train, "--held-out", held_out, "--json", "--strict"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["rows"], report["held_out_rows"], report["clean"]) == (20, 8, False)
    (leaked,) = report["rules"]
    assert (leaked["rule"], leaked["severity"], leaked["count"]) == ("leakage", "error", 8)
    assert (leaked["rows"], leaked["share"]) == (8, 1.0)
    assert leaked["findings"][0] == {"path": held_out, "line": 1, "detail": f"its prompt is trained on at {train}:1"}
    assert len(leaked["findings"]) == 8


def test_shares_are_of_rows_of_the_side_that_a_rule_is_about(tmp_path: Path) -> None:
    train, unlike = plain_rows(10), plain_rows(30, seed=1)
    train[3]["messages"][1:1] = [{"role": "user", "content": "</s>"}, {"role": "assistant", "content": "Odd </s>."}]
    report = linted(tmp_path, [*train, train[0], {"a": 1}], held_out=[train[0], *unlike, {"messages": 3}, row("a", "")])
    counts = {rule: (result.count, result.num_rows) for rule, result in report.results.items()}
    assert counts == {
        "bad_row": (2, 2), "empty_turn": (1, 1), "leakage": (1, 1), "duplicate": (1, 1), "forged_control_token": (2, 1)
    }  # fmt: skip
    shares = {rule: report.share(rule) for rule in report.results}
    assert shares == {
        "bad_row": 2 / 45, "empty_turn": 1 / 45, "leakage": 1 / 33, "duplicate": 1 / 12, "forged_control_token": 1 / 12
    }  # fmt: skip
    report = linted(tmp_path, [row("Why?", "So.", system=None)], keep=0)
    assert report.share("no_system") is None


@pytest.mark.parametrize("keep", [0, 1])
def test_the_share_does_not_depend_on_how_many_places_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], keep: int
) -> None:
    assert main(["lint", write(tmp_path / "d.jsonl", [*plain_rows(3), *plain_rows(1)]), "--show", str(keep)]) == 0
    assert re.search(r"duplicate +warning +1 +25.0%", capsys.readouterr().out)


def test_a_recipe_says_how_rows_are_read_and_what_is_held_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "d.jsonl", [row | {"level": 1} for row in plain_rows(30)] + plain_rows(1, seed=1))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"run: {{name: a}}\nmodel: {{path: nowhere}}\nbatch: {{examples: 1}}\noptim: {{lr: 1e-3}}\n"
        f"data: {{train: {data}, order: 'field:level', held_out_share: 0.5}}\n"
    )
    assert main(["lint", str(recipe), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert 5 < report["held_out_rows"] < 25
    (bad,) = report["rules"]
    assert (bad["rule"], bad["findings"][0]["line"]) == ("bad_row", 31)
    assert main(["lint", str(recipe), "--json", "data.held_out_seed=1"]) == 0
    assert json.loads(capsys.readouterr().out)["held_out_rows"] != report["held_out_rows"]
    assert main(["lint", str(recipe), "--held-out", data]) == 2
    assert "stands beside data.held_out_share=0.5" in capsys.readouterr().err
    assert main(["lint", str(recipe), "data.held_out_share=0", "--held-out", data]) == 0


def test_a_recipe_names_both_sides_and_takes_overrides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, held_out = (write(tmp_path / f"{name}.jsonl", plain_rows(6)) for name in "th")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"run: {{name: a}}\nmodel: {{path: nowhere}}\ndata: {{train: none.jsonl, held_out: {held_out}}}\n"
        "batch: {examples: 1}\noptim: {lr: 1e-3}\n"
    )
    assert main(["lint", str(recipe), f"data.train={train}"]) == 0
    assert "verdict: not fit to train on: 6 errors in 1 rule over 6 rows" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["absent.jsonl", "empty.jsonl", "recipe.yaml"])
def test_unusable_input_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (tmp_path / "empty.jsonl").touch()
    assert main(["lint", str(tmp_path / name)]) == 2
    assert name in capsys.readouterr().err


def test_a_source_without_rows_is_refused_whatever_its_format(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"empty\.jsonl: holds no row"):
        lint([Source(path=str(tmp_path / "empty.jsonl"), format="messages")])


def test_a_file_beside_a_recipe_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", "demo", str(tmp_path / "d.jsonl")]) == 2
    assert "beside the recipe demo" in capsys.readouterr().err


def test_a_row_cannot_steer_the_terminal_or_the_markup(tmp_path: Path) -> None:
    evil = "\x1b[2J\u202e[bold]b[/bold]"
    report = linted(tmp_path, [row(f"[red]x\nAnswer: {evil}", evil)])
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=100))
    assert "\x1b" not in stream.getvalue()
    assert "\u202e" not in stream.getvalue()
    assert "[bold]b[/bold]" in stream.getvalue()
    printed = to_json(report)
    assert printed.isprintable() or not set("\x1b\u202e\x9b") & set(printed)
    assert evil in "".join(each["detail"] for rule in json.loads(printed)["rules"] for each in rule["findings"])


def test_what_is_made_safe_stays_readable() -> None:
    kept = "👩\u200d👩\u200d👧 می\u200cخواهم 10\u00a0%, é, \ufe0f"
    assert safe(kept) == kept
    assert safe("a\nb") == "a b"
    steering = "\x1b[2J \x9b \r \x7f \u202e \u2066 \u200f \u061c \u2028 \u2029 \ud800 \udfff"
    assert safe(steering).encode().isascii()
    assert safe("\x1b\ud800") == "\\x1b\\xd800"
