"""Every command of the README and the pages is run here, or by a test that is named, or it is said why not.

What is looked at: the lines of ```bash blocks, and commands in `code spans`, whose verbs, flags, files and targets must
exist.
"""

import json
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from sft_dist import cli
from sft_dist.data.conversation import Conversation, Origin, RawRow
from sft_dist.data.rows import parse_row
from tests import tiny
from tests.unit.test_status import MadeRun

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))


@dataclass(frozen=True)
class Run:
    """Run by this test, in a directory with the README's recipe, in the order of the table.

    also: words that are added, so that it is possible here. says: what comes out, at least. by: where all of it is run.
    code: None where the machine decides: 1 if the doctor says that there are problems to mend.
    """

    says: str = ""
    also: str = ""
    code: int | None = 0
    by: str = ""


@dataclass(frozen=True)
class Elsewhere:
    """Run by another test (a node of pytest), or by .ci/run (a target of make)."""

    by: str


@dataclass(frozen=True)
class NotRun:
    why: str


FRONT_DOORS = "tests/launch/test_front_doors.py::test_accelerate_torchrun_and_python_draw_one_curve"
LAUNCHED = "tests/launch/test_signals.py::test_two_signals_to_the_launcher_save_once_and_it_returns_0"
HOSTS = "tests/hosts/test_hosts.py::test_a_signal_on_one_host_stops_both_and_another_launcher_goes_on"
PUSHED = "tests/launch/test_push.py::test_a_push_arrives_byte_for_byte_and_what_goes_wrong_is_one_line"
TRIED = "tests/unit/test_doctor.py::test_two_processes_sum_and_train_three_steps"
SCALED = (
    "tests/unit/test_scaling.py::test_the_script_prints_its_tables_and_writes_them_into_a_page_with_the_plot_beside_it"
)
SUBMITTED = "tests/slurm/test_submit.py::test_prepare_train_evaluate"

