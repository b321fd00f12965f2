"""The data made visible on a terminal: which tokens of an example are trained, what was dropped, how it will be packed.

On a terminal the prompt is dim and trained tokens are green; elsewhere trained runs stand in ⟦ ⟧. Control tokens are
bold, and white space that decides where an answer begins and ends is drawn: `⏎` a line break, `·` a space at the edge
of a run, `→` a tab.
"""

from collections.abc import Iterable

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sft_dist.console import print_pairs
from sft_dist.data.chat import ChatTokenizer
from sft_dist.data.inspect_figures import Layout, causes, length_bins
from sft_dist.data.inspect_sample import Gap, Glyph, Run, Sample, runs_of
from sft_dist.data.shown import safe
from sft_dist.data.store import TokenStore
from sft_dist.errors import DataError

OPEN, CLOSE = "⟦", "⟧"
STYLES = {"prompt": "dim", "trained": "green", "prompt_control": "dim bold", "trained_control": "bold bright_green"}
QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)
SAMPLE_TOKENS = 600
BAR_WIDTH = 30


def show_example(
    store: TokenStore,
    index: int,
    console: Console,
    *,
    tokenizer: ChatTokenizer | None = None,
    why: str = "",
    max_tokens: int | None = None,
) -> None:
    """Print one example.

    tokenizer: the store's, if it is loaded already. why: what it is an example of. max_tokens: hide the middle of long
    runs so that about so many tokens are shown. Raises DataError if the store has no such example.
    """
    if not 0 <= index < len(store):
        raise DataError(f"example {index}: {store.path} has examples 0 to {len(store) - 1}")
    example = store.example(index)
    tokenizer = tokenizer or ChatTokenizer.load(store.tokenizer_dir)
    head = f"example {index}  {safe(str(example.origin))}  {len(example.input_ids)} tokens, "
    head += f"{int(store.num_responses[index])} trained" + f"  ({why})" * bool(why)
    console.print(Text(head, style="bold"), soft_wrap=True)
    runs = runs_of(example, tokenizer, max_tokens=max_tokens)
    console.print(render_runs(runs, brackets=console.color_system is None), soft_wrap=True)


def show_samples(store: TokenStore, samples: Iterable[Sample], console: Console) -> None:
    """Print these examples, and a row of the most frequent cause for which rows were dropped."""
    tokenizer = ChatTokenizer.load(store.tokenizer_dir)
    for sample in samples:
        is_asked = sample.why.startswith("asked")
        limit = None if is_asked else SAMPLE_TOKENS
        show_example(store, sample.index, console, tokenizer=tokenizer, why=sample.why, max_tokens=limit)
    if dropped := causes(store.meta, "dropped"):
        cause = dropped[0]
        console.print(
            Text(f"dropped, most often: {cause.name} ({_count(cause.count, 'row')})", style="bold"), soft_wrap=True
        )
        console.print(Text("\n".join([*map(safe, cause.examples[:1]), ""])), soft_wrap=True)


def render_runs(runs: Iterable[Run | Gap], *, brackets: bool) -> Text:
    """An example as styled text. brackets: also enclose trained runs in ⟦ ⟧, for where there is no colour."""
    text = Text()
    for run in runs:
        if isinstance(run, Gap):
            text.append(
                f"\n[... {run.num_tokens} tokens hidden, {run.num_trained} of them trained ...]\n", style="italic"
            )
            continue
        kind = "trained" if run.is_trained else "prompt"
        text.append(OPEN if run.is_trained and brackets else "")
        for piece in run.pieces:
            style = STYLES[f"{kind}_control" if piece.is_control else kind]
            text.append("".join(map(_drawn, piece.glyphs)), style=style)
        text.append(CLOSE if run.is_trained and brackets else "")
    return text


