"""Batched sampling under the bounded cache: prompts in, completions and the log-probs they were sampled under out.

The sliding window runs on the engine (`engine.py`). The other eviction strategies run on the reference implementation
(`reference.py`), against which the engine is tested.
"""

import time
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pte_trl.cache.eviction import make_cache
from pte_trl.cache.policy import CachePolicy
from pte_trl.cache.schedule import Schedule
from pte_trl.rollouts.batching import EngineCache, auto_batch_size, halving
from pte_trl.rollouts.prompts import distinct
from pte_trl.rollouts.reference import decode
from pte_trl.rollouts.sampling import Sampling, uniforms


@dataclass
class Rollout:
    """What a rollout batch produced.

    Attributes:
        completion_ids: token ids of each completion, its end-of-sequence token included.
        logprobs: log-prob of each of them under the sampling distribution (at the rollout's temperature).
        window: W that the batch was decoded under; as long as a completion may be where the cache is full.
        evictions: evictions each completion has gone through.
        cache_bytes: bytes of keys, values and state S per sample that is decoded.
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
    policy: CachePolicy,
    *,
    max_new_tokens: int,
    eos_token_ids: list[int],
    pad_token_id: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    seeds: list[int] | None = None,
    batch_size: int | str | None = None,
    engine_cache: EngineCache | None = None,
    reference: bool = False,
) -> Rollout:
    """Samples one completion per prompt.

    Args:
        model: bare, LoRA or PTE causal language model.
        prompt_ids: token ids of each prompt; lengths may differ. Equal ones share a prefill.
        policy: what is kept and what leaves; `CachePolicy()` keeps everything.
        max_new_tokens: completion tokens at most.
        eos_token_ids: any of these ends a completion.
        pad_token_id: fed where a sequence has ended or not begun.
        temperature: of the sampling; 0 is greedy (log-probs are then at temperature 1).
        top_p: sample from the smallest set of tokens with this much probability; for evaluation, since a replay
            scores the whole vocabulary.
        generator: for sampling; the global one if None.
        seeds: one per prompt. A completion then depends on its own seed and, but for rounding, not on its batch.
        batch_size: completions decoded at once, the others follow as these end; "auto" for what the memory allows,
            None for all. Where the memory does not suffice it is halved. The reference implementation takes all.
        engine_cache: keeps the engine for the next call.
        reference: use the reference implementation, without shared prefills; for tests.
    """
    began = time.perf_counter()
    draws = uniforms(len(prompt_ids), max_new_tokens, model.device, seeds=seeds, generator=generator)
    sampling = Sampling(max_new_tokens, tuple(eos_token_ids), pad_token_id, temperature, top_p)
    # A window as long as the completion never fills: that is the full cache.
    schedule = policy.schedule(max(map(len, prompt_ids))) or Schedule(max_new_tokens)
    with eval_mode(model):
        if reference or policy.eviction != "sliding_window":
            cache = make_cache(model, schedule, policy.eviction, longest=max_new_tokens - 1)
            *found, cache_bytes = decode(model, prompt_ids, cache, sampling, draws, shared=not reference)
            evictions = cache.evictions_after
        else:
            engine_cache = engine_cache or EngineCache()
            found, cache_bytes = run_engine(model, prompt_ids, schedule, sampling, draws, batch_size, engine_cache)
            evictions = schedule.evictions
    ids, logps, lengths = (x.tolist() for x in found)
    return Rollout(
        completion_ids=[row[:n] for row, n in zip(ids, lengths, strict=True)],
        logprobs=[row[:n] for row, n in zip(logps, lengths, strict=True)],
        window=schedule.window,
        evictions=[evictions(n - 1) for n in lengths],
        cache_bytes=cache_bytes,
        seconds=time.perf_counter() - began,
    )


def run_engine(
    model: nn.Module,
    prompt_ids: list[list[int]],
    schedule: Schedule,
    sampling: Sampling,
    draws: Tensor,
    batch_size: int | str | None,
    engine_cache: EngineCache,
) -> tuple[tuple[Tensor, Tensor, Tensor], float]:
    """What `Engine.run` returns, and bytes of cache per row; arguments as in `rollout`.

    Raises:
        torch.OutOfMemoryError: one row alone does not fit.
    """
    prompts, prompt_index = distinct(prompt_ids)
    longest = max(map(len, prompts))
    if batch_size == "auto":
        batch_size = auto_batch_size(model, longest, schedule.window, sampling.max_new_tokens)

    def run(rows: int):
        engine = engine_cache.get(model, rows, schedule, longest, sampling)
        return engine.run(prompts, prompt_index, draws), engine.cache.nbytes / rows

    return halving(run, min(batch_size or len(prompt_ids), len(prompt_ids)))