COMMANDS: dict[str, Run | Elsewhere | NotRun] = {
    # ------------------------------------------------------------ README
    "make demo": Elsewhere("make demo"),
    "make test": Elsewhere("make test"),
    "python3 -m venv .venv && . .venv/bin/activate": NotRun("make does it, in .ci/run"),
    "pip install -c constraints.txt torch==2.13.0": NotRun("it downloads; make does it, in .ci/run"),
    "pip install -c constraints.txt -e '.[dev]'": NotRun("it downloads; make does it, in .ci/run"),
    "sft-dist demo": Elsewhere(
        "tests/launch/test_front_doors.py::test_the_wheel_runs_the_demo_from_an_empty_directory"
    ),
    "python -m pytest": Elsewhere("make test"),
    "sft-dist doctor recipe.yaml": Run("data.train", also="--quick --offline", code=None, by=TRIED),
    "sft-dist plan recipe.yaml --gpus 8x80GB": Run("8x80GB"),
    "sft-dist lint recipe.yaml": Run("rows"),
    "sft-dist prepare recipe.yaml": Run("130 read, 130 kept"),
    "sft-dist inspect recipe.yaml": Run("<|e|>⟧"),
    "sft-dist launch recipe.yaml": Run("-m sft_dist train recipe.yaml", also="--dry-run", by=LAUNCHED),
    "python -m sft_dist train recipe.yaml": Run("done: step 6"),
    "torchrun --standalone --nproc_per_node 2 -m sft_dist train recipe.yaml --engine zero3": Elsewhere(FRONT_DOORS),
    "accelerate launch --config_file configs/accelerate/gpu-8.yaml -m sft_dist train recipe.yaml --engine zero2": (
        Elsewhere(FRONT_DOORS)  # with cpu-2.yaml: this one wants eight GPUs
    ),
    "sft-dist submit recipe.yaml --nodes 2 --gpus-per-node 8 --time 04:00:00": (
        Run("sbatch", also="--dry-run", by=SUBMITTED)
    ),
    "sft-dist status runs/clinic --watch": (
        Elsewhere("tests/unit/test_live.py::test_watch_shows_a_run_of_another_process_and_ends_with_it")
    ),
    "sft-dist report runs/clinic runs/clinic-2 -o compare.html": Run("report: compare.html"),
    "sft-dist evaluate recipe.yaml --before": Run("perplexity"),
    'sft-dist chat runs/clinic --system "You are a clinical calculator."': (
        Elsewhere("tests/launch/test_chat.py::test_a_conversation_in_a_terminal")
    ),
    "sft-dist generate runs/clinic --input rows.jsonl --output answers.jsonl": (
        Run("6 rows answered", also="--max-new-tokens 3")
    ),
    "sft-dist export runs/clinic --average 2 --push-to-hub owner/clinic": Elsewhere(PUSHED),
    # ------------------------------------------------------------ pages
    "sft-dist report runs/clinic": Run("report.html"),
    "sft-dist report runs/a runs/b runs/c -o compare.html": Run("report: compare.html"),
    "sft-dist evaluate recipe.yaml": Run("perplexity"),
    "sft-dist evaluate --compare runs/a runs/b": (
        Elsewhere("tests/launch/test_evaluate_answers.py::test_two_evaluations_are_compared")
    ),
    "torchrun --standalone --nproc_per_node 8 -m sft_dist evaluate recipe.yaml": (
        Elsewhere(
            "tests/launch/test_evaluate_answers.py::test_two_processes_find_what_one_finds_and_a_killed_evaluation_goes_on"
        )  # with two
    ),
    'sft-dist generate runs/clinic --system "You are a clinical calculator." '
    '--prompt "Weight 70 kg, height 175 cm. BMI?"': Run(also="--max-new-tokens 5"),
    "sft-dist generate runs/clinic --input rows.jsonl --output answers.jsonl --batch-size 32": (
        Run("6 of them before", also="--max-new-tokens 3")
    ),
    "sft-dist export runs/clinic": Run("weights after step 6"),
    "sft-dist export runs/clinic --checkpoint 200": (
        Elsewhere(
            "tests/unit/test_export.py::test_what_a_checkpoint_exports_is_byte_for_byte_what_the_end_of_the_run_did"
        )
    ),
    "sft-dist export runs/clinic --average 2": (
        Elsewhere("tests/unit/test_export.py::test_an_average_is_the_plain_mean_of_the_masters")
    ),
    "sft-dist export runs/clinic --dtype bf16 --output clinic-bf16": Run("clinic-bf16"),
    "sft-dist export runs/clinic --push-to-hub owner/clinic --private": Elsewhere(PUSHED),
    "sft-dist doctor": Elsewhere(TRIED),
    "sft-dist doctor recipe.yaml --quick": Run("data.train", also="--offline", code=None),
    "sft-dist doctor --offline --json": (
        Elsewhere("tests/unit/test_doctor.py::test_a_broken_machine_is_told_whole_and_ends_with_1")
    ),
    "sft-dist import theirs.yaml --gpus 8 -o recipe.yaml": (
        Elsewhere("tests/unit/test_migrate.py::test_the_examples_of_the_page_come_out_as_it_shows")
    ),
    "sft-dist plan recipe.yaml": Run("this machine"),
    "sft-dist plan qwen3-8b-8x80gb --gpus 8x80GB": Run("zero3"),
    "sft-dist plan recipe.yaml --gpus 2x8xH100 --mfu 40 --tokens 50000000 --picture plan.svg": Run("plan.svg"),
    "sft-dist status runs/clinic": Run("finished"),
    "sft-dist checkpoints runs/clinic": Run("step-00000006"),
    "sft-dist inspect recipe.yaml --example 0": Run("example 0"),
    "sft-dist inspect recipe.yaml --world-size 8": Run("8 processes"),
    "sft-dist lint a.jsonl folder/ --held-out test.jsonl": Run("rows"),
    "sft-dist lint data.jsonl --strict": Run("rows", code=1),
    "sft-dist lint data.jsonl --json": Run('"rules"'),
    "sft-dist launch recipe.yaml optim.lr=1e-5 --processes 8": Run("--num_processes 8", also="--dry-run", by=LAUNCHED),
    "sft-dist launch recipe.yaml --hosts 2 --host-index 0 --main-host 10.0.0.1 --port 29500": (
        Run("10.0.0.1", also="--dry-run", by=HOSTS)
    ),
    "sft-dist launch recipe.yaml --hosts 2 --host-index 1 --main-host 10.0.0.1 --port 29500": (
        Run("10.0.0.1", also="--dry-run", by=HOSTS)
    ),
    "PROCESSES=4 launch/cpu.sh recipe.yaml": (
        Elsewhere("tests/launch/test_scripts.py::test_cpu_script_trains_from_any_directory")
    ),
    "CUDA_VISIBLE_DEVICES=0,1 launch/all_gpus.sh recipe.yaml train.engine=zero3": (
        Elsewhere(
            "tests/unit/test_launch.py::test_a_script_says_how_it_is_used_and_what_it_starts"
        )  # it wants two GPUs
    ),
    "HOSTS=2 HOST_INDEX=0 MAIN_HOST=10.0.0.1 PORT=29500 launch/several_hosts.sh recipe.yaml": Elsewhere(HOSTS),
    "python benchmarks/scaling.py": Elsewhere(SCALED),
    "python benchmarks/scaling.py --write": Elsewhere(SCALED),  # into a copy of the page
    "rsync -a --exclude .venv --exclude runs ./ cluster:sft/ && ssh cluster": NotRun("it wants another machine"),
    "cd sft && make .venv/installed": Elsewhere("make test"),
    "cp slurm/site.sh ~/site.sh && nano ~/site.sh": NotRun("an editor"),
    "slurm/submit.sh recipe.yaml --site ~/site.sh --nodes 2 --gpus-per-node 8 --time 04:00:00": (
        Elsewhere("tests/unit/test_submit.py::test_submit_sh_hands_everything_on")
    ),
    ".venv/bin/sft-dist status runs/clinic": Run("finished"),
    "sbatch slurm/prepare.sbatch recipe.yaml": Elsewhere(SUBMITTED),
    "sbatch --nodes=2 --gpus-per-node=8 --time=04:00:00 slurm/train.sbatch recipe.yaml optim.lr=1e-5": (
        Elsewhere("tests/slurm/test_train.py::test_completes")
    ),
    "sbatch --gpus-per-node=1 slurm/evaluate.sbatch recipe.yaml": Elsewhere(SUBMITTED),
}
HOW = (
    "give each a line in COMMANDS of tests/launch/test_doc_commands.py: Run(...) where sft-dist can run it in a "
    "directory with the README's recipe, Elsewhere('tests/...::test_name') or Elsewhere('make target') where something "
    "else runs it, NotRun('why') where nothing does"
)