def summary(store: TokenStore, console: Console) -> None:
    """Print what was read, kept, dropped and noted, and how long examples are."""
    meta = store.meta
    rows: list[tuple[str, str]] = []
    for source in meta["sources"]:
        kept = f"{source['rows_kept']} of {source['rows_read']} rows kept"
        rows.append(("source", f"{safe(source['path'])}  {source['format']}  {kept}"))
    num_read, num_kept = meta["rows_read"], meta["rows_kept"]
    rows.append(("rows", f"{num_read} read, {num_kept} kept, {num_read - num_kept} dropped"))
    if meta["examples"] != num_kept:
        rows.append(("examples", str(meta["examples"])))
    for title, key in (("dropped", "dropped"), ("noted", "notes")):
        rows += [(title, str(cause)) for cause in causes(meta, key)]
    share = meta["response_tokens"] / meta["tokens"]
    rows += [
        ("tokens", f"{meta['tokens']}, of which {meta['response_tokens']} are trained ({share:.1%})"),
        ("length", _quantiles(store.lengths)),
        ("trained", _quantiles(store.num_responses)),
        ("store", str(store.path)),
    ]
    print_pairs(console, rows, style="bold")


def show_lengths(store: TokenStore, console: Console) -> None:
    """Print histograms of prompt and response tokens side by side, with the cut at data.max_tokens."""
    bins = length_bins(store, max_bins=14)
    prompts, responses = bins.counts(store.lengths - store.num_responses), bins.counts(store.num_responses)
    most = max(*prompts, *responses)
    last = max(place for place, pair in enumerate(zip(prompts, responses, strict=True)) if any(pair))
    table = Table(box=None, pad_edge=False)
    table.add_column("tokens", justify="right")
    for title in ("prompts", "responses"):
        table.add_column("", justify="right")
        table.add_column(title, min_width=BAR_WIDTH, no_wrap=True)
    for place in range(last + 1):
        cells = [bins.label(place)]
        for counts, style in ((prompts, "dim"), (responses, "green")):
            cells += [f"{counts[place]:,}", f"[{style}]{bar(counts[place], most, BAR_WIDTH)}[/{style}]"]
        table.add_row(*cells)
    console.print(table)
    cut = store.meta["max_tokens"]
    too_long = sum(cause.count for cause in causes(store.meta, "dropped") if cause.name == "too_long")
    beyond = f"; {_count(too_long, 'longer row')} dropped" * bool(too_long)
    console.print(
        Text(f"{'─' * 8} cut: data.max_tokens = {cut:,}, prompt and response together{beyond}\n"), soft_wrap=True
    )


def show_layout(layout: Layout | str, console: Console) -> None:
    """Print how full and how balanced the packs of the first steps will be, or why that cannot be said."""
    if isinstance(layout, str):
        console.print(Text(safe(layout)), soft_wrap=True)
        return
    print_pairs(console, layout_lines(layout).items(), style="bold")


def layout_lines(layout: Layout) -> dict[str, str]:
    """The packs of the first steps in words."""
    room = f"{layout.fill:.1%} of packs of {layout.pack_tokens:,} tokens" if layout.pack_tokens else "no packing"
    costs = "the model's costs" if layout.knows_model else "tokens as costs, for the model's are not known"
    held_out = f"; {_count(layout.num_held_out, 'example')} held out of them" if layout.num_held_out else ""
    return {
        "steps": f"{layout.num_laid_out:,} of {layout.num_steps:,} laid out for "
        f"{_count(layout.world_size, 'process')}{held_out}",
        "step": f"{layout.examples_per_step:,.1f} examples, {layout.tokens_per_step:,.0f} tokens, "
        f"{layout.micro_batches:.2f} micro-batches of each process",
        "fill": room,
        "imbalance": f"{layout.imbalance:.3f}, at worst {layout.worst_imbalance:.3f} (1 is perfect; {costs})",
    }


def bar(value: float, most: float, width: int) -> str:
    """A bar of block characters, an eighth of a column fine; something for everything above zero."""
    eighths = max(1, round(8 * width * value / most)) if value else 0
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _count(number: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def _quantiles(counts: np.ndarray) -> str:
    values = np.quantile(counts, QUANTILES, method="inverted_cdf")
    names = ("shortest", "median", "90%", "99%", "longest")
    return ", ".join(f"{name} {int(value)}" for name, value in zip(names, values, strict=True)) + " tokens"


def _drawn(glyph: Glyph) -> str:
    if glyph.kind == "space":
        return "·" * len(glyph.text)
    if glyph.kind == "tab":
        return "→" * len(glyph.text)
    return glyph.text.replace("\n", "⏎\n")
