"""Where the time of a decode step goes: wall time with captured graphs and without, and the kernels by time.

    python -m benchmarks.profile_decode --window 128
    python -m benchmarks.profile_decode --shape qwen2.5-3b --batch 64 --prompt 512 --window 512 --device cuda

The steps that are watched begin a few tokens after the window has been full for the first time, and no eviction falls
among them. `captured` replays a CUDA graph per step, `not captured` queues the kernels one by one; on a CPU, where
nothing is captured, both are the same. What is counted as a launch is every kernel, copy and fill on the GPU; on a
CPU every operator.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import finish, options, parse
from benchmarks.measure import is_cuda, synchronize
from benchmarks.models import random_model, shared_copy, with_adapter
from pte_trl.cache.policy import CachePolicy
from pte_trl.cache.schedule import Schedule
from pte_trl.rollouts.batching import EngineCache
from pte_trl.rollouts.engine import CudaGraphed
from pte_trl.rollouts.rollout import rollout

ADAPTERS = {"pte": "pte", "lora_c": "lora", "bare": None}
BEFORE = 4  # steps between the first eviction and the steps that are watched: graphs are captured at their second call
NAME = 90  # characters of a kernel's name


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20, help="decode steps that are watched")
    parser.add_argument("--top", type=int, default=25, help="kernels that are printed")
    parser.add_argument("--arms", nargs="+", choices=tuple(ADAPTERS), default=["pte", "lora_c"])
    args = parse(parser, argv)
    most = Schedule(args.window).evict - BEFORE - 1
    if not 0 < args.steps <= most:
        parser.error(f"--steps {args.steps}: an eviction would fall among them; allowed are 1 to {most}")
    return args


class Watch:
    """Calls `begin` before one step of the engine, and `end` after the `steps` that follow.

    Args:
        captured: False runs the steps that are watched, and two before them, without graphs.
    """

    def __init__(self, first: int, steps: int, begin: Callable, end: Callable, captured: bool = True):
        self.first, self.steps, self.begin, self.end, self.captured = first, steps, begin, end, captured
        self.count = 0

    def step(self, graphed: CudaGraphed, call: Callable, *key) -> None:
        if self.count == self.first:
            self.begin()
        if self.captured or self.count < self.first - 2:
            call(graphed, *key)
        else:
            graphed.function(*key)
        self.count += 1
        if self.count == self.first + self.steps:
            self.end()

    @contextmanager
    def on(self):
        call = CudaGraphed.__call__

        def watched(graphed: CudaGraphed, *key) -> None:
            if graphed.function.__name__ == "_feed":
                self.step(graphed, call, *key)
            else:
                call(graphed, *key)

        CudaGraphed.__call__ = watched
        try:
            yield
        finally:
            CudaGraphed.__call__ = call
        if self.count < self.first + self.steps:
            raise RuntimeError(f"the rollout had {self.count} steps; {self.first + self.steps} are needed")


def wall_ms(run: Callable[[], None], args: argparse.Namespace, captured: bool) -> float:
    """Of one step."""
    times = []

    def now() -> None:
        synchronize(args.device)
        times.append(time.perf_counter())

    with Watch(args.window + BEFORE, args.steps, now, now, captured).on():
        run()
    return 1e3 * (times[1] - times[0]) / args.steps


def kernels(run: Callable[[], None], args: argparse.Namespace) -> dict[str, tuple[int, float]]:
    """Name -> launches and milliseconds of all steps that are watched."""
    cuda = is_cuda(args.device)
    profiler = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])])

    def end() -> None:
        synchronize(args.device)  # the kernels of the last step are still running
        profiler.stop()

    def begin() -> None:
        synchronize(args.device)
        profiler.start()

    with Watch(args.window + BEFORE, args.steps, begin, end).on():
        run()
    found = defaultdict(lambda: (0, 0.0))
    for event in profiler.events():
        if event.is_user_annotation or (event.device_type == DeviceType.CUDA) != cuda:
            continue
        us = event.time_range.elapsed_us() if cuda else event.self_cpu_time_total
        found[event.name] = (found[event.name][0] + 1, found[event.name][1] + us / 1e3)
    if not found:
        raise RuntimeError("the profiler has seen no kernel")
    return dict(found)


def table(arm: str, found: dict[str, tuple[int, float]], args: argparse.Namespace) -> None:
    """The kernels that take the most time, per step."""
    whole = sum(ms for _, ms in found.values())
    print(f"\n{arm}: per step, of {len(found)} kernels the {args.top} that take the most time")
    print(f"{'launches':>9}{'us':>9}{'share':>8}{'sum':>8}  kernel")
    so_far = 0.0
    for name, (count, ms) in sorted(found.items(), key=lambda item: -item[1][1])[: args.top]:
        so_far += ms
        cut = name if len(name) <= NAME else f"{name[: NAME - 3]}..."
        print(
            f"{count / args.steps:9.1f}{1e3 * ms / args.steps:9.1f}{ms / whole:8.1%}{so_far / whole:8.1%}  {cut}",
            flush=True,
        )


def watched(arm: str, base: nn.Module, args: argparse.Namespace) -> dict:
    model, kept = shared_copy(base), EngineCache()
    model = (with_adapter(model, ADAPTERS[arm]) if ADAPTERS[arm] else model).eval()
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, 500, (args.batch, args.prompt), generator=generator).tolist()
    count = args.window + BEFORE + args.steps + 2

    def run() -> None:
        knobs = {"eos_token_ids": [-1], "pad_token_id": 0, "engine_cache": kept}
        rollout(model, prompts, CachePolicy(args.window), max_new_tokens=count, **knobs)

    run()  # captures
    wall = {captured: wall_ms(run, args, captured) for captured in (True, False)}
    found = kernels(run, args)
    table(arm, found, args)
    launches = sum(count for count, _ in found.values()) / args.steps
    layers = base.config.num_hidden_layers
    return {
        "arm": arm,
        "captured ms": wall[True],
        "not captured ms": wall[False],
        "kernels ms": sum(ms for _, ms in found.values()) / args.steps,
        "launches": launches,
        "launches per layer": launches / layers,
    }


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    base = random_model(args.shape, seed=0, device=args.device, dtype=getattr(torch, args.dtype)).eval()
    rows = [watched(arm, base, args) for arm in args.arms]
    print()
    finish("profile_decode", args, rows)


if __name__ == "__main__":
    main()
