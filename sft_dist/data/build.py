"""Make a token store: tokenise once, in parallel, before any process group, and commit it whole or not at all."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import xxhash
from filelock import FileLock, Timeout

from sft_dist.config import Recipe, Source
from sft_dist.data.chat import ChatTokenizer, Example
from sft_dist.data.conversation import BadRow, Conversation, Origin, RawRow
from sft_dist.data.files import hash_source, iter_rows, list_files, source_names
from sft_dist.data.rows import detect_format, parse_row
from sft_dist.data.store import COMMITTED, FORMAT_VERSION, TokenStore
from sft_dist.errors import DataError

CHUNK_ROWS = 256
CHUNK_BYTES = 2**20
# Below this a pool of processes takes longer to start than the work takes.
IN_PROCESS_BYTES = 4 * 2**20
NUM_LISTED = 20
NUM_EXAMPLES_PER_CAUSE = 5
LOCK_TIMEOUT_S = 6 * 3600.0

Progress = Callable[[int], None]


# ---------------------------------------------------------------- prepare


@dataclass(frozen=True)
class StoreSpec:
    """What decides the bytes of a store: the data, the tokenizer, and every setting that changes a token or a mask."""

    sources: tuple[Source, ...]
    model_path: str
    revision: str | None = None
    chat_template: Path | None = None
    max_tokens: int = 4096
    too_long: str = "drop"
    bad_rows: str = "error"
    turns: str = "all"
    control_tokens: str = "neutralise"
    difficulty_field: str | None = None

    @classmethod
    def of(cls, recipe: Recipe, sources: Sequence[Source]) -> "StoreSpec":
        """The store of some of a recipe's sources."""
        data, model = recipe.data, recipe.model
        return cls(
            sources=tuple(sources),
            model_path=model.path,
            revision=model.revision,
            chat_template=data.chat_template,
            max_tokens=data.max_tokens,
            too_long=data.too_long,
            bad_rows=data.bad_rows,
            turns=data.turns,
            control_tokens=data.control_tokens,
            difficulty_field=data.difficulty_field,
        )

    def load_tokenizer(self) -> ChatTokenizer:
        return ChatTokenizer.load(self.model_path, revision=self.revision, chat_template=self.chat_template)


def prepare(
    spec: StoreSpec,
    *,
    store_dir: Path,
    workers: int | None = None,
    progress: Progress | None = None,
    lock_timeout_s: float = LOCK_TIMEOUT_S,
) -> TokenStore:
    """Open the store of these sources, making it first if there is none. Safe to call from several processes.

    workers: tokeniser processes, None for one per core. progress: called with the number of rows done so far.
    Raises DataError for bad rows under `bad_rows="error"`, too long ones under `too_long="error"`, or if nothing is
    left; ConfigError for a tokenizer that cannot be used.
    """
    tokenizer = spec.load_tokenizer()
    plan = _plan(spec, tokenizer)
    path = Path(store_dir) / plan.fingerprint
    if not _is_committed(path):
        with _locked(path, timeout_s=lock_timeout_s):
            if not _is_committed(path):
                _build(path, plan, tokenizer, workers=workers or _num_cores(), progress=progress)
    return TokenStore.open(path)


def wait_for_store(
    spec: StoreSpec,
    *,
    store_dir: Path,
    timeout_s: float = LOCK_TIMEOUT_S,
    grace_s: float = 30.0,
    poll_s: float = 0.5,
) -> TokenStore:
    """What every local rank but 0 calls while rank 0 is in `prepare`: poll for the commit, then open it.

    grace_s: nobody holding the lock for so long means that nobody is preparing.
    Raises DataError after `timeout_s` seconds, or when nobody prepares.
    """
    path = Path(store_dir) / store_fingerprint(spec, spec.load_tokenizer())
    begin = free_since = time.monotonic()
    while not _is_committed(path):
        now = time.monotonic()
        if _is_locked(path):
            free_since = now
        if now - free_since > grace_s:
            raise DataError(
                f"{path}: preparation failed on local rank 0: nobody has held its lock for {grace_s:g} s; "
                "see that rank's log"
            )
        if now - begin > timeout_s:
            raise DataError(f"{path}: no token store after {timeout_s:g} s; run `sft-dist prepare` before training")
        time.sleep(poll_s)
    return TokenStore.open(path)


def store_fingerprint(spec: StoreSpec, tokenizer: ChatTokenizer) -> str:
    """32 hex digits that name a store. Two equal ones hold the same tokens."""
    return _plan(spec, tokenizer).fingerprint


@dataclass(frozen=True)
class _Plan:
    """What is to be stored, found before any row is tokenised."""

    spec: StoreSpec
    formats: tuple[str, ...]
    fingerprint: str


