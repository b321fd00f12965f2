"""Text of a row made harmless, for terminals and pages that show it."""

import re

# A row must be able neither to move the cursor nor to turn the direction of what shows it, and a lone surrogate cannot
# be written at all. Joiners and spaces that do not break stay: emoji and many scripts cannot be read without them.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def safe(text: str) -> str:
    """One line of text that cannot steer what shows it."""
    return escape(" ".join(text.split("\n")))


def escape(text: str) -> str:
    """The text with unsafe characters written as their code; line breaks stay."""
    return UNSAFE.sub(lambda match: f"\\x{ord(match.group()):02x}", text)


def escape_json(text: str) -> str:
    """JSON text that says the same with unsafe characters inside its strings written as JSON does."""
    return UNSAFE.sub(lambda match: f"\\u{ord(match.group()):04x}", text)
