"""The accuracies of one run's evaluations at several windows, as a result file of a study.

    python -m experiments.study.collect outputs/study/sums/evaluate/pte-0 --output results/pte-0.json

The folder holds one folder per window (or "full"), each written by recipes/evaluate.py with one benchmark. With --kl
a file of pte_trl.inspect.kl, what it measured stands beside the accuracy.
"""

import argparse
import json
from pathlib import Path

from pte_trl.evaluation.metrics import summarise
from pte_trl.evaluation.records import COMPLETE, read_records
from pte_trl.runtime.manifest import environment, write_json


def collect(folder: Path) -> dict[str, float]:
    """Window -> pass@1, in order of the windows, "full" last.

    Raises:
        ValueError: nothing there, or a window with no finished evaluation or with several.
    """
    found = {}
    for window in sorted(folder.glob("*"), key=lambda path: (not path.name.isdigit(), path.name.zfill(9))):
        records = [path.parent for path in window.rglob(COMPLETE)]
        if len(records) != 1:
            raise ValueError(f"{window}: {len(records)} finished evaluations, one is needed")
        found[window.name] = summarise(read_records(records[0]))["pass@1"]
    if not found:
        raise ValueError(f"{folder}: no evaluations")
    return found


def beside(accuracies: dict[str, float], measured: dict[str, dict]) -> dict[str, dict]:
    """Window -> metric -> {"mean": ...}: the accuracy, and what was measured at the same window."""
    return {window: {"accuracy": {"mean": share}} | measured.get(window, {}) for window, share in accuracies.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--kl", type=Path, help="result of pte_trl.inspect.kl")
    args = parser.parse_args()
    try:
        accuracies = collect(args.folder)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    args.output.parent.mkdir(parents=True, exist_ok=True)
    values = beside(accuracies, json.loads(args.kl.read_text())["values"]) if args.kl else accuracies
    settings = {"evaluations": str(args.folder), "kl": str(args.kl) if args.kl else None}
    write_json(args.output, {"environment": environment(), "settings": settings, "values": values})
    print(", ".join(f"{window}: {share:.3f}" for window, share in accuracies.items()))


if __name__ == "__main__":
    main()
