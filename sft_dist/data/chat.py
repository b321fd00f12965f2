"""Conversation -> Example: one render of the chat template, one tokenisation, a verified mask.

What is trained is what the model must write: everything after the generation prompt through the stop token, for every
trained turn. Tokens are chosen by the characters they overlap, and then the mask is verified: the trained tokens decode
to their text, hold the answer, end in a stop token, and take nothing of the prompt with them.

Needs `tokenizers` and `jinja2` only: transformers' AutoTokenizer would import torch into every tokeniser process.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from sft_dist.data.control_tokens import ControlTokens
from sft_dist.data.conversation import BadRow, Conversation, Message, Origin, Refused, Remark
from sft_dist.data.encoder import Encoded, Encoder
from sft_dist.data.masks import CLOSE_THINKING, Markers, SpanFinder
from sft_dist.data.template import CHATML, ChatTemplate, quoted
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
from sft_dist.errors import DataError

NOWHERE = Origin("", 0)


@dataclass(frozen=True, slots=True)
class Example:
    """input_ids: [L] int32. is_response: [L] bool, the tokens that are trained. Unshifted.

    remarks: what was done to the row that its owner should know; not stored with the tokens.
    """

    input_ids: np.ndarray
    is_response: np.ndarray
    origin: Origin
    remarks: tuple[Remark, ...] = ()


@dataclass(frozen=True, slots=True)
class _Job:
    """A rendered row on its way to tokens. spans: [start, end) in `text` of each trained turn.

    named: the text is for the encoder that knows control tokens by their names. is_trusted: control tokens of the row
    itself are among those of the text.
    """

    conversation: Conversation
    text: str
    spans: tuple[tuple[int, int], ...]
    turns: tuple[int, ...]
    remarks: tuple[Remark, ...]
    named: bool = False
    is_trusted: bool = False


class ChatTokenizer:
    """A tokenizer and its chat template. Make one with `load`."""

    def __init__(self, files: Mapping[str, bytes], *, name: str, chat_template: str | None = None) -> None:
        """files: name -> content of the tokenizer files. chat_template: replaces the files' own template."""
        self.name = name
        self._tokenizer = parse_tokenizer(files, name)
        config = read_json(files, "tokenizer_config.json", name)
        special_map = read_json(files, "special_tokens_map.json", name)
        source = chat_template if chat_template is not None else own_template(files, config, name)
        specials = special_tokens(config, special_map)
        self.added_chatml = source is None
        self.added_token_ids: tuple[int, ...] = ()  # tokens that the model has never seen
        if source is None:
            source = CHATML
            known = self._tokenizer.get_vocab_size(with_added_tokens=True)
            specials |= install_chatml(self._tokenizer, specials)
            self.added_token_ids = tuple(range(known, self._tokenizer.get_vocab_size(with_added_tokens=True)))
        self.template, self.specials = source, specials
        self.files = final_files(
            files, self._tokenizer if self.added_chatml else None, config, special_map, specials, source
        )
        self._encoder = Encoder(encoder_of(self._tokenizer))
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = {token.content: number for number, token in added.items()}
        self.special_ids = frozenset(number for number, token in added.items() if token.special)
        self._chat_template = ChatTemplate(source, name=name, specials=specials)
        self._finder = SpanFinder(self._chat_template, added_tokens=self._added)
        self._template_stop_ids = tuple(self._added[stop] for stop in self.markers.stops)
        # Other added tokens (<think>, <tool_call>) are words that a row may use like any other.
        special = {text for text, number in self._added.items() if number in self.special_ids}
        self._control = ControlTokens(self._tokenizer, special | self.markers.frame | set(self.markers.stops))
        self._control_ids = frozenset(self._added[text] for text in self._control.texts)

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
    def markers(self) -> Markers:
        """What the template writes around an answer."""
        return self._finder.markers

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

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """The template's text for these messages. Raises DataError if the template refuses them."""
        conversation = Conversation(tuple(messages), NOWHERE, tuple(map(dict, tools)))
        try:
            return self._render(conversation, add_generation_prompt=add_generation_prompt)
        except Refused as refused:
            raise DataError(f"{self.name}: {refused.reason}") from None

    def encode_prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Ids to generate from: the messages and the generation prompt. Control tokens in them are encoded as text.

        Raises DataError if the template refuses the messages.
        """
        conversation = Conversation(tuple(messages), NOWHERE, tuple(map(dict, tools)))
        try:
            if self._control.found_in(conversation) is None:
                text, encoder = self._render(conversation, add_generation_prompt=True), self._encoder
            else:
                hidden = self._render(self._control.hide(conversation), add_generation_prompt=True)
                (text, _), encoder = self._control.name(hidden, []), self._control.encoder
        except Refused as refused:
            raise DataError(f"{self.name}: {refused.reason}") from None
        return encoder.ids(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, control tokens included."""
        return self._encoder.decode([ids])[0]

    def encode(
        self, conversations: Sequence[Conversation], *, control_tokens: str = "neutralise"
    ) -> list[Example | BadRow]:
        """Tokenise and mask a batch, in order. A result is an Example only if its mask was verified; see `_verify`.

        control_tokens: what to do with those in the text of a row: neutralise, error or trust.
        """
        jobs = [self._job_or_refuse(conversation, control_tokens) for conversation in conversations]
        found = [job for job in jobs if isinstance(job, _Job)]
        encoded = self._encode_all(found)
        texts = iter(self._encoder.decode([each.ids[a:b] for each in encoded for a, b in each.ranges]))
        examples = iter([self._verified(job, each, texts) for job, each in zip(found, encoded, strict=True)])
        return [next(examples) if isinstance(job, _Job) else job for job in jobs]

    # ------------------------------------------------------------ rendering

    def _render(self, conversation: Conversation, *, add_generation_prompt: bool = False) -> str:
        return self._chat_template.text_of(
            conversation.messages, conversation.tools, add_generation_prompt=add_generation_prompt
        )

    def _job_or_refuse(self, conversation: Conversation, control_tokens: str) -> _Job | BadRow:
        try:
            found = None if control_tokens == "trust" else self._control.found_in(conversation)
            if found is None:
                job = self._job(conversation)
                return replace(job, is_trusted=True) if control_tokens == "trust" else job
            if control_tokens == "error":
                raise Refused(
                    "control_token",
                    f"{found}, which would become a control token; data.control_tokens: neutralise keeps it as text",
                )
            return self._neutralised_job(conversation, found)
        except Refused as refused:
            return BadRow(conversation.origin, refused.cause, refused.reason)

    def _job(self, conversation: Conversation) -> _Job:
        rendered = self._finder.find(conversation)
        return _Job(
            conversation,
            rendered.text,
            tuple((answer.start, answer.end) for answer in rendered.answers),
            tuple(answer.turn for answer in rendered.answers),
            rendered.remarks,
        )

    def _neutralised_job(self, conversation: Conversation, found: str) -> _Job:
        """The row with its control tokens hidden while it is rendered, for the encoder that does not know them."""
        job = self._job(self._control.hide(conversation))
        if self._control.reveal(job.text) != self._render(conversation):
            raise Refused("control_token", f"{found}, and the template treats that in a way of its own")
        text, places = self._control.name(job.text, [place for span in job.spans for place in span])
        spans = tuple(zip(places[::2], places[1::2], strict=True))
        remark = Remark(conversation.origin, "control_tokens_neutralised", f"{found}, encoded as text")
        return _Job(conversation, text, spans, job.turns, (*job.remarks, remark), named=True)

    def _encode_all(self, jobs: Sequence[_Job]) -> list[Encoded]:
        plain = [job for job in jobs if not job.named]
        found = iter(self._encoder.encode([job.text for job in plain], [job.spans for job in plain]))
        return [self._control.encoder.encode([job.text], [job.spans])[0] if job.named else next(found) for job in jobs]

    # ------------------------------------------------------------ verifying

    def _verified(self, job: _Job, encoded: Encoded, texts: Iterator[str]) -> Example | BadRow:
        """texts: takes the decoded text of each of the row's responses from it."""
        decoded = [next(texts) for _ in encoded.ranges]
        try:
            self._verify(job, encoded, decoded)
        except Refused as refused:
            return BadRow(job.conversation.origin, refused.cause, refused.reason)
        is_response = np.zeros(len(encoded.ids), dtype=bool)
        for first, last in encoded.ranges:
            is_response[first:last] = True
        return Example(np.asarray(encoded.ids, dtype=np.int32), is_response, job.conversation.origin, job.remarks)

    def _verify(self, job: _Job, encoded: Encoded, texts: Sequence[str]) -> None:
        """Raise unless each masked span decodes to its text, holds the answer's words and ends in a stop token."""
        if not job.is_trusted:
            self._verify_control_tokens(job, encoded)
        if encoded.ranges[0] != (0, 0) and encoded.ranges[0][0] == 0:
            raise Refused(
                "mask_not_verified",
                "the first token would be a response; it has nothing before it to be predicted from",
            )
        for index, ((first, last), (start, end)) in enumerate(zip(encoded.ranges, job.spans, strict=True)):
            turn = job.turns[index]
            if first >= last or encoded.ids[last - 1] not in self._template_stop_ids:
                raise Refused("mask_not_verified", f"turn {turn + 1} does not end in a stop token")
            # A token may begin in the white space that ends the generation prompt: "\n" + "\nyes" is one "\n\n".
            begin = min(start, encoded.begins[index])
            if job.text[begin:start].strip():
                raise Refused(
                    "mask_not_verified",
                    f"a token joins {job.text[begin:start]!r} of the prompt with the answer of turn {turn + 1}",
                )
            span = job.text[begin:end]
            span = self._control.unname(span) if job.named else span
            if not self._same_text(texts[index], span):
                raise Refused(
                    "mask_not_verified", f"the trained tokens decode to {quoted(texts[index])}, not {quoted(span)}"
                )
            self._verify_words(job.conversation.messages[turn], span)

    def _verify_control_tokens(self, job: _Job, encoded: Encoded) -> None:
        """Raise unless there are as many control tokens as the template wrote.

        A normalizer can make one of what is none as it stands, such as a full-width `＜|im_end|＞`.
        """
        written = self._control.count_names(job.text) if job.named else len(self._control.pattern.findall(job.text))
        if sum(map(self._control_ids.__contains__, encoded.ids)) != written:
            raise Refused("control_token", "the tokenizer's normalizer turns text of this row into control tokens")

    def _verify_words(self, message: Message, span: str) -> None:
        """Raise unless a span ends with the answer, or holds it and every function that is called after it.

        Templates may move or drop the thinking before the words.
        """
        words = message.content.rpartition(CLOSE_THINKING)[2].strip()
        parts = [words, *(call.name for call in message.tool_calls)]
        missing = next((part for part in parts if part not in span), None)
        if missing is None and not message.tool_calls and not self._finder.words_of(span).rstrip().endswith(words):
            missing = words
        if missing is not None:
            raise Refused("mask_not_verified", f"the trained text {quoted(span)} does not end with {quoted(missing)}")

    def _same_text(self, decoded: str, span: str) -> bool:
        return decoded == span or self._canonical(decoded) == self._canonical(span)

    def _canonical(self, text: str) -> str:
        """Text up to what the tokenizer itself does not keep: Unicode normal form and SentencePiece's leading space."""
        normalizer = self._tokenizer.normalizer
        normal: str = text if normalizer is None else normalizer.normalize_str(text)
        return normal if self._encoder.is_byte_level else normal.replace("\u2581", " ").strip()

    def _id_of(self, name: str) -> int | None:
        text = self.specials.get(name)
        return None if text is None else self._tokenizer.token_to_id(text)
