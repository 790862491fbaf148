r"""Straight-line arithmetic modulo 10 whose last line needs a value written long before.

    problem    Modulo 10: a=4;b=a+7;c=b-2;d=c+5;e=d+1;f=e+9;g=f+c. Find g.
    solution   a=4;b=4+7=1;c=1-2=9;d=9+5=4;e=4+1=5;f=5+9=4;g=4+9=3;\boxed{3}

Every line but the last needs the value just written, so a short window of thought is enough for it. The last
line goes back to an early variable. Its value stands in the thought only: the problem defines it through a
chain of steps, which has to be worked out again once the value has left the window. A program that is short
enough still fits, so accuracy falls step by step with the window instead of all at once.
"""

import hashlib
import random
import string
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Difficulty:
    """How long the programs are and how much of the early thought is needed at the end.

    Args:
        lines: shortest and longest program, in lines of the solution (about 8 tokens each).
        kept: how many early variables, from the third line on, may be asked for again.
        recalls: how many of the last lines go back to one of them.
    """

    lines: tuple[int, int]
    kept: int = 1
    recalls: int = 1

    def __post_init__(self):
        shortest, longest = self.lines
        # The third line is the first whose value cannot be read off the problem at a glance.
        if not 2 + self.kept + self.recalls < shortest <= longest <= len(string.ascii_lowercase):
            raise ValueError(
                f"{self}: the shortest program must have more than 2 + kept + recalls lines, the longest at most 26"
            )
        if not 1 <= self.recalls <= self.kept:
            raise ValueError(f"{self}: recalls must lie between 1 and kept")


DIFFICULTIES = {
    "easy": Difficulty(lines=(5, 8)),
    "medium": Difficulty(lines=(5, 10)),
    "hard": Difficulty(lines=(8, 14), kept=3),
}


def split_of(problem: str) -> str:
    """The one split a problem text may ever appear in; decided by its hash, so the splits cannot overlap."""
    return SPLITS[hashlib.sha256(problem.encode()).digest()[0] % len(SPLITS)]


def draw(rng: random.Random, difficulty: Difficulty) -> dict[str, str]:
    """One random row `{id, problem, answer, solution}`, of either split."""
    names = rng.sample(string.ascii_lowercase, rng.randint(*difficulty.lines))
    recalled = rng.sample(names[2 : 2 + difficulty.kept], difficulty.recalls)
    first = rng.randrange(10)
    values = {names[0]: first}
    program, steps = [f"{names[0]}={first}"], [f"{names[0]}={first}"]
    for index, (before, name) in enumerate(pairwise(names), start=1):
        sign = rng.choice("+-")
        if index >= len(names) - difficulty.recalls:
            term = recalled[len(names) - 1 - index]
            number = values[term]
        else:
            term = number = rng.randrange(10)
        values[name] = (values[before] + (number if sign == "+" else -number)) % 10
        program.append(f"{name}={before}{sign}{term}")
        steps.append(f"{name}={values[before]}{sign}{number}={values[name]}")

    problem = f"Modulo 10: {';'.join(program)}. Find {names[-1]}."
    answer = str(values[names[-1]])
    return {
        "id": "tiny-" + hashlib.sha256(problem.encode()).hexdigest()[:12],
        "problem": problem,
        "answer": answer,
        "solution": ";".join(steps) + rf";\boxed{{{answer}}}",
    }


def stream(split: str, seed: int, difficulty: Difficulty) -> Iterator[dict[str, str]]:
    """Endless rows of one split; the same seed gives the same rows.

    Raises:
        ValueError: the split is neither "train" nor "test".
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
    rng = random.Random(seed)
    while True:
        row = draw(rng, difficulty)
        if split_of(row["problem"]) == split:
            yield row


def rows(split: str, count: int, seed: int, difficulty: Difficulty) -> list[dict[str, str]]:
    """`count` different rows of one split, in a fixed order."""
    chosen = {}
    for row in stream(split, seed, difficulty):
        chosen.setdefault(row["id"], row)
        if len(chosen) == count:
            return list(chosen.values())