def commands_of(page: Path) -> Iterator[str]:
    """Lines of its ```bash blocks, without comments, continued lines joined."""
    for block in re.findall(r"^ *```bash\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.S | re.M):
        for line in block.replace("\\\n", " ").splitlines():
            if command := " ".join(re.sub(r"(^|\s)#.*", "", line).split()):
                yield command


def test_every_command_of_the_docs_is_run_or_said_why_not() -> None:
    shown = {command: page.name for page in PAGES for command in commands_of(page)}
    unknown = [f"{page}: {command}" for command, page in shown.items() if command not in COMMANDS]
    assert not unknown, "\n".join(["commands that nothing runs; " + HOW, *unknown])
    assert not set(COMMANDS) - set(shown), "these are not in the docs any more: take them out of COMMANDS"


def test_what_is_said_to_run_a_command_exists() -> None:
    for command, how in COMMANDS.items():
        if isinstance(how, NotRun) or not how.by:
            continue
        if how.by.startswith("make "):
            assert f"\n{how.by}\n" in re.sub(r"\w+=\w+ ", "", (ROOT / ".ci" / "run").read_text()), command
        else:
            file, _, name = how.by.partition("::")
            assert name, f"{command}: {how.by} names a file; name the test in it"
            assert f"def {name}(" in (ROOT / file).read_text(), f"{command}: {how.by} does not exist"


@pytest.fixture
def directory(tmp_path: Path, tied_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the pages take for granted: the recipe of the README, with a tiny model, and data beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of the processes that the doctor asks
    for name in ("clinic-2", "a", "b", "c"):
        run = MadeRun(tmp_path / "runs" / name)
        run.start()
        run.log_steps(1, 3)
    for place, seed in {
        "data/train": 0,
        "data/held_out": 1,
        "a": 2,
        "folder/b": 3,
        "test": 4,
        "data": 5,
        "rows": 6,
    }.items():
        path = tmp_path / f"{place}.jsonl"
        path.parent.mkdir(exist_ok=True)
        tiny.write_chats(path, num_examples=130, seed=seed, longest=60)
    (tmp_path / "rows.jsonl").write_text("".join((tmp_path / "a.jsonl").read_text().splitlines(keepends=True)[:6]))
    recipe = yaml.safe_load(block_of_the_readme("yaml"))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"model": {"path": str(tied_model)}}))
    return tmp_path


