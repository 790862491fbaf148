"""A fake GPU: tensors that say `cuda:0` and compute on the CPU, so that GPU paths run where there is none.

    with FakeCuda() as gpu:
        model.to("cuda:0")
        ...
    assert not gpu.waits

It refuses operations between tensors of the host and of the device, and counts where the host would wait for the
device (`waits`); `torch.cuda.set_sync_debug_mode("warn")` warns of each. `torch.cuda.CUDAGraph` records and replays
(tests/fake_cuda_graph.py). Autocast casts what it casts on a GPU, and keeps the casts as long. No allocator, streams,
kernels or timing: those show on a GPU only.

A tensor of it is a meta tensor for C++, whose autograd would ask a CUDA build for streams otherwise. It carries CUDA's
dispatch keys, and its values lie in a tensor of the CPU.
"""

import collections
import sys
import warnings
from contextlib import ExitStack
from functools import partial
from types import FrameType, SimpleNamespace
from typing import ClassVar
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.fake_cuda_autocast import Autocast
from tests.fake_cuda_graph import Graph, Memory, Pools

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
# Their results' shapes depend on values, or a value goes to the host.
READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive", "equal")
READS += ("bincount", "is_nonzero")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
SOURCES = ("/pte_trl/", "/tests/", "/benchmarks/", "/trl/", "/transformers/", "/peft/", "/accelerate/")


aten = torch.ops.aten
# Products of narrow numbers with a wide result: the CPU has them for equal types only.
CUDA_ONLY = {
    aten.mm.dtype: lambda a, b, dtype: a.to(dtype) @ b.to(dtype),
    aten.mm.dtype_out: lambda a, b, dtype, *, out: torch.mm(a.to(dtype), b.to(dtype), out=out),
    aten.addmm.dtype: lambda c, a, b, dtype, **scales: torch.addmm(c.to(dtype), a.to(dtype), b.to(dtype), **scales),
    aten.addmm.dtype_out: lambda c, a, b, dtype, **more: torch.addmm(c.to(dtype), a.to(dtype), b.to(dtype), **more),
}


class DeviceMix(RuntimeError):
    """An operation got tensors of the host and of the device."""


class WaitInCapture(RuntimeError):
    """The host would wait for the device, or copy to it, while a graph is captured."""


