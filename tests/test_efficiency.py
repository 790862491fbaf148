"""The efficiency columns: the formula against counting, and what a run leaves behind."""

import json
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerControl, TrainerState, TrainingArguments

from pte_trl.cache.schedule import Schedule
from pte_trl.replay.plan import ReplayPlan
from pte_trl.runtime.efficiency import EfficiencyCallback, attention_tflops, memory_share, visible_pairs
from tests.models import tiny


@pytest.mark.parametrize("window", [1, 3, 8, 40])
@pytest.mark.parametrize(("prompt", "completion"), [(1, 1), (5, 30), (7, 29)])
def test_visible_pairs_are_those_of_the_replay_mask(window, prompt, completion):
    plan = ReplayPlan.build([Schedule(window)], prompt, torch.ones(1, prompt + completion))
    mask = plan.mask()
    assert visible_pairs(prompt, completion, Schedule(window)) == int(mask.sum())


def test_without_a_schedule_the_pairs_are_the_causal_ones():
    assert visible_pairs(5, 7, None) == visible_pairs(5, 7, Schedule(100)) == 12 * 13 // 2


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_flops_of_a_pair_are_those_that_torch_counts(family):
    model, length = tiny(family, torch.float32), 16
    model.set_attn_implementation("eager")  # the whole square, as products that can be counted
    ids = torch.ones(1, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False)
    counted = sum(
        flops for operation, flops in counter.get_flop_counts()["Global"].items() if operation is torch.ops.aten.bmm
    )
    assert attention_tflops(model.config, length**2, length) * 1e12 == pytest.approx(counted, rel=0.01)


def test_the_callback_writes_peak_and_mean_of_what_it_saw(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    callback, state = EfficiencyCallback(interval=0.01), TrainerState(is_world_process_zero=True)
    callback.on_train_begin(args, state, TrainerControl())
    before = memory_share(args.device)
    ballast = torch.ones(100_000_000)  # 400 MB
    time.sleep(0.2)
    state.log_history = [{"attention/tflops_max": "0.25"}, {"attention/tflops_max": "0.5"}, {"loss": "1"}]
    callback.on_train_end(args, state, TrainerControl())
    found = json.loads((tmp_path / "efficiency.json").read_text())
    assert found["attention_tflops_max"] == 0.5
    assert found["gpu_mem_peak_pct"] > before + 0.5 * 100 * ballast.nbytes / 32e9
    assert before < found["gpu_mem_mean_pct"] <= found["gpu_mem_peak_pct"]
    assert "without a GPU" in found["memory_of"]
