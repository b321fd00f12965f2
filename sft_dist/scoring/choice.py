"""The chosen option of an answer: its letter in the forms that people and models write, or the option's own text."""

import re

from sft_dist.scoring.result import Score, TruthError, after_marker, one_space, words_of

_OPTION = re.compile(r"^[ \t]*[(\[]?([A-Z])[)\].:][ \t]+(\S.*?)[ \t]*$", re.MULTILINE)
_DECORATION = re.compile(r"[*_`]+")
_AND_ANOTHER = r"\s*[/&+]\s*[(\[]?[A-Z](?![A-Za-z'])"
# The letter alone, or with what follows it on its line: "B", "(b)", "B.", "B) aspirin", "B: aspirin", "B - aspirin".
_LEADING = re.compile(rf"\s*[(\[]?([A-Za-z])(?:[)\].:,;]|\s+[-\u2013\u2014]|\s*$|\s*\n|(?={_AND_ANOTHER}))")
# What joins the letters of a list, and the next one; small letters, A and I are words too where nothing closes them.
_ITEM = re.compile(
    r"((?:[\s.,;:/&+)\]\u2013\u2014-]|\b(?i:or|and)\b)+)[(\[]?"
    r"(?:([B-HJ-Z])(?![\w'\u2019-])|([A-Za-z])(?=[)\].:,;/&+]|\s*(?:$|\n)|\s+(?i:or|and)\b))"
)
_JOINED = re.compile(r"[,/&+]|\b(?:or|and)\b", re.IGNORECASE)
_LINE_END = re.compile(r"[^\w\n]*(?:$|\n)")
_SAID = re.compile(
    r"\b(?:answer|option|choice|choose|chose|pick|select|selected)\b"
    r"(?:\s+(?:is|would be|option|choice|letter))*\s*:?\s*[(\[]?([A-Z])(?![A-Za-z'])",
    re.IGNORECASE,
)
_STANDING_ALONE = re.compile(
    r"(?<![A-Za-z'])([B-HJ-Z])(?![A-Za-z'])|[(\[]([A-Z])[)\]]"
    rf"|(?<![A-Za-z'])([AI])(?=[).:,\]]|\s+(?:or|and)\b|\s*\(|{_AND_ANOTHER})"  # which are words as well
)


def options_in(prompt: str) -> dict[str, str]:
    """The options that a prompt lists, a letter each: {"A": "Pneumonia", "B": "Pulmonary embolism"}."""
    return dict(_OPTION.findall(prompt))


def score_choice(answer: str, truth: str, *, prompt: str, marker: str = "Answer:") -> Score:
    """1 where the answer chooses the truth's option; where the truth is no single one, where it says the same text.

    prompt: its last turn, which lists the options. An answer that names two options chooses none.
    Raises TruthError for an empty truth.
    """
    options = options_in(prompt)
    if not truth.strip():
        raise TruthError("is empty")
    expected = _only(_leading(truth, options, marker) or _named(truth, options))
    words = words_of(answer)
    if expected is None:
        same = _plain(words) == _plain(truth)
        return Score(float(same), "the same text" if same else f"another text than {one_space(truth)!r}")
    given = _choice(words, options, marker)
    if given is None:
        return Score(0.0, "no single choice", is_valid=False)
    return Score(float(given == expected), f"chose {given}, expected {expected}")


def _choice(text: str, options: dict[str, str], marker: str) -> str | None:
    """The letter that a text chooses; None where it chooses none or several."""
    text = _DECORATION.sub("", text)
    if leading := _leading(text, options, marker):
        return _only(leading)
    said: set[str] = set()
    for found in _SAID.finditer(text):
        if found[1].isupper() and _is_option(found[1], options):
            said |= _listed(text, found.end(), found[1], options)
    alone = {next(filter(None, found)) for found in _STANDING_ALONE.findall(text)}
    return _only(said or {letter for letter in alone if _is_option(letter, options)} or _named(text, options))


def _leading(text: str, options: dict[str, str], marker: str) -> set[str]:
    """The options that a text begins with, or that stand behind the marker. A truth says it in no other form.

    An option's own text first, which may begin with a letter itself: E. coli, Vitamin B.
    """
    behind, _ = after_marker(text, marker)
    for part in dict.fromkeys((behind, text)):
        words = _plain(part)
        if len(words) > 1 and (same := {letter for letter, option in options.items() if _plain(option) == words}):
            return same
        if (leading := _LEADING.match(part)) is not None and _is_option(leading[1], options):
            return _listed(part, leading.end(1), leading[1].upper(), options)
    return set()


def _listed(text: str, at: int, letter: str, options: dict[str, str]) -> set[str]:
    """The options of the list that begins with a letter, which ends at `at`: A and C of "A, C", "A) or C)", "A\\nC".

    Behind a comma, a stroke, "or" and "and" another letter is of the list. Behind a full stop, a semicolon, a dash or a
    line break it may begin a sentence, as in "A. B and C are late", and counts only where the line holds nothing else.
    """
    certain, possible = {letter}, set[str]()
    while True:
        if letter in options:
            own = re.compile(rf"[)\].:\s\u2013\u2014-]*{re.escape(options[letter].rstrip('.'))}(?!\w)", re.IGNORECASE)
            at = behind.end() if (behind := own.match(text, at)) is not None else at
        item = _ITEM.match(text, at)
        if item is None or not _is_option(item[2] or item[3], options):
            break
        letter, at = (item[2] or item[3]).upper(), item.end()
        (possible if possible or not _JOINED.search(item[1]) else certain).add(letter)
    return certain | possible if _LINE_END.match(text, at) else certain


def _named(text: str, options: dict[str, str]) -> set[str]:
    """The options whose own text is in the text, outside of a longer one's."""
    left, named = f" {_plain(text)} ", set[str]()
    texts = {letter: _plain(option) for letter, option in options.items()}
    for own in sorted(set(texts.values()), key=len, reverse=True):
        if f" {own} " in left:
            named |= {letter for letter, text in texts.items() if text == own}
            left = left.replace(f" {own} ", " | ")
    return named


def _only(letters: set[str]) -> str | None:
    return next(iter(letters)) if len(letters) == 1 else None


def _is_option(letter: str, options: dict[str, str]) -> bool:
    return letter.upper() in options if options else True


def _plain(text: str) -> str:
    """Words only, in small letters."""
    return " ".join(re.findall(r"\w+", text.casefold()))
