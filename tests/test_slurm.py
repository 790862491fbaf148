"""recipes/slurm.sh, with two nodes on this machine: only Slurm's own commands and signals are stood in for."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from experiments.tiny.model import build
from experiments.tiny.task import DIFFICULTIES, rows
from tests.forked import python
from tests.launches import course, gap

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "recipes/slurm.sh"
# Names the nodes, or puts a job back.
SCONTROL = """#!/bin/bash
if [ "$*" = "show hostnames nodes" ]; then printf '127.0.0.1\\nother\\n'; else echo "scontrol $*"; fi
"""
# Runs a command once per node and ends with the highest status; with STATUS set it only shows what it was given.
SRUN = """#!/bin/bash
[ -z "$STATUS" ] || { echo "srun $*"; env; exit "$STATUS"; }
while [[ $1 == --* ]]; do shift; done
for ((node = 0; node < SLURM_NNODES; node++)); do
    SLURM_STEP=$SLURM_JOB_ID.0 SLURM_NODEID=$node "$@" & tasks+=($!)
done
for task in "${tasks[@]}"; do wait "$task"; code=$?; ((code > highest)) && highest=$code; done
exit $((highest))
"""


def start(folder: Path, *arguments: str, **variables: str) -> subprocess.Popen:
    """The job's script on two nodes of one GPU each, as Slurm would start it."""
    (folder / "bin").mkdir(exist_ok=True)
    for name, text in {"scontrol": SCONTROL, "srun": SRUN}.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if key not in ("SLURM_STEP", "OMP_NUM_THREADS")}
    environment |= {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1", "SLURM_JOB_ID": "4711"}
    environment |= {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_NODELIST": "nodes"} | variables
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(["bash", str(SCRIPT), *arguments], cwd=folder, env=environment, **pipes)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """Exit status and output."""
    try:
        text, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, text


# ---- a training that Slurm stops ---------------------------------------------------------------------------------


@pytest.fixture
def free_port() -> int:
    """One that the script can reach by a job's number."""
    import socket

    for port in range(20000 + os.getpid() % 10000, 40000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise RuntimeError("no free port")


def signal_step(step: str, number: int) -> int:
    """What slurmstepd does where SignalChildrenProcesses is set: launchers and ranks get the signal at once."""
    found = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            mine = f"SLURM_STEP={step}".encode() in (process / "environ").read_bytes().split(b"\0")
        except OSError:  # of another user, or gone
            continue
        if mine:
            os.kill(int(process.name), number)
            found += 1
    return found


def workplace(folder: Path) -> None:
    (folder / "venv/bin").mkdir(parents=True)
    (folder / "venv/bin/python").symlink_to(python())
    (folder / "recipes").symlink_to(ROOT / "recipes")
    model, tokenizer = build(seed=0)
    tokenizer.save_pretrained(folder / "model")
    model.save_pretrained(folder / "model")
    some = rows("train", 40, 0, DIFFICULTIES["easy"])
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in some))
    config = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU"}
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(config | {"num_machines": 2, "num_processes": 16}))


def test_two_nodes_that_are_stopped_together_go_on_as_one_run(tmp_path, free_port):
    workplace(tmp_path)
    job = str(free_port - 20000)

    def train(output: str, **variables: str) -> subprocess.Popen:
        flags = "--use_cpu true --max_steps 5 --per_device_train_batch_size 8 --max_completion_length 20"
        # Without rewards, as the model is not trained, the entropy has a gradient.
        flags += f" --grader_workers 1 --log_completions true --entropy_coef 0.1 --output_dir {output}"
        names = ("--model_name_or_path", "model", "--dataset_name", "train.jsonl")
        slurm = {"SLURM_JOB_ID": job, "VENV": "venv", "ACCELERATE_CONFIG": "accelerate.yaml"} | variables
        return start(tmp_path, "recipes/tiny.yaml", *flags.split(), *names, **slurm)

    code, text = finish(train("whole"))
    assert code == 0 and "scontrol" not in text, text[-3000:]
    assert "2 on 2 node(s)" in text and "8 x 1 accumulated x 2 ranks = 16 completions" in text
    stopped = train("stopped")
    until = time.monotonic() + 120
    while not list((tmp_path / "stopped/completions").glob("*.parquet")) and time.monotonic() < until:
        time.sleep(0.05)
    assert signal_step(f"{job}.0", signal.SIGTERM) >= 4
    code, text = finish(stopped)
    assert code == 143 and f"scontrol requeue {job}" in text, text[-3000:]
    assert "SIGTERM: a checkpoint is saved" in text
    (reached,) = (tmp_path / "stopped").glob("checkpoint-*")
    step = int(reached.name.partition("-")[2])
    assert step < 5
    code, text = finish(train("stopped", SLURM_RESTART_COUNT="1"))
    assert code == 0 and f"resumes from stopped/checkpoint-{step}" in text and "scontrol" not in text, text[-3000:]
    resumed, whole = (course(tmp_path / output, step) for output in ("stopped", "whole"))
    assert gap(resumed, whole) == [] and min(entry["grad_norm"] for entry in whole["metrics"]) > 0


