r"""Where the answers are: the spans of a rendered conversation that the model must write.

A trained span is everything after the generation prompt through the stop token. Spans are found in the *full* render,
because the render of a prefix need not be a prefix of the render (Qwen3 drops the thinking of earlier turns). Private-
use characters are put into the conversation and looked up in its render:

    user  "How m|any?"   assistant  "thinking|" "Four.|" call "look_up|"        | a mark
    <|im_start|>assistant\n[<think>\nthinking\n</think>\n\nFour.<|im_end|>]      [ ] the span, marks taken out again

What stands around an answer (its header and its stop tokens) is learned once from a probe. Where the template has
`{% generation %}` tags, an answer is trained only inside them.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from sft_dist.data.conversation import Conversation, Message, Refused, Remark, strings_in
from sft_dist.data.template import PROBE_CALL, PROBE_TOOL, TAG_CLOSE, TAG_OPEN, ChatTemplate, without_tags
from sft_dist.errors import ConfigError

# Supplementary private-use planes: characters no text should hold. If a conversation does, the other plane is taken.
PLANES = (0xF0000, 0x100000)
MARKS_PER_PLANE = 0x4000  # what is left of a plane is for tags and for names of control tokens
PRIVATE = re.compile("[\U000f0000-\U0010ffff]")
CLOSE_THINKING = "</think>"
# Added tokens of this form are words that a row may use like any other, unless answers begin or end with them.
WORD = re.compile(r"</?[\w-]+>")
TOOLS = -1  # owner of the marks in the schemas of tools


@dataclass(frozen=True, slots=True)
class Markers:
    """What a template writes around an answer.

    generation_prompt: what `add_generation_prompt` adds.
    header: its beginning, as far as it also precedes the answers of earlier turns.
    tails: what follows an answer, through its stop token.
    call_stop, calls_stop: the token that ends a turn which calls one tool, or several; None if there is none.
    stops: the tokens that end a turn. frame: all added tokens that the template writes around turns.
    writes_thinking: whether it writes the thinking of any turn.
    """

    generation_prompt: str
    header: str
    tails: tuple[str, ...]
    call_stop: str | None
    calls_stop: str | None
    stops: tuple[str, ...]
    frame: frozenset[str]
    writes_thinking: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """A trained turn of a render. start, end: its characters, stop token included. turn: index of its message."""

    start: int
    end: int
    turn: int


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text, with the answers that are trained."""

    text: str
    answers: tuple[Answer, ...]
    remarks: tuple[Remark, ...]


