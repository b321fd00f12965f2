"""Freed memory stays with the process, counted in page faults."""

import json
import subprocess
import sys

import pytest

from sft_dist.freed_pages import keep_freed_pages

SCRIPT = """
import json, resource
import numpy
from sft_dist.freed_pages import keep_freed_pages

def faults(num_bytes):
    def work():
        blocks = [numpy.ones(num_bytes, dtype=numpy.uint8) for _ in range(4)]
    for _ in range(3):
        work()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

SIZES = (8 << 20, 40 << 20)  # below and above what glibc takes from its heap at most
fresh = [faults(size) for size in SIZES]
assert keep_freed_pages()
print(json.dumps([fresh, [faults(size) for size in SIZES]]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts the page faults of Linux")
def test_kept_pages_are_not_asked_for_again() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=True)
    fresh, kept = json.loads(done.stdout)
    for size, before, after in zip((8 << 20, 40 << 20), fresh, kept, strict=True):
        # Five times four blocks: 4 kB pages, or 2 MB ones where the kernel gives those without being asked.
        assert before >= 5 * 4 * size // (2 << 20)
        assert after < before / 20


def test_a_c_library_without_the_switches_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda _: object())
    assert not keep_freed_pages()
