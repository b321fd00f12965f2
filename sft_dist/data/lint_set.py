"""Lint rules over a whole data set. They see the table of its rows, and no text."""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from sft_dist.data.lint_row import Finding
from sft_dist.data.lint_table import CUTS, LONG_RESPONSE, DataSet
from sft_dist.data.lint_text import LANGUAGES, SHAPES

MIN_GROUP = 8
"""Rows with one system prompt from which on their use of cues is judged by itself."""
MIN_TEMPLATE = 20
"""Rows with one prompt template from which on an answer of another shape stands out."""
MIXED = (0.05, 0.95)
USUAL_SHAPE = 0.9
USUALLY_CLOSED = 0.8
SAME_LENGTH_ROWS = 3
OUTLIER_MADS = 8
OUTLIER_FLOOR = 0.25
"""Least median deviation of log length: bounds an outlier by e**2 = 7 times the median at the tightest."""
MIN_OUTLIER_CHARS, MIN_OUTLIER_ROWS = 1000, 30
MAX_OUTLIERS = 20
MIN_LANGUAGE_SHARE, MIN_LANGUAGE_ROWS = 0.01, 2
Found = Iterator[tuple[int | None, str]]
"""Row and detail; None where the whole data set is meant."""


def system_missing(data: DataSet) -> Found:
    """Rows without a system prompt among rows that mostly have one."""
    has_system = data.table["system"] != 0
    if has_system.mean() > 0.5:
        for row in np.flatnonzero(~has_system):
            yield int(row), f"no system prompt; {has_system.mean():.0%} of the rows have one"


def no_system(data: DataSet) -> Found:
    """No row has a system prompt."""
    if not data.table["system"].any():
        yield None, "no row has a system prompt; one sentence of role and output style helps"


def system_differs(data: DataSet) -> Found:
    """How many system prompts there are."""
    num = len(np.unique(data.table["system"][data.table["system"] != 0]))
    if num > 1:
        yield None, f"{num} different system prompts"


def system_variant(data: DataSet) -> Found:
    """System prompts that differ in case, white space or punctuation only."""
    systems = data.table["system"]
    values, firsts, counts = np.unique(systems, return_index=True, return_counts=True)
    usual: dict[int, int] = {}  # loose key -> place in values of its most frequent writing
    places = sorted(
        (place for place in range(len(values)) if values[place]), key=lambda place: (-counts[place], firsts[place])
    )
    variants = []
    for place in places:
        first_place = usual.setdefault(int(data.table["loose_system"][firsts[place]]), place)
        if first_place != place:
            variants.append((firsts[place], place, first_place))
    for row, place, other in sorted(variants):
        detail = (
            f"a system prompt of {counts[place]} rows differs only in case, white space or punctuation from that of "
            f"{counts[other]} rows ({data.origin(firsts[other])})"
        )
        yield int(row), detail


def no_trailing_cue(data: DataSet) -> Found:
    """Rows of one system prompt of which some prompts end in a cue and some do not; the fewer are reported."""
    cues = data.table["cue"]
    found = []
    for rows in _by_system(data):
        share = cues[rows].mean()
        if MIXED[0] <= share <= MIXED[1]:
            is_odd = cues[rows] == (share < 0.5)
            ends = "in a cue" if share < 0.5 else "without a cue"
            detail = f"the prompt ends {ends}, as {is_odd.mean():.0%} of {len(rows)} with this system prompt do"
            found += [(row, detail) for row in rows[is_odd]]
    for row, detail in sorted(found):
        yield int(row), detail


def mixed_formats(data: DataSet) -> Found:
    """Answers of another shape than nearly all with the same prompt template."""
    shapes, found = data.table["shape"], []
    for rows in _groups(data.table["skeleton"], at_least=MIN_TEMPLATE):
        counts = np.bincount(shapes[rows], minlength=len(SHAPES))
        usual = int(counts.argmax())
        if not USUAL_SHAPE < counts[usual] / len(rows) < 1:
            continue
        # A number may answer a question that others answer in words; no other two shapes are alike.
        is_odd = shapes[rows] != usual
        if SHAPES[usual] == "prose":
            is_odd &= shapes[rows] != SHAPES.index("number")
        share = (
            f"{counts[usual] / len(rows):.1%} of {len(rows)} prompts of this template are answered by {SHAPES[usual]}"
        )
        found += [(row, f"{SHAPES[shapes[row]]} where {share}") for row in rows[is_odd]]
    for row, detail in sorted(found):
        yield int(row), detail


def answer_shapes(data: DataSet) -> Found:
    """The distribution of answer shapes, if there are several."""
    counts = np.bincount(data.table["shape"], minlength=len(SHAPES))
    if (counts > 0).sum() > 1:
        order = sorted(np.flatnonzero(counts), key=lambda shape: -counts[shape])
        yield None, ", ".join(f"{SHAPES[s]} {counts[s] / len(data):.1%}" for s in order)


def duplicate(data: DataSet) -> Found:
    """Conversations that occurred before, but for case and white space."""
    for row, first in repeats(data.table["conversation"]):
        yield int(row), f"the same as {data.origin(first)}"


def duplicate_prompt_different_answer(data: DataSet) -> Found:
    """Prompts that occurred before with another answer, at least one closed: number, choice, JSON, a few words."""
    for row, first in _answered_again(data):
        if data.table["closed"][row] or data.table["closed"][first]:
            yield row, f"the prompt of {data.origin(first)} with another answer"


