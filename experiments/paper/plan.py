"""Which runs every table and figure needs, and the Makefile that makes them.

    python experiments/paper/plan.py tiny > outputs/tiny/plan.mk

Standard library only, and run by its path: make asks it for the plan before there is an environment. The cells follow
the paper's own numbers (`data/*.csv`), so that none is forgotten.

At the scale "tiny" one model of a million parameters stands in for the paper's three, generated sums stand in for the
benchmarks, and lengths are 1/32 of the paper's. A budget b becomes 32 + (b - 512) / 32: the paper counts 512 of its
budget for the question, the longest of ours have 31 tokens.
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

ITEMS = (
    *("table1", "table2", "table3", "tableA1"),
    *("figure3", "figure4a", "figure4b", "figure5", "figure6", "figureA1"),
)
DATA = Path(__file__).parent / "data"
MODELS = {
    "Qwen2.5-3B-Instruct": "qwen3b",
    "Qwen2.5-7B-Instruct": "qwen7b",
    "DeepSeek-R1-Distill-Llama-8B": "llama8b",
}
# Where the CSV has no model column. Figure 6's is not named in the paper: our choice, as figure 4's.
MODEL_OF = {
    **dict.fromkeys(("tableA1", "figureA1", "figure4a", "figure4b", "figure6"), "qwen3b"),
    **{"figure3a": "qwen7b", "figure3b": "llama8b", "figure5": "llama8b", "table3": "llama8b"},
}
EFFICIENCY = ("attention_tflops_max", "gpu_mem_peak_pct", "gpu_mem_mean_pct")
BENCHMARKS = ("math500", "olympiadbench", "minerva_math", "amc23", "aime24", "aime25")
LENGTH, LONG = 3072, 6144  # new tokens: figures 3, 4, A1; table 2 and the AIME columns of table 1
RUNS, TRIES = 5, 16  # pass@1 is averaged over five runs, AIME is pass@16
SHRINK, SINK, TINY_SINK = 32, 512, 32
PER_DEVICE = {
    "qwen3b": 8,
    "qwen7b": 4,
    "llama8b": 4,
}  # completions per GPU in the recipes, for the global batch of 512
TINY_BIN = 7  # figure 6: its completions have 30 to 50 tokens, the paper's 100 to 800
TINY_STEPS = 80  # a few minutes on two cores
TINY_RATE = "2e-4"  # at the recipe's 1e-3 two PTE runs collapsed (docs/log.md)


@dataclass(frozen=True)
class Training:
    """A training run: `options` are flags on top of the model's recipe."""

    model: str
    run: str
    options: tuple[str, ...]
    folder: str


@dataclass(frozen=True)
class Evaluation:
    """An evaluation of a run ("baseline" has no training) on one benchmark under one setting."""

    model: str
    run: str
    benchmark: str
    budget: int
    max_new_tokens: int
    evict_ratio: float
    eviction: str
    samples: int
    folder: str


@dataclass(frozen=True)
class Cell:
    """A number: the paper's key columns, where ours comes from (None: the mean of its siblings), and as what."""

    keys: dict[str, str]
    source: Training | Evaluation | None
    metric: str


