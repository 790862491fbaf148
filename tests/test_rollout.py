"""Sampling: the log-probs it reports are the replay's, and a batch is its samples."""

import pytest
import torch

from pte_trl.cache.eviction import STRATEGIES
from pte_trl.cache.policy import CachePolicy
from pte_trl.cache.schedule import Schedule
from pte_trl.replay.plan import replay_inputs
from pte_trl.rollouts.prompts import left_pad
from pte_trl.rollouts.rollout import rollout
from pte_trl.rollouts.sampling import nucleus
from pte_trl.rollouts.sampling import sample as sample_token
from tests.models import tiny, with_lora, with_pte

PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
WINDOW, NEW, ENDS = 8, 30, [40, 41]
POLICY = CachePolicy(WINDOW)


def sample(model, prompts=PROMPTS, policy=POLICY, **changes):
    settings = {"max_new_tokens": NEW, "eos_token_ids": ENDS, "pad_token_id": 0, "temperature": 0.8}
    torch.manual_seed(0)
    return rollout(model, prompts, policy, **settings | changes)


def replayed(model, prompts, completions, window=WINDOW, temperature=0.8):
    """Log-probs of the completions by a replay of the whole batch, padded on the right."""
    ids, mask = left_pad(prompts, 0, "cpu")
    longest = max(map(len, completions))
    tail = torch.tensor([c + [0] * (longest - len(c)) for c in completions])
    kept = torch.tensor([[1] * len(c) + [0] * (longest - len(c)) for c in completions])
    prompt = ids.shape[1]
    ids, mask = torch.cat([ids, tail], 1), torch.cat([mask, kept], 1)
    logits = model(input_ids=ids, **replay_inputs(model, mask, prompt, Schedule(window))).logits[:, prompt - 1 : -1]
    logps = (logits.float() / temperature).log_softmax(-1).gather(2, tail.unsqueeze(2)).squeeze(2)
    return [row[: len(c)].tolist() for row, c in zip(logps, completions, strict=True)]


@pytest.mark.parametrize("how", [{}, {"reference": True}, {"policy": CachePolicy(WINDOW, eviction="h2o")}])
def test_an_attention_without_keys_may_give_anything(monkeypatch, how):
    """What SDPA returns for a query that sees no key is up to its backend: here NaN. No padded query may be one."""
    model, attention = with_pte(tiny("llama", torch.float64)), torch.nn.functional.scaled_dot_product_attention
    expected = sample(model, **how)

    def strict(query, key, value, attn_mask=None, **options):
        out = attention(query, key, value, attn_mask=attn_mask, **options)
        return out if attn_mask is None else out.masked_fill(~attn_mask.any(-1, keepdim=True), torch.nan)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", strict)
    found = sample(model, **how)
    assert found.completion_ids == expected.completion_ids
    for ours, theirs in zip(found.logprobs, expected.logprobs, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-9)


# Compiling takes half a minute: by default of one method.
COMPILED = [
    pytest.param("qwen2", method, "always", marks=[] if method == "pte" else pytest.mark.thorough)
    for method in ("pte", "lora_c", "bare")
]


@pytest.mark.parametrize(
    ("family", "method", "compile"),
    [*((f, m, "never") for f in ("qwen2", "llama") for m in ("pte", "lora_c", "bare")), *COMPILED],
)
def test_reported_logprobs_are_the_replayed_ones(family, method, compile, capsys):
    model = tiny(family, torch.float64)
    model = {"pte": with_pte, "lora_c": with_lora, "bare": lambda m: m}[method](model)
    result = sample(model, compile=compile)
    assert "not compiled" not in capsys.readouterr().out
    assert max(result.evictions) > 5
    assert len({len(c) for c in result.completion_ids}) > 1, "all sequences ended together: choose another seed"
    for ours, theirs in zip(result.logprobs, replayed(model, PROMPTS, result.completion_ids), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)


def test_ended_sequences_keep_their_end_and_nothing_after():
    result = sample(with_pte(tiny("qwen2", torch.float32)))
    for completion in result.completion_ids:
        assert not set(ENDS) & set(completion[:-1])
        assert completion[-1] in ENDS or len(completion) == NEW


def test_greedy_batch_equals_its_samples_alone():
    model = with_pte(tiny("llama", torch.float64))
    together = sample(model, temperature=0).completion_ids
    assert together == [sample(model, [prompt], temperature=0).completion_ids[0] for prompt in PROMPTS]


def test_same_seed_same_completions_and_training_mode_is_given_back():
    model = with_pte(tiny("qwen2", torch.float32)).train()
    assert sample(model).completion_ids == sample(model).completion_ids
    assert all(module.training for module in model.modules())