class SpanFinder:
    """Finds the answers in what one template renders."""

    def __init__(self, template: ChatTemplate, *, added_tokens: Collection[str]) -> None:
        """added_tokens: tokens of the tokenizer that are matched whole, control tokens among them.

        Raises ConfigError if the template writes nothing around answers that a mask could hold on to.
        """
        self.template = template
        self._added = any_of(added_tokens)
        self.markers = self._learn()
        self._tail = re.compile(rf"\s*(?:{any_of(self.markers.tails).pattern})")

    def find(self, conversation: Conversation) -> Rendered:
        """Render and locate. Raises Refused where the template drops a turn or an answer cannot be delimited."""
        plain, tags = self._rendered(conversation)
        marks = _Marks(_free_plane(plain))
        marked = self._render_marked(conversation, marks)
        text, places = marks.take_out(without_tags(marked))
        if text != plain:
            raise Refused("mask_not_verified", "the template renders the conversation differently when it is marked")
        messages = conversation.messages
        turns = _turns(messages, marks.kinds, places)
        answers: list[Answer] = []
        remarks: list[Remark] = []
        low = 0
        for turn in turns:
            if messages[turn.index].role != "assistant":
                continue
            start, end = self._delimit(conversation, text, turn, low=low)
            if _holds_another(start, end, turn, turns):
                raise Refused("mask_not_verified", f"the template writes another turn inside turn {turn.index + 1}")
            _check_arguments(messages[turn.index], text[start:end], turn.index)
            low = end
            if not messages[turn.index].train:
                continue
            if turn.dropped_reasoning and not self.markers.writes_thinking:
                raise Refused(
                    "thinking_dropped",
                    f"turn {turn.index + 1} has thinking and the template writes none; take it out of the row, or give "
                    "a template that writes it in data.chat_template",
                )
            if turn.dropped_reasoning:
                remarks.append(
                    Remark(
                        conversation.origin,
                        "thinking_dropped",
                        f"turn {turn.index + 1}: the template leaves out its thinking, so it is context, not trained",
                    )
                )
            elif (answer := _inside_tags(Answer(start, end, turn.index), tags)) is not None:
                answers.append(answer)
                if difference := self._asked_otherwise(conversation, text[:start], turn):
                    remarks.append(Remark(conversation.origin, "asked_otherwise", difference))
        if not answers:
            if remarks:
                raise Refused(
                    "thinking_dropped",
                    "the template leaves out the thinking of every trained turn; data.turns: each keeps it",
                )
            raise Refused("mask_not_verified", "no answer stands inside the template's generation tags")
        return Rendered(text, tuple(answers), tuple(remarks))

    def _rendered(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]] | None]:
        """The plain render, and the spans of its generation tags if the template has them."""
        fields = [self.template.fields(message) for message in conversation.messages]
        text = self.template.render(fields, conversation.tools)
        if not self.template.has_tags:
            return text, None
        if any(TAG_OPEN in string or TAG_CLOSE in string for string in conversation.strings()):
            raise Refused("mask_not_verified", "contains private-use characters that mark generation tags here")
        return _split_tags(text)

    def _render_marked(self, conversation: Conversation, marks: "_Marks") -> str:
        fields = [
            self.template.fields(message, marks.of(index, message))
            for index, message in enumerate(conversation.messages)
        ]
        return self.template.render(fields, [marks.of_tool(tool) for tool in conversation.tools])

    def words_of(self, span: str) -> str:
        """The text of a trained span without the stop token that ends it."""
        tail = next((tail for tail in self.markers.tails if span.endswith(tail)), "")
        return span[: len(span) - len(tail)]

    # ------------------------------------------------------------ delimiting

    def _delimit(self, conversation: Conversation, text: str, turn: "_Turn", *, low: int) -> tuple[int, int]:
        """[start, end) of a turn that begins after `low`: from behind its header through its stop token."""
        message = conversation.messages[turn.index]
        turn.require_whole(message)
        if not turn.first_places:
            raise Refused("empty_content", f"turn {turn.index + 1} (assistant) is empty")
        start = self._start(conversation, text, turn, low=low)
        end = self._end(text, turn)
        if end is None:
            stops = " or ".join(self.markers.stops)
            raise Refused("mask_not_verified", f"no stop token follows turn {turn.index + 1}; expected {stops}")
        return start, end

    def _start(self, conversation: Conversation, text: str, turn: "_Turn", *, low: int) -> int:
        header, prompt = self.markers.header, self.markers.generation_prompt
        message, position = conversation.messages[turn.index], turn.begin
        if header in message.content or header in (message.reasoning or ""):
            raise Refused(
                "mask_not_verified",
                f"turn {turn.index + 1} contains {header!r}, by which the template announces an answer",
            )
        found = text.rfind(header, low, position)
        if found < 0:
            return self._start_after_prompt(conversation, text, turn, low=low)
        # Templates that open a thinking block in the generation prompt leave it out before earlier answers.
        return min(found + len(prompt if text.startswith(prompt, found) else header), position)

    def _start_after_prompt(self, conversation: Conversation, text: str, turn: "_Turn", *, low: int) -> int:
        """For a turn without the usual header: where the prompt of inference ends, if the render begins with it."""
        prompt = self._prompt_for(conversation, turn)
        if not (text.startswith(prompt) and low < len(prompt) <= turn.begin):
            raise Refused(
                "mask_not_verified",
                f"the template writes turn {turn.index + 1} without {self.markers.header!r} before it",
            )
        return len(prompt)

    def _prompt_for(self, conversation: Conversation, turn: "_Turn") -> str:
        """What inference asks for a turn with."""
        earlier = conversation.messages[: turn.index]
        return self.template.text_of(earlier, conversation.tools, add_generation_prompt=True)

    def _asked_otherwise(self, conversation: Conversation, before: str, turn: "_Turn") -> str:
        """How inference asks for a turn that training writes behind `before`, where that differs; else empty.

        Behind a question, the usual prompt is looked for first, which spares most templates a second render.
        """
        earlier = conversation.messages[: turn.index]
        if earlier and earlier[-1].role == "user" and before.endswith(self.markers.generation_prompt):
            return ""
        prompt = self._prompt_for(conversation, turn)
        if prompt == before:
            return ""
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, before, strict=False)))
        asked, trained = (repr(rest) if rest else "nothing" for rest in (prompt[same:], before[same:]))
        return f"turn {turn.index + 1}: inference asks with {asked} where training has {trained} before the answer"

    def _end(self, text: str, turn: "_Turn") -> int | None:
        if not turn.calls or turn.calls[-1] < turn.end:
            match = self._tail.match(text, turn.end)
            return match.end() if match else None
        stop = self.markers.calls_stop if len(turn.calls) > 1 else self.markers.call_stop
        found = -1 if stop is None else text.find(stop, turn.calls[-1])
        return None if stop is None or found < 0 else found + len(stop)

    # ------------------------------------------------------------ learning

    def _learn(self) -> Markers:
        """Render probes and read off what surrounds answers. Raises ConfigError if nothing does."""
        name = self.template.name
        ask, answer, mark = Message("user", "Probe question?"), Message("assistant", "Probe answer."), chr(PLANES[0])
        ended = Message("assistant", answer.content + mark)
        try:
            prefix = self.template.text_of([ask])
            prompted = self.template.text_of([ask], add_generation_prompt=True)
            full = self.template.text_of([ask, ended, ask, ended])
        except Refused as error:
            raise ConfigError(f"{name}: {error.reason}; give another template in data.chat_template") from None
        # Some templates have no generation prompt of their own: what ends the question then announces the answer.
        prompt = prompted[len(prefix) :] if prompted.startswith(prefix) else ""
        prompt = prompt or prompted[prompted.rfind(ask.content) + len(ask.content) :]
        ends = [match.start() for match in re.finditer(mark, full)]
        if len(ends) != 2 or ask.content not in prompted:
            raise ConfigError(
                f"{name}: the chat template does not render each answer once; give another in data.chat_template"
            )
        header = min((_header_before(full, ask.content, answer.content, end, prompt) for end in ends), key=len)
        thinking_header = self._header_before_thinking(ask, prompt)
        header = header if thinking_header is None else min(header, thinking_header, key=len)
        tails = self._tails(full[ends[0] + 1 :], full[ends[1] + 1 :])
        if not header.strip() or not all(tails):
            raise ConfigError(self._no_markers(header))
        (one, call_stop), (several, calls_stop) = self._learn_calls(ask, 1), self._learn_calls(ask, 2)
        stops = [*(self._last_token(tail) for tail in tails), call_stop, calls_stop]
        return Markers(
            generation_prompt=prompt,
            header=header,
            tails=tuple(sorted(set(tails), key=lambda tail: (-len(tail), tail))),
            call_stop=call_stop,
            calls_stop=calls_stop,
            stops=tuple(dict.fromkeys(filter(None, stops))),
            frame=self._frame(prompted, full, one, several, essential=[header, *tails]),
            writes_thinking=thinking_header is not None,
        )

    def _frame(self, *texts: str, essential: Sequence[str]) -> frozenset[str]:
        """The added tokens in renders of probes, without words such as `<think>` that stand in no essential part."""
        found = {token for text in texts for token in self._added.findall(text)}
        needed = {token for text in essential for token in self._added.findall(text)}
        return frozenset(
            token for token in found if not WORD.fullmatch(token) or (token in needed and "think" not in token)
        )

    def _header_before_thinking(self, ask: Message, prompt: str) -> str | None:
        """What is left of the header where the template writes thinking behind it; None if it writes none."""
        thought = "Probe thought."
        try:
            full = self.template.text_of([ask, Message("assistant", "Probe answer.", reasoning=thought)])
        except Refused:
            return None
        if full.count(thought) != 1:
            return None
        return _header_before(full, ask.content, thought, len(full), prompt) or prompt

    def _tails(self, *after: str) -> list[str]:
        """What ends an answer, given what follows it in the middle and at the end of a conversation.

        The tokens that follow it in both places; where these have nothing in common, the first of each.
        """
        runs = [self._run_of_tokens(text) for text in after]
        num_common = 0
        for tokens in zip(*runs, strict=False):
            if len({text for text, _ in tokens}) > 1:
                break
            num_common += 1
        return [text[: run[max(num_common, 1) - 1][1]] if run else "" for text, run in zip(after, runs, strict=True)]

    def _run_of_tokens(self, text: str) -> list[tuple[str, int]]:
        """The added tokens at the beginning of a text, up to white space, each with where it ends."""
        found: list[tuple[str, int]] = []
        pattern, position = re.compile(rf"\s*({self._added.pattern})"), 0
        while match := pattern.match(text, position):
            position = match.end()
            found.append((match.group(1), position))
        return found

    def _last_token(self, tail: str) -> str:
        return self._run_of_tokens(tail)[-1][0]

    def _learn_calls(self, ask: Message, num_calls: int) -> tuple[str, str | None]:
        """The render of a turn that calls tools, and the added token at its very end; None if there is none."""
        if not self.template.form.calls:
            return "", None
        try:
            text = self.template.text_of(
                [ask, Message("assistant", "", tool_calls=(PROBE_CALL,) * num_calls)], [PROBE_TOOL]
            )
        except Refused:
            return "", None
        match = re.search(rf"({self._added.pattern})\Z", text.rstrip())
        return text, match.group(1) if match else None

    def _no_markers(self, header: str) -> str:
        if header.strip():
            missing = (
                "ends answers with no special token of this tokenizer, so answers have no end that a model could learn"
            )
        else:
            missing = "writes nothing before an answer, so answers have no beginning that a mask could start at"
        return (
            f"{self.template.name}: the chat template {missing}; "
            "give a template that fits the tokenizer in data.chat_template"
        )


