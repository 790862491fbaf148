"""Bytes counted in training steps beside what `pte_trl.estimate` computes for them; nothing is run.

    python -m benchmarks.estimated        # the newest record of every shape in `memory.json` and `step.json`

Both are of one sample, beyond weights and optimizer: activations, and the gradients of the adapter.
"""

import json

import torch

from benchmarks.common import RECORDS
from pte_trl import markdown
from pte_trl.estimate.__main__ import job
from pte_trl.estimate.terms import persistent, training

COUNTED = {"memory": "peak MB", "step": "step MB"}
ARMS = {"lora, full cache": ("lora", "one_pass")}
ARMS |= {f"{method}, one pass": (method, "one_pass") for method in ("lora_c", "pte")}
ARMS |= {"pte, segments": ("pte", "segments")}
HEAD = ("shape", "new tokens", "arm", "counted, MB", "computed, MB", "computed over counted")


def computed(settings: dict, arm: str, completion: int) -> float:
    """Bytes of a step of one arm of a recorded benchmark."""
    method, replay = ARMS[arm]
    found = job(
        settings["shape"],
        method,
        window=None if method == "lora" else settings["window"],
        prompt=settings["prompt"],
        completion=completion,
        micro_batch=settings.get("batch", 1),
        ranks=1,
        dtype=getattr(torch, settings["dtype"]),
        replay=replay,
        segment_length=settings.get("segment_length", settings["window"]),  # W in records older than the setting
        offload=settings["offload"],
        device=settings["device"],
    )
    return training(found) + persistent(found)["gradients"]


def rows() -> list[tuple]:
    """Shape, new tokens, arm, bytes counted and bytes computed; a shape in both files is read from the first."""
    newest: dict[str, tuple[str, dict]] = {}
    for name, column in reversed(COUNTED.items()):
        for record in json.loads((RECORDS / f"{name}.json").read_text()):
            newest[record["settings"]["shape"]] = column, record
    found = []
    for shape, (column, record) in newest.items():
        for row in record["rows"]:
            arm, length = row["arm"], row["completion"]
            found.append((shape, length, arm, row[column] * 1e6, computed(record["settings"], arm, length)))
    return found


def page() -> str:
    cells = [
        (shape, str(length), arm, f"{counted / 1e6:,.0f}", f"{size / 1e6:,.0f}", f"{size / counted:.2f}")
        for shape, length, arm, counted, size in rows()
    ]
    return markdown.table(HEAD, cells)


if __name__ == "__main__":
    print(page())
