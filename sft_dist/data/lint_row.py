"""Lint rules over one conversation: what is wrong with it whatever the rest of the data holds."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from sft_dist.data.conversation import Conversation, Message, Origin, normalise
from sft_dist.data.lint_text import answer_given, script

SHORTEST_ECHO = 60
"""Characters; below it a response that ends the prompt is an option, a name or a word to repeat."""
LONGEST_EXAMPLE_ANSWER = 60
"""Characters; an answer of an earlier example that is longer and equals the response is no coincidence."""

_CONTROL_TOKEN = re.compile(
    r"<\|[A-Za-z][\w▁ -]{0,40}\|>|<｜[^｜<>\n]{1,40}｜>|\[/?INST\]|<</?SYS>>|</?s>|<(?:start|end)_of_turn>"
    r"|<(?:bos|eos|pad|unk)>|\[(?:BOS|EOS|CLS|SEP|PAD)\]"
)
# Text that shows control tokens rather than holds them: code, and what HTML strikes out. A pair around a whole text of
# several lines is no such tag.
_CODE = re.compile(r"```[^`]*+```|`[^`\n]++`")
_STRUCK = re.compile(r"<s>((?:(?!</?s>)[^\n]){1,200}+)</s>")
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff\ufffd]")
# UTF-8 read as Latin-1 or Windows-1252: the lead byte's letter, then what a continuation byte becomes.
_MOJIBAKE = re.compile("[ÃÂ][\u0080-\u00bf]|Ã[€‚ƒ„…†‡ˆ‰Š‹Œ‘’“”•–—˜™š›œ]|â(?:€|\u0080)[\u0080-\u00bf™œšž˜“”‘’–—¦¢]|ï»¿")
# Marks of direction belong to text that is written from the right.
_MARKS = "\u200e\u200f"
_RIGHT_TO_LEFT = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]")
# Joiners belong to the spelling of these scripts and to composed emoji.
_JOINED = re.compile("[\u0600-\u08ff\u0900-\u0dff\u1780-\u17ff\u2190-\u2bff\ufe0f\U0001f000-\U0001faff]")
_OPTION_MARK = re.compile(r"(?:^|\n)[^\S\n]*\(?(?:[A-Za-z]|\d{1,2})[.):][^\S\n]*$")


@dataclass(frozen=True, slots=True)
class Finding:
    """origin: the row; None where the whole data set is meant."""

    rule: str
    origin: Origin | None
    detail: str


Details = Iterator[str]


def lint_conversation(conversation: Conversation) -> Iterator[Finding]:
    """What the rules over one conversation find, in the order of RULES."""
    for name, rule in RULES.items():
        for detail in rule(conversation):
            yield Finding(name, conversation.origin, detail)


def responses_of(conversation: Conversation) -> list[Message]:
    """The turns that the assistant is trained on."""
    return [message for message in conversation.messages if message.train]


def last_exchange(conversation: Conversation) -> tuple[tuple[Message, ...], Message]:
    """What precedes the last response, and that response. A parsed conversation always has one."""
    last = max(index for index, message in enumerate(conversation.messages) if message.train)
    return conversation.messages[:last], conversation.messages[last]


def user_turn_before(messages: tuple[Message, ...]) -> str:
    """The last user turn; empty if there is none."""
    return next((message.content for message in reversed(messages) if message.role == "user"), "")


def system_not_first(conversation: Conversation) -> Details:
    """A system prompt behind other turns, which most chat templates refuse or drop."""
    for index, message in enumerate(conversation.messages):
        if index and message.role == "system":
            yield f"turn {index + 1} is a system prompt"


def answer_in_prompt(conversation: Conversation) -> Details:
    """The prompt gives the answer away behind its own cue: the model learns to copy what is absent at test time."""
    for index, prompt, response in _exchanges(conversation):
        given = normalise(answer_given(prompt))
        answer = normalise(response)
        if given and given == answer:
            yield f"turn {index} says the answer already: {clip(response)}"
        elif len(answer) > LONGEST_EXAMPLE_ANSWER and given.startswith(answer):
            yield f"turn {index} holds the answer as an example: {clip(response)}"


def response_is_prompt(conversation: Conversation) -> Details:
    """The response repeats the prompt, or the whole end of it; other line breaks make another text."""
    for index, prompt, response in _exchanges(conversation):
        asked, answer = prompt.strip(), response.strip()
        if asked == answer:
            yield f"turn {index} and its response are the same: {clip(response)}"
        elif len(answer) >= SHORTEST_ECHO and asked.endswith(answer):
            before = asked.removesuffix(answer)
            if not _OPTION_MARK.search(before) and normalise(answer_given(prompt)) != normalise(answer):
                yield f"the response is the end of turn {index}: {clip(response)}"


def role_order(conversation: Conversation) -> Details:
    """Turns in an order that no conversation has."""
    roles = [message.role for message in conversation.messages]
    turns = [(index + 1, role) for index, role in enumerate(roles) if role != "system"]
    if turns and turns[0][1] == "assistant":
        yield f"turn {turns[0][0]} is the assistant's, before any user turn"
    for (_, role_before), (index, role) in pairwise(turns):
        if role == role_before and role in ("user", "assistant"):
            yield f"turns {index - 1} and {index} are both of the {role}"
    for index, message in enumerate(conversation.messages[1:], 1):
        before = conversation.messages[index - 1]
        if message.role == "tool" and before.role != "tool" and not before.tool_calls:
            yield f"turn {index + 1} is a tool result that does not follow a call"
    if turns and turns[-1][1] != "assistant":
        yield f"the last turn is of the {turns[-1][1]}: nothing trains on it"


def forged_control_token(conversation: Conversation) -> Details:
    """Text that looks like a chat template's control token, but for code and `<s>struck out</s>`."""
    for index, message in enumerate(conversation.messages):
        text = _text(message)
        if not _CONTROL_TOKEN.search(text):
            continue
        # A backtick is in no token, so that nothing becomes one where code is taken out.
        text = _STRUCK.sub(r"\1", _CODE.sub("`", text))
        if found := dict.fromkeys(_CONTROL_TOKEN.findall(text)):
            yield f"turn {index + 1} ({message.role}) holds {clip(' '.join(found))}"


