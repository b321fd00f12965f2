"""Tokenise once, in parallel, before any process group; every rank maps the result from disk.

    <store_dir>/<fingerprint>/
        tokens.bin        int32, all examples end to end
        response.bin      one byte per token: 1 where it is trained
        index.npz         offsets [n+1]; num_responses, prompt_hash, difficulty, origin_file, origin_line [n]
        meta.json         counts by cause, formats, files, settings
        tokenizer/        what made the tokens
        COMMITTED         sizes of the files above; written last, and a store without it does not exist

The fingerprint covers the bytes of data and tokenizer and every setting that changes a token, and not the number of
workers: any number writes the same bytes.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sft_dist.data.chat import Example
from sft_dist.data.conversation import Origin
from sft_dist.errors import DataError

FORMAT_VERSION = 3
INDEX_ARRAYS = ("offsets", "num_responses", "prompt_hash", "difficulty", "origin_file", "origin_line")
COMMITTED = "COMMITTED"


@dataclass(frozen=True, eq=False)
class TokenStore:
    """All examples, memory-mapped.

    lengths: [n] int64 tokens; num_responses: [n] int32 trained tokens; prompt_hash: [n] uint64, equal for rows that ask
    the same; difficulty: [n] float64, what a curriculum sorts by, NaN where the recipe names no field.
    """

    path: Path
    fingerprint: str
    meta: Mapping[str, Any]
    lengths: np.ndarray
    num_responses: np.ndarray
    prompt_hash: np.ndarray
    difficulty: np.ndarray
    _offsets: np.ndarray
    _tokens: np.ndarray
    _response: np.ndarray
    _origin_file: np.ndarray
    _origin_line: np.ndarray

    @classmethod
    def open(cls, path: Path) -> "TokenStore":
        """Map a committed store. Raises DataError if there is none at `path` or a file has not the size it had."""
        _check_committed(path)
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        with np.load(path / "index.npz") as index:
            arrays = {name: index[name] for name in INDEX_ARRAYS}
        return cls(
            path=path,
            fingerprint=meta["fingerprint"],
            meta=meta,
            lengths=np.diff(arrays["offsets"]),
            num_responses=arrays["num_responses"],
            prompt_hash=arrays["prompt_hash"],
            difficulty=arrays["difficulty"],
            _offsets=arrays["offsets"],
            _tokens=np.asarray(np.memmap(path / "tokens.bin", dtype=np.int32, mode="r")),
            _response=np.asarray(np.memmap(path / "response.bin", dtype=np.bool_, mode="r")),
            _origin_file=arrays["origin_file"],
            _origin_line=arrays["origin_line"],
        )

    def named(self, *, files: Sequence[str], sources: Sequence[str]) -> "TokenStore":
        """The same store, its files and sources called what they are called now: names are not in the fingerprint."""
        if len(files) != len(self.meta["files"]):
            return self
        renamed = [entry | {"path": path} for entry, path in zip(self.meta["sources"], sources, strict=True)]
        return replace(self, meta={**self.meta, "files": list(files), "sources": renamed})

    def __len__(self) -> int:
        return len(self.lengths)

    def example(self, index: int) -> Example:
        """Views of the mapped files, not copies. Raises IndexError outside 0..n-1."""
        self._check_index(index)
        span = slice(self._offsets[index], self._offsets[index + 1])
        return Example(self._tokens[span], self._response[span], self.origin(index))

    def origin(self, index: int) -> Origin:
        """File and line of an example. Raises IndexError outside 0..n-1."""
        self._check_index(index)
        return Origin(self.meta["files"][self._origin_file[index]], int(self._origin_line[index]))

    @property
    def source_ranges(self) -> list[tuple[int, int]]:
        """[first, last) examples of each source, in the order of the recipe."""
        return [(source["first"], source["last"]) for source in self.meta["sources"]]

    @property
    def max_length(self) -> int:
        """Tokens of the longest example."""
        return int(self.lengths.max())

    @property
    def tokenizer_dir(self) -> Path:
        return self.path / "tokenizer"

    def _check_index(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of a store of {len(self)}")


def _check_committed(path: Path) -> None:
    try:
        sizes = json.loads((path / COMMITTED).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no committed token store; run `sft-dist prepare` first") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}/{COMMITTED} cannot be read: {error}; delete {path} and prepare again") from None
    for name, size in sizes.items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes"
            raise DataError(f"{path / name} {state}, committed with {size}; delete {path} and prepare again")
