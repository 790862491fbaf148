"""Segments under engines that share the weights out: ranks with unlike samples against one process in one pass."""

import os
import socket
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.forked import python
from tests.lockstep_probe import LAYERS, SAMPLES, loss_of, model
from tests.models import chosen, gap, left_padded_batch, replay_logps
from tests.test_gradients import assert_same

PROBE = Path(__file__).with_name("lockstep_probe.py")


def launch(folder: Path, *arguments: str, probe: Path = PROBE) -> list[dict]:
    """What both ranks have found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    about = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    about["PYTHONPATH"] = os.pathsep.join([str(probe.parents[1]), os.environ.get("PYTHONPATH", "")])
    started = [
        subprocess.Popen(
            [python(), str(probe), arguments[0], str(folder), *arguments[1:]],
            env=os.environ | about | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert not any(process.returncode for process in started), "".join(output[-3000:] for output in outputs)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@cache
def expected(checkpointed: bool) -> tuple[list, dict]:
    """Log-probs of every rank and micro-batch, and the mean of the ranks' gradients, in one pass."""
    alone = model(checkpointed)
    logps = [[], []]
    for rank, batches in enumerate(SAMPLES):
        for number, (prompts, completion, windows) in enumerate(batches):
            ids, mask, prompt = left_padded_batch(prompts, completion, seed=10 * rank + number)
            found = chosen(replay_logps(alone, ids, mask, prompt, torch.tensor(windows)), ids, prompt)
            (loss_of(found) / len(SAMPLES)).backward()
            logps[rank].append(found.detach())
    return logps, {name: p.grad for name, p in alone.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        pytest.param("zero3", [], marks=pytest.mark.thorough, id="zero3"),
        pytest.param("zero3", ["--checkpoint"], id="zero3-checkpointed"),
        pytest.param("fsdp2", [], marks=pytest.mark.thorough, id="fsdp2"),  # tests/test_engines.py trains under it
        pytest.param("fsdp2", ["--checkpoint"], marks=pytest.mark.thorough, id="fsdp2-checkpointed"),
    ],
)
def test_ranks_with_unlike_samples_do_what_one_process_does(tmp_path, engine, options):
    logps, gradients = expected(bool(options))
    for found, wanted in zip(launch(tmp_path, engine, *options), logps, strict=True):
        assert all(gap(a, b) <= 1e-4 for a, b in zip(found["logps"], wanted, strict=True))
        assert_same(found["gradients"], gradients, 1e-3)
        # A layer is freed before the next but one is entered, or every rank would hold the whole model.
        assert 0 < found["gathered"] <= 2 < LAYERS
