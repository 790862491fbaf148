"""Grades finished records again, without generating: after a newer math-verify, or a fault of the grader.

python -m pte_trl.evaluation.regrade outputs/eval
"""

import argparse
from importlib.metadata import version
from pathlib import Path

from pte_trl.evaluation.records import COMPLETE, read_records, write_records
from pte_trl.rewards import Grader


def regrade(folder: str | Path, grader: Grader | None = None) -> int:
    """New verdicts for one finished evaluation; returns how many changed between right and wrong."""
    if grader is None:
        with Grader() as grader:
            return regrade(folder, grader)
    records = read_records(folder)
    verdicts = grader.grade([r["gold"] for r in records], [r["completion"] for r in records])
    changed = sum(record["correct"] != verdict.correct for record, verdict in zip(records, verdicts, strict=True))
    graded = [
        record | verdict._asdict() | {"math_verify": version("math-verify"), "pte_trl": version("pte_trl")}
        for record, verdict in zip(records, verdicts, strict=True)
    ]
    write_records(folder, graded)
    if (manifest := Path(folder) / "manifest.json").exists():
        manifest.touch()  # make then renders the tables anew
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="folders with records.jsonl somewhere below")
    args = parser.parse_args()
    with Grader() as grader:
        for folder in sorted({path.parent for root in args.folders for path in root.rglob(COMPLETE)}):
            print(f"{folder}: {regrade(folder, grader)} of {len(read_records(folder))} verdicts changed")


if __name__ == "__main__":
    main()
