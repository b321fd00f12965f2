"""Conversation -> Example: one render of the chat template, one tokenisation, a verified mask.

What is trained is what the model must write: everything after the generation prompt through the stop token, for every
assistant turn. Turns are found in the *full* render, because the render of a prefix need not be a prefix of the
render (Qwen3 drops the thinking of earlier turns): a private-use character at the end of each answer marks it, and the
header that the template writes before an answer, learned once, gives its start.

Needs `tokenizers` and `jinja2` only: transformers' AutoTokenizer would import torch into every tokeniser process.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
import xxhash

from sft_dist.data.conversation import BadRow, Conversation, Message, Origin, Refused
from sft_dist.data.template import CHATML, compile_template
from sft_dist.data.tokenizer_files import (
    encoder_of,
    final_files,
    install_chatml,
    own_template,
    parse_tokenizer,
    read_files,
    read_json,
    read_template,
    special_tokens,
)
from sft_dist.errors import ConfigError, DataError

# Supplementary private-use planes: characters no text should hold. If a conversation does, the other plane is taken.
SENTINEL_PLANES = (0xF0000, 0x100000)
SENTINELS_PER_PLANE = 0xFFFE


@dataclass(frozen=True, slots=True)
class Example:
    """input_ids: [L] int32. is_response: [L] bool, the tokens that are trained. Unshifted."""

    input_ids: np.ndarray
    is_response: np.ndarray
    origin: Origin


@dataclass(frozen=True, slots=True)
class Markers:
    """What a template writes around an answer, learned from it by rendering a probe.

    generation_prompt: what `add_generation_prompt` adds.
    header: its beginning, as far as it also precedes the answers of earlier turns.
    stops: the tokens that end an answer.
    """

    generation_prompt: str
    header: str
    stops: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A conversation as text. spans: [start, end) in characters of each trained answer, stop token included."""

    text: str
    spans: tuple[tuple[int, int], ...]
    answers: tuple[str, ...]
    origin: Origin


