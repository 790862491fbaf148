"""Rows in the paper's layout: every line of a table as printed, as ours, and their difference.

One `Section` serves the terminal, GitHub and the HTML page; the flat CSV holds every cell in full precision.
"""

import csv
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from experiments.paper import numbers
from experiments.paper.captions import caption
from experiments.paper.differences import OTHERS, Difference, differences
from experiments.paper.layout import LAYOUTS, groups, label, number, signed, title_of
from experiments.paper.plan import EFFICIENCY
from experiments.paper.results import Row
from pte_trl.evaluation.intervals import spread
from pte_trl.markdown import table

FORMULA = "†"  # marks TFLOPs by the paper's formula; the list of deviations says which


@dataclass(frozen=True)
class Section:
    """A table as text: header, and lines as long as it. The column without a header has the kind of each line."""

    title: str
    header: list[str]
    lines: list[list[str]]


def footnotes(rows: Iterable[Row]) -> list[str]:
    """The slips of all rows, each once; a mark [n] is the n-th of them."""
    return list(dict.fromkeys(text for row in rows for text in row.slips))


def sections(item: str, rows: list[Row]) -> list[Section]:
    """The paper's layout. A cell that the paper leaves blank is blank, a number of ours still to come is "-".

    Where both methods have scores, a second section has PTE's differences to the others.
    """
    layout, notes, out = LAYOUTS[item], footnotes(rows), []
    found = differences(rows)
    for name, within in groups(rows, layout.section).items():
        columns = list(dict.fromkeys(row.keys[layout.column] for row in within))
        columns.sort(key=lambda column: column not in EFFICIENCY)  # Table 1's first line has none of them
        header = [*("length" if key == "generation_length" else key for key in layout.line), ""]
        lines = []
        for line, members in groups(within, layout.line).items():
            cells = {row.keys[layout.column]: row for row in members}
            lines += _lines([label(part) for part in line], [cells.get(column) for column in columns], notes)
        lines += _counts(layout.line, within, layout.column, columns)
        out.append(Section(title_of(name), header + [label(column) for column in columns], lines))
        here = [one for one in found if all(one.keys[key] == x for key, x in zip(layout.section, name, strict=True))]
        if any(one.ours is not None for one in here):
            out.append(_differences(item, title_of(name), here))
    return out


def _line(names: list[str], kind: str, cells: list, write: Callable) -> list[str]:
    return [*names, kind, *("" if cell is None else write(cell) for cell in cells)]


def _lines(names: list[str], cells: list[Row | None], notes: list[str]) -> list[list[str]]:
    """Paper, ours, clean and difference of one line of the paper; the last two only where there are any."""

    def paper(row: Row) -> str:
        marks = "".join(f"[{notes.index(text) + 1}]" for text in row.slips)
        return f"{number(row.paper, 2)} {marks}".rstrip()

    def ours(row: Row) -> str:
        formula = "" if row.by_formula is None else f"({number(row.by_formula)} {FORMULA})"
        return " ".join(filter(None, [number(row.ours), spread(row.se, row.bounds, number), formula]))

    def clean(row: Row) -> str:
        return "" if row.clean is None else number(row.clean)

    def difference(row: Row) -> str:
        return "" if row.difference is None else signed(row.difference)

    empty, there = [""] * len(names), [row for row in cells if row is not None]
    out = [_line(names, "paper", cells, paper), _line(empty, "ours", cells, ours)]
    if any(row.clean is not None for row in there):
        out.append(_line(empty, "clean", cells, clean))
    if any(row.difference is not None for row in there):
        out.append(_line(empty, "diff", cells, difference))
    return out


def _counts(keys: tuple[str, ...], rows: list[Row], column: str, columns: list[str]) -> list[list[str]]:
    """A line with what each column rests on, problems x samples; nothing where there are no scores."""

    def count(row: Row) -> str:
        seeds = f" x {row.seeds} seeds" if row.seeds > 1 else ""
        clean = "" if row.clean_problems in (None, row.problems) else f" ({row.clean_problems} clean)"
        return f"{row.problems} x {row.samples}{seeds}{clean}"

    found = {name: {count(row): None for row in rows if row.keys[column] == name and row.problems} for name in columns}
    if not any(found.values()):
        return []
    return [_line([""] * len(keys), "n", [" / ".join(found[name]) for name in columns], str)]


