"""What PEFT's own tests ask of every method, asked of PTE: each config on each family, by a diagonal of both."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from pte_trl import BoundedCache, PteConfig
from pte_trl.adapter import PteAttention
from pte_trl.adapter.calibration import calibrate
from pte_trl.adapter.model import evicted_encoders
from pte_trl.cache.policy import CachePolicy
from pte_trl.cache.schedule import Schedule
from pte_trl.replay.segments import segment_logps
from pte_trl.rollouts.rollout import rollout
from tests.models import (
    ATTENTION,
    OPTIONS,
    TEMPERATURE,
    chosen,
    decode_logps,
    gap,
    left_padded_batch,
    randomise_up,
    replay_logps,
    tiny,
)

WINDOW = 3
BATCH = left_padded_batch([3, 2], 7)
SMALL = {"rank": 4, "num_global_tokens": 6, "alpha": 4.0}
CONFIGS = {
    "usual": {},
    "column": {"read": "column"},
    "sum": {"state_update": "sum"},
    "column, sum, row norm": {"read": "column", "state_update": "sum", "normalisation": "row"},
    "whiten": {"whiten": True},
    "global-0": {"use_global_tokens": False},
    "global-only": {"encode_evicted": False},
    "qkvo": {"target_modules": ATTENTION},
    "mlp": {"target_modules": ["gate_proj", "down_proj"]},
    "all-linear, whiten, sum": {"target_modules": "all-linear", "whiten": True, "state_update": "sum"},
    **OPTIONS,
    "dropout": {"dropout": 0.3},
    "some layers": {"layers_to_transform": [1], "target_modules": "all-linear"},
    "some linears": {"exclude_modules": r".*layers\.0\.self_attn\.(q|k|v)_proj", "target_modules": ATTENTION},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
}
FAMILIES = ["llama", "qwen2", "qwen3", "mistral"]
GRID = [(name, FAMILIES[n % 4]) for n, name in enumerate(CONFIGS)]
# Of the encoder's options, the other tests run by default with these two, in which all of them are.
LATER = OPTIONS.keys() - {"gated sum", "all options"}
each_fresh = pytest.mark.parametrize(("name", "family"), GRID)
every = pytest.mark.parametrize(
    ("name", "family"),
    [pytest.param(*cell, marks=[pytest.mark.thorough] if cell[0] in LATER else []) for cell in GRID],
)
CLOSE = 1e-4  # float32: where tensors lie in memory decides how they are added up
FLOAT16 = (torch.float16, torch.bfloat16)


def base(family, dtype=torch.float32):
    torch.manual_seed(7)
    return tiny(family, dtype, num_hidden_layers=2)


def adapted(name, family, dtype=torch.float32, seed=1, **kwargs):
    plain = base(family, dtype)
    torch.manual_seed(seed)
    model = get_peft_model(plain, PteConfig(**{**SMALL, **CONFIGS[name]}), **kwargs).eval()
    trained(model, "default")
    return model


@torch.no_grad()
def trained(model, adapter):
    randomise_up(model, adapter)
    for key, parameter in model.named_parameters():
        if f"modules_to_save.{adapter}" in key:
            parameter.mul_(1.1)


@torch.no_grad()
def logps(model):
    return replay_logps(model, *BATCH, WINDOW)


def all_equal(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@each_fresh
def test_fresh_it_is_the_base_and_trained_it_is_not(name, family):
    model = get_peft_model(base(family), PteConfig(**SMALL, **CONFIGS[name])).eval()
    plain = logps(base(family))
    assert torch.equal(logps(model), plain)
    trained(model, "default")
    assert gap(logps(model), plain) > 1e-4
    with model.disable_adapter():
        assert torch.equal(logps(model), plain)
    unloaded, expected = model.unload(), base(family).state_dict()
    if "modules_to_save" in CONFIGS[name]:  # PEFT leaves the trained module
        assert unloaded.state_dict().keys() == expected.keys()
        return
    assert gap(logps(unloaded), plain) < CLOSE and all_equal(unloaded.state_dict(), expected)


@every
def test_saved_loaded_and_copied(name, family, tmp_path):
    model = adapted(name, family)
    expected, state = logps(model), get_peft_model_state_dict(model)
    model.save_pretrained(tmp_path)
    assert all_equal(load_file(tmp_path / "adapter_model.safetensors"), state)
    for low in (False, True):
        loaded = PeftModel.from_pretrained(base(family), tmp_path, low_cpu_mem_usage=low)
        assert all_equal(loaded.state_dict(), model.state_dict())
        assert gap(logps(loaded), expected) < CLOSE
    other = adapted(name, family, seed=2)
    assert gap(logps(other), expected) > 1e-4
    set_peft_model_state_dict(other, state)
    assert all_equal(other.state_dict(), model.state_dict()) and gap(logps(other), expected) < CLOSE
    assert gap(logps(copy.deepcopy(model)), expected) < CLOSE


@every
def test_two_adapters_are_switched_and_deleted(name, family):
    following = list(CONFIGS)[(list(CONFIGS).index(name) + 1) % len(CONFIGS)]
    model, second = adapted(name, family), adapted(following, family, seed=2)
    expected = [logps(model), logps(second)]
    model.add_adapter("second", PteConfig(**{**SMALL, **CONFIGS[following]}))
    set_peft_model_state_dict(model, get_peft_model_state_dict(second), adapter_name="second")
    assert gap(*expected) > 1e-3 and gap(logps(model), expected[0]) < CLOSE
    for adapter, want in (("second", expected[1]), ("default", expected[0]), ("second", expected[1])):
        model.set_adapter(adapter)
        assert model.active_adapters == [adapter] and gap(logps(model), want) < CLOSE
        trainable = {key for key, p in model.named_parameters() if p.requires_grad}
        assert trainable and all(f".{adapter}" in key for key in trainable)
        with model.disable_adapter():
            assert gap(logps(model), logps(base(family))) < CLOSE
    model.delete_adapter("second")
    model.set_adapter("default")
    assert gap(logps(model), expected[0]) < CLOSE and not any(".second" in key for key in model.state_dict())
    left = {each for m in model.modules() if isinstance(m, PteAttention) for each in m.config}
    assert left <= {"default"}


@every
def test_every_trainable_tensor_learns_and_no_other_changes(name, family):
    """One optimizer step, through the replay; with checkpointing of either kind the gradients are the same."""
    model = adapted(name, family, torch.float64, autocast_adapter_dtype=False).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # its noise would differ from run to run
    frozen = {key: t.clone() for key, t in model.state_dict().items()}
    model.enable_input_require_grads()
    found = []
    for reentrant in (None, False, True):
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        chosen(replay_logps(model, *BATCH, WINDOW), BATCH[0], BATCH[2]).square().sum().backward()
        found.append({key: p.grad.clone() for key, p in model.named_parameters() if p.requires_grad})
    for again in found[1:]:
        assert all((again[key] - grad).norm() <= 1e-9 * grad.norm() for key, grad in found[0].items())
    # Where S_0 = 0, or nothing is evicted into S, some tensors have no say; which, is fixed.
    silent = {key for key, grad in found[0].items() if grad.norm() == 0}
    assert not silent or (name == "global-0" and not silent & {k for k in silent if "map" in k})
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    changed = {key for key, t in model.state_dict().items() if not torch.equal(t, frozen[key])}
    assert changed == found[0].keys() - silent


@every
def test_the_views_agree(name, family):
    """Decode, replay, segments, `generate` and the engine, also where some layers have no S."""
    model = adapted(name, family, torch.float64, autocast_adapter_dtype=False)
    expected = logps(model)
    with torch.no_grad():
        assert gap(decode_logps(model, *BATCH, WINDOW), expected) < 1e-6
        by_segment, _ = segment_logps(model, *BATCH, Schedule(WINDOW), temperature=TEMPERATURE)
    assert gap(by_segment, chosen(expected, BATCH[0], BATCH[2])) < 1e-6
    options = {"max_new_tokens": 7, "eos_token_ids": [], "pad_token_id": 0, "seeds": [0, 1]}
    prompts = [[5, 6, 7], [8, 9]]
    engine, plain = (rollout(model, prompts, CachePolicy(WINDOW), reference=r, **options) for r in (False, True))
    assert engine.completion_ids == plain.completion_ids and max(engine.evictions) == 3
    for ours, theirs in zip(engine.logprobs, plain.logprobs, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        unbounded = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
        wide = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, past_key_values=BoundedCache(100))
    assert torch.equal(unbounded, wide)


def test_layers_without_pte_neither_encode_nor_are_calibrated():
    model = adapted("some layers", "llama")
    assert list(evicted_encoders(model)) == [1]
    assert len(calibrate(model, BATCH[0], BATCH[1], 2)) == 1
    model.add_adapter("all", PteConfig(**SMALL))
    model.set_adapter("all")
    assert list(evicted_encoders(model)) == [0, 1] and len(calibrate(model, BATCH[0], BATCH[1], 2)) == 2
    model.set_adapter("default")
    assert list(evicted_encoders(model)) == [1] and len(calibrate(model, BATCH[0], BATCH[1], 2)) == 1


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, *FLOAT16])
def test_every_dtype(dtype, autocast_adapter_dtype, tmp_path):
    name = "all-linear, whiten, sum"
    cast = {"autocast_adapter_dtype": autocast_adapter_dtype}
    model = adapted(name, "llama", dtype, **cast)
    own = torch.float32 if autocast_adapter_dtype else dtype
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {own}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype}
    whiteners = {t.dtype for key, t in model.state_dict().items() if "whitener" in key}
    assert whiteners == {torch.float32}
    model.save_pretrained(tmp_path)
    for low in (False, True):
        loaded = PeftModel.from_pretrained(base("llama", dtype), tmp_path, low_cpu_mem_usage=low, **cast)
        assert all_equal(loaded.state_dict(), model.state_dict())
        assert {key: t.dtype for key, t in loaded.state_dict().items()} == {
            key: t.dtype for key, t in model.state_dict().items()
        }
    exact = copy.deepcopy(model).double()
    bound = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 1.0}[dtype]
    assert gap(logps(model).double(), logps(exact)) < bound
