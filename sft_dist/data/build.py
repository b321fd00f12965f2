"""Make a token store: tokenise once, in parallel, before any process group, and commit it whole or not at all."""

import errno
import json
import math
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
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np
import xxhash
from filelock import FileLock, Timeout

from sft_dist.config import Recipe, Source
from sft_dist.data.chat import ChatTokenizer, Example
from sft_dist.data.conversation import BadRow, Conversation, Message, Origin, RawRow, Remark, prompt_hash
from sft_dist.data.files import count_bytes, hash_source, iter_rows, list_files, source_names
from sft_dist.data.rows import detect_format, parse_row
from sft_dist.data.store import COMMITTED, FORMAT_VERSION, TokenStore
from sft_dist.durable import sync
from sft_dist.errors import DataError
from sft_dist.world import num_cores

CHUNK_ROWS = 256
CHUNK_BYTES = 2**20
# Below this a pool of processes takes longer to start than the work takes.
IN_PROCESS_BYTES = 4 * 2**20
NUM_LISTED = 20
NUM_EXAMPLES_PER_CAUSE = 5
LOCK_TIMEOUT_S = 6 * 3600.0

Progress = Callable[[int, float | None], None]
"""Called with the rows done so far, and the share of the data that was read if its size is known."""


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
        is_trained = tuple(sources) == data.train  # what is held out is in no order
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
            difficulty_field=data.difficulty_field if is_trained else None,
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

    workers: tokeniser processes, None for one per core. progress: see `Progress`.
    Raises DataError for bad rows under `bad_rows="error"`, too long ones under `too_long="error"`, or if nothing is
    left; ConfigError for a tokenizer that cannot be used.
    """
    tokenizer = spec.load_tokenizer()
    plan = _plan(spec, tokenizer)
    path = Path(store_dir) / plan.fingerprint
    if not _is_committed(path):
        with _locked(path, timeout_s=lock_timeout_s):
            if not _is_committed(path):
                _build(path, plan, tokenizer, workers=workers or num_cores(), progress=progress)
    return _open(path, spec)


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
    return _open(path, spec)


def _open(path: Path, spec: StoreSpec) -> TokenStore:
    return TokenStore.open(path).named(files=_file_names(spec), sources=[source.path for source in spec.sources])


def _file_names(spec: StoreSpec) -> list[str]:
    return list(dict.fromkeys(name for source in spec.sources for name in source_names(source)))


def store_fingerprint(spec: StoreSpec, tokenizer: ChatTokenizer) -> str:
    """32 hex digits that name a store. Two equal ones hold the same tokens."""
    return _plan(spec, tokenizer).fingerprint


@dataclass(frozen=True)
class _Plan:
    """What is to be stored, found before any row is tokenised."""

    spec: StoreSpec
    formats: tuple[str, ...]
    fingerprint: str
    stamps: list[tuple[str, int, int]]
    """Names, sizes and times of the files before they were hashed: what is tokenised must be what was hashed."""


def _plan(spec: StoreSpec, tokenizer: ChatTokenizer) -> _Plan:
    stamps = _stamps(spec.sources)
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
    fingerprint = xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
    return _Plan(spec, formats, fingerprint, stamps)


# ---------------------------------------------------------------- building


def _build(path: Path, plan: _Plan, tokenizer: ChatTokenizer, *, workers: int, progress: Progress | None) -> None:
    """Write the store beside its place, move it there, commit. Runs under the lock of `path`."""
    _remove_leftovers(path)
    temporary = path.parent / f".tmp-{path.name}"
    try:
        with _disk_errors(temporary):
            temporary.mkdir()
            tokenizer.save(temporary / "tokenizer")
        reading = _Reading(plan.spec)
        settings = _Encoding(plan.spec, str(temporary / "tokenizer"))
        with _Writer(temporary, plan) as writer:
            for result in _encoded_chunks(plan, settings, reading, workers=workers):
                writer.add(result)
                if progress is not None:
                    progress(writer.num_rows, reading.share)
        if _stamps(plan.spec.sources) != plan.stamps:
            raise DataError("a data file changed while it was read; run again when nothing writes to it")
        _check_rows(writer, plan)
        with _disk_errors(temporary):
            writer.finish()
            _commit(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@dataclass(frozen=True)
class _Encoding:
    """What a worker must know to encode a chunk."""

    spec: StoreSpec
    tokenizer_dir: str


class _Reading:
    """How much of the data has been read."""

    def __init__(self, spec: StoreSpec) -> None:
        sizes = [count_bytes(source) for source in spec.sources]
        self._total = None if None in sizes else sum(size for size in sizes if size)
        self._done = 0

    @property
    def is_small(self) -> bool:
        """Whether the data is known to be less than is worth a pool of processes."""
        return self._total is not None and self._total < IN_PROCESS_BYTES

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes

    @property
    def share(self) -> float | None:
        """0 to 1; None where the size of the data is not known."""
        return min(1.0, self._done / self._total) if self._total else None


@dataclass
class _Chunk:
    """Rows that go to a worker together. They share a source."""

    source: int
    row_format: str
    rows: list[RawRow] = field(default_factory=list)
    num_bytes: int = 0


@dataclass
class _Encoded:
    """What a worker returns: the examples of a chunk end to end, the rows it refused, and remarks on others.

    All are in the order of the rows. num_kept: rows that gave an example.
    """

    source: int
    num_rows: int
    num_kept: int = 0
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    response: np.ndarray = field(default_factory=lambda: np.zeros(0, np.bool_))
    lengths: list[int] = field(default_factory=list)
    num_responses: list[int] = field(default_factory=list)
    prompt_hashes: list[int] = field(default_factory=list)
    difficulties: list[float] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    refused: list[BadRow] = field(default_factory=list)
    remarks: list[Remark] = field(default_factory=list)


def _chunks(plan: _Plan, reading: _Reading) -> Iterator[_Chunk]:
    """Chunk boundaries change nothing in the store: rows are encoded independently."""
    extra = [plan.spec.difficulty_field] if plan.spec.difficulty_field else []
    for index, (source, row_format) in enumerate(zip(plan.spec.sources, plan.formats, strict=True)):
        chunk = _Chunk(index, row_format)
        for row in iter_rows(source, extra_columns=extra, on_read=reading.add):
            chunk.rows.append(row)
            chunk.num_bytes += _size_of(row)
            if len(chunk.rows) >= CHUNK_ROWS or chunk.num_bytes >= CHUNK_BYTES:
                yield chunk
                chunk = _Chunk(index, row_format)
        if chunk.rows:
            yield chunk


def _size_of(row: RawRow) -> int:
    """About as many bytes as a row holds."""
    if isinstance(row.data, bytes):
        return len(row.data)
    cells = row.data.values() if isinstance(row.data, dict) else ()
    return sum(len(cell) if isinstance(cell, str) else 1024 for cell in cells)


def _encode_chunk(chunk: _Chunk, settings: _Encoding) -> _Encoded:
    """Parse, render, tokenise, mask and verify. Runs in a worker process, or here for small inputs."""
    tokenizer = _tokenizer(settings.tokenizer_dir)
    found = _Encoded(chunk.source, len(chunk.rows))
    examples: list[Example] = []
    kept: set[int] = set()
    told: set[tuple[int, str]] = set()  # a row is refused once for a cause, however many examples it was to give
    for batch in _batches(chunk, settings):
        conversations = [part.conversation for part in batch if isinstance(part.conversation, Conversation)]
        encoded = iter(tokenizer.encode(conversations, control_tokens=settings.spec.control_tokens))
        for part in batch:
            fitted: Conversation | tuple[Conversation, Example] | BadRow = part.conversation
            if isinstance(fitted, Conversation):
                fitted = _fitted(fitted, next(encoded), tokenizer, settings)
            if isinstance(fitted, BadRow):
                if (part.row, fitted.cause) not in told:
                    found.refused.append(fitted)
                told.add((part.row, fitted.cause))
                continue
            conversation, example = fitted
            examples.append(example)
            kept.add(part.row)
            found.prompt_hashes.append(prompt_hash(conversation) if part.prompt_hash is None else part.prompt_hash)
            found.difficulties.append(math.nan if conversation.difficulty is None else conversation.difficulty)
            found.remarks += example.remarks
    found.num_kept = len(kept)
    found.tokens = np.concatenate([found.tokens, *(example.input_ids for example in examples)])
    found.response = np.concatenate([found.response, *(example.is_response for example in examples)])
    found.lengths = [len(example.input_ids) for example in examples]
    found.num_responses = [int(example.is_response.sum()) for example in examples]
    found.origins = [example.origin for example in examples]
    return found


class _Part(NamedTuple):
    """What is to become an example. row: its place in the chunk. prompt_hash: that of all of the row, if shared."""

    row: int
    conversation: Conversation | BadRow
    prompt_hash: int | None = None


def _batches(chunk: _Chunk, settings: _Encoding) -> Iterator[list[_Part]]:
    """The parts of a chunk's rows, about as many at a time as hold CHUNK_BYTES."""
    batch: list[_Part] = []
    size = 0
    for place, row in enumerate(chunk.rows):
        for part in _parts(place, row, chunk.row_format, settings):
            batch.append(part)
            if isinstance(part.conversation, Conversation):
                size += sum(len(message.content) for message in part.conversation.messages)
            if size >= CHUNK_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _parts(place: int, row: RawRow, row_format: str, settings: _Encoding) -> Iterator[_Part]:
    """A row as one conversation, or under turns="each" as one that ends in each trained turn.

    Those are on one side of a split, whatever their prompts: an answer of one stands in the prompt of the next.
    """
    parsed = parse_row(row, row_format, turns=settings.spec.turns, difficulty_field=settings.spec.difficulty_field)
    if settings.spec.turns != "each" or isinstance(parsed, BadRow):
        yield _Part(place, parsed)
        return
    whole = prompt_hash(parsed)
    for end, message in enumerate(parsed.messages):
        if message.train:
            turns = [replace(turn, train=index == end) for index, turn in enumerate(parsed.messages[: end + 1])]
            yield _Part(place, replace(parsed, messages=tuple(turns)), whole)


