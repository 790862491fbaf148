"""Long generation: a step's time late in a completion over its time early, and the memory at both.

    python -m benchmarks.long
    python -m benchmarks.long --shape qwen2.5-3b --batch 16 --window 512 --cycles 4 --device cuda

The rollout is left as it is: a hook on the embeddings notes the time of every step or, where a captured CUDA graph is
replayed instead of calling the model, of every replay. Times are summed over whole eviction cycles around both tokens,
so that each holds its share of evictions; the median over the cycles is compared. Memory: what torch has allocated on
a GPU; on a CPU all tensors that Python holds, counted at both tokens.
"""

import argparse
import itertools
import statistics
from collections import defaultdict
from contextlib import contextmanager

import torch
from torch import nn

from benchmarks.common import finish, options, parse
from benchmarks.measure import CLOCKS, is_cuda, tensor_bytes
from benchmarks.models import random_model, with_adapter
from pte_trl import Schedule
from pte_trl.rollout import rollout


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--early", type=int, default=1_000, help="a token whose step is timed")
    parser.add_argument("--late", type=int, default=60_000, help="the other one")
    parser.add_argument("--cycles", type=int, default=8, help="eviction cycles around each")
    args = parse(parser, argv)
    args.half = args.cycles * Schedule(args.window).evict // 2
    if not args.window + args.half <= args.early < args.late - 2 * args.half:
        parser.error(
            f"--early {args.early} --late {args.late}: {args.cycles} cycles around each overlap, or reach into the "
            f"{args.window} tokens before the first eviction; allowed are fewer cycles or tokens further apart"
        )
    return args


class Marks:
    """When each step began, and how much memory there was."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.cuda = args, is_cuda(args.device)
        self.times = defaultdict(list)  # by what was run: the model's code, or one of the graphs captured of it
        self.bytes = defaultdict(dict)  # likewise: number of the step -> bytes

    def mark(self, source) -> None:
        if self.cuda and torch.cuda.is_current_stream_capturing():
            return
        marks = self.times[id(source)]
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            marks.append(event)
        else:
            marks.append(CLOCKS[self.args.clock]())
        if self.cuda and len(marks) % 64 == 0:
            self.bytes[id(source)][len(marks)] = torch.cuda.memory_allocated(self.args.device)
        elif not self.cuda and len(marks) in (self.args.early, self.args.late):  # it takes long to count
            self.bytes[id(source)][len(marks)] = tensor_bytes()

    @contextmanager
    def taken(self, model: nn.Module):
        embeddings = model.get_input_embeddings()  # every token goes through them once, whatever calls the layers
        handle = embeddings.register_forward_pre_hook(lambda module, _: self.mark(module))
        replay = torch.cuda.CUDAGraph.replay

        def marked(graph) -> None:
            self.mark(graph)
            replay(graph)

        torch.cuda.CUDAGraph.replay = marked
        try:
            yield self
        finally:
            torch.cuda.CUDAGraph.replay = replay
            handle.remove()

    def at(self, token: int, count: int, cycle: int) -> tuple[float, int]:
        """(seconds per token, bytes) there: the median over the cycles around it; `count` tokens were sampled."""
        source = max(self.times, key=lambda source: len(self.times[source]))  # graphs of evictions are run less often
        marks, held = self.times[source], self.bytes[source]
        if len(marks) < 0.99 * count:
            raise RuntimeError(f"{len(marks)} steps seen of {count} tokens: one call may feed several tokens")
        # Counted from the end, whatever was run before the first token to warm up or to be captured.
        step = len(marks) - count + token
        edges = [marks[i] for i in range(step - self.args.half, step + self.args.half + 1, cycle)]
        between = itertools.pairwise(edges)
        spent = [a.elapsed_time(b) / 1e3 if self.cuda else b - a for a, b in between]
        return statistics.median(spent) / cycle, held[min(held, key=lambda taken: abs(taken - step))]


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    base = random_model(args.shape, seed=0, device=args.device, dtype=getattr(torch, args.dtype))
    model, cycle = with_adapter(base, "pte").eval(), Schedule(args.window).evict
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, 500, (args.batch, args.prompt), generator=generator).tolist()
    count = args.late + args.half + 1
    knobs = {"window": args.window, "eos_token_ids": [-1], "pad_token_id": 0}
    rollout(model, prompts, max_new_tokens=args.window + 2 * cycle, **knobs)  # warms up, evictions included
    with Marks(args).taken(model) as marks:
        rollout(model, prompts, max_new_tokens=count, **knobs)
        if marks.cuda:
            torch.cuda.synchronize(args.device)
    step, held = {}, {}
    for token in (args.early, args.late):
        step[token], held[token] = marks.at(token, count, cycle)
    rows = [
        {
            "token": token,
            "step ms": 1e3 * step[token],
            "over early": step[token] / step[args.early],
            "memory MB": held[token] / 1e6,
            "memory over early": held[token] / held[args.early],
        }
        for token in step
    ]
    finish("long", args, rows)


if __name__ == "__main__":
    main()
