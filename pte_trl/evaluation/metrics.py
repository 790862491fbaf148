"""Every metric, from records alone.

    python -m pte_trl.evaluation.metrics outputs/eval          # all finished evaluations under a folder
    python -m pte_trl.evaluation.metrics outputs/eval --json

pass@1 is the mean over runs of the share solved, one run being the samples with the same number. It comes with two
standard errors: over problems (what another set of problems would give, the wider one) and over runs (what sampling
again would give). pass@k is the unbiased estimator of Chen et al., arXiv 2107.03374, eq. 1. Where all is right or all
is wrong, no error can be estimated, and the interval is what to read.
"""

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev

from pte_trl import markdown
from pte_trl.evaluation.intervals import Interval, interval, spread
from pte_trl.evaluation.records import Record, finished_folders, read_records
from pte_trl.rewards.grader import has_boxed


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that one of k samples drawn without replacement from `samples` is among the `correct` ones."""
    if not 1 <= k <= samples:
        raise ValueError(f"k={k}: must be at least 1 and at most the number of samples, {samples}")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def standard_error(values: list[float]) -> float | None:
    """Of their mean; None for a single value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def verdicts(records: list[Record]) -> dict[str, list[bool]]:
    """Problem id -> whether each of its samples is right.

    Raises:
        ValueError: no records, or problems with different numbers of samples.
    """
    if not records:
        raise ValueError("no records to summarise")
    by_problem = defaultdict(list)
    for row in records:
        by_problem[row["problem_id"]].append(row["correct"])
    counts = {len(found) for found in by_problem.values()}
    if len(counts) != 1:
        raise ValueError(f"problems with different numbers of samples: {sorted(counts)}")
    return dict(by_problem)


def problem_scores(records: list[Record], k: int = 1) -> dict[str, float]:
    """Problem id -> its pass@k, between 0 and 1.

    Raises:
        ValueError: as `verdicts` and `pass_at_k`.
    """
    return {name: pass_at_k(len(found), sum(found), k) for name, found in verdicts(records).items()}


def score_interval(values: list[float], samples: int, k: int = 1) -> Interval:
    """The 95 % interval of the mean of pass@k over problems; k samples together are one trial."""
    return interval(fmean(values), standard_error(values), len(values), len(values) * (samples // k))


def summarise(records: list[Record]) -> dict:
    """The metrics of one evaluation of one benchmark.

    Returns:
        problems and samples (per problem) as counts; shares between 0 and 1: pass@1 with its errors over problems
        ("pass@1_se") and over runs ("pass@1_se_runs", None for one run), "pass@k", "pass@k_se" and "pass@k_interval"
        (95 %) by k, "pass@1_clean" and "pass@k_clean" without problems that the training data repeat (None if all
        are), format_rate, truncation_rate, no_room_rate (prompts beyond the budget); mean_tokens, mean_evictions;
        contaminated, doubtful_golds: counts of problems.

    Raises:
        ValueError: no records, or problems with different numbers of samples.
    """
    by_problem, by_run = verdicts(records), defaultdict(list)
    for row in records:
        by_run[row["sample"]].append(row["correct"])
    samples = len(next(iter(by_problem.values())))
    ks = sorted({k for k in (1, 2, 4, 8, 16, 32, 64, samples) if k <= samples})
    of_problem = {k: problem_scores(records, k) for k in ks}
    at_k = {k: list(scores.values()) for k, scores in of_problem.items()}
    first = {row["problem_id"]: row for row in records}
    clean = [name for name, row in first.items() if not row["contaminated"]]
    of_clean = {str(k): fmean(scores[name] for name in clean) if clean else None for k, scores in of_problem.items()}
    return {
        "problems": len(by_problem),
        "samples": samples,
        "pass@1": fmean(at_k[1]),
        "pass@1_se": standard_error(at_k[1]),
        "pass@1_se_runs": standard_error([fmean(run) for run in by_run.values()]),
        "pass@1_clean": of_clean["1"],
        "pass@k": {str(k): fmean(values) for k, values in at_k.items()},
        "pass@k_se": {str(k): standard_error(values) for k, values in at_k.items()},
        "pass@k_interval": {str(k): score_interval(values, samples, k) for k, values in at_k.items()},
        "pass@k_clean": of_clean,
        "format_rate": fmean(has_boxed(row["completion"], row.get("answer_after")) for row in records),
        "truncation_rate": fmean(row["finish_reason"] == "length" for row in records),
        "no_room_rate": fmean(row["finish_reason"] == "no_room" for row in records),
        "mean_tokens": fmean(row["tokens"] for row in records),
        "mean_evictions": fmean(row["evictions"] for row in records),
        "contaminated": sum(row["contaminated"] for row in first.values()),
        "doubtful_golds": sum(row.get("gold_note") is not None for row in first.values()),
    }


def table(summaries: dict[str, dict]) -> str:
    """Markdown, a line per evaluation; shares in percent, and in the column "se" an interval where there is none."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    def error(summary: dict) -> str:
        if summary["pass@1_se"]:
            return percent(summary["pass@1_se"])
        return spread(None, tuple(100 * bound for bound in summary["pass@k_interval"]["1"]), "{:.1f}".format)

    head = ["evaluation", "problems x samples", "pass@1", "se", "se of runs", "pass@max", "format", "cut", "tokens"]
    rows = []
    for name, s in summaries.items():
        best = max(s["pass@k"], key=int)
        cells = [name, f"{s['problems']} x {s['samples']}", percent(s["pass@1"]), error(s)]
        cells += [percent(s["pass@1_se_runs"]), f"{percent(s['pass@k'][best])} (k={best})", percent(s["format_rate"])]
        cells += [percent(s["truncation_rate"]), f"{s['mean_tokens']:.0f}"]
        rows.append(cells)
    return markdown.table(head, rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Metrics of finished evaluations, from their records.")
    parser.add_argument("folders", nargs="+", type=Path, help="folders with records.jsonl somewhere below")
    parser.add_argument("--json", action="store_true", help="everything there is, instead of the table")
    args = parser.parse_args(argv)
    found = finished_folders(args.folders)
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
