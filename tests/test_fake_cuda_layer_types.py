"""The engine for layers of other types than full attention on a fake GPU: captured, or eager and that is printed."""

import pytest
import torch

from pte_trl.cache.policy import CachePolicy
from pte_trl.rollouts import compiled
from pte_trl.rollouts.batching import EngineCache
from tests.fake_cuda import FakeCuda
from tests.layer_type_models import CONFIGS, FULL, SLIDING, mixed
from tests.test_engine import assert_same, sampled
from tests.test_engine_layer_types import ARMS, WITHIN
from tests.test_fake_cuda import ONCE, REGULAR, moved, small

# A prompt longer than the models' own window, and three of its completions in two rows.
PROMPTS = [[5, 6, 7, 8, 9, 10, 11]] * 3 + [[10, 11]]
OPTIONS = {"prompts": PROMPTS, "policy": CachePolicy(4), "max_new_tokens": 9, "eos_token_ids": [40, 41, 42]}


BY_DEFAULT = {("olmo3", "pte"), ("falcon_h1", "bare"), ("qwen3_moe", "lora_c")}
CELLS = [
    pytest.param(family, arm, marks=[] if (family, arm) in BY_DEFAULT else pytest.mark.thorough)
    for family in CONFIGS
    for arm in ARMS
]


@pytest.mark.parametrize(("family", "arm"), CELLS)
def test_steps_are_captured(family, arm):
    """Two rollouts of a kept engine, the second under other weights and in fewer rows."""
    cpu, kept = ARMS[arm](mixed(family)), EngineCache()
    with FakeCuda() as gpu:
        there = moved(cpu, gpu)
        for rows in ("auto", 2):
            found = sampled(there, batch_size=rows, engine_cache=kept, **OPTIONS)
            assert_same(found, sampled(cpu, reference=True, **OPTIONS), WITHIN)
            with torch.no_grad():
                for parameter in (*there.parameters(), *cpu.parameters()):
                    parameter.mul_(1.02)
        assert gpu.captured and gpu.replays > gpu.captured
        assert set(gpu.waits) - ONCE <= {REGULAR}


def waits_at_every_step(model):
    model.lm_head.register_forward_hook(lambda *call: call[-1] * float(call[-1].new_ones(()).item()))


def waits_at_first(model):
    """As a library does that sets itself up."""
    calls = []

    def hook(*call):
        calls.append(1)
        return call[-1] * (call[-1].new_ones(()).item() if len(calls) < 3 else 1)

    model.lm_head.register_forward_hook(hook)


def test_a_step_that_waits_is_not_captured(capsys):
    """An architecture is told by what it does: eager steps, and one sentence that says where they wait."""
    compiled.say.cache_clear()
    model = mixed("olmo3", num_hidden_layers=2, layer_types=[SLIDING, FULL])
    expected = sampled(model, **OPTIONS)
    with FakeCuda() as gpu:
        for _ in range(2):
            there = moved(model, gpu)
            waits_at_every_step(there)
            assert_same(sampled(there, batch_size=2, **OPTIONS), expected, WITHIN)
        assert gpu.sync_debug == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "not captured" in line]
    assert len(said) == 1 and "waits for the device in test_fake_cuda_layer_types.py, line " in said[0]


def test_a_step_that_waits_at_first_is_captured():
    model = mixed("olmo3", num_hidden_layers=2, layer_types=[SLIDING, FULL])
    expected = sampled(model, **OPTIONS)
    with FakeCuda() as gpu:
        there = moved(model, gpu)
        waits_at_first(there)
        assert_same(sampled(there, batch_size=2, **OPTIONS), expected, WITHIN)
        assert gpu.replays > gpu.captured > 0


def test_a_known_family_may_not_wait():
    """A wait in one of these is a fault of ours: it must not be hidden by eager steps."""
    model = small()
    with FakeCuda() as gpu:
        there = moved(model, gpu)
        waits_at_every_step(there)
        with pytest.raises(Exception, match="while a graph is captured"):
            sampled(there, batch_size=2, **OPTIONS)
