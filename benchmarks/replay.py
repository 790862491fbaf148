"""What a replay costs over ordinary LoRA training: forward and backward of one batch, timed side by side.

    python -m benchmarks.replay --shape tiny --length 1024 --window 256
    python -m benchmarks.replay --shape smollm2-135m --length 1024 --window 256 --repeats 3

Every arm has gradient checkpointing, TRL's fused LM head, and the same rank. `lora` runs an ordinary causal forward
on q and o; it is what the others are divided by. Arms take turns and every turn gives one ratio, so that a machine
that slows down for a while slows down both sides of it; the median of the ratios is reported. The last column adapts
the same modules in both: it leaves the cost of the replay alone, without that of adapting more layers.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from trl.trainer.utils import add_fused_lm_head

from benchmarks.common import SHAPES, environment, print_environment, print_table, random_model, record
from pte_trl import PteConfig, replay_inputs

FEW, ATTENTION = ["q_proj", "o_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"]
# arm: (adapter, adapted modules, replayed under the window, ordinary LoRA on the same modules)
ARMS = {
    "lora": ("lora", FEW, False, "lora"),
    "lora qkvo": ("lora", ATTENTION, False, "lora qkvo"),
    "lora_c": ("lora", FEW, True, "lora"),
    "pte": ("pte", FEW, True, "lora"),
    "pte sum": ("pte sum", FEW, True, "lora"),
    "pte qkvo": ("pte", ATTENTION, True, "lora qkvo"),
}
# "cpu" counts the work of this process alone, all threads together: for a busy machine, with OMP_NUM_THREADS=1.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def adapted(adapter: str, targets: list[str], args: argparse.Namespace) -> nn.Module:
    model = random_model(args.shape, args.seed, args.device, getattr(torch, args.dtype))
    add_fused_lm_head(model)
    if adapter == "lora":
        config = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=targets)
    else:
        rule = "sum" if adapter == "pte sum" else "recursive"
        sizes = {"rank": args.rank, "num_global_tokens": args.rank, "alpha": args.rank}
        config = PteConfig(**sizes, target_modules=targets, state_update=rule)
    model = get_peft_model(model, config)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return model.train()


def step_of(arm: str, args: argparse.Namespace) -> Callable[[], None]:
    """One forward and backward of the arm, on the same tokens as every other."""
    adapter, targets, replayed, _ = ARMS[arm]
    model = adapted(adapter, targets, args)
    # An up-projection of zero would keep gradients out of the encoder; trained adapters have none.
    for name, parameter in model.named_parameters():
        if "pte_up" in name or "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    generator = torch.Generator().manual_seed(args.seed)
    vocabulary = model.config.vocab_size
    tokens = torch.randint(vocabulary, (args.batch, args.length), generator=generator).to(args.device)
    labels = tokens.clone()
    labels[:, : args.prompt] = -100
    mask = torch.ones_like(tokens)

    def step() -> None:
        # The plan and the mask belong to the price of a replay, so they are built inside.
        extra = replay_inputs(model, mask, args.prompt, args.window) if replayed else {"attention_mask": mask}
        out = model(input_ids=tokens, labels=labels, fused_lm_head=True, **{"use_cache": False, **extra})
        out.loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def seconds(step: Callable[[], None], device: str, clock: Callable[[], float]) -> float:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    began = clock()
    step()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return clock() - began


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="tiny")
    parser.add_argument("--length", type=int, default=1024, help="prompt and completion together")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="append to docs/benchmarks/replay.json")
    return parser.parse_args()


def main() -> None:
    args = parse()
    about = environment(args.device)
    print_environment(about)
    # The arms that others are divided by always run.
    arms = [arm for arm in ARMS if arm in args.arms or arm in {ARMS[other][3] for other in ["pte", *args.arms]}]
    steps = {arm: step_of(arm, args) for arm in arms}
    for step in steps.values():
        step()
    times = {arm: [] for arm in arms}
    for turn in range(args.repeats):
        # The order turns too: no arm always follows the same one.
        for arm in arms[turn % len(arms) :] + arms[: turn % len(arms)]:
            times[arm].append(seconds(steps[arm], args.device, CLOCKS[args.clock]))

    def ratio(arm: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(times[arm], times[other], strict=True))

    rows = [
        {
            "arm": arm,
            "seconds": statistics.median(times[arm]),
            "over lora": ratio(arm, "lora"),
            "over lora, same modules": ratio(arm, ARMS[arm][3]),
        }
        for arm in arms
    ]
    print_table(rows)
    if args.record:
        print(record("replay", about, vars(args), rows))


if __name__ == "__main__":
    main()
