"""The page of `sft-dist report` in a real browser, for a real run that was started twice, and for two runs compared.

evaluation.json, scores and answers are written as an evaluation writes them, by a hostile hand.
"""

import json
import math
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sft_dist.config import load_recipe
from sft_dist.job import ResumeOptions
from sft_dist.metrics import read_lines
from sft_dist.report.pages import write_report
from sft_dist.train import run
from tests import tiny
from tests.browser.chromium import BINARY, LEAST_CONTRAST, OUTSIDE, VARIANTS, Page, chromium

pytestmark = pytest.mark.skipif(BINARY is None, reason="no chromium here; `apt-get install chromium` gives one")

BREAKOUT = (
    "</p></pre></title></style><script>document.title='owned'</script><img src=x onerror=\"alert('1')\">"
    "<!-- {{ 7 * 7 }} {% raw %} &lt;b&gt; ]]>"
)
SECRET = "hf_abcdefghijklmnopqrstuvwx"
STEPS, MORE_STEPS = 24, 40


def write_answers(run_dir: Path) -> None:
    (run_dir / "answers").mkdir()
    for step in (8, 16, 24, 40):
        rows = [
            {
                "set": "held_out", "id": str(i), "task": ("calculator", BREAKOUT)[i % 2],
                "prompt": [{"role": "user", "content": f"BMI of {i}? {BREAKOUT} {SECRET}"}],
                "truth": "22.9", "answer": f"after {step}: {BREAKOUT} \x1b[2J", "score": step / 40,
            }
            for i in range(3)
        ]  # fmt: skip
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (run_dir / "answers" / f"step-{step:08d}.jsonl").write_text(text + '{"set": "cut o')


def write_evaluation(run_dir: Path) -> None:
    before = {"score": 0.04, "ci": [0.01, 0.13]}
    task = {"metric": "numeric", "n": 50, "score": 0.52, "ci": [0.38, 0.65], "before": before, "p_value": 2e-7}
    losses = {"examples": 6, "response_tokens": 60, "example_mean": 1.25, "token_mean": 1.5, "perplexity": 4.48}
    tasks = {"calculator": task, BREAKOUT: task | {"before": None, "p_value": None}}
    found = {"model": BREAKOUT, "dtype": "float32", "sets": {"held_out": losses | {"tasks": tasks, "worst": []}}}
    (run_dir / "evaluation.json").write_text(json.dumps(found))
    with (run_dir / "metrics.jsonl").open("a") as file:
        for step in (8, 16, 24):
            score = {"event": "score", "step": step, "set": "held_out", "task": BREAKOUT, "score": step / 40, "n": 50}
            file.write(json.dumps(score | {"metric": "numeric", "attempt": 2}) + "\n")


class Reported:
    """Two runs, the first started twice, and their pages."""

    def __init__(self, root: Path, model: Path) -> None:
        tiny.write_chats(root / "held.jsonl", num_examples=6, seed=5, longest=60)
        data = {"held_out": str(root / "held.jsonl")}
        for name, lr in (("clinic", 3e-3), ("slow", 1e-3)):
            train = {"steps": STEPS, "eval_every": 8, "save_every": 12}
            self._train(tiny.write_recipe(root, model, name=name, data=data, train=train, optim={"lr": lr}))
        self.run_dir, self.other_dir = root / "runs" / "clinic", root / "runs" / "slow"
        train = {"steps": MORE_STEPS, "eval_every": 8, "save_every": 12}
        on = tiny.write_recipe(root, model, name="clinic", data=data, train=train, optim={"lr": 3e-3})
        on.write_text(on.read_text().replace("report: false", "report: true"))
        self._train(on)
        self.own_page = self.run_dir / "report.html"
        assert self.own_page.is_file(), "written when the run ended"
        assert (self.run_dir / "curve.png").read_bytes()[:4] == b"\x89PNG"
        write_evaluation(self.run_dir)
        write_answers(self.run_dir)
        self._plan_memory()
        write_report([self.run_dir])
        self.comparison = root / "comparison.html"
        write_report([self.run_dir, self.other_dir], output=self.comparison)
        self.lines = list(read_lines(self.run_dir / "metrics.jsonl"))

    def _train(self, recipe: Path) -> None:
        console = Console(file=(recipe.parent / "log.txt").open("w"), width=120)
        run(load_recipe(recipe), console=console, resume=ResumeOptions(allow_change=True))
        console.file.close()

    def _plan_memory(self) -> None:
        path = self.run_dir / "run.json"
        record = json.loads(path.read_text())
        record["starts"][-1]["planned_memory"] = {"weights": 2**28, BREAKOUT: 2**29}
        path.write_text(json.dumps(record))

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == "step"]


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory, tied_model: Path) -> Reported:
    return Reported(tmp_path_factory.mktemp("report"), tied_model)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(browser: Page, reported: Reported) -> Page:
    browser.open(reported.own_page, width=1280, height=900, scheme="light")
    return browser


