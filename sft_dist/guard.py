"""Which updates are withheld: what is not finite, and, if asked, what jumps."""

import math
from collections.abc import Sequence
from statistics import median

LEAST_RECENT = 16
"""The spike guard begins to judge when it has seen so many steps."""


def reason_to_withhold(loss: float, recent_losses: Sequence[float], *, spike_guard: float | None) -> str | None:
    """Why a step of this global loss must not update the weights; None when it may.

    recent_losses: of the last applied steps. spike_guard: withhold above so many times their median.
    """
    if not math.isfinite(loss):
        return "loss not finite"
    if spike_guard is not None and len(recent_losses) >= LEAST_RECENT:
        usual = median(recent_losses)
        if loss > spike_guard * usual:
            return f"loss {loss:.4g} is above {spike_guard:g} times the recent median {usual:.4g}"
    return None