# ---------------------------------------------------------------- marks


class _Marks:
    """Marks put into a conversation, in one plane. kinds[i]: (turn, kind) of the i-th."""

    def __init__(self, plane: int) -> None:
        self._plane = plane
        self._pattern = re.compile(f"[{chr(plane)}-{chr(plane + MARKS_PER_PLANE - 1)}]")
        self.kinds: list[tuple[int, str]] = []

    def of(self, turn: int, message: Message) -> Any:
        """The function that marks the texts of one message."""

        def mark(text: str, kind: str) -> str:
            if kind == "content" and message.role == "assistant":
                return self._mark_answer(turn, text)
            if not text.strip():
                return text
            if kind == "content":  # in the middle: templates look at how a user turn begins and ends
                cut = (len(text) - len(text.lstrip()) + len(text.rstrip()) + 1) // 2
                return text[:cut] + self._take(turn, kind) + text[cut:]
            return _append(text, self._take(turn, kind))

        return mark

    def _mark_answer(self, turn: int, text: str) -> str:
        """At the end; and at the end of thinking that is written into the answer, which templates may drop."""
        thinking, closed, words = text.rpartition(CLOSE_THINKING)
        if closed and thinking.rpartition("<think>")[2].strip():
            thinking = _append(thinking, self._take(turn, "reasoning"))
        if closed or words.strip():
            words = _append(words, self._take(turn, "content"))
        return thinking + closed + words

    def of_tool(self, tool: Mapping[str, Any]) -> dict[str, Any]:
        """A tool's schema with a mark in what it says about itself."""
        function = dict(tool["function"])
        key = "description" if isinstance(function.get("description"), str) and function["description"] else "name"
        function[key] = _append(function[key], self._take(TOOLS, "content"))
        return {**tool, "function": function}

    def _take(self, turn: int, kind: str) -> str:
        if len(self.kinds) == MARKS_PER_PLANE:
            raise Refused("mask_not_verified", f"more than {MARKS_PER_PLANE} turns and calls in one conversation")
        self.kinds.append((turn, kind))
        return chr(self._plane + len(self.kinds) - 1)

    def take_out(self, marked: str) -> tuple[str, list[list[int]]]:
        """The text without marks, and where each mark stood in it: none, one or several places."""
        places: list[list[int]] = [[] for _ in self.kinds]
        pieces, last, removed = [], 0, 0
        for match in self._pattern.finditer(marked):
            position = match.start()
            pieces.append(marked[last:position])
            places[ord(marked[position]) - self._plane].append(position - removed)
            last, removed = position + 1, removed + 1
        pieces.append(marked[last:])
        return "".join(pieces), places


