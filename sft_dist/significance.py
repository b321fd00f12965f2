"""How sure a score is, and whether one model is better than another on the same questions.

    shares of right answers   Wilson's interval              exact McNemar test on the answers that changed
    graded scores             bootstrap of the mean          paired permutation test on the mean difference

All 95% and two-sided; what is drawn is seeded, so that the same answers give the same figures.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Z_95 = 1.959963984540054
NUM_RESAMPLES = 10_000
EXACT_UP_TO = 12
"""Differences that are not zero: up to so many, all 2**n signs are tried instead of drawn ones."""
_BLOCK = 2**22
"""Numbers that are drawn at once."""

TestName = Literal["mcnemar", "permutation"]


def wilson(num_right: float, num_answers: int) -> tuple[float, float]:
    """The 95% interval of a share. Source: Wilson 1927."""
    if not num_answers:
        return 0.0, 1.0
    share, z2 = num_right / num_answers, Z_95**2
    middle = share + z2 / (2 * num_answers)
    half = Z_95 * math.sqrt(share * (1 - share) / num_answers + z2 / (4 * num_answers**2))
    scale = 1 + z2 / num_answers
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def bootstrap_mean(values: Sequence[float], *, seed: int) -> tuple[float, float]:
    """The 95% interval of a mean: percentiles of the means of samples drawn with replacement. One says nothing."""
    scores = np.asarray(values, dtype=np.float64)
    if len(scores) < 2:
        return 0.0, 1.0
    rng = np.random.default_rng(seed)
    means = [scores[rng.integers(len(scores), size=(rows, len(scores)))].mean(axis=1) for rows in _blocks(len(scores))]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def mcnemar(num_better: int, num_worse: int) -> float:
    """Two-sided p-value that as many answers became right as became wrong. Exact; 1 where none changed."""
    changed = num_better + num_worse
    tail = sum(math.comb(changed, k) for k in range(min(num_better, num_worse) + 1))
    return min(1.0, float(2 * tail / 2**changed))


def permutation(differences: Sequence[float] | NDArray[np.float64], *, seed: int) -> float:
    """Two-sided p-value that the signs of paired differences are chance: of their sum, under random signs.

    Exact up to 12 differences that are not zero; beyond, of 10,000 drawn ones, the observed one among them.
    """
    found = np.asarray(differences, dtype=np.float64)
    found = found[found != 0]
    if not len(found):
        return 1.0
    # Rounding must not set apart sums that are equal, nor make something of differences that cancel.
    observed = abs(found.sum()) - 1e-12 * np.abs(found).sum()
    if len(found) <= EXACT_UP_TO:
        signs = 1.0 - 2.0 * ((np.arange(2 ** len(found))[:, None] >> np.arange(len(found))) & 1)
        return float((np.abs(signs @ found) >= observed).mean())
    rng = np.random.default_rng(seed)
    as_extreme = 1
    for rows in _blocks(len(found)):
        signs = 1.0 - 2.0 * rng.integers(2, size=(rows, len(found)))
        as_extreme += int((np.abs(signs @ found) >= observed).sum())
    return as_extreme / (NUM_RESAMPLES + 1)


def interval(scores: Sequence[float], *, is_right_or_wrong: bool, seed: int) -> tuple[float, float]:
    """The 95% interval of the mean of these scores."""
    if is_right_or_wrong:
        return wilson(sum(scores), len(scores))
    return bootstrap_mean(scores, seed=seed)


def paired_test(
    before: Sequence[float], after: Sequence[float], *, is_right_or_wrong: bool, seed: int
) -> tuple[float, TestName]:
    """The p-value of a difference between scores of the same questions, and which test gave it."""
    differences: NDArray[np.float64] = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    if is_right_or_wrong:
        return mcnemar(int((differences > 0).sum()), int((differences < 0).sum())), "mcnemar"
    return permutation(differences, seed=seed), "permutation"


def p_text(p_value: float) -> str:
    """A p-value as tables show it: two digits, and a bound below 0.0001."""
    return f"{p_value:.2g}" if p_value >= 1e-4 else "< 0.0001"


def _blocks(width: int) -> list[int]:
    """Rows of the resamples, so many at a time that a block fits into memory."""
    rows = max(1, min(NUM_RESAMPLES, _BLOCK // width))
    return [min(rows, NUM_RESAMPLES - first) for first in range(0, NUM_RESAMPLES, rows)]
