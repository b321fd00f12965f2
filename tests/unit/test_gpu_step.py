"""benchmarks/gpu_step.py: the whole of it on a tiny model, and what its figures are made of."""

import json
import os
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_step
import pytest
import torch
from gpu import models, parts, report
from gpu.clock import Region, sites_of_syncs
from gpu.models import CASES, TINY
from gpu.packs import Counts, make_steps
from gpu.parts import Parts
from gpu.profiling import Kernel, table_of
from gpu.roofline import Floor
from gpu.sides import (
    HEAD_RANGE,
    OPTIMIZER_RANGE,
    Measured,
    Work,
    layers_as_they_were,
    per_document_attention,
)
from transformers.modeling_utils import AttentionInterface

from sft_dist.data.batch import build_step
from sft_dist.model.attention import Backend

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
H100, H200 = 79.1 * 2**30, 139.8 * 2**30
ALL_SIDES = ("ours", "trl_default", "trl_tuned", "hf_default", "hf_tuned")


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Results and printed tables of a run of every part on this CPU."""
    out = tmp_path_factory.mktemp("gpu") / "results.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_step.py"), "--tiny", "--out", str(out)]
    command += ["--rounds", "1", "--steps", "2", "--warmup", "2", "--minutes", "2", "--sides", *ALL_SIDES]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=150, env=environ)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(out.read_text()), ran.stdout


def test_every_part_is_measured_on_a_tiny_model(tiny_run: tuple[dict[str, Any], str]) -> None:
    results, printed = tiny_run
    names = {"tiny/roofline", "tiny/profile", *(f"tiny/side/{side}/1" for side in ALL_SIDES)}
    assert {name: part["status"] for name, part in results["parts"].items()} == dict.fromkeys(names, "done")
    assert "Not measured" not in printed
    for heading in ("tiny, roofline", "tiny, losses", "where the time of ours goes"):
        assert f"**{heading}" in printed or heading in printed


def test_all_sides_have_the_same_losses(tiny_run: tuple[dict[str, Any], str]) -> None:
    results, _ = tiny_run
    losses = {side: torch.tensor(results["parts"][f"tiny/side/{side}/1"]["result"]["losses"]) for side in ALL_SIDES}
    assert all(len(each) == 4 for each in losses.values())
    for side in ALL_SIDES[1:]:  # a mean of the means of packs is off by more
        torch.testing.assert_close(losses[side], losses["ours"], rtol=1e-5, atol=0)


def test_rates_follow_from_counts_and_seconds(tiny_run: tuple[dict[str, Any], str]) -> None:
    results, _ = tiny_run
    steps = make_steps(TINY, num_steps=4)
    ids = [i for batch in steps.batches[2:] for i in batch.example_ids]
    tokens = sum(int(steps.store.lengths[i]) for i in ids)
    part, found = results["parts"]["tiny/side/ours/1"]["result"], report.side_figures(results, "tiny", "ours")
    assert found is not None
    assert part["seconds"] > 0
    assert found["tokens_per_s"] == pytest.approx(tokens / part["seconds"])
    assert found["syncs"] is None
    assert found["of_floor"] > 0


def test_mfu_is_that_of_a_hand_count() -> None:
    # q and o 64 x 64, k and v 64 x 32, three matrices 64 x 128, two layers; head 512 x 64; 4 heads of 16.
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128
    lengths, responses = (100, 28), 40
    forward = 2 * 2 * layer * 128 + 2 * 512 * 64 * responses
    # Scores and their sums of values: two products of 2 FLOPs over the causal half of each square.
    forward += 2 * sum(2 * 2 * 64 * n * n / 2 for n in lengths)
    counts = Counts(tokens=128, responses=responses, sum_squares=sum(n * n for n in lengths))
    assert models.mfu(counts.flops(TINY.shape), 0.5, 1e9) == pytest.approx(3 * forward / 0.5 / 1e9)


def test_a_recomputed_forward_raises_the_floor_to_eight_sixths() -> None:
    floor = Floor(1e-6, 2e-6, 1e-9, 2e-9, head=0.0, optimizer=0.0)
    counts = Counts(tokens=1000, responses=0, sum_squares=10_000)
    seconds = {mode: floor.step(counts, num_steps=1, checkpointing=mode) for mode in ("none", "selective", "full")}
    assert seconds["full"] / seconds["none"] == pytest.approx(8 / 6)
    assert seconds["none"] < seconds["selective"] < seconds["full"]


def test_packs_are_full_but_for_the_document_that_would_not_fit() -> None:
    case = replace(TINY, pack_tokens=4096, packs=3)
    steps = make_steps(case, num_steps=3)
    sizes = [int(steps.store.lengths[list(pack)].sum()) for batch in steps.batches for (pack,) in batch.micro_steps]
    assert len(sizes) == 9
    assert len(set(sizes)) > 3
    assert all(3 * 4096 / 4 <= size <= 4096 for size in sizes)
    batch = steps.batches[0]
    micros = build_step(steps.store, batch, rank=0, loss="token_mean", pack_tokens=4096).micros
    assert steps.count([batch]) == Counts(
        tokens=sum(micro.input_ids.numel() for micro in micros),
        responses=sum(len(micro.targets) for micro in micros),
        sum_squares=sum(n * n for micro in micros for n in micro.document_lengths),
    )


def test_a_part_that_does_not_fit_is_reported_and_the_next_one_runs(tmp_path: Path) -> None:
    def too_large() -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    found = Parts(tmp_path / "r.json", device=CPU, head={"card": "none"})
    until = time.monotonic() + 60
    assert found.run("a", too_large, until=until) is None
    assert found.run("b", lambda: {"x": 1}, until=until) == {"x": 1}
    written = json.loads((tmp_path / "r.json").read_text())["parts"]
    assert written["a"]["status"] == "does not fit"
    assert written["a"]["reason"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    assert written["b"]["result"] == {"x": 1}


def test_a_part_is_ended_when_its_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "LEAST_SECONDS", 0.0)
    found = Parts(tmp_path / "r.json", device=CPU, head={})
    started = time.monotonic()
    found.run("slow", lambda: time.sleep(20) or {}, until=started + 0.2)
    found.run("late", dict, until=started)
    assert time.monotonic() - started < 10
    assert {name: part["status"] for name, part in found.results["parts"].items()} == {
        "slow": "failed",
        "late": "left out",
    }
    assert "not done within" in found.results["parts"]["slow"]["reason"]


def work_on(case: models.Case, *, dtype: torch.dtype = torch.float32, num_steps: int = 2) -> Work:
    return Work(case, make_steps(case, num_steps=num_steps), CPU, dtype, warmup=2, timed=1)


def test_a_state_larger_than_the_card_is_told_in_numbers(tmp_path: Path) -> None:
    found = Parts(tmp_path / "r.json", device=CPU, head={"memory_bytes": H100})
    work = work_on(CASES["Qwen3-8B"], dtype=torch.bfloat16, num_steps=1)
    gpu_step.run_side("a", "ours", work, found, model={"checkpointing": "full"}, until=time.monotonic() + 60)
    assert found.results["parts"]["a"] == {
        "status": "does not fit",
        "reason": "16 bytes for each of 8.19 B parameters are 122 GiB, the card has 79",
    }


def test_a_plan_that_was_too_hopeful_recomputes_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def run(_work: Work, *, model: dict[str, Any]) -> Measured:
        tried.append(model["checkpointing"])
        if model["checkpointing"] != "full":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return Measured(1.0, [1.0], None, 0, {})

    monkeypatch.setattr(gpu_step, "run_ours", run)
    found = Parts(tmp_path / "r.json", device=CPU, head={"memory_bytes": H200})
    mode = gpu_step.run_side("a", "ours", work_on(TINY, num_steps=3), found, model={}, until=time.monotonic() + 60)
    assert tried == ["none", "selective", "full"]
    assert mode == "full"
    assert [part["status"] for part in found.results["parts"].values()] == ["does not fit", "does not fit", "done"]
    assert found.results["parts"]["a,full"]["result"]["checkpointing"] == "full"


@pytest.mark.parametrize(
    ("model", "card", "mode", "fits"),
    [
        ("Qwen2.5-1.5B", H100, "none", True),
        ("Qwen3-4B", H200, "none", True),
        ("Qwen3-8B", H200, "selective", True),
        ("Qwen3-8B", H100, "full", False),
    ],
)
def test_the_plan_recomputes_no_more_than_the_card_asks_for(model: str, card: float, mode: str, fits: bool) -> None:
    case, room = CASES[model], card - models.RESERVED_BYTES
    state = models.our_state_bytes(case, dtype="bf16")
    plans = models.plans(case, state=state, room=room, dtype="bf16", modes=("none", "selective", "full"))
    assert (plans[0].checkpointing, plans[0].total <= room) == (mode, fits)
    assert plans[-1].checkpointing == "full"


@pytest.mark.parametrize("model", CASES)
def test_the_table_of_planned_memory_in_the_docs_is_what_is_planned(model: str) -> None:
    case = CASES[model]
    planned = [models.our_state_bytes(case, dtype="bf16")] + [
        models.activation_bytes(case, tokens=case.pack_tokens, checkpointing=mode, dtype="bf16")
        for mode in ("none", "selective", "full")
    ]
    row = " | ".join([model, str(case.packs), *(f"{size / 2**30:.1f}" for size in planned)])
    assert f"| {row} |\n" in (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")


def test_syncs_are_counted_by_line() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            warnings.warn_explicit("called a synchronizing CUDA operation", UserWarning, "/x/loop.py", 7)
        warnings.warn("something else", stacklevel=1)
    assert sites_of_syncs(caught) == {"loop.py:7": 2}


def test_only_the_last_step_of_the_warm_up_is_searched_for_syncs() -> None:
    region = Region(CPU, warmup=3, timed=2)
    with warnings.catch_warnings(record=True) as outside:
        warnings.simplefilter("always")
        for step in range(1, 6):
            warnings.warn(f"synchronizing in step {step}", stacklevel=1)
            region.step_ended(step)
    assert [str(w.message)[-1] for w in region._caught] == ["3"]
    assert [str(w.message)[-1] for w in outside] == ["1", "2", "4", "5"]
    assert region.seconds > 0


def test_kernels_are_grouped_by_name_and_by_where_they_run() -> None:
    ranges = [Kernel(HEAD_RANGE, 100, 200, 0), Kernel(OPTIMIZER_RANGE, 300, 400, 0)]
    kernels = [
        Kernel("nvjet_tst_128x256", 0, 50, 50),
        Kernel("flash::flash_fwd_kernel", 40, 90, 50),  # beside the first: 10 microseconds count once
        Kernel("sm90_xmma_gemm_bf16", 100, 150, 50),
        Kernel("vectorized_elementwise_kernel", 150, 160, 10),
        Kernel("multi_tensor_apply_kernel", 300, 350, 50),
        Kernel("vectorized_elementwise_kernel", 500, 520, 20),
        Kernel("Memcpy DtoH", 520, 530, 10),
    ]
    found = table_of(kernels, ranges, seconds=1000e-6)
    groups = {
        "GEMM": 50,
        "attention": 50,
        "head GEMM": 50,
        "head softmax": 10,
        "optimizer": 50,
        "norm, rotary, activation": 20,
        "copies": 10,
        "idle": 1000 - 230,
    }
    assert found["groups"] == pytest.approx({name: us / 1e6 for name, us in groups.items()})
    longest = {line["name"]: (line["calls"], line["seconds"]) for line in found["longest"]}
    assert longest["vectorized_elementwise_kernel"] == (2, pytest.approx(30e-6))


def test_a_peers_attention_gets_the_dtype_that_autocast_computes_in() -> None:
    seen: dict[str, Any] = {}

    def attend(*qkv: torch.Tensor, **bounds: Any) -> torch.Tensor:
        seen.update(bounds, dtypes={x.dtype for x in qkv}, shapes=[tuple(x.shape) for x in qkv])
        return qkv[0]

    name = per_document_attention(Backend("stub", attend, lambda *_: None))
    q, k, v = torch.zeros(1, 4, 5, 8), torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8, dtype=torch.bfloat16)
    bounds = {"cu_seq_lens_q": torch.tensor([0, 3, 5], dtype=torch.int32), "max_length_q": 3}
    out, _ = AttentionInterface()[name](torch.nn.Identity(), q, k, v, None, **bounds)
    assert seen["dtypes"] == {torch.bfloat16}
    assert seen["shapes"] == [(5, 4, 8), (5, 2, 8), (5, 2, 8)]
    assert (seen["document_lengths"], seen["max_seqlen"]) == ((3, 2), 3)
    assert out.shape == (1, 5, 4, 8)


def test_losses_that_differ_are_told() -> None:
    assert report.parity([11.0, 10.9], [11.0 + 1e-5, 10.9], dtype="fp32")["agrees"]
    assert not report.parity([11.0, 10.9], [11.0, 10.8], dtype="bf16")["agrees"]
    assert not report.parity([11.0, 10.9], [11.0, float("nan")], dtype="bf16")["agrees"]


def test_what_a_side_puts_into_the_models_module_is_taken_out_again() -> None:
    from transformers.models.qwen3 import modeling_qwen3

    before = modeling_qwen3.Qwen3RMSNorm
    with layers_as_they_were(TINY):
        modeling_qwen3.Qwen3RMSNorm = torch.nn.Identity
    assert modeling_qwen3.Qwen3RMSNorm is before


def test_a_card_that_is_not_in_the_table_is_measured_against_itself(tiny_run: tuple[dict[str, Any], str]) -> None:
    results, printed = tiny_run
    found = report.side_figures(results, "tiny", "ours")
    part = results["parts"]["tiny/side/ours/1"]["result"]
    best = max(line["flops_per_s"] for line in results["parts"]["tiny/roofline"]["result"]["rates"])
    assert found is not None
    assert found["mfu"] == pytest.approx(Counts(**part["counts"]).flops(TINY.shape) / part["seconds"] / best)
    assert "the fastest matrix multiplication measured here" in printed


def test_without_a_gpu_only_the_tiny_model_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_step.py"])
    with pytest.raises(SystemExit, match="--tiny"):
        gpu_step.main()
