"""The recursion over evictions as one node, by systems and by Triton's kernel, against eviction after eviction."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from pte_trl.adapter import recursion as module
from pte_trl.adapter import recursion_kernel
from pte_trl.adapter.recursion import CHUNK, recursion, step_by_step

# (evictions, |S'| over |S|): one, some, several systems, updates that outweigh the state, and ones that hardly count.
CASES = [(1, 0.3), (20, 0.3), (CHUNK, 0.3), (2 * CHUNK + 5, 0.3), (CHUNK + 1, 5.0), (30, 0.01)]


def case(evictions, size, batched, dtype):
    generator = torch.Generator().manual_seed(evictions)

    def normal(*shape):
        return torch.randn(*shape, dtype=dtype, generator=generator)

    start = normal(*((3,) if batched else ()), 6, 5).requires_grad_()
    return start, (size * normal(3, evictions, 6, 5)).requires_grad_(), normal(3, evictions, 6, 5)


@pytest.mark.parametrize("normalisation", ["rms", "row"])
@pytest.mark.parametrize("batched", [False, True], ids=["one start", "a start each"])
@pytest.mark.parametrize(("evictions", "size"), CASES)
def test_states_and_gradients(evictions, size, batched, normalisation, bounds=(1e-12, 1e-12), dtype=torch.float64):
    start, updates, grad = case(evictions, size, batched, dtype)
    expected, found = (f(start, updates, normalisation) for f in (step_by_step, recursion))
    assert (expected - found).abs().max() <= bounds[0]
    expected, found = (torch.autograd.grad(x, (start, updates), grad) for x in (expected, found))
    for a, b in zip(expected, found, strict=True):
        assert a.norm() > 0 and (a - b).norm() <= bounds[1] * a.norm()


def test_in_float32():
    for normalisation in ("rms", "row"):
        test_states_and_gradients(20, 0.3, False, normalisation, (1e-5, 1e-5), torch.float32)


@pytest.mark.parametrize("normalisation", ["rms", "row"])
def test_a_sample_that_evicts_nothing_has_gradients_of_zero(normalisation):
    """Without global tokens S_0 is zero, and stays so in a sample that is shorter than the others of its batch."""
    start, updates, grad = case(CHUNK, 0.3, False, torch.float32)
    start = torch.zeros_like(start).requires_grad_()
    updates, grad = (torch.cat([torch.zeros_like(x[:1]), x[1:]]).detach() for x in (updates, grad))
    updates.requires_grad_()
    expected, found = (
        torch.autograd.grad(f(start, updates, normalisation), (start, updates), grad)
        for f in (step_by_step, recursion)
    )
    for a, b in zip(expected, found, strict=True):
        assert a.norm() > 0 and (a - b).norm() <= 1e-5 * a.norm()
    assert not found[1][0].any()


def test_a_compiler_that_fails_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(recursion_kernel, "_launch", lambda *args: 1 / 0)
    monkeypatch.setattr(recursion_kernel, "triton", object())
    monkeypatch.setattr(recursion_kernel, "_forward", None, raising=False)
    monkeypatch.setattr(recursion_kernel, "INTERPRETED", True)
    recursion_kernel.compiles.cache_clear()
    for _ in range(2):
        test_in_float32()
    recursion_kernel.compiles.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        "Triton does not run here, the state of PTE is computed step by step: ZeroDivisionError: division by zero"
    ]


# By Triton's interpreter, which is chosen before anything of it is imported, and reads numbers as NumPy < 2.4 does.
INTERPRETER = """
import torch
from pte_trl.adapter import recursion_kernel
from tests.test_recursion import CASES, test_states_and_gradients
assert recursion_kernel.usable(torch.ones(1, 1, 2, 2), "rms")
for normalisation in ("rms", "row"):
    for cell in CASES[:2] + CASES[-2:]:
        test_states_and_gradients(*cell, cell[0] > 1, normalisation, (1e-5, 1e-5), torch.float32)
"""


@pytest.mark.thorough
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="torch for CPUs comes without Triton")
def test_the_kernel_by_tritons_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETER], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_kernel_on_a_gpu():
    for normalisation in ("rms", "row"):
        for evictions, size in CASES:
            start, updates, grad = (x.cuda() for x in case(evictions, size, True, torch.float32))
            assert recursion_kernel.usable(updates, normalisation)
            eps, states = module.NORM_EPS, step_by_step(start, updates, normalisation)
            found = recursion_kernel.forward(start, updates, normalisation, eps)
            assert (states - found).abs().max() <= 1e-5
            expected = module.by_systems(start, updates, states, grad, normalisation)
            found = recursion_kernel.backward(start, updates, states, grad, normalisation, eps)
            assert (expected - found).norm() <= 1e-5 * expected.norm()