@pytest.mark.parametrize("which", ["own_page", "comparison"])
@pytest.mark.parametrize(("width", "height", "scheme"), VARIANTS)
def test_pages_fit_are_legible_silent_and_ask_for_nothing(
    browser: Page, reported: Reported, which: str, width: int, height: int, scheme: str
) -> None:
    path: Path = getattr(reported, which)
    browser.open(path, width=width, height=height, scheme=scheme)
    browser.screenshot(f"report-{which}-{width}-{scheme}")
    assert browser.evaluate("document.scrollingElement.scrollWidth") <= width
    assert browser.evaluate(OUTSIDE) == []
    assert browser.requested() == [path.as_uri()]
    assert browser.complaints() == []
    contrast, where, _ = browser.evaluate(LEAST_CONTRAST)
    assert contrast >= 4.5, where  # what WCAG 2 asks of text of this size


@pytest.mark.parametrize("which", ["own_page", "comparison"])
def test_what_is_hostile_is_text(browser: Page, reported: Reported, which: str) -> None:
    browser.open(getattr(reported, which), width=1280, height=900, scheme="light")
    assert browser.evaluate("document.title") == {"own_page": "clinic", "comparison": "2 runs compared"}[which]
    assert browser.evaluate("document.querySelectorAll('script, img, iframe, object, link').length") == 0
    attributes = "[...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames()).filter(n => /^on/.test(n))"
    assert browser.evaluate(attributes) == []
    assert BREAKOUT in browser.evaluate("document.querySelector('.evaluation').textContent")


def test_answers_stand_side_by_side_without_secrets(page: Page) -> None:
    text = page.evaluate("document.querySelector('.question .turn').textContent")
    assert BREAKOUT in text
    assert SECRET not in page.evaluate("document.documentElement.outerHTML")
    steps = "[...document.querySelector('.question').querySelectorAll('[data-step]')].map(e => +e.dataset.step)"
    assert page.evaluate(steps) == [8, 16, 24, 40]
    tops = "[...document.querySelector('.answers').children].map(e => e.getBoundingClientRect().top)"
    assert len(set(page.evaluate(tops))) == 1, "in one row on a desktop"
    assert "\\x1b[2J" in page.evaluate("document.querySelector('.answer').textContent")


def points(page: Page, path: str) -> list[tuple[float, float]]:
    words = page.evaluate(f"document.querySelector('{path}').getAttribute('d')").replace("h0", "")
    pairs = [pair.split() for pair in words.replace("M", "L").split("L")[1:]]
    return [(float(x), float(y)) for x, y in pairs]


@pytest.mark.parametrize(
    ("chart", "kind", "event", "key", "is_log"),
    [
        ("loss", "raw", "step", "loss", False),
        ("loss", "dots", "held_out", "held_out_loss", False),
        ("lr", "smooth", "step", "lr", False),
        ("grad-norm", "raw", "step", "grad_norm", True),
        ("tokens-per-s", "raw", "step", "tokens_per_s", False),
        ("pack-fill", "raw", "step", "pack_fill", False),
    ],
)
def test_curves_are_the_numbers_of_metrics_jsonl(
    page: Page, reported: Reported, chart: str, kind: str, event: str, key: str, is_log: bool
) -> None:
    """A point is where its step and value are, to the tenth of a unit of 1000 that is written."""
    last = {line["step"]: line[key] for line in reported.lines if line["event"] == event}
    drawn = points(page, f"#{chart} .plot path.{kind}")
    assert len(drawn) == len(last)
    assert page.evaluate(f"+document.querySelector('#{chart} .plot path.{kind}').dataset.count") == len(last)
    values = [math.log(value) if is_log else value for _, value in sorted(last.items())]
    low, high = values.index(min(values)), values.index(max(values))
    scale = (drawn[high][1] - drawn[low][1]) / (values[high] - values[low])
    for value, (_, y) in zip(values, drawn, strict=True):
        assert y == pytest.approx(drawn[low][1] + scale * (value - values[low]), abs=0.25)
    assert drawn[-1][0] == 1000
    xs, steps = [x for x, _ in drawn], sorted(last)
    per_step = (xs[-1] - xs[0]) / (steps[-1] - steps[0])
    assert xs == pytest.approx([xs[0] + per_step * (step - steps[0]) for step in steps], abs=0.15)
    assert scale < 0, "up is more"


