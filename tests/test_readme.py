"""What the README tells a newcomer to type works: the demo end to end, the launch line, the four lines of Python."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.paper.plan import makefile as plan
from experiments.study.plan import makefile as study_plan
from tests.forked import python

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SHORT = ["--max_steps", "2", "--per_device_train_batch_size", "16", "--max_completion_length", "48"]


def run(folder: Path, *command: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder in which the demo has run, with a model that has had no time to learn."""
    folder = tmp_path_factory.mktemp("demo")
    pretrain = ["-m", "experiments.tiny.pretrain", "--steps", "20", "--test-problems", "8"]
    run(folder, python(), *pretrain)
    script = ["-m", "experiments.demo", "--tier", "sums", "--test_problems", "8", *SHORT]
    return folder, run(folder, python(), *script)


def test_the_demo_shows_what_it_promises(demo):
    folder, output = demo
    assert "is there already; nothing to do" in output  # the pretrained model is kept
    for line in ("untrained, full cache", "untrained, window 16", "PTE after 2 steps, window 16", "completion "):
        assert line in output
    picture = (folder / "outputs/tiny-pte/reward.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5_000
    assert float(re.search(r"of a log-prob in the whole run: (\S+)", output)[1]) < 1e-3


def test_the_launch_line(demo):
    folder, _ = demo
    launcher = Path(sys.executable).with_name("accelerate")
    recipe = str(ROOT / "recipes/tiny.yaml")
    arguments = ["launch", "--cpu", "--num_processes", "1", str(ROOT / "recipes/grpo_pte.py"), "--config", recipe]
    run(folder, str(launcher), *arguments, *SHORT, "--method", "lora_c", "--output_dir", "outputs/launched")
    assert (folder / "outputs/launched/adapter_model.safetensors").exists()


def test_a_training_goes_on_from_its_newest_checkpoint(demo):
    folder, _ = demo
    command = [python(), str(ROOT / "recipes/grpo_pte.py"), "--config", str(ROOT / "recipes/tiny.yaml"), *SHORT]
    command += ["--save_strategy", "steps", "--save_steps", "1", "--output_dir", "outputs/resumed"]
    for steps in (1, 2):  # the first time there is none
        run(folder, *command, "--max_steps", str(steps))
        shutil.rmtree(folder / f"outputs/resumed/checkpoint-{steps - 1}", ignore_errors=True)
    state = json.loads((folder / "outputs/resumed/trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert [entry["step"] for entry in state["log_history"] if "reward" in entry] == [1, 2]
    assert json.loads((folder / "outputs/resumed/manifest.json").read_text())["settings"]["max_steps"] == 2


def test_the_four_lines_of_python(demo, monkeypatch):
    folder, _ = demo
    monkeypatch.chdir(folder)
    block = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    assert len([line for line in block.splitlines() if line]) == 4
    tokenizer = AutoTokenizer.from_pretrained("outputs/tiny-base")
    names = {
        "base_model": AutoModelForCausalLM.from_pretrained("outputs/tiny-base", dtype=torch.float32),
        "inputs": tokenizer("Modulo 10: a=4;b=a+7. Find b.", return_tensors="pt"),
    }
    exec(block.replace("qwen3b-pte", "tiny-pte").replace("512", "8").replace("8192", "40"), names)
    assert names["output"].shape[1] > names["inputs"]["input_ids"].shape[1]


def test_the_distillation_lines(demo):
    """As they stand in the README, for two steps each; GRPO starts from what was distilled."""
    folder, _ = demo
    text = README.replace("\\\n", " ")
    lines = re.findall(
        r"accelerate launch (recipes/(?:distill_pte|grpo_pte)\.py --config recipes/\w*tiny\.yaml.*)", text
    )
    assert len(lines) == 2
    for line in lines:
        words = line.replace("recipes/", f"{ROOT}/recipes/").split()
        run(folder, python(), *words, *SHORT)
    assert (folder / "outputs/tiny-pte-after/adapter_model.safetensors").exists()


def test_the_evaluation_lines(demo):
    """As they stand in the README, with the demo's model, adapter and problems."""
    folder, _ = demo
    text = README.replace("\\\n", " ")
    launch = re.search(r"accelerate launch (recipes/evaluate\.py .*)", text)[1].split()
    launch = " ".join(launch).replace("recipes/", f"{ROOT}/recipes/").replace("qwen3b.yaml", "tiny.yaml")
    launch = launch.replace("outputs/qwen3b-pte ", "outputs/tiny-pte ")
    options = "--benchmarks outputs/tiny-data/test.jsonl --limit 2 --max_new_tokens 12 --use_cpu true"
    run(folder, python(), *launch.split(), *options.split())
    (metrics,) = re.findall(r"python -m (pte_trl\.evaluation\.metrics \S+)", text)
    assert "| outputs/eval/qwen3b-pte-1024/test | 2 x 16 |" in run(folder, python(), "-m", *metrics.split())
    (regrade,) = re.findall(r"python -m (pte_trl\.evaluation\.regrade \S+)`", text)
    assert "0 of 32 verdicts changed" in run(folder, python(), "-m", *regrade.split())


def test_the_question_line(demo):
    folder, _ = demo
    line = re.search(r"python (recipes/generate\.py .*)", README)[1].replace("smollm2.yaml", "tiny.yaml")
    arguments = shlex.split(line.replace("recipes/", f"{ROOT}/recipes/"))
    assert "What is 7 + 5?" in run(folder, python(), *arguments, "--max_new_tokens", "12", "--use_cpu", "true")


def test_targets_and_files_that_are_named_exist():
    makefile = (ROOT / "Makefile").read_text() + plan("paper") + study_plan()
    for target in re.findall(r"\bmake ([a-zA-Z][a-zA-Z0-9-]*)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for path in re.findall(r"\b((?:recipes|docs|pte_trl|accelerate_configs)/[\w./-]+\.\w+)", README):
        assert (ROOT / path).exists(), path