@dataclass(slots=True)
class _Turn:
    """Where the marks of one message stand in the text; -1 for a text that the template left out."""

    index: int
    content: list[int] = field(default_factory=list)
    reasoning: list[int] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    repeated: bool = False

    @property
    def first_places(self) -> list[int]:
        return [place for place in (*self.reasoning, *self.content, *self.calls) if place >= 0]

    @property
    def begin(self) -> int:
        return min(self.first_places)

    @property
    def end(self) -> int:
        """Behind the last text of the turn; arguments of a call may follow."""
        return max(self.first_places)

    @property
    def dropped_reasoning(self) -> bool:
        return -1 in self.reasoning

    def require_whole(self, message: Message) -> None:
        """Raise Refused unless the answer and each call stand in the text, once."""
        for kind, places in (("answer", self.content), ("tool call", self.calls)):
            if -1 in places:
                raise Refused(
                    "message_dropped", f"the template leaves out or rewrites the {kind} of turn {self.index + 1}"
                )
        if self.repeated:
            raise Refused("mask_not_verified", f"the template writes turn {self.index + 1} more than once")


def _turns(messages: Sequence[Message], kinds: Sequence[tuple[int, str]], places: Sequence[list[int]]) -> list[_Turn]:
    """The turns of a text. Raises Refused if a text that is not the assistant's is left out."""
    turns = [_Turn(index) for index in range(len(messages))]
    for (owner, kind), found in zip(kinds, places, strict=True):
        if owner == TOOLS:
            if not found:
                raise Refused("message_dropped", "the template leaves out the tools that the row offers")
            continue
        turn, role = turns[owner], messages[owner].role
        if not found and role != "assistant":
            raise Refused("message_dropped", f"the template leaves out or rewrites turn {owner + 1} ({role})")
        if len(found) > 1 and kind != "call":  # a call may be named again by its result
            turn.repeated = True
        place = found[0] if found else -1
        if kind == "content":
            turn.content.append(place)
        elif kind == "reasoning":
            turn.reasoning.append(place)
        else:
            turn.calls.append(place)
    return turns


