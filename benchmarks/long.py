"""Long generation: a step's time late in a completion over its time early, and the memory at both.

    python -m benchmarks.long
    python -m benchmarks.long --shape qwen2.5-3b --batch 16 --window 512 --device cuda

A machine's speed wanders by more than the few per cent in question while sixty thousand tokens are written. So two
rollouts take turns, cycle of evictions by cycle of evictions: one that has come to the late token, and a fresh one at
the early token. Each pair of cycles, a fraction of a second apart, gives one ratio; the figure is their median. When
the fresh one has come to the end of its cycles the next one begins (`--turns`). The rollouts are what users run: each
has a thread of its own, which waits between two steps. Memory at both tokens is that of the late rollout before the
others begin: what torch has allocated on a GPU; on a CPU all tensors that Python holds.
"""

import argparse
import statistics
import threading
from contextlib import contextmanager

import torch

from benchmarks.common import finish, options, parse
from benchmarks.measure import is_cuda, seconds, tensor_bytes
from benchmarks.models import random_model, with_adapter
from pte_trl.cache.policy import CachePolicy
from pte_trl.cache.schedule import Schedule
from pte_trl.rollouts.engine import CudaGraphed
from pte_trl.rollouts.rollout import rollout

SPARE = 4  # steps behind the last cycle, so that none has the end of a rollout in it


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--early", type=int, default=1_000, help="a token whose step is timed")
    parser.add_argument("--late", type=int, default=60_000, help="the other one")
    parser.add_argument("--cycles", type=int, default=20, help="eviction cycles around each, in every turn")
    parser.add_argument("--turns", type=int, default=5, help="fresh rollouts")
    args = parse(parser, argv)
    args.half = args.cycles * Schedule(args.window).evict // 2
    if not args.window + args.half <= args.early < args.late - 2 * args.half:
        parser.error(
            f"--early {args.early} --late {args.late}: {args.cycles} cycles around each overlap, or reach into the "
            f"{args.window} tokens before the first eviction; allowed are fewer cycles or tokens further apart"
        )
    return args


class Paced(threading.Thread):
    """A job whose rollout goes as many steps as it is told, and then waits.

    Usable inside `paced_steps`. A job that fails raises its error where it was told to go on.
    """

    def __init__(self, job):
        super().__init__(daemon=True)
        self.job, self.left, self.error, self.ended = job, 0, None, False
        self.told, self.waits = threading.Semaphore(0), threading.Semaphore(0)
        self.start()

    def run(self) -> None:
        try:
            self.job()
        except Exception as error:
            self.error = error
        self.ended = True
        self.waits.release()

    def before_step(self) -> None:
        if self.left == 0:
            self.waits.release()
            self.told.acquire()
        self.left -= 1

    def advance(self, steps: int) -> None:
        """From just before one step to just before another; the first call also starts the rollout."""
        self.waits.acquire()
        if not self.ended:
            self.left = steps
            self.told.release()
            self.waits.acquire()
        self.waits.release()  # for the next call
        if self.error:
            raise self.error

    def finish(self) -> None:
        self.advance(SPARE + 1)
        self.join()


@contextmanager
def paced_steps():
    """Lets the engine ask before every step, captured or not, of a thread that is `Paced`."""
    call = CudaGraphed.__call__

    def asking(captured: CudaGraphed, *key) -> None:
        thread = threading.current_thread()
        if captured.function.__name__ == "_feed" and isinstance(thread, Paced):
            thread.before_step()
        call(captured, *key)

    CudaGraphed.__call__ = asking
    try:
        yield
    finally:
        CudaGraphed.__call__ = call


def held_bytes(device) -> int:
    return torch.cuda.memory_allocated(device) if is_cuda(device) else tensor_bytes()


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    base = random_model(args.shape, seed=0, device=args.device, dtype=getattr(torch, args.dtype))
    model, cycle = with_adapter(base, "pte").eval(), Schedule(args.window).evict
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, 500, (args.batch, args.prompt), generator=generator).tolist()

    def begin(count: int) -> Paced:
        options = {"max_new_tokens": count, "eos_token_ids": [-1], "pad_token_id": 0}
        return Paced(lambda: rollout(model, prompts, CachePolicy(args.window), **options))

    def cycle_of(paced: Paced) -> float:
        return seconds(lambda: paced.advance(cycle), args.device, args.clock) / cycle

    steps, ratios = {args.early: [], args.late: []}, []
    with paced_steps():
        late = begin(args.late + (2 * args.turns - 1) * args.half + SPARE)
        late.advance(args.early)
        held = {args.early: held_bytes(args.device)}
        late.advance(args.late - args.half - args.early)
        held[args.late] = held_bytes(args.device)
        for _ in range(args.turns):
            early = begin(args.early + args.half + SPARE)
            early.advance(args.early - args.half)
            for number in range(args.cycles):
                pair = {}
                for token in (args.early, args.late)[:: 1 if number % 2 else -1]:  # neither always follows the other
                    pair[token] = cycle_of(early if token == args.early else late)
                    steps[token].append(pair[token])
                ratios.append(pair[args.late] / pair[args.early])
            early.finish()
        late.finish()
    quarters = statistics.quantiles(ratios, n=4)
    rows = [
        {
            "token": token,
            "step ms": 1e3 * statistics.median(steps[token]),
            "over early": statistics.median(ratios) if token == args.late else 1.0,
            "quartiles": f"{quarters[0]:.3f} to {quarters[2]:.3f}" if token == args.late else "-",
            "memory MB": held[token] / 1e6,
            "memory over early": held[token] / held[args.early],
        }
        for token in steps
    ]
    finish("long", args, rows)


if __name__ == "__main__":
    main()
