"""The register machine in words for SmolLM2, and the model that has been shown how it is written.

    python -m experiments.registers.shown --model outputs/smollm2-135m --output outputs/study/registers-smollm2

Writes base, SmolLM2 fine-tuned on some hundred solutions, train.jsonl and heldout.jsonl; no problem is in two of the
sets. See `experiments.study.arithmetic`, whose fine-tuning this is.
"""

from experiments.registers.task import SMOLLM2
from experiments.study.arithmetic import make_shown
from experiments.tiny.task import rows

TEST_SEED = 0


def sets(counts: dict[str, int], seed: int) -> dict[str, list[dict[str, str]]]:
    """So many different rows of every set; the held-out ones are of the other split."""
    both = rows("train", counts["train"] + counts["shown"], seed + 1, SMOLLM2)
    heldout = rows("test", counts["heldout"], TEST_SEED, SMOLLM2)
    return {"heldout": heldout, "train": both[: counts["train"]], "shown": both[counts["train"] :]}


def main() -> None:
    make_shown(__doc__.splitlines()[0], sets, steps=100)


if __name__ == "__main__":
    main()
