r"""Removes training problems that are also in a benchmark.

    problems = remove_overlap(problems, load_eval_problems())

Texts are compared by their shingles, all the pieces of 24 characters, of what is left when `\left`, `\right` and
every character but a-z and 0-9 (lower-cased) are removed. A training problem's share of an evaluation problem is the
part of the latter's shingles that it has too, so an evaluation problem with a sentence added still has share 1.
Signs and brackets are not seen: x^2 - 1 and x^2 + 1 are the same. Problems in other scripts than the Latin one
are compared by their formulas only.
"""

import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from accelerate import PartialState
from datasets import Dataset

from pte_trl.data.problems import BENCHMARKS, hub_name, load_problems, local_file
from pte_trl.models.hub import is_cached, is_local, reachable

SHINGLE = 24  # characters

_NOT_COMPARED = re.compile(r"[^a-z0-9]+")


class Match(NamedTuple):
    """A training problem that has `share` (0 to 1) of an evaluation problem's shingles."""

    train_index: int
    eval_index: int
    share: float


def normalise(text: str) -> str:
    r"""What is compared of a problem; `\dfrac` counts as `\frac`."""
    text = text.replace(r"\left", "").replace(r"\right", "").replace(r"\dfrac", r"\frac")
    return _NOT_COMPARED.sub("", text.lower())


def shingles(text: str) -> set[str]:
    """The pieces of a problem. One too short for a piece is a piece of its own: it matches only its equal."""
    text = normalise(text)
    if len(text) < SHINGLE:
        return {text} if text else set()
    return {text[start : start + SHINGLE] for start in range(len(text) - SHINGLE + 1)}


def overlap(train_problems: list[str], eval_problems: list[str], threshold: float = 0.9) -> list[Match]:
    """Every pair of a training and an evaluation problem with a share of at least `threshold` (above 0, up to 1).

    Returns:
        Matches, in the order of the training problems. Not only the best of each: a training set may hold an
        evaluation problem several times over.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold}: must be above 0 and at most 1")
    found_in = defaultdict(list)  # shingle -> the evaluation problems that have it
    sizes = []
    for eval_index, problem in enumerate(eval_problems):
        pieces = shingles(problem)
        sizes.append(len(pieces))
        for piece in pieces:
            found_in[piece].append(eval_index)

    matches = []
    for train_index, problem in enumerate(train_problems):
        shared = Counter(i for piece in shingles(problem) for i in found_in.get(piece, ()))
        for eval_index, count in sorted(shared.items()):
            if count / sizes[eval_index] >= threshold:
                matches.append(Match(train_index, eval_index, count / sizes[eval_index]))
    return matches


def remove_overlap(dataset: Dataset, eval_sets: dict[str, list[str]], threshold: float = 0.9) -> Dataset:
    """The dataset without the rows that overlap with an evaluation set; prints a line for each set.

    Args:
        dataset: with a column problem.
        eval_sets: name -> problems, as `load_eval_problems` gives them.
        threshold: the smallest share of an evaluation problem that removes a row.

    Raises:
        ValueError: nothing to compare with, or nothing left.
    """
    if not eval_sets:
        raise ValueError(
            "eval_sets is empty: there are no evaluation problems to compare the training problems with; "
            "decontaminate: false trains without"
        )
    say = PartialState().print  # on the main process
    origin = [(name, index) for name, problems in eval_sets.items() for index in range(len(problems))]
    matches = overlap(list(dataset["problem"]), [eval_sets[name][i] for name, i in origin], threshold)
    for name, problems in eval_sets.items():
        pairs = [(m.train_index, m.eval_index) for m in matches if origin[m.eval_index][0] == name]
        rows, hit = len({train for train, _ in pairs}), len({evaluated for _, evaluated in pairs})
        say(f"decontamination: {rows} training problems repeat {hit} of {len(problems)} in {name}", flush=True)
    removed = {match.train_index for match in matches}
    if len(removed) == len(dataset):
        raise ValueError(f"all {len(dataset)} training problems overlap with {', '.join(eval_sets)}: none is left")
    say(f"decontamination: {len(removed)} of {len(dataset)} training problems removed (share >= {threshold})")
    return dataset.select([index for index in range(len(dataset)) if index not in removed])


def load_eval_problems(data_dir: str | Path | None = None) -> dict[str, list[str]]:
    """The problems of the six benchmarks, from `data_dir` or the hub as in `load_problems`.

    Raises:
        OSError: as `check_eval_sets`.
        ValueError: a file that cannot be read.
    """
    check_eval_sets(data_dir)
    return {name: list(load_problems(name, data_dir=data_dir, key="decontaminate")["problem"]) for name in BENCHMARKS}


def check_eval_sets(data_dir: str | Path | None = None) -> None:
    """Returns if all six can be had; nothing is loaded.

    Raises:
        FileNotFoundError: one cannot; names all that cannot, and what to set.
    """
    missing = missing_from(data_dir) if data_dir is not None else missing_on_hub()
    if missing:
        raise FileNotFoundError(
            f"decontaminate=true: {missing}; set data_dir to a folder with a file of each ({', '.join(BENCHMARKS)}: "
            "NAME.jsonl, a problem and its answer a line), or decontaminate: false to keep what repeats them"
        )


def missing_from(data_dir: str | Path) -> str:
    """Which benchmarks a folder lacks, in words; "" if none."""
    missing = []
    for name in BENCHMARKS:
        try:
            local_file(name, data_dir)
        except FileNotFoundError:
            missing.append(name)
    return f"data_dir={str(data_dir)!r} holds no {', no '.join(missing)}" if missing else ""


def missing_on_hub() -> str:
    """Which benchmarks neither the hub nor the cache has, in words; one that does not answer is waited for once."""
    hubs = [hub_name(name, "decontaminate") for name in BENCHMARKS]
    hubs = [hub for hub in hubs if not is_local(hub.repo_id, "decontaminate") and not is_cached(hub)]
    closed = []
    for hub in hubs:
        try:
            reachable(hub)
        except ConnectionError as error:
            names = ", ".join(each.repo_id for each in hubs)
            return f"the Hugging Face hub cannot be reached ({error.__cause__}), and the cache has no {names}"
        except (FileNotFoundError, PermissionError):
            closed.append(hub.repo_id)
    return f"the Hugging Face hub does not give access to {', '.join(closed)}" if closed else ""
