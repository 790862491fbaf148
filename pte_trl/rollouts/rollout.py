"""Batched sampling under the bounded cache: prompts in, completions and the log-probs they were sampled under out.

The sliding window runs on the engine (`engine.py`). The other eviction strategies run on the reference implementation
(`reference.py`), against which the engine is tested.
"""

import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from pte_trl.cache.eviction import Strategy, make_cache
from pte_trl.cache.policy import CachePolicy
from pte_trl.cache.schedule import Schedule
from pte_trl.rollouts.batching import WASTE, EngineCache, auto_batch_size, halving, rounded
from pte_trl.rollouts.engine import Room
from pte_trl.rollouts.prompts import distinct
from pte_trl.rollouts.reference import decode
from pte_trl.rollouts.sampling import Sampling, uniforms
from pte_trl.settings.limits import LIMITS, check_value
from pte_trl.transfer import uploaded

COMPILED_FROM = 256  # new tokens of a rollout for which compiling (tens of seconds, once a process) pays


@dataclass
class Rollout:
    """What a rollout batch produced.

    Attributes:
        completion_ids: token ids of each completion, its end-of-sequence token included.
        logprobs: log-prob of each of them under the sampling distribution (at the rollout's temperature).
        schedules: that each completion was decoded under; W is as long as it may be where the cache is full.
        evictions: evictions each completion has gone through.
        cache_bytes: bytes of keys, values and state S per sample that is decoded.
        seconds: wall time.
    """

    completion_ids: list[list[int]]
    logprobs: list[list[float]]
    schedules: list[Schedule]
    evictions: list[int]
    cache_bytes: float
    seconds: float

    @property
    def windows(self) -> list[int]:
        """W of each completion."""
        return [schedule.window for schedule in self.schedules]

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
    schedules: Sequence[Schedule] | None = None,
    batch_size: int | str | None = None,
    engine_cache: EngineCache | None = None,
    compile: str = "never",
    reference: bool = False,
) -> Rollout:
    """Samples one completion per prompt.

    Args:
        model: bare, LoRA or PTE causal language model.
        prompt_ids: token ids of each prompt; lengths may differ. Equal ones share a prefill.
        policy: what is kept and what leaves; `CachePolicy()` keeps everything. With `window="auto"` or a budget, W
            follows from each prompt alone, and a batch may have several. Ranges need `schedules`.
        max_new_tokens: completion tokens at most.
        eos_token_ids: any of these ends a completion.
        pad_token_id: fed where a sequence has ended or not begun.
        temperature: of the sampling; 0 is greedy (log-probs are then at temperature 1).
        top_p: sample from the smallest set of tokens with this much probability; for evaluation, since a replay
            scores the whole vocabulary.
        generator: for sampling; the global one if None.
        seeds: one per prompt. A completion then depends on its own seed and, but for rounding, not on its batch.
        schedules: of each completion, where they were decided before.
        batch_size: completions decoded at once, the others follow as these end; "auto" for what the memory allows,
            None for all. Where the memory does not suffice it is halved. The reference implementation takes all.
        engine_cache: keeps the engine for the next call.
        compile: whether `torch.compile` fuses the decode step: always, never, or auto, on a GPU for
            `COMPILED_FROM` new tokens or more. Where it cannot, the reason is printed and steps are eager.
        reference: use the reference implementation, without shared prefills; for tests.

    Raises:
        ValueError: a prompt for which the budget leaves no thought; a range without `schedules`; another word for
            `compile`.
    """
    check_value("compile", compile, LIMITS["compile_rollouts"])
    began = time.perf_counter()
    draws = uniforms(len(prompt_ids), max_new_tokens, model.device, seeds=seeds, generator=generator)
    sampling = Sampling(max_new_tokens, tuple(eos_token_ids), pad_token_id, temperature, top_p)
    schedules = schedules_of(policy, prompt_ids, schedules, max_new_tokens)
    with eval_mode(model):
        if reference or policy.eviction != "sliding_window":
            decoded = run_reference(model, prompt_ids, schedules, policy.eviction, sampling, draws, not reference)
            found, evictions, cache_bytes = decoded
        else:
            engine_cache = engine_cache or EngineCache()
            # Where W is drawn, always room for the largest: other rooms would be other engines, rollout by rollout.
            widest = schedules_of(policy.at(1, 1), prompt_ids, None, max_new_tokens) if policy.drawn else []
            found, cache_bytes = run_engine(
                model, prompt_ids, schedules, sampling, draws, batch_size, engine_cache, compile, widest
            )
            evictions = [s.evictions(n - 1) for s, n in zip(schedules, found[2].tolist(), strict=True)]
    ids, logps, lengths = (x.tolist() for x in found)
    return Rollout(
        completion_ids=[row[:n] for row, n in zip(ids, lengths, strict=True)],
        logprobs=[row[:n] for row, n in zip(logps, lengths, strict=True)],
        schedules=schedules,
        evictions=evictions,
        cache_bytes=cache_bytes,
        seconds=time.perf_counter() - began,
    )


