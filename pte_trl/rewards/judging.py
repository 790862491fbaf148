"""Decides whether an answer equals a gold: what `answers.py` has read, compared by math-verify. Runs in a worker.

Words, units, percent signs and names are compared here, values by `equality.py`.
"""

import contextlib
import re
from functools import lru_cache

import sympy
from sympy import Eq, S, Symbol, Tuple
from sympy.core.relational import Relational

from pte_trl.compat.grading import FiniteSet, members_in_order
from pte_trl.rewards.answers import Element, Reading, is_meaningless, read
from pte_trl.rewards.characters import Unreadable
from pte_trl.rewards.equality import number, parse_whole, same, same_values
from pte_trl.rewards.prose import find_answer

APPROXIMATE = 0.01  # by how much the sides of "≈" may differ, relative
_CLOCK = re.compile(r"\d{1,2}:[0-5]\d")  # a time of day beside another, not the ratio that the grammar reads
# ---- what a reading denotes


class _Inconsistent(Exception):
    """The sides of a chain of equalities differ."""


def _values(element: Element, real: bool) -> list:
    """The values of an element, two for a "plus or minus"; an equation or inequality is one value."""
    if element.words or element.base:
        return []
    parsed = [parse_whole(member, real) for member in element.members]
    if len(parsed) > 1:
        if not all(_agree(parsed[0], side, element.approximate) for side in parsed[1:]):
            if len(parsed) > 2 or element.name or element.approximate or not _has_variables(parsed):
                raise _Inconsistent
            return [Eq(*parsed, evaluate=False)]
        parsed = [parsed[0] if element.approximate else parsed[-1]]
    (value,) = parsed
    two = isinstance(value, FiniteSet) and re.search(r"\\(?:pm|mp)(?![A-Za-z])", element.members[-1])
    return members_in_order(value) if two and not element.members[-1].lstrip().startswith(r"\{") else [value]


def _has_variables(parsed: list) -> bool:
    return any(side.free_symbols or side.atoms(sympy.core.function.AppliedUndef) for side in parsed)


def _agree(first, second, approximate: bool) -> bool:
    if not approximate:
        return same(first, second)
    first, second = number(first), number(second)
    return first is not None and second is not None and abs(first - second) <= APPROXIMATE * abs(first)


# ---- two readings


def _same_reading(gold: Reading, answer: Reading) -> bool:
    """Compares words, bases, units and percent signs, then the values.

    Raises:
        Unreadable: an expression has no reading.
        _Inconsistent: the sides of a chain differ.
    """
    pairs = gold.elements, answer.elements
    if any(element.words for elements in pairs for element in elements):
        return sorted(map(_as_words, gold.elements)) == sorted(map(_as_words, answer.elements))
    if any(element.base for elements in pairs for element in elements):
        written = [sorted((element.base, element.members) for element in elements) for elements in pairs]
        return written[0] == written[1]
    clocks = [[_CLOCK.fullmatch(member) for e in elements for member in e.members] for elements in pairs]
    if all(len(found) == 1 and found[0] for found in clocks):
        return clocks[0][0][0] == clocks[1][0][0]
    units = [{element.unit for element in elements if element.unit} for elements in pairs]
    if all(units) and units[0] != units[1]:
        return False
    real = not (_is_complex(gold) or _is_complex(answer))
    golds, answers = ([_values(element, real) for element in elements] for elements in pairs)
    if len(golds) == len(answers) == 1:
        golds, answers = _without_percent(gold.elements[0], answer.elements[0], golds, answers)
    elif len({e.percent for e in gold.elements} | {e.percent for e in answer.elements}) > 1:
        return False  # some elements of a list in percent
    golds, answers = (_named(*side, both) for side, both in _with_names(gold, answer, golds, answers))
    return same_values(golds, answers) or same_values(*_in_one_case(golds, answers))


def _is_complex(reading: Reading) -> bool:
    """Whether it has the letter i on its own; then variables are not taken for real numbers."""
    return any(re.search(r"(?<![A-Za-z\\])i(?![A-Za-z])", m) for e in reading.elements for m in e.members)


