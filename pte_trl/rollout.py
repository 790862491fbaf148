"""Batched sampling under the bounded cache: prompts in, completions and the log-probs they were sampled under out.

One prefill per distinct prompt, shared by its completions; then one token at a time for those that have not ended.
"""

import time
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pte_trl.cache import BoundedCache
from pte_trl.eviction import Strategy, attention_for, make_cache


@dataclass
class Rollout:
    """What a rollout batch produced.

    Attributes:
        completion_ids: token ids of each completion, its end-of-sequence token included.
        logprobs: log-prob of each of them under the sampling distribution (at the rollout's temperature).
        window: W that the batch was decoded under.
        evictions: evictions each completion has gone through.
        cache_bytes: bytes of keys, values and state per sample at the end.
        seconds: wall time.
    """

    completion_ids: list[list[int]]
    logprobs: list[list[float]]
    window: int
    evictions: list[int]
    cache_bytes: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.completion_ids)) / self.seconds


def left_pad(prompt_ids: list[list[int]], pad_token_id: int, device) -> tuple[Tensor, Tensor]:
    """Prompts of different lengths -> (batch, longest) ids and mask, padded on the left."""
    longest = max(map(len, prompt_ids))
    ids = torch.full((len(prompt_ids), longest), pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompt_ids):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


@contextmanager
def eval_mode(model: nn.Module):
    """Dropout off while sampling; every module gets its own mode back."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def rollout(
    model: nn.Module,
    prompt_ids: list[list[int]],
    *,
    window: int,
    max_new_tokens: int,
    eos_token_ids: list[int],
    pad_token_id: int,
    evict_ratio: float = 0.25,
    eviction: str | Strategy = "sliding_window",
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    seeds: list[int] | None = None,
    plain: bool = False,
) -> Rollout:
    """Samples one completion per prompt.

    Args:
        model: bare, LoRA or PTE causal language model.
        prompt_ids: token ids of each prompt; lengths may differ.
        window: W, thought tokens kept.
        max_new_tokens: completion tokens at most.
        eos_token_ids: any of these ends a completion.
        pad_token_id: fed where a sequence has ended or not begun.
        evict_ratio: share of a full window that leaves at once.
        eviction: which thoughts leave: a key of `pte_trl.eviction.STRATEGIES`, or a strategy with its own knobs. Only
            the sliding window can be replayed, hence trained.
        temperature: of the sampling; 0 is greedy (log-probs are then at temperature 1).
        top_p: sample from the smallest set of tokens with this much probability; for evaluation, since a replay
            scores the whole vocabulary.
        generator: for sampling; the global one if None.
        seeds: one per prompt. A completion then depends on its own seed and, but for rounding, not on its batch.
        plain: the twin for tests: every completion has its own prefill, and ended ones stay in the batch.
    """
    began, device, count = time.perf_counter(), model.device, len(prompt_ids)
    prompts, copies = (prompt_ids, None) if plain else distinct(prompt_ids)
    tokens, mask = left_pad(prompts, pad_token_id, device)
    with eval_mode(model):
        cache = make_cache(model, eviction, window, evict_ratio, longest=max_new_tokens - 1)
    batch = Batch(model, cache, mask)
    stops, uniforms = torch.tensor(eos_token_ids, device=device), seeds and Uniforms(seeds, device)
    ids = torch.full((count, max_new_tokens), pad_token_id, device=device)
    logps = torch.zeros(count, max_new_tokens, device=device)
    lengths = torch.zeros(count, dtype=torch.long, device=device)
    with eval_mode(model), attention_for(model, cache) as extra:
        logits = batch.prefill(tokens, extra)
        if copies is not None:
            logits = logits[batch.select(torch.tensor(copies, device=device))]
        rows, alive = torch.arange(count, device=device), torch.ones(count, dtype=torch.bool, device=device)
        for step in range(max_new_tokens):
            uniform = uniforms.next()[rows] if uniforms else None
            token, logprob = sample(logits, temperature, top_p, generator=generator, uniform=uniform)
            token = torch.where(alive, token, pad_token_id)
            ids[rows, step], logps[rows, step] = token, logprob
            lengths[rows] += alive
            alive = alive & ~torch.isin(token, stops)
            left = int(alive.sum())
            if step + 1 == max_new_tokens or not left:
                break
            if not plain and left <= len(rows) // 2:  # at half the size each time, so that shapes are few
                going = batch.select(alive.nonzero().squeeze(1))
                rows, token, alive = rows[going], token[going], alive[going]
            logits = batch.feed(token, extra)
    lengths, ids, logps = lengths.tolist(), ids.tolist(), logps.tolist()
    return Rollout(
        completion_ids=[row[:n] for row, n in zip(ids, lengths, strict=True)],
        logprobs=[row[:n] for row, n in zip(logps, lengths, strict=True)],
        window=window,
        evictions=[cache.evictions_after(n - 1) for n in lengths],
        cache_bytes=cache.nbytes / len(rows),
        seconds=time.perf_counter() - began,
    )


def distinct(prompt_ids: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """The prompts without repetitions, and for every one given its place among them."""
    places: dict[tuple[int, ...], int] = {}
    copies = [places.setdefault(tuple(prompt), len(places)) for prompt in prompt_ids]
    return [list(prompt) for prompt in places], copies


class Batch:
    """The sequences that are decoded together: their cache, their prompts' padding, their positions."""

    def __init__(self, model: nn.Module, cache: BoundedCache, prompt_mask: Tensor):
        self.model, self.cache, self.prompt_mask = model, cache, prompt_mask
        self.position = (prompt_mask.cumsum(1) - 1).clamp(min=0)

    def _forward(self, tokens: Tensor, mask: Tensor, extra: dict) -> Tensor:
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
        logits = self._forward(tokens, self.prompt_mask, extra)
        self.position = self.position[:, -1:]
        return logits

    def feed(self, token: Tensor, extra: dict) -> Tensor:
        """One thought token, (batch,), for every sequence."""
        self.position = self.position + 1
        # The mask is over what the cache keeps: the prompt, the thoughts still there, and this token.
        thoughts = self.cache.layers[0].kept() - self.prompt_mask.shape[1] + 1
        mask = torch.cat([self.prompt_mask, self.prompt_mask.new_ones(len(token), thoughts)], dim=1)
        return self._forward(token.unsqueeze(1), mask, extra)

    def select(self, rows: Tensor) -> Tensor:
        """Goes on with these sequences, some perhaps several times; returns `rows`."""
        self.cache.batch_select_indices(rows)
        self.prompt_mask, self.position = self.prompt_mask[rows], self.position[rows]
        return rows


