"""What the report says of answers: scores before and after, losses, and sample answers on the way."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sft_dist.data.shown import escape, safe
from sft_dist.redact import redacted
from sft_dist.report.data import Question, RunData
from sft_dist.report.figures import exact_text
from sft_dist.significance import p_text

NUM_QUESTIONS, NUM_ANSWERS = 6, 5
LONGEST_TEXT = 1200


def shown_text(text: str) -> str:
    """Text of a row, made harmless and not too long; a secret of this machine in it is hidden."""
    cut = text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " …"
    return escape(redacted(cut))


def evaluation_parts(run: RunData) -> list[dict[str, Any]]:
    """The sets of evaluation.json: scores and losses, before and after."""
    return [
        {
            "name": safe(str(name)),
            "tasks": [_task(str(task), score) for task, score in (found.get("tasks") or {}).items()],
            "losses": _losses(found),
        }
        for name, found in _sets(run).items()
    ]


def _sets(run: RunData) -> Mapping[str, Any]:
    """By name; an evaluation of before sets had names is of `held_out`."""
    found = run.evaluation
    if "sets" in found:
        return dict(found["sets"])
    return {"held_out": found} if "example_mean" in found else {}


def _task(task: str, score: Mapping[str, Any]) -> dict[str, Any]:
    constant = score.get("constant") or {}
    best = f", best constant answer {constant['score']:.0%}" if "score" in constant else ""
    return {
        "task": safe(task),
        "note": f"{safe(str(score.get('metric', '')))}, {score.get('n', 0):,} answers{best}",
        "before": _score(score.get("before")),
        "after": _score(score),
        "p_value": "–" if score.get("p_value") is None else p_text(score["p_value"]),
    }


def _score(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not found or found.get("score") is None:
        return None
    low_high = found.get("ci")
    return {
        "text": f"{found['score']:.1%}",
        "interval": f"{low_high[0]:.1%} to {low_high[1]:.1%}" if low_high else "",
        "place": f"{100 * found['score']:.1f}",
        "ci": [f"{100 * end:.1f}" for end in low_high] if low_high else None,
    }


LOSS_NAMES = {
    "example_mean": "Loss per example, nats",
    "token_mean": "Loss per token, nats",
    "perplexity": "Perplexity",
}


def _losses(found: Mapping[str, Any]) -> list[dict[str, str]]:
    before = found.get("before") or {}
    return [
        {"name": name, "before": _number(before.get(key)), "after": _number(found.get(key))}
        for key, name in LOSS_NAMES.items()
        if found.get(key) is not None or before.get(key) is not None
    ]


def _number(value: float | None) -> str:
    return "–" if value is None else exact_text(value, 4)


def compared_evaluation(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """Rows of all runs: each task and each loss of each set, a cell a run."""
    keys: dict[tuple[str, str, str], None] = {}
    for run in runs:
        for name, found in _sets(run).items():
            keys |= dict.fromkeys((name, "task", task) for task in found.get("tasks") or {})
            keys |= dict.fromkeys((name, "loss", key) for key in LOSS_NAMES if found.get(key) is not None)
    rows = []
    for name, kind, key in keys:
        cells = []
        for run in runs:
            found = _sets(run).get(name, {})
            score = _score((found.get("tasks") or {}).get(key)) if kind == "task" else None
            cell = (score["text"], score["interval"]) if score else ("–", "")
            cells.append((run.name, cell if kind == "task" else (_number(found.get(key)), "")))
        rows.append({"name": safe(key) if kind == "task" else LOSS_NAMES[key], "note": safe(name), "cells": cells})
    return rows


def shown_questions(run: RunData) -> list[dict[str, Any]]:
    """Some prompts, of as many tasks as there are, with answers from the first to the last."""
    by_task: dict[str, list[Question]] = {}
    for question in run.questions:
        by_task.setdefault(question.task, []).append(question)
    longest = max(map(len, by_task.values()), default=0)
    in_turn = [of_task[i] for i in range(longest) for of_task in by_task.values() if i < len(of_task)]
    return [_question(question) for question in in_turn[:NUM_QUESTIONS]]


def _question(question: Question) -> dict[str, Any]:
    answers = question.answers
    chosen = np.unique(np.linspace(0, len(answers) - 1, min(NUM_ANSWERS, len(answers))).round().astype(int))
    return {
        "task": safe(question.task),
        "prompt": [(safe(role), shown_text(text)) for role, text in question.prompt],
        "truth": shown_text(question.truth),
        "answers": [
            {
                "step": answers[i].step,
                "score": "" if answers[i].score is None else f", score {answers[i].score:.2g}",
                "text": shown_text(answers[i].text) or "(nothing)",
            }
            for i in chosen
        ],
    }