def options_of(run: str, scale: str) -> tuple[str, ...]:
    """Flags of a run: lora, lora_c, pte, and pte or lora with a variant behind a hyphen."""
    method, _, variant = run.partition("-")
    options = ["--method", method]
    if method == "lora":
        options += ["--window", "full"]
    if variant == "global_0":
        options += ["--use_global_tokens", "false"]
    elif variant == "global_only":
        options += ["--encode_evicted", "false"]
    elif variant.startswith("global_"):
        options += ["--num_global_tokens", variant.removeprefix("global_")]
    length = int(variant) if variant.isdigit() else LENGTH
    if scale == "tiny":
        options += ["--max_completion_length", str(length // SHRINK), "--max_steps", str(TINY_STEPS)]
        options += ["--learning_rate", TINY_RATE]
    elif length != LENGTH:
        options += ["--max_completion_length", str(length)]
    if scale == "paper" and method == "lora":
        # TRL decodes a whole generation batch at once: with the full cache, 64 completions would not fit in 40 GB.
        options += ["--steps_per_generation", "2"]
    return tuple(options)


def training(model: str, run: str, scale: str) -> Training:
    return Training(model, run, options_of(run, scale), f"outputs/{scale}/train/{model}/{run}")


def evaluation(
    model, run, benchmark, scale, budget, length=LENGTH, ratio=0.25, eviction="sliding_window", samples=RUNS
):
    """The evaluation at the paper's numbers, shrunk where the scale is tiny."""
    if scale == "tiny":
        benchmark, length = f"tiny_{benchmark}", length // SHRINK
        budget = TINY_SINK + (budget - SINK) // SHRINK
    setting = f"{budget}-{length}-{ratio}-{eviction}-{samples}"
    folder = f"outputs/{scale}/evaluate/{model}/{run}/{setting}/{benchmark}"
    return Evaluation(model, run, benchmark, budget, length, ratio, eviction, samples, folder)


def cells(item: str, scale: str) -> list[Cell]:
    """All cells of an item.

    Raises:
        ValueError: unknown item or scale.
    """
    if item not in ITEMS or scale not in ("paper", "tiny"):
        raise ValueError(f"item={item!r}, scale={scale!r}: items are {', '.join(ITEMS)}; scales are paper, tiny")
    out: dict[tuple, Cell] = {}
    for table in ("figure3a", "figure3b") if item == "figure3" else (item,):
        with (DATA / f"{table}.csv").open() as file:
            for row in csv.DictReader(file):
                keys = {key: row[key] for key in row if key not in ("value", "paper_label", "bin", "count_inferred")}
                if scale == "tiny" and keys.get("model", "Qwen2.5-3B-Instruct") != "Qwen2.5-3B-Instruct":
                    continue  # one model stands in for the three
                model = "tiny" if scale == "tiny" else MODELS.get(keys.get("model")) or MODEL_OF[table]
                named = {"panel": table.removeprefix("figure"), **keys} if item == "figure3" else keys
                out.setdefault(tuple(named.items()), Cell(named, *source(table, keys, model, scale)))
    return list(out.values())


def source(item: str, keys: dict[str, str], model: str, scale: str) -> tuple[Training | Evaluation | None, str]:
    """Where a cell's number comes from, and as what."""
    if "avg" in keys.values():
        return None, "avg"
    if item == "table1":
        return table1(keys, model, scale)
    if item == "table2":
        arguments = (model, keys["method"], keys["dataset"], scale, int(keys["cache_window"]), LONG)
        return evaluation(*arguments, samples=TRIES), "pass@16"
    if item == "table3":
        return table3(keys, model, scale)
    if item == "tableA1":
        return evaluation(model, "pte", "math500", scale, 1024, ratio=float(keys["eviction_ratio"])), "pass@1"
    if item == "figure4a":
        variant = keys["variant"]
        run = {"baseline": "baseline", "global_32": "pte"}.get(variant, f"pte-{variant}")
        return evaluation(model, run, "math500", scale, int(keys["window"])), "pass@1"
    if item == "figure4b":
        run, _, strategy = keys["strategy"].partition("_")
        strategy = strategy or "sliding_window"
        return evaluation(model, run, "math500", scale, int(keys["window"]), eviction=strategy), "pass@1"
    if item == "figure5":
        length = int(keys["max_generation_length"])
        return evaluation(model, keys["method"], "math500", scale, 1024, length), "pass@1"
    if item == "figure6":
        return evaluation(model, keys["method"], "math500", scale, 768), "lengths"
    return evaluation(model, keys["method"], keys["benchmark"], scale, int(keys["window"])), "pass@1"


def table1(keys: dict[str, str], model: str, scale: str):
    """Its AIME cells equal table 2's at 1536, its others figure 3's and A1's at 3072: two budgets in one table."""
    metric, method = keys["metric"], keys["method"]
    if metric in EFFICIENCY:
        return training(model, method, scale), metric
    if metric.endswith("_pass16"):
        benchmark = metric.removesuffix("_pass16")
        return evaluation(model, method, benchmark, scale, 1536, LONG, samples=TRIES), "pass@16"
    return evaluation(model, method, metric, scale, 3072), "pass@1"


def table3(keys: dict[str, str], model: str, scale: str):
    """Rollout length in training; evaluated at the same length (not stated in the paper), under its largest budget."""
    method, length = {"vanilla": "lora"}.get(keys["method"], keys["method"]), int(keys["generation_length"])
    run = method if length == LENGTH else f"{method}-{length}"
    if keys["metric"] in EFFICIENCY:
        return training(model, run, scale), keys["metric"]
    return evaluation(model, run, "math500", scale, 3072, length), "pass@1"


def stand_in(scale: str) -> dict:
    """What stands for what, for captions; empty at the paper's scale."""
    if scale == "paper":
        return {}
    return {
        "model": "a model of a million parameters (tiny) in the place of the paper's",
        "note": "It adds up generated sums, so the paper's numbers beside it are there for the layout only. Lengths "
        f"are 1/{SHRINK} of the paper's; a budget b is {TINY_SINK} + (b - {SINK}) / {SHRINK}; {TINY_BIN} tokens "
        "of figure 6 stand for 100.",
        "bin_width": TINY_BIN,
    }


# ---- the Makefile ----------------------------------------------------------------------------------------------


def train_rule(run: Training, scale: str) -> str:
    base = " | $(TINY_BASE) $(TINY_DATA)" if scale == "tiny" else " | $(READY)"
    command = ["$(LAUNCH) recipes/grpo_pte.py --config", f"recipes/{run.model}.yaml", *run.options]
    command += ["--output_dir", run.folder]
    if scale == "paper":
        command += ["--gradient_accumulation_steps", f"$(call ACCUMULATION,{PER_DEVICE[run.model]})"]
    command += ["$(TRAIN_ARGS)"]
    return f"{run.folder}/manifest.json:{base}\n\t{' '.join(command)}\n"


def evaluate_rule(run: Evaluation, scale: str) -> str:
    """$(FRESH) removes a folder of records that is older than its adapter; an unfinished one goes on."""
    needs, command = [], ["$(LAUNCH) recipes/evaluate.py --recipe", f"recipes/{run.model}.yaml"]
    if run.run != "baseline":
        trained = training(run.model, run.run, scale).folder
        needs.append(f"{trained}/manifest.json")
        command += ["--adapter", trained]
    base = "$(TINY_BASE) $(TINY_DATA)" if scale == "tiny" else "$(READY)"
    command += ["--benchmarks", run.benchmark, "--budget", str(run.budget)]
    command += ["--max_new_tokens", str(run.max_new_tokens), "--evict_ratio", str(run.evict_ratio)]
    command += ["--eviction", run.eviction, "--samples", str(run.samples)]
    command += ["--output_dir", str(Path(run.folder).parent), "$(EVAL_ARGS)"]
    target = f"{run.folder}/manifest.json"
    return f"{target}: {' '.join(needs)} | {base}\n\t@$(FRESH)\n\t{' '.join(command)}\n"


def item_rule(item: str, needs: list[str], scale: str) -> str:
    """Writes the table or figure, and prints the table, once everything behind it is there."""
    result = f"outputs/{scale}/results/{item}.{'md' if item.startswith('table') else 'png'}"
    render = f"$(PY) -m experiments.paper.render {item} --scale {scale} --output outputs/{scale}/results"
    return f".PHONY: reproduce-{item}\nreproduce-{item}: {result}\n{result}: {' '.join(needs)}\n\t{render}\n"


def makefile(scale: str) -> str:
    """Rules for every training, evaluation, table and figure of a scale."""
    runs: dict[str, str] = {}
    rules = []
    for item in ITEMS:
        sources = dict.fromkeys(cell.source for cell in cells(item, scale) if cell.source is not None)
        for run in sources:
            if isinstance(run, Evaluation) and run.run != "baseline":
                trained = training(run.model, run.run, scale)
                runs.setdefault(trained.folder, train_rule(trained, scale))
            runs.setdefault(run.folder, (train_rule if isinstance(run, Training) else evaluate_rule)(run, scale))
        rules.append(item_rule(item, [f"{run.folder}/manifest.json" for run in sources], scale))
    everything = " ".join(f"reproduce-{item}" for item in ITEMS)
    rules.append(f".PHONY: reproduce-all\nreproduce-all: {everything}\n")
    return "\n".join([f"# Made by experiments/paper/plan.py for SCALE={scale}", *runs.values(), *rules])


if __name__ == "__main__":
    print(makefile(sys.argv[1]))
