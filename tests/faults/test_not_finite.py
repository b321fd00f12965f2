"""NaN and spikes: all ranks withhold the same update, and what is on disk stays clean."""

import math
import os
import re
from pathlib import Path

import pytest

from tests.faults.scenes import SAVE_EVERY, STEPS, Played, Run, shared_stage
from tests.faults.table import engines, fault

ALL = ("zero2_offload", "zero3_offload", "zero1") if os.environ.get("FAULTS") == "full" else ()
LAST = 1
"""The rank that is poisoned: another than the one that logs."""


def withheld(run: Run) -> dict[int, str]:
    return {step: why for step, why in run.column("withheld").items() if why is not None}


def finite(run: Run, step: int) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in run.master(step).values())


@pytest.mark.parametrize("factor", [math.nan, math.inf])
@pytest.mark.parametrize("engine", [*engines("zero2"), *ALL])
def test_a_poisoned_step_is_withheld_on_all_ranks_and_a_resume_draws_the_same_curve(engine: str, factor: float) -> None:
    """A resume behind the poisoned step shows that moments and count are those of an update that never was."""
    stage = shared_stage()
    poison = {"steps": [5, 9], "rank": LAST, "factor": factor}
    run, again = stage.run(engine), stage.run(engine)
    with fault(f"token weights {factor} on rank {LAST} in two steps", engine=run.layout) as outcome:
        played = run.train(effects={"poison": poison})
        assert played.code == 0, str(played)
        assert withheld(run) == {5: "loss not finite", 9: "loss not finite"}
        assert f"done: step {STEPS}, 2 updates WITHHELD" in played.text
        assert all(finite(run, step) for step in run.committed())
        before, after = ({k: v for k, v in run.curve().items() if cut(k)} for cut in (lambda k: k < 5, lambda k: k > 5))
        undisturbed = stage.undisturbed(engine).curve()
        assert before == {step: undisturbed[step] for step in before}
        assert all(line["applied"] is (step != 9) for step, line in after.items())
        # Stopped behind the first and gone on from there, with the second still to come.
        stopped = again.train(effects={"poison": poison, "touch": {"file": str(again.path / "STOP"), "step": 7}})
        assert (stopped.code, again.committed()[-1]) == (0, 7), str(stopped)
        assert again.train(effects={"poison": poison}).code == 0
        assert again.resumed_after() == 7
        outcome.text = f"both withheld on both ranks, run went on; resumed behind one: {again.requires_equal(run)}"


# Each of DeepSpeed's three optimizers, and offload, decides in its own way.
FEW = [("zero2", "fp32"), ("zero2_offload", "fp32"), ("zero1", "bf16"), ("zero3", "bf16")]
EACH = [(engine, dtype) for engine in (*engines(), *ALL) for dtype in ("fp32", "bf16")]


@pytest.mark.parametrize(("engine", "dtype"), EACH or FEW)
def test_an_infinite_loss_with_finite_gradients_is_withheld_like_one_with_others(engine: str, dtype: str) -> None:
    """The engine has nothing to object to then: it is told to withhold."""
    stage = shared_stage()
    run, poisoned = (stage.run(engine, save_every=1) for _ in range(2))
    run.recipe["model"]["dtype"] = poisoned.recipe["model"]["dtype"] = dtype
    with fault("infinite loss and finite gradients on one rank", engine=f"{run.layout}, {dtype}") as outcome:
        played = run.train(effects={"offset": {"steps": [6, 7], "rank": LAST, "value": math.inf}})
        assert played.code == 0, str(played)
        assert withheld(run) == {6: "loss not finite", 7: "loss not finite"}
        assert run.column("applied") == {step: step not in (6, 7) for step in range(1, STEPS + 1)}
        weights = {step: run.master(step) for step in (5, 7, 8)}
        assert all(weights[5][key].equal(weights[7][key]) for key in weights[5])
        assert any(not weights[7][key].equal(weights[8][key]) for key in weights[7])
        assert poisoned.train(effects={"poison": {"steps": [6, 7], "rank": LAST, "factor": math.nan}}).code == 0
        equal = run.requires_equal(poisoned)
        outcome.text = f"withheld on both ranks, run went on; as with gradients that are not finite: {equal}"


@pytest.mark.parametrize("engine", [*engines("zero2"), *ALL])
def test_a_gradient_that_is_not_finite_is_withheld_though_the_loss_is(engine: str) -> None:
    stage = shared_stage()
    run, poisoned = (stage.run(engine) for _ in range(2))
    with fault("NaN gradients and a finite loss on one rank", engine=run.layout) as outcome:
        played = run.train(effects={"bend": {"steps": [6, 7], "rank": LAST}})
        assert played.code == 0, str(played)
        assert withheld(run) == {6: "gradient not finite", 7: "gradient not finite"}
        assert all(math.isfinite(loss) for loss in run.column("loss").values())
        assert poisoned.train(effects={"poison": {"steps": [6, 7], "rank": LAST, "factor": math.nan}}).code == 0
        outcome.text = (
            f"withheld on both ranks, run went on; as with a NaN loss: {run.requires_equal(poisoned, after=7)}"
        )


