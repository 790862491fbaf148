"""The register machine in words for SmolLM2, and the model that has been shown how it is written.

    python -m experiments.registers.shown --model outputs/smollm2-135m --output outputs/study/registers-smollm2

Writes base, SmolLM2 fine-tuned on some hundred solutions, train.jsonl and heldout.jsonl; no problem is in two of the
sets. See `experiments.study.arithmetic`, whose fine-tuning this is.
"""

import argparse
import json
from pathlib import Path

from experiments.registers.task import SMOLLM2
from experiments.study.arithmetic import show
from experiments.tiny.task import rows

TEST_SEED = 0


def sets(heldout: int, train: int, shown: int, seed: int) -> dict[str, list[dict[str, str]]]:
    """Different rows of every set; the held-out ones are of the other split."""
    both = rows("train", train + shown, seed + 1, SMOLLM2)
    return {"heldout": rows("test", heldout, TEST_SEED, SMOLLM2), "train": both[:train], "shown": both[train:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the model to start from")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100, help="of eight shown solutions each")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--train", type=int, default=1024)
    parser.add_argument("--heldout", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if (args.output / "base").exists():
        raise SystemExit(f"error: {args.output / 'base'} is there already; take another output, or remove it")
    found = sets(args.heldout, args.train, 8 * args.steps, args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    for name in ("heldout", "train"):
        (args.output / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found[name]))
    show(args.model, found["shown"], args.output / "base", args.steps, args.learning_rate, args.seed)


if __name__ == "__main__":
    main()
