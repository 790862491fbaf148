r"""Reads a final answer whole: its expression, relation, unit, base and words, or not at all.

An answer is a list of elements, mostly of one. An element is a value, which may have a name (`x = 5`, `f(x) = x^2`),
a unit, a percent sign or a base; or a relation (`x > 3`); or words (`\text{east}`). Whether an expression is equal to
another is not decided here (see `judging.py`), but what is compared is. A part that has no place in this makes the
whole answer unreadable: an answer that was read up to a point could be paid for that point.
"""

import re
from dataclasses import dataclass, replace

from pte_trl.rewards.characters import Unreadable
from pte_trl.rewards.expressions import expression
from pte_trl.rewards.latex import WORD, Rewriter
from pte_trl.rewards.quantities import without_unit
from pte_trl.rewards.units import LABELS

# In characters: a longer final answer is no answer.
MAX_ANSWER = 1000
MEANINGLESS = frozenset(
    ("", "none", "nan", "na", "n a", "null", "nil", "see solution", "see explanation", "no answer", "unknown", "tbd")
)

_DISPLAY = re.compile(r"(?<!\\)\\[()\[\]]")
_DOLLARS = re.compile(r"(?<!\\)\$+")
_BASE = re.compile(r"^\s*\(?\s*((?:\\text\{[A-Z]\}|[0-9A-Z])+(?:\.[0-9A-Z]+)?)\s*\)?\s*_\{(\w+)\}\s*$")
_BASES = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9"}
_EQUALS = re.compile(r"(?<![<>!:=])=(?!=)|:=|==|\\approx(?![A-Za-z])")
_ORDER = re.compile(r"[<>]|\\(?:le|ge|ne|in|notin|subset|subseteq|supset|equiv|ll|gg|sim|propto|neg)(?![A-Za-z])|!=")
_NEGATIONS = re.compile(r"\b(?:not|never|neither|nor|isn't|isnt|cannot|can't|wrong|incorrect)\b|n't\b", re.IGNORECASE)


@dataclass(frozen=True)
class Element:
    """`members` are LaTeX: the sides of a chain of equalities (of the last one the value is taken), or one relation.

    `words` is the text of an element that has no other content; it then has no members.
    """

    members: tuple[str, ...]
    name: str = ""
    relation: bool = False
    approximate: bool = False
    unit: str = ""
    percent: bool = False
    base: str = ""
    words: str = ""


@dataclass(frozen=True)
class Reading:
    """Elements in the order written; `alternative` reads a trailing single letter as a unit (`5 m`)."""

    elements: tuple[Element, ...]
    alternative: "Reading | None" = None


def read(text: str) -> Reading:
    """The content of a box, or a gold answer, with or without `$`.

    Raises:
        Unreadable: it is empty, too long, or a part of it has no reading.
    """
    if len(text) > MAX_ANSWER:
        raise Unreadable(f"longer than {MAX_ANSWER} characters")
    rewritten = Rewriter(_without_delimiters(text)).rewrite()
    rewritten = re.sub(r"(?<!\d)[\s,.:]+$|[\s,:]+$|(?<=\d)\.\s*$", "", rewritten)
    if not re.search(r"[^\W_]|\\", rewritten):
        raise Unreadable("empty")
    elements = tuple(_element(part) for part in _split(rewritten))
    if len({element.unit for element in elements if element.unit}) > 1:
        raise Unreadable("several units")
    reading = Reading(_carry_name(elements))
    if len(elements) == 1 and (match := re.fullmatch(r"(.*[\d}])\s+(m|s|g|h|L|l|N|J|W|V|K)\s*", rewritten)):
        return Reading(reading.elements, Reading((_element(f"{match[1]} ⟦{match[2]}⟧"),)))
    return reading


def is_meaningless(gold: str) -> bool:
    """Whether a gold answer says that there is none."""
    words = re.sub(r"\\(?:text|mathrm|mbox)|[^\w\s]|_", " ", gold).lower().split()
    return " ".join(words) in MEANINGLESS


def denies(text: str) -> bool:
    """Whether a piece of prose before an answer denies it."""
    return bool(_NEGATIONS.search(text)) or r"\ne" in text or "≠" in text


def _without_delimiters(text: str) -> str:
    text = _DISPLAY.sub(" ", re.sub(r"^\s*\*\*(.*)\*\*\s*$", r"\1", text, flags=re.DOTALL))  # bold in Markdown
    if len(_DOLLARS.findall(text)) % 2 == 0:
        return _DOLLARS.sub(" ", text)
    return text if re.match(r"\s*[-+]?\s*\$\s*[\d.]", text) else _DOLLARS.sub(" ", text)


def _split(text: str) -> list[str]:
    """At commas and line breaks outside of brackets; a line break inside of a matrix is marked otherwise."""
    parts, depth, start = [], 0, 0
    for match in re.finditer(r"\\\\|\\[{}]|[()\[\]{},]", text):
        token = match[0]
        if token in ("(", "[", "{", r"\{"):
            depth += 1
        elif token in (")", "]", "}", r"\}"):
            depth -= 1
        elif depth == 0:
            parts.append(text[start : match.start()])
            start = match.end()
        if depth < 0:
            raise Unreadable("brackets do not match")
    if depth:
        raise Unreadable("brackets do not match")
    parts.append(text[start:])
    if len(parts) > 1:  # 1, 2, and 3
        parts = [part for index, part in enumerate(parts) if part.strip() or index == 0]
    if not all(part.strip() for part in parts):
        raise Unreadable("an empty element")
    return parts


def _carry_name(elements: tuple[Element, ...]) -> tuple[Element, ...]:
    """`x = 1, 2` names both."""
    first, *rest = elements
    if first.name and rest and not any(element.name for element in rest):
        rest = [replace(element, name=first.name) for element in rest]
    return (first, *rest)


