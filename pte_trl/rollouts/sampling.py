"""One token per sequence from its logits, decided by numbers that are drawn before the decode begins.

A number in [0, 1) per token picks it by the inverse of the cumulative distribution. So sampling needs nothing from
the host, and a completion is the same whatever batch it is decoded in, but for rounding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def uniforms(
    count: int, length: int, device, *, seeds: list[int] | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """(count, length) numbers in [0, 1), float64, on `device`.

    Args:
        seeds: one per row, each the start of a stream of its own; else all rows come from `generator`, or from
            torch's global one.
    """
    if seeds is None:
        where = device if generator is None else generator.device
        return torch.rand(count, length, generator=generator, dtype=torch.float64, device=where).to(device)
    rows = [torch.rand(length, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
    return torch.stack(rows).to(device)


def sample(logits: Tensor, temperature: float, top_p: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row of (batch, vocabulary) logits, and its log-prob under the distribution it came from.

    The reference implementation: the engine calls `pte_trl.rollouts.draw.draw`, which is compared with it.

    Args:
        temperature: 0 is greedy (log-probs are then at temperature 1).
        top_p: sample from the smallest set of tokens with this much probability.
        uniform: (batch,) numbers in [0, 1) that decide the tokens.
    """
    logps = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        token = logps.argmax(-1)
    else:
        logps = nucleus(logps, top_p) if top_p < 1 else logps
        # Summed in float64: the many small probabilities of a large vocabulary would be lost in a float32 sum.
        reached = logps.exp().cumsum(-1, dtype=torch.float64)
        token = torch.searchsorted(reached, (uniform * reached[:, -1]).unsqueeze(1), right=True)[:, 0]
        token = token.clamp(max=logps.shape[-1] - 1)
    return token, logps.gather(1, token.unsqueeze(1)).squeeze(1)


def nucleus(logps: Tensor, top_p: float) -> Tensor:
    """Log-probs of the smallest set of tokens whose probability reaches `top_p`, renormalised; -inf elsewhere."""
    ordered, order = logps.sort(dim=-1, descending=True, stable=True)
    # In float64, and as a share of their own sum: in float32 both are off by several tokens of a large vocabulary.
    reached = ordered.exp().cumsum(-1, dtype=torch.float64)
    before = reached - ordered.exp()  # what more likely tokens already have
    ordered = ordered.masked_fill(before >= top_p * reached[..., -1:], -torch.inf)
    return torch.full_like(logps, -torch.inf).scatter(-1, order, ordered).log_softmax(-1)


@dataclass(frozen=True)
class Sampling:
    """How a rollout draws and when it ends; see `pte_trl.rollouts.rollout.rollout`."""

    max_new_tokens: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    temperature: float = 1.0
    top_p: float = 1.0
