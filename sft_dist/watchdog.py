"""A thread per rank that ends the run when a peer has died or all ranks hang, under any launcher.

Ranks see each other only through their heartbeat files. Nobody can wait in a collective for a process that is gone:
the one who looks ends itself, says who is to blame, and leaves that in its own heartbeat for the others.
"""

import contextlib
import faulthandler
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from sft_dist import heartbeat
from sft_dist.errors import RankLostError, SftDistError
from sft_dist.hang import describe_hang, raised_in, stands
from sft_dist.heartbeat import FINISHED, LEFT, NOBODY, RUNNING, Heartbeat
from sft_dist.rank_log import log_path, original_stderr
from sft_dist.redact import redacted
from sft_dist.run_files import HEARTBEATS
from sft_dist.world import World, report_exit

GRACE_S = 3.0
"""The main thread may raise by itself for so long after a loss was seen: gloo does, NCCL waits for ever."""

LEAVE_S = 5.0
"""A main thread that has raised may clean up for so long: leaving a broken process group can hang."""

SHARE_BEATS = 3
"""All ranks learn of a hang and write their stacks in so many beats: two hops over rank 0, and one to spare."""

C_TIMER_S = 10.0
"""So much later than the thread, a timer outside of Python ends a rank that never lets the thread run."""

GOES_ON = "the last committed checkpoint is whole, and the same command goes on from it"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loss:
    """Why the run cannot go on. rank: who is to blame, or NOBODY."""

    rank: int
    cause: str


@dataclass
class _Peer:
    heartbeat: Heartbeat | None
    changed_at: float  # on this rank's monotonic clock: clocks of hosts differ


