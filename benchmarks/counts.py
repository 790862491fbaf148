"""Kernel launches and bytes moved, counted by operation: they say what a GPU would do, and are the same everywhere.

An operation that computes something is one launch, and reads and writes its tensors once. Views and uninitialised
memory are free. On a GPU some operations are more than one kernel, so a count is a lower bound there.
"""

import math
from collections import Counter

from torch import Tensor

from benchmarks.measure import tensors_in
from pte_trl.compat.torch import TorchDispatchMode, schema_of

# They return new tensors, but nothing is computed.
FREE = {
    *(f"aten::{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")),
    *(f"aten::{name}" for name in ("_unsafe_view", "detach", "lift_fresh", "_local_scalar_dense", "promote_types")),
}


def moved(tensor: Tensor) -> int:
    """Bytes that one pass over the tensor touches; elements repeated by `expand` count once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * math.prod(size if stride else min(size, 1) for size, stride in sizes)


class Counts(TorchDispatchMode):
    """Counts what runs inside, on any device, backward passes included.

    Attributes:
        launches: by name of the operation.
        bytes: read and written, by name of the operation.
    """

    def __init__(self):
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        schema = schema_of(func)
        views = not schema.is_mutable and any(x.alias_info is not None for x in schema.returns)
        if not views and schema.name not in FREE:
            self.launches[schema.name] += 1
            self.bytes[schema.name] += sum(map(moved, tensors_in((args, kwargs, out))))
        return out
