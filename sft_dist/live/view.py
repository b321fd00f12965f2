"""The live view of a run on a terminal: one picture for the run itself and for `sft-dist status --watch`."""

import math
import time
from collections.abc import Iterator, Sequence

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sft_dist.data.shown import safe
from sft_dist.live.state import LiveState, clock
from sft_dist.status import duration

MIN_COLUMNS = 80
"""On a narrower terminal lines would be cut; plain lines are better there."""
BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.:-=+*#"
LOG_FROM = 4
"""A curve whose highest value is so many times its lowest is drawn on a logarithmic scale."""
GIB = 2**30
NUM_SETS = 4
"""So many held-out sets and scores are told."""
STATE_STYLES = {"training": "green", "trained": "green", "running": "green", "finished": "green"}


class LiveView:
    """A picture of a state. doing: in a word, as "training"; detail: in more."""

    def __init__(self, state: LiveState, *, doing: str = "training", detail: str = "") -> None:
        self._state, self._doing, self._detail = state, doing, detail

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(options.max_width, 120)
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(no_wrap=True, overflow="ellipsis")
        for name, text in self._rows(width - 12, ascii_only=options.ascii_only):
            table.add_row(name, text)
        yield Group(Text(), self._headline(width), self._bar(width), table)

    def _headline(self, width: int) -> Text:
        state = self._state
        of_all = f" of {state.num_steps:,}" if state.num_steps else ""
        epoch = f"   epoch {state.last['epoch'] + 1}" if state.last else ""
        left = Text.assemble((safe(state.name), "bold"), f"   step {state.step:,}{of_all}{epoch}")
        right = Text.assemble((self._doing, STATE_STYLES.get(self._doing, "bold red")))
        left.truncate(max(1, width - len(right) - 2), overflow="ellipsis")
        return Text.assemble(left, " " * max(2, width - len(left) - len(right)), right, no_wrap=True)

    def _bar(self, width: int) -> Table:
        state = self._state
        share = state.step / state.num_steps if state.num_steps else 0.0
        text = Text(f"{share:4.0%}   {self._left()}")
        grid = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=1.0, completed=share, width=max(10, width - len(text) - 2))
        grid.add_row(bar, text)
        return grid

    def _left(self) -> str:
        left_s = self._state.left_s
        if left_s is None or self._doing not in ("training", "running"):
            return ""
        return f"{duration(left_s)} left, done {clock(left_s)}"

    def _rows(self, width: int, *, ascii_only: bool) -> Iterator[tuple[str, Text]]:
        """Name and text of each line below the bar, at most `width` wide."""
        state = self._state
        if self._detail:
            yield "", Text(safe(self._detail), style="dim")
        if state.last:
            yield "loss", self._loss()
            yield "", Text(sparkline(state.curve.columns(width), ascii_only=ascii_only), style="cyan")
        if state.held_out:
            yield "held out", Text("   ".join(self._held_out()))
        if state.scores:
            shown = list(state.scores.items())[:NUM_SETS]
            yield "scores", Text("   ".join(f"{safe(task)} {score:.0%}" for (_, task), (_, score) in shown))
        if state.last:
            yield "speed", Text(self._speed())
            yield "memory", Text(self._memory())
        yield "saved", Text(self._saved())

    def _loss(self) -> Text:
        last, smoothed = self._state.last, self._state.smoothed
        now = "not finite" if last["loss"] is None or not math.isfinite(last["loss"]) else f"{last['loss']:.4f}"
        norm = last["grad_norm"]
        gradient = "not finite" if norm is None or not math.isfinite(norm) else f"{norm:.3f}"
        text = Text.assemble(
            (now, "bold"),
            f"   smoothed {smoothed:.4f}" if smoothed is not None else "",
            f"   lr {last['lr']:.2e}   |g| {gradient}",
        )
        if self._state.num_withheld:
            text.append(f"   {self._state.num_withheld} updates withheld", style="bold red")
        return text

    def _held_out(self) -> Iterator[str]:
        for name, best in list(self._state.held_out.items())[:NUM_SETS]:
            which = "" if name == "held_out" else f"{safe(name)} "
            now = "not finite" if best.loss is None or not math.isfinite(best.loss) else f"{best.loss:.4f}"
            least = f", least {best.best_loss:.4f} at {best.best_step:,}" * (best.best_step != best.step)
            yield f"{which}{now} at step {best.step:,}{least}"

    def _speed(self) -> str:
        state = self._state
        now = f"{state.last['tokens_per_s']:,.0f} tokens/s"
        if state.mean_tokens_per_s is not None:
            now += f", mean {state.mean_tokens_per_s:,.0f}"
            if state.world_size > 1:
                now += f" ({state.mean_tokens_per_s / state.world_size:,.0f} each of {state.world_size})"
        return now + self._share_of_peak()

    def _share_of_peak(self) -> str:
        """MFU where the peak of the device is known, else what is computed."""
        state = self._state
        if state.mfu is not None:
            return f"   MFU {state.mfu:.1%}"
        return "" if state.flops_per_s is None else f"   {flops_text(state.flops_per_s / state.world_size)} a device"

    def _memory(self) -> str:
        last, planned = self._state.last, self._state.planned_bytes
        now = last.get("memory_bytes")
        text = f"{now / GIB:.2f} GiB now, " if now is not None else ""
        text += f"peak {last['peak_memory_bytes'] / GIB:.2f} GiB"
        return text + (f" of {planned / GIB:.2f} GiB planned" if planned else "")

    def _saved(self) -> str:
        state, commit = self._state, self._state.commit
        text = "no checkpoint yet"
        if commit:
            ago = "" if state.commit_time is None else f", {duration(max(0.0, time.time() - state.commit_time))} ago"
            text = f"step {commit['step']:,}{ago}, {commit['size_bytes'] / 1e6:,.1f} MB in {commit['seconds']:.1f} s"
        restarts = state.attempt - 1
        return text + (f"   {restarts} restart{'s' * (restarts > 1)}, now on from step {state.after_step:,}") * bool(
            restarts
        )


def sparkline(values: Sequence[float | None], *, ascii_only: bool = False) -> str:
    """One character a value, the lowest value as the lowest block."""
    blocks = ASCII_BLOCKS if ascii_only else BLOCKS
    known = [value for value in values if value is not None]
    if not known:
        return ""
    is_log = min(known) > 0 and max(known) > LOG_FROM * min(known)
    scaled = [None if value is None else math.log(value) if is_log else value for value in values]
    low = min(value for value in scaled if value is not None)
    span = max(value for value in scaled if value is not None) - low
    top = len(blocks) - 1
    return "".join(
        " " if value is None else blocks[round(top * (value - low) / span) if span else 0] for value in scaled
    )


def flops_text(flops_per_s: float) -> str:
    """With the unit that leaves a number of one to three digits before the point: "312.4 TFLOP/s"."""
    units = ("FLOP/s", "kFLOP/s", "MFLOP/s", "GFLOP/s", "TFLOP/s", "PFLOP/s")
    power = min(len(units) - 1, max(0, int(math.log10(flops_per_s) // 3))) if flops_per_s >= 1 else 0
    return f"{flops_per_s / 1000**power:.1f} {units[power]}"
