"""recipes/slurm.sh, with two nodes on this machine: Slurm's two commands are stood in for, all else is real."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from experiments.tiny.model import build
from experiments.tiny.task import DIFFICULTIES, rows

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "recipes/slurm.sh"
# What Slurm does with them: name the nodes; run a command on every node, and end with the first error.
SCONTROL = '#!/bin/sh\n[ "$1 $2 $3" = "show hostnames nodes" ] && printf "127.0.0.1\\nother\\n"\n'
SRUN = """#!/bin/bash
shift  # --kill-on-bad-exit=1
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" & second=$!
wait $first && wait $second
"""


def run(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | variables
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_two_nodes_train_as_one_run(tmp_path, free_port):
    (tmp_path / "bin").mkdir()
    for name, text in {"scontrol": SCONTROL, "srun": SRUN}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    model, tokenizer = build(seed=0)
    tokenizer.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    some = rows("train", 8, 0, DIFFICULTIES["easy"])
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in some))
    config = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU"}
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(config | {"num_machines": 2, "num_processes": 16}))
    flags = "--use_cpu true --max_steps 1 --per_device_train_batch_size 8 --max_completion_length 20 --output_dir out"
    done = run(
        tmp_path,
        *("recipes/tiny.yaml", *flags.split(), "--model_name_or_path", "model", "--dataset_name", "train.jsonl"),
        PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        VENV=str(Path(sys.prefix)),
        ACCELERATE_CONFIG="accelerate.yaml",
        SLURM_NNODES="2",
        SLURM_GPUS_ON_NODE="1",
        SLURM_JOB_NODELIST="nodes",
        SLURM_JOB_ID=str(free_port - 20000),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 on 2 node(s)" in done.stdout
    assert "8 x 1 accumulated x 2 ranks = 16 completions" in done.stdout
    assert (tmp_path / "out/adapter_model.safetensors").exists()


@pytest.fixture
def free_port() -> int:
    """One that the script can reach by a job's number."""
    import socket

    for port in range(20000 + os.getpid() % 10000, 40000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise RuntimeError("no free port")


def test_without_slurm_it_says_how_to_submit(tmp_path):
    assert "usage: sbatch" in run(tmp_path).stderr
    assert "submit this script with sbatch" in run(tmp_path, "recipes/tiny.yaml").stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    done = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