@pytest.mark.parametrize("engine", [*engines("zero2"), *ALL])
def test_nothing_of_a_withheld_update_reaches_the_weights(engine: str) -> None:
    run = shared_stage().run(engine, save_every=1, max_withheld=3)
    with fault("three withheld updates in a row, train.max_withheld: 3", engine=run.layout) as outcome:
        played = run.train(effects={"poison": {"steps": list(range(5, 15)), "rank": LAST, "factor": math.nan}})
        assert played.code == 4, str(played)
        assert sorted(run.column("loss")) == [1, 2, 3, 4, 5, 6, 7]
        assert "3 updates in a row were withheld, the last at step 7: loss not finite" in played.errors
        assert run.committed() == run.good() == [1, 2, 3, 4, 5, 6]
        clean = run.master(4)
        for step in (5, 6):
            found = run.master(step)
            assert found.keys() == clean.keys()
            assert all(found[key].equal(clean[key]) for key in clean), f"step {step} changed a weight"
        assert not (run.path / "model").exists()
        named = named_lines(run, played)
        outcome.text = f"exit 4, names {named} lines of the data; weights on disk are those before the first"


def named_lines(run: Run, played: Played) -> int:
    """How many examples the error names; each must be of the last step's, and be told by file and line."""
    named = re.findall(r"(\S+train\.jsonl):(\d+)", played.errors)
    assert named, played.errors
    assert {file for file, _ in named} == {run.recipe["data"]["train"]}
    lines = Path(run.recipe["data"]["train"]).read_text().splitlines()
    assert all(1 <= int(number) <= len(lines) for _, number in named)
    assert 1 <= len(set(named)) < run.column("examples")[7], "only those of the rank whose loss is not finite"
    return len(named)


def test_a_run_that_was_stopped_by_itself_goes_on_when_the_cause_is_gone() -> None:
    stage = shared_stage()
    whole, run = stage.undisturbed("zero2"), stage.run("zero2", max_withheld=2)
    with fault("stopped by itself, then started without the cause", engine=run.layout) as outcome:
        played = run.train(effects={"poison": {"steps": list(range(7, 15)), "rank": LAST, "factor": math.nan}})
        assert played.code == 4, str(played)
        assert sorted(run.column("loss"))[-1] == 8
        assert run.committed()[-1] == 6
        assert run.train().code == 0
        assert run.resumed_after() == 6
        outcome.text = f"went on after step 6; {run.requires_equal(whole)}"


def test_a_count_that_is_already_above_a_lowered_limit_stops_the_run() -> None:
    run = shared_stage().run("zero2")
    with fault("train.max_withheld lowered below the count of the checkpoint", engine=run.layout) as outcome:
        poison = {"poison": {"steps": list(range(3, 15)), "rank": LAST, "factor": math.nan}}
        stop = {"touch": {"file": str(run.path / "STOP"), "step": 7}}
        assert run.train(effects=poison | stop).code == 0
        assert run.committed()[-1] == 7
        played = run.train("train.max_withheld=2", effects=poison)
        assert played.code == 4, str(played)
        assert "6 updates in a row were withheld, the last at step 8" in played.errors
        outcome.text = "exit 4 at the next withheld step: the count survives the resume"


SPIKED = 24
SPIKE = {"poison": {"steps": [20, 22], "rank": LAST, "factor": 50.0}}


@pytest.mark.parametrize("engine", engines("zero2"))
def test_a_spike_is_withheld_and_judged_alike_after_a_resume(engine: str) -> None:
    stage = shared_stage()
    settings = {"steps": SPIKED, "spike_guard": 3.0, "save_every": 3 * SAVE_EVERY}
    calm = stage.undisturbed(engine, **settings)
    assert withheld(calm) == {}
    whole, run = stage.run(engine, **settings), stage.killed(engine, last=18, keep=4, **settings)
    with fault("loss 50 times as large in two steps, train.spike_guard: 3", engine=run.layout) as outcome:
        played = whole.train(effects=SPIKE)
        assert played.code == 0, str(played)
        assert sorted(withheld(whole)) == [20, 22]
        assert all("is above 3 times the recent median" in why for why in withheld(whole).values())
        assert run.train(effects=SPIKE).code == 0
        assert run.resumed_after() == 18, "the guard needs 16 losses to judge: they came from the checkpoint"
        outcome.text = f"both withheld, others not; resumed between: {run.requires_equal(whole)}"
