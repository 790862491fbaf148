"""The tokens of `pte_trl.rollouts.sampling.sample` for the same random numbers, with far fewer bytes moved.

`sample` writes several (batch, vocabulary) tensors and scans one of them in float64. Here the vocabulary is read in
chunks of `CHUNK` logits, and only the mass of each chunk is written. The inverse CDF then has two levels: a scan over
the chunks finds the chunk of the token, and a scan inside that one chunk finds the token. A nucleus is described by
the smallest logit in it, `cut`, instead of by a sorted list: the chunks are summed again without what lies below.

Both forms round differently, so a random number that falls on the boundary between two tokens may pick the other one.
docs/log.md says how often. Nothing here depends on values for its shape or waits for the device, so that it can be
captured in a CUDA graph.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from pte_trl.rollouts.chunks import CHUNK, chunk_sums, nucleus_cut

BELOW_ONE = 1 - 2.0**-53


def draw(logits: Tensor, temperature: float, top_p: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row of (batch, vocabulary) logits, and its log-prob under the distribution it came from.

    Logits that are NaN give a log-prob that is NaN and some token of the vocabulary.

    Args:
        temperature: 0 is greedy (log-probs are then at temperature 1).
        top_p: sample from the smallest set of tokens with this much probability. Of equal logits at its boundary the
            first ones are in it.
        uniform: (batch,) float64 numbers in [0, 1) that decide the tokens.
    """
    scale = temperature or 1.0
    maxes, sums, _ = chunk_sums(logits, scale, None)
    peak = maxes.amax(1)  # of logits / scale, (batch,)
    masses = _masses(maxes, sums, peak)
    if temperature == 0:
        token = logits.argmax(1)
    elif top_p < 1:
        cut, share, quota = _nucleus(logits, scale, top_p, maxes, peak, masses.sum(1))
        maxes, sums, ties = chunk_sums(logits, scale, cut)
        ties = _first(ties, quota)
        masses = _masses(maxes, sums, peak) + ties * share.unsqueeze(1)
        token = _inverse_cdf(logits, scale, uniform, peak, masses, cut, ties)
    else:
        token = _inverse_cdf(logits, scale, uniform, peak, masses)
    chosen = logits.gather(1, token.unsqueeze(1)).squeeze(1).float() / scale
    return token, (chosen.double() - peak.double() - masses.sum(1).log()).float()


def _masses(maxes: Tensor, sums: Tensor, peak: Tensor) -> Tensor:
    """(batch, chunks) sums of exp(logit / scale - peak), float64, from sums relative to the chunks' own largest."""
    return (maxes.double() - peak.double().unsqueeze(1)).exp() * sums


def _nucleus(
    logits: Tensor, scale: float, top_p: float, maxes: Tensor, peak: Tensor, total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row the smallest logit in the nucleus, the mass of a token that has it, how many of these are in it."""
    target = (total * top_p).clamp(min=torch.finfo(torch.float64).tiny)  # at least one token
    cut, above = nucleus_cut(logits, scale, maxes, peak, total, target)
    share = ((cut / scale).double() - peak.double()).exp()
    # The first so many with which the mass reaches the target. Without a share, of -inf, it does not matter.
    quota = ((target - above) / share).ceil().nan_to_num(1.0).clamp(1, logits.shape[1]).long()
    return cut, share, quota


def _first(counts: Tensor, quota: Tensor) -> Tensor:
    """How many of the first `quota`, (batch,), of all that is counted lie in each chunk."""
    before = counts.cumsum(1) - counts
    return (quota.unsqueeze(1) - before).clamp(min=0).minimum(counts)


def _inverse_cdf(
    logits: Tensor,
    scale: float,
    uniform: Tensor,
    peak: Tensor,
    masses: Tensor,
    cut: Tensor | None = None,
    ties: Tensor | None = None,
) -> Tensor:
    """(batch,) tokens: the first at which the sum of masses exceeds `uniform` of the whole.

    Args:
        masses: (batch, chunks).
        cut, ties: of a nucleus: its smallest logit, (batch,), and how many of these each chunk has in it.
    """
    reached = masses.cumsum(1)
    point = uniform.unsqueeze(1) * reached[:, -1:]
    chunk = torch.searchsorted(reached, point, right=True).clamp(max=masses.shape[1] - 1)
    # How far into the chunk, as a share: its sum inside differs from its mass here by rounding.
    within = (point - pad(reached, (1, 0)).gather(1, chunk)) / masses.gather(1, chunk)
    last = logits.shape[1] - 1
    places = chunk * CHUNK + torch.arange(min(CHUNK, last + 1), device=logits.device)
    some = logits.gather(1, places.clamp(max=last)).float()
    weights = ((some / scale).double() - peak.double().unsqueeze(1)).exp().masked_fill(places > last, 0)
    if cut is not None:
        low = cut.unsqueeze(1)
        tied = some == low
        weights = weights.masked_fill((some < low) | (tied & (tied.cumsum(1) > ties.gather(1, chunk))), 0)
    reached = weights.cumsum(1)
    place = torch.searchsorted(reached, within.clamp(0, BELOW_ONE) * reached[:, -1:], right=True)
    # Only NaN gets past the end.
    return (chunk * CHUNK + place).clamp(max=last).squeeze(1)
