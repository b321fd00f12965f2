"""A run goes on from any engine's checkpoint on any other engine and number of processes, and draws the same curve."""

import os

import pytest
import safetensors.torch

from sft_dist.run_files import MODEL
from tests.faults.scenes import STEPS, Run, shared_stage
from tests.faults.table import fault

Layout = tuple[str, int]
QUICK: list[tuple[Layout, Layout]] = [
    (("zero2", 2), ("single", 1)),
    (("zero2", 2), ("zero3", 4)),
    (("zero3", 2), ("ddp", 2)),
]
FULL: list[tuple[Layout, Layout]] = [
    (("single", 1), ("ddp", 4)),
    (("ddp", 2), ("zero1", 2)),
    (("zero1", 2), ("zero2", 4)),
    (("zero3", 2), ("zero2_offload", 2)),
    (("zero2_offload", 2), ("zero3_offload", 2)),
    (("zero3_offload", 2), ("single", 1)),
]
IN_BF16: list[tuple[Layout, Layout]] = [
    (("zero1", 2), ("zero3", 2)),
    (("ddp", 2), ("zero1", 2)),
    (("zero3", 2), ("ddp", 2)),
]
EVERYTHING = os.environ.get("FAULTS") == "full"


def named(layout: Layout) -> str:
    return f"{layout[0]} x {layout[1]}"


def resumed_on(run: Run, layout: Layout) -> Run:
    """The same run directory, from now on under another layout."""
    engine, world_size = layout
    other = shared_stage().run(engine, world_size=world_size, name=run.path.name, steps=run.recipe["train"]["steps"])
    other.recipe["model"] |= run.recipe["model"]
    return other


def largest_difference(run: Run, whole: Run) -> tuple[float, float]:
    """Of losses and of final weights. Rates and examples of every step must be equal."""
    for key in ("lr", "batch", "examples", "response_tokens"):
        assert run.column(key) == whole.column(key), key
    losses = [(run.column("loss")[step], loss) for step, loss in whole.column("loss").items()]
    found, expected = (safetensors.torch.load_file(r.path / MODEL / "model.safetensors") for r in (run, whole))
    assert found.keys() == expected.keys()
    weights = max(float((found[name] - expected[name]).abs().max()) for name in expected)
    return max(abs(a - b) for a, b in losses), weights


@pytest.mark.parametrize(("then", "now"), QUICK + FULL * EVERYTHING, ids=lambda layout: "-".join(map(str, layout)))
def test_a_reshaped_run_draws_the_same_curve(then: Layout, now: Layout) -> None:
    """Within what two layouts differ by anyway."""
    whole = shared_stage().undisturbed(then[0], world_size=then[1])
    run = shared_stage().killed(then[0], world_size=then[1], last=6)
    with fault(f"resumed on {named(now)}", engine=named(then)) as outcome:
        run = resumed_on(run, now)
        played = run.train()
        assert played.code == 0, str(played)
        assert run.resumed_after() == 6
        if then[1] != now[1]:
            assert f"processes: {then[1]} then, {now[1]} now" in played.text
        assert f"train.engine: '{then[0]}' then, '{now[0]}' now" in played.text
        assert "was trained before" not in played.text
        loss, weights = largest_difference(run, whole)
        assert loss <= 1e-5
        assert weights <= 1e-5
        outcome.text = f"told as changed; losses within {loss:.0e}, final weights within {weights:.0e}"


@pytest.mark.parametrize(("then", "now"), IN_BF16 if EVERYTHING else IN_BF16[:1], ids=lambda x: "-".join(map(str, x)))
def test_master_weights_and_moments_survive_a_change_of_engine_in_bf16(then: Layout, now: Layout) -> None:
    """The first step after it has the very loss of the uninterrupted run: bf16 weights are the same masters, rounded.

    Later steps differ by the order of bf16 sums.
    """
    stage = shared_stage()
    whole = stage.run(then[0], world_size=then[1])
    whole.recipe["model"]["dtype"] = "bf16"
    run = stage.run(then[0], world_size=then[1])
    run.recipe["model"]["dtype"] = "bf16"
    with fault(f"resumed on {named(now)}, in bf16", engine=named(then)) as outcome:
        assert whole.train().code == 0
        stop = {"touch": {"file": str(run.path / "STOP"), "step": 6}}
        assert run.train(effects=stop).code == 0
        run = resumed_on(run, now)
        played = run.train()
        assert played.code == 0, str(played)
        assert run.resumed_after() == 6
        found, expected = run.column("loss"), whole.column("loss")
        assert abs(found[7] - expected[7]) <= 1e-3 * expected[7]
        loss = max(abs(found[step] - expected[step]) for step in range(7, STEPS + 1))
        assert loss <= 2e-2
        outcome.text = f"losses within {loss:.0e}, as bf16 rounds"


CHAIN: list[Layout] = [("zero2", 2), ("single", 1), ("ddp", 4)]
CHAIN_STEPS = 18


def test_one_run_goes_from_two_processes_to_one_to_four() -> None:
    stage = shared_stage()
    whole = stage.undisturbed("zero2", steps=CHAIN_STEPS)
    run = stage.run("zero2", steps=CHAIN_STEPS)
    with fault("stopped after step 6, on 1 process to step 12, on 4 to the end", engine="zero2 x 2") as outcome:
        for layout, last in zip(CHAIN, (6, 12, None), strict=True):
            run = resumed_on(run, layout)
            stop = {"touch": {"file": str(run.path / "STOP"), "step": last}} if last else {}
            played = run.train(effects=stop)
            assert played.code == 0, str(played)
            assert sorted(run.column("loss"))[-1] == (last or CHAIN_STEPS)
        assert [start["after_step"] for start in run.starts()] == [0, 6, 12]
        assert [start["layout"]["processes"] for start in run.starts()] == [2, 1, 4]
        loss, weights = largest_difference(run, whole)
        assert loss <= 1e-5
        outcome.text = f"one curve: losses within {loss:.0e}, examples equal, final weights within {weights:.0e}"
