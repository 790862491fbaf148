"""Peak bytes and counted operations of a few small jobs: what a change must not raise unnoticed.

    python -m benchmarks.baselines            # beside the committed ones
    python -m benchmarks.baselines --update   # accept today's

Both are counted, not timed, so they are the same on every CPU; a test compares them within 2 %.
"""

import argparse
import gc
import json

import torch
from peft import get_peft_model

from benchmarks.common import RECORDS, print_table
from benchmarks.measure import Peak
from benchmarks.memory import arguments
from benchmarks.models import random_model
from benchmarks.training import arms
from pte_trl import PteConfig
from pte_trl.cache.policy import CachePolicy
from pte_trl.compat.torch import TorchDispatchMode, flop_formula
from pte_trl.rollouts.rollout import rollout

BASELINES = RECORDS / "baselines.json"
LENGTH = 512


class Operations(TorchDispatchMode):
    """Floating-point operations of matrix products and attention, by torch's own formulas.

    torch's `FlopCounterMode` also follows the modules, by hooks that `torch.autograd.grad` does not allow.
    """

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        formula = flop_formula(func)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def count(job) -> dict[str, int]:
    """Most bytes alive and floating-point operations in one call; the call before it warms up."""
    job()
    gc.collect()
    with Peak() as peak:
        job()
    with Operations() as operations:
        job()
    return {"peak_bytes": peak.most, "flops": operations.total}


def jobs() -> dict:
    """Name -> what is counted: training steps of each arm, and rollouts of eight completions of two prompts."""
    ids = torch.randint(1, 500, (1, 64 + LENGTH), generator=torch.Generator().manual_seed(0))
    # By default a segment has 512 tokens, all of these.
    args = arguments(["--segment-length", "64"])
    steps = arms(args, ["lora, full cache", "pte, one pass", "pte, segments"])
    found = {f"step: {name}": lambda step=step: step(ids).backward() for name, (_, step) in steps.items()}
    model = get_peft_model(random_model("tiny", seed=0), PteConfig()).eval()
    prompts = [ids[0, :40].tolist()] * 4 + [ids[0, 40:64].tolist()] * 4
    options = {"max_new_tokens": 128, "eos_token_ids": [-1], "pad_token_id": 0, "seeds": list(range(8))}
    found["rollout: pte"] = lambda: rollout(model, prompts, CachePolicy(32), **options)
    found["rollout: pte, plain"] = lambda: rollout(model, prompts, CachePolicy(32), reference=True, **options)
    return found


def measure() -> dict[str, dict[str, int]]:
    return {name: count(job) for name, job in jobs().items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write docs/benchmarks/baselines.json")
    args = parser.parse_args()
    found = measure()
    if args.update:
        BASELINES.write_text(json.dumps({"cpu": found}, indent=1) + "\n")
    committed = json.loads(BASELINES.read_text())["cpu"]
    rows = []
    for name, counts in found.items():
        before = committed.get(name, counts)
        row = {
            "job": name,
            "peak MB": counts["peak_bytes"] / 1e6,
            "over baseline": counts["peak_bytes"] / before["peak_bytes"],
        }
        rows.append(row | {"GFLOP": counts["flops"] / 1e9, "over its baseline": counts["flops"] / before["flops"]})
    print_table(rows)


if __name__ == "__main__":
    main()
