"""The simulator of docs/scaling.md conserves what it moves, and the page says what it prints."""

import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks import scaling
from benchmarks.scaling import H100, H100_SLOW, MODELS, PUBLISHED, WORLD_SIZES, Sharding, Step, Transfer, Work

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "scaling.md"
SHAPE = MODELS["Qwen3-8B"]
P = SHAPE.num_params
WORK = Work(flops=SHAPE.step_flops(tokens=32_768, responses=8_192, sum_squares=32_768 * 1024), micro_steps=2)


def step(stage: int, world_size: int, work: Work = WORK, **given: object) -> Step:
    settings = {"machine": H100, "mfu": 0.45, "overlap": 0.9} | given
    return scaling.step_time(work, scaling.zero(stage), P, world_size=world_size, **settings)


@pytest.mark.parametrize(("collective", "passes"), [("all-gather", 1), ("reduce-scatter", 1), ("all-reduce", 2)])
def test_a_ring_sends_all_parts_but_ones_own(collective: str, passes: int) -> None:
    for n in (1, 2, 8, 1024):
        assert Transfer(collective, 1e9, 1, "end").sent_bytes(n) == pytest.approx(passes * 1e9 * (n - 1) / n)


def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather() -> None:
    parts = [Transfer(collective, 1e9, 0, "end") for collective in ("reduce-scatter", "all-gather")]
    for n in (8, 64, 1024):
        whole = Transfer("all-reduce", 1e9, 0, "end")
        assert whole.seconds(n, H100) == pytest.approx(sum(part.seconds(n, H100) for part in parts))


def test_small_all_reduces_take_a_tree_and_gathers_the_whole_ring() -> None:
    latencies = [Transfer(collective, 0, 1, "end").seconds(1024, H100) for collective in ("all-gather", "all-reduce")]
    assert latencies[0] == pytest.approx(896 * 3.4e-6 + 127 * 14e-6)
    assert latencies[1] == pytest.approx(2 * (7 * 3.4e-6 + 7 * 14e-6))


def test_a_large_gather_between_hosts_takes_as_long_as_the_slower_link() -> None:
    gather = Transfer("all-gather", 8e9, 0, "end")
    assert gather.seconds(8, H100) == pytest.approx(8e9 * 7 / 8 / 450e9 / 0.8)
    # Each of 8 network cards brings an eighth of what the other host holds.
    assert gather.seconds(16, H100_SLOW) == pytest.approx(8e9 / 2 / 8 / 12.5e9 / 0.8)


@pytest.mark.parametrize(
    ("stage", "gradient_bytes", "weights"),
    [
        (3, 2, 3),  # the rule of thumb: two gathers and a reduce-scatter in bf16
        (3, 4, 4),  # here gradients travel in fp32
        (2, 4, 4),  # an all-reduce in fp32 is four times the bf16 weights
        (1, 4, 0),
    ],
)
def test_bytes_of_a_micro_batch_in_units_of_the_bf16_weights(stage: int, gradient_bytes: int, weights: int) -> None:
    moves = scaling.transfers(Sharding(stage, 5e7, 2e8, gradient_bytes), P)
    often = sum(t.sent_bytes(64) for t in moves if t.when != "end")
    assert often == pytest.approx(weights * 2 * P * 63 / 64)


def test_stages_1_and_2_move_the_same_in_a_step_of_one_micro_batch() -> None:
    sent = [sum(t.sent_bytes(64) for t in scaling.transfers(scaling.zero(stage), P)) for stage in (1, 2)]
    assert sent[0] == sent[1]


def test_messages_follow_the_bucket_sizes_of_the_shipped_settings() -> None:
    messages = {stage: [t.messages for t in scaling.transfers(scaling.zero(stage), 10**9)] for stage in (1, 2, 3)}
    assert messages == {1: [2, 2], 2: [5, 2], 3: [20, 20, 5]}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_gpu_loses_nothing_but_the_optimizer(stage: int) -> None:
    alone = step(stage, 1)
    assert alone.communication == alone.waiting == 0
    assert alone.efficiency == alone.compute / (alone.compute + alone.optimizer)
    assert step(stage, 1, machine=replace(H100, memory=math.inf)).efficiency == 1


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("machine", [H100, H100_SLOW], ids=["400", "100"])
def test_efficiency_falls_with_more_gpus(stage: int, machine: scaling.Machine) -> None:
    steps = [step(stage, n, machine=machine) for n in WORLD_SIZES]
    # The optimizer's part shrinks with more GPUs, communication never does.
    assert all(a.communication < b.communication for a, b in pairwise(steps))
    assert steps[-1].efficiency < steps[0].efficiency


