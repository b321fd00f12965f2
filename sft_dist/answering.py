"""All questions answered, by one process or by many: the answers do not depend on how many.

Batches are formed from all questions by length before any rank gets one, and a batch is answered by one rank as a
whole: what is padded to what, and so every rounding, is the same in every world.

    lengths   9 8 8 | 5 5 4 | 3 2      batch_size 3, longest first: what does not fit into memory shows at once
    2 ranks     0       1      0
"""

import json
from collections.abc import Callable, Mapping, Sequence

from sft_dist.data.questions import Question
from sft_dist.engine.collectives import gather_texts
from sft_dist.generate import Answerer, Sampling
from sft_dist.world import World


def form_batches(lengths: Sequence[int], *, batch_size: int) -> list[list[int]]:
    """The questions of each batch by their places, longest first, equal ones in their order."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


def answer_all(
    answerer: Answerer,
    questions: Sequence[Question],
    *,
    world: World,
    sampling: Sampling,
    batch_size: int,
    known: Mapping[int, str] | None = None,
    on_batch: Callable[[dict[int, str]], None] = lambda _: None,
) -> list[str]:
    """The answer to every question, in their order, on every rank. One collective, at the end.

    known: answers by place that are there already, alike on every rank; a batch of which one is missing is answered
    again as a whole. on_batch: called on the rank that has answered one.
    """
    found = dict(known or {})
    batches = form_batches([len(question.ids) for question in questions], batch_size=batch_size)
    left = [batch for batch in batches if any(index not in found for index in batch)]
    mine: dict[int, str] = {}
    for batch in left[world.rank :: world.size]:
        texts = answerer.complete([questions[index].ids for index in batch], sampling=sampling)
        answers = dict(zip(batch, texts, strict=True))
        on_batch(answers)
        mine |= answers
    for text in gather_texts(json.dumps(list(mine.items())), world=world):
        found |= dict(json.loads(text))
    return [found[index] for index in range(len(questions))]
