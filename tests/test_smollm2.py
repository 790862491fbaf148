"""On a real pretrained model, with its attention sinks: the two views still agree, and the cache stays bounded."""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from pte_trl import PteConfig
from pte_trl.adapter.calibration import calibrate
from pte_trl.cache.policy import CachePolicy
from pte_trl.cache.schedule import Schedule
from pte_trl.replay.plan import replay_inputs
from pte_trl.rollouts.prompts import left_pad
from pte_trl.rollouts.rollout import rollout
from pte_trl.smollm2 import make

PROBLEMS = ["What is 7 + 5?", "A farmer has 17 sheep and buys 8 more. He then sells 5. How many sheep are left?"]
WINDOW, THOUGHT = 32, 72


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    try:
        folder = make(tmp_path_factory.mktemp("smollm2") / "model")
    except RuntimeError as error:
        pytest.skip(f"SmolLM2 cannot be had: {error}")
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.slow
@pytest.mark.thorough  # a minute and a half; tests/test_exactness.py on tiny models
@torch.no_grad()
def test_replay_equals_decode_on_a_real_model(smollm2):
    base, tokenizer = smollm2
    torch.manual_seed(0)
    model = get_peft_model(base, PteConfig()).eval()
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], add_generation_prompt=True, return_dict=False)
        for p in PROBLEMS
    ]
    ids, mask = left_pad(prompts, tokenizer.pad_token_id, "cpu")
    calibrate(model, ids, mask, evict=Schedule(WINDOW).evict)
    for name, parameter in model.named_parameters():
        if "pte_up" in name:
            parameter.normal_(std=0.02)

    result = rollout(
        model,
        prompts,
        CachePolicy(WINDOW),
        max_new_tokens=THOUGHT,
        eos_token_ids=[-1],
        pad_token_id=0,
        temperature=0.6,
    )
    assert result.evictions == [Schedule(WINDOW).evictions(THOUGHT - 1)] * 2

    completions = torch.tensor(result.completion_ids)
    ids, mask = torch.cat([ids, completions], 1), torch.cat([mask, torch.ones_like(completions)], 1)
    prompt = ids.shape[1] - THOUGHT

    def score(adapted):
        logits = adapted(input_ids=ids, **replay_inputs(adapted, mask, prompt, Schedule(WINDOW))).logits[
            :, prompt - 1 : -1
        ]
        return (logits / 0.6).log_softmax(-1).gather(2, completions.unsqueeze(2)).squeeze(2)

    mismatch = (score(model) - torch.tensor(result.logprobs)).abs().max().item()
    print(f"largest |replay - rollout| over {THOUGHT} thought tokens: {mismatch:.1e}")
    assert mismatch <= 1e-3
    with model.disable_adapter():
        assert (score(model) - torch.tensor(result.logprobs)).abs().max() > 0.1  # the adapter does something
