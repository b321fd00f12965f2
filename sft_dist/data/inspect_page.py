"""The data made visible as one HTML page: no script, no request, complete as a single file.

Everything that comes from the data is escaped by the template; nothing in a row can become markup.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sft_dist import __version__
from sft_dist.config import Recipe
from sft_dist.data.chat import ChatTokenizer
from sft_dist.data.inspect import layout_lines
from sft_dist.data.inspect_figures import Bins, Cause, Layout, causes, fill_counts, length_bins, source_counts
from sft_dist.data.inspect_sample import Sample, runs_of
from sft_dist.data.page_template import page_template
from sft_dist.data.shown import safe
from sft_dist.data.store import TokenStore

SAMPLE_TOKENS = 400
NUM_SOURCES = 100
NUM_STRIPES = 400
LONGEST_TEXT = 400


def write_page(
    path: Path,
    recipe: Recipe,
    store: TokenStore,
    samples: Sequence[Sample],
    *,
    layout: Layout | str,
    part: str = "training data",
) -> None:
    """Write the page. layout: the packs, or why there are none to show. part: which data of the recipe this is."""
    path.write_text(render_page(recipe, store, samples, layout=layout, part=part), encoding="utf-8")


def render_page(
    recipe: Recipe, store: TokenStore, samples: Sequence[Sample], *, layout: Layout | str, part: str = "training data"
) -> str:
    """The page as text; the same for the same store, recipe and samples."""
    tokenizer = ChatTokenizer.load(store.tokenizer_dir)
    sources = source_counts(store)
    return page_template("inspect_page.html").render(
        version=__version__,
        title=f"{recipe.run.name}: {part}",
        tiles=_tiles(store),
        facts=_facts(recipe, store),
        samples=[shown_sample(store, sample, tokenizer) for sample in samples],
        charts=_length_charts(store),
        lengths_intro=_lengths_intro(store),
        rows_intro=f"{store.meta['rows_read']:,} rows were read and {store.meta['rows_kept']:,} kept.",
        sources=[vars(source) | {"path": _clipped(source.path)} for source in sources[:NUM_SOURCES]],
        more_sources=len(sources[NUM_SOURCES:]),
        most_kept=max(source.kept for source in sources),
        dropped=[_cause(cause) for cause in causes(store.meta, "dropped")],
        notes=[_cause(cause) for cause in causes(store.meta, "notes")],
        layout_lines=layout_lines(layout) if isinstance(layout, Layout) else None,
        no_layout=_clipped(layout) if isinstance(layout, str) else None,
        fill_chart=_fill_chart(layout) if isinstance(layout, Layout) and layout.fills else None,
    )


def _tiles(store: TokenStore) -> list[dict[str, str]]:
    meta = store.meta
    tokens, trained = meta["tokens"], meta["response_tokens"]
    num_dropped = meta["rows_read"] - meta["rows_kept"]
    entries = [
        ("Examples kept", f"{meta['examples']:,}", f"of {meta['rows_read']:,} rows"),
        ("Rows dropped", f"{num_dropped:,}", f"{num_dropped / meta['rows_read']:.1%} of rows"),
        ("Tokens", f"{tokens:,}", f"{tokens / meta['examples']:,.0f} an example"),
        ("Trained tokens", f"{trained:,}", f"{trained / tokens:.1%} of tokens"),
        ("Longest example", f"{store.max_length:,}", f"cut at {meta['max_tokens']:,} tokens"),
    ]
    return [{"name": name, "value": value, "note": note} for name, value, note in entries]


def _facts(recipe: Recipe, store: TokenStore) -> dict[str, str]:
    return {
        "Data fingerprint": store.fingerprint,
        "Tokenizer": _clipped(recipe.model.path),
        "Too long, bad rows": f"data.too_long: {store.meta['too_long']}, data.bad_rows: {store.meta['bad_rows']}",
        "Store": _clipped(str(store.path)),
    }


def shown_sample(store: TokenStore, sample: Sample, tokenizer: ChatTokenizer) -> dict[str, Any]:
    """What the template's sample_article draws."""
    example = store.example(sample.index)
    num_tokens, num_trained = len(example.input_ids), int(example.is_response.sum())
    title = sample.why[0].upper() + sample.why[1:]
    if "longest" in sample.why:
        below = store.meta["max_tokens"] - num_tokens
        title += f", nearest the cut: {below:,} tokens below it" if below else ", exactly at the cut"
    edges = np.flatnonzero(np.diff(np.concatenate(([0], example.is_response, [0])).astype(np.int8)))
    return {
        "index": sample.index,
        "title": title,
        "origin": _clipped(str(example.origin)),
        "num_tokens": num_tokens,
        "num_trained": num_trained,
        "share": f"{num_trained / num_tokens:.0%}",
        "strip": [(int(first), int(last - first)) for first, last in edges.reshape(-1, 2)[:NUM_STRIPES]],
        "runs": runs_of(example, tokenizer, max_tokens=SAMPLE_TOKENS, by_token=True),
    }


