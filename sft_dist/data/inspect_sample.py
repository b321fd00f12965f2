"""Which examples `inspect` shows, and an example as what it draws: runs of tokens that are all trained or all not.

The middle of a long run is hidden, never its edges: where training begins and ends is what there is to see.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np

from sft_dist.data.chat import ChatTokenizer, Example
from sft_dist.data.shown import UNSAFE, escape, safe
from sft_dist.data.store import TokenStore

# A gap takes a line of its own, so fewer hidden tokens than this save nothing.
SMALLEST_GAP = 16

GlyphKind = Literal["text", "space", "tab", "newline", "escape"]


@dataclass(frozen=True)
class Sample:
    """An example to show, and why."""

    index: int
    why: str


@dataclass(frozen=True)
class Glyph:
    """Text of one kind. space: at the edge of a run; escape: how an unsafe character is written."""

    kind: GlyphKind
    text: str


@dataclass(frozen=True)
class Piece:
    """Tokens that can only be shown together: one, several that share a character, or a whole stretch."""

    ids: tuple[int, ...]
    is_control: bool
    glyphs: tuple[Glyph, ...]


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens that are all trained or all not."""

    is_trained: bool
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Gap:
    """Tokens that are not shown."""

    num_tokens: int
    num_trained: int


def pick_samples(
    store: TokenStore, *, num_random: int, seed: int, asked: Sequence[int] = (), with_extremes: bool = True
) -> list[Sample]:
    """Those asked for, random ones, the longest and the shortest; none twice."""
    reasons: dict[int, list[str]] = {index: ["asked for"] for index in asked}
    extremes = {"longest": int(store.lengths.argmax()), "shortest": int(store.lengths.argmin())}
    if not with_extremes:
        extremes = {}
    known = {*reasons, *extremes.values()}
    rng = np.random.Generator(np.random.PCG64(seed))
    drawn = rng.choice(len(store), size=min(len(store), num_random + len(known)), replace=False).tolist()
    for index in [index for index in drawn if index not in known][:num_random]:
        reasons[index] = ["random"]
    for why, index in extremes.items():
        reasons.setdefault(index, []).append(why)
    return [Sample(index, ", ".join(whys)) for index, whys in reasons.items()]


def runs_of(
    example: Example, tokenizer: ChatTokenizer, *, max_tokens: int | None = None, by_token: bool = False
) -> list[Run | Gap]:
    """An example as runs. max_tokens: show about so many, those nearest to the edges of runs.

    by_token: one piece per token where that is possible; otherwise control tokens alone stand apart.
    """
    is_response = np.asarray(example.is_response)
    is_shown = _shown_tokens(is_response, max_tokens)
    edges = np.flatnonzero(np.diff(is_shown) | (np.diff(is_response) & is_shown[1:])) + 1
    found: list[Run | Gap] = []
    for places in np.split(np.arange(len(is_response)), edges):
        ids, mask = example.input_ids[places], is_response[places]
        if is_shown[places[0]]:
            found.append(Run(bool(mask[0]), tuple(_pieces(ids.tolist(), tokenizer, by_token=by_token))))
        else:
            found.append(Gap(len(ids), int(mask.sum())))
    return found


def _shown_tokens(is_response: np.ndarray, max_tokens: int | None) -> np.ndarray:
    """Which tokens are shown: `[L]` bool."""
    length = len(is_response)
    if max_tokens is None or length <= max_tokens + SMALLEST_GAP:
        return np.ones(length, dtype=np.bool_)
    starts = np.concatenate(([0], np.flatnonzero(np.diff(is_response)) + 1, [length]))
    run = np.searchsorted(starts, np.arange(length), side="right")
    distance = np.minimum(np.arange(length) - starts[run - 1], starts[run] - 1 - np.arange(length))
    reach = int(np.partition(distance, max_tokens - 1)[max_tokens - 1])
    is_shown: np.ndarray = distance < max(1, reach)
    places = np.flatnonzero(is_shown)
    if len(places) > max_tokens:  # more edges than tokens to show: the first and the last of them
        is_shown[places[max_tokens // 2 : -(max_tokens // 2)]] = False
    for stretch in np.split(np.arange(length), np.flatnonzero(np.diff(is_shown)) + 1):
        if len(stretch) < SMALLEST_GAP:
            is_shown[stretch] = True
    return is_shown


def _pieces(ids: list[int], tokenizer: ChatTokenizer, *, by_token: bool) -> Iterator[Piece]:
    for is_control, group in groupby(ids, key=lambda token: token in tokenizer.special_ids):
        stretch = list(group)
        if is_control:
            yield from (Piece((token,), True, (Glyph("text", safe(tokenizer.decode([token]))),)) for token in stretch)
            continue
        text = tokenizer.decode(stretch)
        parts = list(_token_texts(stretch, tokenizer)) if by_token else []
        if "".join(part for _, part in parts) != text:
            parts = [(tuple(stretch), text)]
        yield from _cut_apart(text, parts)


def _token_texts(ids: list[int], tokenizer: ChatTokenizer) -> Iterator[tuple[tuple[int, ...], str]]:
    """Text of each token behind the one before it, with which decoders join it; a character's tokens come together."""
    before = begin = 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[before:end])
        if text.endswith("\ufffd") and end < len(ids):
            continue
        yield tuple(ids[begin:end]), text[len(tokenizer.decode(ids[before:begin])) :]
        before, begin = begin, end


def _cut_apart(text: str, parts: Sequence[tuple[tuple[int, ...], str]]) -> Iterator[Piece]:
    """Draw the text as a whole, for a space is drawn at its edges only, and cut the drawing at the parts."""
    first, last = len(text) - len(text.lstrip(" ")), len(text.rstrip(" "))
    kinds = [_kind_of(char, is_edge=not first <= place < last) for place, char in enumerate(text)]
    begin = 0
    for ids, part in parts:
        drawn = zip(kinds[begin : begin + len(part)], part, strict=True)
        begin += len(part)
        glyphs = [
            Glyph(kind, escape("".join(char for _, char in group)))
            for kind, group in groupby(drawn, key=lambda pair: pair[0])
        ]
        yield Piece(ids, False, tuple(glyphs))


def _kind_of(char: str, *, is_edge: bool) -> GlyphKind:
    if char == " ":
        return "space" if is_edge else "text"
    if char == "\n":
        return "newline"
    if char == "\t":
        return "tab"
    return "escape" if UNSAFE.match(char) else "text"
