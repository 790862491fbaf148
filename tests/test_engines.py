"""Every accelerate config, run for real by two processes on a CPU, against one process with the same global batch.

What is compared: each completion is sampled from a seed of its own, so that its text does not depend on who samples
it; everything else is the recipe's own run (`engine_probe.py` names what is not). Two steps of SGD under a gradient
norm that is clipped, so that what is saved at the end shows every gradient, and the clipping, of every tensor.
"""

import json
import os
import re
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from experiments.tiny.model import build
from experiments.tiny.task import DIFFICULTIES, rows
from pte_trl.runtime.sharding import call_inside, check_engine
from pte_trl.training.config import PteGRPOConfig
from tests.forked import python
from tests.models import gap, left_padded_batch, replay_logps

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "accelerate_configs"
ACCELERATE = ["-m", "accelerate.commands.accelerate_cli", "launch"]
BATCH, PROCESSES = 8, 2
OPTIONS = (
    "--use_cpu true --model_name_or_path base --dataset_name train.jsonl --rank 4 --num_global_tokens 4 --window 8 "
    "--beta 0.1 --num_generations 4 --gradient_accumulation_steps 2 --max_completion_length 40 --max_steps 2 "
    "--optim sgd --learning_rate 1.0 --max_grad_norm 0.5 --grader_workers 1 --save_strategy no --whiten true"
)
WALK = "--target_modules q_proj k_proj v_proj o_proj"  # how often k_proj is called follows from the evictions
# W and E of a group's own; the encoder has a forget gate, a write gate and a state for every kv head.
DRAWN = "--window 7 12 --evict_ratio 0.2 0.9 --state_update gated_sum --write_gate true --state_per_head true"
EXPECTED = {"": "one", WALK: "walk", DRAWN: "drawn"}  # what changes a run -> where one process has it
CHECKPOINTED = "--gradient_checkpointing true"
SEGMENTS = "--replay segments --segment_length 5"

