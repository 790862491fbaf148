"""The compiled decode step: its functions against the reference implementation, what it refuses, what it launches."""

import argparse

import pytest
import torch
from peft import LoraConfig, get_peft_model

from benchmarks.launches import per_layer
from pte_trl.cache.masks import BLOCKWISE
from pte_trl.cache.policy import CachePolicy
from pte_trl.replay.plan import replay_inputs
from pte_trl.rollouts import compiled
from pte_trl.rollouts.batching import EngineCache
from pte_trl.rollouts.compiled import PARTS
from pte_trl.rollouts.decoder import Decoder, Unsupported
from tests.grids import grid
from tests.models import ALL_SEVEN, FAMILIES, tiny, with_lora, with_pte
from tests.test_engine import MODELS, PROMPTS, THOROUGH, WINDOWS, assert_same, sampled


@pytest.fixture
def uncompiled(monkeypatch):
    """The functions as they are: what a compiler makes of them is tested once, since it takes tens of seconds."""
    monkeypatch.setattr(compiled, "compiled_parts", lambda kind: PARTS)


def stays_compiled(model, within=1e-6, **changes):
    """A rollout with the compiled step, compared with the reference implementation."""
    kept = EngineCache()
    found = sampled(model, compile="always", engine_cache=kept, **changes)
    assert kept.engine.compiled is not None, "it has fallen back"
    assert_same(found, sampled(model, reference=True), within)
    return found


@grid(model=MODELS, family=FAMILIES, rows=[3, None])
def test_the_functions_are_the_reference_implementation(uncompiled, model, family, rows):
    stays_compiled(MODELS[model](tiny(family, torch.float64)), batch_size=rows)


@pytest.mark.parametrize("biases", [{"attention_bias": True}, {"mlp_bias": True}, {"head_dim": 16}])
def test_other_shapes_of_a_llama(uncompiled, biases):
    stays_compiled(with_pte(tiny("llama", torch.float64, **biases), target_modules=ALL_SEVEN), batch_size=4)


def test_every_precision_of_weights_and_adapters(uncompiled):
    """float32 adapters on bfloat16, and autocast over both: the eager engine's log-probs but for rounding."""
    for weights in (torch.float32, torch.bfloat16):
        for autocast in (False, True):
            model = with_pte(tiny("llama", weights))
            for name, parameter in model.named_parameters():
                if "pte_" in name:
                    parameter.data = parameter.data.float()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                options = {"max_new_tokens": 8, "eos_token_ids": [-1]}
                eager, ours = (sampled(model, compile=c, **options) for c in ("never", "always"))
            pairs = zip(eager.completion_ids, ours.completion_ids, eager.logprobs, ours.logprobs, strict=True)
            within = 1e-5 if weights == torch.float32 and not autocast else 0.05
            for tokens, others, theirs, mine in pairs:
                same = next((i for i, (a, b) in enumerate(zip(tokens, others, strict=True)) if a != b), len(tokens))
                assert mine[:same] == pytest.approx(theirs[:same], abs=within)


def test_casts_are_made_once_per_rollout_and_follow_the_weights():
    model = with_pte(tiny("llama", torch.bfloat16), target_modules=["q_proj"])
    for name, parameter in model.named_parameters():
        if "pte_" in name:
            parameter.data = parameter.data.float()
    decoder = Decoder(model)
    with torch.autocast("cpu", torch.bfloat16):
        first = decoder.read()[0][0].before.query
        weight = model.base_model.model.model.layers[0].self_attn.base_layer.q_proj.pte_down["default"].weight
        with torch.no_grad():
            weight.mul_(2)
        second = decoder.read()[0][0].before.query
    assert first.down.dtype == torch.bfloat16 and first.down.data_ptr() == second.down.data_ptr()
    assert torch.equal(second.down, weight.bfloat16())
    base = model.base_model.model.model.layers[0].self_attn.base_layer.q_proj.base_layer.weight
    assert first.weight.data_ptr() == base.data_ptr(), "a second copy of the base's weights"


def test_weights_of_the_next_rollout_and_an_adapter_that_is_off(uncompiled):
    for make in (with_pte, with_lora):
        model, kept = make(tiny("llama", torch.float64)), EngineCache()
        options = {"compile": "always", "engine_cache": kept, "batch_size": 4}
        before = sampled(model, **options)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.05)
        engine = kept.engine
        after = sampled(model, **options)
        assert kept.engine is engine and after.logprobs != before.logprobs
        assert_same(after, sampled(model, reference=True))
        with model.disable_adapter():
            assert_same(sampled(model, **options), sampled(model, reference=True))
        assert kept.engine is not engine, "a captured step would still apply the adapter"


