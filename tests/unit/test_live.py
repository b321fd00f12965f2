"""The live view: right numbers, in little time, on a real terminal, above which nothing is lost."""

import fcntl
import io
import os
import pty
import select
import struct
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pyte
import pytest
from rich.console import Console

from sft_dist.errors import ConfigError
from sft_dist.live.state import MAX_BINS, Curve, Follower, LiveState, read_state
from sft_dist.live.tracker import LiveTracker, can_be_live, watch
from sft_dist.live.view import LiveView, flops_text, sparkline
from sft_dist.metrics import CommitMetrics, HeldOutMetrics, ScoreMetrics, to_line
from sft_dist.trackers import ConsoleTracker
from tests.unit.test_status import MadeRun, step_line

ROOT = Path(__file__).parents[2]


def start(attempt: int = 1, *, after_step: int = 0, num_steps: int = 1000, **more: Any) -> dict[str, Any]:
    return {"attempt": attempt, "after_step": after_step, "num_steps": num_steps, **more}


def shown(state: LiveState, *, width: int = 100, **how: str) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(LiveView(state, **how))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_curve_is_means_of_stretches_whatever_its_length() -> None:
    curve = Curve()
    values = {step: float(step % 7) for step in range(1, 5001)}
    for step, value in values.items():
        curve.add(step, value)
    assert len(curve.sums) <= MAX_BINS
    first = [values[step] for step in range(1, curve.steps_each + 1)]
    assert curve.columns(MAX_BINS)[0] == pytest.approx(sum(first) / len(first))
    (mean,) = curve.columns(1)
    assert mean == pytest.approx(sum(values.values()) / len(values))
    assert Curve().columns(10) == []


def test_a_sparkline_has_its_ends_at_the_extremes() -> None:
    assert sparkline([1.0, 1.5, 2.0]) == "▁▅█"
    assert sparkline([1.0, None, 2.0], ascii_only=True) == "_ #"
    assert sparkline([1.0, 10.0, 100.0]) == "▁▅█", "over a wide range it is logarithmic"
    assert sparkline([3.0, 3.0]) == "▁▁"
    assert sparkline([None]) == ""


def test_flops_have_a_unit_that_fits() -> None:
    assert [flops_text(value) for value in (3.2e9, 312e12, 1.5e15)] == ["3.2 GFLOP/s", "312.0 TFLOP/s", "1.5 PFLOP/s"]


def test_the_view_says_what_the_lines_say() -> None:
    environment = {"device": "cuda", "world_size": 4, "peak_flops": 1e15}
    state = LiveState("clinic", [start(environment=environment, planned_memory={"weights": 2**30, "states": 2**31})])
    state.feed(to_line(HeldOutMetrics(0, 3.5, 10, 100, 2.0, 1)))
    for step in range(1, 101):
        state.feed(to_line(step_line(step, loss=2.0, flops=1e15, seconds=0.5, peak_memory_bytes=2**31, epoch=0)))
    state.feed(to_line(HeldOutMetrics(100, 3.75, 10, 100, 8.0, 1)))
    state.feed(to_line(CommitMetrics(100, 2_000_000, 0.0, 1.5, 1)), now=time.time() - 200)
    state.feed(to_line(step_line(101, loss=1.0, applied=False, withheld="spike", flops=1e15, seconds=0.5, epoch=0)))
    text = shown(state)
    assert "step 101 of 1,000   epoch 1" in text
    assert "10%" in text
    assert "1 updates withheld" in text
    assert "3.7500 at step 100, least 3.5000 at 0" in text
    assert "1,600 tokens/s, mean 1,600 (400 each of 4)" in text
    assert "MFU 50.0%" in text, "1e15 FLOP in half a second, of four devices of 1e15 a second"
    assert "of 3.00 GiB planned" in text
    assert "step 100, 3 min ago, 2.0 MB in 1.5 s" in text
    assert state.left_s == pytest.approx((1000 - 101) * (0.5 + 10 / 101)), "held-out losses take their share of time"
    smoothed = 2.0
    smoothed += 2 / 26 * (1.0 - 2.0)
    assert f"smoothed {smoothed:.4f}" in text
    assert all(len(line) <= 80 for line in shown(state, width=80).splitlines())


def test_a_loss_that_is_not_finite_and_a_hostile_name_are_shown() -> None:
    state = LiveState("a[bold]\x1b[2J", [start()])
    state.feed(to_line(step_line(1)) | {"loss": None, "grad_norm": None, "applied": False})
    text = shown(state)
    assert "not finite" in text
    assert "a[bold]\\x1b[2J" in text


