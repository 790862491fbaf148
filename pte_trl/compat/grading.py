"""Private names of math-verify, its LaTeX parser (latex2sympy2_extended) and sympy."""

import sympy
from latex2sympy2_extended.latex2sympy2 import (
    ConversionConfig,  # keeps X and x apart
    _Latex2Sympy,
)
from latex2sympy2_extended.sets import FiniteSet  # sets that keep the order and the repetitions of what is written
from math_verify.parser import get_extraction_regexes  # where math-verify looks for an answer in prose
from mpmath import mpc

__all__ = ["ConversionConfig", "FiniteSet", "Latex2Sympy", "get_extraction_regexes", "members_in_order", "to_mpmath"]

Latex2Sympy = _Latex2Sympy  # the public function does not check for an end, and reads `2(3)` as the mixed number 5


def members_in_order(members: FiniteSet) -> list[sympy.Basic]:
    """As they were written: of "2 \\pm 1" the sum first. `args` is sorted."""
    return list(members._unsorted_args)


def to_mpmath(real: sympy.Float, imaginary: sympy.Float) -> mpc:
    """A complex number of mpmath, which no exponent overflows, without rounding to its own precision first."""
    return mpc(real._mpf_, imaginary._mpf_)
