"""Every `torch.autograd.Function` of the package, in all the ways in which autograd and autocast may call it.

A new one without a row in CASES fails.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import pte_trl
from pte_trl.adapter.recursion import recursion
from pte_trl.adapter.routed import evicted_products, routed
from pte_trl.cache.schedule import Schedule
from pte_trl.replay.attention import blockwise_attention
from pte_trl.replay.plan import ReplayPlan
from pte_trl.replay.segments import segment_logps
from tests.models import left_padded_batch, tiny, with_pte

SCHEDULES, PROMPT, LENGTH = [Schedule(16), Schedule(24)], 8, 200
IDS, MASK, WIDTH = left_padded_batch([3, 2], 9)


@dataclass
class Case:
    """How a function is called.

    Attributes:
        call: inputs -> one tensor.
        inputs: leaves.
        bound: by how much, relative to its norm, a gradient may change where the backward runs under autocast.
        itself: autocast changes nothing at all.
        tensors: `call` depends on nothing beside `inputs`; a segment's functions read the model.
    """

    call: Callable[..., Tensor]
    inputs: list[Tensor]
    bound: float = 0.0
    itself: bool = False
    tensors: bool = True


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def plan() -> ReplayPlan:
    return ReplayPlan.build(SCHEDULES, PROMPT, torch.ones(2, LENGTH, dtype=torch.long))


def attention() -> Case:
    inputs, replay = [normal(2, heads, LENGTH, 16) for heads in (4, 2, 2)], plan()
    return Case(lambda *x: blockwise_attention(None, *x, None, replay=replay)[0], inputs)


def states(normalisation: str) -> Case:
    inputs = [normal(6, 5), normal(2, 40, 6, 5)]
    return Case(lambda *x: recursion(*x, normalisation), inputs, itself=True)


def products(first: tuple[int, ...]) -> Case:
    replay = plan()
    inputs = [normal(2, LENGTH, 6), normal(*first, 6, 5), normal(2, replay.count, 6, 5)]
    return Case(lambda *x: routed(*x, replay), inputs, itself=True)


def evicted() -> Case:
    replay = plan()
    return Case(lambda *x: evicted_products(*x, replay), [normal(2, LENGTH, 5) for _ in range(2)], itself=True)


def segments() -> Case:
    model = with_pte(tiny("qwen2", torch.float32, num_hidden_layers=2))
    leaves = [p for p in model.parameters() if p.requires_grad]
    # Products of the model itself, which run again in the backward, are rounded where autocast is on there.
    logps = lambda *_: segment_logps(model, IDS, MASK, WIDTH, Schedule(4), temperature=1.0)[0]  # noqa: E731
    return Case(logps, leaves, bound=0.05, tensors=False)


CASES = {
    "_Blocks": [attention],
    "_Recursion": [lambda: states("rms"), lambda: states("row")],
    "_Routed": [lambda: products(()), lambda: products((2,))],
    "_Evicted": [evicted],
    "_Segments": [segments],
    "_Fetch": [segments],
}
TENSORS = [name for name in CASES if name not in ("_Segments", "_Fetch")]


def subclasses(kind: type) -> set[type]:
    direct = set(kind.__subclasses__())
    return direct.union(*map(subclasses, direct))


def test_every_function_has_a_case():
    root = Path(pte_trl.__file__).parent
    for path in root.rglob("*.py"):
        if "torch.autograd" in path.read_text() and path.name != "__init__.py":
            importlib.import_module(".".join(path.relative_to(root.parent).with_suffix("").parts))
    found = {kind.__name__ for kind in subclasses(torch.autograd.Function) if kind.__module__.startswith("pte_trl.")}
    assert found == set(CASES)


def cases(names: list[str]):
    return pytest.mark.parametrize(
        "make", [pytest.param(make, id=f"{name}-{n}") for name in names for n, make in enumerate(CASES[name])]
    )


def made(make: Callable[[], Case]) -> Case:
    torch.manual_seed(0)
    return make()


def gradients(out: Tensor, inputs: list[Tensor], **options) -> tuple[Tensor, ...]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad(out, inputs, weights.to(out.dtype), **options)


def assert_close(found, expected, bound: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype and theirs.norm() > 0
        assert (ours - theirs).norm() <= bound * theirs.norm()


@cases(list(CASES))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_backward_under_autocast_is_the_one_without(make, dtype):
    case = made(make)
    with torch.autocast("cpu", dtype):
        out = case.call(*case.inputs)
        inside = gradients(out, case.inputs, retain_graph=case.tensors)
    if not case.tensors:
        with torch.autocast("cpu", dtype):
            out = case.call(*case.inputs)
    assert_close(inside, gradients(out, case.inputs), case.bound)
    if case.itself:
        plain = case.call(*case.inputs)
        assert torch.equal(plain, out)
        assert_close(inside, gradients(plain, case.inputs), 0.0)


@cases(TENSORS)
def test_layouts_of_inputs_and_gradients(make):
    """Inputs that are not contiguous, and a gradient that is one number expanded."""
    case = made(make)
    expected = torch.autograd.grad(out := case.call(*case.inputs), case.inputs, torch.ones_like(out))
    strided = [x.detach().mT.contiguous().mT.requires_grad_() for x in case.inputs]
    assert not all(x.is_contiguous() for x in strided)
    found = case.call(*strided)
    assert torch.allclose(found, out, atol=1e-5)
    assert_close(torch.autograd.grad(found.sum(), strided), expected, 1e-5)


@cases(TENSORS)
def test_gradients_wanted_in_part_twice_or_not_at_all(make):
    case = made(make)
    expected = gradients(case.call(*case.inputs), case.inputs)
    for wanted in range(len(case.inputs)):
        inputs = [x if i == wanted else x.detach() for i, x in enumerate(case.inputs)]
        out = case.call(*inputs)
        for _ in range(2):
            assert_close(gradients(out, inputs[wanted : wanted + 1], retain_graph=True), [expected[wanted]], 0.0)
    with torch.no_grad():
        assert not case.call(*case.inputs).requires_grad


@cases(TENSORS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(make, reentrant):
    case = made(make)
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(case.call(*case.inputs), case.inputs)
        out = checkpoint(case.call, *case.inputs, use_reentrant=reentrant)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    out.backward(weights)  # a reentrant checkpoint knows no `autograd.grad`
    assert_close([x.grad for x in case.inputs], expected, 0.0)
