r"""Text -> tokens, and which of them overlap given spans of characters.

The tokenizers library does all of it, at about 200 microseconds a row, two thirds of which cut text into words with a
general regular expression. For the two ways in which the models of this project cut words (Qwen2 to Qwen3, and
Llama 3) there is a shorter one: cut with Python's `re`, whose character classes are asked of the library itself, and
look each word up, which the library's own BPE tokenised when it was seen first. Words are tokenised independently of
each other, so the tokens are the same. Anything unusual takes the library's way: other tokenizers, rare scripts, text
that is not in normal form, a span that begins inside a word. One row in every call is encoded both ways and compared.
"""

import json
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any

from tokenizers import Encoding, Regex, Tokenizer, pre_tokenizers

from sft_dist.data.masks import any_of
from sft_dist.errors import BackendError

# How text is cut into words, as tokenizer.json has it, and the same for `re` with the classes to fill in.
_HEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
DIGITS = {rf"{_HEAD}\p{{N}}{_REST}": "", rf"{_HEAD}\p{{N}}{{1,3}}{_REST}": "{1,3}"}
# Characters whose classes are looked up: all but rare Asian scripts, ideographs and planes.
KNOWN = ((0x0, 0x33FF), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0xFB00, 0xFFFD), (0x1F000, 0x1FAFF))
MAX_WORDS = 200_000  # up to 130 MB a process, a third of it in languages with short words
LONGEST_WORD = 64


@dataclass(frozen=True, slots=True)
class Encoded:
    """ids: of a text. ranges: [first, last) tokens that overlap each span; begins: the character where each starts."""

    ids: list[int]
    ranges: list[tuple[int, int]]
    begins: list[int]


class Encoder:
    """Encodes whole renders: no truncation, no padding, and no tokens that the text does not have."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """tokenizer: without a post-processor, see `tokenizer_files.encoder_of`."""
        self._tokenizer = tokenizer
        setup = json.loads(tokenizer.to_str())
        self._words = _WordCutter(tokenizer, setup) if _is_known(setup) else None
        self.is_byte_level = (setup["decoder"] or {}).get("type") == "ByteLevel"
        self._bytes = _bytes_of_tokens(tokenizer) if self.is_byte_level else None

    def encode(self, texts: Sequence[str], spans: Sequence[Sequence[tuple[int, int]]]) -> list[Encoded]:
        """Tokens of each text, and of each of its spans, which end with an added token. Spans are not empty."""
        found: list[Encoded | None] = [None] * len(texts)
        if self._words is not None:
            found = [self._words.encode(text, of) for text, of in zip(texts, spans, strict=True)]
            self._compare_one(texts, found)
        rest = [index for index, each in enumerate(found) if each is None]
        codes = self._tokenizer.encode_batch([texts[index] for index in rest], add_special_tokens=False)
        for index, code in zip(rest, codes, strict=True):
            found[index] = _overlapping(code, spans[index])
        return [each for each in found if each is not None]

    def ids(self, text: str) -> list[int]:
        """Tokens of one text."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, batch: Sequence[Sequence[int]]) -> list[str]:
        """Text of ids, control tokens included."""
        if self._bytes is None:
            return self._tokenizer.decode_batch([list(ids) for ids in batch], skip_special_tokens=False)
        part = self._bytes.get
        return [b"".join([part(number, b"") for number in ids]).decode("utf-8", "replace") for ids in batch]

    def _compare_one(self, texts: Sequence[str], found: Sequence[Encoded | None]) -> None:
        index = next((index for index, each in enumerate(found) if each is not None), None)
        if index is None:
            return
        each = found[index]
        if each is not None and each.ids != self.ids(texts[index]):
            raise BackendError(
                f"the short way to tokens differs from the tokenizers library on {texts[index][:200]!r}; "
                "please report this with the tokenizer's name"
            )


def _overlapping(code: Encoding, spans: Sequence[tuple[int, int]]) -> Encoded:
    """Choose the tokens that overlap each span.

    Several byte-level tokens can share one character and its offsets; all of them overlap.
    """
    ranges, begins = [], []
    for start, end in spans:
        first, last = _token_from(code, start, end), code.char_to_token(end - 1)  # the added token at the end is one
        ranges.append((first, last + 1) if first is not None and last is not None else (0, 0))
        chars = None if first is None else code.token_to_chars(first)
        begins.append(start if chars is None else chars[0])
    return Encoded(code.ids, ranges, begins)


def _token_from(code: Encoding, start: int, end: int) -> int | None:
    """The token of the first of these characters that is in a token at all: tokenizers may drop white space."""
    for place in range(start, end):
        token = code.char_to_token(place)
        if token is not None:
            return token
    return None


# ---------------------------------------------------------------- the short way


