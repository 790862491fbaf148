"""The guard at start-up: launches that would silently not be what they say are provoked for real, and stopped."""

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml
from torch import nn

from experiments.tiny.model import build
from experiments.tiny.task import DIFFICULTIES, rows
from pte_trl.cache.schedule import Schedule
from pte_trl.runtime.launch import check_launch, check_world, launch_line, named_launch, parse_launch
from pte_trl.runtime.startup import cache_lines, describe, job_of, running_engine
from pte_trl.training.arguments import parse_recipe
from pte_trl.training.config import PteGRPOConfig
from tests.launches import accelerate_launch
from tests.test_recipes import recipe
from tests.test_trainer import trainer_for

ROOT = Path(__file__).resolve().parent.parent
DDP = {"distributed_type": "MULTI_GPU", "num_processes": 2}
ZERO2 = {"distributed_type": "DEEPSPEED", "num_processes": 2, "deepspeed_config": {"zero_stage": 2}}
FSDP2 = {
    "distributed_type": "FSDP",
    "num_processes": 2,
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_transformer_layer_cls_to_wrap": "Qwen2DecoderLayer",
        "fsdp_state_dict_type": "FULL_STATE_DICT",
    },
}
MULTI_CPU = {"distributed_type": "MULTI_CPU", "num_processes": 2, "use_cpu": True}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """An untrained tiny model and some problems."""
    folder = tmp_path_factory.mktemp("startup")
    model, tokenizer = build(seed=0)
    tokenizer.save_pretrained(folder / "model")
    model.save_pretrained(folder / "model")
    some = rows("train", 8, 0, DIFFICULTIES["easy"])
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in some))
    return folder


def config_file(folder, content: dict) -> str:
    path = folder / "accelerate.yaml"
    common = {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "machine_rank": 0}
    path.write_text(yaml.safe_dump(common | content))
    return str(path)


