r"""Running sums modulo 10, one of which is asked for at the end.

    problem    a1b2c0d2. Find B.
    solution   a1A1b2B3c0C3d2D5;B3=3;\boxed{3}

`b2` is a number that is given, `B3` the sum up to it. Every line needs the line before and the problem, so a short
window of thought is enough for it. The end goes back to one of the sums. It is in the thought only: once it has
left the window it has to be added up again, or remembered.

    python -m experiments.tiny.task --count 200 > train.jsonl
"""

import argparse
import hashlib
import json
import random
import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Difficulty:
    """Args: lines: the shortest and the longest list of numbers; a line of the solution has two tokens."""

    lines: tuple[int, int]

    def __post_init__(self):
        shortest, longest = self.lines
        if not 2 <= shortest <= longest <= len(string.ascii_lowercase):
            raise ValueError(f"{self}: there must be at least 2 lines and at most {len(string.ascii_lowercase)}")

    def draw(self, rng: random.Random) -> dict[str, str]:
        """One random row `{id, problem, answer, solution}`, of either split."""
        names = string.ascii_lowercase[: rng.randint(*self.lines)]
        numbers = [rng.randrange(3) for _ in names]  # small steps: the model learns to add them in minutes
        sums = [sum(numbers[: line + 1]) % 10 for line in range(len(names))]
        asked = rng.randrange(len(names) - 1)
        answer = str(sums[asked])
        problem = "".join(f"{name}{number}" for name, number in zip(names, numbers, strict=True))
        problem += f". Find {names[asked].upper()}."
        lines = "".join(f"{n}{x}{n.upper()}{s}" for n, x, s in zip(names, numbers, sums, strict=True))
        recall = f"{names[asked].upper()}{sums[asked]}={answer}"
        return row_of("tiny", problem, answer, rf"{lines};{recall};\boxed{{{answer}}}")


DIFFICULTIES = {
    "easy": Difficulty(lines=(5, 9)),
    "medium": Difficulty(lines=(12, 20)),
    "hard": Difficulty(lines=(16, 26)),
}


class Task(Protocol):
    """What rows are drawn from: sizes of a problem."""

    def draw(self, rng: random.Random) -> dict[str, str]: ...


def row_of(kind: str, problem: str, answer: str, solution: str) -> dict[str, str]:
    """A row; its id is made of the problem's text."""
    identity = f"{kind}-" + hashlib.sha256(problem.encode()).hexdigest()[:12]
    return {"id": identity, "problem": problem, "answer": answer, "solution": solution}


def split_of(problem: str) -> str:
    """The one split a problem text may ever appear in; decided by its hash, so the splits cannot overlap."""
    return SPLITS[hashlib.sha256(problem.encode()).digest()[0] % len(SPLITS)]


def stream(split: str, seed: int, task: Task) -> Iterator[dict[str, str]]:
    """Endless rows of one split; the same seed gives the same rows.

    Raises:
        ValueError: the split is neither "train" nor "test".
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
    rng = random.Random(seed)
    while True:
        row = task.draw(rng)
        if split_of(row["problem"]) == split:
            yield row


def rows(split: str, count: int, seed: int, task: Task) -> list[dict[str, str]]:
    """`count` different rows of one split, in a fixed order.

    Raises:
        ValueError: the task does not have so many problems.
    """
    chosen, repeats = {}, 0
    for row in stream(split, seed, task):
        repeats = repeats + 1 if row["id"] in chosen else 0
        chosen.setdefault(row["id"], row)
        if len(chosen) == count:
            break
        if repeats > 10_000:
            raise ValueError(f"count={count}: {task} has about {len(chosen)} problems in the split {split!r}")
    return list(chosen.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--difficulty", choices=DIFFICULTIES, default="medium")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for row in rows(args.split, args.count, args.seed, DIFFICULTIES[args.difficulty]):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
