"""Answers are read whole or not at all: tables of what is and is not equal, and what holds of every gold."""

import json
import os
import re
from pathlib import Path

import pytest
from latex2sympy2_extended import latex2sympy

from pte_trl.rewards.answers import read
from pte_trl.rewards.characters import Unreadable
from pte_trl.rewards.equality import parse_whole
from pte_trl.rewards.grader import Grader, check_golds
from pte_trl.rewards.judging import judge
from tests.answer_cases import DIFFERENT, EQUAL
from tests.gold_cases import KEPT, PROSE, REFUSED


def reason(gold: str, answer: str) -> str:
    return judge(gold, answer)[0]


# In this process, not in a worker, which is tested elsewhere: hundreds of pairs take seconds so.
@pytest.mark.parametrize("kind", EQUAL)
def test_what_must_be_rewarded(kind):
    assert [
        (gold, answer, reason(gold, answer)) for gold, answer in EQUAL[kind] if reason(gold, answer) != "correct"
    ] == []


@pytest.mark.parametrize("kind", DIFFERENT)
def test_what_must_not_be_rewarded(kind):
    golds = [gold for gold, _ in DIFFERENT[kind] if gold not in REFUSED]
    assert [gold for gold in golds if reason(gold, gold) == "bad gold"] == [], "a gold that nobody could meet"
    assert [(gold, answer) for gold, answer in DIFFERENT[kind] if reason(gold, answer) == "correct"] == []


def test_golds_that_mean_nothing_are_refused_with_their_row():
    with Grader(workers=2, time_limit=2.0) as grader:
        faults = grader.gold_faults([*REFUSED, *KEPT])
        assert [gold for gold in REFUSED if gold not in faults] == []
        assert {gold: faults[gold] for gold in KEPT if gold in faults} == {}
        with pytest.raises(ValueError, match=r"row q2: answer='N/A' \(bad gold\)$"):
            check_golds([{"id": "q1", "answer": "5"}, {"id": "q2", "answer": "N/A"}], grader=grader)
        with pytest.raises(ValueError, match=r"row 0: answer='.*' \(several boxes\)"):
            check_golds([{"answer": r"\boxed{1} and \boxed{-2}"}], grader=grader)


@pytest.mark.parametrize(("completion", "right"), PROSE)
def test_an_answer_in_prose_is_read_with_all_that_belongs_to_it(completion, right):
    assert (judge("42", completion, boxed=False)[0] == "correct") == right


# ---- every prefix and every changed token of a gold

GOLDS = [
    *(
        r"1-\frac{1}{\mathrm{e}}",
        r"\frac{3\sqrt{3}}{4}",
        "6 - 5i",
        r"x^5 + 2x - 1",
        r"\left(\frac{3}{5},\frac{8}{3}\right]",
    ),
    *(
        r"(-\infty, 2) \cup (3, \infty)",
        "11,13,17",
        r"2e^{-5t} u",
        r"\begin{pmatrix} -2 \\ 14 \end{pmatrix}",
    ),
    *(r"\frac{100!}{2^{50}}", r"\{1\pm\sqrt{5},-2\}", r"4 \times 10^{-12}", r"\log_{3} 7", r"\cot 2x", r"2^{2009}-3"),
]
TOKEN = re.compile(r"\\[A-Za-z]+|\\.|\d|[A-Za-z]|\s+|.")


def variants(gold: str) -> list[str]:
    """Proper prefixes, and the gold without one token or with another digit, letter or sign in its place."""
    tokens = TOKEN.findall(gold)
    found = ["".join(tokens[:end]) for end in range(1, len(tokens))]
    for index, token in enumerate(tokens):
        others = {"+": "-", "-": "+"}.get(token, "7" if token.isdigit() else "z" if token.isalpha() else "")
        found += ["".join([*tokens[:index], other, *tokens[index + 1 :]]) for other in {"", others}]
    return [text for text in dict.fromkeys(found) if text.split() != gold.split()]


def equal_by_sympy(gold: str, answer: str) -> bool:
    """By the parser alone, as it is, and sympy."""
    try:
        left, right = latex2sympy(gold), latex2sympy(answer)
        return left == right or bool((left - right).simplify() == 0)
    except Exception:
        return False


def plain(text: str) -> str:
    """Without spaces, an upright font and a second pair of braces, which say nothing."""
    return re.sub(r"\s|\\mathrm", "", text).replace("{{", "{").replace("}}", "}")


@pytest.mark.parametrize("gold", GOLDS)
def test_no_prefix_and_no_changed_token_of_a_gold_is_rewarded(gold):
    assert reason(gold, gold) == "correct"
    paid = [text for text in variants(gold) if reason(gold, text) == "correct" and not equal_by_sympy(gold, text)]
    assert [text for text in paid if plain(text) != plain(gold)] == []


# ---- what must hold of the private parser


@pytest.mark.parametrize(
    "latex", [r"1+\foo", r"41 \vee 42", "5 #", r"1 \, 2 \quad", "(1", "2 }", r"\frac{1}{", "1 = ", ""]
)
def test_the_parser_reads_to_the_end_or_not_at_all(latex):
    with pytest.raises(Unreadable):
        parse_whole(latex)


def test_the_parser_multiplies_what_stands_side_by_side():
    """The installed one takes an integer and a positive number after it for a mixed number."""
    assert latex2sympy("2(3)") == 5 and parse_whole("2(3)").doit() == 6
    assert parse_whole(r"(2)(3)x").doit() == parse_whole("6x").doit()


def test_upper_and_lower_case_are_two_variables_where_both_occur():
    assert reason("M+m", "m+M") == "correct" and reason("M-m", "m-M") == "wrong" and reason("M", "m") == "correct"


@pytest.mark.parametrize(
    ("text", "unit", "members"),
    [
        (r"15\mbox{ cm}^2", "centimeter^2", ("15",)),
        (r"\$18.90", "dollar", ("18.90",)),
        ("x = 2+3 = 5 km", "kilometer", ("2+3", "5")),
        (r"7 \text{ m/s}", "meter / second", ("7",)),
        ("6m", "", ("6m",)),
    ],
)
def test_what_a_reading_holds(text, unit, members):
    (element,) = read(text).elements
    assert (element.unit, element.members) == (unit, members)


@pytest.mark.parametrize(
    "text", ["", " ", "{", "x" * 1001, r"\unknown{5}", r"\text{if } x > 0 \text{ then } 5", "5\x00", "\ud800"]
)
def test_what_has_no_reading_says_so(text):
    with pytest.raises(Unreadable):
        for element in read(text).elements:
            [parse_whole(member) for member in element.members]


# ---- every gold of the data sets

needs_data = pytest.mark.skipif(not os.environ.get("PTE_DATA_DIR"), reason="PTE_DATA_DIR must name a folder of them")


@needs_data
def test_every_gold_of_the_training_sets_answers_itself():
    """The benchmarks' golds: tests/test_benchmarks.py."""
    folder = Path(os.environ["PTE_DATA_DIR"])
    rows = [
        json.loads(line)
        for name in ("gsm8k_train", "dapo_math_17k")
        for line in (folder / f"{name}.jsonl").read_text().splitlines()
    ]
    with Grader(workers=2) as grader:
        assert grader.gold_faults(row["answer"] for row in rows) == {}