def launch(setting, folder, options: list[str], *flags: str, **variables: str) -> subprocess.CompletedProcess:
    """`accelerate launch` of the training script for one step of the tiny model."""
    arguments = {
        "--config": ROOT / "recipes/tiny.yaml",
        "--model_name_or_path": setting / "model",
        "--dataset_name": setting / "train.jsonl",
        "--output_dir": folder / "out",
        "--max_steps": 1,
        "--per_device_train_batch_size": 8,
        "--max_completion_length": 20,
    }
    command = [*accelerate_launch(), "--main_process_port", "0"]
    command += [*options, str(ROOT / "recipes/grpo_pte.py"), *(str(x) for pair in arguments.items() for x in pair)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | variables
    return subprocess.run([*command, *flags], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def stopped(done: subprocess.CompletedProcess, message: str) -> bool:
    assert done.returncode != 0, done.stdout[-2000:]
    assert message in done.stderr, done.stderr[-3000:]
    return not any("'loss'" in text for text in (done.stdout, done.stderr))


NEEDS_NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU this launch is what it says")


@pytest.mark.parametrize("options", ["flags", pytest.param("MULTI_CPU", marks=pytest.mark.thorough)])
def test_two_processes_asked_for_and_one_started(setting, tmp_path, options):
    file = config_file(tmp_path, MULTI_CPU)
    options = ["--cpu", "--num_processes", "2"] if options == "flags" else ["--config_file", file]
    assert stopped(launch(setting, tmp_path, options), "but 1 runs")


@NEEDS_NO_GPU
def test_two_worlds_of_one_process(setting, tmp_path):
    options = ["--config_file", config_file(tmp_path, DDP)]
    done = launch(setting, tmp_path, options, "--use_cpu", "false")
    assert stopped(done, "error: WORLD_SIZE=2, but this process counts 1")


@NEEDS_NO_GPU
@pytest.mark.thorough  # engines by their classes: below
def test_zero_that_runs_as_ddp(setting, tmp_path):
    options = ["--config_file", config_file(tmp_path, ZERO2)]
    done = launch(setting, tmp_path, options, ACCELERATE_USE_CPU="true")
    assert stopped(done, "accelerate.yaml names ZeRO-2, but DDP runs (the model is in DistributedDataParallel)")
    assert "engine          DDP on cpu" in done.stdout


@NEEDS_NO_GPU
@pytest.mark.thorough  # as ZeRO above
def test_fsdp_that_runs_as_ddp(setting, tmp_path):
    options = ["--config_file", config_file(tmp_path, FSDP2)]
    done = launch(setting, tmp_path, options, "--use_cpu", "true")
    assert stopped(done, "accelerate.yaml names FSDP2, but DDP runs (the model is in DistributedDataParallel)")


@pytest.mark.thorough  # how a precision is read: below
def test_a_precision_that_recipe_and_launch_do_not_share(setting, tmp_path):
    options = ["--config_file", config_file(tmp_path, DDP | {"mixed_precision": "bf16"})]
    done = launch(setting, tmp_path, options, "--use_cpu", "true")
    assert stopped(done, "but the recipe has bf16=False, fp16=False")
    assert "mixed_precision=bf16" in done.stderr and "accelerate.yaml" in done.stderr


def test_an_honest_launch_trains_and_shows_itself(setting, tmp_path):
    flags = ("--use_cpu", "true", "--global_batch", "32")
    done = launch(setting, tmp_path, ["--config_file", config_file(tmp_path, DDP)], *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    shown = dict(line.split("  ", 1) for line in done.stdout.splitlines() if "  " in line)
    shown = {name: value.strip() for name, value in shown.items()}
    assert shown["engine"] == "DDP on cpu"
    assert shown["ranks"] == "2 on 1 node(s)"
    assert shown["global batch"] == "8 x 2 accumulated x 2 ranks = 32 completions, global_batch=32"
    assert shown["prompts a step"] == "4, 8 completions each"
    assert shown["sharding"] == "nothing divided by 2; 100 % of the parameters here"
    assert done.stdout.count("global batch") == 1, "the main process alone prints"


# ---- what a command line names, and what objects are ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "line", "found"),
    [
        (DDP, [], ("DDP", 2)),
        (DDP, ["--num_processes", "4"], ("DDP", 4)),
        (ZERO2, [], ("ZeRO-2", 2)),
        (ZERO2, ["--zero_stage", "3"], ("ZeRO-3", 2)),
        (FSDP2, [], ("FSDP2", 2)),
        (MULTI_CPU, [], ("DDP", 2)),
        ({"distributed_type": "NO", "num_processes": 1}, [], ("single", 1)),
        (DDP, ["--use_deepspeed", "--zero_stage", "1"], ("ZeRO-1", 2)),
    ],
)
def test_what_a_launch_names(tmp_path, content, line, found):
    launch = parse_launch(["--config_file", config_file(tmp_path, content), *line, "script.py", "--flag", "1"])
    assert (launch.engine, launch.processes, launch.nodes) == (*found, 1)


def test_a_stage_in_deepspeeds_own_file(tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    content = ZERO2 | {"deepspeed_config": {"deepspeed_config_file": str(tmp_path / "ds.json")}}
    assert parse_launch(["--config_file", config_file(tmp_path, content), "s.py"]).engine == "ZeRO-3"


@pytest.mark.parametrize(("written", "precision"), [("no", None), (False, None), ("bf16", "bf16"), ("fp16", "fp16")])
def test_without_a_precision_the_recipe_decides(tmp_path, written, precision):
    file = config_file(tmp_path, DDP | {"mixed_precision": written})
    assert parse_launch(["--config_file", file, "s.py"]).precision == precision
    assert parse_launch(["--config_file", file, "--mixed_precision", "fp16", "s.py"]).precision == "fp16"


def test_a_launch_without_config_names_nothing():
    launch = parse_launch(["--cpu", "script.py"])
    assert (launch.engine, launch.processes, launch.precision) == (None, None, None)


LAUNCHERS = (
    "-m accelerate.commands.launch",
    "recipes/slurm_task.py",
    "bin/accelerate-launch",
    "bin/accelerate launch",
)


@pytest.mark.parametrize("command", LAUNCHERS)
def test_the_launcher_is_found_among_the_parents(monkeypatch, command):
    lines = ("make", f"python {command} --cpu x.py")
    parents = [SimpleNamespace(cmdline=line.split) for line in lines]
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(parents=lambda: parents))
    assert launch_line() == ["--cpu", "x.py"]


def test_launchers_other_than_accelerate_speak_by_their_variables(monkeypatch, tmp_path):
    for name, value in {
        "WORLD_SIZE": 2,
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": 3,
    }.items():
        monkeypatch.setenv(name, str(value))
    launch = named_launch()
    assert (launch.engine, launch.processes, launch.source) == ("ZeRO-3", 2, "the environment")
    with pytest.raises(ValueError, match="WORLD_SIZE=2, but this process counts 1"):
        check_world(1, launch)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    args = PteGRPOConfig(output_dir=str(tmp_path), method="lora", use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(ValueError, match="mixed_precision=fp16"):
        check_launch(args)


@pytest.mark.parametrize("flags", [["--fsdp"], ["--fsdp", "full_shard"]])
def test_fsdp_on_one_process_is_refused(tmp_path, flags):
    """Which transformers does as well, once the weights are loaded."""
    with pytest.raises(ValueError, match=r"^fsdp=True: divides a model over the processes of a launch, and this"):
        check_launch(parse_recipe([*recipe(tmp_path), *flags])[1])


def test_engines_by_their_classes():
    plain = nn.Linear(2, 2)
    assert running_engine(plain) == "single"
    assert running_engine(nn.DataParallel(plain)) == "DataParallel"


def test_the_table_of_a_trainer(tmp_path):
    trainer = trainer_for(tmp_path, rollout_batch_size=2, gradient_accumulation_steps=2)
    shown = describe(trainer, "single", max_prompt_tokens=12)
    assert shown["global batch"] == "8 x 2 accumulated x 1 ranks = 16 completions"
    assert shown["prompts a step"] == "4, 4 completions each"
    assert shown["evictions"] == "16 at 40 tokens"
    assert shown["rollout"] == "bounded decode, completions at once: 2"
    assert "float32" in shown["precision"] and "GB per process" in shown["peak memory"]
    job = job_of(trainer, "single", 12)
    assert (job.rollout_batch, job.micro_batch, job.state_rank, job.schedule) == (2, 8, 4, Schedule(8))
    assert job.trainable == sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    asked = describe(trainer_for(tmp_path, global_batch=16), "single", 12)["global batch"]
    assert asked == f"{shown['global batch']}, global_batch=16"


def test_where_rollouts_come_from_in_words(tmp_path):
    trainer = trainer_for(tmp_path, "lora")
    assert describe(trainer, "single", 12)["rollout"] == "transformers generate"
    # As an option only: vLLM itself is not needed to say what it would take.
    trainer.args.use_vllm, trainer.args.vllm_mode = True, "colocate"
    assert describe(trainer, "single", 12)["rollout"].startswith("vLLM, colocate, 0.3 of the GPU on top")
    assert job_of(trainer, "single", 12).rollout_batch == 0
    trainer.args.vllm_mode = "server"
    assert describe(trainer, "single", 12)["rollout"] == "vLLM, server"


def test_the_cache_in_words(tmp_path):
    def words(**changes):
        options = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none"}
        args = PteGRPOConfig(**options | changes)
        return cache_lines(args.cache_policy, 3072, 512)

    assert words(method="lora") == ("full", "none")
    kept, evictions = words(window="auto")
    assert "at most 512" in kept and evictions == "20 at 3072 tokens and W = 512, more where W is smaller"
    kept, evictions = words(window=None, budget=768)
    assert "W = 256 at prompts of 512" in kept and evictions.startswith("44 at 3072 tokens")
    kept, _ = words(window=None, budget=300)  # max_prompt_tokens may allow more
    assert "W = 1 at prompts of 299" in kept


@pytest.mark.parametrize("allowed", [False, True])
def test_cudnn_is_allowed_if_asked_for(tmp_path, allowed):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(not allowed)
        trainer_for(tmp_path, **{"cudnn_attention": True} if allowed else {})
        assert torch.backends.cuda.cudnn_sdp_enabled() is allowed
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
