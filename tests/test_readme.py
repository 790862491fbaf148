"""What the README tells a newcomer to type works: every command and every block of Python is run by a test."""

import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from pte_trl_cli import COMMANDS
from tests import forked
from tests.launches import accelerate_launch

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SHORT = "--grader_workers 1 --max_steps 2 --per_device_train_batch_size 16 --max_completion_length 48"
# The README's models need GPUs; the same lines run here with the tiny model, its recipe and its problems.
STAND_INS = {
    "qwen3b.yaml": "tiny.yaml",
    "smollm2.yaml": "tiny.yaml",
    "outputs/qwen3b-pte ": "outputs/tiny-pte ",
    "math500 aime24": "outputs/tiny-data/tiny_amc23.jsonl",
}


# How every command begins, and what runs it: a test of this file, or the file of another test.
RUN_BY = {
    "pip install -e": "test_make_installs_the_package_with_the_extras_and_commands_of_the_tables",
    "make demo": "test_demo.py",
    "make test": "../.ci/run",
    "accelerate launch recipes/grpo_pte.py --config recipes/qwen3b.yaml": "test_launch_lines",
    "accelerate launch --config_file accelerate_configs/zero3.yaml": "test_engines.py",
    "sbatch --nodes=2 --gpus-per-node=8 recipes/slurm.sh": "test_slurm.py",
    "python -m experiments.tiny.": "workplace",
    "accelerate launch recipes/distill_pte.py": "test_distillation_lines",
    "accelerate launch recipes/grpo_pte.py --config recipes/tiny.yaml --adapter": "test_distillation_lines",
    "accelerate launch recipes/evaluate.py": "test_evaluation_lines",
    "python -m pte_trl.evaluation.": "test_evaluation_lines",
    "python -m pte_trl.smollm2": "test_smollm2.py",
    "python recipes/generate.py": "test_question_line",
    "pte-trl ": "test_command_line",
    "make plan-": "test_scales.py",
    "make reproduce-": "test_reproduce.py",
    "make report": "test_paper_figures.py",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands(beginning: str = "") -> list[str]:
    """Every command of the README, comments left out."""
    lines = (line.partition("  #")[0].strip() for block in blocks("bash") for line in block.splitlines())
    return [line for line in lines if line and line.startswith(beginning)]


def here(command: str) -> str:
    """A command as it can be run in another folder, on a CPU, without its launcher."""
    for theirs, ours in STAND_INS.items():
        command = command.replace(theirs, ours)
    command = re.sub(r"^(accelerate launch|python) (?=recipes/)", "", command)
    command = re.sub(r"^pte-trl ", f"{ROOT}/tests/console.py ", re.sub(r"^python ", "", command))
    return re.sub(r"\brecipes/", f"{ROOT}/recipes/", command)


def run(folder: Path, *command: str, returncode: int = 0) -> str:
    variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=os.environ | variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == returncode, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


def python(folder: Path, command: str) -> str:
    return run(folder, forked.python(), *shlex.split(command))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the tiny model, which has had no time to learn, its problems, and an adapter of two steps."""
    folder = tmp_path_factory.mktemp("readme")
    pretrain, problems = commands("python -m experiments.tiny.")
    python(folder, here(pretrain) + " --steps 20 --test-problems 8")
    python(folder, here(problems))
    (train,) = commands("pte-trl train")
    python(folder, f"{here(train)} {SHORT}")
    assert (folder / "outputs/tiny-pte/adapter_model.safetensors").exists()
    return folder


def test_every_command_is_run_by_something():
    for command in commands():
        assert any(command.startswith(beginning) for beginning in RUN_BY), command
    for beginning, place in RUN_BY.items():
        assert commands(beginning), beginning
        assert place in globals() or (ROOT / "tests" / place).exists(), place


def test_make_installs_the_package_with_the_extras_and_commands_of_the_tables():
    """`make setup`, with which CI begins, installs an editable package, as the README's line does."""
    assert re.search(r"--editable \.$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert set(re.findall(r"^\| `(\w+)` \| ", README.split("## Two commands")[0], re.MULTILINE)) == set(extras)
    (line,) = commands("pip install")
    assert re.search(r"'\.\[(\w+)\]'", line)[1] in extras
    assert re.findall(r"^\| `pte-trl (\w+)` \|", README, re.MULTILINE) == list(COMMANDS)
    assert project["scripts"] == {"pte-trl": "pte_trl_cli:main"}


def test_launch_lines(workplace):
    """Through accelerate's launcher, as they stand there."""
    _, lora_c = commands("accelerate launch recipes/grpo_pte.py --config recipes/qwen3b.yaml")
    assert "--method lora_c" in lora_c
    run(workplace, *accelerate_launch(), "--cpu", "--num_processes", "1", *shlex.split(f"{here(lora_c)} {SHORT}"))
    config = json.loads((workplace / "outputs/qwen3b-lora_c/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"


def test_the_same_command_resumes(workplace):
    command = [forked.python(), *shlex.split(f"{ROOT}/recipes/grpo_pte.py --config {ROOT}/recipes/tiny.yaml {SHORT}")]
    command += ["--save_strategy", "steps", "--save_steps", "1", "--output_dir", "outputs/resumed"]
    for steps in (1, 2):  # the first time there is none
        run(workplace, *command, "--max_steps", str(steps))
        shutil.rmtree(workplace / f"outputs/resumed/checkpoint-{steps - 1}", ignore_errors=True)
    state = json.loads((workplace / "outputs/resumed/trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert [entry["step"] for entry in state["log_history"] if "reward" in entry] == [1, 2]
    assert json.loads((workplace / "outputs/resumed/manifest.json").read_text())["settings"]["max_steps"] == 2


def test_distillation_lines(workplace):
    """GRPO starts from what was distilled."""
    distill, grpo = (commands(line)[0] for line in RUN_BY if RUN_BY[line] == "test_distillation_lines")
    for line in (distill, grpo):
        python(workplace, f"{here(line)} {SHORT}")
    assert (workplace / "outputs/tiny-pte-after/adapter_model.safetensors").exists()


def test_evaluation_lines(workplace):
    (evaluate,) = commands("accelerate launch recipes/evaluate.py")
    python(workplace, f"{here(evaluate)} --limit 2 --samples 2 --grader_workers 1 --max_new_tokens 12 --use_cpu true")
    metrics, regrade = commands("python -m pte_trl.evaluation.")
    assert "| outputs/eval/qwen3b-pte-1024/tiny_amc23 | 2 x 2 |" in python(workplace, here(metrics))
    assert "0 of 4 verdicts changed" in python(workplace, here(regrade))


def test_question_line(workplace):
    (line,) = commands("python recipes/generate.py")
    assert "What is 7 + 5?" in python(workplace, f"{here(line)} --max_new_tokens 12 --use_cpu true")


def test_command_line(workplace):
    """Training is the fixture's."""
    doctor, train, inspect, estimate = commands("pte-trl ")
    assert "pte_trl" in python(workplace, here(doctor))
    assert "train" in train
    python(workplace, f"{here(inspect)} --window 8 --max_new_tokens 40")  # two steps teach only short answers
    assert (workplace / "outputs/tiny-pte/inspect/inspect.json").exists()
    assert "Qwen2.5-7B" in python(workplace, here(estimate))


@pytest.fixture
def problems(workplace, monkeypatch):
    """A dataset as a user would write it, in the folder under way."""
    monkeypatch.chdir(workplace)
    rows = load_dataset("json", data_files="outputs/tiny-data/train.jsonl", split="train").select(range(16))
    with open("problems.jsonl", "w") as file:
        for row in rows:
            prompt = [{"role": "user", "content": row["problem"]}]
            file.write(json.dumps({"prompt": prompt, "answer": row["answer"]}) + "\n")


def test_training_from_python(problems):
    """The README's block on a CPU, for two steps: under the window, replayed exactly, with calibrated encoders."""
    shorter = 'max_steps=2, max_completion_length=40, logging_steps=1, use_cpu=True, bf16=False, report_to="none"'
    block = blocks("python")[0].replace("Qwen/Qwen2.5-3B-Instruct", "outputs/tiny-base")
    names = {}
    assert "window=512, max_completion_length=3072" in block  # with TRL's 512 tokens nothing would be evicted
    block = block.replace("window=512, max_completion_length=3072", f"window=8, {shorter}")
    exec(block.replace("qwen3b-pte", "from-python"), names)
    assert Path("outputs/from-python/adapter_config.json").exists()
    steps = [entry for entry in names["trainer"].state.log_history if "reward" in entry]
    assert [entry["step"] for entry in steps] == [1, 2]
    assert all(entry["rollout/evictions"] > 0 and entry["mismatch/max"] < 1e-3 for entry in steps)
    assert 0.1 < steps[0]["pte/update_over_state"] < 0.6  # 0.25 is asked for; without calibration some 0.002


def test_generating_from_python(workplace, monkeypatch):
    """A trained adapter under the bounded cache, and a loop of one's own over the same tokens."""
    monkeypatch.chdir(workplace)
    _, generate, feed = blocks("python")
    tokenizer = AutoTokenizer.from_pretrained("outputs/tiny-base")
    inputs = tokenizer("Modulo 10: a=4;b=a+7. Find b.", return_tensors="pt")
    base = AutoModelForCausalLM.from_pretrained("outputs/tiny-base", dtype=torch.float32)
    names = {"base_model": base, "inputs": inputs, "input_ids": inputs["input_ids"]}
    exec(generate.replace("qwen3b-pte", "tiny-pte").replace("512", "8").replace("8192", "40"), names)
    prompt = inputs["input_ids"].shape[1]
    assert names["output"].shape[1] > prompt
    with torch.no_grad():
        exec(feed, names)
    assert names["logits"].shape[:2] == (1, 1)
    assert int(names["logits"][0, -1].argmax()) == int(base_token(names["model"], inputs))


def base_token(model, inputs) -> int:
    """The first token of a greedy answer."""
    with torch.no_grad():
        return int(model(**inputs).logits[0, -1].argmax())
