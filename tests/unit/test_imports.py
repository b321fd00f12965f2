"""The tree read downwards is the import order, and what is above the torch line never loads torch."""

import ast
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sft_dist"

# A file imports only files above it. `cli` and its verbs are last and exempt: they import what they need when they run.
ORDER = """
errors shape peaks redact run_files section evaluate_section config console durable package_files quiet freed_pages
world environment
machine accelerate_config plan.known_models plan.memory_parts plan.memory engine_choice plan.machine
submit
commits run_record metrics metric_names wandb_process wandb_sync
heartbeat rank_log hang watchdog
demo.formulas demo.templates demo.dataset demo.model
scoring.result scoring.units scoring.numeric scoring.choice scoring.dates scoring.json_fields scoring.texts
scoring.metrics significance
data.conversation data.row_fields data.strict_json data.readers data.hub data.files data.turns data.rows
data.prompts
data.tokenizer_files data.template data.masks data.encoder data.control_tokens data.chat
data.store data.build data.prepare
data.draws data.schedule data.steps data.held_out data.questions
data.shown
evaluation.answers evaluation.task_scores evaluation.record evaluation.report evaluation.comparison
status status_report live.state live.view live.tracker tensorboard_tracker trackers
plan.planner plan.report plan.picture
data.lint_text data.lint_row data.lint_table data.lint_set data.lint_near data.lint data.lint_report
data.inspect_sample data.inspect_figures data.store_note data.inspect data.page_template data.inspect_page
report.apart report.data report.figures report.numbers report.charts report.evaluation report.parts report.png
report.pages
migrate.ledger migrate.shared migrate.schedule migrate.trainer migrate.trl migrate.llamafactory
migrate.axolotl_data migrate.axolotl migrate.convert migrate.report
-- torch below this line
data.batch
model.attention model.checkpointing model.last_layer model.compile model.kernels model.loss model.load
model.export model.verify model.answering
engine.fragments engine.interface engine.collectives engine.local engine.zero engine.start
optim guard
checkpoint
generate answering answer_rows terminal_chat evaluate
step_measure
model_card export push
oom job banner profiling forward_time
measuring loop
affinity train measure launch
doctor.finding doctor.probe doctor.topology doctor.gpus doctor.versions doctor.host doctor.places doctor.environment
doctor.network doctor.recipe doctor.trial doctor.examine doctor.report
doctor.ask_package doctor.ask_directory doctor.ask_reach doctor.ask_torch doctor.ask_training doctor.all_reduce
doctor.smoke_inputs
demo_run
""".splitlines()
MODULES = [module for line in ORDER if not line.startswith("--") for module in line.split()]
ABOVE_TORCH = [module for line in ORDER[: ORDER.index("-- torch below this line")] for module in line.split()]
VERBS = {f"verbs.{name}" for name in ("words", "training", "runs", "data", "models", "machine")}
EXEMPT = {"cli", "__main__", "__init__"} | VERBS


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imported_by(path: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("sft_dist"):
            base = node.module.removeprefix("sft_dist").removeprefix(".")
            names = {f"{base}.{alias.name}".strip(".") for alias in node.names}
            found |= {base} if base in MODULES else names - {"__version__"}
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.removeprefix("sft_dist.") for alias in node.names if alias.name.startswith("sft_dist.")
            }
    return found


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_imports_only_files_above_it(path: Path) -> None:
    name = name_of(path)
    if name in EXEMPT:
        return
    assert name in MODULES, f"{name} has no place in the order"
    above = set(MODULES[: MODULES.index(name)])
    assert imported_by(path) <= above, f"{name} imports {imported_by(path) - above} from below"


def test_the_order_names_files_that_exist() -> None:
    assert set(MODULES) == {name_of(path) for path in FILES} - EXEMPT


def test_nothing_above_the_line_loads_torch() -> None:
    code = f"""
import importlib, sys
for module in {ABOVE_TORCH}:
    importlib.import_module(f"sft_dist.{{module}}")
    loaded = {{"torch", "transformers"}} & set(sys.modules)
    assert not loaded, f"{{module}} loads {{loaded}}"
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_small_prepare_does_not_load_torch(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
sys.path.insert(0, '.')
from tests import tiny
directory = Path(sys.argv[1])
tiny.write_tokenizer(directory / 'm')
tiny.write_chats(directory / 'd.jsonl', num_examples=20, seed=0)
(directory / 'r.yaml').write_text(f'''
run: {{name: a, dir: {directory}/runs}}
model: {{path: {directory}/m}}
data: {{train: {directory}/d.jsonl}}
batch: {{examples: 8}}
optim: {{lr: 1e-3}}
''')
from sft_dist.cli import main
assert main(['prepare', str(directory / 'r.yaml')]) == 0
assert (next((directory / 'runs' / 'stores').glob('*/COMMITTED'))).exists()
loaded = {'torch', 'transformers', 'deepspeed'} & set(sys.modules)
sys.exit(f'prepare loaded {loaded}' if loaded else 0)
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, timeout=120, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_help_is_instant() -> None:
    """Best of three: the machine may be busy."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "sft_dist", "--help"], check=True, cwd=ROOT, timeout=60, capture_output=True
        )
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.7


def test_the_tree_in_the_readme_is_in_the_order_of_the_imports() -> None:
    text = (ROOT / "README.md").read_text()
    tree = text[text.index("\nsft_dist/\n") : text.index("\ntests/")]
    named = [name.removesuffix(".py").replace("/", ".") for name in re.findall(r"(?:[a-z]+/)?[a-z_]+\.py", tree)]
    places = [MODULES.index(name) for name in named if name in MODULES]
    assert places == sorted(places), [MODULES[place] for place in places]
    folders = tuple(f"{folder}." for folder in re.findall(r"^  ([a-z]+)/ ", tree, re.M))
    patterns = tuple(re.findall(r"([a-z]+/[a-z]+)\*\.py", tree))
    left_out = {
        name
        for name in MODULES
        if name not in named and not name.startswith((*folders, *(pattern.replace("/", ".") for pattern in patterns)))
    }
    assert not left_out
