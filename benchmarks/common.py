"""What the benchmarks share: model shapes with random weights, the environment line, tables and records."""

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import pte_trl
from pte_trl.manifest import environment

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "docs" / "benchmarks"
__all__ = ["environment", "print_environment", "print_table", "random_model", "record"]

# Configurations only: a benchmark of time or memory needs no trained weights.
SHAPES = {folder.name: folder for folder in sorted((Path(pte_trl.__file__).parent / "shapes").iterdir())}


def random_model(shape: str, seed: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of a named shape with random weights; the same seed gives the same weights."""
    if shape not in SHAPES:
        raise ValueError(f"shape={shape!r}: allowed are {', '.join(SHAPES)}")
    config = AutoConfig.from_pretrained(SHAPES[shape])
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="blockwise")


def print_environment(environment: dict) -> None:
    print(" | ".join(f"{key} {value}" for key, value in environment.items()))


def print_table(rows: list[dict]) -> None:
    """Rows with the same keys, as columns; floats with three digits behind the point."""
    cells = [{key: f"{x:.3f}" if isinstance(x, float) else str(x) for key, x in row.items()} for row in rows]
    widths = {key: max(len(key), *(len(row[key]) for row in cells)) for key in cells[0]}
    for row in [{key: key for key in widths}, *cells]:
        print("  ".join(row[key].ljust(width) for key, width in widths.items()).rstrip())


def record(name: str, environment: dict, settings: dict, rows: list[dict]) -> Path:
    """Appends one run to docs/benchmarks/<name>.json, a list of runs."""
    path = RECORDS / f"{name}.json"
    runs = json.loads(path.read_text()) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.append({"environment": environment, "settings": settings, "rows": rows})
    path.write_text(json.dumps(runs, indent=1) + "\n")
    return path
