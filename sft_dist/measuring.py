"""What is measured of the held-out sets while a run goes on: losses, answers and their scores. The curve is untouched.

Losses at train.eval_every, answers at evaluate.generate_every, both before step 1 and after the last. Neither leaves
anything behind in the model: no gradient, no mode, no random state.
"""

import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sft_dist.answering import answer_all
from sft_dist.commits import RunState
from sft_dist.config import Recipe
from sft_dist.data.chat import ChatTokenizer
from sft_dist.data.questions import Question
from sft_dist.engine.collectives import on_main
from sft_dist.engine.interface import Engine
from sft_dist.evaluate import HeldOutSet
from sft_dist.evaluate_section import Best
from sft_dist.evaluation.answers import score_answers, step_file, write_scored
from sft_dist.evaluation.task_scores import TaskScore, mean_score, task_scores
from sft_dist.generate import Answerer, Sampling
from sft_dist.metrics import HeldOutMetrics, ScoreMetrics
from sft_dist.model.answering import as_answering
from sft_dist.trackers import Trackers
from sft_dist.watchdog import Watchdog


def is_due(every: int | None, step: int) -> bool:
    """True at every `every`-th step; never for None."""
    return every is not None and step % every == 0


@dataclass(frozen=True, eq=False)
class Measuring:
    """sets: by name, the first of which decides. questions: what is answered; none, if nothing is during the run."""

    recipe: Recipe
    sets: dict[str, HeldOutSet]
    questions: Sequence[Question]
    tokenizer: ChatTokenizer
    trackers: Trackers
    watchdog: Watchdog
    attempt: int

    def after(self, state: RunState, engine: Engine, *, is_end: bool) -> RunState:
        """The state with what is due to be measured after its step, logged on the way. Collective."""
        at_edge = is_end or state.step == 0
        if self.sets and (at_edge or is_due(self.recipe.train.eval_every, state.step)):
            state = self._measure_losses(state, engine)
        every = self.recipe.evaluate.generate_every if self.recipe.evaluate is not None else None
        if self.questions and (at_edge or is_due(every, state.step)):
            state = self._measure_answers(state, engine)
        return state

    def _measure_losses(self, state: RunState, engine: Engine) -> RunState:
        losses = {name: self._loss(name, state.step, engine) for name in self.sets}
        best = best_of(self.recipe)
        state = replace(state, held_out_loss=next(iter(losses.values())))
        return replace(state, best_value=-losses[best.set_name or ""]) if best.is_loss else state

    def _loss(self, name: str, step: int, engine: Engine) -> float:
        started = time.perf_counter()
        held_out = self.sets[name]
        on_progress = functools.partial(self.watchdog.progress, step=step, phase="held-out loss")
        loss = held_out.loss_of(engine, on_progress=on_progress)
        self.trackers.log(
            HeldOutMetrics(
                step=step,
                held_out_loss=loss,
                examples=len(held_out.example_ids),
                response_tokens=int(held_out.num_responses.sum()),
                seconds=time.perf_counter() - started,
                attempt=self.attempt,
                set=name,
            )
        )
        return loss

    def _measure_answers(self, state: RunState, engine: Engine) -> RunState:
        started, section = time.perf_counter(), self.recipe.evaluate
        assert section is not None

        def on_batch(_: object = None) -> None:
            self.watchdog.progress(step=state.step, phase="answering held-out prompts")

        on_batch()
        model = as_answering(engine.model, device=engine.device)
        answers = answer_all(
            Answerer(model, self.tokenizer, device=engine.device),
            self.questions,
            world=engine.world,
            sampling=Sampling(section.max_new_tokens),
            batch_size=section.batch_size,
            on_batch=on_batch,
        )
        del model  # under ZeRO-3 a copy
        scored = score_answers(self.questions, answers, section)
        file = step_file(self.recipe.run.path, state.step)
        on_main(lambda: write_scored(file, scored), world=engine.world, device=engine.device)
        found = task_scores(scored, seed=section.seed)
        self._log_scores(found, state.step, seconds=time.perf_counter() - started)
        best = best_of(self.recipe)
        return state if best.is_loss else replace(state, best_value=merit_of(best, found))

    def _log_scores(self, found: dict[str, dict[str, TaskScore]], step: int, *, seconds: float) -> None:
        num_tasks = sum(map(len, found.values()))
        for set_name, tasks in found.items():
            for task, score in tasks.items():
                self.trackers.log(
                    ScoreMetrics(
                        step=step,
                        set=set_name,
                        task=task,
                        metric=score.metric,
                        score=score.score,
                        n=score.n,
                        seconds=seconds / num_tasks,
                        attempt=self.attempt,
                    )
                )


def best_of(recipe: Recipe) -> Best:
    """What the best checkpoint is best in, its set named; of no set where nothing is held out."""
    best = recipe.evaluate.best if recipe.evaluate is not None else Best(None, "loss")
    return best if best.set_name is not None else Best(next(iter(recipe.set_names), None), best.measure)


def merit_of(best: Best, found: dict[str, dict[str, TaskScore]]) -> float | None:
    """The score that decides, more being better; None where the set or the task has no answers."""
    tasks = found.get(best.set_name or "", {})
    if best.measure == "score":
        mean = mean_score(tasks.values())
        return None if math.isnan(mean) else mean
    return tasks[best.measure].score if best.measure in tasks else None