def _element(text: str) -> Element:
    text = _without_label(text.strip())
    bare = re.sub(r"^\((.*)\)$", r"\1", text)
    if words := _only_words(bare):
        return Element((), words=words)
    text, unit, percent = without_unit(text)
    if match := _BASE.match(text):
        base = _BASES.get(match[2].lower(), match[2])
        digits = re.sub(r"\\text\{(\w)\}", r"\1", match[1])
        if base.isdigit() and _is_of_base(digits, int(base)):
            if base != "10":
                return Element((digits.lstrip("0") or "0",), base=base, unit=unit, percent=percent)
            text = digits
    return _relation(text, unit, percent)


def _is_of_base(digits: str, base: int) -> bool:
    return (2 <= base <= 36 and any(c.isdigit() for c in digits)) or base > 10


def _relation(text: str, unit: str, percent: bool) -> Element:
    ordered = _top_level(_ORDER, text)
    if not ordered:
        pieces, approximate = _cut(_EQUALS, text)
        if len(pieces) > 1 and not pieces[0].strip():
            pieces = pieces[1:]  # "= 42", "≈ 3.14"
        if not all(piece.strip() for piece in pieces):
            raise Unreadable("a side is missing")
        # The unit was written after the last side; an earlier side may repeat it.
        pieces = [_side(piece, unit, index, len(pieces)) for index, piece in enumerate(pieces)]
        names = 0
        while names < len(pieces) - 1 and is_name(pieces[names]):
            names += 1
        name = expression(pieces[0]).replace(" ", "") if names else ""
        members = tuple(expression(piece) for piece in pieces[names:])
        return Element(members, name=name, approximate=approximate, unit=unit, percent=percent)
    if percent:
        raise Unreadable("a percent sign in a relation")
    signs = [text[start:end] for start, end in ordered]
    if signs[0] == r"\in" and len(signs) == 1 and is_name(text[: ordered[0][0]]):
        start, end = ordered[0]
        return Element((expression(text[end:]),), name=expression(text[:start]).replace(" ", ""), unit=unit)
    pieces, _ = _cut(_ORDER, text)
    if not all(piece.strip() for piece in pieces):
        raise Unreadable("a side is missing")
    return Element((expression(text.replace("!=", r"\ne ")),), relation=True, unit=unit)


def _side(piece: str, unit: str, index: int, count: int) -> str:
    if index == count - 1 or is_name(piece):
        return piece
    rest, own, percent = without_unit(piece)
    if percent or (own and own != unit):
        raise Unreadable("several units")
    return rest


def is_name(text: str) -> bool:
    r"""Whether a left side names a quantity (`x`, `f(x)`, `S_{10}`, `m+n`, `\text{Area}`), is no equation's side."""
    text = re.sub(r"_\{[^}]*\}", "", text)
    text = re.sub(r"(?<=[A-Za-z}'])\s*\^\{-1\}(?=\s*\()", "", text)
    text = re.sub(r"([A-Za-z}'⟧])\s*\([^()]*\)", r"\1", text)
    text = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"\1 \2", text)
    text = text.replace("°", "")
    return not re.search(r"[\d^.%]|\\(?:pi|infty|cup|cap|pm|mp|sqrt|binom|begin)(?![A-Za-z])", text) and bool(
        re.search(r"[A-Za-z⟦]", text)
    )


def _top_level(pattern: re.Pattern, text: str) -> list[tuple[int, int]]:
    found, depth, spans = [], 0, {match.start(): match.end() for match in pattern.finditer(text)}
    position = 0
    while position < len(text):
        if text.startswith((r"\{", r"\}"), position):
            depth += 1 if text[position + 1] == "{" else -1
            position += 2
            continue
        depth += (text[position] in "([{") - (text[position] in ")]}")
        if depth == 0 and position in spans:
            found.append((position, spans[position]))
            position = spans[position]
            continue
        position += 1
    return found


def _cut(pattern: re.Pattern, text: str) -> tuple[list[str], bool]:
    pieces, start, approximate = [], 0, False
    for begin, end in _top_level(pattern, text):
        pieces.append(text[start:begin])
        approximate |= text[begin:end].startswith(r"\approx")
        start = end
    return [*pieces, text[start:]], approximate


def _without_label(text: str) -> str:
    """Without "the answer is" and the like before a value; other words before it are part of it."""
    while (match := re.match(r"\s*⟦[•‣◦]?([^⟧]*)⟧\s*:?\s*", text)) and match.end() < len(text):
        if match[1].lower() not in LABELS:
            break
        text = text[match.end() :]
    return text.strip()


def _only_words(text: str) -> str:
    """The words of an element that is nothing else, in lower case."""
    rest = WORD.sub("", text)
    if not re.search(r"⟦", text) or not re.fullmatch(r"[\s\w.,;:!?'()/-]*", rest) or re.search(r"\d", rest):
        return ""
    letters = re.sub(r"[⟦⟧•‣◦]", " ", text)
    words = " ".join(re.sub(r"[^\w\s]|_", " ", letters).lower().split())
    if words in ("all real numbers", "all reals", "the real numbers", "all real", "real numbers"):
        return ""
    bare = [match[2] for match in WORD.finditer(text) if match[1] in ("•", "‣")]
    typed_as_math = len(bare) == len(WORD.findall(text))
    if (
        typed_as_math
        and (rest.strip() or len(bare) > 1 or len(bare[0]) < 4 or bare[0].isupper())
        and not _is_prose(bare)
    ):
        return ""  # letters in math: a product
    return words


def _is_prose(words: list[str]) -> bool:
    return len(words) > 1 and any(len(word) > 3 for word in words)
