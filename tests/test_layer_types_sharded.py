"""Experts, sliding and recurrent layers with PTE under engines that divide the weights: two ranks against one."""

from pathlib import Path

import pytest

from tests.layer_types_probe import logps_of, model
from tests.lockstep_probe import SAMPLES, loss_of
from tests.models import gap
from tests.test_gradients import assert_same
from tests.test_lockstep import launch

PROBE = Path(__file__).with_name("layer_types_probe.py")


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
@pytest.mark.parametrize("case", ["qwen3_moe", "gemma3_text", "falcon_h1", "gemma3_text+reentrant"])
def test_ranks_with_unlike_samples_do_what_one_process_does(tmp_path, case, engine):
    """Keys and values are found by a forward that ends in an exception, on one rank and not on the other."""
    alone = model(case)
    logps = [[logps_of(alone, alone, rank, number) for number in range(2)] for rank in range(len(SAMPLES))]
    sum(loss_of(found) / len(SAMPLES) for rank in logps for found in rank).backward()
    wanted = {name: p.grad for name, p in alone.named_parameters() if p.requires_grad}
    for found, expected in zip(launch(tmp_path, engine, case, probe=PROBE), logps, strict=True):
        assert all(gap(a, b) <= 1e-4 for a, b in zip(found["logps"], expected, strict=True))
        assert_same(found["gradients"], wanted, 1e-3)