def test_cache_does_not_grow_with_the_completion():
    model = tiny("qwen2", torch.float32)
    short, long = (sample(model, eos_token_ids=[-1], max_new_tokens=n).cache_bytes for n in (20, 84))
    assert short == long  # both stop at the same place of the window's cycle (E = 2)


def test_a_completion_depends_on_its_seed_and_not_on_its_batch():
    model = with_pte(tiny("llama", torch.float64))
    seeds = [11, 12, 2**62 + 13]
    together = sample(model, seeds=seeds)
    alone = [sample(model, [p], seeds=[s]) for p, s in zip(PROMPTS, seeds, strict=True)]
    assert together.completion_ids == [result.completion_ids[0] for result in alone]
    turned = sample(model, PROMPTS[::-1], seeds=seeds[::-1])
    assert together.completion_ids == turned.completion_ids[::-1]
    assert together.completion_ids != sample(model, seeds=[1, 2, 3]).completion_ids


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_uniform_numbers_give_every_token_its_share(top_p):
    count = 20_000
    logits = torch.tensor([2.0, -1.0, 0.5, 0.4, -30.0])
    share = (logits / 0.5).softmax(-1)
    if top_p < 1:  # 0.92 of it is the first token's
        share = torch.tensor([1.0, 0, 0, 0, 0])
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    token, logps = sample_token(logits.expand(count, -1), 0.5, top_p, uniform)
    assert torch.bincount(token, minlength=5) / count == pytest.approx(share, abs=1e-4)
    assert logps == pytest.approx(share.log()[token], abs=1e-5)


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p():
    logps = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
    for top_p, kept in ((0.4, [1]), (0.6, [1, 3]), (0.79, [1, 3]), (0.9, [0, 1, 3]), (0.99, [0, 1, 2, 3])):
        found = nucleus(logps, top_p).exp()[0]
        assert found.nonzero().flatten().tolist() == kept
        assert found.sum().item() == pytest.approx(1)
        assert found[kept] == pytest.approx(logps.exp()[0, kept] / logps.exp()[0, kept].sum())


@pytest.mark.parametrize("eviction", STRATEGIES)
@pytest.mark.parametrize("method", ["pte", "bare"])
def test_shared_prefills_and_a_shrinking_batch_change_nothing(eviction, method):
    model = tiny("llama", torch.float64)
    model = with_pte(model) if method == "pte" else model
    prompts = [PROMPTS[0]] * 3 + [PROMPTS[1]] * 4 + [PROMPTS[2]] + [PROMPTS[0]]
    options = {"seeds": list(range(len(prompts))), "eos_token_ids": list(range(40, 48))}
    policy = CachePolicy(WINDOW, eviction=eviction)
    fast, plain = (sample(model, prompts, policy, reference=choice, **options) for choice in (False, True))
    assert fast.completion_ids == plain.completion_ids
    assert fast.evictions == plain.evictions
    for ours, theirs in zip(fast.logprobs, plain.logprobs, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)
    ended = sorted(map(len, fast.completion_ids))
    assert ended[len(ended) // 2] < NEW - 5, "the batch never shrinks: choose other seeds"


@pytest.mark.parametrize("eviction", STRATEGIES)
def test_every_strategy_gives_each_row_its_own_window(eviction):
    model, policy = with_pte(tiny("llama", torch.float64)), CachePolicy(budget=13, eviction=eviction)
    together = sample(model, policy=policy, seeds=[1, 2, 3], eos_token_ids=[-1])
    assert together.windows == [8, 11, 10]
    for at, prompt in enumerate(PROMPTS):
        alone = sample(model, [prompt], policy, seeds=[at + 1], eos_token_ids=[-1])
        assert alone.completion_ids == [together.completion_ids[at]] and alone.evictions == [together.evictions[at]]
        assert alone.logprobs[0] == pytest.approx(together.logprobs[at], abs=1e-6)
    assert min(together.evictions) > 3


def test_every_token_is_computed_once_and_no_more(monkeypatch):
    """Tokens that go through the model: each distinct prompt once, and little for completions that have ended."""
    model, seen = tiny("llama", torch.float32), []
    monkeypatch.setattr(model, "forward", spy(model.forward, seen))
    result = sample(model, [PROMPTS[0]] * 16, seeds=list(range(16)), eos_token_ids=list(range(40, 48)))
    prefill, *steps = seen
    assert prefill == len(PROMPTS[0])
    alive = [sum(len(c) > step for c in result.completion_ids) for step in range(1, len(steps) + 1)]
    assert all(now <= fed <= max(2 * now, 1) + now for now, fed in zip(alive, steps, strict=True))
    assert steps[-1] < 16


def spy(forward, seen: list):
    def call(*args, **kwargs):
        seen.append(kwargs["input_ids"].numel())
        return forward(*args, **kwargs)

    return call
