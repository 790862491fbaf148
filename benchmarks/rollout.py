"""Rollout speed: PTE over LoRA-c under the same window, and both over `generate` with the full cache.

    python -m benchmarks.rollout
    python -m benchmarks.rollout --shape smollm2-135m --batch 16 --new-tokens 2048 --window 256

The arms take turns within one run and every arm samples from the same random weights; ratios are medians of the
turns. Ending tokens are off: every completion has the full length. Time is that of the process on a CPU, which other
programs disturb less than the clock on the wall, and wall time on a GPU. `--arms bounded` leaves `generate` out: many
short turns tell two arms of nearly the same speed apart better than a few long ones.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model

from benchmarks.common import environment, print_environment, print_table, random_model, record
from pte_trl import PteConfig
from pte_trl.rollout import eval_mode, rollout

TARGETS = ["q_proj", "o_proj"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="tiny")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=2048)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--arms", default="all", choices=("all", "bounded"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--record", action="store_true", help="append to docs/benchmarks/rollout.json")
    return parser.parse_args()


def bounded(model, prompts: list[list[int]], args: argparse.Namespace) -> int:
    """Tokens sampled by our rollout."""
    result = rollout(
        model,
        prompts,
        window=args.window,
        max_new_tokens=args.new_tokens,
        eos_token_ids=[-1],
        pad_token_id=0,
    )
    return sum(map(len, result.completion_ids))


@torch.no_grad()
def full_cache(model, prompts: list[list[int]], args: argparse.Namespace) -> int:
    """Tokens sampled by transformers' `generate` with its own growing cache."""
    ids = torch.tensor(prompts, device=args.device)
    with eval_mode(model):
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            max_new_tokens=args.new_tokens,
            min_new_tokens=args.new_tokens,
            pad_token_id=0,
            eos_token_id=None,
        )
    return out[:, ids.shape[1] :].numel()


def arms(args: argparse.Namespace) -> dict[str, Callable[[list[list[int]]], int]]:
    def base():
        return random_model(args.shape, seed=0, device=args.device, dtype=getattr(torch, args.dtype))

    pte = get_peft_model(base(), PteConfig(target_modules=TARGETS))
    lora = get_peft_model(base(), LoraConfig(r=32, target_modules=TARGETS, task_type="CAUSAL_LM"))
    runs = {
        "pte, window": lambda prompts: bounded(pte, prompts, args),
        "lora_c, window": lambda prompts: bounded(lora, prompts, args),
    }
    if args.arms == "all":
        runs["lora, generate, full cache"] = lambda prompts: full_cache(lora, prompts, args)
    return runs


def main() -> None:
    args = parse_arguments()
    settings = environment(args.device)
    print_environment(settings)
    runs = arms(args)
    vocabulary = 500
    prompts = torch.randint(1, vocabulary, (args.batch, args.prompt)).tolist()
    speeds = {name: [] for name in runs}
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    for _ in range(args.turns):
        for name, run in runs.items():
            began = clock()
            speeds[name].append(run(prompts) / (clock() - began))
    rows = []
    for name, mine in speeds.items():
        row = {"arm": name, "tokens/s": round(statistics.median(mine))}
        for other in list(speeds)[1:]:
            row[f"over {other}"] = statistics.median(a / b for a, b in zip(mine, speeds[other], strict=True))
        rows.append(row)
    print_table(rows)
    if args.record:
        print(f"recorded in {record('rollout', settings, vars(args), rows)}")


if __name__ == "__main__":
    main()