def mismatch(model, **changes) -> float:
    """`mismatch/max`: the largest difference between log-probs of a rollout and of its replay. Rows are refilled, have
    windows of their own, and evict."""
    policy, kept = CachePolicy("auto"), EngineCache()
    options = {"batch_size": 4, "eos_token_ids": [40, 41], "engine_cache": kept} | changes
    found = sampled(model, policy=policy, schedules=policy.schedules(WINDOWS), **options)
    assert (kept.engine.compiled is None) == (changes["compile"] == "never") and max(found.evictions) > 3
    longest = max(map(len, PROMPTS))
    padded = [[-1] * (longest - len(p)) + p + c for p, c in zip(PROMPTS, found.completion_ids, strict=True)]
    width = max(map(len, padded))
    ids = torch.tensor([row + [-1] * (width - len(row)) for row in padded])
    mask, ids = (ids >= 0).long(), ids.clamp(min=0)
    with torch.no_grad():
        logits = model(input_ids=ids, **replay_inputs(model, mask, longest, policy.schedules(WINDOWS))).logits
    logps = (logits[:, longest - 1 : -1].float() / 0.8).log_softmax(-1)
    replayed = logps.gather(-1, ids[:, longest:, None]).squeeze(-1).tolist()
    pairs = (zip(*both, strict=False) for both in zip(found.logprobs, replayed, strict=True))
    return max(abs(ours - theirs) for pair in pairs for ours, theirs in pair)


MISMATCH = {"float32": 1e-5, "bfloat16": 0.1}


@pytest.mark.parametrize("dtype", MISMATCH)
@pytest.mark.parametrize("model", ["lora_c", "pte"])
def test_mismatch_of_rollout_and_replay(uncompiled, model, dtype):
    """In bfloat16 as in training: adapters in float32, under autocast."""
    made = MODELS[model](tiny("qwen2", getattr(torch, dtype))).eval()
    for name, parameter in made.named_parameters():
        if "pte_" in name or "lora_" in name:
            parameter.data = parameter.data.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        assert mismatch(made, compile="always") <= MISMATCH[dtype]


# ---- what it does not know -----------------------------------------------------------------------------------------


def hooked(model):
    model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: output * 0.5)
    return model


def dora(model):
    config = LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def eager_attention(model):
    model.set_attn_implementation("eager")
    return model


REFUSED = {
    "a hook": (lambda: hooked(tiny("llama", torch.float64)), "hook"),
    "another activation": (lambda: tiny("llama", torch.float64, hidden_act="gelu"), "hidden_act='gelu'"),
    "other norms": (lambda: tiny("llama", torch.float64, wide_norms=True), "WideNorm"),
    "dora": (lambda: dora(tiny("llama", torch.float64)), "variant"),
    "eager attention": (lambda: eager_attention(tiny("llama", torch.float64)), "attn_implementation='eager'"),
    "a window of the layer's own": (lambda: tiny("mistral", torch.float64, sliding_window=8), "sliding_window=8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_does_not_know_is_refused(name):
    make, words = REFUSED[name]
    with pytest.raises(Unsupported, match=words):
        Decoder(make()).read()


def test_every_blockwise_attention_decodes_alike():
    for name in (*BLOCKWISE, "sdpa"):
        model = tiny("llama", torch.float64)
        model.set_attn_implementation(name)
        assert len(Decoder(model).read()[0]) == 3


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="compile='yes': must be one of auto, always, never"):
        sampled(tiny("llama", torch.float64), compile="yes")


def test_the_reason_is_printed_once_and_steps_are_eager(capsys):
    compiled.say.cache_clear()
    model = hooked(tiny("llama", torch.float64))
    found = [sampled(model, compile="always") for _ in range(2)]
    assert_same(found[0], sampled(model, reference=True))
    assert found[1].logprobs == found[0].logprobs
    assert capsys.readouterr().out.count("decode steps are not compiled but eager: Unsupported: a hook") == 1


def test_a_compiler_that_fails_in_the_middle_of_a_step_loses_nothing(monkeypatch, capsys):
    compiled.say.cache_clear()
    calls = []

    def fails(*inputs):
        calls.append(inputs)
        if len(calls) == 7:
            raise RuntimeError("no compiler here\nand more")
        return PARTS[1](*inputs)

    monkeypatch.setattr(compiled, "compiled_parts", lambda kind: (PARTS[0], fails, PARTS[2]))
    model = with_pte(tiny("llama", torch.float64))
    assert_same(sampled(model, compile="always"), sampled(model, reference=True))
    assert len(calls) == 7
    assert capsys.readouterr().out.strip().endswith("RuntimeError: no compiler here")


# ---- the compiler itself -------------------------------------------------------------------------------------------


# Per layer and step. For a CPU the compiler fuses nothing behind a reduction, so the cast behind x S, twice a layer,
# is a kernel of its own. For a GPU it joins a reduction and what comes next where both have as many results, as here.
# A sum in bfloat16 would round every addend, and a product of matrices S: the replay rounds neither.
LAUNCHES = {
    ("bare", "float32"): 14,
    ("lora_c", "float32"): 18,
    ("pte", "float32"): 20,
    ("bare", "bfloat16"): 14,
    ("lora_c", "bfloat16"): 18,
    ("pte", "bfloat16"): 22,
}


def launch_cases():
    return [pytest.param(*case, marks=[] if case == ("pte", "float32") else THOROUGH) for case in LAUNCHES]


@pytest.mark.parametrize(("adapter", "dtype"), launch_cases())
def test_launches_of_a_layer(adapter, dtype):
    args = argparse.Namespace(shape="tiny", device="cpu", dtype=dtype)
    assert per_layer(adapter, True, args) <= LAUNCHES[adapter, dtype]


@THOROUGH
@pytest.mark.parametrize("model", ["bare", "lora_c", "pte", "pte, column, row norm"])
def test_compiled_it_is_the_reference_implementation(model):
    """With refilled rows, and rows that become fewer."""
    stays_compiled(MODELS[model](tiny("qwen3", torch.float64)), batch_size=4)
