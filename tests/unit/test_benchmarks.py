"""benchmarks/cpu_vs_trl.py: a fallen ratio is refused, and what the figures are made of."""

import dataclasses
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cpu_vs_trl
import pytest
from cpu_floor import ATTENTION, HEAD, HEAD_GEMMS, LAYER_GEMMS, by_group, group_of
from cpu_sides import EXTRA_TOKENS_PER_ANSWER, Marks, read_messages
from cpu_vs_trl import (
    BASELINE,
    MEMORY,
    QUICK,
    SETTINGS,
    SIDES,
    SPEED,
    TRIED,
    Run,
    best_fit_packs,
    fallen_ratios,
    ratios,
    require_same_work,
    shortest_pack,
)

from sft_dist.data.conversation import Conversation, Origin, RawRow
from sft_dist.data.rows import parse_row

BEFORE = {"A": {SPEED: 4.0, MEMORY: 2.0}}
RUN = Run(
    steps=30,
    all_tokens=1000,
    all_responses=500,
    tokens=900,
    responses=450,
    cpu_s=10.0,
    wall_s=10.0,
    peak_bytes=600,
    prepare_cpu_s=0.1,
    first_loss=8.0,
    last_loss=6.0,
)


def marks(*, cpu_s: list[float], tokens: list[int], peak_bytes: int = 1) -> Marks:
    return Marks(
        cpu_s=cpu_s,
        wall_s=[2 * second for second in cpu_s],
        tokens=tokens,
        responses=[count // 2 for count in tokens],
        losses=[float(index) for index in range(len(cpu_s))],
        peak_bytes=peak_bytes,
    )


# ---------------------------------------------------------------- the check


def test_a_ratio_that_fell_by_a_fifth_is_refused_with_its_name_and_both_numbers() -> None:
    (line,) = fallen_ratios({"A": {SPEED: 3.2, MEMORY: 1.9}}, BEFORE)
    assert SPEED in line
    assert "3.20" in line
    assert "4.00" in line
    assert "20%" in line


def test_a_ratio_that_fell_by_less_than_a_fifth_or_rose_passes() -> None:
    assert fallen_ratios({"A": {SPEED: 3.21, MEMORY: 2.6}}, BEFORE) == []


def test_memory_that_grew_is_refused_as_speed_that_fell() -> None:
    (line,) = fallen_ratios({"A": {SPEED: 4.0, MEMORY: 1.5}}, BEFORE)
    assert MEMORY in line


def test_a_setting_without_a_baseline_is_refused() -> None:
    assert len(fallen_ratios({"B": {SPEED: 9.0}}, BEFORE)) == 1


def test_settings_that_were_not_measured_are_not_checked() -> None:
    assert fallen_ratios({}, BEFORE) == []


def test_ratios_are_of_medians_and_larger_is_better() -> None:
    ours = [replace(RUN, cpu_s=seconds, peak_bytes=size) for seconds, size in ((1.0, 300), (2.0, 400), (90.0, 900))]
    trl = [replace(RUN, cpu_s=8.0, peak_bytes=1000)]
    assert ratios({"ours": ours, "trl": trl}) == {SPEED: 4.0, MEMORY: 2.5}


def test_without_trl_there_is_no_ratio() -> None:
    assert ratios({"ours": [RUN], "reference": [RUN]}) == {}


def test_the_script_exits_with_1_and_names_the_ratio(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    baseline = tmp_path / "baseline.json"
    baseline.write_text(json.dumps({QUICK: {SPEED: 4.0, MEMORY: 2.0}}))

    class Fixed:
        setting = SETTINGS[QUICK]

        def __init__(self, *_: object, **__: object) -> None: ...

        def measure(self, _sides: object, *, repeats: int) -> dict[str, list[Run]]:
            return {"ours": [replace(RUN, cpu_s=5.0)], "trl": [replace(RUN, peak_bytes=1200)]}

        def report(self, *_: object, **__: object) -> str:
            return ""

    monkeypatch.setattr(cpu_vs_trl, "BASELINE", baseline)
    monkeypatch.setattr(cpu_vs_trl, "Bench", Fixed)
    monkeypatch.setattr(sys, "argv", ["cpu_vs_trl.py", "--quick", "--check"])
    with pytest.raises(SystemExit, match=r"2\.00, and 4\.00 in baseline\.json") as stopped:
        cpu_vs_trl.main()
    assert SPEED in str(stopped.value)
    assert MEMORY not in str(stopped.value)
    monkeypatch.setattr(sys, "argv", ["cpu_vs_trl.py", "--quick", "--write-baseline"])
    cpu_vs_trl.main()
    assert json.loads(baseline.read_text()) == {QUICK: {SPEED: 2.0, MEMORY: 2.0}}


def test_the_committed_baseline_holds_both_ratios_of_what_is_checked() -> None:
    baseline = json.loads(BASELINE.read_text())
    assert {"A", "B", QUICK} <= baseline.keys() <= SETTINGS.keys()
    assert all(ratios.keys() == {SPEED, MEMORY} for ratios in baseline.values())


# ---------------------------------------------------------------- what is measured


def test_the_first_three_steps_are_not_timed_and_ranks_add_up() -> None:
    first = marks(cpu_s=[1, 2, 4, 5, 7], tokens=[10, 10, 10, 20, 30], peak_bytes=5)
    second = marks(cpu_s=[1, 2, 5, 6, 7], tokens=[0, 0, 0, 4, 6], peak_bytes=9)
    run = Run.of([first, second], steps_per_epoch=2)
    assert (run.steps, run.tokens, run.responses, run.all_tokens) == (5, 60, 30, 90)
    assert run.cpu_s == (7 - 4) + (7 - 5)
    assert run.wall_s == 2 * max(7 - 4, 7 - 5)
    assert run.peak_bytes == 9
    assert (run.first_loss, run.last_loss) == (0.0, 3.5)


@pytest.mark.parametrize("key", ["steps", "all_tokens", "all_responses"])
def test_sides_that_did_not_do_the_same_work_are_refused(key: str) -> None:
    more = dataclasses.replace(RUN, **{key: round(1.03 * getattr(RUN, key))})
    require_same_work({"ours": [RUN], "trl": [RUN]})
    with pytest.raises(SystemExit, match=key):
        require_same_work({"ours": [RUN], "trl": [more]})


def test_one_answer_in_trl_has_the_stop_token_and_two_newlines_more_than_its_text(tmp_path: Path) -> None:
    from chats import ALPACA, trl_template, write_tokenizer
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(tmp_path, shape=ALPACA, vocab_size=400))
    chat = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "that."}]
    encoded = tokenizer.apply_chat_template(
        chat,
        chat_template=trl_template("qwen2_5_training"),
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    text_and_stop = len(tokenizer.encode("that.")) + 1
    assert sum(encoded["assistant_masks"]) == text_and_stop + EXTRA_TOKENS_PER_ANSWER


def test_rows_of_an_alpaca_file_are_what_sft_dist_makes_of_them(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Greet.", "input": "", "output": "Hello"},
        {"instruction": "Greet.", "output": "Hello"},
    ]
    parsed = [parse_row(RawRow(Origin("rows.jsonl", 1), json.dumps(row).encode()), "alpaca") for row in rows]
    expected = [
        [{"role": message.role, "content": message.content} for message in conversation.messages]
        for conversation in parsed
        if isinstance(conversation, Conversation)
    ]
    assert len(expected) == len(rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_messages(str(tmp_path / "rows.json")) == expected
    assert read_messages(str(tmp_path / "rows.jsonl")) == expected


# ---------------------------------------------------------------- packs


def test_best_fit_puts_a_row_where_it_leaves_the_least_room() -> None:
    assert best_fit_packs([6, 5, 4, 3, 2], 10) == 2  # 6+4, 5+3+2
    assert best_fit_packs([6, 6, 5], 10) == 3


def test_the_shortest_pack_holds_the_longest_row_and_is_no_longer_than_needed() -> None:
    assert shortest_pack([6, 5, 4, 3, 2], num_packs=2) == 10
    assert shortest_pack([6, 5, 4, 3, 2], num_packs=9) == 6
    lengths = [3, 7, 7, 8, 9, 2, 5]
    size = shortest_pack(lengths, num_packs=3)
    assert best_fit_packs(lengths, size) <= 3 < best_fit_packs(lengths, size - 1)


def test_every_setting_of_trl_makes_whole_steps() -> None:
    assert all(SETTINGS["A"].can_share(side) for side in [*SIDES.values(), *TRIED.values()])
    assert [name for name, side in SIDES.items() if not SETTINGS["A-ranks"].can_share(side)] == ["trl-long"]


# ---------------------------------------------------------------- where the time goes


@pytest.mark.parametrize(
    ("name", "callers", "group"),
    [
        ("aten::addmm", ["aten::linear"], LAYER_GEMMS),
        ("aten::mm", ["AddmmBackward0"], LAYER_GEMMS),
        ("aten::mm", ["_WeightedNLL"], HEAD_GEMMS),
        ("aten::exp", ["_WeightedNLLBackward", "autograd::engine::evaluate_function"], HEAD),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", [], ATTENTION),
        ("aten::mul_", ["Optimizer.step#AdamW.step"], "optimizer"),
        ("aten::silu", [], "layers, element by element"),
    ],
)
def test_an_op_belongs_to_what_called_it(name: str, callers: list[str], group: str) -> None:
    assert group_of(name, callers) == group


def test_times_of_a_group_add_up_in_seconds() -> None:
    ops = [("aten::mm", [], 2e6), ("aten::mm", [], 1e6), ("aten::silu", [], 5e5)]
    assert by_group(ops) == {LAYER_GEMMS: 3.0, "layers, element by element": 0.5}


def test_the_floor_counts_the_flops_of_the_shape() -> None:
    shape = replace(SETTINGS["A"].shape, vocabulary=64, hidden=16, head_dim=4, intermediate=32)
    script = (
        "import json, cpu_floor; from sft_dist.shape import ModelShape; "
        f"print(json.dumps(cpu_floor.gemm_seconds({shape!r}, tokens=24, responses=8)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=BASELINE.parent, check=True
    )
    gemms = json.loads(done.stdout)
    expected = shape.step_flops(tokens=24, responses=8, sum_squares=0)
    assert sum(flops for _, flops in gemms.values()) == pytest.approx(expected)
    assert all(seconds > 0 for seconds, _ in gemms.values())
