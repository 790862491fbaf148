"""Bounded memory: what autograd holds for backward, and the peak of a step, as the completion doubles.

    python -m benchmarks.memory
    python -m benchmarks.memory --shape qwen2.5-3b --lengths 8192 16384 32768 --offload --device cuda

`saved MB` is the most that was saved for backward at once (`torch.autograd.graph.saved_tensors_hooks`; what gradient
checkpointing computes again inside a layer is not in it); `peak MB` the most alive beyond the weights, counted tensor
by tensor on a CPU, by torch on a GPU. Growth is over the length before. Arms as in `benchmarks/training.py`.
"""

import argparse
import gc

import torch

from benchmarks.common import finish, options, parse
from benchmarks.measure import peak_bytes
from benchmarks.training import ARMS, add_options, arms, tokens


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = options(__doc__)
    add_options(parser, [512, 1024, 2048, 4096])
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS))
    return parse(parser, argv)


class Saved:
    """Counts the bytes of tensors that autograd saves for backward, while it holds them."""

    def __init__(self):
        self.now = self.most = 0

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(lambda tensor: Held(self, tensor), lambda held: held.tensor)


class Held:
    def __init__(self, saved: Saved, tensor: torch.Tensor):
        # Detached: an operation that saves its own result would otherwise hold itself.
        self.saved, self.tensor = saved, tensor.detach()
        saved.now += tensor.nbytes
        saved.most = max(saved.most, saved.now)

    def __del__(self):
        self.saved.now -= self.tensor.nbytes


def saved_bytes(job) -> int:
    gc.collect()
    saved = Saved()
    with saved.hooks():
        job()
    return saved.most


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    chosen, rows, before = arms(args, args.arms), [], {}
    for length in args.lengths:
        ids = tokens(args, length)
        for name, (model, step) in chosen.items():

            def job(model=model, step=step, ids=ids) -> None:
                step(ids).backward()
                model.zero_grad(set_to_none=True)

            job()  # the first call of a shape makes what later ones find
            now = {"saved MB": saved_bytes(job) / 1e6, "peak MB": peak_bytes(job, args.device) / 1e6}
            row = {"completion": length, "arm": name}
            for key, value in now.items():
                past = before.get(name, {}).get(key)
                row |= {key: value, f"{key.split()[0]} growth": value / past if past else "-"}
            rows.append(row)
            before[name] = now
    finish("memory", args, rows)


if __name__ == "__main__":
    main()