class Watchdog:
    """Beats for this rank, watches the others, and ends this process when the run cannot go on.

    dead_after_s: a peer on another host without a beat for so long is lost, if this rank waits as long.
    timeout_s: no progress on any rank for so long is a hang.
    earlier_reason: on rank 0, why the start before could not go on, where its processes could say it.
    on_hang: writes what else may explain one; it gets a few seconds.
    With an error on its way out of the `with` block, the process has LEAVE_S to end before it is ended: use it where
    the process ends with the run.
    """

    def __init__(
        self,
        run_dir: Path,
        world: World,
        *,
        timeout_s: float,
        dead_after_s: float = heartbeat.DEAD_AFTER_S,
        on_hang: Callable[[], None] | None = None,
    ) -> None:
        self.world, self.timeout_s, self.dead_after_s = world, timeout_s, dead_after_s
        self._run_dir, self._directory, self._on_hang = run_dir, run_dir / HEARTBEATS, on_hang
        self._own = heartbeat.first_heartbeat(world.rank, socket.gethostname(), world_size=world.size)
        self._step, self._phase, self._progress_at = 0, self._own.phase, time.monotonic()
        self._forward_s = 0.0
        self._peers: dict[int, _Peer] = {}
        self._own_lock = threading.Lock()
        self.earlier_reason = ""
        self._unhurried = False
        self._watches = self._explains = self._is_hanging = self._write_failed = self._said_unwritten = False
        self._loss: Loss | None = None
        self._loss_at = self._next_sweep = 0.0
        self._raised_at: float | None = None
        self._raised_in = ""
        self._seen, self._wake, self._stop = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._log = 2

    def __enter__(self) -> "Watchdog":
        with contextlib.suppress(OSError):  # the heartbeat says it
            log_path(self._run_dir, self.world.rank).parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._log = os.open(log_path(self._run_dir, self.world.rank), flags, 0o666)
        # An older run's file must not speak for this process when the disk has no room for its own.
        with contextlib.suppress(OSError):
            earlier = heartbeat.read_all(self._directory) if self.world.is_main else []
            self.earlier_reason = next((old.reason for old in earlier if old.reason), "")
            heartbeat.remove(self._directory, self.world.rank)
            for old in earlier:
                if old.rank >= self.world.size:
                    heartbeat.remove(self._directory, old.rank)
        self._beat()
        self._thread.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
        elif isinstance(error, RankLostError) and self._loss is not None:
            self._leave(self._loss.cause, blamed=self._loss.rank)
        elif self._own.state != LEFT:
            self._leave(_in_short(error), blamed=self.world.rank)
        self._stop.set()
        self._wake.set()
        self._thread.join(timeout=2 * heartbeat.BEAT_S)  # its last act is to write the state
        faulthandler.cancel_dump_traceback_later()
        if self._log != 2 and not self._thread.is_alive():
            os.close(self._log)
        if error is not None and self.world.size > 1:
            code = error.exit_code if isinstance(error, SftDistError) else 1
            end = threading.Timer(LEAVE_S, os._exit, [code])
            end.daemon = True
            end.start()

    def watch_peers(self) -> None:
        """All ranks are in the process group: from now on their heartbeats are of this run, and count."""
        self._watches = self.world.size > 1
        self._wake.set()

    def progress(self, *, step: int | None = None, phase: str | None = None, forward_s: float | None = None) -> None:
        """The main thread gets on. Cheap: call it wherever a long time may pass until the next call."""
        if step is not None:
            self._step = step
        if phase is not None:
            self._phase = phase
        if forward_s is not None:
            self._forward_s = forward_s
        self._progress_at = time.monotonic()

    @contextlib.contextmanager
    def unhurried(self, phase: str) -> Iterator[None]:
        """What takes as long as disks and networks take: in this block it counts as progress that the process runs."""
        self.progress(phase=phase)
        self._unhurried = True
        try:
            yield
        finally:
            self._unhurried = False
            self.progress()

    @contextlib.contextmanager
    def leaving_on_error(self) -> Iterator[None]:
        """Tell the peers of an error when it leaves the block, before what is around the block is cleared up."""
        try:
            yield
        except SftDistError as error:
            if not isinstance(error, RankLostError):
                self._leave(_in_short(error), blamed=self.world.rank)
            raise

    def finish(self) -> None:
        """The run ends well, finished or stopped on request; peers that end now are not minded."""
        self._change(state=FINISHED)
        self._wake.set()

    def explain(self, error: BaseException, *, wait_s: float = 3.0) -> RankLostError | None:
        """The error to raise instead when `error` came from a peer's death; None when it is this rank's own.

        Call it with what the main thread caught. It waits up to wait_s for a dead peer to be seen, and up to
        dead_after_s for one on another host that is silent. The peers are told of an error of this rank's own.
        One rank's answer has is_local True: it speaks for all.
        """
        if isinstance(error, RankLostError):
            return error
        if not self._watches or not _may_come_from_a_peer(error):
            self._leave(_in_short(error), blamed=self.world.rank)
            return None
        self._raised_in, self._explains = raised_in(error), True
        self._wake.set()
        started = time.monotonic()
        while self._loss is None:
            waited_s = time.monotonic() - started
            if waited_s > wait_s and not self._may_yet_be_told(error, waited_s):
                self._leave(_in_short(error), blamed=NOBODY)
                return None
            self._seen.wait(0.05)
        self._raised_at = time.monotonic()
        lost = RankLostError(self._message(self._loss))
        lost.is_local = self._speaks(self._loss)
        return lost

    def _may_yet_be_told(self, error: BaseException, waited_s: float) -> bool:
        """A silent peer may turn out dead, and a collective that timed out is a hang, about to be ended."""
        timed_out = any(sign in str(error).lower() for sign in ("timed out", "timeout"))
        until_hang_s = self.timeout_s + 3 * heartbeat.BEAT_S - (time.monotonic() - self._progress_at)
        dead_soon = self._is_one_silent() and waited_s < self.dead_after_s + 2 * heartbeat.BEAT_S
        return self._is_hanging or dead_soon or (timed_out and until_hang_s > 0)

    def _leave(self, reason: str, *, blamed: int) -> None:
        self._change(state=LEFT, reason=reason, blamed=blamed)
        self._wake.set()

    def _change(self, **values: Any) -> Heartbeat:
        """Both threads change the heartbeat; neither may undo what the other has just said."""
        with self._own_lock:
            self._own = replace(self._own, **values)
            return self._own

    # The thread: everything below runs in it.

    def _watch(self) -> None:
        while not self._stop.is_set():
            self._rest(0.2 * heartbeat.BEAT_S if self._explains else heartbeat.BEAT_S)
            if self._unhurried:
                self.progress()
            self._beat()
            if self._stop.is_set() or self._own.state == FINISHED:
                continue
            if self._watches and self._loss is None and self._own.state == RUNNING:
                self._look_for_a_loss()
            if self._loss is not None:
                self._end_when_due(self._loss)
            elif self._hangs():
                self._end_a_hang()
        self._beat()

    def _rest(self, seconds: float) -> None:
        """Wait. A process that was stopped meanwhile (SIGSTOP, Ctrl-Z) has not been idle."""
        started = time.monotonic()
        self._wake.wait(seconds)
        self._wake.clear()
        if time.monotonic() - started > seconds + 3 * heartbeat.BEAT_S:
            self.progress()

    def _beat(self) -> None:
        started = time.monotonic()
        now = self._change(
            beat=self._own.beat + 1,
            step=self._step,
            phase=self._phase,
            idle_s=round(started - self._progress_at, 1),
            forward_s=round(self._forward_s, 6),
            time=time.time(),
        )
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            heartbeat.write(self._directory, now)
            self._write_failed = False
        except OSError as error:
            self._write_failed = True
            if not self._said_unwritten:
                self._said_unwritten = True
                logger.warning("the heartbeat cannot be written, the run goes on without it: %s", error)
        if time.monotonic() - started > 3 * heartbeat.BEAT_S:
            for peer in self._peers.values():  # the file system was away, for them as well
                peer.changed_at = time.monotonic()
        if self.world.size > 1:
            # Armed anew by whoever may run Python: it goes off only when no thread can.
            with contextlib.suppress(OSError):
                faulthandler.dump_traceback_later(self.timeout_s + C_TIMER_S, exit=True, file=self._log)

    def _watched(self) -> Iterable[int]:
        """Rank 0 looks at all, the others at rank 0 and at one neighbour: N ranks open 3N files a second, not N * N."""
        size, rank = self.world.size, self.world.rank
        return range(1, size) if rank == 0 else sorted({0, (rank + 1) % size} - {rank})

    def _look_for_a_loss(self) -> None:
        """Find the first cause among what the peers' files say; those who only repeat it come last."""
        found: list[tuple[bool, float, Loss]] = []
        for rank in self._watched():
            last = self._look_at(rank)
            if last is None:
                continue
            loss = self._loss_of(last)
            if loss is not None:
                found.append((loss.rank != rank, last.time + heartbeat.BEAT_S * (last.state == RUNNING), loss))
        if found:
            self._loss, self._loss_at = min(found, key=lambda one: one[:2])[2], time.monotonic()
            self._change(reason=self._loss.cause, blamed=self._loss.rank)
            self._beat()  # others look at this rank to learn of it
            self._seen.set()

    def _look_at(self, rank: int) -> Heartbeat | None:
        """The last heartbeat of a peer; one from another process (a second job, soon refused) does not count."""
        peer = self._peers.setdefault(rank, _Peer(None, time.monotonic()))
        seen = heartbeat.read(self._directory, rank)
        if seen is not None and (peer.heartbeat is None or seen.is_same_process(peer.heartbeat)):
            if peer.heartbeat is None or seen.beat != peer.heartbeat.beat:
                peer.changed_at = time.monotonic()
            peer.heartbeat = seen
        return peer.heartbeat

    def _loss_of(self, last: Heartbeat) -> Loss | None:
        """What the run has lost as this peer's heartbeat tells it."""
        who = f"rank {last.rank} on {last.host} (pid {last.pid})"
        when = f"after step {last.step} (phase {last.phase})"
        if last.reason and last.blamed != last.rank:  # it saw the loss, or suffered from it
            return Loss(last.blamed, last.reason if last.blamed != NOBODY else f"{who} left {when}: {last.reason}")
        if last.state == LEFT:
            return Loss(last.rank, f"{who} left {when}: {last.reason}")
        if last.state == FINISHED:
            return None
        alive = heartbeat.is_alive(last)
        if alive is False:
            # It may have written that it leaves between the look at its file and the look at its pid.
            final = self._look_at(last.rank)
            if final is not None and final.state != RUNNING:
                return self._loss_of(final)
            return Loss(last.rank, f"{who} died {when}")
        now = time.monotonic()
        silent_s = now - self._peers[last.rank].changed_at
        idle_s = self.dead_after_s if self._explains else now - self._progress_at
        # A rank that cannot write blames no silence: the file system is what failed. Nor does one that gets on.
        if alive is None and not self._write_failed and min(silent_s, idle_s) >= self.dead_after_s:
            return Loss(last.rank, f"{who} has given no sign of life for {silent_s:.0f} s {when}")
        return None

    def _is_one_silent(self) -> bool:
        now = time.monotonic()
        return any(
            now - peer.changed_at > 3 * heartbeat.BEAT_S
            for peer in list(self._peers.values())
            if peer.heartbeat is not None and heartbeat.is_alive(peer.heartbeat) is None
        )

    def _end_when_due(self, loss: Loss) -> None:
        now = time.monotonic()
        if self._raised_at is not None:
            if now - self._raised_at > LEAVE_S:
                self._end(loss, said=True)
        elif not self._explains and now - self._loss_at > GRACE_S:
            self._end(loss)

    def _hangs(self) -> bool:
        """True when no rank got on for timeout_s, or a peer has found that out."""
        now = time.monotonic()
        if self._watches and now >= self._next_sweep:
            peers = [self._peers[rank].heartbeat for rank in self._watched() if rank in self._peers]
            if any(peer is not None and peer.state == RUNNING and peer.where for peer in peers):
                return True
        own_idle_s = now - self._progress_at
        if own_idle_s < self.timeout_s or now < self._next_sweep:
            return False
        # One rank may work for long while all others wait for it: that is no hang as long as it gets on.
        least = min([own_idle_s, *(_idle_s(peer) for peer in self._running_peers())])
        self._next_sweep = now + self.timeout_s - least
        return least >= self.timeout_s

    def _running_peers(self) -> list[Heartbeat]:
        if not self._watches:
            return []
        others = (heartbeat.read(self._directory, rank) for rank in range(self.world.size) if rank != self.world.rank)
        return [peer for peer in others if peer is not None and peer.state == RUNNING]

    def _end_a_hang(self) -> None:
        """Write this rank's stacks, let the others do so, then end; unless one of them got on meanwhile."""
        self._is_hanging, state = True, self._own.state
        _bounded(self._dump_stacks, seconds=heartbeat.BEAT_S)
        where, waits = stands(sys._current_frames().get(threading.main_thread().ident or 0))
        if self._explains:  # it waited until the collective gave up
            where, waits = self._raised_in or where, True
        self._change(where=where, waits=waits)
        self._beat()
        before = {peer.rank: peer for peer in self._running_peers()}
        if self._on_hang is not None:
            threading.Thread(target=self._on_hang, name="on_hang", daemon=True).start()
        deadline = time.monotonic() + SHARE_BEATS * heartbeat.BEAT_S
        while time.monotonic() < deadline:
            self._stop.wait(0.5 * heartbeat.BEAT_S)
            self._beat()
        after = [heartbeat.read(self._directory, rank) or peer for rank, peer in before.items()]
        beating = [peer for peer in after if peer.beat != before[peer.rank].beat]
        silent = [peer for peer in after if peer.beat == before[peer.rank].beat]
        least = min([time.monotonic() - self._progress_at, *(peer.idle_s for peer in beating if peer.state == RUNNING)])
        if self._stop.is_set() or self._own.state != state or least < self.timeout_s:
            self._change(where="", waits=False)
            self._next_sweep = time.monotonic() + max(self.timeout_s - least, SHARE_BEATS * heartbeat.BEAT_S)
            self._is_hanging = False
            return
        suspect, text = describe_hang([*beating, self._own], silent, timeout_s=self.timeout_s)
        self._end(Loss(suspect, text), speaks=all(peer.rank > self.world.rank for peer in beating))

    def _dump_stacks(self) -> None:
        title = f"no progress for {self.timeout_s:.0f} s: Python stacks of rank {self.world.rank}, "
        os.write(self._log, f"{title}step {self._step}, phase {self._phase}\n".encode())
        faulthandler.dump_traceback(file=self._log, all_threads=True)

    def _message(self, loss: Loss) -> str:
        folder = log_path(self._run_dir, 0).parent
        return f"{loss.cause}\nrank {self.world.rank} ends with it: {GOES_ON}; the log of every rank is in {folder}"

    def _speaks(self, loss: Loss) -> bool:
        """True on the lowest rank that is left to say it."""
        for rank in range(self.world.rank):
            other = heartbeat.read(self._directory, rank)
            if other is None or rank == loss.rank or other.state == FINISHED:
                continue
            if other.state == LEFT and other.blamed == rank:  # it fell over something else, and said that
                continue
            alive = heartbeat.is_alive(other)
            recent = time.time() - other.time < self.dead_after_s / 2
            if other.state == LEFT or alive or (alive is None and recent):
                return False
        return True

    def _end(self, loss: Loss, *, said: bool = False, speaks: bool | None = None) -> None:
        """End this process, whatever its main thread is stuck in. Nothing here may wait for long."""
        if self._stop.is_set():
            return
        self._leave(loss.cause, blamed=loss.rank)
        _bounded(self._beat, seconds=2.0)
        text = "".join(f"error: {line}\n" for line in self._message(loss).splitlines())

        def log() -> None:
            os.write(self._log, text.encode())

        def say() -> None:
            stream = original_stderr()
            if not said and (self._speaks(loss) if speaks is None else speaks):
                stream.write(text)
                stream.flush()

        _bounded(log, seconds=1.0)
        _bounded(say, seconds=2.0)
        report_exit(RankLostError.exit_code)
        os._exit(RankLostError.exit_code)


def _bounded(action: Callable[[], None], *, seconds: float) -> None:
    """Do it, but do not wait for longer: a full pipe or a dead file server must not keep a lost run alive."""

    def attempt() -> None:
        with contextlib.suppress(OSError, ValueError):
            action()

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(timeout=seconds)


def _in_short(error: BaseException) -> str:
    """Type and first line."""
    first = (redacted(str(error)).splitlines() or [""])[0][:300]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _may_come_from_a_peer(error: BaseException) -> bool:
    """True for what gloo, NCCL and the store raise when a peer is gone; all of it is RuntimeError or OSError."""
    while error.__cause__ is not None:
        error = error.__cause__
    if not isinstance(error, RuntimeError | OSError) or isinstance(error, FileNotFoundError):
        return False
    text = f"{type(error).__name__} {error}".lower()
    signs = ("gloo", "nccl", "connection", "socket", "broken pipe", "store", "timed out", "timeout", "dist", "peer")
    return any(sign in text for sign in signs)


def _idle_s(peer: Heartbeat) -> float:
    """Seconds since the peer's last progress, counting those that it has not beaten."""
    return peer.idle_s + max(0.0, time.time() - peer.time)
