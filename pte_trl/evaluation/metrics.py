"""Every metric, from records alone.

    python -m pte_trl.evaluation.metrics outputs/eval          # all finished evaluations under a folder
    python -m pte_trl.evaluation.metrics outputs/eval --json

pass@1 is the mean over runs of the share solved, one run being the samples with the same number. It comes with two
standard errors: over problems (what another set of problems would give, the wider one) and over runs (what sampling
again would give). pass@k is the unbiased estimator of Chen et al., arXiv 2107.03374, eq. 1.
"""

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev

from pte_trl import markdown
from pte_trl.evaluation.records import COMPLETE, Record, read_records
from pte_trl.rewards.grader import has_boxed


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that one of k samples drawn without replacement from `samples` is among the `correct` ones."""
    if not 1 <= k <= samples:
        raise ValueError(f"k={k}: must be at least 1 and at most the number of samples, {samples}")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def standard_error(values: list[float]) -> float | None:
    """Of their mean; None for a single value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def summarise(records: list[Record]) -> dict:
    """The metrics of one evaluation of one benchmark.

    Returns:
        problems and samples (per problem) as counts; shares between 0 and 1: pass@1 with its errors over problems
        ("pass@1_se") and over runs ("pass@1_se_runs", None for one run), "pass@k" and "pass@k_se" by k,
        "pass@1_clean" without problems that the training data repeat, format_rate, truncation_rate, no_room_rate
        (prompts beyond the budget); mean_tokens, mean_evictions; contaminated, doubtful_golds: counts of problems.

    Raises:
        ValueError: no records, or problems with different numbers of samples.
    """
    if not records:
        raise ValueError("no records to summarise")
    by_problem, by_run = defaultdict(list), defaultdict(list)
    for row in records:
        by_problem[row["problem_id"]].append(row["correct"])
        by_run[row["sample"]].append(row["correct"])
    counts = {len(verdicts) for verdicts in by_problem.values()}
    if len(counts) != 1:
        raise ValueError(f"problems with different numbers of samples: {sorted(counts)}")
    (samples,) = counts
    ks = sorted({k for k in (1, 2, 4, 8, 16, 32, 64, samples) if k <= samples})
    at_k = {k: [pass_at_k(samples, sum(v), k) for v in by_problem.values()] for k in ks}
    first = {row["problem_id"]: row for row in records}
    clean = [row["correct"] for row in records if not row["contaminated"]]
    return {
        "problems": len(by_problem),
        "samples": samples,
        "pass@1": fmean(at_k[1]),
        "pass@1_se": standard_error(at_k[1]),
        "pass@1_se_runs": standard_error([fmean(run) for run in by_run.values()]),
        "pass@1_clean": fmean(clean) if clean else None,
        "pass@k": {str(k): fmean(values) for k, values in at_k.items()},
        "pass@k_se": {str(k): standard_error(values) for k, values in at_k.items()},
        "format_rate": fmean(has_boxed(row["completion"], row.get("answer_after")) for row in records),
        "truncation_rate": fmean(row["finish_reason"] == "length" for row in records),
        "no_room_rate": fmean(row["finish_reason"] == "no_room" for row in records),
        "mean_tokens": fmean(row["tokens"] for row in records),
        "mean_evictions": fmean(row["evictions"] for row in records),
        "contaminated": sum(row["contaminated"] for row in first.values()),
        "doubtful_golds": sum(row.get("gold_note") is not None for row in first.values()),
    }


def table(summaries: dict[str, dict]) -> str:
    """Markdown, a line per evaluation; shares in percent."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    head = ["evaluation", "problems x samples", "pass@1", "se", "se of runs", "pass@max", "format", "cut", "tokens"]
    rows = []
    for name, s in summaries.items():
        best = max(s["pass@k"], key=int)
        cells = [name, f"{s['problems']} x {s['samples']}", percent(s["pass@1"]), percent(s["pass@1_se"])]
        cells += [percent(s["pass@1_se_runs"]), f"{percent(s['pass@k'][best])} (k={best})", percent(s["format_rate"])]
        cells += [percent(s["truncation_rate"]), f"{s['mean_tokens']:.0f}"]
        rows.append(cells)
    return markdown.table(head, rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Metrics of finished evaluations, from their records.")
    parser.add_argument("folders", nargs="+", type=Path, help="folders with records.jsonl somewhere below")
    parser.add_argument("--json", action="store_true", help="everything there is, instead of the table")
    args = parser.parse_args(argv)
    found = sorted({path.parent for folder in args.folders for path in folder.rglob(COMPLETE)})
    if not found:
        raise SystemExit(f"error: no {COMPLETE} below {', '.join(map(str, args.folders))}")
    summaries = {}
    for folder in found:
        try:
            records = read_records(folder)
        except (ValueError, OSError) as error:
            raise SystemExit(f"error: {error}") from error
        try:
            summaries[str(folder)] = summarise(records)
        except ValueError as error:
            raise SystemExit(f"error: {folder}: {error}") from error
    print(json.dumps(summaries, indent=1) if args.json else table(summaries))


if __name__ == "__main__":
    main()