def sample(
    logits: Tensor,
    temperature: float,
    top_p: float = 1.0,
    *,
    generator: torch.Generator | None = None,
    uniform: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token per row of (batch, vocabulary) logits, and its log-prob under the distribution it came from.

    Args:
        uniform: (batch,) numbers in [0, 1) that decide the tokens, instead of `generator`.
    """
    logps = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        token = logps.argmax(-1)
    else:
        logps = nucleus(logps, top_p) if top_p < 1 else logps
        if uniform is None:
            token = logps.exp().multinomial(1, generator=generator)[:, 0]
        else:
            # In float64: the many small probabilities of a large vocabulary would be lost in a float32 sum.
            reached = logps.double().exp().cumsum(-1)
            token = torch.searchsorted(reached, (uniform * reached[:, -1]).unsqueeze(1), right=True)[:, 0]
            token = token.clamp(max=logps.shape[-1] - 1)
    return token, logps.gather(1, token.unsqueeze(1)).squeeze(1)


def nucleus(logps: Tensor, top_p: float) -> Tensor:
    """Log-probs of the smallest set of tokens whose probability reaches `top_p`, renormalised; -inf elsewhere."""
    ordered, order = logps.sort(dim=-1, descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()  # what more likely tokens already have
    ordered = ordered.masked_fill(before >= top_p, -torch.inf)
    return torch.full_like(logps, -torch.inf).scatter(-1, order, ordered).log_softmax(-1)


class Uniforms:
    """A stream of random numbers per row, each from a seed of its own, drawn a block at a time."""

    BLOCK = 256

    def __init__(self, seeds: list[int], device):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.device, self.at = device, 0

    def next(self) -> Tensor:
        """(batch,) numbers in [0, 1), float64."""
        if self.at % self.BLOCK == 0:
            rows = [torch.rand(self.BLOCK, generator=g, dtype=torch.float64) for g in self.generators]
            self.block = torch.stack(rows, dim=1).to(self.device)
        self.at += 1
        return self.block[(self.at - 1) % self.BLOCK]
