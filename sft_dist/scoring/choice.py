"""The chosen option of an answer: its letter in the forms that people and models write, or the option's own text."""

import re

from sft_dist.scoring.result import Score, TruthError, after_marker, one_space, words_of

_OPTION = re.compile(r"^[ \t]*[(\[]?([A-Z])[)\].:][ \t]+(\S.*?)[ \t]*$", re.MULTILINE)
_DECORATION = re.compile(r"[*_`]+")
# The letter alone, or with what follows it on its line: "B", "(b)", "B.", "B) aspirin", "B: aspirin", "B - aspirin".
_LEADING = re.compile(r"\s*[(\[]?([A-Za-z])(?:[)\].:,;]|\s+[-\u2013\u2014]|\s*$|\s*\n)")
_SAID = re.compile(
    r"\b(?:answer|option|choice|choose|chose|pick|select|selected)\b"
    r"(?:\s+(?:is|would be|option|choice|letter))*\s*:?\s*[(\[]?([A-Z])(?![A-Za-z'])",
    re.IGNORECASE,
)
_STANDING_ALONE = re.compile(
    r"(?<![A-Za-z'])([B-HJ-Z])(?![A-Za-z'])|[(\[]([A-Z])[)\]]"
    r"|(?<![A-Za-z'])([AI])(?=[).:,\]]|\s+(?:or|and)\b)"  # which are words as well
)


def options_in(prompt: str) -> dict[str, str]:
    """The options that a prompt lists, a letter each: {"A": "Pneumonia", "B": "Pulmonary embolism"}."""
    return dict(_OPTION.findall(prompt))


def score_choice(answer: str, truth: str, *, prompt: str, marker: str = "Answer:") -> Score:
    """1 where the answer chooses the truth's option; where the truth has no letter, where it says the same text.

    prompt: its last turn, which lists the options. An answer that names two options chooses none.
    Raises TruthError for an empty truth.
    """
    options = options_in(prompt)
    if not truth.strip():
        raise TruthError("is empty")
    expected = _leading(truth, options, marker) or _named(truth, options)
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
    if (leading := _leading(text, options, marker)) is not None:
        return leading
    said = {letter.upper() for letter in _SAID.findall(text) if _is_option(letter, options) and letter.isupper()}
    if said:
        return said.pop() if len(said) == 1 else None
    alone = {next(filter(None, found)) for found in _STANDING_ALONE.findall(text)}
    alone = {letter for letter in alone if _is_option(letter, options)}
    if alone:
        return alone.pop() if len(alone) == 1 else None
    return _named(text, options)


def _leading(text: str, options: dict[str, str], marker: str) -> str | None:
    """The letter that a text begins with, or that stands behind the marker. A truth says it in no other form."""
    behind, _ = after_marker(text, marker)
    for part in dict.fromkeys((behind, text)):
        if (leading := _LEADING.match(part)) is not None and _is_option(leading[1], options):
            return leading[1].upper()
    return None


def _named(text: str, options: dict[str, str]) -> str | None:
    """The one option whose own text is in the text."""
    plain = f" {_plain(text)} "
    named = [letter for letter, option in options.items() if f" {_plain(option)} " in plain]
    return named[0] if len(named) == 1 else None


def _is_option(letter: str, options: dict[str, str]) -> bool:
    return letter.upper() in options if options else True


def _plain(text: str) -> str:
    """Words only, in small letters."""
    return " ".join(re.findall(r"\w+", text.casefold()))
