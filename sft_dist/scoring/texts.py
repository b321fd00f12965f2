"""Texts as a whole: equal, or like a reference summary."""

import functools
import re
from typing import Any

from sft_dist.scoring.result import Score, TruthError, one_space, words_of


def score_exact(answer: str, truth: str, *, ignore_case: bool = False) -> Score:
    """1 for the same text, every run of white space counted as one space and none at the ends."""
    given, expected = one_space(words_of(answer)), one_space(truth)
    if ignore_case:
        given, expected = given.casefold(), expected.casefold()
    if given == expected:
        return Score(1.0, "the same text")
    shared = next((i for i, (a, b) in enumerate(zip(given, expected, strict=False)) if a != b), None)
    where = min(len(given), len(expected)) if shared is None else shared
    return Score(0.0, f"differs from character {where + 1}")


def score_summary(answer: str, truth: str) -> Score:
    """ROUGE-L F1: the longest common subsequence of words, as a share of both texts.

    Words are runs of letters and digits of any script in small letters, not stemmed: for English what the reference
    implementation counts. Source: Lin 2004, ROUGE. Raises TruthError for a truth without a word.
    """
    if not _Words().tokenize(truth):
        raise TruthError("has no word")
    found = _scorer().score(truth, words_of(answer))["rougeL"]
    return Score(float(found.fmeasure), f"precision {found.precision:.2f}, recall {found.recall:.2f}")


class _Words:
    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.casefold())


@functools.cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # a second, and only summaries need it

    return RougeScorer(["rougeL"], tokenizer=_Words())
