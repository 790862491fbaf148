"""`make demo-sums`, cut short: the whole way through, with a model that has had no time to learn."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.forked import python

ROOT = Path(__file__).resolve().parent.parent
SHORT = ["--max_steps", "2", "--per_device_train_batch_size", "16", "--max_completion_length", "48"]


def run(folder: Path, *arguments: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [python(), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.thorough
def test_the_demo_shows_what_it_promises(tmp_path):
    run(tmp_path, "-m", "experiments.tiny.pretrain", "--steps", "20", "--test-problems", "8")
    output = run(tmp_path, "-m", "experiments.demo", "--tier", "sums", "--test_problems", "8", *SHORT)
    assert "is there already; nothing to do" in output  # the pretrained model is kept
    for line in ("untrained, full cache", "untrained, window 16", "PTE after 2 steps, window 16", "completion "):
        assert line in output
    picture = (tmp_path / "outputs/tiny-pte/reward.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5_000
    assert float(re.search(r"of a log-prob in the whole run: (\S+)", output)[1]) < 1e-3
