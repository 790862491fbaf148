r"""Rewrites a final answer, as people and models type it, into plain LaTeX without ambiguities.

Unicode becomes LaTeX and thousands separators are removed (`characters.py`), colours and fonts are removed, `\frac12`
gets its braces, and words are put in `⟦ ⟧`. Nothing that carries meaning is dropped: what has no reading raises
`Unreadable`.
"""

import re

from pte_trl.rewards.characters import Unreadable, from_unicode, join_digits

MAX_DEPTH = 60  # braces within braces; deeper ones would meet Python's recursion limit


_TOKEN = re.compile(r"\\[A-Za-z]+\*?|\\.|\d+|[^\W\d_]+|\s+|.", re.DOTALL)
# A word of the rewritten text, with the sign that says how it was typed (see `Rewriter`).
WORD = re.compile(r"⟦([•‣◦]?)([^⟧]*)⟧")

_SPACES = frozenset(
    (r"\,", r"\;", r"\:", r"\ ", r"\>", r"\/", r"\quad", r"\qquad", r"\thinspace", r"\enspace", r"\space", "~")
)
_NOTHING_NAMES = (
    r"\! \displaystyle \textstyle \scriptstyle \limits \nolimits \rm \bf \it \boldmath \middle \negthinspace "
    r"\normalsize \large \Large \huge \Huge \LARGE \big \bigl \bigr \bigm \Big \Bigl \Bigr \Bigm \bigg \biggl \biggr "
    r"\biggm \Bigg \Biggl \Biggr \Biggm"
)
_NOTHING = frozenset(_NOTHING_NAMES.split())
_UNWRAP_NAMES = (
    r"\mathbf \boldsymbol \bm \underline \fbox \boxed \mathit \mathnormal \mathsf \ensuremath \mathop \mathcal "
    r"\mathtt \mathbin \mathrel \framebox \bold \pmb \mathstrut \overbrace \underbrace \tfbox"
)
_UNWRAP = frozenset(_UNWRAP_NAMES.split())
_TEXT_NAMES = (
    r"\text \textrm \textnormal \mbox \hbox \mathrm \textbf \textit \textsf \operatorname \operatorname* \textup "
    r"\emph \texttt \textsc \textmd"
)
_TEXT = frozenset(_TEXT_NAMES.split())
_RENAMED = {
    r"\leq": r"\le",
    r"\leqslant": r"\le",
    r"\geq": r"\ge",
    r"\geqslant": r"\ge",
    r"\lt": "<",
    r"\gt": ">",
    r"\neq": r"\ne",
    r"\simeq": r"\approx",
    r"\thickapprox": r"\approx",
    r"\coloneqq": "=",
    r"\colon": ":",
    r"\varnothing": r"\emptyset",
    r"\R": r"\mathbb{R}",
    r"\reals": r"\mathbb{R}",
    r"\Reals": r"\mathbb{R}",
    r"\Z": r"\mathbb{Z}",
    r"\N": r"\mathbb{N}",
    r"\Q": r"\mathbb{Q}",
    r"\C": r"\mathbb{C}",
    r"\lbrace": r"\{",
    r"\rbrace": r"\}",
    r"\lbrack": "[",
    r"\rbrack": "]",
    r"\lparen": "(",
    r"\rparen": ")",
    r"\ast": r"\cdot",
    r"\lor": ",",
    r"\vee": ",",
    r"\land": ",",
    r"\wedge": ",",
    r"\iota": "i",
    r"\imath": "i",
    r"\backslash": r"\setminus",
    r"\lvert": "|",
    r"\rvert": "|",
    r"\vert": "|",
    r"\mid": "|",
    r"\over": "/",
    r"\bullet": r"\cdot",
    r"\ll": r"\ll",
    r"\infin": r"\infty",
    r"\exponentialE": "e",
    r"\dd": "d",
    r"\euro": "⟦euro⟧",
    r"\pounds": "⟦pound sterling⟧",
    r"\yen": "⟦yen⟧",
    r"\degree": "°",
    r"\celsius": "°⟦C⟧",
    r"\bmod": r"\mod",
    r"\percent": "%",
    r"\lnot": r"\neg",
    r"\dotsc": r"\dots",
    # math-verify's grammar reads these as Euler's constant
    r"\gamma": r"\text{gammaletter}",
    r"\Gamma": r"\text{Gammaletter}",
}
_FUNCTION_NAMES = (
    "sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh arsinh arcosh artanh arcsinh "
    "arccosh arctanh log ln exp max min gcd lcm det"
)
FUNCTIONS = frozenset(_FUNCTION_NAMES.split())
# Commands that math-verify's grammar knows. Of any other it would take the beginning: \pmod is \pm, o and d to it.
_OTHERS = (
    "alpha beta delta epsilon varepsilon zeta eta theta vartheta kappa lambda mu nu xi rho varrho sigma varsigma tau "
    "upsilon phi varphi chi psi omega Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega pi hbar ell infty partial "
    "times cdot div pm mp le ge ne in notin approx cup cap setminus subset subseteq supset supseteq emptyset langle "
    "rangle lfloor rfloor lceil rceil int sum prod lim to mod prime circ angle triangle odot neg sim equiv"
)
_KNOWN = frozenset(f"\\{name}" for name in (*FUNCTIONS, *_OTHERS.split()))
_BARE = {"pi": r"\pi ", "infinity": r"\infty ", "inf": r"\infty ", "infty": r"\infty ", "theta": r"\theta "}
_MATRICES = ("matrix", "pmatrix", "bmatrix", "vmatrix", "Bmatrix", "Vmatrix", "smallmatrix")
# Letters that the grammar takes for something else: a number's exponent, the imaginary unit, a transposition, a
# differential. As text they are plain variables.
TAKEN = {"E": r"\text{E}", "I": r"\text{Iletter}", "T": r"\text{T}", "d": r"\text{d}"}
_ACCENT_NAMES = r"\hat \bar \overline \vec \tilde \dot \ddot \widehat \widetilde \overrightarrow \check \breve"
_ACCENTS = frozenset(_ACCENT_NAMES.split())


