"""Finished evaluations as scores of their problems, in the metric that a cell asks for."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace

from experiments.paper.plan import EvaluationRun
from pte_trl.evaluation.benchmarks import contaminated
from pte_trl.evaluation.metrics import problem_scores, verdicts
from pte_trl.evaluation.records import COMPLETE, Record, read_records


@dataclass(frozen=True)
class Measured:
    """What the tables need of one finished evaluation.

    Args:
        scores: problem id -> its pass@k, between 0 and 1.
        samples: completions per problem; `tries` of them make one trial, k of pass@k.
        clean: ids of the problems that the training data do not repeat; None where nobody has looked.
        no_room: how many problems leave no room in the budget. They count as wrong.
        settings: those of the evaluation, as its records have them.
    """

    scores: dict[str, float]
    samples: int
    tries: int
    clean: frozenset[str] | None
    no_room: int
    settings: dict


def measure(source: EvaluationRun, metric: str) -> Measured:
    """The scores of a finished evaluation.

    Args:
        metric: "pass@K", or "pass@K@LENGTH" for completions that are cut off after so many tokens.

    Raises:
        ValueError: a metric that is none, or one that the records cannot give.
    """
    path = Path(source.folder) / COMPLETE
    # Several tables share a folder; the time makes a rewritten one count as new.
    return _measure(source.folder, path.stat().st_mtime_ns, source.benchmark, source.max_new_tokens, metric)


def parse(metric: str) -> tuple[int, int | None]:
    """k, and the length at which completions are cut off, if at any.

    Raises:
        ValueError: no metric of an evaluation.
    """
    found = re.fullmatch(r"pass@([1-9]\d*)(?:@([1-9]\d*))?", metric)
    if not found:
        raise ValueError(f"{metric} is not a metric of an evaluation; allowed are pass@K and pass@K@LENGTH")
    return int(found[1]), int(found[2]) if found[2] else None


@cache
def _measure(folder: str, changed: int, benchmark: str, longest: int, metric: str) -> Measured:
    k, length = parse(metric)
    if length and length > longest:
        raise ValueError(
            f"{metric}: {folder} has completions of {longest} tokens at most; allowed are lengths up to it"
        )
    records = read_records(folder)
    if length not in (None, longest) and any(record["tokens"] > length for record in records):
        records = _cut(records, length)
    samples = len(next(iter(verdicts(records).values())))
    if samples < k:
        raise ValueError(f"{Path(folder) / COMPLETE} has {samples} samples per problem, too few for {metric}")
    first = {record["problem_id"]: record for record in records}
    clean = frozenset(name for name, record in first.items() if not record["contaminated"])
    return Measured(
        problem_scores(records, k),
        samples,
        k,
        clean if benchmark in contaminated() else None,
        sum(record["finish_reason"] == "no_room" for record in first.values()),
        {key: value for key, value in records[0].items() if key not in Record.__annotations__},
    )


def _cut(records: list[Record], length: int) -> list[Record]:
    """Cut off after `length` tokens of the model's own tokenizer, and graded again."""
    from pte_trl.evaluation.prefix import prefix_records

    return prefix_records(records, length, _tokenizer(records[0]["model_name_or_path"]), _grader())


@cache
def _tokenizer(name: str):
    from pte_trl.models.tokens import load_tokenizer

    return load_tokenizer(SimpleNamespace(model_name_or_path=name))


@cache
def _grader():
    """One for all lengths and folders: its processes take seconds to start, and end with this one."""
    from pte_trl.rewards.grader import Grader

    return Grader()
