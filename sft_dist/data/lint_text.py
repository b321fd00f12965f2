"""What lint reads off a text: the shape of an answer, a trailing cue, the fixed part of a prompt, its language.

All are cheap guesses, made so that a text that fits no pattern is left alone. The time they take is linear in
the text, whatever it holds: what repeats is possessive or bounded, and no two starting places scan the same stretch.
"""

import json
import re
from collections.abc import Iterator
from functools import lru_cache

import xxhash

SHAPES = ("prose", "json", "choice letter", "number")
LANGUAGES = (
    "unknown", "English", "German", "French", "Spanish", "Italian", "Portuguese",
    "CJK", "Cyrillic", "Arabic", "Greek", "Hebrew", "Devanagari", "Thai", "Hangul",
)  # fmt: skip
# Letters beyond ASCII, which is Latin.
SCRIPTS = {
    "Latin": "À-ÖØ-öø-ɏḀ-ỿ",
    "CJK": "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff",
    "Cyrillic": "\u0400-\u052f",
    "Arabic": "\u0600-\u06ff\u0750-\u077f\ufb50-\ufdff\ufe70-\ufefc",
    "Greek": "\u0370-\u03ff\u1f00-\u1fff",
    "Hebrew": "\u0590-\u05ff",
    "Devanagari": "\u0900-\u097f",
    "Thai": "\u0e00-\u0e7f",
    "Hangul": "\u1100-\u11ff\uac00-\ud7af",
}
# Frequent words that the other five languages lack, or that tip the balance together.
STOP_WORDS = {
    "English": "the of and to is are what which with for this that from how following your you it was",
    "German": "der die das und ist nicht ein eine mit von für auf den dem wie was sich welche zu im werden",
    "French": "le la les des est et une un du dans pour que qui quelle avec sur quel vous il ce cette",
    "Spanish": "el la los las de y es una un del en por que para con cuál qué como se lo su",
    "Italian": "il lo la gli di e è una un della del in per che con quale sono come nel si questo",
    "Portuguese": "o os as de e é uma um da do em por que para com qual são como não se na no",
}

_CUE_WORD = (
    r"(?:(?:final|correct|your|model|the)[^\S\n]++)?(?:answer|response|output|solution|assistant|summary|result|label|category|"
    r"antwort|lösung|réponse|respuesta|resposta|risposta|ответ|答案|回答|答)"
)
# All marks and white space before a cue are its lead; what they must be is for `_cues`.
_CUE = re.compile(rf"(?:^|(?<![#*>\s])(?=[#*>\s]))([#*>\s]*+){_CUE_WORD}[*\s]*+[:：]", re.IGNORECASE)
_SHORT_LABEL = re.compile(r"[^\S\n]*+[#*>]*+[^\W\d]\w*+(?: \w++){0,2}[*]*+[:：]")
_LINE_LABEL = re.compile(r"[#*>\s]*+([^\W\d]\w*+(?: \w++){0,2})\s*+[*]*+[:：]")
_OPTION = re.compile(r"\(?([A-Z]|[a-h]|\d{1,2})[.):]\s")
_NUMBER_RUN = re.compile(r"\d+(?:[.,:/-]\d+)*")
_QUOTED = re.compile(r"\"[^\"\n]{1,200}\"|“[^“”\n]{1,200}”|`[^`\n]{1,200}`")
_CHOICE = re.compile(r"\(?[A-Ja-j]\)?[.):]?|\(?[A-J][.):]\)?[^\S\n]++\S[^\n]{0,150}")
_NUMBER = re.compile(
    r"[-+±~≈<>]?\s?[$€£¥]?\s?\d[\d,.\s]*(?:[eE][-+]?\d+)?\s?(?:[^\s\d][^\s]{0,11}(?: [^\s]{1,10}){0,2})?"
)
_WORD = re.compile(r"[^\W\d_]+")
_SCRIPT_LETTERS = {name: re.compile(f"[{letters}]") for name, letters in SCRIPTS.items()}
_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")
_NOT_ASCII_LETTERS = bytes(code for code in range(128) if not chr(code).isalpha())
_STOP_SETS = {name: frozenset(words.split()) for name, words in STOP_WORDS.items()}


