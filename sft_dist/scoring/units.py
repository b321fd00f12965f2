"""Clinical units: what follows a number, as a dimension and a factor to its base units.

    64 mL/min          volume / time            1e-6 m3 / 60 s
    75 mL/min/1.73 m2  volume / time / area     another dimension: a unit that leaves the area out contradicts it

Only what a factor alone converts: mmol/L and mg/dL differ by a molar mass, mEq by a valence, so they contradict each
other. An international unit (U, IU) is a dimension of its own. Temperatures have an offset besides, so `Unit` has one.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

Dimension = tuple[tuple[str, int], ...]
"""Powers of base quantities, sorted, without zeros: (("length", 3), ("time", -1))."""


@dataclass(frozen=True, slots=True)
class Unit:
    """base = factor * value + offset, in metres, grams, seconds, moles, pascals, joules, kelvins ..."""

    text: str
    dimension: Dimension
    factor: float
    offset: float = 0.0

    def convert(self, value: float, to: "Unit") -> float:
        """A value of this unit in another one of the same dimension."""
        return (value * self.factor + self.offset - to.offset) / to.factor


_PREFIXES = {"": 1.0, "k": 1e3, "d": 1e-1, "c": 1e-2, "m": 1e-3, "u": 1e-6, "µ": 1e-6, "μ": 1e-6, "mc": 1e-6}
_PREFIXES |= {"n": 1e-9, "p": 1e-12, "f": 1e-15}
_LONG_PREFIXES = {"": 1.0, "kilo": 1e3, "deci": 1e-1, "centi": 1e-2, "milli": 1e-3, "micro": 1e-6, "nano": 1e-9}
_PREFIXED = {  # symbol: base quantity, power, factor
    "g": ("mass", 1, 1.0),
    "L": ("length", 3, 1e-3),
    "l": ("length", 3, 1e-3),
    "m": ("length", 1, 1.0),
    "mol": ("amount", 1, 1.0),
    "Eq": ("equivalent", 1, 1.0),
    "eq": ("equivalent", 1, 1.0),
    "osm": ("osmole", 1, 1.0),
    "Osm": ("osmole", 1, 1.0),
    "U": ("activity", 1, 1.0),
    "IU": ("activity", 1, 1.0),
    "Pa": ("pressure", 1, 1.0),
    "cal": ("energy", 1, 4.184),
    "J": ("energy", 1, 1.0),
}
_LONG_PREFIXED = {
    "gram": "g", "liter": "L", "litre": "L", "meter": "m", "metre": "m", "mole": "mol", "equivalent": "Eq",
    "pascal": "Pa", "calorie": "cal", "joule": "J",
}  # fmt: skip
_OTHERS = {  # names: base quantity, power, factor
    "lb lbs pound pounds": ("mass", 1, 453.59237),
    "oz ounce ounces": ("mass", 1, 28.349523125),
    "in inch inches": ("length", 1, 0.0254),
    "ft foot feet": ("length", 1, 0.3048),
    "cc": ("length", 3, 1e-6),
    "s sec secs second seconds": ("time", 1, 1.0),
    "ms msec msecs millisecond milliseconds": ("time", 1, 1e-3),
    "min mins minute minutes": ("time", 1, 60.0),
    "h hr hrs hour hours": ("time", 1, 3600.0),
    "d day days": ("time", 1, 86400.0),
    "wk wks week weeks": ("time", 1, 604800.0),
    # Of no fixed number of days, and so no time of another unit.
    "mo month months": ("months", 1, 1.0),
    "y yr yrs year years": ("months", 1, 12.0),
    "mmHg": ("pressure", 1, 133.322387415),
    "cmH2O cmH₂O": ("pressure", 1, 98.0665),
    "bpm": ("time", -1, 1 / 60),
    "Hz": ("time", -1, 1.0),
    "% percent": ("percent", 1, 1.0),
}
_COUNTED = ("beats", "beat", "breaths", "breath")
_POWERS = {"": 1, "2": 2, "²": 2, "^2": 2, "3": 3, "³": 3, "^3": 3}


def _table() -> dict[str, tuple[str, int, float]]:
    found: dict[str, tuple[str, int, float]] = {}
    for symbol, (quantity, power, factor) in _PREFIXED.items():
        for prefix, by in _PREFIXES.items():
            if prefix + symbol != "pm":  # in the afternoon
                found[prefix + symbol] = (quantity, power, factor * by)
    for name, symbol in _LONG_PREFIXED.items():
        quantity, power, factor = _PREFIXED[symbol]
        for prefix, by in _LONG_PREFIXES.items():
            found[prefix + name] = found[f"{prefix}{name}s"] = (quantity, power, factor * by)
    for names, entry in _OTHERS.items():
        found |= dict.fromkeys(names.split(), entry)
    return found


_UNITS = _table()
# What people write in capitals or small letters; the spelling that was meant wins where both mean something.
_ANY_CASE = {name.casefold(): entry for name, entry in _UNITS.items()} | _UNITS

_NAMES = "|".join(sorted(map(re.escape, {*_UNITS, *_COUNTED}), key=len, reverse=True))
_ATOM = re.compile(rf"({_NAMES})(\^?[23]|[²³])?(?![A-Za-zµμ0-9])", re.IGNORECASE)
_NEXT = re.compile(r"\s*(/|\bper\b|·|\*)\s*(?:(\d+(?:\.\d+)?)\s*)?", re.IGNORECASE)
_COUNT_PER_VOLUME = re.compile(r"\s*/\s*", re.IGNORECASE)
_TEMPERATURE = re.compile(r"(?:(?:°|º|(?i:degrees?))\s*)?(C|F|(?i:celsius|fahrenheit))(?![A-Za-z])")
_KELVIN = {"c": (1.0, 273.15), "f": (5 / 9, 459.67 * 5 / 9)}


def unit_at(text: str, start: int) -> tuple[Unit, int] | None:
    """The unit that follows a number, up to one space behind it, and where it ends; None where no known one does.

    `/1.73 m2` and `per 24 h` belong to the unit. The word `in` is inches only where no other word follows.
    """
    begin = start + (text[start : start + 1] in (" ", "\u00a0", "\u202f", "-"))
    if (heat := _TEMPERATURE.match(text, begin)) is not None:
        factor, offset = _KELVIN[heat[1][0].casefold()]
        return Unit(heat[0], (("temperature", 1),), factor, offset), heat.end()
    powers: dict[str, int] = {}
    factor, end = 1.0, begin
    for (quantity, power, by), end in _atoms(text, begin):  # noqa: B007
        powers[quantity] = powers.get(quantity, 0) + power
        factor *= by
    if end == begin:
        return None
    dimension = tuple(sorted((quantity, power) for quantity, power in powers.items() if power and quantity))
    return Unit(text[begin:end], dimension, factor), end


def _atoms(text: str, begin: int) -> Iterator[tuple[tuple[str, int, float], int]]:
    """(quantity, power, factor) of each part of a compound unit, and where it ends."""
    at, sign = begin, 1
    # Counts, as in 10^9/L: the number is all that stands before the solidus.
    if (per := _COUNT_PER_VOLUME.match(text, begin)) is not None and _ATOM.match(text, per.end()) is not None:
        at, sign = per.end(), -1
    divisor = 1.0
    while True:
        text_at = text[at:].replace("mm Hg", "mmHg", 1) if text.startswith("mm Hg", at) else None
        atom = _ATOM.match(text, at) if text_at is None else _ATOM.match(text_at)
        if atom is None or (atom[1].casefold() == "in" and re.match(r"\s+[a-z]", text[at + 2 :])):
            return
        at = at + atom.end() + 1 if text_at is not None else atom.end()
        yield _part(atom[1], _POWERS[atom[2] or ""] * sign, divisor), at
        following = _NEXT.match(text, at)
        if following is None:
            return
        sign = -1 if following[1].casefold() in ("/", "per") else 1
        divisor = float(following[2] or 1.0)
        at = following.end()


def _part(name: str, power: int, divisor: float) -> tuple[str, int, float]:
    """power: below zero behind a solidus. divisor: the 1.73 of `/1.73 m2`."""
    if name.casefold() in _COUNTED:
        return "", 0, 1.0
    quantity, own, factor = _UNITS.get(name) or _ANY_CASE[name.casefold()]
    return quantity, own * power, factor**power / divisor