def test_marks_tiles_and_tables_say_what_the_files_say(page: Page, reported: Reported) -> None:
    marks = "[...document.querySelectorAll('#loss .mark')].map(m => m.classList[1] + m.dataset.step)"
    assert page.evaluate(marks) == [f"change{STEPS}"], "it went on with more steps, which makes another curve"
    said = page.evaluate("document.querySelector('main').innerText.replace(/\\s+/g, ' ')")
    assert f"{MORE_STEPS} steps, the last attempt of each. Started again 1 time." in said
    held_out = {line["step"]: line["held_out_loss"] for line in reported.lines if line["event"] == "held_out"}
    least = min(held_out.values())
    assert f"Held-out loss {held_out[MORE_STEPS]:.4g} {held_out[0]:.4g} before; least {least:.4g}" in said
    tokens = sum(line["tokens"] for line in reported.steps)
    assert f"Tokens {tokens:,} " in said
    assert "prompts are also trained on" in said, "what the banner warned of"
    assert "planned in all 0.75" in said
    assert "52.0% 38.0% to 65.0%" in said
    assert "< 0.0001" in said
    assert f"Rows {40} kept of {40}" in said
    counts = page.evaluate("[...document.querySelectorAll('#lengths [data-count]')].map(e => +e.dataset.count)")
    assert sum(counts) == 40
    assert page.evaluate("document.querySelectorAll('.sample .trained').length") == 3
    assert page.evaluate("document.querySelectorAll('#starts tbody tr').length") == 2
    assert f"steps: {MORE_STEPS}" in page.evaluate("document.querySelector('#recipe').textContent")


def test_a_comparison_says_what_differs_and_nothing_else(browser: Page, reported: Reported) -> None:
    browser.open(reported.comparison, width=1280, height=900, scheme="light")
    cells = "[...document.querySelectorAll('#recipes tbody tr')].map(r => [...r.children].map(c => c.innerText))"
    rows = browser.evaluate(cells)
    assert rows == [["run.report", "True", "False"], ["optim.lr", "0.003", "0.001"], ["train.steps", "40", "24"]]
    counts = "[...document.querySelectorAll('#loss .plot path')].map(p => [p.classList[0], +p.dataset.count])"
    assert browser.evaluate(counts) == [["run-1", 40], ["run-2", 24], ["dots-1", 6], ["dots-2", 4]]
    figures = "[...document.querySelectorAll('#runs tbody tr')].map(r => r.innerText.replace(/\\s+/g, ' '))"
    first, second = browser.evaluate(figures)
    assert "finished, 40 steps" in first
    assert "finished, 24 steps" in second


@pytest.mark.parametrize("which", ["own_page", "comparison"])
def test_structure_says_what_is_what(browser: Page, reported: Reported, which: str) -> None:
    browser.open(getattr(reported, which), width=1280, height=900, scheme="light")
    levels = browser.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(h => +h.tagName[1])")
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    ids = browser.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    targets = browser.evaluate("[...document.querySelectorAll('a')].map(a => a.getAttribute('href').slice(1))")
    assert set(targets) <= set(ids)
    told = "[...document.querySelectorAll('svg')].every(s => s.ariaHidden || s.ariaLabel)"
    assert browser.evaluate(told)


def test_a_run_of_files_alone_still_has_its_page(reported: Reported, browser: Page, tmp_path: Path) -> None:
    """Nothing but metrics.jsonl, as of a run of before the rest was written."""
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(reported.run_dir / "metrics.jsonl", bare)
    write_report([bare])
    browser.open(bare / "report.html", width=360, height=740, scheme="dark")
    assert browser.evaluate("document.scrollingElement.scrollWidth") <= 360
    assert browser.evaluate("+document.querySelector('#loss .plot path').dataset.count") == MORE_STEPS
