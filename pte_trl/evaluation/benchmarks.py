"""The benchmarks: how many problems each has, what it hashes to, which golds are doubtful, what DAPO repeats.

A benchmark is loaded by its name, from the hub or a folder of JSONL files; anything else that `load_problems` takes
(a file, a hub name) can be evaluated too, without these checks.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset

from pte_trl.data.decontaminate import normalise
from pte_trl.data.problems import load_problems

FACTS = Path(__file__).parent


@dataclass(frozen=True)
class Copy:
    """A benchmark as the project was tested with it: the number of its problems, and first digits of its hash."""

    rows: int
    sha256: str


TESTED = {
    "math500": Copy(500, "ef094ed97b80"),
    "olympiadbench": Copy(674, "504d0bcb442e"),
    "minerva_math": Copy(272, "b8e8acd515cf"),  # the paper says 672; the public set and its own figures have 272
    "amc23": Copy(40, "e3514be4e75b"),
    "aime24": Copy(30, "9b447f010a51"),
    "aime25": Copy(30, "00b43aa2204f"),
    "gsm8k_test": Copy(1319, "cc309d35b75a"),
}


def content_hash(problems: Dataset) -> str:
    """Of problems and answers, in order; whitespace at the ends and ids do not count."""
    digest = hashlib.sha256()
    for row in problems.select_columns(["problem", "answer"]):
        digest.update(f"{row['problem'].strip()}\0{row['answer'].strip()}\n".encode())
    return digest.hexdigest()


def problem_key(problem: str) -> str:
    """A name for a problem's text that survives other ids and other spacing."""
    return hashlib.sha256(normalise(problem).encode()).hexdigest()[:12]


def load_benchmark(name: str, data_dir: str | Path | None = None, limit: int | None = None) -> Dataset:
    """Columns id, problem, answer, contaminated and gold_note; prints the count and the hash.

    Args:
        limit: only the first so many problems.

    Raises:
        ValueError: a known benchmark with another number of problems, or what `load_problems` refuses.
    """
    problems = load_problems(name, data_dir=data_dir, key="benchmarks")
    known, found = TESTED.get(name), content_hash(problems)
    if known and len(problems) != known.rows:
        raise ValueError(f"{name}: has {len(problems)} problems, must have {known.rows}")
    if known is None:
        verdict = "not a benchmark the project knows"
    elif found.startswith(known.sha256):
        verdict = "as tested"
    else:
        verdict = f"differs from the tested copy, {known.sha256}"
    ids = problems["id"]
    if len(set(ids)) != len(ids):
        raise ValueError(f"{name}: two problems have the same id")
    PartialState().print(f"benchmark {name}: {len(problems)} problems, sha256 {found[:12]} ({verdict})", flush=True)
    problems = problems.select(range(min(limit or len(problems), len(problems))))
    repeated, notes = set(contaminated().get(name, ())), gold_notes().get(name, {})
    problems = problems.add_column("contaminated", [problem_key(p) in repeated for p in problems["problem"]])
    return problems.add_column("gold_note", [notes.get(i, notes.get(number_of(i))) for i in problems["id"]])


def number_of(problem_id: str) -> str:
    """minerva/27, from whatever copy, is "27"."""
    return re.search(r"[^/]*$", problem_id)[0]


def gold_notes() -> dict[str, dict[str, str]]:
    """Gold answers that are read wrongly or too narrowly: benchmark -> id or its number -> what is wrong."""
    return json.loads((FACTS / "doubtful_golds.json").read_text())


def contaminated() -> dict[str, list[str]]:
    """Keys of benchmark problems that DAPO-Math-17k repeats; made by `python -m pte_trl.evaluation.contamination`."""
    return json.loads((FACTS / "contaminated.json").read_text())
