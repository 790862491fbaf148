"""Train the tiny model from nothing on written solutions of the register machine, with full attention.

    python -m experiments.registers.pretrain --output outputs/study/registers

Writes train.jsonl, heldout.jsonl, which share no problem, and base, the model, which comes last.
"""

import argparse
import json
import time
from pathlib import Path

from experiments.registers.task import LONGEST, TINY, WORDS
from experiments.tiny.model import build
from experiments.tiny.pretrain import TEST_SEED, accuracy, save, train
from experiments.tiny.task import rows


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--rows", type=int, default=20_000, help="of train.jsonl")
    parser.add_argument("--test-problems", type=int, default=200, help="of heldout.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args, began = parse_arguments(), time.perf_counter()
    if (args.output / "base/config.json").exists():
        print(f"{args.output}/base is there already; nothing to do")
        return
    args.output.mkdir(parents=True, exist_ok=True)
    heldout = rows("test", args.test_problems, TEST_SEED, TINY)
    for name, content in (("heldout", heldout), ("train", rows("train", args.rows, args.seed + 1, TINY))):
        (args.output / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    model, tokenizer = build(args.seed, WORDS)
    losses = train(model, tokenizer, TINY, args)
    score = accuracy(model, tokenizer, heldout, longest=LONGEST)
    save(model, tokenizer, args.output / "base")
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {time.perf_counter() - began:.0f} s")
    print(f"greedy accuracy on {len(heldout)} held-out problems, full attention: {score:.3f}")


if __name__ == "__main__":
    main()
