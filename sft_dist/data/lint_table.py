"""What lint keeps of each row of a data set: hashes, lengths and flags, 78 bytes and no text."""

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sft_dist.data.conversation import Conversation, Message, Origin, normalise, prompt_hash
from sft_dist.data.lint_row import last_exchange, responses_of, user_turn_before
from sft_dist.data.lint_text import (
    LANGUAGES,
    SHAPES,
    has_trailing_cue,
    is_json,
    language,
    response_shape,
    skeleton,
    text_key,
)

CLOSED_WORDS = 5
"""Up to so many words are an answer that is right or wrong, not one worded in its own way."""
LONG_RESPONSE = 200
CUTS = ("", "in the middle of a sentence", "inside a code block", "inside a JSON object")

ROW = np.dtype([
    ("file", "u4"), ("line", "u4"),
    ("conversation", "u8"),  # all turns
    ("question", "u8"),      # prompt_hash
    ("prompt", "u8"),        # the same with what else decides the answer: system prompts, tools and calls
    ("answer", "u8"),        # the last response
    ("system", "u8"),        # 0: none
    ("loose_system", "u8"),  # letters and digits only
    ("skeleton", "u8"),
    ("shape", "u1"), ("closed", "?"), ("cue", "?"), ("cut", "u1"), ("long_prose", "?"), ("language", "u1"),
    ("prompt_chars", "u4"), ("response_chars", "u4"),
])  # fmt: skip

Table = NDArray[np.void]
_FENCE = re.compile(r"`{3,}+")
_OPENS_BLOCK = re.compile(r"[^\s`]*+[^\S\n]*+(?:\n|(?<!`)$)")
_LIST_ITEM = re.compile(r"\s*+(?:[-*+•]|\d+[.):]|[A-Za-z][.)]|#+|>|\|)")
_DANGLING = re.compile(r"(?:^|\W)(?:and|or|the|an|of|because|und|oder|der|et|ou|y)$")
_SENTENCE_WORD = re.compile(r"(?:^|[^\w#@/])[^\W\d_]+$|[,(\[{–—]$")
_NOT_WORD = re.compile(r"[\W_]+")
_JSON_START = re.compile(r"\{\s*[\"}]|\[\s*[\[{\"]")
MIN_SENTENCE = 60
"""Characters of a last line that is running text; a shorter one is a heading, a signature or a verse."""


class RowTable:
    """Takes conversations one by one, keeps a row of the table of each."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}
        self._pending: list[tuple[object, ...]] = []
        self._blocks: list[Table] = []

    def add(self, conversation: Conversation) -> None:
        """Add a parsed row."""
        file = self._files.setdefault(conversation.origin.path, len(self._files))
        self._pending.append((file, conversation.origin.line, *features(conversation)))
        if len(self._pending) == 4096:
            self._flush()

    def finish(self) -> "DataSet":
        """The table of what was added."""
        self._flush()
        return DataSet(np.concatenate(self._blocks) if self._blocks else np.empty(0, dtype=ROW), tuple(self._files))

    def _flush(self) -> None:
        if self._pending:
            self._blocks.append(np.array(self._pending, dtype=ROW))
            self._pending = []


class DataSet:
    """table: [N] of ROW; files: the names its rows point at."""

    def __init__(self, table: Table, files: Sequence[str]) -> None:
        self.table, self._files = table, files

    def __len__(self) -> int:
        return len(self.table)

    def origin(self, row: int) -> Origin:
        """File and line of a row."""
        return Origin(self._files[self.table["file"][row]], int(self.table["line"][row]))

    def rows_in(self, other: "DataSet", field: str) -> dict[int, int]:
        """Rows whose key occurs in another data set, each with the first row there that has it; ascending."""
        keys, firsts = np.unique(other.table[field], return_index=True)
        if not len(keys):
            return {}
        places = np.searchsorted(keys, self.table[field]).clip(max=len(keys) - 1)
        found = np.flatnonzero(keys[places] == self.table[field])
        return dict(zip(found.tolist(), firsts[places[found]].tolist(), strict=True))


def features(conversation: Conversation) -> tuple[object, ...]:
    """The fields of ROW behind file and line."""
    before, last = last_exchange(conversation)
    responses = [message.content for message in responses_of(conversation)]
    question = prompt_hash(conversation)
    system = "\n".join(message.content for message in conversation.messages if message.role == "system")
    user = user_turn_before(before)
    fixed = skeleton(user)
    shape = response_shape(last.content)
    cuts = [how_cut(response) for response in responses]
    return (
        _turns_key(conversation.messages),
        question,
        _prompt_key(question, conversation, before),
        _turns_key([last]),
        text_key(system) if system.strip() else 0,
        text_key(_NOT_WORD.sub("", system.casefold())),
        text_key(fixed),
        SHAPES.index(shape),
        shape != "prose" or len(last.content.split()) <= CLOSED_WORDS,
        has_trailing_cue(user),
        CUTS.index(next((cut for cut in cuts if cut), "")),
        is_long_prose(last.content),
        LANGUAGES.index(language(fixed[:1000])),
        sum(len(message.content) for message in before),
        max(map(len, responses)),
    )


def how_cut(response: str) -> str:
    """How a response seems to have been cut, one of CUTS; empty if it seems whole."""
    text = response.strip()
    if "```" in text and _is_block_open(text):
        return CUTS[2]
    if _JSON_START.match(text) and text.count("{") + text.count("[") > text.count("}") + text.count("]"):
        return "" if is_json(text) else CUTS[3]
    last_line = text.rsplit("\n", 1)[-1]
    if len(text) <= LONG_RESPONSE or _LIST_ITEM.match(last_line) or "```" in text:
        return ""
    end = text[-60:]  # these patterns would scan all of a long response
    if _DANGLING.search(end) or (len(last_line) >= MIN_SENTENCE and _SENTENCE_WORD.search(end)):
        return CUTS[1]
    return ""


def is_long_prose(response: str) -> bool:
    """Whether a response is running text, of which one expects that it ends in punctuation."""
    text = response.strip()
    last_line = text.rsplit("\n", 1)[-1]
    return len(text) > LONG_RESPONSE and len(last_line) >= MIN_SENTENCE and not _LIST_ITEM.match(last_line)


def _is_block_open(text: str) -> bool:
    """Whether the last of an odd number of fences opens a block: nothing but its language follows on its line.

    A fence that prose speaks of has more behind it; one at the very end closes what an earlier one opened.
    """
    fences = list(_FENCE.finditer(text))
    return len(fences) % 2 == 1 and bool(_OPENS_BLOCK.match(text, fences[-1].end()))


def _prompt_key(question: int, conversation: Conversation, before: Sequence[Message]) -> int:
    """Hash of a prompt with all that may ask for another answer to it."""
    systems = [normalise(message.content) for message in before if message.role == "system"]
    calls = [message.tool_calls for message in before if message.tool_calls]
    return text_key(f"{question}\x00{systems}\x00{calls or ''}\x00{conversation.tools or ''}")


def _turns_key(messages: Sequence[Message]) -> int:
    """Hash of turns without their case and white space."""
    return text_key("\x00".join(f"{m.role}\x01{normalise(m.content)}\x01{m.tool_calls or ''}" for m in messages))
