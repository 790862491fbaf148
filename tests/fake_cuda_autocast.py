"""Autocast of the fake GPU (tests/fake_cuda.py): torch's own looks at the device in C++, and finds none.

The lists are CUDA's, as far as this package and transformers call them:
https://docs.pytorch.org/docs/stable/amp.html#cuda-op-specific-behavior
"""

from contextlib import ExitStack
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

NARROW = {
    "linear",
    "matmul",
    "__matmul__",
    "__rmatmul__",
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "einsum",
    "mv",
    "chain_matmul",
}
NARROW |= {"scaled_dot_product_attention"}
WIDE = {"softmax", "log_softmax", "exp", "log", "pow", "__pow__", "rsqrt", "norm", "cumsum", "sum", "prod", "softplus"}
WIDE |= {"layer_norm", "cross_entropy", "nll_loss", "mse_loss", "kl_div", "logsumexp", "reciprocal"}
WIDEST = {"cat", "stack", "addcmul", "dot", "index_put", "scatter_add"}  # the widest of their arguments


class Autocast(TorchFunctionMode):
    """Casts arguments of the device's tensors while `torch.autocast("cuda")` lasts."""

    def __init__(self):
        super().__init__()
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}  # weights cast, as long as an outer context lasts

    def __enter__(self):
        self.patches = ExitStack()
        # torch calls it where the outermost context ends.
        self.patches.enter_context(mock.patch.object(torch, "clear_autocast_cache", self.kept.clear))
        self.patches.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", self._backward))
        return super().__enter__()

    def __exit__(self, *failure):
        super().__exit__(*failure)
        self.patches.close()

    def _backward(self, *args, run=torch.autograd._engine_run_backward, **options):
        """A mode is off inside of what it is asked about, and a checkpoint runs its forward again in a backward."""
        super().__enter__()
        try:
            return run(*args, **options)
        finally:
            super().__exit__(None, None, None)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not torch.device:
            args, kwargs = [numbered(x) for x in args], {key: numbered(x) for key, x in kwargs.items()}
        name = getattr(func, "__name__", "")
        if not torch.is_autocast_enabled("cuda"):
            return func(*args, **kwargs)
        if name in NARROW | WIDE | WIDEST and any(x.is_cuda for x in floats((args, kwargs))):
            narrow = torch.get_autocast_dtype("cuda")
            dtype = narrow if name in NARROW else torch.float32
            if name in WIDEST:
                dtype = max((x.dtype for x in floats((args, kwargs))), key=lambda d: torch.finfo(d).bits)
            args, kwargs = tree_map(lambda x: self._cast(x, dtype), (args, kwargs))
        return func(*args, **kwargs)

    def _cast(self, x, dtype: torch.dtype):
        if not (isinstance(x, Tensor) and x.is_floating_point() and x.is_cuda) or x.dtype in (dtype, torch.float64):
            return x
        lasting = x.is_leaf and x.requires_grad and torch.is_autocast_cache_enabled() and dtype != torch.float32
        if not lasting:
            return x.to(dtype)
        if id(x) not in self.kept:
            self.kept[id(x)] = (x, x.to(dtype))
        return self.kept[id(x)][1]


def numbered(x):
    """A device "cuda" with its number, which C++ would ask a CUDA build for."""
    bare = x.type == "cuda" and x.index is None if isinstance(x, torch.device) else isinstance(x, str) and x == "cuda"
    return torch.device("cuda", 0) if bare else x


def floats(tree) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.is_floating_point()]
