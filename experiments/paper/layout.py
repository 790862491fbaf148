"""How an item of the paper is laid out, and how its keys and numbers read."""

from collections.abc import Iterable
from dataclasses import dataclass

from experiments.paper.results import Row

LABELS = {
    "baseline": "Base",
    "lora": "LoRA",
    "lora_c": "LoRA_c",
    "pte": "PTE",
    "vanilla": "LoRA (vanilla)",
    "attention_tflops_max": "TFLOPs max",
    "gpu_mem_peak_pct": "mem peak %",
    "gpu_mem_mean_pct": "mem mean %",
    "math500": "MATH-500",
    "math500_pass1": "MATH-500",
    "olympiadbench": "Olympiad",
    "minerva_math": "Minerva",
    "amc23": "AMC23",
    "aime24": "AIME24",
    "aime25": "AIME25",
    "aime24_pass16": "AIME24 @16",
    "aime25_pass16": "AIME25 @16",
    "avg": "average",
    "global_only": "global only",
    "pte_sliding_window": "PTE, sliding window",
    "pte_h2o": "PTE, H2O",
    "pte_pyramidkv": "PTE, PyramidKV",
    "pte_headkv": "PTE, HeadKV",
    **{f"global_{n}": f"{n} global tokens" for n in (16, 32, 48, 64)},
    "global_0": "global-0 (S starts at 0)",
}


@dataclass(frozen=True)
class Layout:
    """How an item's key columns are spread over sections, lines and columns."""

    title: str
    column: str
    line: tuple[str, ...] = ()
    section: tuple[str, ...] = ()


LAYOUTS = {
    "table1": Layout("Table 1: efficiency of training, and accuracy", "metric", ("method",), ("model",)),
    "table2": Layout(
        "Table 2: AIME, pass@16 in percent, over cache windows", "cache_window", ("method",), ("dataset", "model")
    ),
    "table3": Layout(
        "Table 3: longer rollouts in training, DeepSeek-R1-Distill-Llama-8B", "metric", ("method", "generation_length")
    ),
    "tableA1": Layout("Table A1: eviction ratios, MATH-500, pass@1 in percent, Qwen2.5-3B-Instruct", "eviction_ratio"),
    "figure3": Layout("Figure 3: accuracy over windows", "window", ("method",), ("panel", "benchmark")),
    "figureA1": Layout("Figure A1: accuracy over windows, Qwen2.5-3B-Instruct", "window", ("method",), ("benchmark",)),
    "figure4a": Layout("Figure 4a: global tokens, MATH-500, Qwen2.5-3B-Instruct", "window", ("variant",)),
    "figure4b": Layout("Figure 4b: eviction strategies, MATH-500, Qwen2.5-3B-Instruct", "window", ("strategy",)),
    "figure5": Layout(
        "Figure 5: longer generations, MATH-500, DeepSeek-R1-Distill-Llama-8B", "max_generation_length", ("method",)
    ),
    "figure6": Layout("Figure 6: lengths of correct responses, MATH-500", "bin", ("method",)),
}

TITLE_OF_PANEL = {"3a": "3a, Qwen2.5-7B-Instruct", "3b": "3b, DeepSeek-R1-Distill-Llama-8B"}


def label(value: str) -> str:
    """A key's value as a reader knows it."""
    return LABELS.get(value, TITLE_OF_PANEL.get(value, value))


def title_of(keys: Iterable[str]) -> str:
    return ", ".join(label(key) for key in keys)


def number(value: float | None, digits: int = 1) -> str:
    """At least one decimal, `digits` at most; more for what would read 0.0; "-" for None."""
    if value is None:
        return "-"
    if value and abs(value) < 0.05:
        return f"{value:.2g}"
    text = f"{value:.{digits}f}"
    return text[:-1] if digits == 2 and text.endswith("0") else text


def signed(value: float) -> str:
    return f"{round(value, 9) + 0.0:+.1f}"  # equal is +0.0


def groups(rows: Iterable[Row], keys: tuple[str, ...]) -> dict[tuple[str, ...], list[Row]]:
    """Rows by the values of these keys, in their order."""
    out: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        out.setdefault(tuple(row.keys[key] for key in keys), []).append(row)
    return out
