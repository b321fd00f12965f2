"""What `inspect` prints and writes shows the stored mask, also without colour, and lets no row steer what shows it."""

import io
import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sft_dist import cli
from sft_dist.config import Recipe, Source, load_recipe
from sft_dist.data.build import StoreSpec, prepare
from sft_dist.data.chat import ChatTokenizer, Example
from sft_dist.data.conversation import Origin
from sft_dist.data.inspect import bar, show_example, show_lengths, show_samples, summary
from sft_dist.data.inspect_figures import Bins, fill_counts, lay_out, length_bins
from sft_dist.data.inspect_page import render_page
from sft_dist.data.inspect_sample import Gap, Run, pick_samples, runs_of
from sft_dist.data.prepare import open_or_prepare
from sft_dist.data.schedule import CostModel, global_batches
from sft_dist.data.steps import schedule_of
from sft_dist.data.store import TokenStore
from sft_dist.errors import ConfigError, DataError
from sft_dist.metrics import read_steps
from tests import tiny

ROWS = [
    ("Say yes", "yes"),
    ("lines", "one\n\n\ttwo "),
    ("Grüße [bold]x[/bold]", "你好 🙂"),
    ("evil", "a\x1b[2Jb\u202ec"),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    root = tmp_path_factory.mktemp("inspect")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(special_tokens=["<|endoftext|>"], initial_alphabet=alphabet))
    tokenizer.save(str(root / "tokenizer.json"))
    rows = [{"instruction": question, "output": answer} for question, answer in ROWS]
    (root / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"instruction": "x"}]))
    spec = StoreSpec((Source(path=str(root / "d.jsonl")),), str(root), bad_rows="drop")
    return prepare(spec, store_dir=root / "stores", workers=1)


def shown(store: TokenStore, index: int, *, colour: bool = False) -> str:
    stream = io.StringIO()
    show_example(
        store, index, Console(file=stream, force_terminal=colour, color_system="standard" if colour else None, width=40)
    )
    return stream.getvalue()


def test_without_colour_trained_tokens_stand_in_brackets(store: TokenStore) -> None:
    head, body = shown(store, 0).split("\n", 1)
    count = int(store.num_responses[0])
    assert head == f"example 0  {store.origin(0)}  {store.lengths[0]} tokens, {count} trained"
    assert str(store.origin(0)).endswith("d.jsonl:1")
    assert body == "<|im_start|>user⏎\nSay yes<|im_end|>⏎\n<|im_start|>assistant⏎\n⟦yes<|im_end|>⟧⏎\n\n"


def test_white_space_at_the_edges_is_drawn(store: TokenStore) -> None:
    assert "⟦one⏎\n⏎\n→two·<|im_end|>⟧⏎" in shown(store, 1)


def test_characters_of_several_tokens_and_markup_are_shown_whole(store: TokenStore) -> None:
    text = shown(store, 2)
    assert "Grüße [bold]x[/bold]" in text
    assert "⟦你好 🙂<|im_end|>⟧" in text


def test_rows_cannot_steer_the_terminal(store: TokenStore) -> None:
    text = shown(store, 3)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "⟦a\\x1b[2Jb\\x" + "202ec<|im_end|>⟧" in text


def test_with_colour_the_mask_is_colour(store: TokenStore) -> None:
    text = shown(store, 0, colour=True)
    assert "⟦" not in text
    assert re.search("\x1b\\[32myes\x1b\\[0m", text)  # green
    assert re.search("\x1b\\[2mSay yes|\x1b\\[2muser", text)  # dim


def test_absent_example_is_refused(store: TokenStore) -> None:
    with pytest.raises(DataError, match="has examples 0 to 3"):
        shown(store, 4)


def test_summary_counts_rows_tokens_and_causes(store: TokenStore, tmp_path: Path) -> None:
    stream = io.StringIO()
    summary(store, Console(file=stream, color_system=None, width=300))
    text = stream.getvalue()
    assert "5 read, 4 kept, 1 dropped" in text
    assert "1 bad_structure, e.g. " in text
    assert "d.jsonl:5: no 'output'" in text
    share = int(store.num_responses.sum()) / int(store.lengths.sum())
    assert f"{store.lengths.sum()}, of which {store.num_responses.sum()} are trained ({share:.1%})" in text
    assert f"shortest {store.lengths.min()}" in text
    assert f"longest {store.lengths.max()}" in text
    assert "alpaca" in text
    assert "4 of 5 rows kept" in text


