"""One completion as it is written: the tokens of `rollout(..., seeds=[seed])`, each as soon as it is drawn."""

from collections.abc import Iterator

import torch
from torch import nn

from pte_trl.cache.bounded import BoundedCache
from pte_trl.rollouts.prompts import left_pad
from pte_trl.rollouts.reference import Batch
from pte_trl.rollouts.rollout import eval_mode
from pte_trl.rollouts.sampling import Sampling, sample, uniforms


@torch.no_grad()
def stream(
    model: nn.Module, prompt_ids: list[int], cache: BoundedCache, sampling: Sampling, seed: int
) -> Iterator[int]:
    """Tokens of a completion, its end-of-sequence token included.

    Nothing of the checkpoint's generation config is used.

    Args:
        model: bare, LoRA or PTE causal language model.
        cache: an empty one; it may be looked at between two tokens.
        sampling: how tokens are drawn, and when to stop.
        seed: of this completion.
    """
    draws = uniforms(1, sampling.max_new_tokens, model.device, seeds=[seed])
    ids, mask = left_pad([prompt_ids], sampling.pad_token_id, model.device)
    batch = Batch(model, cache, mask)
    token = None
    for draw in draws.unbind(1):
        with eval_mode(model):
            logits = batch.prefill(ids, {}) if token is None else batch.feed(token, {})
            token, _ = sample(logits, sampling.temperature, sampling.top_p, draw)
        yield int(token)
        if int(token) in sampling.eos_token_ids:
            return
