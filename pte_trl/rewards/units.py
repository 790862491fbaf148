"""Words after a value: units under one name each, and words that no unit holds."""

import re

_SAME = {
    "millimeter": "mm millimeters millimetre millimetres",
    "centimeter": "cm centimeters centimetre centimetres cms",
    "decimeter": "dm decimeters decimetre decimetres",
    "meter": "m meters metre metres mtr",
    "kilometer": "km kilometers kilometre kilometres kms",
    "inch": "in inches",
    "foot": "ft feet foots",
    "yard": "yd yds yards",
    "mile": "mi miles",
    "gram": "g gm gms grams gramme",
    "kilogram": "kg kgs kilograms kilo kilos",
    "milligram": "mg milligrams",
    "pound": "lb lbs pounds",
    "ounce": "oz ounces",
    "ton": "tons tonne tonnes",
    "liter": "l L liters litre litres",
    "milliliter": "ml mL milliliters millilitre millilitres",
    "gallon": "gal gallons",
    "second": "s sec secs seconds",
    "minute": "min mins minutes",
    "hour": "h hr hrs hours",
    "day": "days",
    "week": "weeks wk wks",
    "month": "months",
    "year": "yr yrs years",
    "dollar": "$ dollars usd USD bucks",
    "cent": "cents ¢",
    "euro": "euros EUR",
    "pound sterling": "GBP",
    "yen": "JPY",
    "rupee": "rs Rs rupees INR",
    "degree": "degrees deg",
    "radian": "radians rad rads",
    "unit": "units",
    "newton": "N newtons",
    "joule": "J joules",
    "watt": "W watts",
    "volt": "V volts",
    "ampere": "amp amps amperes",
    "kelvin": "K kelvins",
    "hertz": "Hz hz",
    "ohm": "ohms",
    "person": "people persons",
    "man": "men",
    "woman": "women",
    "child": "children kids kid",
    "penny": "pennies",
    "mph": "mph",
    "kmph": "kmph kph kmh",
    "hectare": "ha hectares",
    "acre": "acres",
    "am": "am",
    "pm": "pm",
    "th": "th st nd rd",
}
_NAMES = {word: name for name, words in _SAME.items() for word in (name, *words.split())}
_PLAIN = {"square": "2", "sq": "2", "squared": "2", "cubic": "3", "cu": "3", "cubed": "3"}
MAGNITUDES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
ABBREVIATED = ("k", "M", "B", "mn", "bn", "tn")  # of magnitudes; 5k is not 5. K and T are left to kelvin and tesla
MAGNITUDES |= {f"{word}s": power for word, power in MAGNITUDES.items()}

# Words that say more about a value than its unit: with one of them after a number, the number is not the answer.
_NO_UNIT = (
    "not no never nor neither or and if when where while unless except without but than then else so because "
    "since mod modulo plus minus times divided multiplied over under below above negative positive choose root "
    "factorial more less fewer most least half halves third thirds quarter quarters dozen dozens of is are was "
    "were isn isnt be wrong false incorrect true correct remainder between to from through until up down off "
    "increase decrease power exponent squared cubed percent percentage pct one two three four five six seven eight "
    "nine ten eleven twelve zero twice double triple maybe perhaps either both all any some with for which that "
    "hundred thousand million billion trillion base binary hex octal"
)
NO_UNIT = frozenset(_NO_UNIT.split())
# Words before a value that say nothing about it.
LABELS = frozenset(
    (
        "the",
        "final",
        "answer",
        "is",
        "ans",
        "result",
        "total",
        "approximately",
        "approx",
        "about",
        "value",
        "therefore",
    )
)


def is_unit(word: str) -> bool:
    """Whether letters typed in math after a number are a unit, not a product of variables."""
    return len(word) > 1 and (word in _NAMES or word.lower() in _NAMES)


def unit_name(words: str) -> str:
    """One name for a unit, however it is written: `square cm`, `cm^{2}` and `centimeters squared` are the same."""
    parts: list[str] = []
    raised = ""
    for token in re.findall(r"\^\{-?\d\}|/|\\cdot|[^\W\d_]+|[$¢-]", words):
        lower = token.lower()
        if lower in _PLAIN:
            if lower in ("squared", "cubed") and parts:
                parts[-1] += f"^{_PLAIN[lower]}"
            else:
                raised = f"^{_PLAIN[lower]}"
        elif token.startswith("^"):
            if parts:
                parts[-1] += f"^{token[2:-1]}"
        elif token == "/" or lower in ("per", "an", "a", "each"):
            if parts and parts[-1] != "/":
                parts.append("/")
        elif token not in ("-", r"\cdot"):
            parts.append(_singular(token) + raised)
            raised = ""
    if raised:
        parts.append(f"unit{raised}")
    while parts and parts[-1] == "/":
        parts.pop()
    # Units that the word alone names: 5 square units is 5, and 5 units is 5.
    name = " ".join(parts)
    return {"mile / hour": "mph", "kilometer / hour": "kmph", "a m": "am", "p m": "pm"}.get(name, name)


def _singular(word: str) -> str:
    for form in (word, word.lower()):
        if form in _NAMES:
            return _NAMES[form]
    lower = word.lower()
    if lower.endswith("ies") and len(lower) > 4:
        return f"{lower[:-3]}y"
    if lower.endswith(("sses", "shes", "ches", "xes")):
        return lower[:-2]
    return lower[:-1] if lower.endswith("s") and not lower.endswith("ss") and len(lower) > 3 else lower
