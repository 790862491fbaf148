"""What shorter runs would have given, from the records of a long one: completions cut after so many tokens.

    python -m pte_trl.evaluation.prefix outputs/eval --lengths 3072 6144 12288

A sample's random numbers follow from its own seed, one per token, and its window from its own prompt. So the first n
tokens of a completion do not depend on how many may follow, but for the rounding of other batches, and one run of
64K tokens has those of every shorter length in it (`tests/test_prefix.py`). What is cut is graded again, by the same
rules.
"""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

from transformers import PreTrainedTokenizerBase

from pte_trl.cache.schedule import Schedule
from pte_trl.evaluation.metrics import summarise, table
from pte_trl.evaluation.records import Record, finished_folders, read_records
from pte_trl.models.tokens import load_tokenizer
from pte_trl.rewards.grader import Grader
from pte_trl.runtime.entry import framed, run, settings_checked
from pte_trl.settings.limits import COUNT, check_value

NOT_PREFIXES = ("pyramidkv", "headkv")  # they give a head its share of the cache by the length of the whole run


def prefix_records(
    records: list[Record], length: int, tokenizer: PreTrainedTokenizerBase, grader: Grader | None = None
) -> list[Record]:
    """The records of the same evaluation with `max_new_tokens` = length.

    Args:
        records: of one evaluation, with their `completion_ids`.
        length: tokens of a completion at most.
        tokenizer: of the records' model.
        grader: one with the default limits if None.

    Raises:
        ValueError: a length beyond the records', an eviction strategy under which a shorter run is no prefix, records
            without token ids, or another tokenizer's.
    """
    check_value("length", length, COUNT)
    for record in records:
        check_prefix(record, length)
    cut = [record for record in records if record["tokens"] > length]
    for record in cut:
        if tokenizer.decode(record["completion_ids"], skip_special_tokens=True) != record["completion"]:
            raise ValueError(
                f"tokenizer={tokenizer.name_or_path!r}: reads the tokens of problem {record['problem_id']} otherwise "
                "than they are recorded; it must be the one of the evaluation"
            )
    graded = iter(grade([cut_off(record, length, tokenizer) for record in cut], grader) if cut else ())
    made = [next(graded) if record["tokens"] > length else record for record in records]
    return [record | {"max_new_tokens": length} for record in made]


def check_prefix(record: Record, length: int) -> None:
    """Raises ValueError where a run of `length` tokens cannot be had from a record."""
    longest, eviction = record.get("max_new_tokens", record["tokens"]), record.get("eviction")
    if length > longest:
        raise ValueError(f"length={length}: the records have max_new_tokens={longest}; allowed is at most that")
    if eviction in NOT_PREFIXES and length < longest:
        raise ValueError(
            f"length={length}: with eviction={eviction!r} the cache is divided by max_new_tokens, so a shorter run "
            "has other texts; evaluate with this max_new_tokens"
        )
    if record["tokens"] > length and "completion_ids" not in record:
        raise ValueError(
            f"length={length}: the record of problem {record['problem_id']} has no completion_ids, it was written by "
            f"an earlier version (pte_trl {record.get('pte_trl', 'unknown')}); evaluate again"
        )


def cut_off(record: Record, length: int, tokenizer: PreTrainedTokenizerBase) -> Record:
    """A longer completion after `length` tokens, not graded yet."""
    ids = record["completion_ids"][:length]
    window = record.get("sample_window")
    evictions = 0 if window is None else Schedule(window, record["evict_ratio"]).evictions(length - 1)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    new = {"completion": text, "tokens": length, "completion_ids": ids, "evictions": evictions}
    return record | new | {"finish_reason": "length"}


def grade(records: list[Record], grader: Grader | None) -> list[Record]:
    """Records with new verdicts, each graded after its own `answer_after`."""
    if grader is None:
        with Grader() as grader:
            return grade(records, grader)
    graded = list(records)
    for mark in {record.get("answer_after") for record in records}:
        at = [index for index, record in enumerate(records) if record.get("answer_after") == mark]
        verdicts = grader.grade(
            [records[i]["gold"] for i in at], [records[i]["completion"] for i in at], answer_after=mark
        )
        for index, verdict in zip(at, verdicts, strict=True):
            graded[index] = records[index] | verdict._asdict()
    return graded


@framed
def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Prints the metrics of every finished evaluation under a folder, at every length."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="folders with records.jsonl somewhere below")
    parser.add_argument("--lengths", nargs="+", type=int, required=True, help="completion tokens at most")
    parser.add_argument("--json", action="store_true", help="everything there is, instead of the table")
    args = parser.parse_args(argv)
    found = finished_folders(args.folders)
    summaries = {}
    with Grader() as grader, settings_checked():
        for folder in found:
            records = read_records(folder)
            tokenizer = load_tokenizer(SimpleNamespace(model_name_or_path=records[0]["model_name_or_path"]))
            for length in args.lengths:
                summaries[f"{folder} at {length}"] = summarise(prefix_records(records, length, tokenizer, grader))
    print(json.dumps(summaries, indent=1) if args.json else table(summaries))
    return summaries


if __name__ == "__main__":
    run(main)
