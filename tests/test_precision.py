"""One grid: weights' dtype x autocast x method x view x family. Every view gives the log-probs of the replay.

What differs between two views is rounding alone, so the bound of a cell follows from its least precise dtype.
"""

import itertools
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model

from pte_trl import BoundedCache, PteConfig
from pte_trl.cache.policy import CachePolicy
from pte_trl.cache.schedule import Schedule
from pte_trl.replay.plan import replay_inputs
from pte_trl.replay.segments import segment_logps
from pte_trl.rollouts.batching import EngineCache
from pte_trl.rollouts.rollout import rollout
from tests.models import FAMILIES, OPTIONS, VOCAB, randomise_up, tiny

WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)
AUTOCAST = (None, torch.bfloat16)
METHODS = ("pte", "lora_c", "all options")
WINDOW, NEW, EOS = 4, 9, VOCAB + 1  # nothing ends a completion: all are NEW tokens long, with four evictions
PROMPTS = [[5, 9, 17, 33, 4], [7, 8, 3], [21, 2, 40, 41, 42, 43]]
# Largest difference of a log-prob, and of a gradient relative to its norm; what the grid showed is in the comments.
LOG_PROBS = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 0.1}  # 9.5e-7, 4.6e-3, 0.03
GRADIENTS = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 0.05}  # 1.1e-6, 1.5e-3, 0.012


def bound(bounds: dict, weights: torch.dtype, autocast: torch.dtype | None) -> float:
    return max(bounds[weights], bounds.get(autocast, 0.0))


def under(autocast):
    return nullcontext() if autocast is None else torch.autocast("cpu", dtype=autocast)


def made(family: str, method: str, weights: torch.dtype):
    """A model with an adapter as PEFT makes it by default: in float32 beside weights in low precision."""
    model = tiny(family, dtype=weights, attn_implementation="blockwise", num_hidden_layers=2)
    torch.manual_seed(1)
    if method != "lora_c":
        options = OPTIONS.get(method, {})
        model = get_peft_model(model, PteConfig(rank=5, num_global_tokens=6, alpha=5.0, **options)).eval()
        randomise_up(model)
        return model
    config = LoraConfig(r=5, lora_alpha=5, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def batch_of(completions: list[list[int]]):
    """(ids, mask, prompt length), prompts padded on the left."""
    longest = max(map(len, PROMPTS))
    rows = [[0] * (longest - len(p)) + p + c for p, c in zip(PROMPTS, completions, strict=True)]
    ids = torch.tensor(rows)
    mask = torch.ones_like(ids)
    for row, prompt in enumerate(PROMPTS):
        mask[row, : longest - len(prompt)] = 0
    return ids, mask, longest


def replayed(model, completions: list[list[int]]) -> torch.Tensor:
    ids, mask, prompt = batch_of(completions)
    logits = model(input_ids=ids, **replay_inputs(model, mask, prompt, Schedule(WINDOW))).logits[:, prompt - 1 : -1]
    return logits.float().log_softmax(-1).gather(-1, ids[:, prompt:, None]).squeeze(-1)


def sampled(model, reference: bool, kept: EngineCache | None = None):
    found = rollout(
        model,
        PROMPTS,
        CachePolicy(WINDOW),
        max_new_tokens=NEW,
        eos_token_ids=[EOS],
        pad_token_id=0,
        seeds=[1, 2, 3],
        reference=reference,
        engine_cache=kept,
    )
    return found.completion_ids, torch.tensor(found.logprobs)


def by_generate(model):
    ids, mask, prompt = batch_of([[] for _ in PROMPTS])
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=BoundedCache(WINDOW),
        max_new_tokens=NEW,
        do_sample=True,
        top_k=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = out.sequences[:, prompt:]
    logps = torch.stack(out.logits, 1).float().log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return tokens.tolist(), logps


def by_segments(model, tokens: list[list[int]] | None = None):
    tokens = tokens or torch.randint(1, VOCAB, (len(PROMPTS), NEW)).tolist()
    ids, mask, prompt = batch_of(tokens)
    logps, _ = segment_logps(model, ids, mask, prompt, Schedule(WINDOW), temperature=1.0)
    return tokens, logps


VIEWS = {
    "engine": lambda model: sampled(model, reference=False),
    "reference": lambda model: sampled(model, reference=True),
    "generate": by_generate,
    "segments": by_segments,
}


def grid():
    """Every cell; those where each choice of precision and method meets its own family always run."""
    cells = list(itertools.product(METHODS, WEIGHTS, AUTOCAST, FAMILIES))
    for number, (method, weights, autocast, family) in enumerate(cells):
        always = number % len(FAMILIES) == number // len(FAMILIES) % len(FAMILIES)
        yield pytest.param(
            family,
            method,
            weights,
            autocast,
            marks=[] if always else [pytest.mark.thorough],
            id=f"{family}-{method}-{weights}-{autocast}",
        )


GRID = list(grid())


@pytest.mark.parametrize(("family", "method", "weights", "autocast"), GRID)
def test_every_view_gives_the_log_probs_of_the_replay(family, method, weights, autocast):
    model, found = made(family, method, weights), {}
    with under(autocast), torch.no_grad():
        for view, run in VIEWS.items():
            tokens, logps = run(model)
            found[view] = (replayed(model, tokens) - logps).abs().max().item()
    assert max(found.values()) <= bound(LOG_PROBS, weights, autocast), found


@pytest.mark.parametrize(("family", "method", "weights", "autocast"), GRID)
def test_segments_have_the_gradient_of_the_replay(family, method, weights, autocast):
    model = made(family, method, weights)
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in parameters} == {torch.float32}
    gradients = []
    tokens = torch.randint(1, VOCAB, (len(PROMPTS), NEW), generator=torch.Generator().manual_seed(3)).tolist()
    for score in (replayed, lambda *args: by_segments(*args)[1]):
        with under(autocast):
            logps = score(model, tokens)
        found = torch.autograd.grad(logps.sum(), parameters, allow_unused=True)
        gradients.append(torch.cat([g.flatten() for g in found if g is not None]))
    one_pass, segments = gradients
    assert torch.isfinite(one_pass).all() and one_pass.norm() > 0
    assert (one_pass - segments).norm() <= bound(GRADIENTS, weights, autocast) * one_pass.norm()


@pytest.mark.parametrize("plain", [False, True], ids=["engine", "reference"])
def test_an_engine_is_not_used_again_under_another_autocast(plain):
    """Its buffers are in the dtypes of the run that made them."""
    model, kept = made("qwen2", "pte", torch.float32), EngineCache()
    for autocast in (*AUTOCAST, *AUTOCAST):
        with under(autocast), torch.no_grad():
            tokens, logps = sampled(model, plain, kept)
            assert (replayed(model, tokens) - logps).abs().max() <= bound(LOG_PROBS, torch.float32, autocast)
