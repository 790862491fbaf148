"""Launches of a decode step: how many operations or kernels each decoder layer starts, eagerly and compiled.

    python -m benchmarks.launches --dtype bfloat16
    python -m benchmarks.launches --shape qwen2.5-3b --device cuda

Counted without a GPU: eagerly, every operation that is no view and allocates more than memory; compiled, every kernel
that the compiler has left after fusion, and what runs beside it. It fuses less for a CPU than for a GPU, where torch's
profiler counts the kernels themselves. In bfloat16 the step runs under autocast, as in training, with adapters in
float32. Each count is the difference between a model of four layers and one of two, over two.
"""

import argparse
from collections.abc import Callable

import torch

from benchmarks.common import options, parse, print_table
from benchmarks.measure import is_cuda
from benchmarks.models import random_model, with_adapter
from pte_trl.cache.schedule import Schedule
from pte_trl.compat.torch import TorchDispatchMode, gpu_kernels, nodes_after_fusion, schema_of
from pte_trl.rollouts.compiled import PARTS, between_attentions
from pte_trl.rollouts.engine import Engine, Room
from pte_trl.rollouts.sampling import Sampling

ADAPTERS = {"bare": None, "lora_c": "lora", "pte": "pte"}
ROWS, PROMPT, NEW = 4, 8, 12
# They make a tensor and write nothing into it.
SILENT = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::_unsafe_view"}


class Launches(TorchDispatchMode):
    """Counts operations that start a kernel."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        schema = schema_of(func)
        view = not schema.is_mutable and any(x.alias_info is not None for x in schema.returns)
        self.count += not view and schema.name not in SILENT and not schema.name.startswith("prim::")
        return func(*args, **(kwargs or {}))


def kernels_in(call: Callable[[], object], device) -> int:
    """Launches of one call: kernels on a GPU, operations elsewhere."""
    if is_cuda(device):
        return gpu_kernels(call)
    with Launches() as launches:
        call()
    return launches.count


def started(adapter: str | None, layers: int, compile: bool, args: argparse.Namespace) -> tuple[Engine, int]:
    """An engine that has sampled a few tokens and evicted, and the places that its rows hold."""
    dtype = getattr(torch, args.dtype)
    model = random_model(args.shape, 0, args.device, dtype, num_hidden_layers=layers)
    model = (with_adapter(model, adapter) if adapter else model).eval()
    schedules = [Schedule(4)] * ROWS
    room = Room.needed([PROMPT] * ROWS, schedules, NEW)
    engine = Engine(model, ROWS, room, Sampling(NEW, (-1,), 0), compile)
    if compile and not is_cuda(args.device):
        engine.compiled.compile = False  # the same functions, whose calls are looked at one by one
    draws = torch.rand(ROWS, NEW, dtype=torch.float64, device=args.device)
    with precision(args):
        engine.run([[*range(1, PROMPT + 1)]], [0] * ROWS, schedules, draws)
    return engine, room.places


def precision(args: argparse.Namespace) -> torch.autocast:
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.dtype == "bfloat16")


@torch.no_grad()
def of_a_step(adapter: str | None, layers: int, compile: bool, args: argparse.Namespace) -> int:
    """Launches of one step of a model of so many layers."""
    engine, places = started(adapter, layers, compile, args)

    def step() -> None:
        with precision(args):
            engine._feed(ROWS, places)

    count = kernels_in(step, args.device)
    if not compile or is_cuda(args.device):
        return count
    # On a CPU: in place of the operations of each compiled call, what the compiler makes of them.
    calls = []

    def watched(*inputs):
        calls.append(inputs)
        return between_attentions(*inputs)

    engine.compiled.parts = (PARTS[0], watched, PARTS[2])
    step()
    eagerly = kernels_in(lambda: between_attentions(*calls[0]), args.device)
    fused = len(nodes_after_fusion(between_attentions, calls[0]))
    return count + len(calls) * (fused - eagerly)


def per_layer(adapter: str, compile: bool, args: argparse.Namespace) -> float:
    """Launches of a decode step for each decoder layer."""
    few, many = (of_a_step(ADAPTERS[adapter], layers, compile, args) for layers in (2, 4))
    return (many - few) / 2


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--adapters", nargs="+", choices=list(ADAPTERS), default=list(ADAPTERS))
    return parse(parser, argv)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    print_table(
        [
            {"adapter": name, "eager": per_layer(name, False, args), "compiled": per_layer(name, True, args)}
            for name in args.adapters
        ]
    )


if __name__ == "__main__":
    main()