@pytest.mark.parametrize("stage", [2, 3])
def test_hidden_communication_is_bounded_by_overlap_and_by_computing(stage: int) -> None:
    exposed = [step(stage, 64, overlap=overlap).communication for overlap in (0.0, 0.5, 0.9)]
    assert exposed == sorted(exposed, reverse=True)
    # A thousandth of the computing hides next to nothing.
    small = Work(WORK.flops / 1000, WORK.micro_steps)
    assert step(stage, 64, small).communication > 0.99 * exposed[0]


def test_only_stage_1_is_free_of_barriers_between_micro_batches() -> None:
    work = Work(WORK.flops, 2, imbalance_of_ranks=1.1, imbalance_of_micro_steps=1.5)
    waits = [step(stage, 8, work).waiting / step(stage, 8, work).compute for stage in (1, 2, 3)]
    assert waits == pytest.approx([0.1, 0.5, 0.5])


def test_no_time_is_negative() -> None:
    for stage in (1, 2, 3):
        for n in (1, 2, *WORLD_SIZES):
            parts = step(stage, n)
            assert min(parts.compute, parts.waiting, parts.communication, parts.optimizer) >= 0


def test_one_gpu_holds_16_to_20_bytes_a_parameter_and_shards_add_up() -> None:
    for stage, whole in ((1, 8), (2, 2), (3, 0)):
        alone, many = scaling.state_bytes(stage, P, 1), scaling.state_bytes(stage, P, 64)
        assert 16 * P <= alone <= 20 * P
        assert 64 * (many - whole * P) == pytest.approx(alone - whole * P)


def test_the_schedule_shares_out_all_flops() -> None:
    work = scaling.chat_work(SHAPE, 512, 64)
    lengths = scaling.chat_lengths(512)
    flops = SHAPE.step_flops(
        tokens=int(lengths.sum()),
        responses=int((0.3 * lengths).astype(int).sum()),
        sum_squares=int((lengths**2).sum()),
    )
    assert work.flops * 64 == pytest.approx(flops)
    # The schedule adds up costs of its own rounding, this file exact ones.
    assert 1 <= work.imbalance_of_ranks <= work.imbalance_of_micro_steps + 1e-4
    # One chat at least takes as long as it takes: more GPUs than chats cannot all compute.
    assert scaling.chat_work(SHAPE, 512, 1024).imbalance_of_ranks >= 2


@pytest.mark.parametrize("run", PUBLISHED, ids=lambda run: run.name)
def test_published_runs_are_met_within_the_error_that_the_page_states(run: scaling.Published) -> None:
    mfu, smallest = run.calibrated_mfu(), min(run.points)
    assert run.predict(smallest, mfu) == pytest.approx(run.points[smallest][0], rel=1e-6)
    for n in run.points:
        if (run.name, n) != ("MPT-1B, A100", 32):  # the page names this point: 18% below both its neighbours
            assert -0.0125 < run.predict(n, mfu) / run.points[n][0] - 1 < 0.0625


@pytest.mark.parametrize(("shape", "parameters"), [(PUBLISHED[0].shape, 1.316e9), (PUBLISHED[5].shape, 12.85e9)])
def test_shapes_of_published_models_have_their_published_size(shape: object, parameters: float) -> None:
    # Position embeddings, norms and biases are left out.
    assert shape.num_params == pytest.approx(parameters, rel=0.005)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["published", "moved", "weak", "strong", "sweep"])
def test_the_page_holds_the_tables_that_the_script_prints(name: str) -> None:
    table = f"<!-- {name} -->\n{scaling.tables()[name]}\n<!-- end -->"
    assert table in DOCS.read_text(encoding="utf-8"), "run: python benchmarks/scaling.py --write"


def run_script(*words: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / "scaling.py"), *words]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environ, timeout=120, check=True, capture_output=True, text=True).stdout


def test_the_script_prints_its_tables_and_writes_them_into_a_page_with_the_plot_beside_it(tmp_path: Path) -> None:
    assert run_script() == "\n\n".join(scaling.tables().values()) + "\n"
    whole, page = DOCS.read_text(encoding="utf-8"), tmp_path / "page.md"
    page.write_text(re.sub(r"^\|.*\n", "", whole, flags=re.M), encoding="utf-8")
    run_script("--write", str(page))
    for name, lines in scaling.tables().items():
        assert f"<!-- {name} -->\n{lines}\n<!-- end -->" in page.read_text(encoding="utf-8")
    drawn = (tmp_path / "page.svg").read_text(encoding="utf-8")
    assert drawn.count("ZeRO-3, 400 Gbit/s") >= 1
    assert all(model in drawn for model in MODELS)
    assert DOCS.read_text(encoding="utf-8") == whole
