"""`draw` against its reference implementation `sample`: tokens, log-probs, odd logits, bytes, Triton kernels."""

import os
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from pte_trl.compat.torch import schema_of, tree_leaves
from pte_trl.rollouts import chunks
from pte_trl.rollouts.chunks import CHUNK, HEAD, chunk_sums, nucleus_cut, reads
from pte_trl.rollouts.draw import BELOW_ONE, draw
from pte_trl.rollouts.sampling import sample

VOCABULARY = 151_936  # Qwen's
INF = torch.inf


def numbers(count: int, seed: int) -> torch.Tensor:
    """Uniform ones, the least and the greatest among them."""
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    uniform[:2] = torch.tensor([0, BELOW_ONE], dtype=torch.float64)
    return uniform


def assert_same(logits, temperature, top_p, uniform):
    expected, expected_logps = sample(logits, temperature, top_p, uniform)
    token, logps = draw(logits, temperature, top_p, uniform)
    assert token.dtype == torch.long and logps.dtype == torch.float32
    assert token.tolist() == expected.tolist()
    torch.testing.assert_close(logps, expected_logps, rtol=3e-7, atol=4e-6)


@given(
    vocabulary=st.integers(1, 3 * CHUNK),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    temperature=st.sampled_from([0, 0.3, 0.6, 1.0, 1.7]),
    top_p=st.sampled_from([1.0, 0.97, 0.5312, 1e-9]),
    spread=st.sampled_from([0.1, 2.0, 12.0]),
    removed=st.sampled_from([0, 0.2, 0.99]),
    seed=st.integers(0, 10**6),
)
def test_the_same_tokens_and_log_probs(vocabulary, dtype, temperature, top_p, spread, removed, seed):
    source = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, vocabulary, generator=source) * spread
    gone = torch.rand(logits.shape, generator=source) < removed
    gone[:, seed % vocabulary] = False  # one token at least is left
    assert_same(logits.masked_fill(gone, -INF).to(dtype), temperature, top_p, numbers(6, seed))


@pytest.mark.parametrize("top_p", [1.0, 0.9137])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nucleus_longer_than_the_head(dtype, top_p):
    """Nearly flat logits, many of them equal; and rows beside them whose nucleus is short."""
    logits = torch.randn(8, 4 * HEAD + 77) * torch.tensor([0.2, 5.0] * 4).unsqueeze(1)
    assert_same(logits.to(dtype), 0.8, top_p, numbers(8, 1))


@pytest.mark.parametrize("temperature", [0, 0.6])
@pytest.mark.parametrize("top_p", [1.0, 0.3, 1e-9])
def test_odd_rows(temperature, top_p):
    logits = torch.full((5, 2 * CHUNK + 3), -INF)
    logits[0] = 0  # uniform
    logits[1, CHUNK] = -7  # one token alone
    logits[2, -1] = 1e30  # far away from all others
    logits[2, 0] = -1e30
    logits[3, [4, CHUNK - 1, 2 * CHUNK]] = torch.tensor([1.0, 3.0, 2.0])
    logits[4] = -0.0  # -0 and 0 are equal
    logits[4, ::2] = 0.0
    for uniform in (0, 0.123, 0.77, BELOW_ONE):
        assert_same(logits, temperature, top_p, torch.full((5,), uniform, dtype=torch.float64))


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_what_is_not_a_number_gives_a_token_and_no_log_prob(temperature, top_p):
    """On a GPU an index out of range would end the process."""
    logits = torch.randn(5, CHUNK + 8)
    logits[0], logits[1, 3], logits[2] = torch.nan, torch.nan, -INF
    logits[3, 5] = INF
    for function in (sample, draw):
        token, logps = function(logits, temperature, top_p, torch.full((5,), 0.5, dtype=torch.float64))
        assert ((token >= 0) & (token < logits.shape[1])).all()
        assert logps.isfinite().tolist() == [False] * 4 + [True]


def test_no_token_without_probability():
    logits = torch.randn(64, 3 * CHUNK + 1).masked_fill(torch.rand(64, 3 * CHUNK + 1) < 0.9, -INF)
    for top_p in (1.0, 0.8):
        token, logps = draw(logits, 1.0, top_p, numbers(64, 2))
        assert logps.isfinite().all() and logits.gather(1, token.unsqueeze(1)).isfinite().all()


