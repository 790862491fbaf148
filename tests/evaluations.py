"""An evaluation that takes seconds: model, adapter and problems in a folder, and the flags for them."""

import json
from pathlib import Path

from peft import get_peft_model

from experiments.tiny.model import build
from experiments.tiny.task import DIFFICULTIES, rows
from pte_trl import PteConfig
from tests.models import randomise_up

PROBLEMS, SAMPLES = 7, 3


def untrained(folder: Path) -> Path:
    """An untrained model, a PTE adapter that does something, and problems with prompts of two lengths."""
    model, tokenizer = build(seed=0)
    tokenizer.save_pretrained(folder / "model")
    # It draws from 900 tokens alike: with these, half of the completions end, each after another number of tokens.
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(200, 212)]
    model.save_pretrained(folder / "model")
    adapted = get_peft_model(model, PteConfig(rank=4, num_global_tokens=4))
    randomise_up(adapted)
    adapted.save_pretrained(folder / "adapter")
    some = rows("test", 4, 0, DIFFICULTIES["easy"]) + rows("test", 3, 0, DIFFICULTIES["hard"])
    (folder / "sums.jsonl").write_text("".join(json.dumps(r) + "\n" for r in some))
    return folder


def argv(setting, out, **changes) -> list[str]:
    options = {
        "model_name_or_path": setting / "model",
        "adapter": setting / "adapter",
        "dtype": "float32",
        "benchmarks": setting / "sums.jsonl",
        "output_dir": out,
        "budget": 48,
        "max_new_tokens": 40,
        "samples": SAMPLES,
        "temperature": 1.0,
        "batch_size": 4,
        "grader_workers": 1,  # each takes a second to start
        "use_cpu": "true",
    } | changes
    return [str(part) for key, value in options.items() if value is not None for part in (f"--{key}", value)]


def content(out) -> str:
    return (Path(out) / "sums" / "records.jsonl").read_text()
