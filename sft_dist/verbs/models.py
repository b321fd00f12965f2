"""evaluate, chat, generate, export: what came of a run."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from sft_dist.errors import SftDistError
from sft_dist.verbs.words import Verbs, count_from, is_main, recipe_path, say

if TYPE_CHECKING:
    from sft_dist.generate import Sampling


def add_verbs(verbs: Verbs) -> None:
    """Their parsers."""
    _add_evaluate(verbs)

    chat = verbs.add_parser("chat", help="talk to an exported model in the terminal")
    _add_sampling_flags(chat, max_new_tokens=1024)
    chat.add_argument("--system", help="system prompt")
    chat.set_defaults(verb=_chat)

    generate = verbs.add_parser("generate", help="answer one prompt, or every row of a file, with an exported model")
    _add_sampling_flags(generate, max_new_tokens=256)
    asked = generate.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", help="answer this one prompt")
    asked.add_argument("--input", type=Path, metavar="FILE", help="answer every row of this file, in any row format")
    generate.add_argument("--system", help="system prompt, beside --prompt")
    text = "where the answers to --input go: the rows as JSONL, each with its answer"
    generate.add_argument("--output", type=Path, metavar="FILE", help=text)
    text = "what the answer is called in a row (default: answer)"
    generate.add_argument("--answer-field", default="answer", metavar="NAME", help=text)
    text = "rows that are answered together: speed and memory (default: 32)"
    generate.add_argument("--batch-size", type=count_from(1), default=32, metavar="N", help=text)
    generate.set_defaults(verb=_generate)

    _add_export(verbs)


def _add_evaluate(verbs: Verbs) -> None:
    text = "a finished run's model on held-out data: loss, answers, scores by task, into <run>/evaluation.json"
    evaluate = verbs.add_parser("evaluate", help=text)
    evaluate.add_argument("recipe", nargs="?", help="a YAML file, or the name of a shipped recipe")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. evaluate.max_examples=100")
    choice = evaluate.add_mutually_exclusive_group()
    choice.add_argument(
        "--before", action="store_true", help="evaluate model.path too, once, and say what changed and how surely"
    )
    text = "two runs, or files of scored answers, on the prompts that both answered"
    choice.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help=text)
    evaluate.set_defaults(verb=_evaluate)


def _add_export(verbs: Verbs) -> None:
    export = verbs.add_parser("export", help="a run's weights in Hugging Face format, with a model card; push them")
    export.add_argument("run", type=Path, help="a run's directory, e.g. runs/clinic")
    text = "the weights after this step (default: the newest)"
    export.add_argument("--checkpoint", type=count_from(1), metavar="STEP", help=text)
    text = "the mean of the weights of the last K checkpoints"
    export.add_argument("--average", type=count_from(1), metavar="K", help=text)
    export.add_argument("--dtype", choices=("bf16", "fp32"), help="default: what the run computed in")
    text = "where to; must be new (default: a directory in the run, named for what it holds)"
    export.add_argument("--output", type=Path, metavar="DIR", help=text)
    export.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload it there; the token comes from HF_TOKEN")
    export.add_argument("--private", action="store_true", help="where the hub shows it to nobody else, or not at all")
    export.set_defaults(verb=_export)


def _add_sampling_flags(verb: argparse.ArgumentParser, *, max_new_tokens: int) -> None:
    verb.add_argument("model", type=Path, help="an exported model, or a finished run such as runs/<name>")
    text = f"the longest answer (default: {max_new_tokens})"
    verb.add_argument("--max-new-tokens", type=count_from(1), default=max_new_tokens, metavar="N", help=text)
    verb.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    verb.add_argument("--top-p", type=float, default=1.0, metavar="P", help="of the most likely tokens, this share")
    verb.add_argument("--top-k", type=count_from(0), default=0, metavar="K", help="so many of them; 0: all")
    verb.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="1, the default, is none")
    verb.add_argument("--seed", type=count_from(0), default=0, metavar="N", help="what is drawn above temperature 0")


def _evaluate(arguments: argparse.Namespace) -> int:
    from sft_dist.config import load_recipe
    from sft_dist.console import make_console
    from sft_dist.errors import ConfigError

    if arguments.compare is not None:
        from sft_dist.evaluation.comparison import compare, print_comparison

        if arguments.recipe is not None:
            raise ConfigError(f"{arguments.recipe}: --compare reads answers that are there and takes no recipe")
        print_comparison(compare(*arguments.compare), make_console())
        return 0
    if arguments.recipe is None:
        raise ConfigError("name a recipe, or two runs with --compare")

    from sft_dist.world import stop_when_orphaned

    stop_when_orphaned()
    recipe = load_recipe(recipe_path(arguments.recipe), arguments.overrides)

    from sft_dist.engine.collectives import leave_process_group
    from sft_dist.evaluation.report import print_evaluation
    from sft_dist.measure import evaluate_run
    from sft_dist.report.apart import write_report_apart
    from sft_dist.run_files import METRICS

    console = make_console()
    try:
        evaluation = evaluate_run(recipe, console=console, before=arguments.before)
    except SftDistError as error:
        say(error)  # before the group is left, which may take long when a peer has died
        raise
    finally:
        leave_process_group()
    if is_main():
        print_evaluation(evaluation, console)
        if recipe.run.report and (recipe.run.path / METRICS).exists():
            write_report_apart(recipe.run.path, console)
    return 0


def _sampling(arguments: argparse.Namespace) -> "Sampling":
    from sft_dist.generate import Sampling

    return Sampling(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed,
    )


def _chat(arguments: argparse.Namespace) -> int:
    from sft_dist.generate import Answerer
    from sft_dist.terminal_chat import run_chat

    sampling = _sampling(arguments)
    run_chat(Answerer.load(arguments.model), name=str(arguments.model), system=arguments.system, sampling=sampling)
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    from sft_dist.answer_rows import answer_rows, say_now_and_then
    from sft_dist.data.conversation import Message
    from sft_dist.errors import ConfigError
    from sft_dist.generate import Answerer

    sampling = _sampling(arguments)
    if (arguments.input is None) != (arguments.output is None):
        raise ConfigError("--input and --output go together: rows to answer, and where the answers go")
    if arguments.input is None:
        first = [Message("system", arguments.system)] if arguments.system else []
        print(
            next(
                Answerer.load(arguments.model).answer([[*first, Message("user", arguments.prompt)]], sampling=sampling)
            )
        )
        return 0
    if arguments.system is not None:
        raise ConfigError("--system stands beside --input; rows say their own system prompt")
    done = answer_rows(
        arguments.model,
        rows=arguments.input,
        output=arguments.output,
        field=arguments.answer_field,
        sampling=sampling,
        batch_size=arguments.batch_size,
        on_progress=say_now_and_then(),
    )
    before = f", {done.num_before:,} of them before" * bool(done.num_before)
    print(f"{arguments.output}: {done.num_rows:,} rows answered{before}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from sft_dist.errors import ConfigError
    from sft_dist.export import export_run
    from sft_dist.push import push

    if arguments.private and not arguments.push_to_hub:
        raise ConfigError("--private says how to push; name a repository with --push-to-hub OWNER/NAME")
    done = export_run(
        arguments.run,
        step=arguments.checkpoint,
        average=arguments.average,
        dtype=arguments.dtype,
        output=arguments.output,
    )
    steps = ", ".join(map(str, done.steps))
    what = f"mean of the weights after steps {steps}" if len(done.steps) > 1 else f"weights after step {steps}"
    print(
        f"{done.directory}: {what}, {done.dtype}" + ("" if done.is_new else "; as it was, with a new card"), flush=True
    )
    if arguments.push_to_hub:
        url = push(done.directory, arguments.push_to_hub, private=arguments.private, message=f"sft-dist export: {what}")
        print(f"pushed to {url}")
    return 0
