"""The GPU paths on a fake device (tests/fake_cuda.py): results of the CPU, no mixture of devices, few waits."""

import copy

import torch

from pte_trl.cache.policy import CachePolicy
from pte_trl.rollouts.batching import EngineCache
from tests.fake_cuda import FakeCuda
from tests.grids import grid
from tests.models import tiny
from tests.test_engine import MODELS, assert_same, sampled

PROMPTS = [[5, 6, 7, 8, 9]] * 3 + [[10, 11]] * 2 + [[12, 13, 14]] + [[5, 6, 7, 8, 9]]
SHORT = {"prompts": PROMPTS, "policy": CachePolicy(5), "max_new_tokens": 16, "eos_token_ids": [40, 41, 42]}
# Once per rollout: the random numbers go up, the results come down.
ONCE = {("host to device", "rollouts/sampling.py:uniforms"), ("device to host", "rollouts/rollout.py:rollout")}
ONCE |= {("device to host", "rollouts/rollout.py:<listcomp>"), ("device to host", "rollouts/rollout.py:<genexpr>")}
ONCE |= {("host to device", "rollouts/engine.py:__init__")}
REGULAR = ("device to host", "rollouts/engine.py:_turn_over")


def small(dtype=torch.float64, **config):
    return tiny("llama", dtype, num_hidden_layers=2, **config)


def moved(model, gpu: FakeCuda):
    """A copy of the model on the device; moving it is no wait to be counted."""
    model = copy.deepcopy(model).to("cuda:0")
    gpu.waits.clear()
    return model


@grid(model=MODELS, rows=[3, "auto", None])
def test_the_engine(model, rows):
    """Two rollouts of one kept engine, the second under other weights: both are the reference implementation's."""
    cpu, kept = MODELS[model](small()), EngineCache()
    with FakeCuda() as gpu:
        there = moved(cpu, gpu)
        for turn in range(2):
            seeds = [100 * turn + i for i in range(len(PROMPTS))]
            found = sampled(there, batch_size=rows, engine_cache=kept, seeds=seeds, **SHORT)
            assert_same(found, sampled(cpu, reference=True, seeds=seeds, **SHORT))
            with torch.no_grad():
                for parameter in (*there.parameters(), *cpu.parameters()):
                    parameter.mul_(1.05)
        assert gpu.captured and gpu.replays > 3 * gpu.captured
        assert set(gpu.waits) - ONCE == {REGULAR}
