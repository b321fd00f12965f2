"""The types in which a row travels: raw, as a conversation, or as a row that cannot be trained on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import xxhash


class Origin(NamedTuple):
    """Where a row comes from. line: 1-based line of the file; the row number in Parquet files and hub data sets."""

    path: str
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as read: the bytes of its JSON text, its columns, or why it cannot be told what it holds."""

    origin: Origin
    data: "bytes | dict[str, Any] | BadRow"


# Names under which rows give, and templates take, what the assistant thought before it answered.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


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

    @property
    def is_plain(self) -> bool:
        """Whether the turn is nothing but a role and a text, as nearly all are."""
        return not (self.tool_calls or self.reasoning or self.name or self.tool_call_id)


@dataclass(frozen=True, slots=True)
class Conversation:
    """tools: JSON schemas of the functions that the assistant may call. difficulty: what a curriculum sorts by."""

    messages: tuple[Message, ...]
    origin: Origin
    tools: tuple[dict[str, Any], ...] = ()
    difficulty: float | None = None

    def strings(self) -> Iterator[str]:
        """Every text that the row brings into a render."""
        for message in self.messages:
            yield message.content
            yield from (text for text in (message.reasoning, message.name, message.tool_call_id) if text)
            for call in message.tool_calls:
                yield call.name
                yield from strings_in([call.id, call.arguments])
        yield from strings_in(self.tools)

    def with_strings(self, change: Callable[[str], str]) -> "Conversation":
        """The conversation with every such text changed."""

        def inside(value: Any) -> Any:
            if isinstance(value, str):
                return change(value)
            if isinstance(value, dict):
                return {change(key): inside(inner) for key, inner in value.items()}
            return type(value)(map(inside, value)) if isinstance(value, (list, tuple)) else value

        def changed(message: Message) -> Message:
            return replace(
                message,
                content=change(message.content),
                reasoning=inside(message.reasoning),
                name=inside(message.name),
                tool_call_id=inside(message.tool_call_id),
                tool_calls=tuple(
                    ToolCall(change(call.name), inside(call.arguments), inside(call.id)) for call in message.tool_calls
                ),
            )

        return replace(self, messages=tuple(map(changed, self.messages)), tools=inside(self.tools))


@dataclass(frozen=True, slots=True)
class Remark:
    """Something to say about a row. cause: short key to count by; reason: one sentence for the user."""

    origin: Origin
    cause: str
    reason: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}"


class BadRow(Remark):
    """Says why a row cannot be trained on."""

    __slots__ = ()


class Refused(Exception):
    """Carries cause and reason from where a row is found bad to where it becomes a BadRow."""

    def __init__(self, cause: str, reason: str) -> None:
        super().__init__(reason)
        self.cause, self.reason = cause, reason


def strings_in(value: Any) -> Iterator[str]:
    """The texts inside a JSON value, keys of objects included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from strings_in(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from strings_in(inner)


def normalise(text: str) -> str:
    """The text without differences of case and white space."""
    return " ".join(text.casefold().split())


def prompt_hash(conversation: Conversation) -> int:
    """64 bits, equal for rows that ask the same: all turns but system prompts before the last trained one, normalised.

    Rows without a prompt are told apart by what they answer.
    """
    last = max((index for index, message in enumerate(conversation.messages) if message.train), default=0)
    asked = [message for message in conversation.messages[:last] if message.role != "system"]
    text = "\x00".join(f"{message.role}\x01{normalise(message.content)}" for message in asked or conversation.messages)
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "replace"))
