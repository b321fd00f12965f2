"""Held-out rows as questions: the prompt is all but the last assistant turn, which is the ground truth."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sft_dist.config import Recipe
from sft_dist.data.chat import ChatTokenizer
from sft_dist.data.conversation import BadRow, Conversation, Message, Origin
from sft_dist.data.files import iter_rows
from sft_dist.data.held_out import HeldOut
from sft_dist.data.rows import detect_format, parse_row, read_field
from sft_dist.errors import ConfigError
from sft_dist.scoring.result import words_of

ANY_TASK = "all"
"""The task of rows that name none."""


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, its true answer, and its tokens. id: file and line of the row. ids: encoded as training does."""

    set_name: str
    id: str
    task: str
    messages: tuple[Message, ...]
    truth: str
    ids: tuple[int, ...]

    @property
    def asks(self) -> str:
        """The last turn of the prompt."""
        return self.messages[-1].content if self.messages else ""


@dataclass(frozen=True)
class Questions:
    """Those that are asked, set by set, and how many rows of each set are not, by cause."""

    asked: tuple[Question, ...]
    left_out: dict[str, dict[str, int]]


def read_questions(
    recipe: Recipe, sets: Sequence[HeldOut], tokenizer: ChatTokenizer, *, limit: int | None, max_positions: int | None
) -> Questions:
    """The questions of every set: of the rows whose loss is measured, at most `limit` of each, a seeded subset.

    max_positions: what the model can read and write, None for no limit known.
    Not asked are rows whose last turn is not an assistant's, or has no text, and prompts longer than data.max_tokens.
    Raises ConfigError where the longest prompt leaves no room for evaluate.max_new_tokens.
    """
    assert recipe.evaluate is not None
    asked: list[Question] = []
    left_out: dict[str, dict[str, int]] = {}
    for held_out in sets:
        found, causes = _rows_of(held_out, task_field=recipe.evaluate.task_field)
        if limit is not None and len(found) > limit:
            chosen = np.random.default_rng(recipe.evaluate.seed).choice(len(found), size=limit, replace=False)
            found = [found[index] for index in sorted(chosen)]
        for conversation, task in found:
            *messages, last = conversation.messages
            ids = tokenizer.encode_prompt(messages, conversation.tools)
            if len(ids) > recipe.data.max_tokens:
                causes["prompt_too_long"] += 1
                continue
            truth = words_of(last.content)
            asked.append(Question(held_out.name, str(conversation.origin), task, tuple(messages), truth, tuple(ids)))
        left_out[held_out.name] = dict(causes)
    _require_room(asked, recipe.evaluate.max_new_tokens, max_positions)
    return Questions(tuple(asked), left_out)


def require_best_task(recipe: Recipe, asked: Sequence[Question]) -> None:
    """Raise ConfigError where evaluate.keep_best_by names a task of which there is no question."""
    section = recipe.evaluate
    if section is None or section.best.measure in ("loss", "score"):
        return
    best = section.best
    tasks = list(dict.fromkeys(question.task for question in asked if question.set_name == best.set_name))
    if best.measure not in tasks:
        raise ConfigError(
            f"evaluate.keep_best_by={best}: no question of the set {best.set_name!r} has the task {best.measure!r}; "
            f"its tasks are {', '.join(tasks) or 'none'}, by the field {section.task_field!r} of its rows"
        )


def _rows_of(held_out: HeldOut, *, task_field: str) -> tuple[list[tuple[Conversation, str]], "Counter[str]"]:
    """The set's conversations that can be asked, each with its task, and why others cannot."""
    origins = {held_out.store.origin(int(index)) for index in held_out.ids}
    found, causes = [], Counter[str]()
    for conversation, task in _conversations(held_out, origins, task_field):
        if conversation.messages[-1].role != "assistant":
            causes["last_turn_is_no_answer"] += 1
        elif not words_of(conversation.messages[-1].content):
            causes["answer_without_text"] += 1
        else:
            found.append((conversation, task))
    return found, causes


def _conversations(held_out: HeldOut, origins: set[Origin], task_field: str) -> Iterator[tuple[Conversation, str]]:
    for source in held_out.sources:
        row_format = detect_format(source)
        for raw in iter_rows(source, extra_columns=[task_field]):
            if raw.origin not in origins:
                continue
            origins.remove(raw.origin)  # a file that is listed twice is asked once
            conversation = parse_row(raw, row_format)
            if not isinstance(conversation, BadRow):
                task = read_field(raw, task_field)
                yield conversation, ANY_TASK if task in (None, "") else str(task)


def _require_room(asked: Sequence[Question], max_new_tokens: int, max_positions: int | None) -> None:
    if max_positions is None or not asked:
        return
    longest = max(asked, key=lambda question: len(question.ids))
    if len(longest.ids) + max_new_tokens > max_positions:
        raise ConfigError(
            f"evaluate.max_new_tokens={max_new_tokens} and the longest prompt, of {len(longest.ids)} tokens "
            f"({longest.id}), are more than the model's {max_positions} positions; lower evaluate.max_new_tokens or "
            "data.max_tokens"
        )
