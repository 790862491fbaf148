"""Grades finished records again, without generating: after a newer math-verify, or a fault of the grader.

python -m pte_trl.evaluation.regrade outputs/eval
"""

import argparse
from pathlib import Path

from pte_trl.entry import framed
from pte_trl.evaluation.records import COMPLETE, read_records, write_records
from pte_trl.identity import verdict_versions, versions_of
from pte_trl.ownership import own
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
        record | verdict._asdict() | verdict_versions() | versions_of(["pte_trl"])
        for record, verdict in zip(records, verdicts, strict=True)
    ]
    write_records(folder, graded)
    if (manifest := Path(folder) / "manifest.json").exists():
        manifest.touch()  # make then renders the tables anew
    return changed


@framed
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="folders with records.jsonl somewhere below")
    args = parser.parse_args(argv)
    with Grader() as grader:
        for folder in sorted({path.parent for root in args.folders for path in root.rglob(COMPLETE)}):
            try:
                own(folder)
                print(f"{folder}: {regrade(folder, grader)} of {len(read_records(folder))} verdicts changed")
            except ValueError as error:
                raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
