r"""A rewritten expression in the LaTeX of math-verify's parser, with what that parser would misread spelled out."""

import re

from pte_trl.rewards.characters import Unreadable
from pte_trl.rewards.latex import FUNCTIONS, TAKEN, WORD
from pte_trl.rewards.units import NO_UNIT

_MIXED = re.compile(r"(?<![\w.}^_])(\d+)\s*\\frac\{(\d+)\}\{(\d+)\}|(?<![\w.}^_/])(\d+) (\d+)/(\d+)(?![\d!^/.])")
_PRIMED = re.compile(r"(\\text\{\w+\}|\\[A-Za-z]+|[A-Za-z])\s*('+)")
# Functions whose sub- or superscript the grammar drops: an exponent of 0, an index of anything but log and ln.
_DROPPED = re.compile(rf"\\(?:{'|'.join(sorted(FUNCTIONS - {'log', 'ln'}))})\s*(?:_|\^\{{\s*0+\s*\}})")
_ANY_ZERO_POWER = re.compile(r"\\(?:log|ln)\s*(?:_\{[^}]*\})?\s*\^\{\s*0+\s*\}")
# \sin \theta (x+1) is sin(theta) times (x+1), and \omega(x+1) a product, not a function of x+1.
_GREEK = r"\\(?:alpha|beta|delta|epsilon|eta|theta|kappa|lambda|mu|nu|xi|pi|rho|sigma|tau|omega|hbar)"
_FUNCTION_OF_ONE = re.compile(
    rf"(\\(?:{'|'.join(sorted(FUNCTIONS))})\s*(?:\^\{{[^{{}}]*\}})?)\s*({_GREEK}|(?<![a-z])[a-z])\s*(?=\()"
)
_GREEK_TIMES = re.compile(rf"({_GREEK})\s*(?=\()")


def expression(text: str) -> str:
    """A piece in math-verify's LaTeX: every word is a symbol, every juxtaposition that it misreads is spelled out."""
    if "%" in text:
        raise Unreadable("a percent sign within an expression")
    text = _degrees(text)
    words = " ".join(re.sub(r"[⟦⟧•‣◦]", " ", text).lower().split())
    if words in ("all real numbers", "all reals", "the real numbers", "all real", "real numbers"):
        return r"\mathbb{R}"
    text = _MIXED.sub(_mixed, text)
    if re.search(r"[\d.]\s+[\d.]", text):
        raise Unreadable("numbers side by side")
    if _DROPPED.search(text) or _ANY_ZERO_POWER.search(text):
        raise Unreadable("a script that would be dropped")
    if re.search(r"\d\s*_", text):
        raise Unreadable("a number with an index")
    text = re.sub(r"\\odot", "o", text)
    text = _PRIMED.sub(_primed, text)
    if "'" in text or "⟦$⟧" in text:
        raise Unreadable("a sign without a place")
    text = WORD.sub(_symbol, text)
    text = re.sub(r"(?<![\d\\A-Za-z])\.(?=\d)", "0.", text)
    text = re.sub(r"(?<=\d)\.(?!\d)", "", text)
    text = _FUNCTION_OF_ONE.sub(r"\1(\2) \\cdot ", text)
    text = _GREEK_TIMES.sub(r"\1 \\cdot ", text)
    return text.replace("⏎", r"\\").strip()


def _degrees(text: str) -> str:
    """Degrees of the elements of a tuple are left out, those of a function's argument are a factor."""
    if "°" not in text:
        return text
    if re.search(rf"\\(?:{'|'.join(FUNCTIONS)})(?![A-Za-z])", text):
        return re.sub(r"(\d+(?:\.\d+)?|\\[a-z]+|[a-z])\s*°", r"{(\1 \\cdot \\frac{\\pi}{180})}", text)
    return text.replace("°", "")


def _mixed(match: re.Match) -> str:
    whole, above, below = (int(group) for group in match.groups() if group is not None)
    if not 0 < above < below:
        raise Unreadable("neither a mixed number nor a product")
    return rf"\frac{{{whole * below + above}}}{{{below}}}"


def _primed(match: re.Match) -> str:
    name = re.sub(r"\\text|[\\{} ]", "", match[1])
    return rf"\text{{{name}{'prime' * len(match[2])}}}"


def _symbol(match: re.Match) -> str:
    kind, word = match.groups()
    if kind == "◦" or word.isupper() or kind in ("•", "‣"):
        return "".join(TAKEN.get(letter, letter) for letter in word)
    if not word.isascii() or not word.isalpha() or word.lower() in NO_UNIT:
        raise Unreadable(f"{word!r}")
    return rf"\text{{{word}}}"
