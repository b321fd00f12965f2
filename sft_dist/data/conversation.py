"""The types in which a row travels: raw, as a conversation, or as a row that cannot be trained on."""

from dataclasses import dataclass
from typing import Any, NamedTuple


class Origin(NamedTuple):
    """Where a row comes from. line: 1-based line of the file; the row number in Parquet files and hub data sets."""

    path: str
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as read: the bytes of its JSON text, or its columns."""

    origin: Origin
    data: bytes | dict[str, Any]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the assistant makes. arguments: the JSON object, not its text."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    role: system, user, assistant or tool. train: whether its tokens are responses. reasoning: what the assistant
    thought before it answered. name, tool_call_id: which function and which call a tool turn answers.
    """

    role: str
    content: str
    train: bool = False
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    tool_call_id: str | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """tools: JSON schemas of the functions that the assistant may call. difficulty: what a curriculum sorts by."""

    messages: tuple[Message, ...]
    origin: Origin
    tools: tuple[dict[str, Any], ...] = ()
    difficulty: float | None = None


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be trained on. cause: short key to count by; reason: one sentence for the user."""

    origin: Origin
    cause: str
    reason: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}"


class Refused(Exception):
    """Carries cause and reason from where a row is found bad to where it becomes a BadRow."""

    def __init__(self, cause: str, reason: str) -> None:
        super().__init__(reason)
        self.cause, self.reason = cause, reason
