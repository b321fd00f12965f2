"""The mask made visible: what a stored example tells the model, and which tokens of it are trained.

On a terminal the prompt is dim and trained tokens are green; elsewhere trained runs stand in ⟦ ⟧. Control tokens are
bold, and white space that decides where an answer begins and ends is drawn: `⏎` a line break, `·` a space at the edge
of a run, `→` a tab.
"""

import re
from collections.abc import Iterator

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sft_dist.data.chat import ChatTokenizer, Example
from sft_dist.data.store import TokenStore
from sft_dist.errors import DataError

OPEN, CLOSE = "⟦", "⟧"
STYLES = {"prompt": "dim", "trained": "green", "prompt_control": "dim bold", "trained_control": "bold bright_green"}
# A row must not be able to move the cursor or turn the direction of the terminal that shows it.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)


def show_example(store: TokenStore, index: int, console: Console, *, tokenizer: ChatTokenizer | None = None) -> None:
    """Print one example. tokenizer: the store's, if it is loaded already.

    Raises DataError if the store has no such example.
    """
    if not 0 <= index < len(store):
        raise DataError(f"example {index}: {store.path} has examples 0 to {len(store) - 1}")
    example = store.example(index)
    tokenizer = tokenizer or ChatTokenizer.load(store.tokenizer_dir)
    num_responses = int(store.num_responses[index])
    console.print(
        Text(
            f"example {index}  {example.origin}  {len(example.input_ids)} tokens, {num_responses} trained", style="bold"
        ),
        soft_wrap=True,
    )
    console.print(render_example(example, tokenizer, brackets=console.color_system is None), soft_wrap=True)


def render_example(example: Example, tokenizer: ChatTokenizer, *, brackets: bool) -> Text:
    """An example as styled text. brackets: also enclose trained runs in ⟦ ⟧, for where there is no colour."""
    text = Text()
    for ids, is_trained in _runs(example):
        if is_trained and brackets:
            text.append(OPEN)
        _append_run(text, ids, tokenizer, kind="trained" if is_trained else "prompt")
        if is_trained and brackets:
            text.append(CLOSE)
    return text


def summary(store: TokenStore, console: Console) -> None:
    """Print what was read, kept and dropped, and how long examples are."""
    meta = store.meta
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    for source in meta["sources"]:
        kept = source["last"] - source["first"]
        table.add_row(
            "source", Text(f"{source['path']}  {source['format']}  {kept} of {source['rows_read']} rows kept")
        )
    table.add_row("rows", f"{meta['rows_read']} read, {meta['kept']} kept, {meta['rows_read'] - meta['kept']} dropped")
    for cause, dropped in meta["dropped"].items():
        table.add_row("dropped", Text(f"{dropped['count']} {cause}, e.g. {dropped['examples'][0]}"))
    share = meta["response_tokens"] / meta["tokens"]
    table.add_row("tokens", f"{meta['tokens']}, of which {meta['response_tokens']} are trained ({share:.1%})")
    table.add_row("length", _quantiles(store.lengths))
    table.add_row("trained", _quantiles(store.num_responses))
    table.add_row("store", Text(str(store.path)))
    console.print(table, soft_wrap=True)


def _quantiles(counts: np.ndarray) -> str:
    values = np.quantile(counts, QUANTILES, method="inverted_cdf")
    names = ("shortest", "median", "90%", "99%", "longest")
    return ", ".join(f"{name} {int(value)}" for name, value in zip(names, values, strict=True)) + " tokens"


def _runs(example: Example) -> Iterator[tuple[list[int], bool]]:
    """Runs of tokens that are all trained or all not."""
    edges = np.flatnonzero(np.diff(example.is_response)) + 1
    for ids, mask in zip(np.split(example.input_ids, edges), np.split(example.is_response, edges), strict=True):
        yield ids.tolist(), bool(mask[0])


def _append_run(text: Text, ids: list[int], tokenizer: ChatTokenizer, *, kind: str) -> None:
    """Decode a run with control tokens in their own style; what is between them together, or characters would split."""
    plain: list[int] = []
    for token in [*ids, None]:
        if token is not None and token not in tokenizer.special_ids:
            plain.append(token)
            continue
        if plain:
            text.append(_visible(tokenizer.decode(plain)), style=STYLES[kind])
            plain = []
        if token is not None:
            text.append(tokenizer.decode([token]), style=STYLES[f"{kind}_control"])


def _visible(text: str) -> str:
    body = text.strip(" ")
    left, right = text[: len(text) - len(text.lstrip(" "))], text[len(text.rstrip(" ")) :] if body else ""
    drawn = "·" * len(left) + body + "·" * len(right)
    drawn = UNSAFE.sub(lambda match: f"\\x{ord(match.group()):02x}", drawn)
    return drawn.replace("\t", "→").replace("\n", "⏎\n")