def _fitted(
    conversation: Conversation, result: Example | BadRow, tokenizer: ChatTokenizer, settings: _Encoding
) -> tuple[Conversation, Example] | BadRow:
    """What is kept of a conversation: all of it up to max_tokens, else nothing, or all but its oldest turns.

    A turn is left out with its answers, or not at all: what is kept begins with the system prompts and a user turn, is
    rendered and verified anew, and every answer in it is whole.
    """
    if isinstance(result, BadRow):
        return result
    if len(result.input_ids) <= settings.spec.max_tokens:
        return conversation, result
    num_tokens = len(result.input_ids)
    reason = f"{num_tokens} tokens, more than data.max_tokens={settings.spec.max_tokens}"
    fitting: tuple[Conversation, Example] | None = None
    shorter = _without_oldest(conversation) if settings.spec.too_long == "truncate" else []
    low, high = 0, len(shorter) - 1
    while low <= high:  # the fewer turns, the fewer tokens: the first that fits is found by halving
        middle = (low + high) // 2
        (tried,) = tokenizer.encode([shorter[middle]], control_tokens=settings.spec.control_tokens)
        if isinstance(tried, Example) and len(tried.input_ids) <= settings.spec.max_tokens:
            fitting, high = (shorter[middle], tried), middle - 1
        else:
            low = middle + 1
    if fitting is None:
        return BadRow(conversation.origin, "too_long", reason)
    kept, example = fitting
    text = f"{num_tokens} tokens; without its oldest turns {len(example.input_ids)}"
    return kept, replace(example, remarks=(*example.remarks, Remark(conversation.origin, "truncated", text)))


