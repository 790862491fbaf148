"""Private names of PyTorch."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode  # sees every operation: counts bytes and operations
from torch.utils._pytree import tree_leaves, tree_map_only  # the tensors among an operation's arguments

__all__ = [
    "FUSED_ATTENTION",
    "TorchDispatchMode",
    "any_size",
    "cpu_with_index",
    "default_store",
    "ended_by_sigterm",
    "flop_formula",
    "forward_hooks",
    "fused_attention",
    "fused_attention_backward",
    "gpu_kernels",
    "nodes_after_fusion",
    "reshards_after_forward",
    "schema_of",
    "storage_id",
    "tree_leaves",
    "tree_map_only",
]


# ---- training ----------------------------------------------------------------------------------------------------


def default_store() -> dist.Store:
    """The store through which the ranks have met, for a watch that must not use their collectives."""
    return dist.distributed_c10d._get_default_store()


def reshards_after_forward(unit: FSDPModule) -> bool:
    """Whether FSDP2 releases the unit's gathered weights after a forward; PyTorch has a setter only."""
    state = unit._get_fsdp_state()
    # torch 2.11 has one group, later versions a list of them.
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    return any(group is not None and group.post_forward_mesh_info is not None for group in groups)


FUSED_ATTENTION = {"cpu", "cuda"}  # devices with a kernel below


def fused_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, scale: float | None
) -> tuple[torch.Tensor, ...]:
    """The kernel behind `scaled_dot_product_attention`, with what its backward asks for: the output comes first.

    As a pair these let one autograd node hold many calls. The kernel for CUDA is the memory-efficient one, the only
    one there with an arbitrary mask and no plan per shape.

    Args:
        query, key, value: (batch, heads, n or m, d), of one dtype and with the same heads.
        bias: (batch, 1, n, m), added to the scores.
        scale: of the scores; None: 1 / sqrt(d).
    """
    aten = torch.ops.aten
    query, key, value = (with_dense_rows(x) for x in (query, key, value))
    if query.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=bias, scale=scale)
    bias = bias.expand(-1, query.shape[1], -1, -1)
    return aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, scale=scale)


def fused_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    scale: float | None,
    out: torch.Tensor,
    *rest: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Gradients of query, key and value; `out` and `rest` are what `fused_attention` returned."""
    aten = torch.ops.aten
    grad, query, key, value = (with_dense_rows(x) for x in (grad, query, key, value))
    if query.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, *rest, 0.0, False, attn_mask=bias, scale=scale
        )
    bias, wanted = bias.expand(-1, query.shape[1], -1, -1), [True, True, True, False]
    return aten._scaled_dot_product_efficient_attention_backward(
        grad, query, key, value, bias, out, *rest, 0.0, wanted, scale=scale
    )[:3]


def with_dense_rows(x: torch.Tensor) -> torch.Tensor:
    """The tensor, whose last dimension the kernels above take for dense without looking at its stride."""
    return x if x.stride(-1) == 1 else x.contiguous()


def ended_by_sigterm(error: Exception) -> bool:
    """Whether SIGTERM ended torch's launcher, or all ranks that it lost: they exit with 143, or die of the signal."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if isinstance(error, ChildFailedError):
        codes = {failure.exitcode for failure in error.failures.values()}
        return codes <= {128 + signal.SIGTERM, -signal.SIGTERM}
    return isinstance(error, SignalException) and error.sigval == signal.SIGTERM


def _no_tag(_) -> None:
    return None


def _keep_on_cpu(data, place: str):
    return data if place == "cpu:0" else None


@contextmanager
def cpu_with_index() -> Iterator[None]:
    """`torch.load(..., map_location="cpu:0")` works inside: accelerate calls the device of a CPU process so.

    `register_package` is public and has no opposite, so the list behind it is put back.
    """
    registry = torch.serialization._package_registry
    before = list(registry)
    torch.serialization.register_package(100, _no_tag, _keep_on_cpu)
    try:
        yield
    finally:
        registry[:] = before


def forward_hooks(module: torch.nn.Module) -> list[Callable]:
    """What is called before and after a module's forward; torch has public functions to add hooks alone."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


# ---- compiling ---------------------------------------------------------------------------------------------------


def any_size(tensor: torch.Tensor, *dimensions: int) -> None:
    """What `torch.compile` makes of this tensor serves other sizes of these dimensions, too.

    `torch.compiler` has no such function; `dynamic=True` would be for every tensor.
    """
    from torch._dynamo import maybe_mark_dynamic

    for dimension in dimensions:
        maybe_mark_dynamic(tensor, dimension)


def nodes_after_fusion(function: Callable, inputs: tuple) -> list[str]:
    """Names of what `torch.compile` would launch for `function(*inputs)`, one for each kernel; nothing is built.

    The compiler is stopped when it has decided what to fuse, before it writes code. On another device it may decide
    otherwise. There is no public way to ask.
    """
    from torch._inductor import config
    from torch._inductor.scheduler import NopKernelSchedulerNode

    class Enough(Exception):
        pass

    found: list[str] = []

    def look(nodes: list) -> list:
        found.extend(node.get_name() for node in nodes if not isinstance(node, NopKernelSchedulerNode))
        raise Enough

    own = FunctionType(function.__code__.replace(), function.__globals__)  # never compiled before
    with config.patch(_post_fusion_custom_pass=look, force_disable_caches=True):
        try:
            torch.compile(own, fullgraph=True)(*inputs)
        except Exception as error:
            if not found:
                raise RuntimeError(f"{function.__name__} cannot be compiled") from error
    return found


# ---- measuring ---------------------------------------------------------------------------------------------------


def storage_id(tensor: torch.Tensor) -> int:
    """The same number for all tensors that share memory, also for those of no size or on the meta device."""
    return tensor.untyped_storage()._cdata


def schema_of(operation) -> torch.FunctionSchema:
    """Name, arguments and results of an operation that a `TorchDispatchMode` sees, and which of them share memory."""
    return operation._schema


def gpu_kernels(call: Callable[[], object]) -> int:
    """Kernels that a call launches on the GPU; where an event of the profiler ran is not documented."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return sum(event.count for event in found.key_averages() if event.device_type.name == "CUDA")


def flop_formula(operation) -> Callable | None:
    """PyTorch's formula for an operation's floating-point operations; None where it counts none."""
    from torch.utils.flop_counter import flop_registry

    return flop_registry.get(operation._overloadpacket)