def test_what_a_start_went_back_behind_is_not_shown(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "r")
    run.start()
    for steps, loss in ((range(1, 51), 2.0), (range(51, 101), 1.0)):
        run.log(*(step_line(step, loss=loss, applied=step != 95) for step in steps))
        last = steps[-1]
        run.log(HeldOutMetrics(last, loss / 2, 10, 100, 1.0, 1), CommitMetrics(last, 1000, 0.0, 1.0, 1))
        run.log(ScoreMetrics(last, "held_out", "bmi", "numeric", loss / 4, 10, 1.0, 1))
    state, _ = read_state(run.directory)
    assert (state.step, state.num_withheld, state.held_out["held_out"].best_loss) == (100, 1, 0.5)
    run.start(after_step=50)
    state, follower = read_state(run.directory)
    assert (state.step, state.num_withheld, len(state.curve.columns(MAX_BINS))) == (50, 0, 50)
    assert state.smoothed == 2.0
    assert state.scores == {("held_out", "bmi"): (50, 0.5)}
    text = shown(state)
    assert "least" not in text
    assert "step 50, 0.0 MB" in text
    assert "1 restart, now on from step 50" in text
    run.log_steps(51, 53, loss=3.0, attempt=2)
    for line in follower.new_lines():
        state.feed(line)
    assert state.step == 53


def test_only_starts_that_trained_take_something_back(tmp_path: Path) -> None:
    """The second trained steps 41 to 45 again, the third failed before it wrote a line."""
    run = MadeRun(tmp_path / "r")
    run.start()
    run.log_steps(1, 50, loss=1.0)
    run.start(after_step=40)
    run.log_steps(41, 45, loss=2.0, attempt=2)
    run.start(after_step=20)
    run.start(after_step=45)
    state, _ = read_state(run.directory)
    assert state.curve.columns(MAX_BINS) == [1.0] * 40 + [2.0] * 5