def _without_oldest(conversation: Conversation) -> list[Conversation]:
    """The conversation without its first, its first two, ... exchanges.

    Only what still has a trained turn, and no result of a call that was left out.
    """
    messages = conversation.messages
    num_system = next((index for index, message in enumerate(messages) if message.role != "system"), 0)
    starts = [i for i in range(num_system + 1, len(messages)) if messages[i].role == "user" != messages[i - 1].role]
    kept = [messages[:num_system] + messages[start:] for start in starts]
    return [replace(conversation, messages=turns) for turns in kept if _is_complete(turns)]


def _is_complete(messages: Sequence[Message]) -> bool:
    """Whether a turn trains, and every tool turn comes after the call that it answers."""
    ids: set[str | None] = set()
    is_answered = False
    for message in messages:
        is_answered = is_answered or message.role == "assistant"
        ids.update(call.id for call in message.tool_calls)
        is_known = message.tool_call_id is None or message.tool_call_id in ids
        if message.role == "tool" and not (is_answered and is_known):
            return False
    return any(message.train for message in messages)


@lru_cache(maxsize=1)
def _tokenizer(directory: str) -> ChatTokenizer:
    """The saved tokenizer, read once per process: what is stored beside the tokens is what made them."""
    return ChatTokenizer.load(directory)