@dataclass(frozen=True, slots=True)
class _Tokens:
    """A rendered conversation as tokens. ranges: [first, last) tokens of each trained answer."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    ranges: list[tuple[int, int]]

    @classmethod
    def of(cls, ids: list[int], offsets: list[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> "_Tokens":
        """Choose the tokens that overlap each span of characters.

        Several byte-level tokens can share one character and its offsets; all of them overlap.
        """
        bounds = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
        firsts = np.searchsorted(bounds[:, 1], [start for start, _ in spans], side="right")
        lasts = np.searchsorted(bounds[:, 0], [end for _, end in spans], side="left")
        return cls(ids, offsets, [(int(first), int(last)) for first, last in zip(firsts, lasts, strict=True)])

    def responses(self) -> list[list[int]]:
        return [self.ids[first:last] for first, last in self.ranges]

    def example(self, origin: Origin) -> Example:
        is_response = np.zeros(len(self.ids), dtype=bool)
        for first, last in self.ranges:
            is_response[first:last] = True
        return Example(np.asarray(self.ids, dtype=np.int32), is_response, origin)


class ChatTokenizer:
    """A tokenizer and its chat template. Make one with `load`."""

    def __init__(self, files: Mapping[str, bytes], *, name: str, chat_template: str | None = None) -> None:
        """files: name -> content of the tokenizer files. chat_template: replaces the files' own template."""
        self.name = name
        self._tokenizer = parse_tokenizer(files, name)
        config = read_json(files, "tokenizer_config.json", name)
        special_map = read_json(files, "special_tokens_map.json", name)
        template = chat_template if chat_template is not None else own_template(files, config, name)
        specials = special_tokens(config, special_map)
        self.added_chatml = template is None
        self.added_token_ids: tuple[int, ...] = ()  # tokens that the model has never seen
        if template is None:
            template = CHATML
            known = self._tokenizer.get_vocab_size(with_added_tokens=True)
            specials |= install_chatml(self._tokenizer, specials)
            self.added_token_ids = tuple(range(known, self._tokenizer.get_vocab_size(with_added_tokens=True)))
        self.template, self.specials = template, specials
        self.files = final_files(
            files, self._tokenizer if self.added_chatml else None, config, special_map, specials, template
        )
        self._compiled = compile_template(template, name)
        self._encoder = encoder_of(self._tokenizer)
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = {token.content: number for number, token in added.items()}
        # Control tokens, which no message may contain; other added tokens (<think>) are words like any other.
        self.special_ids = frozenset(number for number, token in added.items() if token.special)
        self.markers = self._learn_markers()
        self._template_stop_ids = tuple(self._added[stop] for stop in self.markers.stops)
        stops = _any_of(set(self.markers.stops)).pattern
        self._stop = re.compile(rf"\s*({stops})")
        self._stop_at_end = re.compile(rf"({stops})\Z")
        self._control = _any_of(
            {*(text for text, number in self._added.items() if number in self.special_ids), *self.markers.stops}
        )

    @classmethod
    def load(
        cls, path: str | Path, *, revision: str | None = None, chat_template: Path | None = None
    ) -> "ChatTokenizer":
        """Read the tokenizer of a model directory or hub id.

        Without any template ChatML is installed, which may add tokens: see `added_chatml` and `num_tokens`.
        Raises ConfigError if there is no tokenizer.json, a file cannot be parsed, or the template cannot be used.
        """
        files = read_files(path, revision)
        return cls(files, name=str(path), chat_template=None if chat_template is None else read_template(chat_template))

    @property
    def num_tokens(self) -> int:
        """Rows that the embedding needs: the highest id + 1."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def eos_id(self) -> int | None:
        return self._id_of("eos_token")

    @property
    def pad_id(self) -> int | None:
        return self._id_of("pad_token")

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: the template's stop tokens first, then eos."""
        eos = () if self.eos_id is None else (self.eos_id,)
        return tuple(dict.fromkeys([*self._template_stop_ids, *eos]))

    @property
    def digest(self) -> str:
        """Hex digest of everything that decides ids and masks."""
        digest = xxhash.xxh3_128()
        for name in sorted(self.files):
            digest.update(f"{name} {len(self.files[name])}\n".encode() + self.files[name])
        return digest.hexdigest()

    def save(self, directory: Path) -> None:
        """Write the tokenizer files. `load` and transformers' AutoTokenizer read back the same ids and renders."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (directory / name).write_bytes(content)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The template's text for these messages. Raises DataError if the template refuses them."""
        try:
            return self._render([(message.role, message.content) for message in messages], add_generation_prompt)
        except Refused as error:
            raise DataError(f"{self.name}: {error.reason}") from None

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids to generate from: the messages and the generation prompt. Raises DataError for a forged control token."""
        try:
            self._refuse_control_tokens(messages)
        except Refused as error:
            raise DataError(f"{error.reason}; remove it from the message") from None
        return self._encoder.encode(self.render(messages, add_generation_prompt=True), add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, control tokens included."""
        return self._encoder.decode(list(ids), skip_special_tokens=False)

    def encode(self, conversations: Sequence[Conversation]) -> list[Example | BadRow]:
        """Tokenise and mask a batch, in order. A result is an Example only if its mask was verified; see `_verify`."""
        marked = [self._mark_or_refuse(conversation) for conversation in conversations]
        rendered = [item for item in marked if isinstance(item, _Rendered)]
        encodings = self._encoder.encode_batch([item.text for item in rendered], add_special_tokens=False)
        tokens = [
            _Tokens.of(code.ids, code.offsets, item.spans) for code, item in zip(encodings, rendered, strict=True)
        ]
        responses = [ids for each in tokens for ids in each.responses()]
        texts = iter(self._encoder.decode_batch(responses, skip_special_tokens=False))
        examples = iter([self._verified(item, each, texts) for item, each in zip(rendered, tokens, strict=True)])
        return [next(examples) if isinstance(item, _Rendered) else item for item in marked]

    # ------------------------------------------------------------ marking

    def _mark_or_refuse(self, conversation: Conversation) -> _Rendered | BadRow:
        try:
            self._refuse_control_tokens(conversation.messages)
            return self._mark(conversation)
        except Refused as error:
            return BadRow(conversation.origin, error.cause, error.reason)

    def _mark(self, conversation: Conversation) -> _Rendered:
        """Render with a sentinel at the end of each answer, and once without, to prove that it changed nothing else."""
        messages = conversation.messages
        turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
        sentinels = _free_sentinels(messages, len(turns))
        marked = [[message.role, message.content] for message in messages]
        for turn, sentinel in zip(turns, sentinels, strict=True):
            marked[turn][1] = _append(messages[turn].content, sentinel)
        text, positions = _take_out(self._render([(role, content) for role, content in marked]), sentinels)
        if text != self._render([(message.role, message.content) for message in messages]):
            raise Refused("mask_not_verified", "the template renders an answer differently when its end is marked")
        _check_nothing_dropped(messages, text)
        spans, low = [], 0
        for turn, position in zip(turns, positions, strict=True):
            span = self._find_span(text, messages[turn].content, low=low, position=position)
            low = span[1]
            if messages[turn].train:
                spans.append(span)
        answers = tuple(message.content for message in messages if message.train)
        return _Rendered(text, tuple(spans), answers, conversation.origin)

    def _find_span(self, text: str, answer: str, *, low: int, position: int) -> tuple[int, int]:
        """[start, end) of the answer that ends at `position` and begins after `low`: from header through stop token."""
        header, prompt = self.markers.header, self.markers.generation_prompt
        if header in answer:
            raise Refused(
                "mask_not_verified", f"an answer contains {header!r}, by which the template announces an answer"
            )
        found = text.rfind(header, low, position)
        if found < 0:
            raise Refused("mask_not_verified", f"the template writes an answer without {header!r} before it")
        stop = self._stop.match(text, position)
        if stop is None:
            raise Refused(
                "mask_not_verified", f"no stop token follows an answer; expected {' or '.join(self.markers.stops)}"
            )
        # Templates that open a thinking block in the generation prompt leave it out before earlier answers.
        start = found + len(prompt if text.startswith(prompt, found) else header)
        return min(start, position), stop.end()

    def _verified(self, item: _Rendered, tokens: "_Tokens", texts: Iterator[str]) -> Example | BadRow:
        """texts: takes the decoded text of each of the item's responses from it."""
        decoded = [next(texts) for _ in tokens.ranges]
        try:
            self._verify(item, tokens, decoded)
        except Refused as error:
            return BadRow(item.origin, error.cause, error.reason)
        return tokens.example(item.origin)

    def _verify(self, item: _Rendered, tokens: "_Tokens", texts: Sequence[str]) -> None:
        """Raise unless each masked span decodes to its text, holds the answer's words and ends in a stop token."""
        if not tokens.ranges or tokens.ranges[0][0] == 0:
            raise Refused(
                "mask_not_verified",
                "the first token would be a response; it has nothing before it to be predicted from",
            )
        for (first, last), (start, end), answer, decoded in zip(
            tokens.ranges, item.spans, item.answers, texts, strict=True
        ):
            if first >= last or tokens.ids[last - 1] not in self._template_stop_ids:
                raise Refused("mask_not_verified", "a response does not end in a stop token")
            # A token may begin in the white space that ends the generation prompt: "\n" + "\nyes" is one "\n\n".
            begin = min(start, tokens.offsets[first][0])
            if item.text[begin:start].strip():
                raise Refused(
                    "mask_not_verified", f"a token joins {item.text[begin:start]!r} of the prompt with the response"
                )
            span = item.text[begin:end]
            if not self._same_text(decoded, span):
                raise Refused("mask_not_verified", f"the trained tokens decode to {clip(decoded)}, not {clip(span)}")
            body = self._stop_at_end.sub("", span).rstrip()
            if not body.endswith(_words(answer)):
                raise Refused(
                    "mask_not_verified",
                    f"the response {clip(body)} does not end with the answer {clip(_words(answer))}",
                )

    def _same_text(self, decoded: str, span: str) -> bool:
        return decoded == span or self._canonical(decoded) == self._canonical(span)

    def _canonical(self, text: str) -> str:
        """Text up to what the tokenizer itself does not keep: Unicode normal form and SentencePiece's leading space."""
        normalizer = self._tokenizer.normalizer
        if normalizer is None:
            return text
        normal: str = normalizer.normalize_str(text)
        return normal.replace("\u2581", " ").strip()

    # ------------------------------------------------------------ template

    def _render(self, turns: Sequence[tuple[str, str]], add_generation_prompt: bool = False) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            return self._compiled.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.specials,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            raise Refused(
                "template_refused", f"the chat template refuses this conversation: {clip(str(error))}"
            ) from None

    def _refuse_control_tokens(self, messages: Sequence[Message]) -> None:
        for index, message in enumerate(messages):
            if found := self._control.search(message.content):
                raise Refused(
                    "control_token",
                    f"turn {index + 1} ({message.role}) contains {found.group()!r}, which would become a control token",
                )

    def _learn_markers(self) -> Markers:
        """Render a probe and read off what surrounds answers. Raises ConfigError if nothing does."""
        ask, answer, mark = "Probe question?", "Probe answer.", chr(SENTINEL_PLANES[0])
        try:
            prefix = self._render([("user", ask)])
            prompted = self._render([("user", ask)], add_generation_prompt=True)
            turns = [("user", ask), ("assistant", answer + mark)] * 2
            full = self._render(turns)
        except Refused as error:
            raise ConfigError(f"{self.name}: {error.reason}; give another template in data.chat_template") from None
        # Some templates have no generation prompt of their own: what ends the question then announces the answer.
        prompt = prompted[len(prefix) :] if prompted.startswith(prefix) else ""
        prompt = prompt or prompted[prompted.rfind(ask) + len(ask) :]
        ends = [match.start() for match in re.finditer(mark, full)]
        if len(ends) != 2 or ask not in prompted:
            raise ConfigError(
                f"{self.name}: the chat template does not render each answer once; give another in data.chat_template"
            )
        header = min((_header_before(full, ask, answer, end, prompt) for end in ends), key=len)
        stops = [self._stop_after(full, end + 1) for end in ends]
        if not header.strip() or None in stops:
            raise ConfigError(self._no_markers(header))
        return Markers(prompt, header, tuple(sorted(set(filter(None, stops)))))

    def _stop_after(self, text: str, position: int) -> str | None:
        match = re.compile(rf"\s*({_any_of(set(self._added)).pattern})").match(text, position)
        return match.group(1) if match else None

    def _no_markers(self, header: str) -> str:
        if header.strip():
            missing = (
                "ends answers with no special token of this tokenizer, so answers have no end that a model could learn"
            )
        else:
            missing = "writes nothing before an answer, so answers have no beginning that a mask could start at"
        return (
            f"{self.name}: the chat template {missing}; give a template that fits the tokenizer in data.chat_template"
        )

    def _id_of(self, name: str) -> int | None:
        text = self.specials.get(name)
        return None if text is None else self._tokenizer.token_to_id(text)


