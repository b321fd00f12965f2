"""Where a process stands that hangs, and which rank most likely holds up the others."""

import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from sft_dist.heartbeat import NOBODY, Heartbeat

WAITING_CODE = ("/torch/distributed/", "/torch/autograd/", "/deepspeed/comm/", "/deepspeed/runtime/zero/")
"""Where a main thread waits for other ranks. ZeRO-3 waits for a layer's weights by a handle, with no frame of torch."""

PACKAGE = Path(__file__).parent
OWN_FILES = {Path(__file__), PACKAGE / "watchdog.py"}
"""Not where anybody hangs: the code that looks."""


def describe_hang(beating: Sequence[Heartbeat], silent: Sequence[Heartbeat], *, timeout_s: float) -> tuple[int, str]:
    """(who most likely holds up the others or NOBODY, where every rank stands). silent: ranks that beat no more."""
    latest = max(peer.step for peer in [*beating, *silent])
    lines = [f"no progress for {timeout_s:.0f} s at step {latest}"]
    for peer in sorted([*beating, *silent], key=lambda peer: peer.rank):
        if peer in silent:
            place = f"no heartbeat for {time.time() - peer.time:.0f} s"
        else:
            place = f"{'waits' if peer.waits else 'is'} at {peer.where or 'an unknown place'}"
        lines.append(
            f"  rank {peer.rank} on {peer.host} (pid {peer.pid}), step {peer.step}, phase {peer.phase}: {place}"
        )
    suspects = suspects_of(beating, silent)
    if suspects:
        lines.append(f"  likely cause: rank {', '.join(str(peer.rank) for peer in suspects)}")
    return (suspects[0].rank if suspects else NOBODY), "\n".join(lines)


def raised_in(error: BaseException) -> str:
    """The innermost line of this package that the error passed; empty when it passed none."""
    lines = [(Path(frame.f_code.co_filename), line, frame) for frame, line in traceback.walk_tb(error.__traceback__)]
    own = [_place(path, line, frame) for path, line, frame in lines if path.is_relative_to(PACKAGE)]
    return own[-1] if own else ""


def _place(path: Path, line: int, frame: FrameType) -> str:
    name = path.relative_to(PACKAGE) if path.is_relative_to(PACKAGE) else path
    return f"{name.as_posix()}:{line} {frame.f_code.co_name}"


def stands(frame: FrameType | None) -> tuple[str, bool]:
    """(innermost line of this package, else of any, and whether it waits for other ranks there)."""
    innermost, waits = frame, False
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE) and path not in OWN_FILES:
            # On a GPU the wait is in reading the result, which leaves no frame of torch.
            waits = waits or (frame is innermost and path == PACKAGE / "engine" / "collectives.py")
            return _place(path, frame.f_lineno, frame), waits
        inside = path.as_posix()
        waits = waits or any(part in inside for part in WAITING_CODE)
        frame = frame.f_back
    return (
        (_place(Path(innermost.f_code.co_filename), innermost.f_lineno, innermost), waits) if innermost else ("", False)
    )


def suspects_of(beating: Sequence[Heartbeat], silent: Sequence[Heartbeat]) -> Sequence[Heartbeat]:
    """Who most likely holds up the rest: the frozen, else those that do not wait, else those behind; else nobody."""
    if silent:
        return silent
    working = [peer for peer in beating if not peer.waits]
    if 0 < len(working) < len(beating):
        return working
    latest = max(peer.step for peer in beating)
    return [peer for peer in beating if peer.step < latest]
