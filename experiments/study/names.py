"""Text whose end needs its beginning, for a real model: who likes what is told, a count outlasts the window, and it is
told again in another order.

    python -m experiments.study.names --model outputs/smollm2-135m --output outputs/study/names

train.jsonl and heldout.jsonl are completions to distil on, as `recipes/distill_pte.py --sample_to` writes them, with
`asked`: the places in the completion of the things that are told again. mixed.jsonl has texts of all lengths, with
more to remember and less to count, for an adapter that is to serve every window. short.jsonl has texts that do not
count and tell everything again three times, after the shortest prompt: most questions for the tokens that they cost.
questions.jsonl are those of train.jsonl cut off at a thing, for `experiments.study.grpo`. All draw from the same names
and things; no held-out text is trained on.
What a name likes cannot be known but from the thought: under the window alone a model can only guess, one of thirty,
unless its layers hand on what they saw.
"""

import argparse
import json
import random
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

PROMPT = [{"role": "user", "content": "Say who likes what, then count, then say again who likes what."}]
NAMES = (
    *("Anna", "Ben", "Carl", "David", "Emma", "Frank", "Grace", "Henry", "Jack"),
    *("Kate", "Laura", "Mary", "Nick", "Paul", "Rose", "Sam", "Tom"),
)
THINGS = (
    *("apples", "boats", "cats", "dogs", "eggs", "flowers", "games", "horses", "books", "trees"),
    *("songs", "cars", "birds", "stars", "shoes", "lamps", "hats", "fish", "bread", "rain"),
    *("snow", "tea", "milk", "gold", "wool", "salt", "maps", "toys", "bells", "coins"),
)
PAIRS, COUNT = 2, 24  # 8 tokens told, and some 75 of counting
MIXED_PAIRS, MIXED_COUNT = (2, 8), (3, COUNT)  # drawn evenly, and log-uniformly
SHORT_PAIRS, SHORT_ROUNDS, SHORT_PROMPT = (3, 6), 3, "<|im_start|>assistant\n"  # SmolLM2's beginning of an answer
TEST_SEED = 2**31


def draw(
    tokenizer: PreTrainedTokenizerBase, rng: random.Random, pairs: int = PAIRS, count: int = COUNT, rounds: int = 1
) -> dict:
    """One row: prompt, completion_ids, text, asked.

    Args:
        count: the last number of the count; 0 leaves it out.
        rounds: how often everything is told again, in another order each time.
    """
    pairs = list(zip(rng.sample(NAMES, pairs), rng.sample(THINGS, pairs), strict=True))
    told = "".join(f" {name} likes {thing}." for name, thing in pairs)
    counted = f" Now count: {', '.join(map(str, range(1, count + 1)))}." if count else ""
    ids = tokenizer(f"{told}{counted}")["input_ids"]
    asked = []
    for _ in range(rounds):
        rng.shuffle(pairs)
        ids += tokenizer(" Once more:")["input_ids"]
        for name, thing in pairs:
            ids += tokenizer(f" {name} likes")["input_ids"]
            asked.append(len(ids))
            ids += tokenizer(f" {thing}.")["input_ids"]
    return {"prompt": PROMPT, "completion_ids": ids, "text": tokenizer.decode(ids), "asked": asked}


def draw_mixed(tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> dict:
    """As `draw`, of any length."""
    low, high = MIXED_COUNT
    count = int(low * ((high + 1) / low) ** rng.random())
    return draw(tokenizer, rng, rng.randint(*MIXED_PAIRS), count)


def draw_short(tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> dict:
    """As `draw`, without the count, told again more often and after the shortest prompt."""
    return draw(tokenizer, rng, rng.randint(*SHORT_PAIRS), 0, SHORT_ROUNDS) | {"prompt": SHORT_PROMPT}


def question(tokenizer: PreTrainedTokenizerBase, row: dict, which: int) -> dict:
    """A row's thought up to one of the things told again, and that thing; the prompt with its chat template."""
    ids, at = row["completion_ids"], row["asked"][which]
    problem = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    return {
        "problem": problem,
        "thought": tokenizer.decode(ids[:at]),
        "answer": tokenizer.decode(ids[at : at + 1]).strip(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the model whose tokens are written")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--heldout", type=int, default=32)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    args.output.mkdir(parents=True, exist_ok=True)
    sets = (
        ("train", draw, args.rows, 0),
        ("heldout", draw, args.heldout, TEST_SEED),
        ("mixed", draw_mixed, args.rows, 1),
        ("short", draw_short, args.rows, 2),
    )
    for name, make, rows, seed in sets:
        rng = random.Random(seed)
        lines = [json.dumps(make(tokenizer, rng)) + "\n" for _ in range(rows)]
        (args.output / f"{name}.jsonl").write_text("".join(lines))
    rows = map(json.loads, (args.output / "train.jsonl").read_text().splitlines())
    questions = [json.dumps(question(tokenizer, row, n % PAIRS)) + "\n" for n, row in enumerate(rows)]
    (args.output / "questions.jsonl").write_text("".join(questions))


if __name__ == "__main__":
    main()