class Rewriter:
    r"""One pass over the tokens of an answer. `⟦km⟧` is a word of `\text`, `⟦•km⟧` one typed as letters in math,
    `⟦‣km⟧` one typed without a space before it, `⟦◦m⟧` a single upright letter; the reader decides what they are."""

    def __init__(self, text: str):
        self.tokens = _TOKEN.findall(join_digits(from_unicode(text)))
        self.at = 0

    def rewrite(self) -> str:
        """The whole text.

        Raises:
            Unreadable: braces that do not match, commands without an argument.
        """
        return self._sequence(None, 0, False)

    def _next(self) -> str | None:
        token = self.tokens[self.at] if self.at < len(self.tokens) else None
        self.at += 1
        return token

    def _peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def _skip_spaces(self) -> None:
        while self._peek().isspace():
            self.at += 1

    def _sequence(self, end: str | None, depth: int, text: bool) -> str:
        if depth > MAX_DEPTH:
            raise Unreadable("nested too deeply")
        parts: list[str] = []
        while (token := self._next()) != end:
            if token is None or token == "}":
                raise Unreadable("braces do not match")
            parts.append(self._one(token, depth, text, parts))
        return "".join(parts)

    def _argument(self, depth: int, text: bool = False) -> str:
        """A TeX argument: a group, else one digit, letter or command."""
        self._skip_spaces()
        token = self._next()
        if token is None or token in ("}", "^", "_", "&"):
            raise Unreadable("an argument is missing")
        if token == "{":
            return self._sequence("}", depth + 1, text)
        if len(token) > 1 and not token.startswith("\\"):
            self.at -= 1
            self.tokens[self.at] = token[1:]
            token = token[0]
        return self._one(token, depth + 1, text, [])

    def _one(self, token: str, depth: int, text: bool, before: list[str]) -> str:
        if token[0] == "\\":
            return self._command(token, depth, text, before)
        if token.isspace():
            return " "
        if token.isalpha():
            return self._letters(token, text, before)
        if token == "{":
            inner = self._sequence("}", depth + 1, text)
            return inner if text or re.fullmatch(r"\s*(⟦[^⟧]*⟧|[\d.]+|,|°)?\s*", inner) else f"{{{inner}}}"
        if token in "^_":
            return self._script(token, depth)
        if token == "'":
            return token
        if token == "*" and self._peek() == "*":
            self.at += 1
            return self._script("^", depth)
        if token in '"`@#?&' or token in "⟦⟧":
            raise Unreadable(f"{token!r}")
        if not token.isprintable():
            raise Unreadable(f"{token!r}")
        return {"~": " ", "*": r"\cdot ", ";": ",", "$": "⟦$⟧"}.get(token, token)

    def _letters(self, word: str, text: bool, before: list[str]) -> str:
        lower = word.lower()
        if lower in ("and", "or"):
            return " , "
        if word in _BARE and not text:
            return _BARE[word]
        if word in FUNCTIONS:
            return rf"\{word} "
        if word == "sqrt":
            return self._root(0)
        if text:
            return f"⟦{word}⟧" if len(word) > 1 else f"⟦◦{word}⟧"
        if len(word) == 1:
            return TAKEN.get(word, word)
        return f"⟦•{word}⟧" if not before or before[-1].isspace() or not before[-1][-1:].isalnum() else f"⟦‣{word}⟧"

    def _script(self, token: str, depth: int) -> str:
        self._skip_spaces()
        if token == "^" and self._peek().isdigit():  # 2^10 is meant as 2^{10}
            return f"^{{{self._next()}}}"
        if token == "^" and self._peek() == "(":
            return "^{" + self._parenthesised(depth) + "}"
        if token == "^" and self._peek() == "-" and "".join(self.tokens[self.at + 1 : self.at + 2]).isdigit():
            self.at += 1
            return f"^{{-{self._next()}}}"
        inner = self._argument(depth).strip()
        if not inner:
            raise Unreadable("an empty script")
        if token == "_":
            if not (flat := re.sub(r"[^\w+\-,]|text|letter|_", "", inner)):
                raise Unreadable("an empty subscript")
            return f"_{{{flat}}}"
        if inner in (r"\circ", "°", "o") and inner != "o":
            return "°"
        if re.fullmatch(r"⟦[•‣◦]?(th|st|nd|rd)⟧", inner):
            return "⟦th⟧"
        if re.fullmatch(r"(\\prime\s*)+", inner):
            return "'" * inner.count(r"\prime")
        return f"^{{{inner}}}"

    def _parenthesised(self, depth: int) -> str:
        """`^(...)`, which is meant as `^{...}`: up to the matching parenthesis."""
        self._next()
        parts, level = [], 1
        while token := self._next():
            level += (token == "(") - (token == ")")
            if not level:
                return "".join(parts)
            parts.append(self._one(token, depth + 1, False, parts))
        raise Unreadable("parentheses do not match")

    def _root(self, depth: int) -> str:
        self._skip_spaces()
        index = ""
        if self._peek() == "[":
            self._next()
            index = f"[{self._sequence(']', depth + 1, False)}]"
            self._skip_spaces()
        if self._peek() == "(":
            return rf"\sqrt{index}{{{self._parenthesised(depth)}}}"
        if len(self._peek()) > 1 and self._peek().isdigit() and self.tokens[self.at - 1 : self.at] != [r"\sqrt"]:
            return rf"\sqrt{index}{{{self._next()}}}"  # √13 and sqrt 13, not \sqrt13
        return rf"\sqrt{index}{{{self._argument(depth)}}}"

    def _command(self, name: str, depth: int, text: bool, before: list[str]) -> str:
        if name in _SPACES:
            return " "
        if name in (r"\left", r"\right", *_NOTHING):
            if self._peek() == "." and name in (r"\left", r"\right"):
                self._next()
            return ""
        if name in _UNWRAP:
            return self._argument(depth, text)
        if name in (r"\color", r"\hspace", r"\vspace", r"\phantom", r"\hphantom", r"\vphantom", r"\mspace"):
            self._argument(depth, True)
            return ""
        if name in (r"\textcolor", r"\colorbox"):
            self._argument(depth, True)
            return self._argument(depth, text)
        if name in _TEXT:
            return self._text(name, depth)
        if name in (r"\frac", r"\dfrac", r"\tfrac", r"\cfrac", r"\binom", r"\dbinom", r"\tbinom"):
            kind = "binom" if "binom" in name else "frac"
            return rf"\{kind}{{{self._argument(depth)}}}{{{self._argument(depth)}}}"
        if name == r"\sqrt":
            return self._root(depth)
        if name == r"\not":
            following = self._argument(depth).strip()
            if following not in ("=", r"\in"):
                raise Unreadable(r"\not")
            return r"\ne " if following == "=" else r"\notin "
        if name in _ACCENTS:
            return rf"{name}{{{_plain_name(self._argument(depth))}}}"
        if name == r"\mathbb":
            return rf"\mathbb{{{self._argument(depth)}}}"
        if name == r"\begin":
            return self._environment(depth)
        return self._symbol(name)

    def _symbol(self, name: str) -> str:
        if name == "\\\\":
            if self._peek() == "[":  # \\[2pt]
                while self._next() not in ("]", None):
                    pass
            return "\\\\"
        if name in (r"\$", r"\%", r"\{", r"\}", r"\|"):
            return {r"\$": "⟦$⟧", r"\%": "%"}.get(name, name)
        if name in (r"\(", r"\)", r"\[", r"\]"):
            return ""
        if not name[1:].isalpha():
            raise Unreadable(name)
        renamed = _RENAMED.get(name, name)
        if renamed == name and name not in _KNOWN:
            raise Unreadable(name)
        return f"{renamed} " if renamed.startswith("\\") and renamed[-1].isalpha() else renamed

    def _text(self, name: str, depth: int) -> str:
        inner = self._argument(depth, True)
        word = re.sub(r"[⟦⟧•‣◦]", "", inner).strip()
        if word in FUNCTIONS:
            return rf"\{word} "
        return inner if name != r"\mathrm" or len(word) > 1 else inner.strip()

    def _environment_name(self, depth: int) -> str:
        return re.sub(r"[⟦⟧•‣◦]", "", self._argument(depth, True)).strip()

    def _environment(self, depth: int) -> str:
        name = self._environment_name(depth)
        if name == "array":
            self._argument(depth, True)  # the columns
        elif name not in _MATRICES:
            raise Unreadable(rf"\begin{{{name}}}")
        parts: list[str] = []
        while (token := self._next()) != r"\end":
            if token is None or token == "}":
                raise Unreadable("an environment does not end")
            parts.append(" & " if token == "&" else self._one(token, depth + 1, False, parts))
        if self._environment_name(depth) != name:
            raise Unreadable("environments do not match")
        # The rows are marked, to distinguish a separator outside of a matrix from one inside.
        rows = "".join(parts).strip().removesuffix("\\\\").strip().replace("\\\\", "⏎")
        return (
            rf"\begin{{pmatrix}}{rows}\end{{pmatrix}}"
            if name != "vmatrix"
            else rf"\begin{{vmatrix}}{rows}\end{{vmatrix}}"
        )


def _plain_name(inner: str) -> str:
    return re.sub(r"⟦[•‣◦]?([^⟧]*)⟧", r"\1", inner).replace(r"\text{", "").strip("{} ")
