r"""Characters and digits of an answer, in ASCII and LaTeX: Unicode signs, thousands separators, periodic decimals."""

# ruff: noqa: RUF001 (characters that look alike are what this file distinguishes)

import re
import unicodedata


class Unreadable(ValueError):
    """The text cannot be read as a whole."""


# Unicode -> LaTeX, where NFKC (full-width and mathematical letters and digits) would not do it or would lose meaning.
_UNICODE = {
    **dict.fromkeys("−–—‐‑‒﹣－", "-"),
    "×": r"\times ",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "∙": r"\cdot ",
    "•": r"\cdot ",
    "÷": r"\div ",
    "∗": "*",
    "≤": r"\le ",
    "≥": r"\ge ",
    "⩽": r"\le ",
    "⩾": r"\ge ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "∞": r"\infty ",
    "∈": r"\in ",
    "∉": r"\notin ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∅": r"\emptyset ",
    "∖": r"\setminus ",
    "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}",
    "ℕ": r"\mathbb{N}",
    "ℚ": r"\mathbb{Q}",
    "ℂ": r"\mathbb{C}",
    "±": r"\pm ",
    "∓": r"\mp ",
    "√": r"\sqrt ",
    "∨": r"\lor ",
    "∧": r"\land ",
    "¬": r"\neg ",
    "∠": r"\angle ",
    "°": r"^{\circ}",
    "º": r"^{\circ}",
    "′": "'",
    "’": "'",
    "％": "%",
    "ℏ": r"\hbar ",
    "⌊": r"\lfloor ",
    "⌋": r"\rfloor ",
    "⌈": r"\lceil ",
    "⌉": r"\rceil ",
    "٫": ".",
    "٬": "{,}",
    "、": ", ",
    "。": ".",
    "π": r"\pi ",
    "⁄": "/",
    "∕": "/",
    "ⅇ": "e",
    "ⅈ": "i",
    "€": r"\euro ",
    "£": r"\pounds ",
    "¥": r"\yen ",
}
_GREEK = {"final sigma": "varsigma"}
_SCRIPTS = dict.fromkeys("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "^") | dict.fromkeys("₀₁₂₃₄₅₆₇₈₉", "_")
_SCRIPT_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+|[₀₁₂₃₄₅₆₇₈₉]+")
_VULGAR = re.compile(r"(\d*)\s*([¼-¾⅐-⅞↉])")

# 4.5e33, which LaTeX reads as 4.5 * e * 33. Not x2e5, 2e5_{16}, 1.2e3.4.
_SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d*)?|\.\d+)[eE]([+-]?)(\d+)(?!\w|\.\d)")
_HARD_GROUP = r"(?:\{,\}|,\\!\s*|\\[,;: !]|~| )"
_HARD_THOUSANDS = re.compile(rf"(?<![\d.,])\d{{1,3}}(?:{_HARD_GROUP}\d{{3}})+(?!\d)")
_SOFT_THOUSANDS = re.compile(r"(?<![\d.])(?<!\d,)\d{1,3}(?:,\d{3})+(?!,?\d)")
_PERIODIC = re.compile(
    r"(\d*)\.(\d*)(?:\\(?:overline|bar|overbar)\s*\{(\d+)\}|\\dot\s*\{?(\d)\}?(?:(\d*)\\dot\s*\{?(\d)\}?)?)"
)
_PERIODIC_PAREN = re.compile(r"(?<![\w.)])(\d*)\.(\d*)()\((\d+)\)(?=$|[\s,;.$])")


def from_unicode(text: str) -> str:
    """Signs, digits, roots, fractions and scripts of Unicode as ASCII and LaTeX."""
    if text.isascii():
        return text
    text = _VULGAR.sub(_vulgar, text)
    text = _SCRIPT_RUN.sub(lambda m: f"{_SCRIPTS[m[0][0]]}{{{unicodedata.normalize('NFKC', m[0])}}}", text)
    return "".join(map(_character, text))


def _vulgar(match: re.Match) -> str:
    above, _, below = unicodedata.normalize("NFKC", match[2]).partition("⁄")
    return rf"{match[1]}\frac{{{above}}}{{{below}}}"


def _character(char: str) -> str:
    if char.isascii():
        return char
    if char in _UNICODE:
        return _UNICODE[char]
    if char.isdecimal():
        return str(unicodedata.decimal(char))
    category = unicodedata.category(char)
    if category == "Zs":
        return " "
    if category == "Cf":
        return ""  # zero width, direction marks
    plain = unicodedata.normalize("NFKC", char)
    if plain != char:
        return from_unicode(plain)
    name = unicodedata.name(char, "")
    if found := re.fullmatch(r"GREEK (SMALL|CAPITAL) LETTER (\w+|FINAL SIGMA)", name):
        greek = _GREEK.get(found[2].lower(), found[2].lower().replace("lamda", "lambda"))
        return rf"\{greek if found[1] == 'SMALL' else greek.capitalize()} "
    if category.startswith(("L", "M")):
        return char  # a word in another script
    raise Unreadable(f"character {char!r}")


def join_digits(text: str) -> str:
    r"""`1{,}000`, `1\,000`, `1 000` and, outside brackets, `1,000` as 1000; `4.5e3` as `4.5 \times 10^{3}`."""
    text = _SCIENTIFIC.sub(lambda m: rf"{m[1]} \times 10^{{{m[2].strip('+')}{m[3]}}}", text)
    text = _HARD_THOUSANDS.sub(lambda m: re.sub(r"\D", "", m[0]), text)
    text = _PERIODIC.sub(_periodic, text)
    text = _PERIODIC_PAREN.sub(_periodic, text)
    return _SOFT_THOUSANDS.sub(lambda m: m[0] if _inside_brackets(text, m.start()) else m[0].replace(",", ""), text)


def _inside_brackets(text: str, position: int) -> bool:
    before = text[:position].replace(r"\}", ")").replace(r"\{", "(")
    return sum(before.count(c) for c in "([") > sum(before.count(c) for c in ")]")


def _periodic(match: re.Match) -> str:
    groups = [group or "" for group in match.groups()]
    whole, fixed = groups[0] or "0", groups[1]
    period = "".join(groups[2:])
    if not period:
        return match[0]
    below = int("9" * len(period) + "0" * len(fixed))
    above = int(whole + fixed + period) - int(whole + fixed)
    return rf"\frac{{{above}}}{{{below}}}"
