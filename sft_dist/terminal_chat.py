"""`sft-dist chat`: a conversation in the terminal, in the template of training, token by token.

What the model writes goes to stdout; what is said about it goes to stderr.
"""

import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sft_dist.data.conversation import Message
from sft_dist.data.shown import escape, safe
from sft_dist.errors import ConfigError, DataError
from sft_dist.generate import Answerer, Sampling, Streamed

HELP = """\
/reset          forget the conversation; the system prompt stays
/system TEXT    another system prompt from the next answer on; none without TEXT
/save FILE      append the conversation to FILE as a row that can be trained on
/exit           leave, as Ctrl-D does; Ctrl-C stops an answer
A turn that begins with a slash is typed with two: //etc"""


@dataclass
class Talk:
    """The conversation so far. turns: user and assistant in turn, always ending with an answer; one that the model did
    not end itself is not trained on where it is saved. num_asked: every question counts, also after a reset."""

    system: str | None
    turns: list[Message] = field(default_factory=list)
    num_asked: int = 0

    def messages(self, *, left_out: int = 0) -> list[Message]:
        """The system prompt and all but the `left_out` oldest turns."""
        first = [Message("system", self.system)] if self.system else []
        return [*first, *self.turns[left_out:]]

    def to_row(self) -> str:
        """A line of JSONL in the `messages` format."""
        rows = []
        for message in self.messages():
            row: dict[str, object] = {"role": message.role, "content": message.content}
            if message.role == "assistant" and not message.train:
                row["train"] = False
            rows.append(row)
        return json.dumps({"messages": rows}, ensure_ascii=False) + "\n"


def run_chat(answerer: Answerer, *, name: str, system: str | None, sampling: Sampling) -> None:
    """Read turns from stdin and answer them until it ends. Raises ConfigError when no prompt could fit."""
    positions = answerer.num_positions
    if positions is not None and sampling.max_new_tokens >= positions:
        raise ConfigError(
            f"--max-new-tokens {sampling.max_new_tokens} leaves no room for a prompt in the model's {positions} "
            "positions; lower it"
        )
    talk = Talk(system)
    how = "greedy" if sampling.temperature == 0 else f"temperature {sampling.temperature:g}, seed {sampling.seed}"
    _note(f"{name}: {how}, up to {sampling.max_new_tokens} tokens an answer\n/help lists commands, Ctrl-D leaves")
    for line in _lines():
        if line.startswith("/") and not line.startswith("//"):
            if not _obey(line, talk):
                return
        elif line.strip():
            _ask(answerer, talk, line.removeprefix("/") if line.startswith("//") else line, sampling)


def _lines() -> Iterator[str]:
    """What is typed, line by line; Ctrl-C at the prompt throws a line away."""
    prompt = "> " if sys.stdin.isatty() else ""
    if prompt:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401, input() then edits the line and takes a pasted text as one
    while True:
        try:
            yield input(prompt)
        except EOFError:
            if prompt:
                print()
            return
        except KeyboardInterrupt:
            print()
            _note("Ctrl-D or /exit leaves.")
        except UnicodeDecodeError:
            _note("That was not UTF-8, and is left out.")


def _obey(line: str, talk: Talk) -> bool:
    """Do what a command says. False: leave."""
    command, _, argument = line.partition(" ")
    argument = argument.strip()
    if command == "/exit":
        return False
    if command == "/reset":
        talk.turns.clear()
        _note("The conversation is forgotten.")
    elif command == "/system":
        talk.system = argument or None
        _note("The system prompt is set." if argument else "There is no system prompt now.")
    elif command == "/save":
        _save(talk, argument)
    else:
        _note(HELP if command == "/help" else f"No command {safe(command)}.\n{HELP}")
    return True


def _save(talk: Talk, name: str) -> None:
    if not name or not talk.turns:
        _note("Name a file: /save FILE" if talk.turns else "There is no answer to save yet.")
        return
    if not any(message.train for message in talk.turns):
        _note("The model has not ended any of its answers; nothing in this conversation could be trained on.")
        return
    try:
        with Path(name).expanduser().open("a", encoding="utf-8") as file:
            file.write(talk.to_row())
    except OSError as error:
        _note(f"{safe(name)}: cannot be written: {error.strerror}")
        return
    _note(f"The conversation is the last row of {safe(name)}.")


def _ask(answerer: Answerer, talk: Talk, text: str, sampling: Sampling) -> None:
    """Answer a turn, and keep both; a turn that cannot be answered, or was stopped at once, is as if not said."""
    talk.turns.append(Message("user", text))
    try:
        prompt, num_left_out = fit_prompt(answerer, talk, sampling.max_new_tokens)
    except DataError as error:
        talk.turns.pop()
        _note(escape(str(error)))
        return
    if num_left_out:
        _note(
            f"The {num_left_out} oldest turns do not fit into the model's {answerer.num_positions} positions any more."
        )
    talk.num_asked += 1
    answer, was_stopped = _stream(answerer, prompt, sampling, place=talk.num_asked)
    print(flush=True)
    if was_stopped:
        _note("Stopped.")
    elif not answer.is_whole:
        _note(f"Cut after {sampling.max_new_tokens} tokens; --max-new-tokens allows more.")
    if answer.text.strip():
        talk.turns.append(Message("assistant", answer.text, train=answer.is_whole))
    else:
        talk.turns.pop()
        _note("No answer came, so the turn is forgotten." if not was_stopped else "The turn is forgotten.")


def fit_prompt(answerer: Answerer, talk: Talk, max_new_tokens: int) -> tuple[list[int], int]:
    """The ids to answer, and how many of the oldest turns had to be left out to make room for the answer.

    Raises DataError when the last turn alone is too long, or when the template refuses the conversation.
    """
    positions = answerer.num_positions
    for left_out in range(0, len(talk.turns), 2):
        ids = answerer.tokenizer.encode_prompt(talk.messages(left_out=left_out))
        if positions is None or len(ids) + max_new_tokens <= positions:
            return ids, left_out
    raise DataError(
        f"That turn is too long: with the system prompt it takes {len(ids)} tokens, and an answer of up to "
        f"{max_new_tokens} must fit into the model's {positions} positions, too."
    )


def _stream(answerer: Answerer, prompt: Sequence[int], sampling: Sampling, *, place: int) -> tuple[Streamed, bool]:
    """The answer, printed while it comes, and whether Ctrl-C stopped it."""
    pieces: list[str] = []

    def show(piece: str) -> None:
        pieces.append(piece)
        print(escape(piece), end="", flush=True)

    with _ctrl_c() as pressed:
        try:
            answer = answerer.stream(prompt, sampling=sampling, on_text=show, should_stop=pressed, place=place)
        except KeyboardInterrupt:  # pressed twice: it did not get to the next token
            answer = Streamed("".join(pieces), is_whole=False)
        return answer, pressed()


@contextlib.contextmanager
def _ctrl_c() -> Iterator[Callable[[], bool]]:
    """Tells whether Ctrl-C was pressed, which does nothing else; the second time it interrupts as always."""
    presses: list[int] = []

    def note(number: int, frame: object) -> None:
        presses.append(number)
        if len(presses) > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(presses)
    finally:
        signal.signal(signal.SIGINT, before)


def _note(text: str) -> None:
    """Dimmed on a terminal, to be told apart from what the model says."""
    print(f"\x1b[2m{text}\x1b[0m" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)
