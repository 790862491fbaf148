"""Runs as data, and the one writer that turns them into a Makefile.

Standard library only: make asks for the plans before there is an environment. A run is there when its target is, so
what has finished is not made again.
"""

import shlex
from collections.abc import Iterable
from dataclasses import dataclass

Argv = tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """One rule of the Makefile.

    Args:
        target: the file that is written last; of a `phony` run, a name to type after `make`.
        needs: files; a newer one makes the target again.
        commands: words of each command, in order. Make expands $(VARIABLES), and $@ is the target.
        present: files that have to exist, whatever their date (order-only prerequisites).
        phony: the target is a name and no file.
    """

    target: str
    needs: tuple[str, ...] = ()
    commands: tuple[Argv, ...] = ()
    present: tuple[str, ...] = ()
    phony: bool = False

    def __str__(self) -> str:
        """The rule in make's syntax."""
        head = [f"{self.target}:", *self.needs, *(("|", *self.present) if self.present else ())]
        lines = [f".PHONY: {self.target}"] if self.phony else []
        lines += [" ".join(head), *("\t" + " ".join(map(_word, argv)) for argv in self.commands)]
        return "\n".join(lines) + "\n"


def makefile(program: str, runs: Iterable[Run]) -> str:
    """All rules; of several runs with the same target the first. `program` is named in the first line."""
    first: dict[str, Run] = {}
    for run in runs:
        first.setdefault(run.target, run)
    return "\n".join([f"# Made by {program}", *map(str, first.values())])


def python(program: str, *words: str, **flags) -> Argv:
    """A script by its path, or a module by its name, in the project's environment."""
    return ("$(PY)", *([program] if program.endswith(".py") else ["-m", program]), *words, *options(**flags))


def options(**flags) -> Argv:
    """`--key value` for every flag; a list is several words, and None leaves the flag out."""
    words: list[str] = []
    for key, value in flags.items():
        if value is not None:
            words += [f"--{key}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return tuple(words)


def _word(word: str) -> str:
    # What make expands ($@, $(call ...)) must reach it as it is.
    return word if "$" in word else shlex.quote(word)