def test_summary_lists_notes_like_causes(store: TokenStore) -> None:
    notes = {"truncated": {"count": 7, "examples": ["d.jsonl:9: 2 turns\x1b[2J left out"]}}
    noted = replace(store, meta={**store.meta, "notes": notes})
    stream = io.StringIO()
    summary(noted, Console(file=stream, color_system=None, width=300))
    assert "noted    7 truncated, e.g. d.jsonl:9: 2 turns\\x1b[2J left out" in stream.getvalue()


# ---------------------------------------------------------------- which examples, and which of their tokens


def test_samples_are_random_longest_and_shortest_and_none_twice(store: TokenStore) -> None:
    longest, shortest = int(store.lengths.argmax()), int(store.lengths.argmin())
    samples = pick_samples(store, num_random=9, seed=0)
    assert sorted(sample.index for sample in samples) == [0, 1, 2, 3]
    assert {sample.index: sample.why for sample in samples}[longest] == "longest"
    assert [sample.why for sample in samples] == ["random", "random", "longest", "shortest"]
    asked = pick_samples(store, num_random=0, seed=0, asked=[shortest, shortest])
    assert [(sample.index, sample.why) for sample in asked] == [
        (shortest, "asked for, shortest"),
        (longest, "longest"),
    ]
    assert [sample.index for sample in pick_samples(store, num_random=0, seed=0, asked=[1], with_extremes=False)] == [1]
    drawn = {pick_samples(store, num_random=1, seed=seed)[0].index for seed in range(20)}
    assert drawn == {0, 1, 2, 3} - {longest, shortest}


def ids_of(runs: list[Run | Gap]) -> list[int]:
    return [token for run in runs if isinstance(run, Run) for piece in run.pieces for token in piece.ids]


@pytest.mark.parametrize("by_token", [False, True])
def test_runs_hold_every_token_once_with_its_mask(store: TokenStore, by_token: bool) -> None:
    tokenizer = ChatTokenizer.load(store.tokenizer_dir)
    for index in range(len(store)):
        example = store.example(index)
        runs = runs_of(example, tokenizer, by_token=by_token)
        assert ids_of(runs) == example.input_ids.tolist()
        trained: list[Run | Gap] = [run for run in runs if isinstance(run, Run) and run.is_trained]
        assert ids_of(trained) == example.input_ids[example.is_response].tolist()
        text = "".join(glyph.text for run in runs if isinstance(run, Run) for p in run.pieces for glyph in p.glyphs)
        assert text == tokenizer.decode(example.input_ids.tolist()).replace("\x1b", "\\x1b").replace(
            "\u202e", "\\x202e"
        )


def test_tokens_that_share_a_character_come_together(store: TokenStore) -> None:
    """Without merges each byte is a token: u-umlaut has two, a Chinese character three, an emoji four."""
    runs = runs_of(store.example(2), ChatTokenizer.load(store.tokenizer_dir), by_token=True)
    sizes = {
        piece.glyphs[0].text: len(piece.ids)
        for run in runs
        if isinstance(run, Run)
        for piece in run.pieces
        if not piece.is_control
    }
    assert (sizes["G"], sizes["ü"], sizes["你"], sizes["🙂"]) == (1, 2, 3, 4)


def long_example(*sizes: int) -> Example:
    """Runs of these lengths, the second and every other one trained."""
    mask = np.concatenate([np.full(size, place % 2 == 1) for place, size in enumerate(sizes)])
    return Example(np.full(len(mask), 5, np.int32), mask, Origin("d.jsonl", 1))


@pytest.mark.parametrize("sizes", [(1000, 10), (1000, 1000), (10, 2000, 10), (500, 3, 500, 3, 500)])
def test_the_middle_of_long_runs_is_hidden_and_counted(store: TokenStore, sizes: tuple[int, ...]) -> None:
    example = long_example(*sizes)
    runs = runs_of(example, ChatTokenizer.load(store.tokenizer_dir), max_tokens=100)
    gaps = [run for run in runs if isinstance(run, Gap)]
    shown = len(ids_of(runs))
    assert 80 <= shown <= 120
    assert shown + sum(gap.num_tokens for gap in gaps) == sum(sizes)
    trained: list[Run | Gap] = [run for run in runs if isinstance(run, Run) and run.is_trained]
    assert len(ids_of(trained)) + sum(gap.num_trained for gap in gaps) == example.is_response.sum()
    edges = sum(isinstance(one, Run) and isinstance(two, Run) for one, two in pairwise(runs))
    assert edges == len(sizes) - 1, "every edge of the mask is in sight"


