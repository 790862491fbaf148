"""A training step's time and peak memory over the completion's length, each over LoRA with the full cache.

    python -m benchmarks.step
    python -m benchmarks.step --shape qwen2.5-3b --lengths 3072 16384 --device cuda

Forward, backward and the optimizer's step of one micro-batch (`--batch`), arms as in `benchmarks/training.py`.
Memory is the most that is alive at once: `step MB` beyond weights and optimizer, `peak MB` with both; counted tensor
by tensor on a CPU, by torch on a GPU. With `--uncomputed` nothing is computed, on a CPU: the same bytes of a
step that would take hours, and no times.
"""

import argparse
import statistics
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from benchmarks.common import finish, options, parse
from benchmarks.measure import Uncomputed, is_cuda, peak_bytes, ratio, take_turns
from benchmarks.training import ARMS, add_options, arms, tokens

LORA = "lora, full cache"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = options(__doc__)
    add_options(parser, [512, 1024, 2048, 4096])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--uncomputed", action="store_true", help="memory only, of large shapes on a small machine")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS))
    args = parse(parser, argv)
    if args.uncomputed and is_cuda(args.device):
        parser.error("--uncomputed: counts tensors on a CPU; allowed with --device cpu")
    return args


class Trained:
    """One arm with an optimizer of its own."""

    def __init__(self, model: nn.Module, step):
        self.model, self.step = model, step
        self.optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-6)

    def __call__(self, ids: Tensor) -> None:
        self.step(ids).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def resident_bytes(self) -> int:
        """Weights and the optimizer's two moments: what stays between steps."""
        moments = [x for state in self.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        return sum(x.nbytes for x in [*self.model.parameters(), *self.model.buffers(), *moments])


def measured(args: argparse.Namespace) -> list[dict]:
    trained = {name: Trained(*arm) for name, arm in arms(args, [x for x in ARMS if x in {LORA, *args.arms}]).items()}
    rows = []
    for length in args.lengths:
        ids = tokens(args, length)
        jobs = {name: lambda arm=arm, ids=ids: arm(ids) for name, arm in trained.items()}
        for arm in trained.values():
            arm(tokens(args, args.window))  # so that the optimizer's moments are there
        times = {} if args.uncomputed else take_turns(jobs, args.turns, args.device, args.clock)
        held = {name: peak_bytes(job, args.device) for name, job in jobs.items()}
        peaks = {name: held[name] + arm.resident_bytes for name, arm in trained.items()}
        rows += [
            {
                "completion": length,
                "arm": name,
                "seconds": "-" if args.uncomputed else statistics.median(times[name]),
                "time over lora": "-" if args.uncomputed else ratio(times[name], times[LORA]),
                "step MB": held[name] / 1e6,
                "peak MB": peaks[name] / 1e6,
                "step memory over lora": held[name] / held[LORA],
                "peak over lora": peaks[name] / peaks[LORA],
            }
            for name in trained
        ]
    return rows


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    with Uncomputed() if args.uncomputed else nullcontext():
        rows = measured(args)
    finish("step", args, rows)


if __name__ == "__main__":
    main()