def reworded_answer(data: DataSet) -> Found:
    """Prompts that occurred before with another answer, both in whole sentences: often meant, as in chat data."""
    for row, first in _answered_again(data):
        if not (data.table["closed"][row] or data.table["closed"][first]):
            yield row, f"the prompt of {data.origin(first)}, answered in other words"


def length_outlier(data: DataSet) -> Found:
    """Rows with a prompt or response far longer than the others; the most extreme first."""
    if len(data) < MIN_OUTLIER_ROWS:
        return
    found = []
    for field, name in (("prompt_chars", "prompt"), ("response_chars", "response")):
        lengths = data.table[field].astype(np.float64)
        logs = np.log(np.maximum(lengths, 1))
        median = np.median(logs)
        spread = max(float(np.median(np.abs(logs - median))), OUTLIER_FLOOR)
        is_outlier = (logs > median + OUTLIER_MADS * spread) & (lengths >= MIN_OUTLIER_CHARS)
        for row in np.flatnonzero(is_outlier):
            detail = f"a {name} of {int(lengths[row])} characters, {lengths[row] / np.exp(median):.0f} times the median"
            found.append((median - logs[row], row, detail))
    details: dict[int, list[str]] = {}
    for _, row, detail in sorted(found):
        details.setdefault(int(row), []).append(detail)
    yield from [(row, ", ".join(said)) for row, said in details.items()][:MAX_OUTLIERS]


def cut_answer(data: DataSet) -> Found:
    """Responses that stop in the middle, or at one same length."""
    table = data.table
    cuts = table["cut"].copy()
    in_sentence = CUTS.index(CUTS[1])
    is_closed = cuts[table["long_prose"]] != in_sentence
    if not len(is_closed) or is_closed.mean() <= USUALLY_CLOSED:
        cuts[cuts == in_sentence] = 0
    lengths = table["response_chars"]
    longest = int(lengths.max())
    at_cap = np.flatnonzero((lengths == longest) & (longest > LONG_RESPONSE))
    # Whole answers of a template can be equally long; those of a length limit mostly end anywhere.
    capped = (
        set(at_cap.tolist()) if len(at_cap) >= SAME_LENGTH_ROWS and (table["cut"][at_cap] > 0).mean() > 0.5 else set()
    )
    for row in sorted({*np.flatnonzero(cuts).tolist(), *capped}):
        if row in capped:
            yield int(row), f"one of {len(capped)} responses of exactly {longest} characters, the longest there are"
        else:
            yield int(row), f"the response ends {CUTS[cuts[row]]}"


def mixed_instructions(data: DataSet) -> Found:
    """Instructions in several languages."""
    counts = np.bincount(data.table["language"], minlength=len(LANGUAGES))
    counts[LANGUAGES.index("unknown")] = 0
    known = int(counts.sum())
    used = [
        number
        for number in np.argsort(-counts, kind="stable")
        if counts[number] >= max(MIN_LANGUAGE_ROWS, MIN_LANGUAGE_SHARE * known)
    ]
    if len(used) > 1:
        shares = ", ".join(f"{LANGUAGES[number]} {counts[number] / known:.1%}" for number in used)
        yield None, f"{shares} of the {known} prompts whose language is plain"


RULES: tuple[Callable[[DataSet], Found], ...] = (
    system_missing, no_system, system_differs, system_variant, no_trailing_cue, mixed_formats, answer_shapes, duplicate,
    duplicate_prompt_different_answer, reworded_answer, length_outlier, cut_answer, mixed_instructions,
)  # fmt: skip


def lint_data_set(data: DataSet) -> Iterator[Finding]:
    """What the rules over a data set find."""
    for rule in RULES if len(data) else ():
        for row, detail in rule(data):
            yield Finding(rule.__name__, None if row is None else data.origin(row), detail)


def leakage(train: DataSet, held_out: DataSet) -> Iterator[Finding]:
    """Held-out prompts that are trained on, whatever the system prompt; the answer does not matter."""
    for row, first in held_out.rows_in(train, "question").items():
        yield Finding("leakage", held_out.origin(row), f"its prompt is trained on at {train.origin(first)}")


def repeats(keys: NDArray[np.uint64]) -> Iterator[tuple[int, int]]:
    """Rows whose key occurred before, each with the first row that has it."""
    _, firsts, inverse = np.unique(keys, return_index=True, return_inverse=True)
    for row in np.flatnonzero(firsts[inverse] != np.arange(len(keys))):
        yield int(row), int(firsts[inverse[row]])


def _answered_again(data: DataSet) -> Iterator[tuple[int, int]]:
    answers = data.table["answer"]
    return ((row, first) for row, first in repeats(data.table["prompt"]) if answers[row] != answers[first])


def _by_system(data: DataSet) -> Iterator[NDArray[np.int64]]:
    """Rows of each frequent system prompt, then those of all rare ones together, if they are many enough to judge."""
    rest = np.ones(len(data), dtype=np.bool_)
    for rows in _groups(data.table["system"], at_least=MIN_GROUP):
        rest[rows] = False
        yield rows
    if rest.sum() >= MIN_GROUP:
        yield np.flatnonzero(rest)


def _groups(keys: NDArray[np.uint64], *, at_least: int) -> Iterator[NDArray[np.int64]]:
    """Rows that share a key, ascending, for keys of enough rows."""
    order = np.argsort(keys, kind="stable")
    edges = np.flatnonzero(np.diff(keys[order])) + 1
    for rows in np.split(order, edges) if len(edges) < len(keys) else ():
        if len(rows) >= at_least:
            yield rows