# config: (wrapper, optimizer, gradients partitioned, share of the weights and of the optimizer's that a rank holds)
ENGINES = {
    "ddp": ("DistributedDataParallel", "SGD", None, 1, 1),
    "zero1": ("DeepSpeedEngine", "DeepSpeedZeroOptimizer", False, 1, 1 / 2),
    "zero2": ("DeepSpeedEngine", "DeepSpeedZeroOptimizer", True, 1, 1 / 2),
    "zero3": ("DeepSpeedEngine", "DeepSpeedZeroOptimizer_Stage3", None, 1 / 2, 1 / 2),
    "fsdp2": ("FSDPPeftModelForCausalLM", "SGD", None, 1 / 2, 1 / 2),
}
ENGINES |= {f"multi_node_{stage}": ENGINES[stage] for stage in ("zero2", "zero3")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An untrained tiny model and its problems."""
    folder = tmp_path_factory.mktemp("engines")
    for part in build(0):
        part.save_pretrained(folder / "base")
    problems = rows("train", 16, 0, DIFFICULTIES["medium"])
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    return folder


def start(folder: Path, name: str, launcher: list[str], processes: int, options: str) -> subprocess.Popen:
    (folder / name).mkdir(exist_ok=True)
    command = [
        python(),
        *launcher,
        "--no_python",
        python(),
        str(ROOT / "tests/engine_probe.py"),
        name,
        "--config",
        str(ROOT / "recipes/tiny.yaml"),
    ]
    command += f"{OPTIONS} --per_device_train_batch_size {BATCH // processes} --output_dir {name} {options}".split()
    paths = os.pathsep.join([str(ROOT), str(ROOT / "recipes"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(folder / f"{name}.log", "a") as log:  # of both nodes: a pipe that is not read would fill up and block
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)


def finish(log: Path, *started: subprocess.Popen) -> None:
    try:
        codes = [process.wait(timeout=240) for process in started]
    finally:
        for process in started:
            process.terminate()  # the launcher ends its ranks
    assert not any(codes), log.read_text()[-3000:]


def reports_of(folder: Path, name: str, processes: int) -> list[dict]:
    return [json.loads((folder / name / f"rank{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def one_process(folder):
    """options -> folder and report of the run of one process that has them, as far as they are in EXPECTED."""
    done = {}

    def run(options: str) -> tuple[Path, dict]:
        change = next((change for change in (WALK, DRAWN) if change in options), "")
        name = EXPECTED[change]
        if name not in done:
            launcher = [*ACCELERATE, "--config_file", str(CONFIGS / "single_gpu.yaml")]
            finish(folder / f"{name}.log", start(folder, name, launcher, 1, change))
            (done[name],) = reports_of(folder, name, 1)
            assert done[name]["wrapper"] == "PeftModelForCausalLM" and done[name]["world"] == 1
        return folder / name, done[name]

    return run


def launch(folder: Path, config: str, name: str, options: str) -> list[dict]:
    """Both ranks' reports of a run under a config, on two "nodes" where it is for several."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = [*ACCELERATE, "--num_processes", str(PROCESSES)]
    common += ["--config_file", str(CONFIGS / f"{config}.yaml"), "--main_process_port", str(port)]
    nodes = (
        [["--machine_rank", str(n), "--main_process_ip", "127.0.0.1"] for n in range(2)] if "node" in config else [[]]
    )
    finish(folder / f"{name}.log", *(start(folder, name, [*common, *node], PROCESSES, options) for node in nodes))
    return reports_of(folder, name, PROCESSES)


def assert_same_run(reports: list[dict], folder: Path, expected: dict, expected_folder: Path) -> None:
    # Each rank sampled its share of every rollout batch.
    size = len(expected["completions"]) // 2
    shares = [report["completions"] for report in reports]
    each = size // PROCESSES
    text = [ids for at in (0, each) for share in shares for ids in share[at : at + each]]
    assert text == expected["completions"]
    for entry, expected_entry in zip(reports[0]["log"], expected["log"], strict=True):
        assert entry["loss"] == pytest.approx(expected_entry["loss"], rel=1e-4) and entry["loss"] > 1e-3
        assert entry["grad_norm"] == pytest.approx(expected_entry["grad_norm"], rel=1e-4)
        assert entry["grad_norm"] > 0.5, "nothing was clipped"
        assert entry["reward"] == pytest.approx(expected_entry["reward"])
        assert entry["mismatch/max"] < 1e-4
    name = "adapter_model.safetensors"
    began, wanted, found = (load_file(path / name) for path in (expected_folder / "start", expected_folder, folder))
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        moved = (tensor - began[key]).norm()
        assert bool(moved > 0) is ("whitener" not in key), key
        assert (found[key] - tensor).norm() <= 2e-3 * moved, key


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "options"),
    [
        pytest.param("ddp", "", marks=pytest.mark.thorough),  # tests/test_startup.py trains under it
        pytest.param("ddp", f"{SEGMENTS} {CHECKPOINTED}", marks=pytest.mark.thorough),
        pytest.param("zero1", SEGMENTS, marks=pytest.mark.thorough),
        pytest.param("zero2", CHECKPOINTED, marks=pytest.mark.thorough),  # tests/test_resume.py trains under it
        pytest.param("zero3", "", marks=pytest.mark.thorough),
        pytest.param("zero3", f"{WALK} {CHECKPOINTED}", marks=pytest.mark.thorough),  # tests/test_lockstep.py has it
        ("fsdp2", f"{WALK} {CHECKPOINTED}"),
        ("zero3", DRAWN),
        *(pytest.param(config, DRAWN, marks=pytest.mark.thorough) for config in ("ddp", "zero2", "fsdp2")),
        pytest.param("zero3", f"{DRAWN} {SEGMENTS}", marks=pytest.mark.thorough),
        # tests/test_lockstep.py has both without a trainer
        pytest.param("zero3", f"{SEGMENTS} {CHECKPOINTED}", marks=pytest.mark.thorough),
        pytest.param("fsdp2", f"{SEGMENTS} {CHECKPOINTED}", marks=pytest.mark.thorough),
        pytest.param("multi_node_zero2", SEGMENTS, marks=pytest.mark.thorough),  # tests/test_slurm.py has two nodes
        pytest.param("multi_node_zero3", CHECKPOINTED, marks=pytest.mark.thorough),  # its parts are above
    ],
    ids=lambda value: value if value in ENGINES else value.split(" ")[0].lstrip("-") or "plain",
)
def test_two_processes_do_what_one_does(folder, one_process, config, options):
    name = re.sub(r"\W+", "_", f"{config} {options}")
    reports = launch(folder, config, name, options)
    expected_folder, expected = one_process(options)
    wrapper, optimizer, partitions_gradients, weights, optimizer_share = ENGINES[config]
    for report in reports:
        assert report["world"] == PROCESSES and report["layers"] == 4
        assert (report["wrapper"], report["optimizer"]) == (wrapper, optimizer)
        assert report["partitions gradients"] is partitions_gradients
        assert report["weights held"] == pytest.approx(weights, rel=0.01)
        assert report["optimizer held"] == pytest.approx(optimizer_share, rel=0.01)
        assert report["adapter at the start"] == expected["adapter at the start"]
    # The ranks stopped at different lengths, and one of them has encoded nothing of the last batch.
    assert reports[0]["evictions"] > 0 == reports[1]["evictions"]
    assert_same_run(reports, folder / name, expected, expected_folder)

    bare, expected_logps, logps = (
        logps_of(folder / "base", adapter) for adapter in (None, expected_folder, folder / name)
    )
    assert gap(logps, expected_logps) < 1e-3 < gap(logps, bare)


