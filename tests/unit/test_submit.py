"""`sft-dist submit`: the three calls of sbatch, on a machine without SLURM; a stand-in notes what it is given."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sft_dist import cli, package_files
from sft_dist.submit import without_job

# Notes its words and some of its environment; numbers the jobs from 11; refuses the one that it is told to refuse.
SBATCH = """#!/usr/bin/env bash
cd "$(dirname "$0")"
printf '%s\\n' "$*" >>called
echo "account=${SBATCH_ACCOUNT-} inside=${SLURM_JOB_ID-}" >>known
number=$((10 + $(wc -l <called)))
[[ $number != "${REFUSE-}" ]] || { echo "Invalid account" >&2; exit 1; }
echo "$number;here"
"""
SCANCEL = """#!/usr/bin/env bash
echo "$*" >>"$(dirname "$0")/cancelled"
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a recipe, and SLURM's commands on the path."""
    (tmp_path / "r.yaml").write_text(
        "run: {name: a}\nmodel: {path: m}\ndata: {train: d.jsonl}\nbatch: {examples: 8}\noptim: {lr: 1e-3}\n"
    )
    for name, text in (("sbatch", SBATCH), ("scancel", SCANCEL)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for name in [name for name in os.environ if name.startswith(("SFT_DIST_", "SBATCH_", "SLURM_"))]:
        monkeypatch.delenv(name)
    return tmp_path


def called(project: Path) -> list[list[str]]:
    """The words of each call of sbatch."""
    path = project / "bin" / "called"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def test_three_jobs_each_after_the_one_before(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "submit r.yaml optim.lr=1e-5 --engine zero2 --nodes 2 --gpus-per-node 8 --time 04:00:00 --signal-before 300"
    flags = ["--max-requeues", "3", "--allow-change", "--sbatch=--mem=0", "--sbatch=--exclusive", "data.workers=2"]
    assert cli.main([*words.split(), *flags]) == 0
    prepare, train, evaluate = called(project)
    scripts = [next(word for word in call if word.endswith(".sbatch")) for call in (prepare, train, evaluate)]
    assert scripts == [str(package_files.SLURM / f"{step}.sbatch") for step in ("prepare", "train", "evaluate")]
    assert not [word for word in prepare if word.startswith(("--dependency", "--gpus", "--nodes", "--time"))]
    for call, number in ((train, 11), (evaluate, 12)):
        assert {f"--dependency=afterok:{number}", "--kill-on-invalid-dep=yes"} <= set(call)
    asked = {"--nodes=2", "--gpus-per-node=8", "--time=04:00:00", "--signal=B:USR1@300", "--mem=0", "--exclusive"}
    assert asked <= set(train)
    assert "--gpus-per-node=1" in evaluate
    recipe = ["r.yaml", "optim.lr=1e-5", "data.workers=2", "train.engine=zero2"]
    assert prepare[-4:] == evaluate[-4:] == recipe
    assert train[-6:] == ["SFT_DIST_MAX_REQUEUES=3", *recipe, "--allow-change"]
    assert f"SFT_DIST_PYTHON={sys.executable}" in train
    assert f"--output={project}/runs/a/logs/train-%j.log" in train
    assert (project / "runs/a/logs").is_dir(), "SLURM makes no directory, and then writes no log"
    said = capsys.readouterr().out
    for told in (
        "train     job 12, after job 11",
        "sft-dist status runs/a",
        "tail -F runs/a/logs/train-12.log",
        "scancel 12",
    ):
        assert told in said


def test_train_alone(project: Path) -> None:
    assert cli.main("submit r.yaml --no-prepare --no-evaluate --processes 2".split()) == 0
    (train,) = called(project)
    assert not [word for word in train if word.startswith(("--dependency", "--gpus"))]
    assert "SFT_DIST_PROCESSES=2" in train


def test_gpus_may_have_a_type(project: Path) -> None:
    assert cli.main("submit r.yaml --no-prepare --gpus-per-node h100:16".split()) == 0
    train, evaluate = called(project)
    assert "--gpus-per-node=h100:16" in train
    assert "--gpus-per-node=h100:1" in evaluate
    for wrong in ("many", ":8", "h100:"):
        with pytest.raises(SystemExit):
            cli.main(["submit", "r.yaml", "--gpus-per-node", wrong])


def test_dry_run_prints_a_script_that_does_the_same(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["r.yaml", "run.dir=my runs", "--nodes", "2"]
    assert cli.main(["submit", *words, "--dry-run"]) == 0
    script = capsys.readouterr().out
    assert called(project) == []
    assert not (project / "my runs").exists()
    # Numbers without the name of a cluster, as a shell cannot take them apart so simply.
    (project / "bin" / "sbatch").write_text(SBATCH.replace(";here", ""))
    subprocess.run(["bash", "-eu", "-c", script], check=True, timeout=20)
    printed = called(project)
    (project / "bin" / "called").unlink()
    assert cli.main(["submit", *words]) == 0
    assert printed == called(project)
    assert len(printed) == 3


def test_settings_of_the_site_reach_sbatch_and_the_jobs(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "slurm").mkdir()
    (project / "slurm" / "site.sh").write_text(
        'echo "welcome"\nexport SBATCH_ACCOUNT=mine SFT_DIST_PREPARE_OPTIONS="--partition=cpu --comment=\'a b\'"\n'
        'export SFT_DIST_SETUP="module load x"\n'
    )
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SBATCH_ACCOUNT", "other")
    assert cli.main("submit r.yaml --no-evaluate".split()) == 0
    prepare, train = called(project)
    assert (project / "bin" / "known").read_text().splitlines() == ["account=mine inside="] * 2
    assert "--partition=cpu" in prepare
    assert "--partition=cpu" not in train
    assert f"SFT_DIST_SITE={project}/slurm/site.sh" in train
    assert not [word for word in train if word.startswith("SFT_DIST_PYTHON")], "SFT_DIST_SETUP says where it is"


def test_a_refused_job_takes_those_before_it_along(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REFUSE", "13")
    assert cli.main("submit r.yaml".split()) == 2
    assert (project / "bin" / "cancelled").read_text() == "11 12\n"
    assert "Invalid account; cancelled again: 11, 12" in capsys.readouterr().err


def test_what_is_refused_before_anything_is_submitted(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main("submit r.yaml --site none.sh".split()) == 2
    (project / "broken.sh").write_text("export A=$NOT_SET\n")
    assert cli.main("submit r.yaml --site broken.sh".split()) == 2
    assert cli.main("submit r.yaml optim.lrr=1".split()) == 2
    assert called(project) == []
    (project / "bin" / "sbatch").unlink()
    monkeypatch.setenv("PATH", f"{project / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert cli.main("submit r.yaml".split()) == 2
    said = capsys.readouterr().err
    for told in ("--site none.sh: no such file", "broken.sh: bash cannot read it", "optim.lrr", "sbatch is not found"):
        assert told in said
    assert not (project / "runs").exists()


def test_submit_sh_hands_everything_on(project: Path) -> None:
    script = package_files.SLURM / "submit.sh"
    shown = subprocess.run(
        [str(script), "r.yaml", "run.name=b", "--dry-run"],
        env=os.environ | {"SFT_DIST_PYTHON": sys.executable, "PYTHONPATH": str(package_files.SLURM.parent)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "--job-name=train-b" in shown.stdout, shown.stderr


def test_the_job_that_one_submits_from_is_no_option_of_the_new_one() -> None:
    environ = {"SLURM_JOB_ID": "7", "SLURM_MEM_PER_CPU": "1", "SLURM_CONF": "/a", "SBATCH_QOS": "q", "PATH": "/bin"}
    assert without_job(environ) == {"SLURM_CONF": "/a", "SBATCH_QOS": "q", "PATH": "/bin"}