def test_many_turns_show_the_first_and_the_last(store: TokenStore) -> None:
    runs = runs_of(long_example(*[2] * 1000), ChatTokenizer.load(store.tokenizer_dir), max_tokens=100)
    (gap,) = [run for run in runs if isinstance(run, Gap)]
    assert (gap.num_tokens, gap.num_trained) == (1900, 950)
    assert runs.index(gap) == len(runs) // 2


def test_hidden_tokens_are_said_on_the_terminal(store: TokenStore) -> None:
    stream = io.StringIO()
    console = Console(file=stream, color_system=None, width=200)
    show_example(store, 2, console, max_tokens=20)
    assert re.search(r"\[\.\.\. \d+ tokens hidden, 0 of them trained \.\.\.\]", stream.getvalue())


# ---------------------------------------------------------------- figures


def store_of(store: TokenStore, lengths: list[int], *, max_tokens: int) -> TokenStore:
    return replace(
        store,
        lengths=np.asarray(lengths),
        num_responses=np.asarray(lengths, dtype=np.int32) // 2,
        meta={**store.meta, "max_tokens": max_tokens},
    )


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "is_log", "ends_at_cut"),
    [
        ([2, 3, 4], 4, False, True),
        ([2] * 9 + [4096], 4096, True, True),
        ([100, 120, 146], 512, False, False),
        ([2] * 9 + [900], 2**24, True, False),
        ([2000, 3000, 4000], 4096, False, True),
        ([2], 2**24, False, False),
        ([3] * 9 + [2**24], 2**24, True, True),
    ],
)
def test_bins_hold_every_length_in_ascending_ranges(
    store: TokenStore, lengths: list[int], max_tokens: int, is_log: bool, ends_at_cut: bool
) -> None:
    for max_bins in (14, 32):
        bins = length_bins(store_of(store, lengths, max_tokens=max_tokens), max_bins=max_bins)
        assert (bins.is_log, bins.ends_at_cut) == (is_log, ends_at_cut)
        assert sum(bins.counts(np.asarray(lengths))) == len(lengths)
        assert list(bins.edges) == sorted(set(bins.edges))
        assert len(bins.edges) <= 2 * max_bins
        places = [bins.position(edge) for edge in bins.edges]
        assert places == sorted(places)
        assert places[0] == 0
        assert places[-1] == pytest.approx(1)
        assert all(0 < bins.position(tick) <= 1 or tick == 1 for tick in bins.ticks())


def test_bins_count_by_hand() -> None:
    bins = Bins((1, 2, 5, 9), is_log=False, cut=8)
    assert bins.counts(np.asarray([1, 2, 4, 5, 8])) == [1, 2, 2]
    assert [bins.label(place) for place in range(3)] == ["1", "2–4", "5–8"]
    assert fill_counts([0.0, 0.1, 0.99, 1.0]) == [1, 1, 0, 0, 0, 0, 0, 0, 0, 2]


def test_bars_are_an_eighth_of_a_column_fine() -> None:
    assert bar(8, 8, 4) == "████"
    assert bar(5, 8, 1) == "▋"
    assert bar(1, 10**9, 30) == "▏", "what is there is seen"
    assert bar(0, 8, 4) == ""


def test_lengths_are_drawn_with_the_cut(store: TokenStore) -> None:
    stream = io.StringIO()
    dropped = {"too_long": {"count": 2, "examples": []}}
    long = store_of(store, [40, 60, 60], max_tokens=64)
    show_lengths(
        replace(long, meta={**long.meta, "dropped": dropped}), Console(file=stream, color_system=None, width=120)
    )
    lines = [line.split() for line in stream.getvalue().splitlines()]
    assert ["20–24", "1", "█" * 15, "1", "█" * 15] in lines
    assert ["30–34", "2", "█" * 30, "2", "█" * 30] in lines
    assert "cut: data.max_tokens = 64, prompt and response together; 2 longer rows dropped" in stream.getvalue()