def block_of_the_readme(language: str) -> str:
    """Its only block in a language."""
    (block,) = re.findall(rf"^ *```{language}\n(.*?)^ *```", PAGES[0].read_text(encoding="utf-8"), re.S | re.M)
    return str(block)


def test_commands_do_what_the_docs_say(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one process, one after the other, and then the plain PyTorch of docs/loss.md on what they left."""
    wrong = []
    for command, how in COMMANDS.items():
        if not isinstance(how, Run):
            continue
        words = shlex.split(command)
        words = words[3:] if words[0] == "python" else words[1:]
        code = cli.main([*words, *shlex.split(how.also)])
        said = "".join(capsys.readouterr())
        expected = int("mend the problems" in said) if how.code is None else how.code
        if code != expected or how.says not in said:
            wrong.append(f"{command}: exit code {code}, expected {expected} and {how.says!r} in\n{said}")
    assert not wrong, "\n".join(wrong)
    by_hand, logged = loss_by_hand(capsys)
    assert by_hand == pytest.approx(logged, abs=2e-6)


def loss_by_hand(capsys: pytest.CaptureFixture[str]) -> tuple[float, float]:
    """What the twenty lines of docs/loss.md print: their loss of step 1, and the one that was logged."""
    page = (ROOT / "docs" / "loss.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"<!-- run by tests/launch/test_doc_commands.py -->\n```python\n(.*?)```", page, re.S)
    exec(compile(code, "loss.md", "exec"), {})
    by_hand, logged = re.findall(r"\d+\.\d+", capsys.readouterr().out)
    return float(by_hand), float(logged)


def test_the_row_of_the_readme_is_read() -> None:
    row = json.loads(block_of_the_readme("json"))
    assert isinstance(parse_row(RawRow(Origin("README", 1), json.dumps(row).encode()), "messages"), Conversation)


VERBS = next(a for a in cli.build_parser()._subparsers._group_actions).choices  # type: ignore[union-attr]
SPAN = re.compile(r"(?<!`)`(sft-dist|make|python|python -m pytest|launch/\w+\.sh|slurm/\w+\.\w+) ([^`\n]+)`(?!`)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_the_text_name_what_exists(page: Path) -> None:
    """Verbs and flags of sft-dist, targets of make, files that python is given, and flags of scripts."""
    targets = re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.M)
    for program, rest in SPAN.findall(page.read_text(encoding="utf-8")):
        words = rest.split()
        if program == "sft-dist" and words[0] not in ("--help", "--version"):
            assert words[0] in VERBS, f"{page.name}: sft-dist {rest}"
            flags = {word.split("=")[0] for word in words if re.match(r"--\w", word)}
            assert flags <= set(VERBS[words[0]]._option_string_actions), f"{page.name}: sft-dist {rest}"
        elif program == "make":
            assert words[0] in targets or "=" in words[0], f"{page.name}: make {rest}"
        elif program.startswith("python"):
            paths = [word.split("::")[0] for word in words if word.endswith(".py") or word.startswith("tests/")]
            assert all((ROOT / path).exists() for path in paths), f"{page.name}: {program} {rest}"
            if words[0].endswith(".py"):
                source = (ROOT / words[0]).read_text(encoding="utf-8")
                unknown = [word for word in words if word.startswith("--") and f'"{word}"' not in source]
                assert not unknown, f"{page.name}: {program} {rest}: no {unknown}"


def test_scripts_that_the_docs_start_can_be_started() -> None:
    scripts = {word for command in COMMANDS for word in command.split() if re.match(r"(launch|slurm)/\w+\.sh", word)}
    assert scripts >= {"launch/cpu.sh", "slurm/submit.sh"}
    assert all(os.access(ROOT / script, os.X_OK) for script in scripts - {"slurm/site.sh"})
