"""Generated sums in the place of the paper's six benchmarks and of its training set, for SCALE=tiny.

    python -m experiments.tiny.benchmarks --output outputs/tiny/data

Each set has about the size of the benchmark that it replaces, 100 problems at most, and its place in difficulty: more
lines to add up are more thought to remember. None has more lines than the model was pretrained on.
"""

import argparse
import json
from pathlib import Path

from experiments.tiny.task import DIFFICULTIES, Difficulty, rows

SETS = {
    "tiny_math500": (100, Difficulty(lines=(12, 20))),
    "tiny_olympiadbench": (100, Difficulty(lines=(15, 20))),
    "tiny_minerva_math": (100, Difficulty(lines=(16, 20))),
    "tiny_amc23": (40, Difficulty(lines=(12, 16))),
    "tiny_aime24": (30, Difficulty(lines=(17, 20))),
    "tiny_aime25": (30, Difficulty(lines=(18, 20))),
}
TRAIN_ROWS, TRAIN_SEED, FIRST_SEED = 20_000, 2, 100


def write(folder: Path) -> None:
    """train.jsonl and the six sets; the same files every time, with no problem in two of the six."""
    folder.mkdir(parents=True, exist_ok=True)
    taken: set[str] = set()
    for seed, (name, (count, difficulty)) in enumerate(SETS.items(), FIRST_SEED):
        fresh = [row for row in rows("test", 3 * count, seed, difficulty) if row["id"] not in taken][:count]
        taken |= {row["id"] for row in fresh}
        write_rows(folder / f"{name}.jsonl", fresh)
    write_rows(folder / "train.jsonl", rows("train", TRAIN_ROWS, TRAIN_SEED, DIFFICULTIES["medium"]))


def write_rows(path: Path, content: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    write(parser.parse_args().output)


if __name__ == "__main__":
    main()
