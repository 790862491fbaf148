"""Finds the answer in a completion without a box: where math-verify looks for it, with all that belongs to it."""

import re
from functools import lru_cache

from math_verify import ExprExtractionConfig, LatexExtractionConfig

from pte_trl.compat.grading import get_extraction_regexes
from pte_trl.rewards.answers import denies, read
from pte_trl.rewards.characters import Unreadable
from pte_trl.rewards.units import NO_UNIT

_REASON = re.compile(r"[\s,;]+(?:because|since|so|which|hence|thus|therefore|by)\s")

# What changes the value after it: "less than 5", "minus 5", "half of 5", "10 - 5".
_CHANGED = re.compile(
    r"""(?:\b(?:than|least|most|up\sto|under|over|below|above|minus|negative|plus|half|twice|double|triple|thrice|times
        |exceeds?|divided\sby|multiplied\sby|(?:to|until|through|till)
        |(?:half|thirds?|quarters?|fifths?|multiples?|factors?|divisors?|square|cube|root|power|percent|logarithm|log
        |factorial|reciprocal|inverse|opposite|negative|double|twice|remainder|%)\s+of)
        |(?:\b[a-z]|[\d)}\]])\s*[-+*/\u00d7\u00f7\u00b7\u2212\u2013])\s*[$(\[\\]*\s*$""",
    re.IGNORECASE | re.VERBOSE,
)
_SIGN = re.compile(r"(?<=\S)[^\S\n]+([-+\u2212\u2013]\s*[$(\[\\]*\s*)$")  # at the start of a line it is a bullet


@lru_cache(maxsize=1)
def _patterns() -> list[tuple[re.Pattern, int]]:
    configs = [LatexExtractionConfig(boxed_match_priority=-1), ExprExtractionConfig()]
    found = [pair for patterns, _ in get_extraction_regexes(configs) for pair in patterns]
    return sorted(found, key=lambda pair: pair[1])


def find_answer(text: str) -> str | None:
    """The answer in prose: where math-verify looks for it, but with all that belongs to it; None if there is none."""
    matches, priority = [], None
    for pattern, rank in _patterns():
        if matches and rank != priority:
            break
        priority = rank
        matches += pattern.finditer(text)
    if not matches:
        return None
    match = max(matches, key=lambda m: (m.end(), -m.start()))
    groups = {name: span for name in match.groupdict() if (span := match.span(name))[0] >= 0}
    start = min(begin for begin, _ in groups.values())
    while start and text[start - 1] in "$([\\-+":  # the delimiters and the sign before it
        start -= 1
    if (sign := _SIGN.search(text[:start])) and not _CHANGED.search(text[:start]):
        start = sign.start(1)
    sentence = re.split(r"[.!?]\s|\n", text[:start])[-1]
    if denies(sentence) or _CHANGED.search(sentence):
        return None
    end = max(end for _, end in groups.values())
    rest = re.match(r"[^\n]*?(?=[.!?](?:\s|$)|\n|$|\s+I hope)", text[end:])[0]
    rest = _REASON.split(rest)[0]
    whole = text[start:end] + rest
    for candidate in (whole, text[start : max(end, match.end())]):
        candidate = re.sub(r"\*+\.?$", "", candidate.strip()).strip("*").strip()
        try:
            read(candidate)
        except Unreadable:
            if re.match(r"[\s$)\]\\]*[\w^_+\-*/=<>!%\\]", rest) and not re.match(
                r"[$)\]\\]*[,;]?\s+[A-Za-z]{2,}", rest
            ):
                return None  # more of the expression follows
            following = re.match(r"[$)\]\\]*\s*,?\s*([A-Za-z]*)", rest)[1]
            if denies(rest) or following.lower() in NO_UNIT:
                return None
            continue
        return candidate
    return None
