r"""Control tokens in the text of a row: text stays text.

A row that holds `<|im_start|>` would forge a turn. Neutralised, it is encoded as the characters that it is written
with, exactly as a tokenizer would that does not know the token:

    the row          say <|im_start|>                   -> say ?                  ? one private-use character
    rendered         <|im_start|>user\nsay ?<|im_end|>
    to be encoded    Auser\nsay <|im_start|>B            A, B: names of the template's own control tokens

by a copy of the tokenizer whose control tokens have these names, and so the same ids.
"""

import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from sft_dist.data.conversation import Conversation, Refused
from sft_dist.data.encoder import Encoder
from sft_dist.data.masks import MARKS_PER_PLANE, PLANES, any_of
from sft_dist.data.tokenizer_files import encoder_of

NAMES = PLANES[0] + MARKS_PER_PLANE
"""Where the names of control tokens begin; the placeholders of a row follow them."""


class ControlTokens:
    """The tokens that no text of a row may turn into."""

    def __init__(self, tokenizer: Tokenizer, texts: Collection[str]) -> None:
        """texts: the control tokens as they are written."""
        self._tokenizer = tokenizer
        self.texts = tuple(sorted(texts))
        self.pattern = any_of(self.texts)
        self._names = {text: chr(NAMES + index) for index, text in enumerate(self.texts)}
        placeholder = NAMES + len(self.texts)
        self._placeholders = {text: chr(placeholder + index) for index, text in enumerate(self.texts)}
        self._texts_of = {name: text for text, name in self._names.items()}
        self._shown = {name: text for text, name in self._placeholders.items()}
        self._written = self._names | self._shown  # what a hidden row holds -> what `encoder` is given
        self._to_write = any_of(self._written)
        self._named = re.compile(f"[{chr(NAMES)}-{chr(placeholder - 1)}]") if self.texts else re.compile(r"(?!)")
        self._private = re.compile(f"[{chr(NAMES)}-{chr(placeholder + len(self.texts))}]")

    def found_in(self, conversation: Conversation) -> str | None:
        """What a row holds of them, as a phrase; None if nothing. The usual case costs one search a turn."""
        search = self.pattern.search
        if not conversation.tools and all(message.is_plain for message in conversation.messages):
            if not any([search(message.content) for message in conversation.messages]):
                return None
        elif not any(search(string) for string in conversation.strings()):
            return None
        turns = {
            f"turn {index + 1} ({message.role})": Conversation((message,), conversation.origin)
            for index, message in enumerate(conversation.messages)
        } | {"tools": Conversation((), conversation.origin, conversation.tools)}
        for where, part in turns.items():
            found = Counter(text for string in part.strings() for text in self.pattern.findall(string))
            if found:
                times = ", ".join(repr(text) + f" {count} times" * (count > 1) for text, count in found.items())
                return f"{where} contains {times}"
        return None

    def hide(self, conversation: Conversation) -> Conversation:
        """The row with a placeholder for each of them. Raises Refused if it holds such characters itself."""
        if any(self._private.search(string) for string in conversation.strings()):
            raise Refused(
                "control_token", "contains control tokens and the private-use characters that would hide them"
            )
        return conversation.with_strings(
            lambda text: self.pattern.sub(lambda match: self._placeholders[match.group()], text)
        )

    def reveal(self, text: str) -> str:
        """A render of a hidden row with its control tokens written out again."""
        return self._private.sub(lambda match: self._shown[match.group()], text)

    def name(self, text: str, places: Sequence[int]) -> tuple[str, list[int]]:
        """A render of a hidden row as `encoder` takes it, and where places in the render are in that text."""
        pieces: list[str] = []
        shifts = [(0, 0)]
        last = length = 0
        for match in self._to_write.finditer(text):
            new = self._written[match.group()]
            pieces += [text[last : match.start()], new]
            length += match.start() - last + len(new)
            last = match.end()
            shifts.append((last, length - last))
        pieces.append(text[last:])
        starts = [place for place, _ in shifts]
        return "".join(pieces), [place + shifts[bisect_right(starts, place) - 1][1] for place in places]

    def unname(self, text: str) -> str:
        """Text of `encoder` with the template's own control tokens written out."""
        return self._private.sub(lambda match: self._texts_of[match.group()], text)

    def count_names(self, text: str) -> int:
        """How many of the template's own control tokens are in a text of `encoder`."""
        return len(self._named.findall(text))

    @cached_property
    def encoder(self) -> Encoder:
        """A copy of the tokenizer that knows its control tokens by their names only."""
        renamed = _renamed(json.loads(self._tokenizer.to_str()), self._names)
        return Encoder(encoder_of(Tokenizer.from_str(json.dumps(renamed))))


def _renamed(tokenizer: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The JSON of a tokenizer with some tokens renamed wherever it names them; ids stay."""
    for token in tokenizer["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = tokenizer["model"]
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(text, text): number for text, number in vocab.items()}
    elif isinstance(vocab, list):
        model["vocab"] = [[names.get(text, text), score] for text, score in vocab]
    if "merges" in model:  # of ordinary text, which then goes without them
        pairs = [pair.split(" ") if isinstance(pair, str) else list(pair) for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if not names.keys() & {*pair, "".join(pair)}]
    if "unk_token" in model:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    tokenizer["post_processor"] = None
    return tokenizer
