"""Prompts that make a small instruct model write for long, for machines without data sets.

    python -m experiments.study.prompts --output outputs/study/smollm2/prompts

train.jsonl and heldout.jsonl share no subject. There is no gold answer; the column holds 0, which nothing reads.
"""

import argparse
import json
import random
from pathlib import Path

FORMS = (
    "Write a long story about {}.",
    "Explain in detail, step by step, {}.",
    "Write a letter of several paragraphs to a friend about {}.",
    "List fifteen facts about {}, and say why each one matters.",
    "Write a dialogue between two people who disagree about {}.",
    "Write a lesson for school children about {}, with examples and questions at the end.",
)
TRAIN = (
    *("a lighthouse keeper", "how bread is baked", "the first day at a new school", "bees and flowers"),
    *("a lost key", "how rivers form", "a train that is late", "planting a garden", "the moon", "a market in autumn"),
    *("learning to swim", "how a bicycle works", "two brothers", "winter in the mountains", "saving money"),
    *("an old clock", "how to cook rice", "a village by the sea", "the history of paper", "a storm"),
    *(
        "keeping a dog",
        "how vaccines help",
        "a long journey",
        "music at home",
        "the number zero",
        "a library at night",
    ),
)
# Said after a prompt once every form of every subject has been used, for long trainings.
MANNERS = (
    *("Give every person a name.", "Use numbers and dates.", "Write as an old sailor would.", "Be funny."),
    *("Write for a curious child.", "Be serious and precise.", "Set it in the future.", "Ask questions as you go."),
    *("Set it a hundred years ago.", "Make the ending a surprise.", "Say the main idea again in other words."),
)
HELDOUT = (
    *("a broken bridge", "how glass is made", "a concert in the rain", "the life of a whale", "moving to a new city"),
    *("how volcanoes erupt", "a forgotten photograph", "learning a language"),
)


def rows(subjects: tuple[str, ...], seed: int) -> list[dict]:
    """Every form of every subject, in random order; then all of them in every manner, in random order."""
    shuffle = random.Random(seed).shuffle
    plain = [form.format(subject) for subject in subjects for form in FORMS]
    shuffle(plain)
    more = [f"{prompt} {manner}" for prompt in plain for manner in MANNERS]
    shuffle(more)
    return [{"problem": prompt, "answer": "0"} for prompt in plain + more]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    for name, subjects in (("heldout", HELDOUT), ("train", TRAIN)):
        lines = [json.dumps(row) + "\n" for row in rows(subjects, seed=0)]
        (folder / f"{name}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