class CudaTensor(Tensor):
    """Says cuda:0; its values lie in `inner`, on the CPU, with the same shape, strides and offset."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        with torch._C._DisableTorchDispatch():
            last = sum((n - 1) * stride for n, stride in zip(inner.shape, inner.stride(), strict=True))
            room = inner.storage_offset() + (1 + last if inner.numel() else 0)
            shell = torch.empty(room, dtype=inner.dtype, device="meta")
            shell = shell.as_strided(inner.shape, inner.stride(), inner.storage_offset())
        made = Tensor._make_subclass(cls, shell, False, dispatch_device=False, device_for_backend_keys=CUDA)
        made.inner = inner
        Memory.of(inner).add(made)
        return made

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    def __getitem__(self, key):
        return super().__getitem__(indices(key))

    def __setitem__(self, key, value):
        places = key if isinstance(key, tuple) else (key,)
        # C++ makes a tensor of the host from a number, and copies it; on the CPU nothing of that shows.
        if any(isinstance(place, Tensor) for place in places) and not isinstance(value, Tensor):
            FakeCuda.active().wait("number written by index")
        super().__setitem__(indices(key), value)

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __repr__(self, **kwargs) -> str:
        return f"CudaTensor({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():
            return FakeCuda.active().execute(func, args, kwargs or {})


def indices(key):
    """An index with its lists as tensors: C++ would make them where it sees the tensor, that is, without values."""
    if isinstance(key, list):
        return torch.tensor(key, device=CUDA)
    return tuple(indices(part) for part in key) if isinstance(key, tuple) else key


def on_device(device) -> bool:
    """Whether a device argument means the GPU; C++ passes on what it sees of our tensors, meta."""
    return device is not None and torch.device(device).type in ("cuda", "meta")


def is_view(func) -> bool:
    aliases = [result.alias_info for result in func._schema.returns]
    return any(a is not None and not a.is_write for a in aliases) or func._schema.name == "aten::_unsafe_view"


def written(func, args, kwargs) -> list:
    """The arguments that an operation changes."""
    found = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[place] if place < len(args) else kwargs.get(argument.name))
    return found


def mapped(change, tree):
    """`tree_map`, for what operations take and return, several times as fast."""
    kind = type(tree)
    if kind is tuple or kind is list:
        return kind([mapped(change, x) for x in tree])
    return {key: mapped(change, x) for key, x in tree.items()} if kind is dict else change(tree)


def tensors_in(tree, found: list[Tensor]) -> list[Tensor]:
    """`found`, with the tensors of a tree behind it."""
    for x in tree:
        if isinstance(x, Tensor):
            found.append(x)
        elif type(x) in (list, tuple):
            tensors_in(x, found)
    return found


def plain(x):
    """An argument as the CPU takes it."""
    if isinstance(x, CudaTensor):
        return x.inner
    return CPU if isinstance(x, torch.device) and on_device(x) else x


def ours(x):
    """A result as the device gives it."""
    return CudaTensor(x) if isinstance(x, Tensor) and not isinstance(x, CudaTensor) else x


class FakeCuda(TorchDispatchMode):
    """The device, for as long as the context lasts.

    Attributes:
        waits: how often the host would have waited for the device, by (reason, function).
        captured, replays: graphs captured, and graphs replayed.
        free: bytes of its memory that are free.
        capturing: the graph that is being captured, or None.
    """

    stack: ClassVar[list["FakeCuda"]] = []

    def __init__(self):
        super().__init__()
        self.waits = collections.Counter()
        self.captured = self.replays = 0
        self.free = 40 << 30
        self.capturing: Graph | None = None
        self.sync_debug: str | int = 0
        self.pools = Pools()

    @classmethod
    def active(cls) -> "FakeCuda":
        if not cls.stack:
            raise RuntimeError("a tensor of the fake GPU is used outside of `with FakeCuda()`")
        return cls.stack[-1]

    def __enter__(self):
        FakeCuda.stack.append(self)
        self.patches = ExitStack()
        for owner, name, value in self._replacements():
            self.patches.enter_context(mock.patch.object(owner, name, value))
        self.patches.enter_context(Autocast())
        return super().__enter__()

    def __exit__(self, *failure):
        super().__exit__(*failure)
        self.patches.close()
        FakeCuda.stack.pop()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():
            return self.execute(func, args, kwargs or {})

    # ---- one operation -------------------------------------------------------------------------------------------

    def execute(self, func, args, kwargs):
        if func is torch.ops.prim.device.default:
            return CUDA
        name = func._schema.name.split("::")[1]
        host, there = [], False
        for x in tensors_in(kwargs.values(), tensors_in(args, [])):
            there |= isinstance(x, CudaTensor)
            host += [] if isinstance(x, CudaTensor) else [x]
        if any(x.is_meta for x in host):
            raise NotImplementedError(
                f"{func} at {where()}: a tensor was made in C++, for the device, and has no values"
            )
        if name in ("_to_copy", "copy_"):
            to_device = self._copy(name, args, kwargs)
        else:
            to_device = there or on_device(kwargs.get("device"))
            if there:
                self._check(func, name, args, host)
        inputs, options = mapped(plain, args), mapped(plain, kwargs)
        pin = options.pop("pin_memory", None)
        if self.capturing is None or not to_device:
            out = CUDA_ONLY.get(func, func)(*inputs, **options)
        else:
            out = self.capturing.record(func, inputs, options, is_view(func))
        if not to_device:
            if pin:
                out.pinned = True
            return out
        changed = written(func, args, kwargs)
        if changed and len(func._schema.returns) == 1 and isinstance(changed[0], Tensor):
            return self._reshaped(changed[0])
        return out if changed else mapped(ours, out)

    def _reshaped(self, changed: Tensor) -> Tensor:
        """What was written in place; an `out=` of another shape has been resized, and its shell has not."""
        if isinstance(changed, CudaTensor) and changed.shape != changed.inner.shape:
            return CudaTensor(changed.inner)
        return changed

    def _copy(self, name: str, args, kwargs) -> bool:
        """Whether a copy goes to the device; counts those that the host waits for."""
        if name == "copy_":
            target, source = isinstance(args[0], CudaTensor), args[1]
            late = bool(args[2]) if len(args) > 2 else kwargs.get("non_blocking", False)
        else:
            source, device, late = args[0], kwargs.get("device"), kwargs.get("non_blocking", False)
            target = on_device(device) if device is not None else isinstance(source, CudaTensor)
        if isinstance(source, CudaTensor) and not target and not (late and getattr(args[0], "pinned", False)):
            self.wait("device to host")
        if not isinstance(source, CudaTensor) and target and not (late and getattr(source, "pinned", False)):
            self.wait("host to device")
        return target

    def _check(self, func, name: str, args, host: list[Tensor]) -> None:
        """Refuses a mixture, and counts what reads a value."""
        if name in INDEXING:
            indices = [i for i in args[1] if i is not None]
            if any(not isinstance(i, CudaTensor) for i in indices):
                self.wait("index from the host")
            if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
                self.wait("boolean index")
            host = [x for x in (args[0], *args[2:3]) if isinstance(x, Tensor) and not isinstance(x, CudaTensor)]
        shapes = [tuple(x.shape) for x in host if x.dim()]
        if shapes:
            raise DeviceMix(f"{func} at {where()}: a CPU tensor of shape {shapes[0]} meets one of cuda:0")
        if host and name == "where":
            self.wait("scalar from the host")  # copied to the device; arithmetic takes it as an argument
        if name in READS or str(func) == "aten.repeat_interleave.Tensor":
            self.wait(name)

    def wait(self, reason: str) -> None:
        self.waits[reason, where()] += 1
        if self.sync_debug == "warn":
            at = caller()
            text = "called a synchronizing CUDA operation"
            warnings.warn_explicit(text, UserWarning, at.f_code.co_filename, at.f_lineno)
        if self.capturing is not None:
            raise WaitInCapture(f"{reason} while a graph is captured, at {where()}")

    # ---- torch.cuda -----------------------------------------------------------------------------------------------

    def _replacements(self):
        """(owner, name, value) of what is patched while the device is there."""
        cuda = torch.cuda
        about = SimpleNamespace(total_memory=80 << 30, major=9, minor=0, name="NVIDIA H100 (fake)")
        constants = {"is_available": True, "device_count": 1, "current_device": 0, "is_bf16_supported": True}
        constants |= {"get_device_name": about.name, "get_device_properties": about, "is_initialized": True}
        constants |= {"get_device_capability": (9, 0)}
        for name in ("memory_reserved", "memory_allocated", "max_memory_allocated", "max_memory_reserved"):
            constants[name] = 0
        for name in ("_lazy_init", "empty_cache", "reset_peak_memory_stats", "set_device", "manual_seed_all"):
            constants[name] = None
        for name, value in constants.items():  # each a function of its own: torch.compile keeps a table of them
            yield cuda, name, lambda *args, value=value, **kwargs: value
        yield cuda, "mem_get_info", lambda *args: (self.free, 80 << 30)
        yield cuda, "synchronize", lambda *args: self.wait("synchronize")
        yield cuda, "get_sync_debug_mode", lambda: self.sync_debug
        yield cuda, "set_sync_debug_mode", partial(setattr, self, "sync_debug")
        yield cuda, "is_current_stream_capturing", lambda: self.capturing is not None
        yield cuda, "CUDAGraph", lambda *args, **kwargs: Graph(self)
        yield cuda, "graph", lambda graph, **options: graph.capture(**options)
        yield cuda, "graph_pool_handle", self.pools.new
        yield cuda, "get_rng_state", lambda *args: torch.get_rng_state()
        yield cuda, "set_rng_state", lambda state, *args: torch.set_rng_state(state)
        yield sys.modules["torch.cuda.amp.common"], "amp_definitely_not_available", lambda: False
        yield torch.amp, "is_autocast_available", lambda kind: True
        # `.to` makes new parameters: `parameter.data = ...` would leave the old one a meta tensor.
        yield torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True
        # These read their data in C++, below the dispatcher.
        for name in ("tensor", "as_tensor"):
            yield torch, name, from_host(getattr(torch, name))
        yield Tensor, "pin_memory", pinned


def from_host(make):
    """`torch.tensor` and its kind: made on the host and then copied, as they do it themselves."""

    def call(data, *args, device=None, pin_memory=False, **options):
        if isinstance(data, CudaTensor):
            return data.to(device=device, **options)
        made = make(data, *args, **options) if on_device(device) else make(data, *args, device=device, **options)
        made = pinned(made) if pin_memory else made
        return made.to(CUDA) if on_device(device) else made

    return call


def pinned(tensor: Tensor, *args) -> Tensor:
    tensor = tensor.clone()
    tensor.pinned = True
    return tensor


def caller() -> FrameType | None:
    """The innermost function that is not the fake device's own or torch's."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if any(part in file for part in SOURCES) and "/fake_cuda" not in file:
            return frame
        frame = frame.f_back
    return None


def where() -> str:
    """Its file and name."""
    frame = caller()
    if frame is None:
        return "?"
    return f"{frame.f_code.co_filename.split('site-packages/')[-1].split('/pte_trl/')[-1]}:{frame.f_code.co_name}"
