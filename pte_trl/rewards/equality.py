"""Whether two LaTeX expressions have the same value, by math-verify and by sympy's numbers.

Expressions are parsed to their last character by math-verify's own grammar (latex2sympy2_extended). `verify` has the
last word on equality, but not the only one: it finds equal whatever differs by less than 1e-15, and equations without
a solution. So two expressions must also agree in their values.
"""

from functools import lru_cache

import sympy
from math_verify import verify
from sympy import Basic, Eq, Float, Interval, MatrixBase, S, Tuple
from sympy.core.relational import Relational

from pte_trl.compat.grading import ConversionConfig, FiniteSet, Latex2Sympy, to_mpmath
from pte_trl.rewards.characters import Unreadable

# Values may differ by what verify's rounding of decimals to six places allows; numbers below SMALL, which it would
# round to nothing, by this share.
ROUNDING, SMALL, SMALL_TOLERANCE = 2e-6, 1e-3, 1e-3
# Where expressions with variables are compared before sympy simplifies them.
_POINTS = ((0.7361, 0.1273), (1.8713, -0.2971))  # the first variable's value, and the step to the next


class _Parser(Latex2Sympy):
    """The grammar's converter, held to the whole text.

    `2(3)` is a product here, not the mixed number 5; tests/test_answers.py says what must hold.
    """

    def parse(self, latex_str: str):
        parser = self.create_parser(latex_str)
        math = parser.math()
        stream = parser.getTokenStream()
        if stream.LA(1) != -1:  # Token.EOF
            raise Unreadable(f"not read: {stream.LT(1).text!r}")
        covered = sum(len(token.text) for token in stream.tokens if token.type != -1)
        if covered != len(latex_str) and _without_tokens(latex_str, stream.tokens).strip():
            raise Unreadable(f"skipped: {_without_tokens(latex_str, stream.tokens).strip()!r}")
        for rule in ("set_relation", "set_elements", "set_elements_relation"):
            if (found := getattr(math, rule)()) is not None:
                return getattr(self, f"convert_{rule}")(found)
        raise Unreadable("no rule")

    def convert_postfix_list(self, arr, i=0):
        first = self.convert_postfix(arr[i])
        if i == len(arr) - 1 or not isinstance(first, (sympy.Expr, sympy.MatrixBase)):
            return super().convert_postfix_list(arr, i)
        rest = self.convert_postfix_list(arr, i + 1)
        matrices = any(getattr(factor, "is_Matrix", False) for factor in (first, rest))
        return self.mat_mul_flat(first, rest) if matrices else self.mul_flat(first, rest)


def _without_tokens(text: str, tokens) -> str:
    left = list(text)
    for token in tokens:
        if token.type != -1:
            left[token.start : token.stop + 1] = " " * (token.stop + 1 - token.start)
    return "".join(left)


@lru_cache(maxsize=4096)
def parse_whole(latex: str, real: bool = True) -> Basic | MatrixBase:
    """The expression that math-verify's grammar reads in a LaTeX string, all of it.

    Raises:
        Unreadable: it does not read the whole string, or not as an expression.
    """
    try:
        parsed = _Parser(is_real=real, config=ConversionConfig(lowercase_symbols=False)).parse(latex)
    except (MemoryError, RecursionError):
        raise
    except Unreadable:
        raise
    except Exception as error:  # the grammar's errors are plain Exceptions
        raise Unreadable(str(error).split("\n")[0]) from None
    if not isinstance(parsed, (Basic, MatrixBase)) or parsed is S.NaN:
        raise Unreadable(f"a {type(parsed).__name__}")
    return parsed


def number(expression):
    """The value of a constant as a complex of mpmath, which no exponent overflows; None if it has none."""
    if not isinstance(expression, sympy.Expr) or not getattr(expression, "is_number", False):
        return None
    return _complex(expression.evalf(20))


def _complex(value):
    if not value.is_number:
        return None
    real, imaginary = value.as_real_imag()
    if not (isinstance(real, sympy.Number) and isinstance(imaginary, sympy.Number)):
        return None
    if not (real.is_finite and imaginary.is_finite):
        return None
    return to_mpmath(Float(real), Float(imaginary))


def _near(gold, answer) -> bool:
    """Whether two complex numbers could be equal: as near as the most lenient rule of verify asks."""
    size, distance = abs(gold), abs(answer - gold)
    if 0 < size < SMALL:
        return distance <= SMALL_TOLERANCE * size
    return distance <= ROUNDING + 1e-12 * size