def _as_words(element: Element) -> str:
    if element.words:
        return element.words
    if element.unit or element.percent or element.base or len(element.members) != 1:
        return "\0"  # no words
    return re.sub(r"\\text|letter|[{}()\s]", "", element.members[0]).lower()


def _without_percent(gold: Element, answer: Element, golds: list, answers: list) -> tuple[list, list]:
    """62.5% is 62.5, and 0.625. Behind a gold without the sign, 62.5 may have it, but 0.5 is not 0.5%."""
    if gold.percent == answer.percent:
        return golds, answers
    ((first,),), ((second,),) = golds, answers
    if gold.percent:
        return ([[first]], answers) if same(first, second) else ([[first / 100]], answers)
    size = number(first)
    if size is not None and abs(size) > 1 and same(first, second):
        return golds, answers
    return golds, [[second / 100]]


def _with_names(gold: Reading, answer: Reading, golds: list, answers: list):
    """Names count where both sides have them for every element; an equation needs none."""
    sides = (gold, golds), (answer, answers)
    named = [
        bool(element.name) or all(isinstance(value, Eq) for value in values)
        for reading, found in sides
        for element, values in zip(reading.elements, found, strict=True)
    ]
    names = {element.name for reading, _ in sides for element in reading.elements}
    keep = all(named) and not (len(names) == 1 and "" not in names)
    return (sides[0], keep), (sides[1], keep)


def _named(reading: Reading, values: list[list], keep: bool) -> list:
    flat = []
    for element, found in zip(reading.elements, values, strict=True):
        for value in found:
            if not keep or isinstance(value, Relational):
                flat.append(value)
                continue
            try:
                name = parse_whole(element.name)
            except Unreadable:
                name = Symbol(element.name)
            flat.append(Eq(name, value, evaluate=False) if isinstance(value, sympy.Expr) else Tuple(name, value))
    return flat


def _in_one_case(golds: list, answers: list) -> tuple[list, list]:
    """In lower case, if neither side has a variable in both cases: R for r, but not M and m."""
    lowered = []
    for values in (golds, answers):
        symbols = set().union(*(value.free_symbols for value in values))
        names = {symbol: Symbol(symbol.name.lower(), **symbol.assumptions0) for symbol in symbols}
        if len(set(names.values())) < len(symbols):
            return [S.true], [S.false]
        lowered.append([value.xreplace({a: b for a, b in names.items() if a != b}) for value in values])
    return lowered[0], lowered[1]


# ---- what others call


def check_gold(gold: str) -> Reading:
    """The reading of a gold answer.

    Raises:
        Unreadable: it has none, or says nothing.
    """
    if is_meaningless(gold):
        raise Unreadable("no answer")
    reading = read(gold)
    real = not _is_complex(reading)
    for element in reading.elements:
        _values(element, real)
    return reading


_read_gold = lru_cache(maxsize=4096)(check_gold)


def prepare(gold: str) -> None:
    """Read a gold answer, which then is at hand for all answers that are compared with it."""
    with contextlib.suppress(Unreadable, _Inconsistent):
        _read_gold(gold)


def judge(gold: str, answer: str, boxed: bool = True) -> tuple[str, str | None]:
    """Reason (correct, wrong, unparsable or bad gold) and the text compared.

    Args:
        answer: the content of a box, else a completion without one, in which the answer is looked for.
    """
    try:
        expected = _read_gold(gold)
    except (Unreadable, _Inconsistent):
        return "bad gold", None
    text = answer if boxed else find_answer(answer)
    if text is None:
        return "unparsable", None
    try:
        given = read(text)
        if _same_reading(expected, given):
            return "correct", text
        if given.alternative and _same_reading(expected, given.alternative):
            return "correct", text
        if expected.alternative and given.elements[0].unit and _same_reading(expected.alternative, given):
            return "correct", text
    except Unreadable:
        return "unparsable", text
    except _Inconsistent:
        return "wrong", text
    return "wrong", text
