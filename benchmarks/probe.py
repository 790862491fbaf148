"""Can the state learn at all? Recall of digits that have left the window, taught by supervision.

    python -m benchmarks.probe
    python -m benchmarks.probe --read column --seed 1

The task is that of `benchmarks/recall.py`; chance is 0.10. A small base model learns it with full attention and is
frozen. Adapters are then trained under the window, by cross-entropy on the answers, through the replay. The last row
tests the trained PTE adapter with its encoding of evicted tokens switched off: what it recalls must be gone, or it
did not come from the state.
"""

import argparse
import copy
from contextlib import contextmanager

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.common import print_environment, print_table, record
from benchmarks.recall import PROMPT, Recall, recall, train
from pte_trl import PteConfig
from pte_trl.adapter.calibration import calibrate
from pte_trl.adapter.model import pte_layers
from pte_trl.cache.schedule import Schedule
from pte_trl.runtime.manifest import environment


def base_model(task: Recall, hidden: int, layers: int, seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=task.vocabulary,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=3 * hidden,
            initializer_range=hidden**-0.5,
        )
    )


def lora_arm(base: nn.Module, args: argparse.Namespace) -> nn.Module:
    return get_peft_model(base, LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=args.targets))


def pte_arm(base: nn.Module, args: argparse.Namespace, task: Recall) -> nn.Module:
    config = PteConfig(
        rank=args.rank,
        num_global_tokens=args.rank,
        alpha=args.rank,
        target_modules=args.targets,
        read=args.read,
        state_update=args.state_update,
        init_ratio=args.init_ratio,
    )
    model = get_peft_model(base, config)
    # Calibration reads the last tokens of what it is given: the sequences end here with their pairs.
    pairs = task.draw(256, torch.Generator().manual_seed(args.seed))[0][:, : PROMPT + task.names]
    found = calibrate(model, pairs, torch.ones_like(pairs), task.schedule.evict)
    print(f"  |S'|/|S| before calibration {', '.join(f'{x:.3g}' for x in found)}; after {args.init_ratio:g}")
    return model


@contextmanager
def encoding_off(model: nn.Module):
    """Evictions leave S at S_0."""
    configs = [config for layer in pte_layers(model) for config in layer.config.values()]
    for config in configs:
        config.encode_evicted = False
    try:
        yield
    finally:
        for config in configs:
            config.encode_evicted = True


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--read", choices=("row", "column"), default="row")
    parser.add_argument("--state-update", choices=("recursive", "sum"), default="recursive")
    parser.add_argument("--targets", nargs="+", default=["q_proj", "o_proj"])
    parser.add_argument("--init-ratio", type=float, default=0.25)
    parser.add_argument("--rank", type=int, default=16, help="also the number of global tokens")
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--names", type=int, default=4, help="digits to remember")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--base-steps", type=int, default=200)
    parser.add_argument("--base-lr", type=float, default=2e-3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=8e-3)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="append to docs/benchmarks/probe.json")
    return parser.parse_args()


def main() -> None:
    args = parse()
    about = environment()
    print_environment(about)
    task = Recall(args.names, Schedule(args.window), args.layers)
    bounded = task.schedule
    base = base_model(task, args.hidden, args.layers, args.seed)
    seconds = train(base, task, None, args.base_steps, args.batch, args.base_lr, args.seed, "base")
    base.requires_grad_(False)
    rows = [
        {"model": "base, full cache", "recall": recall(base, task, None), "seconds": seconds},
        {"model": "base, window", "recall": recall(base, task, bounded), "seconds": 0.0},
    ]
    for name in ("lora_c", "pte"):
        torch.manual_seed(args.seed)
        fresh = copy.deepcopy(base)
        model = lora_arm(fresh, args) if name == "lora_c" else pte_arm(fresh, args, task)
        seconds = train(model, task, bounded, args.steps, args.batch, args.lr, args.seed + 1, name)
        rows.append({"model": name, "recall": recall(model, task, bounded), "seconds": seconds})
    with encoding_off(model):
        rows.append({"model": "pte, encoding off", "recall": recall(model, task, bounded), "seconds": 0.0})
    print_table(rows)
    if args.record:
        print(record("probe", about, vars(args), rows))


if __name__ == "__main__":
    main()
