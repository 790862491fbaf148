"""Which runs every table and figure needs at a scale, each with its folder and its flags.

Standard library only: make asks for the plan before there is an environment. The cells follow the paper's own numbers
(`data/*.csv`), so that none is forgotten; `scales.py` says how a scale differs from the paper, `targets.py` makes a
Makefile of the runs, and `show.py` a table of what they cost.
"""

import csv
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.paper.filters import ALL, Filters
from experiments.paper.scales import MODELS, SCALES, scale_of
from experiments.rules import options as words

ITEMS = (
    *("table1", "table2", "table3", "tableA1"),
    *("figure3", "figure4a", "figure4b", "figure5", "figure6", "figureA1"),
)
DATA = Path(__file__).parent / "data"
# Where the CSV has no model column. Figure 6's is not named in the paper: our choice, as figure 4's.
MODEL_OF = {
    **dict.fromkeys(("tableA1", "figureA1", "figure4a", "figure4b", "figure6"), "qwen3b"),
    **{"figure3a": "qwen7b", "figure3b": "llama8b", "figure5": "llama8b", "table3": "llama8b"},
}
EFFICIENCY = ("attention_tflops_max", "gpu_mem_peak_pct", "gpu_mem_mean_pct")
LENGTH, LONG = 3072, 6144  # new tokens: figures 3, 4, A1; table 2 and the AIME columns of table 1
LONGEST = 65536  # figure 5: its shorter lengths are prefixes of one run of this length


@dataclass(frozen=True)
class TrainingRun:
    """A training run: `options` are flags on top of the model's recipe; no `seed` is the recipe's."""

    model: str
    run: str
    options: tuple[str, ...]
    folder: str
    seed: int | None = None


@dataclass(frozen=True)
class EvaluationRun:
    """An evaluation of a run ("baseline" has no training) on one benchmark under one setting.

    `seed` is that of the training, and `problems` are the first so many; None for the recipe's, and for all.
    """

    model: str
    run: str
    benchmark: str
    budget: int
    max_new_tokens: int
    evict_ratio: float
    eviction: str
    samples: int
    folder: str
    seed: int | None = None
    problems: int | None = None


@dataclass(frozen=True)
class Cell:
    """A number: the paper's key columns, where ours comes from (None: the mean of its siblings), and as what.

    Where a scale trains with several seeds, as many cells have the same keys, and `seed` tells them apart. The metric
    "pass@1@1024" is pass@1 of completions cut off after 1,024 tokens.
    """

    keys: dict[str, str]
    source: TrainingRun | EvaluationRun | None
    metric: str
    seed: int | None = None


def options_of(run: str, scale: str) -> tuple[str, ...]:
    """Flags of a run: lora, lora_c, pte, and pte or lora with a variant behind a hyphen."""
    method, _, variant = run.partition("-")
    options = ["--method", method]
    options += words(model_name_or_path=SCALES[scale].model, **SCALES[scale].training)
    if method == "lora":
        options += ["--window", "full", "--replay", "one_pass"]  # what a recipe says of a bounded cache, taken back
    if variant == "global_0":
        options += ["--use_global_tokens", "false"]
    elif variant == "global_only":
        options += ["--encode_evicted", "false"]
    elif variant.startswith("global_"):
        options += ["--num_global_tokens", variant.removeprefix("global_")]
    length = int(variant) if variant.isdigit() else LENGTH
    if scale != "paper" or length != LENGTH:
        options += ["--max_completion_length", str(SCALES[scale].length(length))]
    if scale == "paper" and method == "lora":
        # TRL decodes a whole generation batch at once: as many completions as the recipes decode under a window, or
        # half as many of the longer ones, which would not fit in 40 GB (docs/scaling.md).
        options += ["--steps_per_generation", "8" if length == LENGTH else "4"]
    elif scale == "paper" and length != LENGTH:
        options += ["--offload_cache", "true"]  # the peak is then the same at every length
    return tuple(options)


def training(model: str, run: str, scale: str, seed: int | None = None) -> TrainingRun:
    folder = f"{SCALES[scale].folder}/train/{model}/{run}"
    return with_seed(TrainingRun(model, run, options_of(run, scale), folder), seed)


def evaluation(
    model, run, benchmark, scale, budget, length=LENGTH, ratio=0.25, eviction="sliding_window", tries=False
) -> EvaluationRun:
    """The evaluation at the paper's numbers, made into those of the scale."""
    at = SCALES[scale]
    benchmark, budget, length = at.data + benchmark, at.budget(budget), at.length(length)
    samples = at.tries if tries else at.runs
    setting = f"{budget}-{length}-{ratio}-{eviction}-{samples}" + (f"-first{at.problems}" if at.problems else "")
    folder = f"{at.folder}/evaluate/{model}/{run}/{setting}/{benchmark}"
    setting = (model, run, benchmark, budget, length, ratio, eviction, samples)
    return EvaluationRun(*setting, folder, problems=at.problems)


