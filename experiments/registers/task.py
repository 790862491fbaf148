r"""A register machine modulo 10: registers are worked out in the thought, three early ones are added up at its end.

    problem    a3b+2c*3d+1e7f*7 ... z+2. Find G+D+K.
    solution   a3A3b+2B5c*3C5d+1D6e7E7f*7F9 ... ;GG2+DD6=8+KK5=13;\boxed{3}

in words, for a pretrained model,

    problem    Only last digits count. a = 3, b = a + 2, c = b * 3, d = 7, ... What is f + c + i?
    solution   a = 3. b = 3 + 2 = 5. c = 5 * 3 = 15, so 5. ... f + c + i = 2 + 5 = 7, 7 + 9 = 16, so 6. The answer ...

Registers come in chains: a number, then operations on the register before. The three that are asked for lie in three
early chains, and the registers that follow them outlast the window. So when they are asked for,

- their values are in the thought only, and have been evicted with all of their chains;
- nothing visible in the thought depends on them: every operation is one to one modulo 10, so each of the ten values
  of a register is possible, and gives another answer, whatever the other two are. Chance is 0.10;
- the prompt, which stays, still determines them, but they have to be worked out again: two operations or more each,
  sums and products mixed, which cannot be added up as the running sums of `experiments.tiny.task` can.

The question is in the prompt: a policy that wrote it itself would be rewarded for always asking for the same.
"""

import random
import string
from collections.abc import Callable
from dataclasses import dataclass

from experiments.tiny.task import row_of

ASKED = 3
# One to one modulo 10: an even factor or 5 would make some values impossible. Few, so that they are learnt in minutes.
OPERATIONS = {"+": (1, 2, 3), "*": (3, 7)}


@dataclass(frozen=True)
class Program:
    """Args: lines: (operation, number) of each register, the operation "=" where a chain begins; asked: registers."""

    lines: tuple[tuple[str, int], ...]
    asked: tuple[int, int, int]

    @property
    def results(self) -> list[int]:
        """What each operation gives before its last digit is taken."""
        found = []
        for operation, number in self.lines:
            last = found[-1] % 10 if found else 0
            found.append({"=": number, "+": last + number, "*": last * number}[operation])
        return found

    @property
    def values(self) -> list[int]:
        return [result % 10 for result in self.results]

    @property
    def answer(self) -> int:
        return sum(self.values[register] for register in self.asked) % 10


def compact(program: Program) -> tuple[str, str]:
    """Problem and solution for the tiny model: `WORDS` has a token for every line, every value and every total.

    At the end a register is named before its value is given, so each is one step of attention. Totals are written in
    full: of a last digit one summand alone says nothing, and the model did not learn it (docs/log.md).
    """
    names, values = string.ascii_lowercase, program.values
    lines = [
        f"{name}{operation}{number}".replace("=", "")
        for name, (operation, number) in zip(names, program.lines, strict=False)  # 26 names
    ]
    a, b, c = (f"{names[register].upper()}" for register in program.asked)
    x, y, z = (values[register] for register in program.asked)
    worked = "".join(f"{line}{line[0].upper()}{value}" for line, value in zip(lines, values, strict=True))
    end = f"{a}{a}{x}+{b}{b}{y}={x + y}+{c}{c}{z}={x + y + z}"
    return f"{''.join(lines)}. Find {a}+{b}+{c}.", rf"{worked};{end};\boxed{{{program.answer}}}"


def in_words(program: Program) -> tuple[str, str]:
    """Problem and solution for a pretrained model, which knows sums and products of digits."""
    names, values, given, worked = string.ascii_lowercase, program.values, [], []
    for at, (operation, number) in enumerate(program.lines):
        if operation == "=":
            given.append(f"{names[at]} = {number}")
            worked.append(f"{names[at]} = {number}.")
        else:
            given.append(f"{names[at]} = {names[at - 1]} {operation} {number}")
            worked.append(f"{names[at]} = {values[at - 1]} {operation} {number} = {last_digit(program.results[at])}.")
    asked = " + ".join(names[register] for register in program.asked)
    x, y, z = (values[register] for register in program.asked)
    total = f"{x} + {y} = {last_digit(x + y)}, {(x + y) % 10} + {z} = {last_digit((x + y) % 10 + z)}."
    problem = f"Only last digits count. {', '.join(given)}. What is {asked}?"
    return problem, rf"{' '.join(worked)} {asked} = {total} The answer is \boxed{{{program.answer}}}."


def last_digit(result: int) -> str:
    return str(result) if result < 10 else f"{result}, so {result % 10}"


@dataclass(frozen=True)
class Machine:
    """Sizes of a problem.

    Args:
        chains: of which registers are asked for, at most one of a chain.
        length: registers of a chain.
        depth: operations at least that lead to a register that is asked for.
        after: registers behind these chains, in chains of the same length; none is asked for.
        write: `compact` or `in_words`.

    Raises:
        ValueError: sizes that make no problem.
    """

    chains: int = 3
    length: int = 4
    depth: int = 2
    after: int = 14
    write: Callable[[Program], tuple[str, str]] = compact

    def __post_init__(self):
        if self.chains < ASKED or not 1 <= self.depth < self.length or self.after < 1 or self.registers > 26:
            raise ValueError(
                f"{self}: needs at least {ASKED} chains, 1 <= depth < length, after >= 1, and at most 26 registers"
            )

    @property
    def registers(self) -> int:
        return self.chains * self.length + self.after

    def program(self, rng: random.Random) -> Program:
        lines = []
        for at in range(self.registers):
            operation = rng.choice(tuple(OPERATIONS)) if at % self.length else "="
            lines.append((operation, rng.choice(OPERATIONS.get(operation, range(10)))))
        asked = [chain * self.length + rng.randrange(self.depth, self.length) for chain in range(self.chains)]
        return Program(tuple(lines), tuple(rng.sample(asked, ASKED)))

    def draw(self, rng: random.Random) -> dict[str, str]:
        """One random row `{id, problem, answer, solution}`, of either split (`experiments.tiny.task.stream`)."""
        program = self.program(rng)
        problem, solution = self.write(program)
        return row_of("registers", problem, str(program.answer), solution)


# Whole tokens of the tiny model: finding a line of the program is then one step of attention.
WORDS = [
    f"{name}{operation}{number}"
    for name in string.ascii_lowercase
    for operation, numbers in OPERATIONS.items()
    for number in numbers
] + [f"={total}" for total in range(ASKED * 9 + 1)]
TINY, LONGEST = Machine(), 80  # a solution has 68 tokens, its end included
SMOLLM2 = Machine(chains=4, length=3, after=8, write=in_words)