def test_log_probs_are_those_of_a_log_softmax():
    """Within one rounding of float32 of what float64 gives, which `log_softmax` in float32 is not always."""
    logits = torch.randn(8, 5000) * 4
    token, logps = draw(logits, 0.7, 1.0, numbers(8, 3))
    exact = ((logits / 0.7).double()).log_softmax(-1).gather(1, token.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(logps, exact.float(), rtol=2.0**-23, atol=1e-7)


# ---- bytes moved ---------------------------------------------------------------------------------------------------


class Moved(TorchDispatchMode):
    """Bytes that operations read and write; what is gathered counts as long as the result."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        schema = schema_of(func)
        if any(x.alias_info is not None and not x.alias_info.is_write for x in schema.returns):
            return out  # a view
        read = [x.nbytes for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        written = sum(x.nbytes for x in tree_leaves(out) if isinstance(x, torch.Tensor))
        if schema.name == "aten::gather":
            read[0] = written
        elif schema.name == "pte_trl::nucleus_cut":
            read[0] *= reads(args[0].dtype)  # of the kernel for CUDA
        self.bytes += sum(read) + written
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_p", [1.0, 0.95])
def test_a_quarter_of_the_bytes(dtype, top_p):
    logits = (torch.randn(2, VOCABULARY) * 4).to(dtype)
    moved = []
    for function in (sample, draw):
        with Moved() as count:
            function(logits, 0.6, top_p, numbers(2, 4))
        moved.append(count.bytes / logits.numel())
    print(f"{dtype}, top_p {top_p}: {moved[0]:.1f} and {moved[1]:.1f} bytes per logit")
    assert moved[1] <= moved[0] / 4


# ---- the operations ------------------------------------------------------------------------------------------------


def test_the_operations_keep_to_their_schemas():
    logits, cut = torch.randn(3, CHUNK + 9), torch.zeros(3)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(chunk_sums, (logits, 0.5, cut), test_utils=checks)
    torch.library.opcheck(chunk_sums, (logits.bfloat16(), 1.0, None), test_utils=checks)
    maxes, total = chunk_sums(logits, 0.5, None)[0], cut.double() + 3
    torch.library.opcheck(nucleus_cut, (logits, 0.5, maxes, maxes.amax(1), total, total / 2), test_utils=checks)


def test_rows_that_are_taken_a_few_at_a_time(monkeypatch):
    logits = torch.randn(7, 1100)
    whole = draw(logits, 0.9, 0.9, numbers(7, 5))
    monkeypatch.setitem(chunks.AT_ONCE, "cpu", 2500)
    for one, other in zip(whole, draw(logits, 0.9, 0.9, numbers(7, 5)), strict=True):
        assert torch.equal(one, other)


@pytest.fixture
def kernels(monkeypatch):
    """The Triton kernels, on a GPU if there is one, else in Triton's interpreter.

    The wheels of torch for CPUs come without Triton. It must be told to interpret before it is imported.
    """
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("without a GPU the kernels run under TRITON_INTERPRET=1 only")
        monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
    from pte_trl.rollouts import chunk_kernels

    return chunk_kernels


def on_device(function, *arguments):
    """What a kernel returns, on the CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [x.cpu() for x in function(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_triton_kernels(kernels, dtype):
    vocabulary = kernels.TILE + CHUNK + 200
    logits = torch.randn(7, vocabulary) * 2
    logits[1] -= 30  # negative ones only
    logits[2, ::2] = -INF
    logits[3] = torch.where(torch.rand(vocabulary) < 0.5, 0.0, -0.0)
    logits[4] = -logits[4].abs().round()  # many ties
    logits[5, :40] += 20  # the second tile is far below the cut
    logits[6, -1] = 6e4  # all others are far below
    logits, scale = logits.to(dtype), 0.6
    maxes, sums, _ = chunk_sums(logits, scale, None)
    peak = maxes.amax(1)
    total = (sums * (maxes - peak.unsqueeze(1)).double().exp()).sum(1)
    for share in (1e-9, 0.4, 0.97):
        cut, above = nucleus_cut(logits, scale, maxes, peak, total, total * share)
        found = on_device(kernels.nucleus_cut, logits, scale, maxes, peak, total, total * share)
        assert torch.equal(cut, found[0])
        torch.testing.assert_close(above, found[1], rtol=1e-6, atol=1e-9)
    for low in (None, cut):
        expected, found = chunk_sums(logits, scale, low), on_device(kernels.chunk_sums, logits, scale, low)
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    # More than there is: all are kept.
    everything, _ = on_device(kernels.nucleus_cut, logits, scale, maxes, peak, total, total * 1.01)
    assert (everything == -INF).all()


@pytest.mark.parametrize("odd", [torch.nan, INF, -INF])
def test_the_triton_kernels_end_on_what_is_not_a_number(kernels, odd):
    """With some float32, of any value: `draw` makes a token of it."""
    logits = torch.full((1, CHUNK), odd)
    maxes, total = torch.full((1, 1), odd), torch.full((1,), torch.nan, dtype=torch.float64)
    cut, above = on_device(kernels.nucleus_cut, logits, 1.0, maxes, maxes[:, 0], total, total)
    assert cut.shape == above.shape == (1,)
