"""The page of `inspect --html` in a real browser: it fits, is legible, asks for nothing, and its numbers are right.

One browser for all tests; desktop and phone, light and dark.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sft_dist.config import Recipe, parse_recipe
from sft_dist.data.build import StoreSpec, prepare
from sft_dist.data.chat import ChatTokenizer
from sft_dist.data.inspect_figures import Layout, causes, lay_out, length_bins
from sft_dist.data.inspect_page import SAMPLE_TOKENS, write_page
from sft_dist.data.inspect_sample import SMALLEST_GAP, Sample, pick_samples
from sft_dist.data.store import TokenStore
from tests.browser.chromium import BINARY, LEAST_CONTRAST, OUTSIDE, VARIANTS, Page, chromium

pytestmark = pytest.mark.skipif(BINARY is None, reason="no chromium here; `apt-get install chromium` gives one")

MAX_TOKENS = 2000
WORDS = "dose renal acute daily fever 12 40 mg blood pressure is of the and a with pain chest therapy review".split()
BREAKOUT = (
    "</span></mark></pre></title></style><script>document.title='owned'</script><img src=x onerror=\"alert('1')\">"
    "<!-- {{ 7 * 7 }} {% raw %} &lt;b&gt; ]]>"
)
SCRIPTS = "\u4f60\u597d \U0001f642 \U0001f469\u200d\u2695\ufe0f \u0645\u0631\u062d\u0628\u0627 caf\u00e9"
UNSAFE = "a\x01b\x1b[2Jc\u202ed\u2066e\u061cf"
# A name of a file is shown too.
FILE_NAME = "rows <b onclick='x()'>\"&amp;.jsonl"


def write_rows(path: Path) -> None:
    """Ordinary rows of very different lengths, a hostile one first, two that are too long, three that are bad."""
    rng = np.random.default_rng(0)

    def words(count: float) -> str:
        return " ".join(rng.choice(WORDS, size=max(1, int(count))))

    rows = [{"instruction": f"{BREAKOUT} {SCRIPTS}", "output": f"  {BREAKOUT}\n\t{SCRIPTS} {UNSAFE} "}]
    rows += [
        {"instruction": words(rng.lognormal(3.5, 1)), "output": words(rng.lognormal(2.5, 1))[:4000]} for _ in range(150)
    ]
    rows += [{"instruction": words(1500), "output": words(200)}]
    rows += [{"instruction": words(3000), "output": "long"}] * 2 + [{"instruction": "<i>no answer</i>"}] * 3
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_words_tokenizer(directory: Path) -> None:
    """Byte-level, with a token for most words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3 + ["system user assistant"], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))


def make_recipe(root: Path) -> Recipe:
    raw = {
        "run": {"name": "clinic", "dir": str(root / "runs")},
        "model": {"path": str(root)},
        "data": {"train": str(root / FILE_NAME), "max_tokens": MAX_TOKENS, "bad_rows": "drop", "workers": 1},
        "batch": {"examples": 48, "pack_tokens": 4096},
        "optim": {"lr": 1e-5},
        "train": {"epochs": 3},
    }
    return parse_recipe(raw, origin="test")


class Shown:
    """A page, and what it is a page of."""

    def __init__(self, root: Path) -> None:
        write_rows(root / FILE_NAME)
        write_words_tokenizer(root)
        self.recipe = make_recipe(root)
        spec = StoreSpec.of(self.recipe, self.recipe.data.train)
        store = prepare(spec, store_dir=root / "stores", workers=1)
        notes = {"control_tokens_neutralised": {"count": 3, "examples": ["d.jsonl:7: turn 1 contains '<|im_end|>'"]}}
        self.store: TokenStore = replace(store, meta={**store.meta, "notes": notes})
        self.samples: list[Sample] = pick_samples(self.store, num_random=3, seed=0, asked=[0])
        self.layout: Layout = lay_out(self.recipe, self.store, world_size=2)
        self.tokenizer = ChatTokenizer.load(store.tokenizer_dir)
        self.path = root / "page.html"
        write_page(self.path, self.recipe, self.store, self.samples, layout=self.layout)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    return Shown(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(browser: Page, shown: Shown) -> Page:
    browser.open(shown.path, width=1280, height=900, scheme="light")
    return browser


@pytest.mark.parametrize(("width", "height", "scheme"), VARIANTS)
def test_page_fits_is_silent_and_asks_for_nothing(
    browser: Page, shown: Shown, width: int, height: int, scheme: str
) -> None:
    browser.open(shown.path, width=width, height=height, scheme=scheme)
    browser.screenshot(f"inspect-{width}-{scheme}")
    # Not innerWidth, which on a phone grows with what does not fit.
    assert browser.evaluate("document.scrollingElement.scrollWidth") <= width
    assert browser.evaluate(OUTSIDE) == [], "nothing is cut off at the right"
    assert browser.requested() == [shown.path.as_uri()]
    assert browser.complaints() == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_is_legible(browser: Page, shown: Shown, scheme: str) -> None:
    """4.5 is what WCAG 2 asks of text of this size."""
    browser.open(shown.path, width=1280, height=900, scheme=scheme)
    contrast, where, seen = browser.evaluate(LEAST_CONTRAST)
    assert contrast >= 4.5, where
    assert seen == ["axis", "ctl", "cut", "gap", "prompt", "trained", "where"]
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 200) == (scheme == "dark")


def test_trained_text_is_marked_without_colour_too(page: Page) -> None:
    style = "getComputedStyle(document.querySelector('.trained')"
    assert page.evaluate(f"{style}).textDecorationLine") == "underline"
    assert page.evaluate(f"{style}, '::before').content + {style}, '::after').content") == '"⟦""⟧"'


