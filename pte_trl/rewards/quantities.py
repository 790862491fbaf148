"""Separates a value from the unit before or after it: `$ 5`, `5 km/h`, `30°`, `40 %`."""

import re

from pte_trl.rewards.characters import Unreadable
from pte_trl.rewards.latex import FUNCTIONS, WORD
from pte_trl.rewards.units import ABBREVIATED, MAGNITUDES, NO_UNIT, is_unit, unit_name

_TRAILING = re.compile(
    r"((?:⟦[^⟧]*⟧|°|%)(?:\s|\^\{-?\d\}|/(?=\s*⟦)|\\cdot(?=\s*⟦)|[.](?=\s*(?:⟦|$))|-(?=⟦)|⟦[^⟧]*⟧|°)*)$"
)
_FRACTION_UNIT = re.compile(r"\\frac\{\s*(⟦[^⟧]*⟧(?:\^\{\d\})?)\s*\}\{\s*(⟦[^⟧]*⟧(?:\^\{\d\})?)\s*\}\s*$")
_CURRENCY = re.compile(r"^\s*([+-]?)\s*⟦([$]|euro|pound sterling|yen|[•‣◦]?USD|[•‣◦]?Rs)⟧\s*\.?\s*(?=[+\-\d.\\(])")


def without_unit(text: str) -> tuple[str, str, bool]:
    """The text without a unit before or after it, the unit, and whether it is a percentage.

    Raises:
        Unreadable: words after a value that are no unit, such as "if x > 0".
    """
    unit = ""
    if match := _CURRENCY.match(text):
        unit, text = unit_name(match[2].lstrip("•‣◦")), match[1] + text[match.end() :]
    text = _FRACTION_UNIT.sub(r"\1/\2", text)
    match = _TRAILING.search(text)
    if not match or not text[: match.start()].strip():
        return text, unit, False
    value, tail = text[: match.start()].rstrip(), match[1]
    if tail.strip() == "%":
        return value, unit, True
    if not re.search(r"[\d})|\]!]$|\\(?:pi|infty)$|[A-Za-z]$", value):
        return text, unit, False  # after an operator: a factor, not a unit
    marks = [m for m in WORD.finditer(tail)]
    if len(marks) == 1 and not tail.startswith("°"):
        kind, word = marks[0].groups()
        after_space = text[match.start() - 1].isspace()
        if (kind == "◦" and word in "eixyzdjn") or (kind == "‣" and not is_unit(word)):
            return text, unit, False  # \mathrm{e}, 2ab
        if kind == "•" and not is_unit(word) and (len(word) < 4 or word.isupper() or not after_space):
            return text, unit, False
    if "%" in tail:
        raise Unreadable("a percent sign within words")
    if tail.strip() == "°" and not _plain_degrees(value):
        return text, unit, False
    words = WORD.sub(r" \2 ", tail).replace("°", " degree ")
    if words.split()[:1] and words.split()[0] in ABBREVIATED:
        raise Unreadable("a magnitude that is abbreviated")
    lowered = [word.strip(".").lower() for word in words.split()]
    if lowered and lowered[0] in MAGNITUDES:
        value = rf"({value}) \cdot 10^{{{MAGNITUDES[lowered[0]]}}}"
        if not (words := " ".join(words.split()[1:])):
            return value, unit, False
        lowered = lowered[1:]
    if lowered == ["percent"] or lowered in (["percentage"], ["pct"], ["per", "cent"]):
        return value, unit, True
    if any(word in NO_UNIT for word in lowered) or re.search(r"\d", re.sub(r"\^\{-?\d\}", "", words)):
        raise Unreadable("words after a value that are no unit")
    found = unit_name(words)
    if unit and found and unit != found:
        raise Unreadable("several units")
    return value, found or unit, False


def _plain_degrees(value: str) -> bool:
    """Whether degrees stand after a plain value, not after the argument of a function."""
    return not re.search(rf"\\(?:{'|'.join(FUNCTIONS)})(?![A-Za-z])|°", value)
