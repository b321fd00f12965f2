import json
from pathlib import Path

import pytest
import yaml

from sft_dist.errors import BackendError, ConfigError
from sft_dist.wandb_process import make_run_id
from sft_dist.wandb_sync import sync_run
from tests.tiny import free_port
from tests.unit.wandb_server import wandb_server

pytestmark = pytest.mark.usefixtures("no_wandb_of_the_machine")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Steps 1 to 4, of which 3 was replayed; 5 of the first attempt; a held-out loss; a torn last line."""
    directory = tmp_path / "runs" / "r"
    directory.mkdir(parents=True)
    config = {"run": {"name": "r"}, "model": {"path": "https://ann:opensesame@host/m"}, "wandb": {"project": "p"}}
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [
        *({"event": "step", "step": step, "loss": step / 10, "grad_norm": None, "attempt": 1} for step in (1, 2)),
        *({"event": "step", "step": step, "loss": 0.777, "attempt": 1} for step in (3, 4, 5)),
        {"event": "step", "step": 3, "loss": 0.25, "attempt": 2},
        {"event": "step", "step": 4, "loss": 0.4, "attempt": 2},
        {"event": "held_out", "step": 3, "held_out_loss": 2.0, "attempt": 2},
        {"event": "change", "step": 3, "changed": ["optim.lr"], "attempt": 2},
    ]
    starts = [{"attempt": attempt, "after_step": after_step} for attempt, after_step in ((1, 0), (2, 2))]
    (directory / "run.json").write_text(json.dumps({"starts": starts}))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "st')
    return directory


def test_the_last_attempt_of_each_record_is_sent_and_sent_again_alike(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with wandb_server() as server:
        for name, value in server.environ.items():
            monkeypatch.setenv(name, value)
        assert sync_run(run_dir) == 6
        run_id = make_run_id(run_dir)
        first = [{k: v for k, v in row.items() if k not in ("_timestamp", "_runtime")} for row in server.rows(run_id)]
        assert sync_run(run_dir, project="q") == 6
        second = [{k: v for k, v in row.items() if k not in ("_timestamp", "_runtime")} for row in server.rows(run_id)]
    assert (
        first
        == second
        == [
            {"_step": 1, "train/loss": 0.1, "train/attempt": 1},
            {"_step": 2, "train/loss": 0.2, "train/attempt": 1},
            {
                "_step": 3,
                "train/loss": 0.25,
                "train/attempt": 2,
                "held_out/held_out/loss": 2,
                "held_out/held_out/step": 3,
                "change/step": 3,
            },
            {"_step": 4, "train/loss": 0.4, "train/attempt": 2},
        ]
    )
    assert server.resumes == [], "what is there is replaced"
    assert {upsert["project"] for upsert in server.upserts} == {"p", "q"}
    assert json.loads(server.upserts[0]["config"])["model"]["value"]["path"] == "https://ann:***@host/m"
    assert b"opensesame" not in b"".join(server.sent)


def test_offline_it_writes_the_steps_into_files_of_wandb(run_dir: Path) -> None:
    assert sync_run(run_dir, mode="offline") == 6
    (written,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    assert make_run_id(run_dir) in written.name
    content = written.read_bytes()
    for text in (b"held_out/held_out/loss", b"0.25", b"0.4", b"https://ann:***@host/m"):
        assert text in content, text
    assert b"0.777" not in content, "an attempt that was replaced"
    assert b"opensesame" not in content


def test_a_long_run_is_sent_no_faster_than_wandb_takes_it(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sft_dist.wandb_process.MAX_UNSENT_BYTES", 10_000)
    lines = [json.dumps({"event": "step", "step": step, "loss": 0.123456789}) + "\n" for step in range(1, 3001)]
    assert sum(map(len, lines)) > 2 * 65536, "more than a pipe holds"
    (run_dir / "metrics.jsonl").write_text("".join(lines))
    assert sync_run(run_dir, mode="offline") == 3000


def test_a_server_that_refuses_is_one_error(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(BackendError, match=r"not sent to wandb: CommError: .*sync again") as error:
        sync_run(run_dir, init_timeout_s=1)
    assert "\n" not in str(error.value)


def test_no_key_is_one_error(run_dir: Path) -> None:
    with pytest.raises(BackendError, match="No API key configured"):
        sync_run(run_dir)


def test_what_is_no_run_is_refused(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run directory: config\.yaml is missing"):
        sync_run(run_dir.parent)
    (run_dir / "config.yaml").write_text("run: {name: r}\n")
    with pytest.raises(ConfigError, match="name one with --project"):
        sync_run(run_dir)
    (run_dir / "config.yaml").write_text("[1, 2]\n")
    with pytest.raises(ConfigError, match="this is list"):
        sync_run(run_dir, project="p")


@pytest.mark.parametrize("text", ["", "nonsense\n"])
def test_metrics_without_a_record_are_refused(run_dir: Path, text: str) -> None:
    (run_dir / "metrics.jsonl").write_text(text)
    with pytest.raises(ConfigError, match="no records"):
        sync_run(run_dir)
