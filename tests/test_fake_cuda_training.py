"""Whole steps of the trainers, and whole commands, on the fake GPU: they run, and give what a CPU gives."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState

from pte_trl.evaluation import generate
from pte_trl.evaluation.script import main as evaluate
from tests.fake_cuda import FakeCuda
from tests.grids import grid
from tests.test_distill import distiller
from tests.test_evaluate import argv, setting  # noqa: F401
from tests.test_trainer import logged, trainer_for

SHORT = {"max_steps": 1, "max_completion_length": 10, "window": 4}
GRPO = {
    "pte": {},
    "segments, offload": {"replay": "segments", "offload_cache": True},
    "lora_c, auto": {"method": "lora_c", "window": "auto"},
}


@pytest.fixture(autouse=True)
def state_of_accelerate():
    """Its process-wide state names the device of the last run."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def trained(make, folder, **changes):
    torch.manual_seed(0)
    trainer = make(folder, **SHORT | changes)
    trainer.train()
    return trainer


def on_both(make, folder, names, **changes) -> FakeCuda:
    """Trains on the CPU and on the device, and compares what is logged."""
    expected = trained(make, folder / "cpu", **changes)
    with FakeCuda() as gpu:
        found = trained(make, folder / "gpu", use_cpu=False, **changes)
        assert found.accelerator.device.type == "cuda"
        assert all(parameter.is_cuda for parameter in found.model.parameters())
        for name in names:
            values = logged(found, name)
            assert values == pytest.approx(logged(expected, name), rel=1e-3, abs=1e-6) and values, name
    return gpu


@grid(options=GRPO)
def test_a_step_of_grpo(tmp_path, options):
    names = ("reward", "grad_norm", "loss", "rollout/evictions", "completions/mean_length")
    on_both(trainer_for, tmp_path, names, **GRPO[options])


def test_a_step_of_distillation(tmp_path):
    on_both(distiller, tmp_path, ("kl", "grad_norm", "loss", "rollout/evictions"))


def test_a_step_in_mixed_precision(tmp_path):
    """bf16 over float32 weights, as the recipes train on a GPU: the replay scores what was sampled."""
    with FakeCuda():
        trainer = trained(trainer_for, tmp_path, use_cpu=False, bf16=True)
        assert 0 < max(logged(trainer, "mismatch/mean")) < 0.05
        assert all(norm > 0 for norm in logged(trainer, "grad_norm"))


def test_evaluation_and_generate(setting, tmp_path):  # noqa: F811
    """The records of both devices differ in nothing but rounding."""
    small = {"samples": 1, "max_new_tokens": 14, "top_p": 0.9}
    asked = [
        "--model_name_or_path",
        str(setting / "model"),
        "--adapter",
        str(setting / "adapter"),
        "--dtype",
        "float32",
    ]
    asked += ["--question", "1+1", "--window", "6", "--max_new_tokens", "10"]
    evaluate(argv(setting, tmp_path / "cpu", **small))
    answers = generate.main([*asked, "--use_cpu", "true"])
    AcceleratorState._reset_state(reset_partial_state=True)
    with FakeCuda() as gpu:
        evaluate(argv(setting, tmp_path / "gpu", **small, use_cpu="false"))
        assert gpu.replays
        assert generate.main(asked) == answers
    completions = [
        [json.loads(line)["completion"] for line in (tmp_path / where / "sums" / "records.jsonl").open()]
        for where in ("cpu", "gpu")
    ]
    assert completions[0] == completions[1] and len(completions[0]) == 7