# ---------------------------------------------------------------- spans


def _header_before(full: str, ask: str, answer: str, end: int, prompt: str) -> str:
    """The longest beginning of the generation prompt that stands between question and answer, "" if none does."""
    begin = full.rfind(answer, 0, end)
    between = full[full.rfind(ask, 0, begin) + len(ask) : begin]
    return next((prompt[:size] for size in range(len(prompt), 0, -1) if prompt[:size] in between), "")


def _free_sentinels(messages: Sequence[Message], count: int) -> list[str]:
    """`count` characters that occur in no message. Raises Refused if both private-use planes are taken."""
    text = "".join(message.content for message in messages)
    for plane in SENTINEL_PLANES:
        if count <= SENTINELS_PER_PLANE and not re.search(
            f"[{chr(plane)}-{chr(plane + SENTINELS_PER_PLANE - 1)}]", text
        ):
            return [chr(plane + index) for index in range(count)]
    raise Refused(
        "mask_not_verified", "contains private-use characters of both supplementary planes, which mark answers here"
    )


def _append(content: str, sentinel: str) -> str:
    """Put the sentinel before trailing white space: a template's `trim` must still see the white space."""
    body = content.rstrip()
    return body + sentinel + content[len(body) :]


def _take_out(marked: str, sentinels: Sequence[str]) -> tuple[str, list[int]]:
    """The text without sentinels, and where each of them stood in that text."""
    positions = [marked.find(sentinel) for sentinel in sentinels]
    if -1 in positions or positions != sorted(positions) or any(marked.count(sentinel) != 1 for sentinel in sentinels):
        raise Refused("mask_not_verified", "the template does not render each answer once and in order")
    pieces = re.split("|".join(sentinels), marked) if sentinels else [marked]
    return "".join(pieces), [position - index for index, position in enumerate(positions)]


def _check_nothing_dropped(messages: Sequence[Message], text: str) -> None:
    for index, message in enumerate(messages):
        if message.role != "assistant" and message.content.strip() not in text:
            raise Refused("message_dropped", f"the template leaves out or rewrites turn {index + 1} ({message.role})")


def _words(answer: str) -> str:
    """The part of an answer that every template keeps: templates may move or drop the thinking before it."""
    return answer.rpartition("</think>")[2].strip()


def _any_of(texts: set[str]) -> re.Pattern[str]:
    """Matches any of the texts, the longest first; never matches if there are none."""
    return re.compile(
        "|".join(re.escape(text) for text in sorted(texts, key=lambda text: (-len(text), text))) or r"(?!)"
    )


def clip(text: str, limit: int = 80) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "…")
