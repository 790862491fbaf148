"""What a run reports arrives in the tracker, and every metric that can arrive is explained in docs/metrics.md."""

import inspect
import json
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
from trl import GRPOTrainer

from experiments.tiny.model import build
from experiments.tiny.task import DIFFICULTIES, rows
from pte_trl.training.config import PteGRPOConfig

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/metrics.md").read_text()
EXPLAINED = {name for names in re.findall(r"`([^`]+)`", PAGE) for name in names.split(", ")}


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """Three steps of a tiny model with the default tracker: the output folder and trackio's database."""
    folder = tmp_path_factory.mktemp("watching")
    model, tokenizer = build(seed=0)
    tokenizer.save_pretrained(folder / "model")
    model.save_pretrained(folder / "model")
    some = rows("train", 16, 0, DIFFICULTIES["easy"])
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in some))
    flags = {
        "config": ROOT / "recipes/tiny.yaml",
        "model_name_or_path": folder / "model",
        "dataset_name": folder / "train.jsonl",
        "output_dir": folder / "run-a",
        "report_to": "auto",
        "log_completions": "true",
        "beta": 0.1,
        "format_reward_weight": 0.1,
        "max_steps": 3,
        "per_device_train_batch_size": 16,
        "max_completion_length": 32,
    }
    command = [sys.executable, str(ROOT / "recipes/grpo_pte.py")]  # trackio looks at its variable when imported
    command += [str(part) for key, value in flags.items() for part in (f"--{key}", value)]
    environment = os.environ | {"TRACKIO_DIR": str(folder / "trackio"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    database = sqlite3.connect(folder / "trackio/pte_trl.db")
    logged = [json.loads(text) for (text,) in database.execute("select metrics from metrics where run_name = 'run-a'")]
    return folder, logged, done.stdout


def test_metrics_of_every_step_arrive(tracked):
    _, logged, shown = tracked
    steps = [entry for entry in logged if "train/reward" in entry]
    assert [entry["train/global_step"] for entry in steps] == [1, 2, 3]
    for name in (
        "loss",
        "kl",
        "mismatch/max",
        "rollout/evictions",
        "pte/update_over_state",
        "completions/format_rate",
    ):
        assert all(isinstance(entry[f"train/{name}"], float) for entry in steps), name
    assert max(entry["train/mismatch/max"] for entry in steps) < 1e-3
    assert re.search(r"^tracker +trackio$", shown, re.MULTILINE)


def test_completions_arrive_in_the_tracker_and_in_the_folder(tracked):
    folder, logged, _ = tracked
    tables = [entry["completions"]["_value"] for entry in logged if "completions" in entry]
    assert [len(table) for table in tables] == [16, 16, 16, 16]  # the last again with the closing line
    for step, table in enumerate(tables[:3], start=1):
        kept = pandas.read_parquet(folder / f"run-a/completions/completions_{step:05d}.parquet")
        assert list(kept["advantage"]) == pytest.approx([row["advantage"] for row in table])
        assert all(row["step"] == step and row["completion"][0]["content"] for row in table)
        assert {"accuracy_reward", "format_reward"} <= set(table[0])


def test_everything_that_arrived_is_explained(tracked):
    _, logged, _ = tracked
    names = {name.removeprefix("train/") for entry in logged for name in entry} - {"completions"}
    assert len(names) > 30
    assert not {n for n in names if not n.startswith("profiling/")} - EXPLAINED


def test_everything_that_trl_can_log_is_explained():
    found = re.findall(r'_metrics\[(?:mode|"train")\]\["([^"]+)"\]', inspect.getsource(GRPOTrainer))
    assert len(set(found)) > 25
    assert not set(found) - EXPLAINED
    assert 'f"rewards/{reward_func_name}/mean"' in inspect.getsource(GRPOTrainer)


def settings(tmp_path, **changes) -> PteGRPOConfig:
    return PteGRPOConfig(**{"output_dir": str(tmp_path), "method": "lora", "use_cpu": True, "bf16": False} | changes)


def test_trackio_is_the_default_and_the_run_has_the_folders_name(tmp_path):
    args = settings(tmp_path / "some-run")
    assert (args.report_to, args.run_name, args.project) == (["trackio"], "some-run", "pte_trl")
    assert settings(tmp_path, report_to="none").report_to == []
    assert settings(tmp_path, report_to=["trackio"], run_name="mine").run_name == "mine"