@torch.no_grad()
def logps_of(base: Path, adapter: Path | None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter) if adapter else model
    return replay_logps(model.eval(), *left_padded_batch([6, 3], 24), 8)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_config_says_whom_it_is_for_and_how_it_is_launched(path):
    header = path.read_text().split("compute_environment")[0]
    assert all(line.startswith("# ") for line in header.splitlines())
    assert header.startswith("# For ") and f"--config_file accelerate_configs/{path.name}" in header
    assert "\n# Needs: " in header
    config = load_config_from_file(str(path))  # refuses unknown keys
    assert config.mixed_precision == "no"  # a config and a recipe that disagree are an error under ZeRO
    assert path.stem == "single_gpu" or path.stem in ENGINES


@pytest.mark.parametrize(
    ("change", "engine", "message"),
    [
        ({"ds3_gather_for_generation": False}, "ZeRO-3", "ds3_gather_for_generation=false under ZeRO-3"),
        ({}, "FSDP1", r"fsdp_version=1: .* allowed is 2"),
    ],
)
def test_what_would_wait_for_ever_is_refused(tmp_path, change, engine, message):
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "window": 8}
    with pytest.raises(ValueError, match=message):
        check_engine(PteGRPOConfig(**settings, **change), engine)
    check_engine(PteGRPOConfig(**settings), engine if engine != "FSDP1" else "FSDP2")
    check_engine(PteGRPOConfig(**settings | {"window": None}, method="lora"), engine)


class AddsOne(torch.nn.Module):
    """A wrapper that does something around the forward."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        return self.module(**inputs) + 1


def test_a_call_inside_a_wrapper_is_undone():
    module = torch.nn.Linear(2, 2)
    wrapper, x = AddsOne(module), torch.ones(1, 2)
    expected = module(x)
    assert torch.equal(call_inside(wrapper, module, lambda input: 2 * module(input), input=x), 2 * expected + 1)
    assert "forward" not in vars(module) and torch.equal(module(x), expected)

    def fails(input):
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        call_inside(wrapper, module, fails, input=x)
    assert torch.equal(module(x), expected)