def with_seed(run: TrainingRun | EvaluationRun, seed: int | None) -> TrainingRun | EvaluationRun:
    """The same run with another seed in training. The baseline has no training, and the recipe's seed no name."""
    if seed is None or run.run == "baseline":
        return run
    own = f"/{run.model}/{run.run}"
    run = replace(run, seed=seed, folder=run.folder.replace(own, f"{own}-seed{seed}"))
    return replace(run, options=(*run.options, *words(seed=seed))) if isinstance(run, TrainingRun) else run


def cells(item: str, scale: str, filters: Filters = ALL) -> list[Cell]:
    """The cells of an item whose runs the filters leave, and all averages.

    Raises:
        ValueError: unknown item or scale.
    """
    at = scale_of(scale)
    if item not in ITEMS:
        raise ValueError(f"item={item!r}: there is no such table or figure; allowed are {', '.join(ITEMS)}")
    out: dict[tuple, Cell] = {}
    for table in ("figure3a", "figure3b") if item == "figure3" else (item,):
        for row in read(table):
            if at.one_model and row.get("model", "Qwen2.5-3B-Instruct") != "Qwen2.5-3B-Instruct":
                continue  # one model replaces the three
            model = at.one_model or MODELS.get(row.get("model")) or MODEL_OF[table]
            named = {"panel": table.removeprefix("figure"), **row} if item == "figure3" else row
            run, metric = source(table, row, model, scale)
            for one in dict.fromkeys(run and with_seed(run, seed) for seed in at.seeds):
                seed = one and one.seed
                if one is None or filters.keep(one):
                    out.setdefault((seed, *named.items()), Cell(named, one, metric, seed))
    return list(out.values())


def read(table: str) -> list[dict[str, str]]:
    """The key columns of every number of a CSV."""
    with (DATA / f"{table}.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [
        {key: row[key] for key in row if key not in ("value", "paper_label", "bin", "count_inferred")} for row in rows
    ]


def source(item: str, keys: dict[str, str], model: str, scale: str) -> tuple[TrainingRun | EvaluationRun | None, str]:
    """Where a cell's number comes from, and as what."""
    if "avg" in keys.values():
        return None, "avg"
    if item == "table1":
        return table1(keys, model, scale)
    if item == "table2":
        arguments = (model, keys["method"], keys["dataset"], scale, int(keys["cache_window"]), LONG)
        return evaluation(*arguments, tries=True), "pass@16"
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
        cut = SCALES[scale].length(int(keys["max_generation_length"]))
        return evaluation(model, keys["method"], "math500", scale, 1024, LONGEST), f"pass@1@{cut}"
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
        return evaluation(model, method, benchmark, scale, 1536, LONG, tries=True), "pass@16"
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
    return SCALES[scale].caption()


def trained(run: EvaluationRun, scale: str) -> TrainingRun | None:
    """The training that an evaluation needs; None for the baseline."""
    return None if run.run == "baseline" else training(run.model, run.run, scale, run.seed)


def needed(item: str, scale: str, filters: Filters = ALL) -> list[TrainingRun | EvaluationRun]:
    """The runs behind an item, each once: first its trainings, then its evaluations."""
    sources = [cell.source for cell in cells(item, scale, filters) if cell.source is not None]
    evaluations = [run for run in sources if isinstance(run, EvaluationRun)]
    trainings = [run for run in sources if isinstance(run, TrainingRun)]
    trainings += [run for one in evaluations if (run := trained(one, scale))]
    return list(dict.fromkeys(trainings)) + list(dict.fromkeys(evaluations))


def manifest(run: TrainingRun | EvaluationRun) -> str:
    """The file that a run writes last."""
    return f"{run.folder}/manifest.json"


def short_name(run: TrainingRun | EvaluationRun, scale: str) -> str:
    """What to type after `make` for one run; an evaluation names its budget, and what else is not as in Table 1."""
    name = f"{run.model}-{run.run}" + ("" if run.seed is None else f"-seed{run.seed}")
    if isinstance(run, TrainingRun):
        return f"train-{name}"
    at, aime = SCALES[scale], "aime" in run.benchmark
    name = f"evaluate-{name}-{run.benchmark.removeprefix(at.data)}-{run.budget}"
    usual = at.length(LONG if aime else LENGTH)
    name += "" if run.max_new_tokens == usual else f"-length{run.max_new_tokens}"
    name += "" if run.evict_ratio == 0.25 else f"-ratio{run.evict_ratio}"
    return name + ("" if run.eviction == "sliding_window" else f"-{run.eviction}")