def test_a_follower_reads_whole_lines_once(tmp_path: Path) -> None:
    follower = Follower(tmp_path)
    assert list(follower.new_lines()) == []
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "step", "step": 1}\n\0\0\0\n{"event": "st')
    assert [line["step"] for line in follower.new_lines()] == [1]
    with path.open("a") as file:
        file.write('ep", "step": 2}\n')
    assert [line["step"] for line in follower.new_lines()] == [2]


def test_plain_lines_stay_what_they_were_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    console = Console(file=out, width=120)
    assert not can_be_live(console)
    tracker = ConsoleTracker(console, num_steps=300)
    for step in range(1, 7):
        tracker.log(step_line(step, loss=2.5, applied=step != 5, withheld="loss not finite" if step == 5 else None))
    tracker.log(HeldOutMetrics(6, 1.25, 10, 100, 1.0, 1))
    tracker.log(CommitMetrics(6, 2_000_000, 0.25, 1.5, 1))
    numbers = "loss 2.5000  lr 1.00e-03  |g| 1.000  1,600 tok/s"
    assert out.getvalue().splitlines() == [
        f"step 3/300  {numbers}",
        f"step 5/300  {numbers}  WITHHELD: loss not finite",
        f"step 6/300  {numbers}",
        "held-out loss 1.2500 after step 6 (10 examples)",
        "checkpoint of step 6: 2.0 MB in 1.5 s, training stood still for 0.25 s",
    ]


@pytest.mark.parametrize(("width", "term", "live"), [(80, "xterm", True), (79, "xterm", False), (100, "dumb", False)])
def test_the_view_needs_a_terminal_of_80_columns(
    width: int, term: str, live: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", term)
    assert can_be_live(Console(file=io.StringIO(), width=width, force_terminal=True)) == live


def test_drawing_is_throttled_to_a_small_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only drawing moves on: after a draw of 0.1 s nothing is drawn for 20 s."""
    run = MadeRun(tmp_path / "r")
    run.start()
    now = [100.0]
    drawn = []
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    monkeypatch.setattr("sft_dist.live.tracker.time.monotonic", lambda: now[0])
    tracker = LiveTracker(console, run.directory)
    render = tracker._live.update

    def slow_render(*args: Any, **how: Any) -> None:
        drawn.append(now[0])
        now[0] += 0.1
        render(*args, **how)

    monkeypatch.setattr(tracker._live, "update", slow_render)
    for step in range(1, 501):
        now[0] += 0.1
        tracker.log(step_line(step))
    assert len(drawn) == 3, "of 50 s, 0.3 s: when it begins, and after each 20 s"
    tracker.close()
    assert "step 500 of 1,000" in console.file.getvalue()  # type: ignore[attr-defined]


SCENE = """
import logging, sys, time, warnings
from pathlib import Path
logging.basicConfig(level=logging.WARNING, handlers=[logging.StreamHandler(sys.stderr)])
from sft_dist.console import make_console
from sft_dist.live.tracker import LiveTracker
from sft_dist.metrics import HeldOutMetrics
from tests.unit.test_status import step_line
tracker = LiveTracker(make_console(), Path(sys.argv[1]))
for step in range(1, 41):
    tracker.log(step_line(step, loss=4 / step, applied=step != 7, withheld=None if step != 7 else "loss not finite"))
    if step == 10:
        logging.getLogger("x").warning("a warning of logging")
    if step == 12:
        print("a line that was printed")
        warnings.warn("a warning of python", stacklevel=1)
    time.sleep(0.03)
failed = sys.argv[2] == "failed"
if failed:
    import os
    os.write(2, b"\\r\\nerror: written by another process\\r\\n")
tracker.close(failed=failed)
print("after it")
"""


@pytest.fixture(scope="module", params=["ended", "failed"])
def screen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """What a terminal of 100 columns, narrowed to 90 midway, has shown in the end, scrolled lines among it."""
    run = MadeRun(tmp_path_factory.mktemp("scene") / "clinic")
    run.start(num_steps=40)
    return request.param, on_a_terminal([sys.executable, "-c", SCENE, str(run.directory), request.param])


def on_a_terminal(command: list[str], *, columns: int = 100, narrowed: int = 90) -> str:
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm", PYTHONPATH=str(ROOT), COLUMNS="")
        os.environ.pop("COLUMNS")
        time.sleep(0.1)  # until the terminal has its size
        os.execv(command[0], command)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    seen = pyte.HistoryScreen(columns, 30, history=200)
    stream, deadline = pyte.ByteStream(seen), time.monotonic() + 60
    while time.monotonic() < deadline:
        if not select.select([terminal], [], [], 0.5)[0]:
            continue
        try:
            data = os.read(terminal, 65536)
        except OSError:  # the process has gone
            break
        stream.feed(data)
        if b"warning of python" in data:
            fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, narrowed, 0, 0))
            seen.resize(30, narrowed)
    os.close(terminal)
    assert os.waitpid(pid, 0)[1] == 0
    gone = ["".join(line[i].data for i in range(columns)).rstrip() for line in seen.history.top]
    return "\n".join([*gone, *(line.rstrip() for line in seen.display)])


def test_what_is_said_meanwhile_stays_above_the_last_picture(screen: tuple[str, str]) -> None:
    how, text = screen
    said = ["step 7: update WITHHELD: loss not finite", "a warning of logging", "a line that was printed"]
    said += ["a warning of python", *(["error: written by another process"] if how == "failed" else [])]
    places = [text.index(words) for words in said]
    assert places == sorted(places), text
    picture = text.rindex("clinic   step 40 of 40")
    assert picture > places[-1], text
    assert text.rindex("after it") > picture
    assert text[picture:].count("trained" if how == "ended" else "failed") == 1
    assert "0.1000" in text[picture:], "the last loss"
    drawn = text.count("clinic   step")
    assert drawn <= (1 if how == "ended" else 2) + 1, "a picture is left behind where the window changed, no more"


def test_watch_shows_a_run_of_another_process_and_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    run = MadeRun(tmp_path / "far")
    run.start(num_steps=20)
    run.log_steps(1, 20, loss=0.5)
    (run.directory / "model").mkdir()
    out = io.StringIO()
    watch(run.directory, Console(file=out, width=100, force_terminal=True, color_system=None), every_s=0.01)
    assert "step 20 of 20" in out.getvalue()
    assert "finished" in out.getvalue()
    with pytest.raises(ConfigError, match="leave it out to be told once"):
        watch(run.directory, Console(file=io.StringIO()))


def test_watch_follows_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    run = MadeRun(tmp_path / "r")
    run.start(num_steps=40)
    run.log_steps(1, 30)
    run.beats()
    done = iter((lambda: run.start(after_step=20, num_steps=40), lambda: run.log_steps(21, 25, attempt=2), run.end))
    pictures = []

    def sleep(_: float) -> None:
        pictures.append(out.getvalue())
        out.seek(0)
        out.truncate()
        next(done)()

    monkeypatch.setattr("sft_dist.live.tracker.time.sleep", sleep)
    out = io.StringIO()
    watch(run.directory, Console(file=out, width=100, force_terminal=True, color_system=None))
    pictures.append(out.getvalue())
    for step, picture in zip((30, 20, 25, 25), pictures, strict=True):
        assert f"step {step} of 40" in picture
