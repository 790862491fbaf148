"""How much every kv head retrieves: a needle of random tokens in random tokens, and its repetition at the end.

An adaptation of the retrieval test of HeadKV (arXiv 2410.19258), which asks questions about a text: it
needs no text and no tokenizer, so it runs on any model. While the needle is repeated, a head scores the attention
that it gives to the needle's first occurrence, counting only places among its n strongest, n the needle's length.
"""

import json
import random
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from pte_trl.cache.eviction.attention import attention_implementation

HAY, NEEDLE, TRIALS = 192, 16, 16  # tokens, tokens, sequences of one measurement


def needles(vocabulary: int, hay: int, needle: int, trials: int, seed: int) -> tuple[Tensor, list[int]]:
    """(trials, hay + 2 * needle) tokens whose last `needle` repeat earlier ones, and where those begin."""
    generator = random.Random(seed)
    rows, starts = [], []
    for trial in range(trials):
        text = [generator.randrange(vocabulary) for _ in range(hay)]
        word = [generator.randrange(vocabulary) for _ in range(needle)]
        starts.append(trial * hay // trials)  # depths from the beginning to the end
        rows.append(text[: starts[-1]] + word + text[starts[-1] :] + word)
    return torch.tensor(rows), starts


@torch.no_grad()
def measure_importance(
    model: nn.Module, hay: int = HAY, needle: int = NEEDLE, trials: int = TRIALS, seed: int = 0
) -> list[list[float]]:
    """Retrieval score of every kv head of a model in eval mode, (layers, kv heads), each between 0 and 1.

    Args:
        model: bare or with an adapter, which is then measured with it (PTE: with S_0).
        hay, needle: random tokens around the needle, and tokens of the needle.
        trials: sequences, the needle at evenly spaced depths.
        seed: of the random tokens.

    Returns:
        Mean over trials and needle tokens; the mean over the query heads of a kv head.
    """
    tokens, starts = needles(model.config.vocab_size, hay, needle, trials, seed)
    tokens, cache = tokens.to(model.device), DynamicCache(config=model.config)
    with attention_implementation(model, "eager"):
        how = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        model(input_ids=tokens[:, :-needle], **how)
        out = model(input_ids=tokens[:, -needle:], output_attentions=True, **how)
    first = torch.tensor(starts, device=tokens.device).view(-1, 1, 1, 1)
    scores = []
    for attention in out.attentions:  # (trials, heads, needle, length)
        strength, place = attention.float().topk(needle, dim=-1)
        found = (place >= first) & (place < first + needle)
        scores.append((strength * found).sum(-1).mean(dim=(0, 2)))
    per_head = torch.stack(scores)
    return per_head.unflatten(1, (model.config.num_key_value_heads, -1)).mean(-1).tolist()


def save_importance(importance: list[list[float]], path: str | Path) -> None:
    """Writes scores of (layers, kv heads) as JSON."""
    Path(path).write_text(json.dumps({"importance": importance}, indent=1) + "\n")


def load_importance(path: str | Path) -> list[list[float]]:
    """Scores that `save_importance` wrote.

    Raises:
        ValueError: the file holds something else.
    """
    found = json.loads(Path(path).read_text())
    rows = found.get("importance") if isinstance(found, dict) else None
    if not rows or len({len(row) for row in rows}) != 1 or any(score < 0 for row in rows for score in row):
        raise ValueError(f"{path}: no head importance; expected rows of equally many numbers of at least 0")
    return rows
