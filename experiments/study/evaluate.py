"""Answers right on fresh sequences of the recall task, at several windows and an evict ratio.

python -m experiments.study.evaluate --base outputs/study/recall/base --adapter ADAPTER --output FILE.json
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

import pte_trl.replay.attention  # noqa: F401 (registers the attention)
from experiments.study.recall import countdown, draw
from pte_trl.adapter.check import load_adapter
from pte_trl.cache.schedule import Schedule
from pte_trl.replay.plan import replay_inputs
from pte_trl.runtime.manifest import environment, write_json

TEST_SEED = 2**31  # no training run draws from it


@torch.no_grad()
def accuracy(model: nn.Module, names: int, schedule: Schedule | None, length: int, samples: int) -> float:
    """Share of answers whose most likely token is the digit told; `schedule=None` is full attention."""
    tokens, places = draw(samples, names, length, torch.Generator().manual_seed(TEST_SEED))
    right = 0
    for part in tokens.split(256):
        mask = torch.ones_like(part)
        inputs = {"attention_mask": mask} if schedule is None else replay_inputs(model, mask, 1, schedule)
        logits = model(input_ids=part, **inputs).logits[:, places - 1]
        right += (logits.argmax(-1) == part[:, places]).sum().item()
    return right / (samples * names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--names", type=int, default=4)
    parser.add_argument("--windows", type=int, nargs="+", default=[8, 12, 16])
    parser.add_argument("--evict_ratio", type=float, default=0.25)
    parser.add_argument("--samples", type=int, default=1024, help="sequences, each with a question per name")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32, attn_implementation="blockwise")
    if args.adapter:
        model = load_adapter(model, args.adapter)
    model.eval()
    schedules = {str(window): Schedule(window, args.evict_ratio) for window in args.windows}
    lengths = {window: countdown(schedule, args.names) for window, schedule in schedules.items()}
    found = {w: accuracy(model, args.names, schedules[w], lengths[w], args.samples) for w in schedules}
    found["full"] = accuracy(model, args.names, None, max(lengths.values()), args.samples)
    print(", ".join(f"{window}: {share:.3f}" for window, share in found.items()))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    settings = {key: getattr(args, key) for key in ("base", "adapter", "names", "samples", "evict_ratio")}
    write_json(args.output, {"environment": environment(), "settings": settings, "values": found})


if __name__ == "__main__":
    main()
