"""What the benchmarks share: model shapes with random weights, the environment line, tables and records."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config

import pte_trl.attention  # noqa: F401  (registers "blockwise")
from pte_trl.manifest import environment

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "docs" / "benchmarks"
__all__ = ["environment", "print_environment", "print_table", "random_model", "record"]

# Shapes only: a benchmark of time needs no trained weights.
SHAPES = {
    "tiny": Qwen2Config(
        vocab_size=512,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=384,
    ),
    "smollm2-135m": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
    ),
}


def random_model(shape: str, seed: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of a named shape with random weights; the same seed gives the same weights."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(SHAPES[shape], attn_implementation="blockwise").to(
        device=device, dtype=dtype
    )


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