def _plan(spec: StoreSpec, tokenizer: ChatTokenizer) -> _Plan:
    formats = tuple(detect_format(source) for source in spec.sources)
    content = {
        "version": FORMAT_VERSION,
        "tokenizer": tokenizer.digest,
        "sources": [
            [hash_source(source), row_format] for source, row_format in zip(spec.sources, formats, strict=True)
        ],
        "max_tokens": spec.max_tokens,
        "too_long": spec.too_long,
        "bad_rows": spec.bad_rows,
        "turns": spec.turns,
        "control_tokens": spec.control_tokens,
        "difficulty_field": spec.difficulty_field,
    }
    return _Plan(spec, formats, xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode()))


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---------------------------------------------------------------- building


def _build(path: Path, plan: _Plan, tokenizer: ChatTokenizer, *, workers: int, progress: Progress | None) -> None:
    """Write the store beside its place, move it there, commit. Runs under the lock of `path`."""
    _remove_leftovers(path)
    temporary = path.parent / f".tmp-{path.name}"
    try:
        with _disk_errors(temporary):
            temporary.mkdir()
            tokenizer.save(temporary / "tokenizer")
            before = _stamps(plan.spec.sources)
            with _Writer(temporary, plan) as writer:
                for result in _encoded_chunks(plan, temporary / "tokenizer", workers=workers):
                    writer.add(result)
                    if progress is not None:
                        progress(writer.num_rows)
            if _stamps(plan.spec.sources) != before:
                raise DataError("a data file changed while it was read; run again when nothing writes to it")
            _check_rows(writer, plan)
            writer.finish()
            _commit(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@dataclass
class _Chunk:
    """Rows that go to a worker together. They share a source."""

    source: int
    row_format: str
    max_tokens: int
    rows: list[RawRow] = field(default_factory=list)
    num_bytes: int = 0


@dataclass
class _Encoded:
    """What a worker returns: the examples of a chunk end to end, and the rows it refused, both in order."""

    source: int
    num_rows: int
    tokens: np.ndarray
    response: np.ndarray
    lengths: list[int]
    num_responses: list[int]
    origins: list[Origin]
    refused: list[BadRow]


def _chunks(plan: _Plan) -> Iterator[_Chunk]:
    """Chunk boundaries change nothing in the store: rows are encoded independently."""
    for index, (source, row_format) in enumerate(zip(plan.spec.sources, plan.formats, strict=True)):
        chunk = _Chunk(index, row_format, plan.spec.max_tokens)
        for row in iter_rows(source):
            chunk.rows.append(row)
            chunk.num_bytes += len(row.data) if isinstance(row.data, bytes) else 1024
            if len(chunk.rows) >= CHUNK_ROWS or chunk.num_bytes >= CHUNK_BYTES:
                yield chunk
                chunk = _Chunk(index, row_format, plan.spec.max_tokens)
        if chunk.rows:
            yield chunk


def _encode_chunk(chunk: _Chunk, tokenizer_dir: str) -> _Encoded:
    """Parse, render, tokenise, mask and verify. Runs in a worker process, or here for small inputs."""
    parsed = [parse_row(row, chunk.row_format) for row in chunk.rows]
    encoded = iter(_tokenizer(tokenizer_dir).encode([item for item in parsed if isinstance(item, Conversation)]))
    kept: list[Example] = []
    refused: list[BadRow] = []
    for item in parsed:
        result = next(encoded) if isinstance(item, Conversation) else item
        if isinstance(result, Example) and len(result.input_ids) > chunk.max_tokens:
            reason = f"{len(result.input_ids)} tokens, more than data.max_tokens={chunk.max_tokens}"
            result = BadRow(result.origin, "too_long", reason)
        if isinstance(result, Example):
            kept.append(result)
        else:
            refused.append(result)
    return _Encoded(
        source=chunk.source,
        num_rows=len(chunk.rows),
        tokens=np.concatenate([np.zeros(0, np.int32), *(example.input_ids for example in kept)]),
        response=np.concatenate([np.zeros(0, np.bool_), *(example.is_response for example in kept)]),
        lengths=[len(example.input_ids) for example in kept],
        num_responses=[int(example.is_response.sum()) for example in kept],
        origins=[example.origin for example in kept],
        refused=refused,
    )


@lru_cache(maxsize=1)
def _tokenizer(directory: str) -> ChatTokenizer:
    """The saved tokenizer, read once per process: what is stored beside the tokens is what made them."""
    return ChatTokenizer.load(directory)


def _encoded_chunks(plan: _Plan, tokenizer_dir: Path, *, workers: int) -> Iterator[_Encoded]:
    """Encode every chunk, in order, on `workers` processes."""
    _tokenizer.cache_clear()  # the directory of an earlier store may have had the same name
    if workers == 1 or _is_small(plan.spec.sources):
        yield from (_encode_chunk(chunk, str(tokenizer_dir)) for chunk in _chunks(plan))
        return
    # spawn: the parent may hold threads (torch, Rust), which a fork would copy in an unusable state.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        yield from _in_order(pool, _chunks(plan), str(tokenizer_dir), ahead=2 * workers + 2)
    except BrokenProcessPool:
        raise DataError(
            f"one of {workers} tokeniser processes died, most likely for memory: set data.workers to a smaller number "
            "(or the calling script has no `if __name__ == '__main__':` guard, which processes that are spawned need)"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(pool: Executor, chunks: Iterable[_Chunk], tokenizer_dir: str, *, ahead: int) -> Iterator[_Encoded]:
    """Results in the order of the chunks, with at most `ahead` of them in flight: memory stays bounded."""
    pending: deque[Future[_Encoded]] = deque()
    for chunk in chunks:
        pending.append(pool.submit(_encode_chunk, chunk, tokenizer_dir))
        if len(pending) >= ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _start_worker() -> None:
    """One core per worker; Ctrl-C is the parent's business; and a worker must not outlive a parent that was killed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _is_small(sources: Sequence[Source]) -> bool:
    files = [file for source in sources for file in list_files(source)]
    is_local = all(list_files(source) for source in sources)
    return is_local and sum(file.stat().st_size for file in files) < IN_PROCESS_BYTES


def _stamps(sources: Sequence[Source]) -> list[tuple[str, int, int]]:
    stats = [(str(file), file.stat()) for source in sources for file in list_files(source)]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


# ---------------------------------------------------------------- writing


class _Writer:
    """Appends encoded chunks to the files of a store that is not committed yet."""

    def __init__(self, directory: Path, plan: _Plan) -> None:
        self.directory, self.plan = directory, plan
        self.names = list(dict.fromkeys(name for source in plan.spec.sources for name in source_names(source)))
        self._file_numbers = {name: index for index, name in enumerate(self.names)}
        self.num_rows = 0
        # Arrays, not lists: 28 bytes an example instead of 200.
        self.lengths = array("q")
        self.num_responses = array("i")
        self.origin_files = array("i")
        self.origin_lines = array("q")
        self.last: Counter[int] = Counter()  # source -> examples
        self.rows: Counter[int] = Counter()  # source -> rows read
        self.refused: Counter[str] = Counter()
        self.examples: dict[str, list[BadRow]] = {}  # cause -> its first rows
        self.listed: list[BadRow] = []  # the first refused rows that are not too long
        self._files: list[BinaryIO] = []

    def __enter__(self) -> Self:
        self._files = [(self.directory / name).open("wb") for name in ("tokens.bin", "response.bin")]
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files:
            file.close()

    def add(self, chunk: _Encoded) -> None:
        for file, values in zip(self._files, (chunk.tokens.astype("<i4"), chunk.response.astype("u1")), strict=True):
            file.write(values.tobytes())
        self.num_rows += chunk.num_rows
        self.rows[chunk.source] += chunk.num_rows
        self.last[chunk.source] += len(chunk.lengths)
        self.lengths.extend(chunk.lengths)
        self.num_responses.extend(chunk.num_responses)
        self.origin_files.extend(self._file_numbers[origin.path] for origin in chunk.origins)
        self.origin_lines.extend(origin.line for origin in chunk.origins)
        for row in chunk.refused:
            self._count(row)

    def _count(self, row: BadRow) -> None:
        self.refused[row.cause] += 1
        examples = self.examples.setdefault(row.cause, [])
        if len(examples) < NUM_LISTED:
            examples.append(row)
        if row.cause != "too_long" and len(self.listed) < NUM_LISTED:
            self.listed.append(row)

    def finish(self) -> None:
        """Write the index and the counts; the caller has checked that there are examples."""
        np.savez(
            self.directory / "index.npz",
            offsets=np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)]),
            num_responses=np.asarray(self.num_responses, dtype=np.int32),
            origin_file=np.asarray(self.origin_files, dtype=np.int32),
            origin_line=np.asarray(self.origin_lines, dtype=np.int64),
        )
        text = json.dumps(self._meta(), indent=2, ensure_ascii=False)
        (self.directory / "meta.json").write_text(text + "\n", encoding="utf-8")

    def _meta(self) -> dict[str, Any]:
        plan = self.plan
        ends = np.cumsum([self.last[index] for index in range(len(plan.spec.sources))])
        return {
            "format_version": FORMAT_VERSION,
            "fingerprint": plan.fingerprint,
            "max_tokens": plan.spec.max_tokens,
            "too_long": plan.spec.too_long,
            "bad_rows": plan.spec.bad_rows,
            "rows_read": self.num_rows,
            "kept": len(self.lengths),
            "dropped": {cause: self._dropped(cause) for cause in sorted(self.refused)},
            "tokens": sum(self.lengths),
            "response_tokens": sum(self.num_responses),
            "max_length": max(self.lengths),
            "sources": [
                {
                    "path": source.path,
                    "format": plan.formats[index],
                    "rows_read": self.rows[index],
                    "first": int(ends[index]) - self.last[index],
                    "last": int(ends[index]),
                }
                for index, source in enumerate(plan.spec.sources)
            ],
            "files": self.names,
        }

    def _dropped(self, cause: str) -> dict[str, Any]:
        return {
            "count": self.refused[cause],
            "examples": [str(row) for row in self.examples[cause][:NUM_EXAMPLES_PER_CAUSE]],
        }


def _check_rows(writer: _Writer, plan: _Plan) -> None:
    """Raise DataError unless the recipe allows every row that was refused and some are left."""
    num_too_long = writer.refused["too_long"]
    num_bad = writer.refused.total() - num_too_long
    if num_bad and plan.spec.bad_rows == "error":
        counts = ", ".join(f"{count} {cause}" for cause, count in writer.refused.most_common() if cause != "too_long")
        mend = "mend them, or set data.bad_rows: drop to leave them out and count them"
        raise DataError(_listing(f"{num_bad} bad rows of {writer.num_rows} ({counts}); {mend}", writer.listed, num_bad))
    if num_too_long and plan.spec.too_long == "error":
        mend = f"raise data.max_tokens={plan.spec.max_tokens}, or set data.too_long: drop"
        title = f"{num_too_long} rows of {writer.num_rows} are too long; {mend}"
        raise DataError(_listing(title, writer.examples["too_long"], num_too_long))
    if not writer.lengths:
        counts = ", ".join(f"{count} {cause}" for cause, count in writer.refused.most_common()) or "there were none"
        rows = [row for examples in writer.examples.values() for row in examples[:NUM_EXAMPLES_PER_CAUSE]]
        raise DataError(
            _listing(f"nothing is left to train on of {writer.num_rows} rows ({counts})", rows[:NUM_LISTED], len(rows))
        )


def _listing(title: str, rows: Sequence[BadRow], total: int) -> str:
    lines = [f"  {row}" for row in rows]
    more = [f"  ... and {total - len(rows)} more"] if total > len(rows) else []
    return "\n".join([title, *lines, *more])


# ---------------------------------------------------------------- committing


def _commit(temporary: Path, path: Path) -> None:
    """Flush everything, move it into place, then write COMMITTED: a crash at any point leaves no committed store."""
    files = sorted(file for file in temporary.rglob("*") if file.is_file())
    sizes = {str(file.relative_to(temporary)): file.stat().st_size for file in files}
    for file in [*files, temporary / "tokenizer", temporary]:
        _fsync(file)
    temporary.rename(path)
    _fsync(path.parent)
    pending = path / f"{COMMITTED}.tmp"
    pending.write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")
    _fsync(pending)
    pending.rename(path / COMMITTED)
    _fsync(path)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_committed(path: Path) -> bool:
    return (path / COMMITTED).is_file()


def _remove_leftovers(path: Path) -> None:
    """Remove what killed runs left: this store without its commit, and temporary directories that no lock guards."""
    shutil.rmtree(path, ignore_errors=True)
    for leftover in path.parent.glob(".tmp-*"):
        owner = path.parent / leftover.name.removeprefix(".tmp-")
        if owner == path or not _is_locked(owner):
            shutil.rmtree(leftover, ignore_errors=True)


def _lock(path: Path) -> FileLock:
    return FileLock(path.parent / f"{path.name}.lock")


@contextmanager
def _locked(path: Path, *, timeout_s: float) -> Iterator[None]:
    with _disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    lock = _lock(path)
    try:
        lock.acquire(timeout=timeout_s)
    except Timeout:
        raise DataError(
            f"{path}: another process has been preparing this store for {timeout_s:g} s; wait for it or end it"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _is_locked(path: Path) -> bool:
    if not path.parent.is_dir():
        return False
    try:
        with _lock(path).acquire(timeout=0):
            return False
    except Timeout:
        return True


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into a message; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EROFS,
            errno.EACCES,
            errno.EPERM,
            errno.ENOTDIR,
            errno.EEXIST,
        ):
            raise
        raise DataError(
            f"{path}: the token store cannot be written: {error.strerror}; free space or set data.store"
        ) from None
