"""CUDA graphs of the fake GPU (tests/fake_cuda.py): a capture records and computes nothing, a replay repeats it.

A graph reads and writes the memory of its capture. So a replay fails where that memory was freed; a value that the
host has put in while capturing stays what it was; and temporary tensors of a graph are NaN until it is replayed, and
again when another graph of its pool is.
"""

import weakref
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


class FreedMemory(RuntimeError):
    """A graph is replayed whose inputs were freed since its capture."""


class DeadPool(RuntimeError):
    """A capture into a pool whose graphs are all gone: torch's allocator asserts that it has users."""


class Memory:
    """Which tensors of the device use a piece of memory: when none is left, it counts as freed."""

    users: ClassVar[dict[int, weakref.WeakSet]] = {}

    @classmethod
    def of(cls, inner: Tensor) -> weakref.WeakSet:
        return cls.users.setdefault(inner.untyped_storage()._cdata, weakref.WeakSet())


class Pools:
    """Handles of memory pools, and the graphs in each."""

    def __init__(self):
        self.graphs: dict[int, weakref.WeakSet] = {}
        self.used: set[int] = set()

    def new(self) -> int:
        handle = len(self.graphs) + 1
        self.graphs[handle] = weakref.WeakSet()
        return handle

    def join(self, handle: int | None, graph: "Graph") -> weakref.WeakSet:
        """All graphs of the pool, with this one."""
        handle = self.new() if handle is None else handle
        graphs = self.graphs[handle]
        if not graphs and handle in self.used:
            raise DeadPool("capture into a pool whose graphs were freed; take a new torch.cuda.graph_pool_handle()")
        self.used.add(handle)
        graphs.add(graph)
        return graphs


class Graph:
    """`torch.cuda.CUDAGraph`."""

    def __init__(self, device):
        self.device = weakref.proxy(device)
        self.steps: list[tuple] = []  # operation, arguments, results
        self.own: dict[int, Tensor] = {}  # temporary tensors by their storage
        self.inputs: dict[int, Tensor] = {}  # one tensor of each storage from outside

    @contextmanager
    def capture(self, pool=None, capture_error_mode: str = "global", **options):
        """Raises DeadPool, and AssertionError where another thread's call to the device would break the capture."""
        assert capture_error_mode == "thread_local", f"capture_error_mode={capture_error_mode!r}"
        self.pool = self.device.pools.join(pool, self)
        self.device.capturing = self
        try:
            yield
        finally:
            self.device.capturing = None
        self.device.captured += 1

    def record(self, func, args, kwargs, view: bool):
        """What the operation returns, while it is captured."""
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                key = x.untyped_storage()._cdata
                if key not in self.own:
                    self.inputs[key] = x
        if view:
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            self.steps.append((func, args, kwargs, None))
            return None
        out = func(*args, **kwargs)  # for its shape
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.own.update((x.untyped_storage()._cdata, x) for x in results)
        self.steps.append((func, args, kwargs, results))
        poison(results)
        return out

    def replay(self) -> None:
        freed = [tuple(x.shape) for x in self.inputs.values() if not Memory.of(x)]
        if freed:
            raise FreedMemory(f"a graph reads memory freed since its capture, of a tensor of shape {freed[0]}")
        # Plain tensors of the CPU, so the device need not look at them.
        with torch.no_grad(), torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
            for graph in self.pool:
                poison(graph.own.values())
            for func, args, kwargs, results in self.steps:
                out = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
                for kept, new in zip(results or (), out, strict=bool(results)):
                    kept.copy_(new)
        self.device.replays += 1


def poison(tensors) -> None:
    """NaN where a tensor can hold it; whole numbers may be indices, which would be out of range."""
    for x in tensors:
        if x.is_floating_point():
            x.fill_(torch.nan)
