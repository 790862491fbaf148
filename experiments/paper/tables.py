"""Rows in the paper's layout: every line of a table thrice, as printed, as ours, and their difference.

One `Section` serves the terminal, GitHub and the HTML page; the flat CSV holds every cell in full precision.
"""

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from experiments.paper import numbers
from experiments.paper.plan import EFFICIENCY
from experiments.paper.results import Row, missing
from pte_trl.markdown import table

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


@dataclass(frozen=True)
class Section:
    """A table as text: header, and lines as long as it."""

    title: str
    header: list[str]
    lines: list[list[str]]


def label(value: str) -> str:
    """A key's value as a reader knows it."""
    return LABELS.get(value, TITLE_OF_PANEL.get(value, value))


def number(value: float | None, digits: int = 1) -> str:
    """At least one decimal, `digits` at most; more for what would read 0.0; "-" for None."""
    if value is None:
        return "-"
    if value and abs(value) < 0.05:
        return f"{value:.2g}"
    text = f"{value:.{digits}f}"
    return text[:-1] if digits == 2 and text.endswith("0") else text


def footnotes(rows: Iterable[Row]) -> list[str]:
    """The slips of all rows, each once; a mark [n] is the n-th of them."""
    return list(dict.fromkeys(text for row in rows for text in row.slips))


def sections(item: str, rows: list[Row]) -> list[Section]:
    """The paper's layout. A cell that the paper leaves blank is blank, a number of ours still to come is "-"."""
    layout, notes, out = LAYOUTS[item], footnotes(rows), []
    for title, within in _groups(rows, layout.section).items():
        columns = list(dict.fromkeys(row.keys[layout.column] for row in within))
        columns.sort(key=lambda column: column not in EFFICIENCY)  # Table 1's first line has none of them
        header = [*("length" if key == "generation_length" else key for key in layout.line), ""]
        lines = []
        for name, members in _groups(within, layout.line).items():
            cells = {row.keys[layout.column]: row for row in members}
            lines += _lines([label(part) for part in name], [cells.get(column) for column in columns], notes)
        out.append(Section(", ".join(label(part) for part in title), header + [label(c) for c in columns], lines))
    return out


def _groups(rows: Iterable[Row], keys: tuple[str, ...]) -> dict[tuple[str, ...], list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.keys[key] for key in keys), []).append(row)
    return groups


def _lines(names: list[str], cells: list[Row | None], notes: list[str]) -> list[list[str]]:
    """Paper, ours and difference of one line of the paper; the difference only where there is one."""

    def paper(row: Row) -> str:
        marks = "".join(f"[{notes.index(text) + 1}]" for text in row.slips)
        return f"{number(row.paper, 2)} {marks}".rstrip()

    def ours(row: Row) -> str:
        return number(row.ours) + ("" if row.se is None else f" ±{number(row.se)}")

    def difference(row: Row) -> str:
        return "" if row.difference is None else f"{round(row.difference, 9) + 0.0:+.1f}"  # equal is +0.0

    def line(names: list[str], kind: str, write) -> list[str]:
        return [*names, kind, *("" if row is None else write(row) for row in cells)]

    empty = [""] * len(names)
    out = [line(names, "paper", paper), line(empty, "ours", ours)]
    if any(row is not None and row.difference is not None for row in cells):
        out.append(line(empty, "diff", difference))
    return out


def caption(rows: list[Row], stand_in: dict, absence: str = "marked -") -> list[str]:
    """What a reader must know before the numbers: whose they are, what is missing, what they rest on."""
    out = (
        [f"NOT THE PAPER'S MODELS: ours is {stand_in['model']}. {stand_in.get('note', '')}".strip()]
        if stand_in
        else []
    )
    absent = len(missing(rows))
    total = f"of {len(rows)} numbers of ours"
    out.append(f"Missing: {absent} {total}, {absence}." if absent else f"Missing: none {total}.")
    counts = sorted({(row.problems, row.samples) for row in rows if row.problems})
    if counts:
        out.append("Ours: " + ", ".join(f"{p} problems x {s} samples" for p, s in counts) + "; ± is a standard error.")
    if memory := sorted({row.memory_of for row in rows if row.memory_of}):
        out.append(f"Memory of ours: {'; '.join(memory)}.")
    return out


def markdown(item: str, rows: list[Row], stand_in: dict) -> str:
    """The whole table as Markdown that also reads in a terminal."""
    head, *rest = caption(rows, stand_in)
    out = [f"## {LAYOUTS[item].title}", "", f"**{head}**" if stand_in else head, *(f"\n{line}" for line in rest), ""]
    for section in sections(item, rows):
        out += [f"### {section.title}", ""] if section.title else []
        out += [table(section.header, section.lines, padded=True), ""]
    if notes := footnotes(rows):
        out += ["Slips of the paper:", "", *(f"- [{n}] {text}" for n, text in enumerate(notes, 1)), ""]
    if general := numbers.general_slips(item):
        out += ["About the paper's numbers:", "", *(f"- {text}" for text in general), ""]
    return "\n".join(out).rstrip() + "\n"


# `metric` is a key column of two tables already, and there names the column rather than what is measured.
NUMBERS = ("paper", "ours", "difference", "se", "problems", "samples", "at", "memory_of", "folder")


def write_csv(path: Path, item: str, rows: list[Row]) -> None:
    """One line per cell: its keys, then paper, ours, difference, and what they rest on; empty where there is none."""
    columns = [*numbers.KEYS[item], "measure", *NUMBERS, "slips"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            plain = {name: getattr(row, name) for name in NUMBERS}
            writer.writerow({**row.keys, "measure": row.metric, **plain, "slips": " | ".join(row.slips)})