def _holds_another(start: int, end: int, turn: _Turn, turns: Sequence[_Turn]) -> bool:
    """Whether the text of another turn stands in [start, end)."""
    for other in turns:
        if other is not turn:
            for places in (other.content, other.reasoning, other.calls):
                for place in places:
                    if start < place < end:
                        return True
    return False


def _inside_tags(answer: Answer, tags: list[tuple[int, int]] | None) -> Answer | None:
    """The part of an answer inside generation tags, None if there is none. The stop token is trained in any case."""
    if tags is None:
        return answer
    inside = [start for start, end in tags if start < answer.end and end > answer.start]
    return Answer(max(answer.start, min(inside)), answer.end, answer.turn) if inside else None


def _split_tags(text: str) -> tuple[str, list[tuple[int, int]]]:
    spans, pieces, starts, length = [], [], [], 0
    for piece in re.split(f"([{TAG_OPEN}{TAG_CLOSE}])", text):
        if piece == TAG_OPEN:
            starts.append(length)
        elif piece == TAG_CLOSE:
            spans.append((starts.pop(), length))
        else:
            pieces.append(piece)
            length += len(piece)
    return "".join(pieces), spans


def _free_plane(text: str) -> int:
    """A private-use plane that the text does not touch. Raises Refused if it touches both."""
    if PRIVATE.search(text) is None:
        return PLANES[0]
    for plane in PLANES:
        if not re.search(f"[{chr(plane)}-{chr(plane + 0xFFFF)}]", text):
            return plane
    raise Refused(
        "mask_not_verified", "contains private-use characters of both supplementary planes, which mark answers here"
    )


def _append(text: str, mark: str) -> str:
    """Put the mark before trailing white space: a template's `trim` must still see the white space."""
    body = text.rstrip()
    return body + mark + text[len(body) :]


def _check_arguments(message: Message, span: str, index: int) -> None:
    """Raise Refused if a text among the arguments of a call is not in the span of its turn."""
    for call in message.tool_calls:
        for value in strings_in(call.arguments):
            if value not in span and json.dumps(value, ensure_ascii=False)[1:-1] not in span:
                raise Refused("message_dropped", f"the template leaves out or rewrites an argument of turn {index + 1}")


def _header_before(full: str, ask: str, answer: str, end: int, prompt: str) -> str:
    """The longest beginning of the generation prompt that stands between question and answer, "" if none does."""
    begin = full.rfind(answer, 0, end)
    between = full[full.rfind(ask, 0, begin) + len(ask) : begin]
    return next((prompt[:size] for size in range(len(prompt), 0, -1) if prompt[:size] in between), "")


def any_of(texts: Collection[str]) -> re.Pattern[str]:
    """Matches any of the texts, the longest first; never matches if there are none."""
    return re.compile(
        "|".join(re.escape(text) for text in sorted(set(texts), key=lambda text: (-len(text), text))) or r"(?!)"
    )