def _could_be_same(gold, answer) -> bool:
    """False if two expressions have different values; True if they agree, or cannot be evaluated."""
    if isinstance(gold, MatrixBase) or isinstance(answer, MatrixBase):
        if not (isinstance(gold, MatrixBase) and isinstance(answer, MatrixBase)):
            return True
        return gold.shape == answer.shape and all(map(_could_be_same, gold.flat(), answer.flat()))
    if isinstance(gold, Interval) and isinstance(answer, Interval):
        return _could_be_same(gold.start, answer.start) and _could_be_same(gold.end, answer.end)
    if isinstance(gold, Tuple) and isinstance(answer, Tuple):
        return len(gold) == len(answer) and all(map(_could_be_same, gold, answer))
    if not (isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr)):
        return True
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    for start, step in _POINTS if symbols else ((0, 0),):
        point = {symbol: Float(start + step * index) for index, symbol in enumerate(symbols)}
        values = [_value_at(expression, point) for expression in (gold, answer)]
        if None not in values and not _near(*values):
            return False
    return True


def _value_at(expression, point: dict):
    if not point:
        return number(expression)
    try:
        return _complex(expression.evalf(15, subs=point))
    except (MemoryError, RecursionError):
        raise
    except Exception:  # evalf of what has no value
        return None


def same(gold, answer) -> bool:
    """Whether two values are equal, by math-verify; which two sets, tuples, relations may be is its rule as well."""
    if isinstance(gold, Relational) and isinstance(answer, Relational):
        return _same_relation(gold, answer)
    if isinstance(answer, Eq) or isinstance(gold, Eq):
        return False  # verify would take the right side of an equation
    if isinstance(gold, FiniteSet) and isinstance(answer, FiniteSet):
        return _same_elements(list(gold.args), list(answer.args))
    if _could_be_same(gold, answer) and _verified(gold, answer):
        return True
    changed = [_with_imaginary(expression) for expression in (gold, answer)]
    if changed == [gold, answer]:
        return False
    return _could_be_same(*changed) and _verified(*changed)


def _verified(gold, answer) -> bool:
    """math-verify's verdict; what is written alike needs none, and what has no value gets none."""
    if gold.has(sympy.nan, sympy.zoo) or answer.has(sympy.nan, sympy.zoo):
        return False
    return gold == answer or verify(gold, answer, timeout_seconds=None, allow_set_relation_comp=True)


def _with_imaginary(expression):
    """The letter i as the imaginary unit."""
    letters = {symbol: sympy.I for symbol in expression.free_symbols if symbol.name == "i"}
    return expression.xreplace(letters) if letters else expression


def _same_relation(gold: Relational, answer: Relational) -> bool:
    if gold == answer:
        return True
    expressions = all(isinstance(side, sympy.Expr) for relation in (gold, answer) for side in relation.args)
    if expressions and (factor := _factor(gold, answer)) is not None:
        return _same_direction(gold, answer, factor)
    if not _verified(gold, answer):
        return False
    if not (expressions and isinstance(gold, Eq) and isinstance(answer, Eq)):
        return True
    try:
        return bool(sympy.solve(gold, gold.free_symbols))  # verify compares solutions, of which both may have none
    except NotImplementedError:
        return False


def _factor(gold: Relational, answer: Relational):
    """The constant by which one relation's difference of sides is the other's; None if it is no constant."""
    ratio = sympy.simplify((gold.lhs - gold.rhs) / (answer.lhs - answer.rhs))
    return ratio if ratio.is_number and ratio.is_finite and not ratio.is_zero else None


def _same_direction(gold: Relational, answer: Relational, factor) -> bool:
    if factor.is_negative and not isinstance(answer, (Eq, sympy.Ne)):
        answer = answer.reversed
    return type(gold) is type(answer)


def _same_elements(golds: list, answers: list) -> bool:
    """Whether every gold has a different answer that equals it; neither order nor anything else is left over."""
    if len(golds) != len(answers):
        return False
    left = list(answers)
    for gold in golds:
        found = next((index for index, answer in enumerate(left) if same(gold, answer)), None)
        if found is None:
            return False
        del left[found]
    return True


def _sequence(value) -> list | None:
    """The elements of what may be written as a bare list as well: a tuple, an open interval of two numbers."""
    if isinstance(value, Tuple):
        return list(value)
    if isinstance(value, Interval) and value.is_open and value.start.is_finite and value.end.is_finite:
        return [value.start, value.end]
    return None


def same_values(golds: list, answers: list) -> bool:
    if len(golds) == len(answers) == 1:
        return same(golds[0], answers[0])
    if len(golds) > 1 and len(answers) > 1:
        return _same_elements(golds, answers)
    # A list beside a set or a tuple.
    if len(golds) == 1:
        (gold,) = golds
        if isinstance(gold, FiniteSet):
            return _same_elements(list(gold.args), answers)
        listed = _sequence(gold)
        return listed is not None and len(listed) == len(answers) and all(map(same, listed, answers))
    (answer,) = answers
    listed = list(answer.args) if isinstance(answer, FiniteSet) else _sequence(answer)
    return listed is not None and _same_elements(golds, listed)
