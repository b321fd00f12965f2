"""One log file per rank, and a console that only rank 0 writes to."""

import contextlib
import functools
import io
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any, TextIO

from sft_dist.redact import RedactingFilter
from sft_dist.run_files import LOGS
from sft_dist.world import World

logger = logging.getLogger(__name__)

_originals: list[TextIO] = []  # the console's stderr while file descriptor 2 is the log


def log_path(run_dir: Path, rank: int) -> Path:
    """The log of a rank."""
    return run_dir / LOGS / f"rank-{rank:05d}.log"


def original_stderr() -> TextIO:
    """Where a message reaches the user, on any rank."""
    return _originals[-1] if _originals else sys.stderr


@contextlib.contextmanager
def per_rank_log(run_dir: Path, world: World) -> Iterator[None]:
    """Append this rank's log to <run>/logs, and on ranks above 0 all that is printed, too.

    Logged are this package from INFO and others from WARNING. A log that cannot be opened or written is said once
    per host, and the run goes on.
    """
    path = log_path(run_dir, world.rank)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if world.is_local_main:
            _say_unlogged(path, error)
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, handle)
        if not world.is_main:
            stack.enter_context(_printed_to(handle))
        stack.enter_context(_logged_to(handle, path, world))
        logger.info("rank %d of %d starts on %s, pid %d", world.rank, world.size, socket.gethostname(), os.getpid())
        yield


def flight_recorder_env(run_dir: Path, environ: MutableMapping[str, str]) -> None:
    """Have torch keep the last NCCL collectives, and dump them to <run>/logs/nccl-rank-<rank> when one times out.

    Call before the process group forms. What the user has set stays, under the new or the old name.
    """
    defaults = {
        ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"): "2000",
        ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"): str((run_dir / LOGS).absolute() / "nccl-rank-"),
        ("TORCH_NCCL_DUMP_ON_TIMEOUT",): "1",
    }
    for names, value in defaults.items():
        if not any(name in environ for name in names):
            environ[names[0]] = value


class _LossyFile(io.FileIO):
    """A file whose writes never fail: on a full disk the text is lost, the run is not."""

    def __init__(self, handle: int, on_first_loss: Callable[[OSError], None] | None) -> None:
        super().__init__(handle, "w", closefd=False)
        self._on_first_loss = on_first_loss

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            report, self._on_first_loss = self._on_first_loss, None
            if report is not None:
                report(error)
            return len(memoryview(data).cast("B"))


def _lossy_stream(handle: int, on_first_loss: Callable[[OSError], None] | None = None) -> TextIO:
    buffer = io.BufferedWriter(_LossyFile(handle, on_first_loss))
    return io.TextIOWrapper(buffer, encoding="utf-8", errors="backslashreplace", line_buffering=True)


@contextlib.contextmanager
def _printed_to(log: int) -> Iterator[None]:
    """Lead file descriptors 1 and 2 into the log: C libraries and child processes print there, too."""
    streams = sys.stdout, sys.stderr
    _flush(*streams)
    saved = [os.dup(number) for number in (1, 2)]
    console = _lossy_stream(saved[1])
    for number in (1, 2):
        os.dup2(log, number)
    sys.stdout, sys.stderr = _lossy_stream(1), _lossy_stream(2)
    _originals.append(console)
    try:
        yield
    finally:
        _flush(*streams, sys.stdout, sys.stderr, console)
        _originals.pop()
        sys.stdout, sys.stderr = streams
        for number, original in zip((1, 2), saved, strict=True):
            os.dup2(original, number)
            os.close(original)


def _flush(*streams: TextIO) -> None:
    for stream in streams:
        with contextlib.suppress(OSError, ValueError):  # a full disk; a stream that a test has closed
            stream.flush()


@contextlib.contextmanager
def _logged_to(log: int, path: Path, world: World) -> Iterator[None]:
    """Add the file to logging, and keep what only the file asked for off the console."""
    root, package = logging.getLogger(), logging.getLogger("sft_dist")
    say = functools.partial(_say_unlogged, path) if world.is_local_main else None
    file = logging.StreamHandler(_lossy_stream(log, say))
    file.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s rank {world.rank} %(name)s: %(message)s"))
    file.addFilter(_is_worth_keeping)
    file.addFilter(RedactingFilter())
    before = [(handler, handler.level) for handler in root.handlers]
    for handler, level in before:
        handler.setLevel(max(level, package.getEffectiveLevel()))
    package_level = package.level
    package.setLevel(min(logging.INFO, package.getEffectiveLevel()))
    root.addHandler(file)
    try:
        yield
    finally:
        root.removeHandler(file)
        package.setLevel(package_level)
        for handler, level in before:
            handler.setLevel(level)


def _is_worth_keeping(record: logging.LogRecord) -> bool:
    own = record.name == "sft_dist" or record.name.startswith("sft_dist.")
    return record.levelno >= (logging.INFO if own else logging.WARNING)


def _say_unlogged(path: Path, error: OSError) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(
            f"warning: {path} cannot be written, the run goes on without it: {error}",
            file=original_stderr(),
            flush=True,
        )
