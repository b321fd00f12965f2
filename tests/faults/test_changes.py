"""Settings, data and code that changed since the checkpoint: refused where the curve would be another, else told."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sft_dist.metrics import read_lines
from tests.faults.scenes import STEPS, Run, reseal, shared_stage
from tests.faults.table import engines, fault

CHANGES = {
    "optim.lr=2e-3": "optim.lr: 0.001 then, 0.002 now",
    "run.seed=4": "run.seed: 3 then, 4 now",
    "batch.examples=10": "batch.examples: 12 then, 10 now",
    "loss=token_mean": "loss: 'example_mean' then, 'token_mean' now",
    "train.steps=15": "train.steps: 14 then, 15 now",
    "optim.schedule=linear": "optim.schedule: 'cosine' then, 'linear' now",
    "train.spike_guard=3": "train.spike_guard: None then, 3.0 now",
    "data.order=response_length": "data.order: 'shuffle' then, 'response_length' now",
}


def add_row(run: Run) -> None:
    """Give the run its own data, with one row more."""
    source = Path(run.recipe["data"]["train"])
    own = source.with_name(f"{run.path.name}.jsonl")
    row = {"messages": [{"role": "user", "content": "new"}, {"role": "assistant", "content": "row"}]}
    own.write_text(source.read_text() + json.dumps(row) + "\n")
    run.recipe["data"]["train"] = str(own)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("engine", engines("zero2"))
def test_a_setting_that_changes_the_curve_is_refused_with_old_and_new(change: str, engine: str) -> None:
    run = shared_stage().killed(engine)
    before = sorted(run.path.rglob("*"))
    with fault(f"resumed with {change}", engine=run.layout) as outcome:
        refused = run.requires_refused(
            run.train(change), f"step-00000008 was made under other settings: {CHANGES[change]}"
        )
        assert sorted(path for path in run.path.rglob("*") if path.name != ".lock") == before, "nothing is written"
        outcome.text = f"{refused}: {CHANGES[change]}"


def test_data_that_changed_is_refused() -> None:
    run = shared_stage().killed("zero2")
    with fault("resumed with a row added to the data", engine=run.layout) as outcome:
        add_row(run)
        refused = run.requires_refused(run.train(), "made under other settings: data: ", "; draws: ", "--allow-change")
        outcome.text = f"{refused}, with both fingerprints"


def test_several_changes_are_all_named() -> None:
    run = shared_stage().killed("zero2")
    with fault("resumed with three settings changed", engine=run.layout) as outcome:
        changed = ["optim.lr=2e-3", "run.seed=4", "train.steps=15"]
        refused = run.requires_refused(run.train(*changed), *(CHANGES[change] for change in changed))
        outcome.text = f"{refused}, each key with old and new"


def test_a_change_is_refused_by_the_checkpoint_that_is_fallen_back_to(tmp_path: Path) -> None:
    """The newest is broken, so nobody knows what is in it before the ranks have met."""
    run = shared_stage().killed("zero2")
    with fault("newest checkpoint broken, and optim.lr changed", engine=run.layout) as outcome:
        (run.checkpoint(8) / "run_state.json").unlink()
        refused = run.requires_refused(
            run.train("optim.lr=2e-3"), "step-00000006 was made under other settings: optim.lr: 0.001 then, 0.002 now"
        )
        assert run.committed() == [6, 8], "nothing is set aside"
        outcome.text = f"{refused} by the one before it"


# ---------------------------------------------------------------- told


def other_code(run: Run) -> None:
    state = json.loads((run.checkpoint(8) / "run_state.json").read_text())
    state["code"] = {key: "other" for key in state["code"]}
    (run.checkpoint(8) / "run_state.json").write_text(json.dumps(state))
    reseal(run.checkpoint(8), "run_state.json")


def keep(_: Run) -> None:
    pass


TOLD: dict[str, tuple[Callable[[Run], None], tuple[str, ...], str]] = {
    "batch.pack_tokens": (
        keep,
        ("batch.pack_tokens=128",),
        "batch.pack_tokens: 64 then, 128 now",
    ),
    "code": (other_code, (), "'other' then, "),
    "model.checkpointing": (keep, ("model.checkpointing=full",), "model.checkpointing: 'none' then, 'full' now"),
}


@pytest.mark.parametrize("what", TOLD)
def test_what_does_not_change_the_curve_is_told_and_allowed(what: str) -> None:
    change, words, said = TOLD[what]
    whole, run = shared_stage().undisturbed("zero2"), shared_stage().killed("zero2")
    with fault(f"resumed with another {what}", engine=run.layout) as outcome:
        change(run)
        played = run.train(*words)
        assert played.code == 0, str(played)
        assert said in played.text
        assert any(said in change for change in run.starts()[-1]["changed"]), "run.json has it"
        assert "was trained before" not in played.text
        assert run.column("batch") == whole.column("batch")
        assert run.column("lr") == whole.column("lr")
        difference = max(abs(run.column("loss")[step] - loss) for step, loss in whole.column("loss").items())
        assert difference <= 1e-5
        outcome.text = f"told in the banner and run.json; losses within {difference:.0e}"


# ---------------------------------------------------------------- allowed


@pytest.mark.parametrize("engine", engines("zero2"))
def test_with_a_changed_rate_the_draws_go_on_as_they_were(engine: str) -> None:
    whole, run = shared_stage().undisturbed(engine), shared_stage().killed(engine)
    with fault("optim.lr changed, --allow-change", engine=run.layout) as outcome:
        played = run.train("optim.lr=2e-3", "--allow-change")
        assert played.code == 0, str(played)
        assert "optim.lr: 0.001 then, 0.002 now: the curve is another from here (--allow-change)" in played.text
        assert run.column("batch") == whole.column("batch")
        assert len(run.segments()) == 1
        lrs, before = run.column("lr"), whole.column("lr")
        assert {step for step in lrs if lrs[step] != before[step]} == set(range(9, STEPS + 1))
        assert run.column("loss")[9] == whole.column("loss")[9], "weights and moments are those of the checkpoint"
        assert "was trained before" not in played.text, "what was trained before is no measure"
        (change,) = (line for line in run.lines() if line["event"] == "change")
        assert change["step"] == 8
        outcome.text = "same examples in every step, new rate from step 9, metrics.jsonl and run.json tell it"


@pytest.mark.parametrize("engine", engines("zero2"))
def test_changed_data_begins_a_new_segment_that_can_be_killed_and_resumed(engine: str) -> None:
    stage = shared_stage()
    whole, run = stage.undisturbed(engine), stage.killed(engine)
    with fault("a row added to the data, --allow-change", engine=run.layout) as outcome:
        add_row(run)
        fresh = stage.run(engine, steps=STEPS - 8)
        fresh.recipe["data"] = run.recipe["data"]
        assert fresh.train().code == 0
        again = stage.killed(engine)
        again.recipe["data"] = run.recipe["data"]

        played = run.train("--allow-change")
        assert played.code == 0, str(played)
        assert [segment["after_step"] for segment in run.segments()] == [0, 8]
        assert len({segment["data_fingerprint"] for segment in run.segments()}) == 2
        batches, new = run.column("batch"), fresh.column("batch")
        old = whole.column("batch")
        assert list(batches.values()) == [old[step] for step in range(1, 9)] + [new[step] for step in sorted(new)]
        assert run.column("epoch")[9] == 0
        assert run.column("lr") == whole.column("lr"), "the schedule counts on"

        stop = {"touch": {"file": str(again.path / "STOP"), "step": 11}}
        assert again.train("--allow-change", effects=stop).code == 0
        assert again.committed()[-1] == 11
        assert again.train().code == 0, "it was allowed once, and is in the checkpoint"
        assert again.resumed_after() == 11
        assert [segment["after_step"] for segment in again.segments()] == [0, 8]
        equal = again.requires_equal(run)
        outcome.text = f"draws begin anew after step 8, as a fresh run's; stopped and resumed inside: {equal}"


def test_a_change_before_the_next_commit_must_be_allowed_again() -> None:
    run = shared_stage().killed("zero2")
    with fault("--allow-change, killed before the next commit", engine=run.layout) as outcome:
        lines = (run.path / "metrics.jsonl").read_text()
        played = run.train("optim.lr=2e-3", "--allow-change", "train.max_withheld=1", effects=poison_from(9))
        assert played.code == 4, str(played)
        assert run.committed() == [6, 8]
        assert len(list(read_lines(run.path / "metrics.jsonl"))) > lines.count("\n")
        run.requires_refused(run.train("optim.lr=2e-3"), CHANGES["optim.lr=2e-3"])
        assert run.train("optim.lr=2e-3", "--allow-change").code == 0
        outcome.text = "refused without it, goes on with it: the checkpoint knows only what it was made under"


def poison_from(step: int) -> dict[str, dict[str, object]]:
    return {"poison": {"steps": list(range(step, STEPS + 1)), "rank": 1, "factor": float("nan")}}