def _length_charts(store: TokenStore) -> list[dict[str, Any]]:
    bins = length_bins(store)
    prompts = store.lengths - store.num_responses
    return [
        length_chart("prompt-lengths", "Prompt tokens", bins.counts(prompts), bins, caption=_caption(prompts)),
        length_chart(
            "response-lengths",
            "Response tokens",
            bins.counts(store.num_responses),
            bins,
            caption=_caption(store.num_responses),
        ),
        length_chart(
            "example-lengths",
            "Prompt and response together",
            bins.counts(store.lengths),
            bins,
            caption=_caption(store.lengths),
        ),
    ]


def _caption(values: np.ndarray) -> str:
    median = int(np.quantile(values, 0.5, method="inverted_cdf"))
    return f"Median {median:,}, longest {int(values.max()):,} tokens."


def _lengths_intro(store: TokenStore) -> str:
    scale = "logarithmic" if length_bins(store).is_log else "linear"
    too_long = sum(cause.count for cause in causes(store.meta, "dropped") if cause.name == "too_long")
    beyond = f"; {too_long:,} longer rows were dropped" if too_long else ""
    return (
        f"The three charts share one {scale} axis. The cut is at data.max_tokens = {store.meta['max_tokens']:,}, "
        f"for prompt and response together{beyond}."
    )


def length_chart(id: str, title: str, counts: Sequence[int], bins: Bins, *, caption: str) -> dict[str, Any]:
    """What the template's plot draws: examples by tokens. counts: of each bin."""
    ticks = [(bins.position(tick), f"{tick:,}") for tick in bins.ticks()]
    # A label close to the last one would lie on it.
    ticks = [
        *[tick for tick in ticks if tick[0] < 0.88],
        (1.0, f"{bins.cut if bins.ends_at_cut else bins.edges[-1]:,}"),
    ]
    cut = f"cut at {bins.cut:,}" if bins.ends_at_cut else f"cut at {bins.cut:,}, beyond →"
    return {
        "id": id,
        "title": title,
        "caption": caption,
        "unit": "Tokens",
        "cut": {"label": cut, "is_beyond": not bins.ends_at_cut},
        **_bars(
            counts,
            [bins.position(edge) for edge in bins.edges],
            [bins.label(i) for i in range(len(bins.edges) - 1)],
        ),
        "ticks": [{"left": _percent(place), "label": label} for place, label in ticks],
        "counted": "examples",
    }


def _fill_chart(layout: Layout) -> dict[str, Any]:
    counts = fill_counts(layout.fills)
    return {
        "id": "pack-fill",
        "title": "Pack fill",
        "caption": f"{layout.fill:.1%} full on average.",
        "unit": "Fill",
        "cut": None,
        **_bars(counts, [i / 10 for i in range(11)], [f"{10 * i}–{10 * (i + 1)}%" for i in range(10)]),
        "ticks": [{"left": _percent(i / 4), "label": f"{25 * i}%"} for i in range(5)],
        "counted": "packs",
    }


def _bars(counts: Sequence[int], edges: Sequence[float], labels: Sequence[str]) -> dict[str, Any]:
    """Bars in percent of the plot, a little narrower than their bins."""
    most = max(counts)
    bars = []
    for count, label, left, right in zip(counts, labels, edges, edges[1:], strict=False):
        height = max(1.0, 100 * count / most)
        bars.append(
            {
                "left": _percent(left),
                "width": _percent((right - left) * 0.9),
                "top": f"{100 - height:.2f}",
                "height": f"{height:.2f}",
                "label": label,
                "count": count,
            }
        )
    return {"bars": bars, "most": most}


def _cause(cause: Cause) -> dict[str, Any]:
    examples = [_clipped(example) for example in cause.examples]
    return {
        "name": safe(cause.name),
        "count": cause.count,
        "examples": examples,
        "more": max(0, cause.count - len(examples)),
    }


def _clipped(text: str) -> str:
    """One harmless line, the middle of a long one left out: the end of a path and of a reason says most."""
    line = safe(text)
    return line if len(line) <= LONGEST_TEXT else f"{line[: LONGEST_TEXT // 2]} … {line[-LONGEST_TEXT // 2 :]}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"
