"""Near-duplicates by MinHash and banding over word 5-shingles, each pair verified by its exact Jaccard similarity.

Shingles wait in a temporary file. Memory holds 12 bytes a row while rows are added; then 12 hashes a row and what it
takes to sort by one of them, about 250 bytes in all, and the pairs to verify. Shingles that more than 2% of the rows
share are the template of the data, not its content, and are left out; rows that differ in a number are different
questions.
"""

import contextlib
import re
import tempfile
from array import array
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from sft_dist.errors import DataError

SHINGLE_WORDS = 5
MIN_SHINGLES = 10
"""Rows with fewer shingles of their own are not compared: one word changes half of them."""
SIMILAR = 0.9
NUM_BANDS, BAND_ROWS = 12, 8
"""A pair of similarity s becomes a candidate with probability 1 - (1 - s**8)**12: 0.999 at 0.9, 0.51 at 0.7."""
TEMPLATE_SHARE, TEMPLATE_ROWS = 0.02, 10
"""A shingle in more than this share of the rows, and in more than this many, belongs to a template."""
SKETCH_BITS = 22
BUCKET_NEIGHBOURS = 4
"""Members of a bucket compared with each row, besides its first: a bound for data that is one template."""
CHUNK_SHINGLES = 2**18

# A script without spaces counts by character.
_WORD = re.compile(
    r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+"
)
_NUMBER = re.compile(r"\d+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class Pair(NamedTuple):
    """Rows by the order in which they were added; similarity: exact Jaccard of their own shingles."""

    first: int
    second: int
    similarity: float


class NearDuplicates:
    """Collects rows, then finds the pairs. Deterministic; use as a context manager, for the temporary file."""

    def __init__(self) -> None:
        self._counts, self._numbers = array("I"), array("Q")
        with self._naming_the_folder():
            self._file = tempfile.TemporaryFile(prefix="sft-dist-lint-")  # noqa: SIM115, closed by __exit__

    def __enter__(self) -> "NearDuplicates":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # a full disk fails again when the rest of the buffer is written
            self._file.close()

    def __len__(self) -> int:
        return len(self._counts)

    def add(self, text: str) -> None:
        """Add the next row."""
        hashes = shingles(text)
        with self._naming_the_folder():
            self._file.write(hashes.tobytes())
        self._counts.append(len(hashes))
        self._numbers.append(xxhash.xxh3_64_intdigest(" ".join(_NUMBER.findall(text)).encode()))

    def pairs(self, is_held_out: NDArray[np.bool_], *, skip: NDArray[np.int64] | None = None) -> Iterator[Pair]:
        """Each training row with the first near-duplicate before it, then each held-out row with the first trained on.

        is_held_out: `[N]`; such rows may lie anywhere, and are not compared with each other.
        skip: rows that are left out, such as exact duplicates.
        """
        with self._naming_the_folder():
            self._file.flush()
        counts = np.array(self._counts, dtype=np.uint32)
        if not counts.any():
            return
        offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        stored = np.memmap(self._file, dtype=np.uint32, mode="r")
        is_template = _shingle_counts(stored) > max(TEMPLATE_ROWS, TEMPLATE_SHARE * int((counts > 0).sum()))
        bands, sizes = _band_hashes(stored, offsets, is_template)
        if skip is not None:
            sizes[skip] = 0
        numbers = np.array(self._numbers, dtype=np.uint64)
        done = -1
        for first, second in _candidates(bands, sizes, numbers, is_held_out):
            if second == done:
                continue
            similarity = _jaccard(
                *(_own(stored[offsets[row] : offsets[row + 1]], is_template) for row in (first, second))
            )
            if similarity >= SIMILAR:
                yield Pair(first, second, similarity)
                done = second

    @contextlib.contextmanager
    def _naming_the_folder(self) -> Iterator[None]:
        """Raises DataError where the temporary file cannot be made or written."""
        try:
            yield
        except OSError as error:
            num_bytes = 4 * sum(self._counts)
            raise DataError(
                f"{_temporary_folder()}: cannot take the temporary file in which lint looks for near-duplicates "
                f"(4 bytes a word, {num_bytes / 1e6:.1f} MB so far): {error.strerror}; make room there, or name "
                "another folder in the environment variable TMPDIR"
            ) from None


def _temporary_folder() -> str:
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:
        return "no folder for temporary files"


def shingles(text: str) -> NDArray[np.uint32]:
    """Distinct hashes of the word 5-shingles of a text, ascending; without case and punctuation."""
    words = np.array(
        [xxhash.xxh3_64_intdigest(word.encode()) for word in _WORD.findall(text.casefold())], dtype=np.uint64
    )
    if len(words) < SHINGLE_WORDS:
        return np.empty(0, dtype=np.uint32)
    num = len(words) - SHINGLE_WORDS + 1
    mixed = np.zeros(num, dtype=np.uint64)
    for place in range(SHINGLE_WORDS):
        mixed = (mixed ^ words[place : place + num]) * _MULTIPLIER
    return np.unique((mixed >> np.uint64(32)).astype(np.uint32))


def _shingle_counts(stored: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """How many rows hold a shingle, by its lowest bits: never too low, and too high by a few where hashes meet."""
    counts = np.zeros(2**SKETCH_BITS, dtype=np.uint32)
    for start in range(0, len(stored), 2**22):
        slots = stored[start : start + 2**22] & np.uint32(2**SKETCH_BITS - 1)
        counts += np.bincount(slots, minlength=2**SKETCH_BITS).astype(np.uint32)
    return counts


def _is_own(hashes: NDArray[np.uint32], is_template: NDArray[np.bool_]) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = ~is_template[hashes & np.uint32(2**SKETCH_BITS - 1)]
    return found


def _own(hashes: NDArray[np.uint32], is_template: NDArray[np.bool_]) -> NDArray[np.uint32]:
    return hashes[_is_own(hashes, is_template)]


def _band_hashes(
    stored: NDArray[np.uint32], offsets: NDArray[np.int64], is_template: NDArray[np.bool_]
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """A hash per band and row, and how many shingles of its own each row has; rows with too few have no bands.

    Returns bands: [NUM_BANDS, N] uint64, sizes: [N].
    """
    num_rows = len(offsets) - 1
    bands = np.zeros((NUM_BANDS, num_rows), dtype=np.uint64)
    sizes = np.zeros(num_rows, dtype=np.int64)
    generator = np.random.default_rng(0)
    factors = generator.integers(0, 2**32, NUM_BANDS * BAND_ROWS, dtype=np.uint32) | np.uint32(1)
    terms = generator.integers(0, 2**32, NUM_BANDS * BAND_ROWS, dtype=np.uint32)
    start = 0
    while start < num_rows:
        stop = max(start + 1, int(np.searchsorted(offsets, offsets[start] + CHUNK_SHINGLES, side="right")) - 1)
        block = stored[offsets[start] : offsets[stop]]
        own = _is_own(block, is_template)
        rows = np.repeat(np.arange(start, stop), np.diff(offsets[start : stop + 1]))[own]
        sizes[start:stop] = np.bincount(rows - start, minlength=stop - start)
        kept = np.flatnonzero(sizes[start:stop] >= MIN_SHINGLES) + start
        hashes = block[own][np.isin(rows, kept)]
        if len(kept):
            starts = np.concatenate([[0], np.cumsum(sizes[kept])[:-1]])
            for index, (factor, term) in enumerate(zip(factors, terms, strict=True)):
                permuted = hashes * factor + term
                # The low bits of an odd multiple permute among themselves; folding the high bits in mixes them.
                permuted ^= permuted >> np.uint32(15)
                smallest = np.minimum.reduceat(permuted * np.uint32(0x2C1B3C6D), starts)
                band = bands[index // BAND_ROWS]
                band[kept] = (band[kept] ^ smallest) * _MULTIPLIER
        start = stop
    sizes[sizes < MIN_SHINGLES] = 0
    return bands, sizes


def _candidates(
    bands: NDArray[np.uint64],
    sizes: NDArray[np.int64],
    numbers: NDArray[np.uint64],
    is_held_out: NDArray[np.bool_],
) -> Iterator[tuple[int, int]]:
    """Pairs of rows that meet in a bucket of some band, by the second row, then the first: training rows first."""
    order = np.argsort(is_held_out, kind="stable")
    num_rows, num_train = len(sizes), len(sizes) - int(is_held_out.sum())
    places = np.flatnonzero(sizes[order])  # from here on rows are named by their place in this order
    rows = order[places]
    codes = np.empty(0, dtype=np.int64)
    for band in bands if len(rows) else ():
        # Rows with other numbers never match: as part of the bucket they would only crowd it.
        keys = band[rows] ^ (numbers[rows] * _MULTIPLIER)
        by_key = np.argsort(keys, kind="stable")
        members, member_sizes, keys = places[by_key], sizes[rows[by_key]], keys[by_key]
        index = np.arange(len(keys))
        heads = np.maximum.accumulate(np.where(np.diff(keys, prepend=~keys[:1]) != 0, index, 0))
        found = []
        for back in (len(keys), *range(1, BUCKET_NEIGHBOURS + 1)):
            partner = np.maximum(heads, index - back)
            first, size = members[partner], member_sizes[partner]
            wanted = (partner < index) & (first < num_train)
            wanted &= SIMILAR * np.maximum(size, member_sizes) <= np.minimum(size, member_sizes)
            found.append(members[wanted] * num_rows + first[wanted])
        codes = np.unique(np.concatenate([codes, *found]))  # most pairs meet in several bands
    for code in codes:
        second, first = divmod(int(code), num_rows)
        yield int(order[first]), int(order[second])


def _jaccard(left: NDArray[np.uint32], right: NDArray[np.uint32]) -> float:
    common = len(np.intersect1d(left, right, assume_unique=True))
    return common / (len(left) + len(right) - common)
