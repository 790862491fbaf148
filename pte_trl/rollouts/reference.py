"""The reference implementation of sampling: any cache, all rows at the same token, one call of the model per token.

It serves the eviction strategies whose caches differ from row to row, and the tests compare `pte_trl.rollouts.engine`
with it.
"""

import torch
from torch import Tensor, nn

from pte_trl.cache.bounded import BoundedCache
from pte_trl.cache.eviction import attention_for
from pte_trl.cache.masks import check_padding_is_seen, config_of, prompt_mask
from pte_trl.rollouts.prompts import distinct, left_pad
from pte_trl.rollouts.sampling import Sampling, sample
from pte_trl.transfer import uploaded


@torch.no_grad()
def decode(
    model: nn.Module, prompt_ids: list[list[int]], cache: BoundedCache, sampling: Sampling, draws: Tensor, shared: bool
) -> tuple[Tensor, Tensor, Tensor, float]:
    """One completion per prompt.

    Args:
        cache: an empty one, for `model`.
        draws: (samples, max_new_tokens) numbers in [0, 1) that decide the tokens.
        shared: equal prompts share a prefill, and ended completions leave the batch. If not, nothing is shared and
            all go to the end.

    Returns:
        ids and log-probs, (samples, max_new_tokens), lengths, (samples,), and bytes of cache per sample at the end.
    """
    count, device = len(draws), model.device
    prompts, prompt_index = distinct(prompt_ids) if shared else (prompt_ids, None)
    tokens, mask = left_pad(prompts, sampling.pad_token_id, device)
    batch = Batch(model, cache, mask, len(set(map(len, prompts))) > 1)
    stops = uploaded(sampling.eos_token_ids, device)
    ids = torch.full(draws.shape, sampling.pad_token_id, device=device)
    logps = torch.zeros(draws.shape, device=device)
    lengths = torch.zeros(count, dtype=torch.long, device=device)
    rows, alive = torch.arange(count, device=device), torch.ones(count, dtype=torch.bool, device=device)
    with attention_for(model, cache) as extra:
        logits = batch.prefill(tokens, extra)
        if prompt_index is not None:  # each prompt was prefilled once; now a row for every completion
            logits = logits[batch.select(uploaded(prompt_index, device))]
        for step in range(sampling.max_new_tokens):
            token, logp = sample(logits, sampling.temperature, sampling.top_p, draws[rows, step])
            token = torch.where(alive, token, sampling.pad_token_id)
            ids[rows, step], logps[rows, step] = token, logp
            lengths[rows] += alive
            alive = alive & ~torch.isin(token, stops)
            left = int(alive.sum())
            if step + 1 == sampling.max_new_tokens or not left:
                break
            if shared and left <= len(rows) // 2:  # at half the size each time, so that shapes are few
                unfinished = batch.select(alive.nonzero().squeeze(1))
                rows, token, alive = rows[unfinished], token[unfinished], alive[unfinished]
            logits = batch.feed(token, extra)
    return ids, logps, lengths, cache.nbytes / len(rows)


class Batch:
    """The sequences that are decoded together: their cache, their prompts' padding, their positions.

    Args:
        prompt_mask: (batch, length), 0 where padded.
        padded: whether it has a 0; read from the device if None.
    """

    def __init__(self, model: nn.Module, cache: BoundedCache, prompt_mask: Tensor, padded: bool | None = None):
        self.model, self.cache, self.prompt_mask, self.padded = model, cache, prompt_mask, padded
        self.position = (prompt_mask.cumsum(1) - 1).clamp(min=0)
        cache.configure(config_of(model))
        if cache.mixed:
            check_padding_is_seen(config_of(model), prompt_mask)

    def _forward(self, tokens: Tensor, mask: Tensor | None, extra: dict) -> Tensor:
        """(batch, vocabulary) logits after the last of `tokens`."""
        return self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            **extra,
        ).logits[:, -1]

    def prefill(self, tokens: Tensor, extra: dict) -> Tensor:
        logits = self._forward(tokens, prompt_mask(self.model, self.prompt_mask, self.padded), extra)
        self.position = self.position[:, -1:]
        return logits

    def feed(self, token: Tensor, extra: dict) -> Tensor:
        """One thought token, (batch,), for every sequence."""
        self.position = self.position + 1
        thoughts = self.cache.mask_columns(1) - self.prompt_mask.shape[1]
        mask = torch.cat([self.prompt_mask, self.prompt_mask.new_ones(len(token), thoughts)], dim=1)
        return self._forward(token.unsqueeze(1), mask, extra)

    def select(self, rows: Tensor) -> Tensor:
        """Keeps these sequences, in this order, some perhaps several times; returns `rows`."""
        self.cache.batch_select_indices(rows)
        self.prompt_mask, self.position = self.prompt_mask[rows], self.position[rows]
        return rows
