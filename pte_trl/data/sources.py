"""The datasets known by a short name: where they lie on the Hugging Face hub, and how their columns are read."""

import math
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from pte_trl.data.files import NotANumber, Number
from pte_trl.rewards.grader import last_boxed

BENCHMARKS = ("math500", "olympiadbench", "minerva_math", "amc23", "aime24", "aime25")

# What pandas, Python, JavaScript, R and spreadsheets write where there is no value; "NA" only in capitals.
_MISSING = {"none", "null", "nil", "n/a", "<na>", "#n/a", "nat", "undefined"}
MEANINGLESS = _MISSING | {"nan", "-nan", "+nan", "inf", "-inf", "+inf"}

_NO_WIDTH = "\u200b\u200c\u200d\u2060\ufeff"
_SURROGATE = re.compile("[\ud800-\udfff]")
_DIGITS = re.compile(r"-?\d+")
_BARE_BOX = re.compile(r"\\boxed\s+([^{}$\s]+)")


def plain(value: Any) -> str:
    """Text that says something, or a number as text.

    27.0 reads 27, since a column of whole numbers may be stored as floats; any other number stays as it was written.

    Raises:
        ValueError: a list, an object, a boolean, NaN, an infinite number, or text such as "nan" or "None".
    """
    if isinstance(value, bool) or not isinstance(value, (str, int, float, Decimal)):
        kind = "mapping" if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"{value!r} is a {kind}; text or a number is needed")
    if isinstance(value, NotANumber):
        raise ValueError(f"{value} is no number; text or a number is needed")
    if not isinstance(value, str) or isinstance(value, Number):
        return number(str(value))
    if _SURROGATE.search(value):
        raise ValueError(f"{value[:80]!r} holds half a surrogate pair, which is no character")
    text = value.strip()
    while text and (text[0] in _NO_WIDTH or text[-1] in _NO_WIDTH):
        text = text.strip(_NO_WIDTH).strip()
    if text.casefold() in MEANINGLESS or text == "NA":
        raise ValueError(f"{text!r} is what programs write for a missing value")
    return text if any(unicodedata.category(character)[0] not in "CZ" for character in text) else ""


def number(text: str) -> str:
    """A number that was written `text`: 27.0 is 27, and 0.10, 4.5e33 and 1180591620717411303424 are what they are."""
    if _DIGITS.fullmatch(text):
        return text if text != "-0" else "0"
    size = float(text)
    if not math.isfinite(size):
        raise ValueError(f"{text} is no finite number (the largest is 1.8e308)")
    value = Decimal(text)
    return str(int(value)) if abs(size) < 1e15 and value == int(value) else text


def whole_number(value: Any) -> str:
    """AIME 2024 pads with zeros ("025"), AMC 2023 stores floats ("27.0"): both as plain integers."""
    size = float(plain(value))
    if not size.is_integer():
        raise ValueError(f"{value!r} is not a whole number")
    return str(int(size))


def after_hashes(solution: str) -> str:
    """GSM8K: what follows `#### ` at the end, without the commas of thousands."""
    _, hashes, answer = solution.rpartition("####")
    return answer.replace(",", "").strip() if hashes else ""


def in_last_box(solution: str) -> str:
    r"""MATH: the content of the last box, which some solutions write `\fbox{5}` or `\boxed 5`."""
    solution = _BARE_BOX.sub(r"\\boxed{\1}", solution.replace(r"\fbox{", r"\boxed{"))
    return (last_boxed(solution) or "").strip()


def first_answer(answers: list[str]) -> str:
    """OlympiadBench: a list of one text such as `$69$,$84$`; with a full stop after it math-verify reads 0."""
    return answers[0].replace("$", "").strip().rstrip(".") if answers else ""


def ground_truth(reward_model: dict) -> str:
    """DAPO: the gold is inside the column `reward_model`."""
    return plain(reward_model["ground_truth"])


def without_instructions(messages: list[dict]) -> str:
    """DAPO: the problem inside a chat prompt that asks for a last line "Answer: ..." before and after it."""
    text = messages[0]["content"]
    if text.startswith("Solve the following math problem"):
        text = text.partition("\n\n")[2]
    return text.partition("\n\nRemember to put your answer on its own line")[0].strip()


@dataclass(frozen=True)
class Source:
    """A dataset on the hub and how its columns become problem and answer.

    Args:
        hub_id, config, split: what `datasets.load_dataset` is given.
        problem_column, answer_column: must be there.
        id_column: where there is none, ids are NAME/ROW.
        read_problem, read_answer: a column's value -> text, "" if it holds none.
        unique: whether only the first of several rows with the same problem is kept.
    """

    hub_id: str
    config: str | None = None
    split: str = "train"
    problem_column: str = "problem"
    answer_column: str = "answer"
    id_column: str = "id"
    read_problem: Callable[[Any], str] = plain
    read_answer: Callable[[Any], str] = plain
    unique: bool = False


GSM8K = Source("openai/gsm8k", "main", problem_column="question", read_answer=after_hashes)

DATASETS = {
    "dapo_math_17k": Source(
        "BytedTsinghua-SIA/DAPO-Math-17k",
        problem_column="prompt",
        read_problem=without_instructions,
        answer_column="reward_model",
        read_answer=ground_truth,
        unique=True,  # the hub's 1.79 million rows hold every problem about a hundred times
    ),
    "gsm8k_train": GSM8K,
    "gsm8k_test": replace(GSM8K, split="test"),
    "math": Source("DigitalLearningGmbH/MATH-lighteval", "default", answer_column="solution", read_answer=in_last_box),
    "math500": Source("HuggingFaceH4/MATH-500", split="test", id_column="unique_id"),
    "olympiadbench": Source(
        "Hothan/OlympiadBench",
        "OE_TO_maths_en_COMP",
        problem_column="question",
        answer_column="final_answer",
        read_answer=first_answer,
    ),
    "minerva_math": Source("math-ai/minervamath", split="test", problem_column="question"),
    "amc23": Source("math-ai/amc23", split="test", problem_column="question", read_answer=whole_number),
    "aime24": Source("HuggingFaceH4/aime_2024", read_answer=whole_number),
    "aime25": Source("math-ai/aime25", split="test", read_answer=whole_number),
}