def _differences(item: str, title: str, found: list[Difference]) -> Section:
    """PTE minus the others: the paper's, and ours with its error. Columns are those of the scores."""
    layout = LAYOUTS[item]
    columns = list(dict.fromkeys(one.keys[layout.column] for one in found))
    keys = tuple(key for key in layout.line if key != "method")

    def ours(one: Difference) -> str:
        error = "" if one.se is None else f" ±{number(one.se)}" if one.se else " (no problem differs)"
        short = f" ({one.parts[0]} of {one.parts[1]})" if one.parts and 0 < one.parts[0] < one.parts[1] else ""
        return "-" if one.ours is None else f"{signed(one.ours)}{error}{short}"

    def paper(one: Difference) -> str:
        return "-" if one.paper is None else signed(one.paper)

    lines = []
    by_line: dict[tuple, dict[str, Difference]] = {}
    for one in found:
        name = (one.other, *(one.keys[key] for key in keys))
        by_line.setdefault(name, {})[one.keys[layout.column]] = one
    for name, cells in sorted(by_line.items(), key=lambda pair: OTHERS.index(pair[0][0])):
        if all(one.ours is None for one in cells.values()):
            continue
        names = [f"PTE - {label(name[0])}", *map(label, name[1:])]
        values = [cells.get(column) for column in columns]
        lines += [_line(names, "paper", values, paper), _line([""] * len(names), "ours", values, ours)]
    header = ["method", *("length" if key == "generation_length" else key for key in keys), ""]
    title = ", ".join(filter(None, [title, "PTE minus the others, paired by problem"]))
    return Section(title, header + [label(column) for column in columns], lines)


def markdown(item: str, rows: list[Row], stand_in: dict, deviations: list[str] = ()) -> str:
    """The whole table as Markdown that also reads in a terminal.

    Args:
        deviations: from the paper, to be listed below the table.
    """
    head, *rest = caption(item, rows, stand_in)
    out = [f"## {LAYOUTS[item].title}", "", f"**{head}**" if stand_in else head, *(f"\n{line}" for line in rest), ""]
    for section in sections(item, rows):
        out += [f"### {section.title}", ""] if section.title else []
        out += [table(section.header, section.lines, padded=True), ""]
    notes = [f"[{n}] {text}" for n, text in enumerate(footnotes(rows), 1)]
    for heading, texts in lists(deviations, notes, numbers.general_slips(item)):
        out += [f"{heading}:", "", *(f"- {text}" for text in texts), ""]
    return "\n".join(out).rstrip() + "\n"


def lists(deviations: Iterable[str], slips: list[str], general: list[str]) -> list[tuple[str, list[str]]]:
    """What stands below a table: heading and lines, of each list that has any."""
    found = {"Deviations from the paper": [*deviations], "Slips of the paper": slips}
    found["About the paper's numbers"] = general
    return [(heading, texts) for heading, texts in found.items() if texts]


# `metric` is a key column of two tables already, and there names the column rather than what is measured.
NUMBERS = (
    *("paper", "ours", "difference", "se", "low", "high", "problems", "samples", "seeds", "clean", "clean_problems"),
    *("by_formula", "at", "memory_of", "folder"),
)


def write_csv(path: Path, item: str, rows: list[Row]) -> None:
    """One line per cell: its keys, then paper, ours, difference, and what they rest on; empty where there is none.

    PTE's lines have its paired differences to the other methods as well, `minus_METHOD` and their errors.
    """
    pairs = {(tuple(one.keys.items()), one.other): one for one in differences(rows)}
    others = [other for other in OTHERS if any(other == name for _, name in pairs)]
    minus = [name for other in others for name in (f"minus_{other}", f"minus_{other}_se")]
    columns = [*numbers.KEYS[item], "measure", *NUMBERS, *minus, "slips"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            plain = {name: getattr(row, name) for name in NUMBERS}
            for other in others:
                if one := pairs.get((tuple(row.keys.items()), other)):
                    plain |= {f"minus_{other}": one.ours, f"minus_{other}_se": one.se}
            writer.writerow({**row.keys, "measure": row.metric, **plain, "slips": " | ".join(row.slips)})
