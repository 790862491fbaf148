"""Grades finished records again, without generating: after a newer math-verify, or a fault of the grader.

    python -m pte_trl.evaluation.regrade outputs/eval
    python -m pte_trl.evaluation.regrade outputs/eval --answer_after "</think>"

What of a completion is graded (`answer_after`) is taken from the records, unless it is given.
"""

import argparse
from pathlib import Path

from pte_trl.evaluation.records import finished_folders, read_records, write_records
from pte_trl.rewards.grader import Grader
from pte_trl.rewards.worker_pool import verdict_versions
from pte_trl.runtime.entry import framed, run, settings_checked
from pte_trl.runtime.identity import versions_of
from pte_trl.runtime.ownership import own


def regrade(folder: str | Path, grader: Grader | None = None, answer_after: str | None = None) -> int:
    """New verdicts for one finished evaluation; returns how many changed between right and wrong.

    Args:
        answer_after: as `Grader` takes it; None: as the records say.

    Raises:
        ValueError: the records were made with different values of it.
    """
    if grader is None:
        with Grader() as grader:
            return regrade(folder, grader, answer_after)
    records = read_records(folder)
    marks = {record.get("answer_after") for record in records} if answer_after is None else {answer_after}
    if len(marks) > 1:
        raise ValueError(f"{folder}: records with answer_after={sorted(map(str, marks))}; give one of them")
    (mark,) = marks or {None}
    verdicts = grader.grade([r["gold"] for r in records], [r["completion"] for r in records], answer_after=mark)
    changed = sum(record["correct"] != verdict.correct for record, verdict in zip(records, verdicts, strict=True))
    settings = {"answer_after": mark} | verdict_versions() | versions_of(["pte_trl"])
    graded = [record | verdict._asdict() | settings for record, verdict in zip(records, verdicts, strict=True)]
    write_records(folder, graded)
    if (manifest := Path(folder) / "manifest.json").exists():
        manifest.touch()  # make then renders the tables anew
    return changed


@framed
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="folders with records.jsonl somewhere below")
    parser.add_argument("--answer_after", help="grade only what follows this text; left out: as the records say")
    args = parser.parse_args(argv)
    found = finished_folders(args.folders)
    with Grader() as grader:
        for folder in found:
            with settings_checked():
                own(folder)
                changed = regrade(folder, grader, args.answer_after)
                print(f"{folder}: {changed} of {len(read_records(folder))} verdicts changed")


if __name__ == "__main__":
    run(main)
