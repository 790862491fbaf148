"""Which runs every table and figure needs, and the Makefile that makes them.

    python -m experiments.paper.plan tiny > outputs/tiny/plan.mk

Standard library only: make asks for the plan before there is an environment. The cells follow the paper's own numbers
(`data/*.csv`), so that none is forgotten.

At the scale "tiny" one model of a million parameters stands in for the paper's three, generated sums stand in for the
benchmarks, and lengths are 1/32 of the paper's. A budget b becomes 32 + (b - 512) / 32: the paper counts 512 of its
budget for the question, the longest of ours have 31 tokens.
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

from experiments.rules import Run, makefile, options, python

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
LENGTH, LONG = 3072, 6144  # new tokens: figures 3, 4, A1; table 2 and the AIME columns of table 1
RUNS, TRIES = 5, 16  # pass@1 is averaged over five runs, AIME is pass@16
SHRINK, SINK, TINY_SINK = 32, 512, 32
TINY_BIN = 7  # figure 6: its completions have 30 to 50 tokens, the paper's 100 to 800
TINY_STEPS = 80  # a few minutes on two cores
TINY_RATE = "2e-4"  # at the recipe's 1e-3 two PTE runs collapsed (docs/log.md)


@dataclass(frozen=True)
class TrainingRun:
    """A training run: `options` are flags on top of the model's recipe."""

    model: str
    run: str
    options: tuple[str, ...]
    folder: str


@dataclass(frozen=True)
class EvaluationRun:
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
    source: TrainingRun | EvaluationRun | None
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
        # TRL decodes a whole generation batch at once: as many completions as the recipes decode under a window, or
        # half as many of the longer ones, which would not fit in 40 GB (docs/scaling.md).
        options += ["--replay", "one_pass", "--steps_per_generation", "8" if length == LENGTH else "4"]
    elif scale == "paper" and length != LENGTH:
        options += ["--offload_cache", "true"]  # the peak is then the same at every length
    return tuple(options)


def training(model: str, run: str, scale: str) -> TrainingRun:
    return TrainingRun(model, run, options_of(run, scale), f"outputs/{scale}/train/{model}/{run}")


def evaluation(
    model, run, benchmark, scale, budget, length=LENGTH, ratio=0.25, eviction="sliding_window", samples=RUNS
):
    """The evaluation at the paper's numbers, shrunk where the scale is tiny."""
    if scale == "tiny":
        benchmark, length = f"tiny_{benchmark}", length // SHRINK
        budget = TINY_SINK + (budget - SINK) // SHRINK
    setting = f"{budget}-{length}-{ratio}-{eviction}-{samples}"
    folder = f"outputs/{scale}/evaluate/{model}/{run}/{setting}/{benchmark}"
    return EvaluationRun(model, run, benchmark, budget, length, ratio, eviction, samples, folder)


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


def source(item: str, keys: dict[str, str], model: str, scale: str) -> tuple[TrainingRun | EvaluationRun | None, str]:
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


def train_rule(run: TrainingRun, scale: str) -> Run:
    command = ("$(LAUNCH)", "recipes/grpo_pte.py", *options(config=f"recipes/{run.model}.yaml"), *run.options)
    command += options(output_dir=run.folder)
    present = ("$(TINY_BASE)", "$(TINY_DATA)") if scale == "tiny" else ("$(READY)",)
    return Run(manifest(run), (), ((*command, "$(TRAIN_ARGS)"),), present)


def evaluate_rule(run: EvaluationRun, scale: str) -> Run:
    """$(FRESH) removes a folder of records that is older than its adapter; an unfinished one is resumed."""
    trained = None if run.run == "baseline" else training(run.model, run.run, scale)
    flags = {"recipe": f"recipes/{run.model}.yaml", "adapter": trained.folder if trained else None}
    flags |= {"benchmarks": run.benchmark, "budget": run.budget, "max_new_tokens": run.max_new_tokens}
    flags |= {"evict_ratio": run.evict_ratio, "eviction": run.eviction, "samples": run.samples}
    flags |= {"output_dir": Path(run.folder).parent}
    command = ("$(LAUNCH)", "recipes/evaluate.py", *options(**flags), "$(EVAL_ARGS)")
    present = ("$(TINY_BASE)", "$(TINY_DATA)") if scale == "tiny" else ("$(READY)",)
    return Run(manifest(run), (manifest(trained),) if trained else (), (("@$(FRESH)",), command), present)


def manifest(run: TrainingRun | EvaluationRun) -> str:
    """The file that a run writes last."""
    return f"{run.folder}/manifest.json"


def item_rules(item: str, needs: tuple[str, ...], scale: str) -> list[Run]:
    """Writes the table or figure, and prints the table, once everything behind it is there."""
    folder = f"outputs/{scale}/results"
    result = f"{folder}/{item}.{'md' if item.startswith('table') else 'png'}"
    render = python("experiments.paper.render", item, scale=scale, output=folder)
    return [Run(f"reproduce-{item}", (result,), phony=True), Run(result, needs, (render,))]


def rules(scale: str) -> list[Run]:
    """Every training, evaluation, table and figure of a scale; what several items need stands there several times."""
    found, shown = [], []
    for item in ITEMS:
        sources = dict.fromkeys(cell.source for cell in cells(item, scale) if cell.source is not None)
        for run in sources:
            if isinstance(run, EvaluationRun) and run.run != "baseline":
                found.append(train_rule(training(run.model, run.run, scale), scale))
            found.append((train_rule if isinstance(run, TrainingRun) else evaluate_rule)(run, scale))
        shown += item_rules(item, tuple(map(manifest, sources)), scale)
    return [*found, *shown, Run("reproduce-all", tuple(f"reproduce-{item}" for item in ITEMS), phony=True)]


if __name__ == "__main__":
    print(makefile(f"experiments/paper/plan.py for SCALE={sys.argv[1]}", rules(sys.argv[1])))