def invisible_characters(conversation: Conversation) -> Details:
    """Characters that nobody sees and the tokenizer does, and text that was decoded with the wrong encoding."""
    for index, message in enumerate(conversation.messages):
        text = _text(message)
        if text.isascii():
            continue
        strays = list(dict.fromkeys(match[0] for match in _INVISIBLE.finditer(text) if _is_stray(match)))
        if any(mark in strays for mark in _MARKS) and _RIGHT_TO_LEFT.search(text):
            strays = [letter for letter in strays if letter not in _MARKS]
        if strays:
            codes = " ".join(f"U+{ord(letter):04X}" for letter in strays)
            yield f"turn {index + 1} ({message.role}) holds {clip(codes)}"
        elif match := _MOJIBAKE.search(text):
            around = text[max(0, match.start() - 15) : match.end() + 15]
            yield f"turn {index + 1} ({message.role}) was decoded wrongly: {clip(around)}"


def _is_stray(match: re.Match[str]) -> bool:
    at = match.start()
    return match[0] not in "\u200c\u200d" or not _JOINED.match(match.string[at - 1 : at] or " ")


def padded_response(conversation: Conversation) -> Details:
    """White space at the edge of a response: the model learns to write it."""
    for message in responses_of(conversation):
        text = message.content
        if text.strip() and text != text.strip():
            edges = [name for name, cut in (("starts", text.lstrip()), ("ends", text.rstrip())) if cut != text]
            yield f"the response {' and '.join(edges)} with white space: {clip(repr(text[:30]))}"


def mixed_languages(conversation: Conversation) -> Details:
    """System prompt, user and response in different scripts."""
    scripts: dict[str, str] = {}
    for role in ("system", "user", "assistant"):
        text = "\n".join(message.content[:2000] for message in conversation.messages if message.role == role)
        if written_in := script(text):
            scripts[role] = written_in
    if len(set(scripts.values())) > 1:
        yield ", ".join(f"{role} {name}" for role, name in scripts.items())


RULES: dict[str, Callable[[Conversation], Details]] = {
    rule.__name__: rule
    for rule in (
        system_not_first, answer_in_prompt, response_is_prompt, role_order, forged_control_token, invisible_characters,
        padded_response, mixed_languages,
    )
}  # fmt: skip


def clip(text: str, limit: int = 70) -> str:
    """A text on one line and short enough to quote."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _text(message: Message) -> str:
    return f"{message.content}\n{message.reasoning}" if message.reasoning else message.content


def _exchanges(conversation: Conversation) -> Iterator[tuple[int, str, str]]:
    """Each user turn that a response follows at once, its number from 1, and the two texts."""
    for index, message in enumerate(conversation.messages[1:], 1):
        before = conversation.messages[index - 1]
        if message.train and before.role == "user" and message.content.strip():
            yield index, before.content, message.content
