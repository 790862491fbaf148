"""Memory of the paper's recipes on one GPU, by method, engine and setting."""

from dataclasses import replace

from peft import LoraConfig
from transformers import AutoConfig

from pte_trl import markdown
from pte_trl.adapter import PteConfig
from pte_trl.estimate.terms import SHAPES, Job, count, estimate

MODELS = {"qwen2.5-3b": "Qwen2.5-3B", "qwen2.5-7b": "Qwen2.5-7B", "llama-8b": "DeepSeek-R1-Distill-Llama-8B"}

# The paper's recipes on eight GPUs: W is the longest prompt, rollouts are of all 64 completions at once.
PAPER = {"prompt": 512, "completion": 3072, "micro_batch": 8, "rollout_batch": 64, "num_generations": 8, "ranks": 8}

ENGINES = {"none": "DDP", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp2": "FSDP2"}

SMALLER = {"micro_batch": 2, "rollout_batch": 16}

LONG = SMALLER | {"completion": 16384, "ranks": 1}

CHANGES = {
    "the recipe": {},
    "`per_device_train_batch_size: 2`, `gradient_accumulation_steps: 32`": {"micro_batch": 2},
    "`rollout_batch_size: 16`": {"rollout_batch": 16},
    "both": SMALLER,
    "both, ZeRO-3": SMALLER | {"sharding": "zero3"},
    "both, FSDP2": SMALLER | {"sharding": "fsdp2"},
    "both, one GPU, `max_completion_length: 16384`": LONG,
    "the same, `replay: segments`": LONG | {"replay": "segments"},
    "the same, `offload_cache: true`": LONG | {"replay": "segments", "offload": True},
}


def paper_job(shape: str, method: str, **changes) -> Job:
    """The recipe of one of the paper's models, with changes."""
    config = AutoConfig.from_pretrained(SHAPES / shape)
    adapter = PteConfig() if method == "pte" else LoraConfig(r=32, target_modules=["q_proj", "o_proj"])
    window = None if method == "lora" else 512
    return Job(config, count(config), count(config, adapter), method, window=window, **PAPER | changes)


def table(jobs: dict[str, Job]) -> str:
    """Markdown, one job a row."""
    head, rows = ["GB per GPU", "weights", "adapter, gradients, Adam", "training", "rollout", "peak"], []
    for name, job in jobs.items():
        terms = estimate(job)
        own = terms["adapter"] + terms["gradients"] + terms["optimizer"]
        cells = (terms["weights"], own, terms["training"], terms["rollout"], terms["peak"])
        rows.append([name, *(f"{cell / 1e9:.1f}" for cell in cells)])
    return markdown.table(head, rows)


def tables() -> str:
    """The three models by method and engine, then one change at a time."""
    lines = []
    for shape, title in MODELS.items():
        jobs = {}
        for method in ("lora", "lora_c", "pte"):
            job = paper_job(shape, method)
            jobs |= {f"{method}, {name}": replace(job, sharding=sharding) for sharding, name in ENGINES.items()}
        lines += [f"### {title}", "", table(jobs), ""]
    jobs = {name: paper_job("qwen2.5-7b", "pte", **change) for name, change in CHANGES.items()}
    return "\n".join([*lines, "### One change at a time: Qwen2.5-7B, pte, DDP", "", table(jobs), ""])


if __name__ == "__main__":
    print(tables())
