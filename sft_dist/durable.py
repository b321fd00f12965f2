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
