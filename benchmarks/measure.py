"""Time and memory, by device. Jobs take turns; memory is counted tensor by tensor on a CPU, by torch on a GPU."""

import gc
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, ValuesView

import torch
from torch import Tensor

from pte_trl.compat.torch import TorchDispatchMode, schema_of, storage_id, tree_leaves, tree_map_only

# "cpu" counts the work of this process, all its threads together: other programs disturb it less than the wall's.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def is_cuda(device) -> bool:
    return torch.device(device).type == "cuda"


def synchronize(device) -> None:
    if is_cuda(device):
        torch.cuda.synchronize(device)


def seconds(job: Callable[[], object], device, clock: str) -> float:
    """Time of one call, everything that it has put on a GPU included."""
    gc.collect()
    synchronize(device)
    began = CLOCKS[clock]()
    job()
    synchronize(device)
    return CLOCKS[clock]() - began


def take_turns(
    jobs: dict[str, Callable[[], object]], turns: int, device, clock: str, warm_up: bool = True
) -> dict[str, list[float]]:
    """Seconds of every job, `turns` times each. A machine that slows down for a while slows down all of them."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    names = list(jobs)
    if warm_up:
        for job in jobs.values():
            job()
    for turn in range(turns):
        at = turn % len(names)  # the order turns too: no job always follows the same one
        for name in names[at:] + names[:at]:
            times[name].append(seconds(jobs[name], device, clock))
    return times


def ratio(mine: list[float], other: list[float]) -> float:
    """Median over the turns; each turn gives one ratio."""
    return statistics.median(a / b for a, b in zip(mine, other, strict=True))


def tensors_in(values) -> Iterator[Tensor]:
    """The tensors among an operation's arguments or results. torch's own walk of trees is slower."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from tensors_in(values.values())
    elif isinstance(values, (list, tuple, ValuesView)):
        for value in values:
            yield from tensors_in(value)


class Peak(TorchDispatchMode):
    """Counts the bytes of all tensors made inside and alive, and keeps the most: on a CPU nobody else does."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # A view of what was there before, of a weight for example, is nothing new.
        known = {storage_id(x) for x in tensors_in((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in tensors_in(out):
            if (key := storage_id(tensor)) not in known:
                self._count(key, tensor.untyped_storage())
        return out

    def _count(self, key: int, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        if key not in self.alive:
            self.alive.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


# In place, but of a tensor's shape and not of its values.
STRUCTURAL = {f"aten::{name}_" for name in ("set", "resize", "as_strided", "t", "transpose", "squeeze", "unsqueeze")}


class Uncomputed(TorchDispatchMode):
    """What has floating-point results makes them of the right shape and leaves them unwritten: memory without work.

    Every tensor is made and freed as in the real step, so the bytes that are counted are the same. Integers, masks
    and views are as usual; floating-point values, and times, mean nothing. Memory that nobody writes is not taken from
    the machine either.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, schema = kwargs or {}, schema_of(func)
        target = kwargs.get("out", args[0] if args else None)
        if schema.name in STRUCTURAL or all(x.numel() < 2 for x in tensors_in((args, kwargs))):
            return func(*args, **kwargs)  # an optimizer counts its steps in a tensor
        if schema.is_mutable and isinstance(target, Tensor) and target.is_floating_point():
            return target
        shares = any(x.alias_info is not None for x in schema.returns) or schema.name == "aten::_unsafe_view"
        if schema.is_mutable or shares:
            return func(*args, **kwargs)
        try:
            like = func(*tree_map_only(Tensor, _on_meta, args), **tree_map_only(Tensor, _on_meta, kwargs))
        except (NotImplementedError, RuntimeError):  # the shape depends on values
            return func(*args, **kwargs)
        made = tree_leaves(like)
        if not all(isinstance(x, Tensor) and x.is_floating_point() for x in made):
            return func(*args, **kwargs)
        return tree_map_only(Tensor, lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype), like)


def _on_meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


def peak_bytes(job: Callable[[], object], device) -> int:
    """Most bytes alive at once in one call, beyond what was there before: by torch on a GPU, counted on a CPU."""
    gc.collect()
    if is_cuda(device):
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        job()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with Peak() as peak:
        job()
    return peak.most


def copy_bandwidth(device, clock: str) -> float:
    """Bytes per second that a large copy reads and writes, best of five."""
    size, copies = (2**30, 10) if is_cuda(device) else (2**27, 2)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)

    def job() -> None:
        for _ in range(copies):
            target.copy_(source)

    job()
    return 2 * copies * size / min(seconds(job, device, clock) for _ in range(5))


def tensor_bytes() -> int:
    """Bytes of all tensors that Python holds now, each storage once."""
    sizes = {}
    for thing in gc.get_objects():
        # By its type: asking some objects for their class runs their code.
        if issubclass(type(thing), torch.Tensor):
            sizes[storage_id(thing)] = thing.untyped_storage().nbytes()
    return sum(sizes.values())
