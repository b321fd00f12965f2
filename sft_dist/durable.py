"""What is on disk stays there when the machine loses power."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Flush a file, or the names in a directory, to the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_durably(file: Path, text: str) -> None:
    """Write a text file and flush it to the disk. Raises OSError naming the file."""
    try:
        with file.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:  # a write that fails does not know its file
        raise OSError(error.errno, error.strerror, str(file)) from None


def replace_durably(file: Path, text: str) -> None:
    """Replace a text file; whatever happens there is the old one or the new one."""
    writing = file.with_name(f".{file.name}.tmp")
    write_durably(writing, text)
    writing.replace(file)
    sync(file.parent)