def schedules_of(
    policy: CachePolicy, prompt_ids: list[list[int]], schedules: Sequence[Schedule] | None, max_new_tokens: int
) -> list[Schedule]:
    """The evictions of every completion; arguments as in `rollout`."""
    if schedules is not None:
        return list(schedules)
    # A window as long as the completion never fills: that is the full cache.
    return [policy.schedule(len(ids)) or Schedule(max_new_tokens) for ids in prompt_ids]


def run_reference(
    model: nn.Module,
    prompt_ids: list[list[int]],
    schedules: list[Schedule],
    eviction: str | Strategy,
    sampling: Sampling,
    draws: Tensor,
    shared: bool,
) -> tuple[list[Tensor], list[int], float]:
    """Ids, log-probs and lengths as `decode` returns them, evictions of each, and bytes of cache per completion.

    All rows of a decode have one schedule, so the completions of each schedule are decoded for themselves.
    """
    count = len(prompt_ids)
    ids, lengths = (torch.zeros(shape, dtype=torch.long, device=draws.device) for shape in (draws.shape, count))
    found = [ids, torch.zeros(draws.shape, device=draws.device), lengths]
    evictions, cache_bytes = [0] * count, 0.0
    for schedule in dict.fromkeys(schedules):
        rows = [row for row, other in enumerate(schedules) if other == schedule]
        cache = make_cache(model, schedule, eviction, longest=sampling.max_new_tokens - 1)
        index = uploaded(rows, draws.device)
        *some, held = decode(model, [prompt_ids[row] for row in rows], cache, sampling, draws[index], shared)
        for whole, part in zip(found, some, strict=True):
            whole[index] = part
        for row, length in zip(rows, some[2].tolist(), strict=True):
            evictions[row] = cache.evictions_after(length - 1)
        cache_bytes += held * len(rows) / count
    return found, evictions, cache_bytes


def run_engine(
    model: nn.Module,
    prompt_ids: list[list[int]],
    schedules: list[Schedule],
    sampling: Sampling,
    draws: Tensor,
    batch_size: int | str | None,
    engine_cache: EngineCache,
    compile: str,
    widest: Sequence[Schedule] = (),
) -> tuple[tuple[Tensor, Tensor, Tensor], float]:
    """What `Engine.run` returns, and bytes of cache per row; arguments as in `rollout`.

    Args:
        widest: schedules that later batches of these prompts may have: there is room for them, too.

    Raises:
        torch.OutOfMemoryError: one row alone does not fit.
    """
    prompts, prompt_index = distinct(prompt_ids)
    lengths = [len(ids) for ids in prompt_ids]
    rooms = [Room.needed(lengths, each, sampling.max_new_tokens) for each in (schedules, widest) if each]
    room = Room(**{each.name: max(getattr(room, each.name) for room in rooms) for each in fields(Room)})
    auto = batch_size == "auto"
    if auto:
        full = rounded(room, model.device)
        batch_size = auto_batch_size(model, full.places, held=engine_cache.nbytes, tokens=full.tokens)

    long = model.device.type == "cuda" and sampling.max_new_tokens >= COMPILED_FROM
    compiled = compile == "always" or (compile == "auto" and long)

    def run(rows: int):
        # What memory is free differs a little each time; that is no reason for another engine.
        least = rows - rows // WASTE if auto else rows
        engine = engine_cache.get(model, rows, room, sampling, compiled, least)
        found = engine.run(prompts, prompt_index, schedules, draws, None if auto else rows)
        return found, engine.cache.nbytes / engine.cache.rows

    return halving(run, min(batch_size or len(prompt_ids), len(prompt_ids)), engine_cache.release)