# ---------------------------------------------------------------- the verb


@pytest.fixture
def recipe_path(tmp_path: Path, tied_model: Path) -> Path:
    """Two sources that are mixed, capped and ordered, with rows that are held out and rows that are dropped."""
    tiny.write_chats(tmp_path / "a.jsonl", num_examples=60, seed=0, longest=200)
    tiny.write_chats(tmp_path / "b.jsonl", num_examples=30, seed=1, longest=100)
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write("no json\n" + json.dumps({"messages": [{"role": "user", "content": "x"}]}) + "\n" + "{}\n")
    raw: dict[str, Any] = {
        "run": {"name": "r", "dir": str(tmp_path / "runs"), "seed": 3},
        "model": {"path": str(tied_model)},
        "data": {
            "train": [
                {"path": str(tmp_path / "a.jsonl"), "cap": 40},
                {"path": str(tmp_path / "b.jsonl"), "weight": 1.5},
            ],
            "held_out_share": 0.2,
            "order": "response_length",
            "bad_rows": "drop",
            "max_tokens": 256,
            "workers": 1,
        },
        "batch": {"examples": 12, "pack_tokens": 512},
        "optim": {"lr": 1e-3},
        "train": {"steps": 6},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def opened(path: Path) -> tuple[Recipe, TokenStore]:
    recipe = load_recipe(path)
    return recipe, open_or_prepare(recipe, recipe.data.train, console=Console(quiet=True))


def test_packs_are_laid_out_as_training_lays_them_out(recipe_path: Path) -> None:
    """Fill to the last digit; imbalance up to norms and biases, which config.json's shape leaves out of the costs."""
    assert cli.main(["train", str(recipe_path)]) == 0
    recipe, store = opened(recipe_path)
    layout = lay_out(recipe, store, world_size=1)
    steps = list(read_steps(recipe.run.path / "metrics.jsonl").values())
    assert (layout.num_laid_out, layout.num_steps) == (6, 6)
    assert layout.knows_model
    assert layout.tokens_per_step == np.mean([step["tokens"] for step in steps])
    fills = np.asarray([step["pack_fill"] for step in steps])
    packs = np.asarray([step["tokens"] for step in steps]) / fills / 512
    assert layout.fill == pytest.approx((fills * packs).sum() / packs.sum())
    assert layout.micro_batches == pytest.approx(packs.mean())
    assert layout.imbalance == pytest.approx(np.mean([step["imbalance"] for step in steps]), rel=1e-12)
    assert 0 < layout.num_held_out < len(store) / 2


def test_balance_is_judged_by_the_costs_of_the_model(recipe_path: Path, tied_model: Path) -> None:
    """Two layers of the tied model: 64 wide, 4 heads of 16, 2 of them for keys and values, 128 inside, 32 tokens."""
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128
    cost = CostModel(1.0, 32 * 64 / (2 * layer), 2 * 64 / (2 * layer))
    recipe, store = opened(recipe_path)
    schedule = schedule_of(recipe, store)

    def imbalances(cost: CostModel) -> list[float]:
        batches = global_batches(schedule, first_step=1, world_size=3, pack_tokens=512, cost=cost)
        return [batch.imbalance for batch in batches]

    layout = lay_out(recipe, store, world_size=3)
    assert layout.imbalance == pytest.approx(np.mean(imbalances(cost)), rel=1e-12)
    assert layout.worst_imbalance == max(imbalances(cost))
    assert layout.imbalance != pytest.approx(np.mean(imbalances(CostModel())), rel=2e-3), "tokens alone say otherwise"


def test_more_processes_share_the_micro_batches(recipe_path: Path) -> None:
    recipe, store = opened(recipe_path)
    one, three = (lay_out(recipe, store, world_size=size) for size in (1, 3))
    assert three.micro_batches < one.micro_batches
    assert len(three.fills) % 3 == 0
    assert three.tokens_per_step == one.tokens_per_step
    with pytest.raises(ConfigError, match=r"batch\.examples=12 is fewer examples a step than 13 ranks"):
        lay_out(recipe, store, world_size=13)


def test_inspect_shows_samples_a_dropped_row_lengths_and_packs(
    recipe_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", str(recipe_path), "--random", "2"]) == 0
    out = capsys.readouterr().out
    assert [out.count(f"({why})") for why in ("random", "longest", "shortest")] == [2, 1, 1]
    assert re.search(r"dropped, most often: bad_structure \(1 row\)\n\S+b\.jsonl:33: ", out)
    assert "cut: data.max_tokens = 256" in out
    assert re.search(r"steps +6 of 6 laid out for 1 process; \d+ examples held out of them", out)
    assert re.search(r"fill +\d+\.\d% of packs of 512 tokens", out)


def test_inspect_shows_data_that_cannot_be_packed_and_says_so(
    recipe_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", str(recipe_path), "batch.pack_tokens=64"]) == 0
    out = capsys.readouterr().out
    assert "(longest)" in out
    assert "Packs cannot be laid out: batch.pack_tokens=64 is shorter than an example" in out


@pytest.mark.parametrize("flags", [("--random", "-1"), ("--random", "x"), ("--world-size", "0")])
def test_counts_that_are_none_are_refused(flags: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["inspect", "recipe.yaml", *flags])
    assert "is no whole number of" in capsys.readouterr().err


def test_the_page_is_one_file_that_names_no_other(recipe_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = recipe_path.parent / "page.html"
    assert cli.main(["inspect", str(recipe_path), "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert f"page: {page}" in out
    assert "⟦" not in out, "examples are on the page"
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"https?://|//\w|@import|url\(|\bsrc=|<script|<link|<iframe", text)
    assert set(re.findall(r'href="(.)', text)) == {"#"}
    assert "default-src 'none'; style-src 'unsafe-inline'" in text
    assert text.count('<article class="sample card"') == 5
    assert cli.main(["inspect", str(recipe_path), "--html", str(page), "--random", "0", "--example", "7"]) == 0
    assert page.read_text(encoding="utf-8").count('<article class="sample card"') == 3
    assert cli.main(["inspect", str(recipe_path), "--html", str(page.parent / "none" / "page.html")]) == 2


def test_the_page_is_the_same_every_time_and_escapes_what_it_shows(recipe_path: Path) -> None:
    recipe, store = opened(recipe_path)
    hostile = "<script>alert('x')</script>\"\u202e"
    dropped = {hostile: {"count": 1, "examples": [hostile]}}
    sources = [{**source, "path": hostile} for source in store.meta["sources"]]
    store = replace(store, meta={**store.meta, "dropped": dropped, "notes": dropped, "sources": sources})
    samples = pick_samples(store, num_random=1, seed=0)
    pages = {render_page(recipe, store, samples, layout=hostile) for _ in range(2)}
    assert len(pages) == 1
    (text,) = pages
    assert "<script" not in text
    # Two sources; cause and example among the dropped, the notes and the samples; the words about packs.
    assert text.count("&lt;script&gt;") == 2 + 2 + 2 + 2 + 1
    assert "\u202e" not in text


def test_the_page_stays_small_however_long_rows_are(tmp_path: Path) -> None:
    tiny.write_tokenizer(tmp_path / "m")
    turns = [{"role": role, "content": "ab " * 6_000} for role in ("user", "assistant")]
    chat = [{"role": role, "content": "ab"} for _ in range(2000) for role in ("user", "assistant")]
    text = "".join(json.dumps({"messages": messages}) + "\n" for messages in (turns, chat, turns, turns, turns))
    (tmp_path / "d.jsonl").write_text(text)
    spec = StoreSpec((Source(path=str(tmp_path / "d.jsonl")),), str(tmp_path / "m"), max_tokens=2**20, bad_rows="drop")
    store = prepare(spec, store_dir=tmp_path / "stores", workers=1)
    recipe = load_recipe_of(tmp_path)
    samples = pick_samples(store, num_random=3, seed=0, asked=[0])
    page = render_page(recipe, store, samples, layout="none")
    assert len(page.encode()) < 2e6
    stream = io.StringIO()
    show_samples(store, pick_samples(store, num_random=3, seed=0), Console(file=stream, color_system=None))
    assert len(stream.getvalue()) < 100_000


def load_recipe_of(root: Path) -> Recipe:
    raw = {
        "run": {"name": "r"},
        "model": {"path": str(root / "m")},
        "data": {"train": str(root / "d.jsonl")},
        "batch": {"examples": 1},
        "optim": {"lr": 1},
    }
    (root / "r.yaml").write_text(yaml.safe_dump(raw))
    return load_recipe(root / "r.yaml")
