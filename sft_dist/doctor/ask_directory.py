"""`python -m sft_dist.doctor.ask_directory PATH`: what can be done in a directory, as JSON.

On a dead network mount it never ends; who asks gives up.
"""

import fcntl
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any


def facts(path: Path) -> dict[str, Any]:
    """Of the directory, or of the nearest one above it that is there.

    error, lock_error: why it cannot be written, or files in it not locked; None where they can.
    """
    place = path.expanduser().absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    found: dict[str, Any] = {"path": str(path), "place": str(place), "error": None, "lock_error": None}
    if not place.is_dir():
        return found | {"error": f"{place} is not a directory"}
    try:
        found["free"], found["total"] = shutil.disk_usage(place).free, shutil.disk_usage(place).total
        status = os.statvfs(place)
        found["inodes_full"] = status.f_files > 0 and status.f_favail == 0
        with tempfile.NamedTemporaryFile(dir=place, prefix=".sft-dist-doctor-") as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
            found["lock_error"] = _why_no_lock(file.fileno())
    except OSError as error:
        found["error"] = f"{place}: {error.strerror or error}"
    return found


def _why_no_lock(file: int) -> str | None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.strerror or str(error)
    return None


if __name__ == "__main__":
    print(json.dumps(facts(Path(sys.argv[1]))))