def _encoded_chunks(plan: _Plan, settings: _Encoding, reading: _Reading, *, workers: int) -> Iterator[_Encoded]:
    """Encode every chunk, in order, on `workers` processes."""
    _tokenizer.cache_clear()  # the directory of an earlier store may have had the same name
    if workers == 1 or reading.is_small:
        yield from (_encode_chunk(chunk, settings) for chunk in _chunks(plan, reading))
        return
    # spawn: the parent may hold threads (torch, Rust), which a fork would copy in an unusable state.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        yield from _in_order(pool, _chunks(plan, reading), settings, ahead=2 * workers + 2)
    except BrokenProcessPool:
        raise DataError(
            f"one of {workers} tokeniser processes died, most likely for memory: set data.workers to a smaller number "
            "(or the calling script has no `if __name__ == '__main__':` guard, which processes that are spawned need)"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(pool: Executor, chunks: Iterable[_Chunk], settings: _Encoding, *, ahead: int) -> Iterator[_Encoded]:
    """Results in the order of the chunks, with at most `ahead` of them in flight: memory stays bounded."""
    pending: deque[Future[_Encoded]] = deque()
    for chunk in chunks:
        pending.append(pool.submit(_encode_chunk, chunk, settings))
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


def _stamps(sources: Sequence[Source]) -> list[tuple[str, int, int]]:
    stats = [(str(file), file.stat()) for source in sources for file in list_files(source)]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


# ---------------------------------------------------------------- writing


class _Writer:
    """Appends encoded chunks to the files of a store that is not committed yet."""

    def __init__(self, directory: Path, plan: _Plan) -> None:
        self.directory, self.plan = directory, plan
        self.names = _file_names(plan.spec)
        self._file_numbers = {name: index for index, name in enumerate(self.names)}
        self.num_rows = 0
        # Arrays, not lists: 28 bytes an example instead of 200.
        self.lengths = array("q")
        self.num_responses = array("i")
        self.prompt_hashes = array("Q")
        self.difficulties = array("d")
        self.origin_files = array("i")
        self.origin_lines = array("q")
        self.last: Counter[int] = Counter()  # source -> examples
        self.rows: Counter[int] = Counter()  # source -> rows read
        self.rows_kept: Counter[int] = Counter()  # source -> rows that gave an example
        self.refused: Counter[str] = Counter()
        self.remarked: Counter[str] = Counter()
        self.examples: dict[str, list[Remark]] = {}  # cause -> its first rows
        self.listed: list[BadRow] = []  # the first refused rows that are not too long
        self._files: list[BinaryIO] = []

    def __enter__(self) -> Self:
        self._files = [(self.directory / name).open("wb") for name in ("tokens.bin", "response.bin")]
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files:
            file.close()

    def add(self, chunk: _Encoded) -> None:
        columns = (chunk.tokens.astype("<i4"), chunk.response.astype("u1"))
        with _disk_errors(self.directory):
            for file, values in zip(self._files, columns, strict=True):
                file.write(values.tobytes())
        self.num_rows += chunk.num_rows
        self.rows[chunk.source] += chunk.num_rows
        self.rows_kept[chunk.source] += chunk.num_kept
        self.last[chunk.source] += len(chunk.lengths)
        self.lengths.extend(chunk.lengths)
        self.num_responses.extend(chunk.num_responses)
        self.prompt_hashes.extend(chunk.prompt_hashes)
        self.difficulties.extend(chunk.difficulties)
        self.origin_files.extend(self._file_numbers[origin.path] for origin in chunk.origins)
        self.origin_lines.extend(origin.line for origin in chunk.origins)
        for row in chunk.refused:
            self.refused[row.cause] += 1
            self._keep(row)
            if row.cause != "too_long" and len(self.listed) < NUM_LISTED:
                self.listed.append(row)
        for remark in chunk.remarks:
            self.remarked[remark.cause] += 1
            self._keep(remark)

    def _keep(self, remark: Remark) -> None:
        examples = self.examples.setdefault(remark.cause, [])
        if len(examples) < NUM_LISTED:
            examples.append(remark)

    def finish(self) -> None:
        """Write the index and the counts; the caller has checked that there are examples."""
        np.savez(
            self.directory / "index.npz",
            offsets=np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)]),
            num_responses=np.asarray(self.num_responses, dtype=np.int32),
            prompt_hash=np.asarray(self.prompt_hashes, dtype=np.uint64),
            difficulty=np.asarray(self.difficulties, dtype=np.float64),
            origin_file=np.asarray(self.origin_files, dtype=np.int32),
            origin_line=np.asarray(self.origin_lines, dtype=np.int64),
        )
        text = json.dumps(self._meta(), indent=2, ensure_ascii=False)
        (self.directory / "meta.json").write_text(text + "\n", encoding="utf-8")

    def _meta(self) -> dict[str, Any]:
        plan = self.plan
        ends = np.cumsum([self.last[index] for index in range(len(plan.spec.sources))])
        return {
            "fingerprint": plan.fingerprint,
            "max_tokens": plan.spec.max_tokens,
            "too_long": plan.spec.too_long,
            "bad_rows": plan.spec.bad_rows,
            "rows_read": self.num_rows,
            "rows_kept": self.rows_kept.total(),
            "examples": len(self.lengths),
            "dropped": self._listed(self.refused),
            "notes": self._listed(self.remarked),
            "tokens": sum(self.lengths),
            "response_tokens": sum(self.num_responses),
            "sources": [
                {
                    "path": source.path,
                    "format": plan.formats[index],
                    "rows_read": self.rows[index],
                    "rows_kept": self.rows_kept[index],
                    "first": int(ends[index]) - self.last[index],
                    "last": int(ends[index]),
                }
                for index, source in enumerate(plan.spec.sources)
            ],
            "files": self.names,
        }

    def _listed(self, counts: Counter[str]) -> dict[str, Any]:
        return {
            cause: {
                "count": counts[cause],
                "examples": [str(row) for row in self.examples[cause][:NUM_EXAMPLES_PER_CAUSE]],
            }
            for cause in sorted(counts)
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
        mend = f"raise data.max_tokens={plan.spec.max_tokens}, or set data.too_long: drop or truncate"
        title = f"{num_too_long} rows of {writer.num_rows} are too long; {mend}"
        raise DataError(_listing(title, writer.examples["too_long"], num_too_long))
    if not writer.lengths:
        counts = ", ".join(f"{count} {cause}" for cause, count in writer.refused.most_common()) or "there were none"
        rows = [row for examples in writer.examples.values() for row in examples[:NUM_EXAMPLES_PER_CAUSE]]
        raise DataError(
            _listing(f"nothing is left to train on of {writer.num_rows} rows ({counts})", rows[:NUM_LISTED], len(rows))
        )


def _listing(title: str, rows: Sequence[Remark], total: int) -> str:
    lines = [f"  {row}" for row in rows]
    more = [f"  ... and {total - len(rows)} more"] if total > len(rows) else []
    return "\n".join([title, *lines, *more])


# ---------------------------------------------------------------- committing


def _commit(temporary: Path, path: Path) -> None:
    """Flush everything, move it into place, then write COMMITTED: a crash at any point leaves no committed store."""
    files = sorted(file for file in temporary.rglob("*") if file.is_file())
    sizes = {str(file.relative_to(temporary)): file.stat().st_size for file in files}
    for file in [*files, temporary / "tokenizer", temporary]:
        sync(file)
    temporary.rename(path)
    sync(path.parent)
    pending = path / f"{COMMITTED}.tmp"
    pending.write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")
    sync(pending)
    pending.rename(path / COMMITTED)
    sync(path)


def _is_committed(path: Path) -> bool:
    return (path / COMMITTED).is_file()


def _remove_leftovers(path: Path) -> None:
    """Remove what killed runs left: this store without its commit, and temporary directories that no lock guards."""
    shutil.rmtree(path, ignore_errors=True)
    for leftover in path.parent.glob(".tmp-*"):
        owner = path.parent / leftover.name.removeprefix(".tmp-")
        if owner == path:
            shutil.rmtree(leftover, ignore_errors=True)
            continue
        with suppress(Timeout), _lock(owner).acquire(timeout=0):
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
