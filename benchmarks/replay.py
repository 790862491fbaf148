"""What a replay costs over ordinary LoRA training: forward and backward of one batch, timed side by side.

    python -m benchmarks.replay --clock cpu
    python -m benchmarks.replay --shape qwen2.5-3b --lengths 3072 16384 --prompt 512 --window 512 --device cuda
    python -m benchmarks.replay --clock cpu --arms pte "pte sum" "pte gated_sum" "pte delta" "pte write_gate"
    python -m benchmarks.replay --shape qwen2.5-3b --arms lora_c pte --attention blocks flex --device cuda

Every arm has gradient checkpointing, TRL's fused LM head, and the same rank. `lora` runs an ordinary causal forward
on q and o; it is what the others are divided by. Arms take turns and every turn gives one ratio, so that a machine
that slows down for a while slows down both sides of it; the median of the ratios is reported. The last column adapts
the same modules in both: it leaves the cost of the replay alone, without that of adapting more layers. The
encoder's options are arms that run if named.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.common import finish, options, parse
from benchmarks.measure import ratio, take_turns
from benchmarks.models import ENCODERS, random_model, shared_copy, with_adapter
from pte_trl.cache.schedule import Schedule
from pte_trl.compat.trl import add_fused_lm_head
from pte_trl.replay.plan import replay_inputs

FEW, ATTENTION = ["q_proj", "o_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"]
ATTENTIONS = {"blocks": "blockwise", "flex": "blockwise_flex"}  # of the replayed arms
# arm: (adapter, adapted modules, replayed under the window, ordinary LoRA on the same modules)
ARMS = {
    "lora": ("lora", FEW, False, "lora"),
    "lora qkvo": ("lora", ATTENTION, False, "lora qkvo"),
    "lora_c": ("lora", FEW, True, "lora"),
    "pte": ("pte", FEW, True, "lora"),
    "pte sum": ("pte sum", FEW, True, "lora"),
    "pte qkvo": ("pte", ATTENTION, True, "lora qkvo"),
}
USUAL = list(ARMS)
ARMS |= {f"pte {name}": (f"pte {name}", FEW, True, "lora") for name in ENCODERS if f"pte {name}" not in ARMS}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024], help="prompt and completion together")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=USUAL)
    parser.add_argument(
        "--attention",
        nargs="+",
        choices=tuple(ATTENTIONS),
        default=["blocks"],
        help="of the replays; flex is compiled and for CUDA, elsewhere it is the blocks",
    )
    parser.add_argument("--seed", type=int, default=0)
    return parse(parser, argv)


def step_of(arm: str, attention: str, base: nn.Module, args: argparse.Namespace) -> Callable[[Tensor], None]:
    """One forward and backward of the arm for token ids (batch, prompt + completion)."""
    adapter, targets, replayed, _ = ARMS[arm]
    model = shared_copy(base, ATTENTIONS[attention])
    add_fused_lm_head(model)
    model = with_adapter(model, adapter, targets, args.rank)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()

    def step(tokens: Tensor) -> None:
        mask, labels = torch.ones_like(tokens), tokens.clone()
        labels[:, : args.prompt] = -100
        # The plan and the mask belong to the price of a replay, so they are built inside.
        extra = (
            replay_inputs(model, mask, args.prompt, Schedule(args.window)) if replayed else {"attention_mask": mask}
        )
        # As the trainer does: a float32 adapter beside bfloat16 weights, under autocast.
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            out = model(input_ids=tokens, labels=labels, fused_lm_head=True, **{"use_cache": False, **extra})
        out.loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    # The arms that others are divided by always run.
    arms = [arm for arm in ARMS if arm in args.arms or arm in {"lora", *(ARMS[other][3] for other in args.arms)}]
    base = random_model(args.shape, args.seed, args.device, getattr(torch, args.dtype))
    # An arm without a replay has no use for another attention.
    cells = [
        (arm, attention) for arm in arms for attention in (args.attention if ARMS[arm][2] else args.attention[:1])
    ]
    steps, rows = {cell: step_of(*cell, base, args) for cell in cells}, []
    for length in args.lengths:
        generator = torch.Generator().manual_seed(args.seed)
        tokens = torch.randint(base.config.vocab_size, (args.batch, length), generator=generator).to(args.device)
        jobs = {cell: lambda step=step, tokens=tokens: step(tokens) for cell, step in steps.items()}
        times = take_turns(jobs, args.repeats, args.device, args.clock)
        rows += [
            {
                "length": length,
                "arm": arm,
                "attention": attention,
                "seconds": statistics.median(times[arm, attention]),
                "over lora": ratio(times[arm, attention], times["lora", args.attention[0]]),
                "over lora, same modules": ratio(times[arm, attention], times[ARMS[arm][3], args.attention[0]]),
            }
            for arm, attention in cells
        ]
    finish("replay", args, rows)


if __name__ == "__main__":
    main()