# ---- what runs, and what goes back into the queue ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"), [(143, 0, True), (143, 2, True), (143, 3, False), (0, 0, False), (1, 0, False)]
)
def test_only_what_was_stopped_goes_back_into_the_queue_and_not_for_ever(tmp_path, status, restarts, requeued):
    variables = {"STATUS": str(status), "SLURM_RESTART_COUNT": str(restarts), "REQUEUES": "3"}
    code, text = finish(start(tmp_path, "recipes/tiny.yaml", **variables))
    assert code == status and ("scontrol requeue 4711" in text) == requeued
    assert ("stopped by SIGTERM after REQUEUES=3" in text) == (restarts == 3)


TASK = r".venv/bin/python recipes/slurm_task.py --config_file accelerate_configs/{}.yaml --num_machines {} "
TASK += "--num_processes {} --main_process_ip 127.0.0.1 --main_process_port 24711 "
GRPO = "recipes/grpo_pte.py --config "
STARTS = {  # nodes, GPUs, arguments, and the command that srun gets
    "a recipe": (2, 8, "recipes/x.yaml --a 1", TASK.format("multi_node_zero2", 2, 16) + GRPO),
    "one node": (1, 8, "recipes/x.yaml --a 1", TASK.format("ddp", 1, 8) + GRPO),
    "a script": (2, 8, "recipes/distill_pte.py", TASK.format("multi_node_zero2", 2, 16)),
    "an evaluation": (2, 4, "recipes/evaluate.py --budget 9", TASK.format("ddp", 2, 8)),
    "one GPU": (1, 1, "recipes/evaluate.py --budget 9", ".venv/bin/python "),
    "make": (1, 8, "make reproduce-table1 SCALE=paper", ""),
}


@pytest.mark.parametrize("name", STARTS)
def test_what_runs_on_every_node(tmp_path, name):
    nodes, gpus, arguments, before = STARTS[name]
    variables = {"STATUS": "0", "SLURM_NNODES": str(nodes), "SLURM_GPUS_ON_NODE": str(gpus)}
    code, text = finish(start(tmp_path, *arguments.split(), SLURM_CPUS_PER_TASK="32", **variables))
    last = arguments.replace("make", f"make SHELL={shutil.which('bash')} GPUS={gpus}")
    assert code == 0 and f"srun --kill-on-bad-exit=0 --wait=120 {before}{last}\n" in text
    for line in ("SRUN_CPUS_PER_TASK=32", f"OMP_NUM_THREADS={32 // gpus}", "PET_SHUTDOWN_TIMEOUT=65535"):
        assert f"\n{line}\n" in text


def test_what_cannot_run_is_refused_in_one_line(tmp_path):
    slurm = {"PATH": os.environ["PATH"]}

    def message(*arguments: str) -> str:
        done = subprocess.run(
            ["bash", str(SCRIPT), *arguments], cwd=tmp_path, env=slurm, capture_output=True, text=True
        )
        assert done.returncode != 0
        return done.stderr

    assert "usage: sbatch" in message()
    assert "submit this script with sbatch" in message("recipes/tiny.yaml")
    code, text = finish(start(tmp_path, "make", "reproduce-table1", STATUS="0"))
    assert code == 2 and text == "error: --nodes=2: make starts its runs on one node; allowed is --nodes=1\n"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    done = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
