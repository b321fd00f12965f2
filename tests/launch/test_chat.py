"""`sft-dist chat` as a person meets it: a terminal, keys, and what appears on the screen."""

import json
import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sft_dist import cli
from sft_dist.data.conversation import Conversation, Message, Origin, RawRow
from sft_dist.data.rows import parse_row
from sft_dist.terminal_chat import Talk
from tests import tiny
from tests.unit.test_generate import ALPHABET

ENDLESS = ALPHABET | {"z": "a"}
LIMIT_S = 60


class Terminal:
    """A process in a terminal of its own. screen: all that appeared so far, without colours."""

    def __init__(self, pid: int, handle: int) -> None:
        self.pid, self._handle, self.screen = pid, handle, ""

    def type(self, keys: str) -> None:
        os.write(self._handle, keys.encode())

    def press_at_prompt(self, key: str) -> None:
        """A person does not press a key within a millisecond of the prompt, where Python's readline would miss it."""
        time.sleep(1)
        self.type(key)

    def wait_for(self, pattern: str) -> str:
        """What appears up to and with the pattern. Raises AssertionError with the screen when it does not come."""
        deadline = time.monotonic() + LIMIT_S
        while not (found := re.search(pattern, self.screen, re.S)):
            assert time.monotonic() < deadline, f"no {pattern!r} on the screen:\n{self.screen}"
            if select.select([self._handle], [], [], 0.2)[0]:
                self._read()
        shown, self.screen = self.screen[: found.end()], self.screen[found.end() :]
        return shown

    def wait_for_end(self) -> int:
        """The exit code."""
        deadline = time.monotonic() + LIMIT_S
        while (ended := os.waitpid(self.pid, os.WNOHANG))[0] == 0:
            assert time.monotonic() < deadline, f"it does not end:\n{self.screen}"
            if select.select([self._handle], [], [], 0.05)[0]:
                self._read()
        return os.waitstatus_to_exitcode(ended[1])

    def _read(self) -> None:
        try:
            new = os.read(self._handle, 65536).decode("utf-8", "replace")
        except OSError:  # the other end is closed
            time.sleep(0.05)
            return
        self.screen += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", new).replace("\r\n", "\n")


@contextmanager
def terminal(*command: str) -> Iterator[Terminal]:
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "24", "OMP_NUM_THREADS": "1"}
    pid, handle = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a suite in the background ignores it, and would hand that on
        os.execve(sys.executable, [sys.executable, "-m", "sft_dist", *command], environment)
    try:
        yield Terminal(pid, handle)
    finally:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(handle)


def test_a_conversation_in_a_terminal(tmp_path: Path) -> None:
    """The answer has no end of its own: it is cut once, and stopped by Ctrl-C once; the chat goes on behind both."""
    model = tiny.write_speller(tmp_path / "model", ENDLESS)
    saved = tmp_path / "saved.jsonl"
    with terminal("chat", str(tmp_path), "--max-new-tokens", "1500", "--system", "be kind") as screen:
        shown = screen.wait_for("> ")
        assert f"{tmp_path}: greedy, up to 1500 tokens an answer" in shown
        screen.type("hi\n")
        screen.wait_for("abcdefghijkl")  # while it is being written
        screen.type("\x03")
        shown = screen.wait_for("> ")
        assert re.search(r"[a-z]+\nStopped\.\n> $", shown), shown
        assert len(shown) < 1500
        screen.press_at_prompt("\x03")
        screen.wait_for("Ctrl-D or /exit leaves")
        screen.type(f"/save {saved}\n")
        screen.wait_for("The model has not ended any of its answers")
        screen.type("/nonsense\n")
        assert "/reset" in screen.wait_for("//etc")
        screen.type("/reset\n")
        screen.wait_for("forgotten")
        screen.wait_for("> ")
        screen.type("hi\n")
        shown = screen.wait_for("Cut after 1500 tokens; --max-new-tokens allows more.")
        assert ("".join(tiny.WORDS) * 58)[:1500] in shown
        assert "<|" not in shown
        screen.wait_for("> ")
        screen.press_at_prompt("\x04")
        assert screen.wait_for_end() == 0
    assert not saved.exists()
    assert model.is_dir()


@pytest.fixture(scope="module")
def speller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers abc...z to everything, and ends there; 90 positions."""
    return tiny.write_speller(tmp_path_factory.mktemp("speller"), ALPHABET, max_position_embeddings=90)


def chat(
    model: Path, typed: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *flags: str
) -> tuple[list[str], str]:
    """Lines on stdout and text on stderr of a chat whose turns come through a pipe."""
    monkeypatch.setattr("sys.stdin", open(os.memfd_create("typed"), "w+", encoding="utf-8"))  # noqa: SIM115
    sys.stdin.write(typed)
    sys.stdin.seek(0)
    assert cli.main(["chat", str(model), "--max-new-tokens", "30", *flags]) == 0
    out, err = capsys.readouterr()
    return out.splitlines(), err


def test_a_saved_conversation_is_a_row_that_trains(
    speller: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = tmp_path / "saved.jsonl"
    typed = f"a\n\nb\n/save {saved}\n/system\n//c\n/save {saved}\n/exit\nnever\n"
    answers, notes = chat(speller, typed, capsys, monkeypatch, "--system", "s")
    assert answers == ["".join(tiny.WORDS)] * 3
    assert "There is no system prompt now" in notes
    rows = [json.loads(line) for line in saved.read_text().splitlines()]
    answer = {"role": "assistant", "content": "".join(tiny.WORDS)}
    first = [{"role": "user", "content": "a"}, answer, {"role": "user", "content": "b"}, answer]
    assert rows[0] == {"messages": [{"role": "system", "content": "s"}, *first]}
    assert [message["content"] for message in rows[1]["messages"] if message["role"] == "user"] == ["a", "b", "/c"]
    for line in saved.read_bytes().splitlines():
        parsed = parse_row(RawRow(Origin("saved", 1), line), "messages")
        assert isinstance(parsed, Conversation), parsed
        assert all(message.train for message in parsed.messages if message.role == "assistant")


def test_an_answer_that_the_model_did_not_end_is_saved_as_context() -> None:
    talk = Talk(None)
    talk.turns = [
        Message("user", "a"),
        Message("assistant", "b"),
        Message("user", "c"),
        Message("assistant", "d", True),
    ]
    assert [message.get("train") for message in json.loads(talk.to_row())["messages"]] == [None, False, None, None]


def test_what_does_not_fit_is_left_out_from_the_oldest_on_or_refused(
    speller: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A turn of one letter takes 29 tokens with its answer, and a third with room for 30 makes more than 90."""
    answers, notes = chat(speller, f"a\nb\nc\n{'d' * 80}\ne\n", capsys, monkeypatch, "--system", "s")
    assert len(answers) == 4
    assert "The 2 oldest turns do not fit into the model's 90 positions any more." in notes
    assert "That turn is too long: with the system prompt it takes" in notes
    assert cli.main(["chat", str(speller), "--max-new-tokens", "90"]) == 2
    assert "leaves no room for a prompt in the model's 90 positions" in capsys.readouterr().err