class _WordCutter:
    """The short way for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, setup: dict[str, Any]) -> None:
        self._tokens = _Tokens(tokenizer)
        self._added = {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items()}
        self._split = re.compile(f"({any_of(self._added).pattern})").split
        self._find: Callable[[str], list[str]] = re.compile(_pattern_of(_split_of(setup))).findall
        self._is_unusual = re.compile(_unusual()).search
        self._is_nfc = (setup["normalizer"] or {}).get("type") == "NFC"

    def encode(self, text: str, spans: Sequence[tuple[int, int]]) -> Encoded | None:
        """None where the long way must be taken."""
        if self._is_unusual(text) or (self._is_nfc and not unicodedata.is_normalized("NFC", text)):
            return None
        tokens = self._tokens.__getitem__
        ids: list[int] = []
        parts: list[str | list[str]] = []  # an added token, or the words between two of them
        places: list[int] = []  # where each part begins in the text
        firsts: list[int] = []  # and its first token
        place = 0
        for index, part in enumerate(self._split(text)):
            if not part:
                continue
            places.append(place)
            firsts.append(len(ids))
            place += len(part)
            if index % 2:
                ids.append(self._added[part])
                parts.append(part)
            else:
                words = self._find(part)
                ids.extend(chain.from_iterable(map(tokens, words)))
                parts.append(words)
        ranges = []
        for start, end in spans:
            first = self._token_at(start, parts, places, firsts)
            index = bisect_right(places, end - 1) - 1
            part = parts[index]
            if first is None or not isinstance(part, str) or places[index] + len(part) != end:
                return None
            ranges.append((first, firsts[index] + 1))
        return Encoded(ids, ranges, [start for start, _ in spans])

    def _token_at(
        self, place: int, parts: Sequence[str | list[str]], places: Sequence[int], firsts: Sequence[int]
    ) -> int | None:
        """The token that begins at a character; None if none does."""
        index = bisect_right(places, place) - 1
        at, token, part = places[index], firsts[index], parts[index]
        if isinstance(part, str):
            return token if at == place else None
        for word in part:
            if at >= place:
                break
            at += len(word)
            token += len(self._tokens[word])
        return token if at == place else None


class _Tokens(dict[str, tuple[int, ...]]):
    """word -> its tokens, as the library's BPE cuts them; filled as words are met."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._model = tokenizer.model
        self._letters = str.maketrans({byte: letter for letter, byte in _byte_letters().items()})

    def __missing__(self, word: str) -> tuple[int, ...]:
        letters = word.encode("utf-8").decode("latin-1").translate(self._letters)
        tokens = tuple([token.id for token in self._model.tokenize(letters)])
        if len(self) >= MAX_WORDS:
            self.clear()
        if len(word) <= LONGEST_WORD:
            self[word] = tokens
        return tokens


def _is_known(setup: dict[str, Any]) -> bool:
    """Whether a tokenizer does what the short way does, and nothing else."""
    byte_level = _steps_of(setup)[1:]
    return (
        setup["model"]["type"] == "BPE"
        and not setup["model"].get("dropout")
        and (setup["normalizer"] or {"type": "NFC"})["type"] == "NFC"
        and _split_of(setup) in DIGITS
        and [step.get("type") for step in byte_level] == ["ByteLevel"]
        and not byte_level[0]["add_prefix_space"]
        and not byte_level[0]["use_regex"]
        and not any(
            token[flag] for token in setup["added_tokens"] for flag in ("lstrip", "rstrip", "single_word", "normalized")
        )
    )


def _steps_of(setup: dict[str, Any]) -> list[dict[str, Any]]:
    before = setup["pre_tokenizer"] or {}
    return list(before["pretokenizers"]) if before.get("type") == "Sequence" else [before]


def _split_of(setup: dict[str, Any]) -> str | None:
    """The regular expression by which text is cut into words; None if it is not cut in that way."""
    first = (_steps_of(setup) or [{}])[0]
    is_cut = first.get("type") == "Split" and first.get("behavior") == "Isolated" and not first.get("invert")
    return first["pattern"].get("Regex") if is_cut else None


def _pattern_of(split: str | None) -> str:
    """A pattern of DIGITS for `re`."""
    letter, number, space = (_members(name) for name in (r"\p{L}", r"\p{N}", r"\s"))
    return (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n{letter}{number}]?[{letter}]+|[{number}]{DIGITS[split or '']}"
        rf"| ?[^{space}{letter}{number}]+[\r\n]*|[{space}]*[\r\n]+|[{space}]+(?![^{space}])|[{space}]+"
    )


@cache
def _members(name: str) -> str:
    """The known characters of a class, as the inside of a bracket. The library is asked, whose Unicode it must be."""
    text = "".join(map(chr, _assigned()))
    outside = pre_tokenizers.Split(Regex(f"{name}+"), "removed").pre_tokenize_str(text)
    members: list[int] = []
    last = 0
    for _, (start, end) in [*outside, ("", (len(text), len(text)))]:
        members += map(ord, text[last:start])
        last = end
    return _ranges(members)


def _unusual() -> str:
    """Matches a character whose classes are not known."""
    return f"[^{_ranges(_assigned())}]"


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending code points as the inside of a bracket."""
    merged: list[list[int]] = []
    for number in numbers:
        if merged and number == merged[-1][1] + 1:
            merged[-1][1] = number
        else:
            merged.append([number, number])
    return "".join(f"\\U{low:08x}-\\U{high:08x}" for low, high in merged)


@cache
def _assigned() -> tuple[int, ...]:
    """Known characters that Python's Unicode has: what it has not, later versions may have put into another class."""
    return tuple(
        number for low, high in KNOWN for number in range(low, high + 1) if unicodedata.category(chr(number)) != "Cn"
    )


def _bytes_of_tokens(tokenizer: Tokenizer) -> dict[int, bytes] | None:
    """The bytes that each token of a byte-level tokenizer stands for; None if a token stands for none."""
    added = {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items()}
    letters = _byte_letters()
    try:
        return {
            number: text.encode("utf-8") if text in added else bytes([letters[letter] for letter in text])
            for text, number in tokenizer.get_vocab(with_added_tokens=True).items()
        }
    except KeyError:
        return None


@cache
def _byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in byte-level vocabularies.

    Source: Radford et al. 2019, GPT-2: printable Latin-1 stands for itself, the others for letters from U+0100.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}
