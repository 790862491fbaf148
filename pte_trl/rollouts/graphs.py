"""A function that is captured as a CUDA graph, where what it calls can be captured."""

import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from pte_trl.rollouts.compiled import say


class CudaGraphed:
    """A function that changes tensors in place: called as it is, on CUDA captured at its second call and replayed.

    A graph is kept per arguments, which have to be plain values. It reads and writes the memory addresses of its
    capture, so the function may use only tensors that stay the same objects, and must not wait for the device. A
    function that is not `known` to keep to the latter is watched: where it waits in two calls with the same arguments,
    it is never captured, and that is printed.

    Args:
        on: whether graphs are captured: on CUDA.
        known: whether the function is known not to wait; if it does, its capture raises.
    """

    def __init__(self, function: Callable[..., None], on: bool, known: bool = True):
        self.function, self.on, self.known = function, on, known
        self.waited: set[tuple] = set()  # arguments with which a call has waited
        self.clear()

    def __call__(self, *key) -> None:
        if not self.on:
            self.function(*key)
        elif key not in self.graphs:
            # The first call runs the kernels: it is a real step, and what CUDA libraries set up lazily (handles,
            # workspaces, autotuning) is done then, since a capture forbids it.
            self._first(key) if self.known else self._watched(key)
        else:
            if self.graphs[key] is None:
                self.graphs[key] = self._captured(key)
            self.graphs[key].replay()

    def _first(self, key: tuple) -> None:
        self.graphs[key] = None
        self.function(*key)

    def _captured(self, key: tuple) -> torch.cuda.CUDAGraph:
        """Records, computes nothing."""
        graph = torch.cuda.CUDAGraph()
        # Other threads may ask the device meanwhile: NCCL's watchdog does, and `pte_trl.runtime.efficiency`.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            self.function(*key)
        return graph

    def _watched(self, key: tuple) -> None:
        """A call that counts as the first one if it does not wait for the device; the one before may have set up."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")  # not "error": a step that breaks off cannot be repeated
        try:
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                self.function(*key)
        finally:
            torch.cuda.set_sync_debug_mode(before)
        waits = [warning for warning in found if "synchronizing CUDA operation" in str(warning.message)]
        if not waits:
            self.graphs[key] = None
        elif key in self.waited:
            self.on = False
            self.clear()
            where = f"{Path(waits[0].filename).name}, line {waits[0].lineno}"
            say(f"rollout: decode steps are not captured as CUDA graphs: the host waits for the device in {where}")
        else:
            self.waited.add(key)

    def clear(self) -> None:
        """Drops all graphs."""
        self.graphs: dict[tuple, torch.cuda.CUDAGraph | None] = {}
        # One pool for all graphs: they never run at the same time, so their temporary tensors can share memory. A new
        # one, since a pool whose last graph was freed takes no other as long as the allocator holds memory of it.
        self.pool = torch.cuda.graph_pool_handle() if self.on else None