def test_samples_show_the_stored_mask(page: Page, shown: Shown) -> None:
    """Ids in the titles of tokens, split by mask, are the store's; what is hidden is counted."""
    samples = page.evaluate(
        """[...document.querySelectorAll('.sample')].map(s => ({
            index: +s.id.replace('example-', ''), tokens: +s.dataset.tokens, trained: +s.dataset.trained,
            ids: ['.trained', '.prompt'].map(kind => [...s.querySelectorAll(kind + ' .tok')]
                .flatMap(t => t.title.split(' ').slice(1).map(Number))),
            hidden: [...s.querySelectorAll('.gap')].map(g => [+g.dataset.tokens, +g.dataset.trained]),
            text: s.querySelector('.mask').textContent}))"""
    )
    assert [sample["index"] for sample in samples] == [sample.index for sample in shown.samples]
    assert len(samples) == 6
    for sample in samples:
        example = shown.store.example(sample["index"])
        assert sample["tokens"] == len(example.input_ids)
        assert sample["trained"] == shown.store.num_responses[sample["index"]]
        trained, prompt = sample["ids"]
        hidden, hidden_trained = np.asarray(sample["hidden"] or [[0, 0]]).sum(axis=0)
        assert len(trained) + hidden_trained == sample["trained"]
        assert len(trained) + len(prompt) + hidden == sample["tokens"]
        if not hidden:
            assert trained == example.input_ids[example.is_response].tolist()
            assert prompt == example.input_ids[~example.is_response].tolist()
    assert sum(bool(sample["hidden"]) for sample in samples) == 1, "only the longest is cut"
    longest = next(sample for sample in samples if sample["hidden"])
    # A gap too small to be worth hiding is shown after all; there are two runs with a middle.
    assert len(longest["ids"][0]) + len(longest["ids"][1]) < SAMPLE_TOKENS + 2 * SMALLEST_GAP


def test_a_hostile_row_is_text(page: Page, shown: Shown) -> None:
    text = page.evaluate("document.querySelector('#example-0 .mask').textContent")
    escaped = UNSAFE
    for char in "\x01\x1b\u202e\u2066\u061c":
        escaped = escaped.replace(char, f"\\x{ord(char):02x}")
    example = shown.store.example(0)
    assert text == shown.tokenizer.decode(example.input_ids.tolist()).replace(UNSAFE, escaped)
    assert page.evaluate("document.title") == "clinic: training data"
    assert page.evaluate("document.querySelectorAll('script, img, iframe, object, link').length") == 0
    assert (
        page.evaluate(
            "[...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames()).filter(n => /^on/.test(n))"
        )
        == []
    )
    assert page.evaluate("document.querySelector('#sources .path').textContent").endswith(FILE_NAME)
    assert "<i>no answer</i>" not in page.evaluate("document.querySelector('#dropped').innerHTML")


def test_charts_and_tables_count_what_the_store_holds(page: Page, shown: Shown) -> None:
    def counts(where: str) -> list[int]:
        found: list[int] = page.evaluate(
            f"[...document.querySelectorAll('{where} [data-count]')].map(e => +e.dataset.count)"
        )
        return found

    store, kept = shown.store, len(shown.store)
    lengths = {
        "prompt-lengths": store.lengths - store.num_responses,
        "response-lengths": store.num_responses,
        "example-lengths": store.lengths,
    }
    for chart, values in lengths.items():
        assert sum(counts(f"#{chart} svg")) == kept
        assert counts(f"#{chart} svg") == [count for count in length_bins(store).counts(values) if count]
        assert page.evaluate(f"document.querySelectorAll('#{chart} tbody tr').length") == len(counts(f"#{chart} svg"))
    assert sum(counts("#pack-fill svg")) == len(shown.layout.fills)
    assert counts("#sources") == [kept]
    assert counts("#dropped") == [cause.count for cause in causes(shown.store.meta, "dropped")] == [3, 2]
    assert counts("#notes") == [3]
    said = page.evaluate("document.querySelector('main').innerText.replace(/\\s+/g, ' ')")
    assert f"Examples kept {kept} of {kept + 5} rows" in said
    assert f"Trained tokens {int(shown.store.num_responses.sum()):,}" in said
    assert "Dropped most often: bad_structure (3 rows)" in said
    assert f"{shown.layout.fill:.1%} of packs of 4,096 tokens" in said
    assert shown.store.fingerprint in said
    assert f"cut is at data.max_tokens = {MAX_TOKENS:,}" in said
    assert "2 longer rows were dropped" in said


def test_bars_are_as_tall_as_their_counts(page: Page) -> None:
    bars = page.evaluate(
        "[...document.querySelectorAll('#prompt-lengths rect')]"
        ".map(bar => [+bar.dataset.count, bar.getBoundingClientRect().height])"
    )
    most, tallest = max(bars)
    for count, height in bars:
        # One percent is the least that is drawn; coordinates are written with two decimals.
        assert height == pytest.approx(max(tallest / 100, tallest * count / most), abs=0.1)


def test_structure_says_what_is_what(page: Page) -> None:
    assert page.evaluate("document.documentElement.lang") == "en"
    assert "width=device-width" in page.evaluate("document.querySelector('meta[name=viewport]').content")
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(h => +h.tagName[1])")
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert page.evaluate("document.querySelectorAll('th:not([scope])').length") == 0
    assert page.evaluate("document.querySelectorAll('main').length") == 1
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    assert set(page.evaluate("[...document.querySelectorAll('a')].map(a => a.getAttribute('href').slice(1))")) <= set(
        ids
    )
