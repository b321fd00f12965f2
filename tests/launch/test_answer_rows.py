"""`sft-dist generate --input`: every row answered, in order, and a job that was killed goes on where it was."""

import csv
import json
from pathlib import Path

import pytest

from sft_dist import cli
from sft_dist.answer_rows import answer_rows
from sft_dist.generate import Answerer, Sampling
from tests import tiny

ASKED = [
    {"messages": [{"role": "user", "content": "ab"}], "id": 7},
    {"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "known", "train": False}]},
    {
        "messages": [
            {"role": "user", "content": "d"},
            {"role": "assistant", "content": "e"},
            {"role": "user", "content": "f"},
        ]
    },
    {"prompt": "gh", "note": "line\u2028break"},
    {"prompt": [{"role": "user", "content": "i"}], "completion": "known"},
    {"instruction": "jk", "input": "", "history": [["l", "m"]]},
    {"conversations": [{"from": "human", "value": "n"}, {"from": "gpt", "value": "known"}], "system": "o"},
]
# What each row asks, by hand: the template writes <|u|> before every turn but the assistant's.
PROMPTS = [
    "<|u|>ab",
    "<|u|>c",
    "<|u|>d<|a|>e<|e|><|u|>f",
    "<|u|>gh",
    "<|u|>i",
    "<|u|>l<|a|>m<|e|><|u|>jk",
    "<|u|>o<|u|>n",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("m"), tied=False, max_position_embeddings=64)


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def test_every_row_format_is_answered_in_order_with_or_without_its_answer(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, output = write_rows(tmp_path / "rows.jsonl", ASKED), tmp_path / "out" / "answers.jsonl"
    command = ["generate", str(model), "--input", str(rows), "--output", str(output), "--max-new-tokens", "9"]
    assert cli.main([*command, "--batch-size", "3"]) == 0
    assert f"{output}: 7 rows answered\n" in capsys.readouterr().out
    written = [json.loads(line) for line in output.read_text().split("\n")[:-1]]
    answerer = Answerer.load(model)
    ids = [answerer.tokenizer._encoder.ids(f"{prompt}<|a|>") for prompt in PROMPTS]
    expected = [answerer.complete([prompt], sampling=Sampling(9))[0] for prompt in ids]
    assert written == [{**row, "answer": answer} for row, answer in zip(ASKED, expected, strict=True)]
    assert len(set(expected)) > 3
    table = tmp_path / "rows.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([["messages", "id"], [json.dumps(ASKED[0]["messages"]), "7"]])
    assert cli.main([*command[:3], str(table), "--output", f"{output}2", "--max-new-tokens", "9"]) == 0
    assert json.loads(Path(f"{output}2").read_text())["answer"] == expected[0]


def test_a_killed_job_ends_with_the_bytes_of_one_that_was_not(model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": letter * 3} for letter in "abcdefg"])
    settings = {"field": "answer", "sampling": Sampling(8, temperature=1.5), "batch_size": 3}
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    answer_rows(model, rows=rows, output=whole, **settings)
    done: list[int] = []

    def die(num_done: int, _all: int) -> None:
        done.append(num_done)
        if num_done == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        answer_rows(model, rows=rows, output=killed, on_progress=die, **settings)
    torn = killed.read_bytes() + whole.read_bytes()[killed.stat().st_size :][:-1]
    lines = torn.split(b"\n")
    killed.write_bytes(b"\n".join(lines[:5]) + b"\n" + lines[5][:9])  # in the middle of a batch, and of a line
    found = answer_rows(model, rows=rows, output=killed, on_progress=lambda num, _all: done.append(num), **settings)
    assert (found.num_rows, found.num_before) == (7, 5)
    assert killed.read_bytes() == whole.read_bytes()
    assert done == [0, 3, 5, 6], "nothing is answered twice over"
    assert answer_rows(model, rows=rows, output=killed, **settings).num_before == 7


def test_answers_to_other_rows_or_made_otherwise_are_not_mixed(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, output = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"prompt": "b"}]), tmp_path / "o.jsonl"
    command = ["generate", str(model), "--input", str(rows), "--output", str(output), "--max-new-tokens"]
    assert cli.main([*command, "4"]) == 0

    def refused(*arguments: str) -> str:
        capsys.readouterr()
        before = output.read_bytes()
        assert cli.main([*arguments]) == 2
        assert output.read_bytes() == before
        return capsys.readouterr().err

    assert "was made otherwise: sampling was {'max_new_tokens': 4" in refused(*command, "5")
    write_rows(rows, [{"prompt": "a"}, {"prompt": "c"}])
    assert f"{output}:2 is not the answer to {rows}:2" in refused(*command, "4")
    Path(f"{output}.settings.json").unlink()
    assert "no o.jsonl.settings.json says how it was made" in refused(*command, "4")
    write_rows(rows, [{"prompt": "a" * 70}])
    other = ["generate", str(model), "--input", str(rows), "--output", str(tmp_path / "p.jsonl")]
    assert "a prompt of 72 tokens and an answer of up to 4 do not fit into the model's 64 positions" in refused(
        *other, "--max-new-tokens", "4"
    )
    write_rows(rows, [{"prompt": "a", "answer": "b"}, {"text": "c"}])
    assert f"{rows}:2: no prompt: the row's keys are 'text'" in refused(*other)
    write_rows(rows, [{"prompt": "a", "answer": "b"}])
    assert "the row has a field 'answer'; name another with --answer-field" in refused(*other)
