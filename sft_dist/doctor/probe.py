"""Asks a program something, whatever state the machine is in: bounded in time, stdin closed, no file needed.

What may break or hang (torch, flash-attn, a driver, a dead network mount, a resolver) is asked in a process of its own.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sft_dist.launch import descendants

GIVE_UP_S = 2.0
"""How long a process that was killed may take to go; one that waits for a dead disk or driver never does."""

CLIP = 300


@dataclass(frozen=True)
class Answer:
    """code: exit code, negative for a signal; None when it did not start or did not end in time."""

    code: int | None
    out: str
    err: str
    seconds: float
    failure: str = ""
    """Why there is no answer, in words; empty for exit code 0."""

    @property
    def facts(self) -> dict[str, Any]:
        """The JSON object on the last line of its output; empty without one."""
        try:
            found = json.loads(self.out.strip().splitlines()[-1])
        except (ValueError, IndexError):
            return {}
        return found if isinstance(found, dict) else {}


def ask(command: Sequence[str], *, timeout_s: float, environ: Mapping[str, str] | None = None) -> Answer:
    """Run the command to its end, or end it and all that it started when the time is over. Never raises."""
    began = time.monotonic()
    # In memory: the disk may be full. Files, not pipes: what a program leaves behind would hold a pipe open.
    out, err = os.memfd_create("out"), os.memfd_create("err")
    try:
        process = subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environ, start_new_session=True
        )
        code = _wait(process, timeout_s)
        texts = _read(out), _read(err)
    except OSError as error:
        return Answer(None, "", "", time.monotonic() - began, f"{command[0]}: {error.strerror or error}")
    finally:
        os.close(out)
        os.close(err)
    return Answer(code, *texts, time.monotonic() - began, _failure(code, *texts, timeout_s=timeout_s))


def ask_python(module: str, *words: str, timeout_s: float, environ: Mapping[str, str] | None = None) -> Answer:
    """Run a module of this package as a program, with this Python."""
    return ask([sys.executable, "-m", f"sft_dist.{module}", *words], timeout_s=timeout_s, environ=environ)


def _wait(process: "subprocess.Popen[bytes]", timeout_s: float) -> int | None:
    try:
        return process.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        _end(process)
        return None
    except KeyboardInterrupt:
        _end(process)  # it has a session of its own, which Ctrl-C does not reach
        raise


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kill the process and all that it started, one by one: torchrun puts each rank into a session of its own."""
    for pid in [*(pid for pid, _ in descendants(process.pid)), process.pid]:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=GIVE_UP_S)


def _read(file: int) -> str:
    os.lseek(file, 0, os.SEEK_SET)
    with open(os.dup(file), "rb") as stream:
        return stream.read().decode(errors="replace")


def _failure(code: int | None, out: str, err: str, *, timeout_s: float) -> str:
    if code == 0:
        return ""
    if code is None:
        return f"no answer within {timeout_s:g} s"
    how = f"died by {signal_name(-code)}" if code < 0 else f"exit code {code}"
    words = last_words(err) or last_words(out)
    return f"{how}: {words}" if words else how


def last_words(text: str) -> str:
    """The line of a program's output that most likely says why it failed, clipped."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("error: ")] or lines[-1:]
    return said[-1][:CLIP] if said else ""


def signal_name(number: int) -> str:
    """SIGSEGV for 11."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
