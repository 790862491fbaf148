"""make reproduce-tableA1 for real, cut short: what is done is not done again, and what is lost is made again."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.tiny.model import build
from tests.forked import python

ROOT = Path(__file__).resolve().parent.parent
SHORT = "--max_steps 1 --per_device_train_batch_size 16 --max_completion_length 24"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The project's files beside outputs of its own, with a tiny model that was not pretrained."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("Makefile", "pte_trl", "experiments", "recipes", "requirements.txt", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    model, tokenizer = build(seed=0)
    tokenizer.save_pretrained(folder / "outputs/tiny-base")
    model.save_pretrained(folder / "outputs/tiny-base")
    (folder / "ready").touch()
    return folder


def make(folder: Path, *arguments: str, target: str = "reproduce-tableA1") -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    evaluation = "--data_dir outputs/tiny/data --use_cpu true --limit 2 --max_new_tokens 8"
    variables = ["SCALE=tiny", f"PY={python()}", f"PYTHON={sys.executable}", f"READY={folder}/ready"]
    variables += [f"TRAIN_ARGS=--dataset_name outputs/tiny/data/train.jsonl {SHORT}", f"EVAL_ARGS={evaluation}"]
    command = ["make", target, *variables, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_a_table_is_made_kept_and_repaired(checkout):
    output = make(checkout, "-j2")
    assert output.count("recipes/grpo_pte.py") == 1 and output.count("recipes/evaluate.py") == 5
    table = (checkout / "outputs/tiny/results/tableA1.md").read_text()
    assert table in output
    assert "tableA1: 0 of 5 numbers missing" in output

    again = make(checkout)
    assert "recipes/" not in again and "render" not in again

    (lost,) = checkout.glob("outputs/tiny/evaluate/tiny/pte/48-96-0.1-*")
    shutil.rmtree(lost)
    repaired = make(checkout)
    assert repaired.count("recipes/evaluate.py") == 1 and "--evict_ratio 0.1 " in repaired
    assert "recipes/grpo_pte.py" not in repaired
    assert (checkout / "outputs/tiny/results/tableA1.md").read_text() == table


@pytest.mark.thorough
def test_a_night_with_the_tiny_model(checkout):
    """Two seeds of one method end to end; then the plan knows what is done, and what a step took."""
    variables = ["SCALE=night-tiny", "METHODS=pte", "BENCHMARKS=math500", "SEEDS=42 43"]
    output = make(checkout, *variables, target="reproduce-table1")
    assert output.count("recipes/grpo_pte.py") == 2 and output.count("recipes/evaluate.py") == 2
    assert (checkout / "outputs/night-tiny/results/table1.md").read_text() in output
    assert "recipes/" not in make(checkout, *variables, target="reproduce-table1")
    lines = make(checkout, *variables, target="plan-table1").splitlines()
    assert [line.split()[1] for line in lines if line.startswith(("train-", "evaluate-"))] == ["done"] * 4
    assert all("measured" in line for line in lines if line.startswith("train-"))
