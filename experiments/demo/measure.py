"""Accuracy of every arm of the demo, what each answers to one sequence, and the figure.

    python -m experiments.demo.measure --folder outputs/demo --sequences 1024

Measured with the cache itself (`pte_trl.BoundedCache`), not with the replay that trains.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from experiments.demo.figure import draw_figure
from experiments.demo.plan import FIGURE, NAMES, RESULTS, WINDOW
from experiments.study.evaluate import TEST_SEED
from experiments.study.recall import CHANCE, WORDS, countdown, draw
from pte_trl.adapter.check import load_adapter
from pte_trl.cache import BoundedCache, feed
from pte_trl.cache.schedule import Schedule
from pte_trl.runtime.manifest import environment, write_json

# Name, folder of the adapter, and whether the cache is bounded.
ARMS = (
    ("base, full cache", None, False),
    ("base, window", None, True),
    ("LoRA_c, window", "lora_c", True),
    ("PTE, window", "pte", True),
    ("PTE after GRPO, window", "pte_grpo", True),
)


def unseen_sequences(count: int) -> tuple[Tensor, Tensor]:
    """Sequences that no training saw, (count, tokens), and the places of their answers, (NAMES,)."""
    length = countdown(Schedule(WINDOW), NAMES)
    return draw(count, NAMES, length, torch.Generator().manual_seed(TEST_SEED))


def shown_of(tokens: Tensor, places: Tensor) -> int:
    """The sequence that is spelled out: the first with as many different digits as there are questions."""
    digits = tokens[:, places].tolist()
    return next((row for row, told in enumerate(digits) if len(set(told)) == NAMES), 0)


@torch.no_grad()
def answers(model: nn.Module, tokens: Tensor, places: Tensor, window: int) -> Tensor:
    """The most likely token where each answer belongs, (sequences, questions).

    Args:
        tokens: (sequences, tokens); the first is the prompt, the others are fed as a thought.
        window: thought tokens kept; as many as there are for the full cache.
    """
    cache = BoundedCache(window=window)
    feed(model, cache, tokens[:, :1])
    logits = feed(model, cache, tokens[:, 1:], logits_to_keep=0)
    return logits[:, places - 2].argmax(-1)  # the token before an answer predicts it; the prompt has no logits here


def load(folder: Path, adapter: str | None) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32, attn_implementation="blockwise")
    return (model if adapter is None else load_adapter(model, folder / adapter)).eval()


def measure(folder: Path, count: int) -> dict:
    """Accuracies over `count` sequences, and the answers to one of them.

    Returns:
        words of that sequence, the places of its answers, per question the words that have been evicted, and the arms.
    """
    tokens, places = unseen_sequences(count)
    shown, arms = shown_of(tokens, places), []
    for name, adapter, bounded in tqdm(ARMS):
        window = WINDOW if bounded else tokens.shape[1]
        given = answers(load(folder, adapter), tokens, places, window)
        right = (given == tokens[:, places]).float().mean().item()
        arms.append({"name": name, "accuracy": right, "answers": [WORDS[token] for token in given[shown]]})
    evicted = [Schedule(WINDOW).first_visible(int(place) - 2) for place in places]
    example = {"words": [WORDS[token] for token in tokens[shown]], "places": places.tolist(), "evicted": evicted}
    return {"window": WINDOW, "chance": CHANCE, "sequences": count, "example": example, "arms": arms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--sequences", type=int, required=True)
    args = parser.parse_args()
    results = measure(args.folder, args.sequences) | {"environment": environment()}
    draw_figure(results).savefig(args.folder / FIGURE, dpi=150)
    write_json(args.folder / RESULTS, results)


if __name__ == "__main__":
    main()
