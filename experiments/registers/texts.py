"""Completions in words to distil SmolLM2 on: written solutions, and short texts with more to remember.

    python -m experiments.registers.texts --base outputs/study/registers-smollm2/base \
        --output outputs/study/registers-smollm2

train_completions.jsonl and heldout_completions.jsonl have the solutions of train.jsonl and heldout.jsonl in the same
folder, as `recipes/distill_pte.py --sample_to` writes completions. The base has been shown such solutions, so they
need not be sampled. short.jsonl has short programs that are worked out, and then every register is told again three
times, in another order each time: most questions for the tokens that they cost. Rows have `asked`, the places in the
completion of the values that are recalled.
"""

import argparse
import json
import random
import re
import string
from collections.abc import Iterable
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from experiments.registers.task import Machine, in_words
from experiments.study.names import SHORT_PROMPT

SHORT, ROUNDS = Machine(chains=3, length=2, depth=1, after=1, write=in_words), 3
SEED = 2  # of short.jsonl


def completion(tokenizer: PreTrainedTokenizerBase, prompt: str | list, text: str, starts: Iterable[int]) -> dict:
    """A row: prompt, completion_ids with the end of the text, text, asked.

    Args:
        starts: the places in the text, in characters, of what is recalled.
    """
    found = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    offsets = found["offset_mapping"]
    asked = [next(at for at, (begin, end) in enumerate(offsets) if begin <= start < end) for start in starts]
    ids = [*found["input_ids"], tokenizer.eos_token_id]
    return {"prompt": prompt, "completion_ids": ids, "text": text, "asked": asked}


def solved(tokenizer: PreTrainedTokenizerBase, row: dict) -> dict:
    """A problem and its written solution; the three registers are recalled where they are added up."""
    total = re.search(r"\w \+ \w \+ \w = (\d) \+ \d[^,.]*(?:, so \d)?, \d \+ (\d) = ", row["solution"])
    first, third = total.start(1), total.start(2)
    prompt = [{"role": "user", "content": row["problem"]}]
    return completion(tokenizer, prompt, row["solution"], (first, first + len("0 + "), third))


def told_again(tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> dict:
    """A short program, worked out, and every register told again."""
    program = SHORT.program(rng)
    _, solution = in_words(program)
    text = " ".join(re.split(r"(?<=\.) ", solution)[: SHORT.registers])
    registers, starts = list(zip(string.ascii_lowercase, program.values, strict=False)), []
    for _ in range(ROUNDS):
        rng.shuffle(registers)
        text += " Again:"
        for name, value in registers:
            text += f" {name} = {value}."
            starts.append(len(text) - len("0."))
    return completion(tokenizer, SHORT_PROMPT, text, starts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, help="folder of the model whose tokens are written")
    parser.add_argument("--output", type=Path, required=True, help="folder with train.jsonl and heldout.jsonl")
    parser.add_argument("--short", type=int, default=4096, help="rows of short.jsonl")
    parser.add_argument("--heldout", type=int, default=32, help="rows of heldout_completions.jsonl")
    args = parser.parse_args()
    tokenizer, rng = AutoTokenizer.from_pretrained(args.base), random.Random(SEED)
    train, heldout = ((args.output / f"{name}.jsonl").read_text().splitlines() for name in ("train", "heldout"))
    sets = {
        "short": (told_again(tokenizer, rng) for _ in range(args.short)),
        "heldout_completions": (solved(tokenizer, json.loads(line)) for line in heldout[: args.heldout]),
        "train_completions": (solved(tokenizer, json.loads(line)) for line in train),
    }
    for name, content in sets.items():
        (args.output / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))


if __name__ == "__main__":
    main()