def text_key(text: str) -> int:
    """64-bit hash of a text, the same in every process."""
    return xxhash.xxh3_64_intdigest(text.encode())


def response_shape(response: str) -> str:
    """One of SHAPES."""
    text = response.strip()
    if text.startswith(("{", "[")) and is_json(text):
        return "json"
    if _CHOICE.fullmatch(text):
        return "choice letter"
    if len(text) <= 40 and _NUMBER.fullmatch(text) and not text.endswith((".", "!", "?")):
        return "number"
    return "prose"


def is_json(text: str) -> bool:
    """Whether a text parses as JSON."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def has_trailing_cue(prompt: str) -> bool:
    """Whether a prompt ends in a line such as `Answer:`; a label of up to three words below other text counts too."""
    text = prompt.rstrip()
    if not text.endswith((":", "：")):
        return False
    _, line_break, last_line = text.rpartition("\n")
    if line_break and _SHORT_LABEL.fullmatch(last_line):
        return True
    return any(end == len(text) for _, end in _cues(text))


def answer_given(prompt: str) -> str:
    """What the prompt itself says behind its last `Answer:` or the like; empty if that is left open.

    An open cue at the end is passed over. What stands between it and the cue before, such as an example's answer and
    the next question, is returned whole.
    """
    end, given = len(prompt), ""
    for start, stop in list(_cues(prompt))[:-3:-1]:
        given = prompt[stop:end].lstrip("*").strip()
        if given:
            break
        end = start
    return given


def _cues(text: str) -> Iterator[tuple[int, int]]:
    """Where each cue at the start of a line or behind the end of a sentence begins, and where its colon ends."""
    for match in _CUE.finditer(text):
        lead, start = match[1], match.start()
        if not start or (lead[0].isspace() and text[start - 1] in ".?!"):
            yield start, match.end()
        elif "\n" in lead:
            yield start + lead.index("\n"), match.end()


def skeleton(prompt: str) -> str:
    """The fixed part of a prompt: no numbers and quotations; of `Label: text` lines the label, of options a mark."""
    lines = prompt.casefold().strip().splitlines()
    return "\n".join(kept for line in lines if (kept := _fixed_part(line.strip())))


def _fixed_part(line: str) -> str:
    if label := _LINE_LABEL.match(line):
        return f"{label[1]}:"
    if _OPTION.match(line):
        return "option"
    return _QUOTED.sub("…", _NUMBER_RUN.sub("#", line))


def script(text: str) -> str | None:
    """The script of most letters of a text; None if it has no letter of a known one."""
    foreign = "" if text.isascii() else "".join(_NOT_ASCII.findall(text))
    counts = {name: len(letters.findall(foreign)) if foreign else 0 for name, letters in _SCRIPT_LETTERS.items()}
    counts["Latin"] += len(text.encode("ascii", "ignore").translate(None, _NOT_ASCII_LETTERS))
    name = max(counts, key=lambda name: counts[name])
    return name if counts[name] else None


@lru_cache(maxsize=4096)
def language(text: str) -> str:
    """One of LANGUAGES: the script, and for Latin script the language whose frequent words stand out.

    Latin text is `unknown` unless one language has three frequent words and a third more than any other.
    """
    written_in = script(text)
    if written_in != "Latin":
        return written_in or "unknown"
    words = [word.casefold() for word in _WORD.findall(text[:1000])]
    votes = sorted((sum(word in stop for word in words), name) for name, stop in _STOP_SETS.items())
    (second, _), (first, name) = votes[-2:]
    return name if first >= 3 and first >= second * 4 / 3 else "unknown"
