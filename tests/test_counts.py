"""Kernel launches and bytes of a training step, counted by operation: goals that a change must not lose unnoticed."""

import torch

from benchmarks.counts import Counts, moved
from benchmarks.models import random_model, with_adapter
from pte_trl.adapter.recursion import by_systems, step_by_step
from pte_trl.cache.schedule import Schedule
from pte_trl.replay.plan import replay_inputs

PROMPT, COMPLETION, WINDOW = 128, 768, 128  # 20 evictions, as of 3,072 tokens with W = 512
# Launches of one layer, forward and backward with recompute, before attention and recursion were one node each.
LORA_BEFORE, PTE_BEFORE = 336, 978


def launches(adapter: str) -> int:
    """Of one layer: what two layers have beyond one."""
    found = []
    for layers in (1, 2):
        model = with_adapter(random_model("tiny", 0, num_hidden_layers=layers), adapter).train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        ids = torch.randint(1, 50, (1, PROMPT + COMPLETION))
        inputs = replay_inputs(model, torch.ones_like(ids), PROMPT, Schedule(WINDOW))
        inner = model.get_base_model().model
        inputs["replay"].biases(torch.float32)  # made once for all layers
        with Counts() as counts:
            inner(input_ids=ids, **inputs).last_hidden_state.sum().backward()
        found.append(counts.launches.total())
    return found[1] - found[0]


def of_the_recursion() -> int:
    """Of its forward in the step, twice, and of its backward; on CUDA each is one kernel."""
    start, updates = torch.ones(32, 32), torch.ones(1, 20, 32, 32)
    with Counts() as counts:
        for _ in range(2):
            states = step_by_step(start, updates, "rms")
        by_systems(start, updates, states, updates, "rms")
    return counts.launches.total()


def test_launches_of_a_step():
    """PTE with its kernel takes at most 1.3 times what LoRA under the same window took."""
    assert Schedule(WINDOW).evictions(COMPLETION) == 20
    lora, pte = map(launches, ("lora", "pte"))
    with_kernel = pte - of_the_recursion() + 3
    assert lora <= 0.6 * LORA_BEFORE, lora
    assert pte <= 0.65 * PTE_BEFORE, pte
    assert with_kernel <= 1.3 * LORA_BEFORE and with_kernel <= 1.85 * lora, (with_kernel, lora)


def test_what_is_counted():
    x = torch.ones(4, 6)
    with Counts() as counts:
        (x.t()[2:] + x[0, 0].expand(4, 4)).add_(1)
        torch.empty(3)
    assert counts.launches == {"aten::add": 1, "aten::add_": 1}
    assert counts.bytes == {"aten::add": 4 * (16 + 1 + 16), "aten::add_": 4 * (16 + 16)}
    assert moved(torch.ones(1).expand(5)) == 4 and moved(torch.ones(2, 3, dtype=torch.bfloat16)) == 12
