"""What `inspect` prints shows the stored mask, also without colour, and lets no row steer the terminal."""

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sft_dist.config import Source
from sft_dist.data.build import StoreSpec, prepare
from sft_dist.data.inspect import show_example, summary
from sft_dist.data.store import TokenStore
from sft_dist.errors import DataError

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
