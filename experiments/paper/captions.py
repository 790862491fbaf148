"""What a reader must know before the numbers: whose they are, what is missing, what they rest on."""

from experiments.paper.layout import LAYOUTS, groups, label, title_of
from experiments.paper.results import Row, missing

NAMED = 8  # missing lines that are named one by one; the CSV has all


def caption(item: str, rows: list[Row], stand_in: dict, absence: str = "marked -") -> list[str]:
    """A sentence or two each; with a stand-in that comes first."""
    out = [not_the_papers(stand_in)] if stand_in else []
    absent, total = len(missing(rows)), f"of {len(rows)} numbers of ours"
    if absent:
        names = missing_names(item, rows)
        more = f", and {len(names) - NAMED} more lines" if len(names) > NAMED else ""
        out.append(f"Missing: {absent} {total}, {absence}: {'; '.join(names[:NAMED])}{more}.")
    else:
        out.append(f"Missing: none {total}.")
    if partial := [row for row in rows if row.ours is not None and 0 < row.seeds < row.planned]:
        counts = sorted({(row.seeds, row.planned) for row in partial})
        text = ", ".join(f"{seeds} of {planned}" for seeds, planned in counts)
        out.append(f"Seeds: {len(partial)} numbers are means of {text} trainings, the others are not there yet.")
    out += _what_they_rest_on(rows)
    if memory := sorted({row.memory_of for row in rows if row.memory_of}):
        out.append(f"Memory of ours: {'; '.join(memory)}.")
    return out


def not_the_papers(stand_in: dict) -> str:
    return f"NOT THE PAPER'S MODELS: ours is {stand_in['model']}. {stand_in.get('note', '')}".strip()


def missing_names(item: str, rows: list[Row]) -> list[str]:
    """The missing numbers line by line: "PTE (all)", or "PTE (AMC23, AIME24 @16)"; a section that is empty is one.

    An average is named only where all of its scores are there.
    """
    layout, out = LAYOUTS[item], []
    for section, within in groups(rows, layout.section).items():
        lines = groups(within, layout.line)
        if not any(row.ours is not None for row in within):
            out.append(f"{title_of(section)} (all)" if section else "all")
            continue
        for line, members in lines.items():
            gone = missing(members)
            if not gone:
                continue
            scores = [row for row in gone if row.metric != "avg"] or gone
            columns = ", ".join(label(row.keys[layout.column]) for row in scores)
            what = "all" if len(gone) == len(members) else columns
            name = title_of(part for part in (*section, *line) if part)
            out.append(f"{name} ({what})" if name else what)
    return out


def _what_they_rest_on(rows: list[Row]) -> list[str]:
    counts = sorted({(row.problems, row.samples, row.seeds) for row in rows if row.problems})
    if not counts:
        return []
    texts = (f"{p} problems x {s} samples" + (f" x {n} seeds" if n > 1 else "") for p, s, n in counts)
    over = "problems and seeds" if any(seeds > 1 for *_, seeds in counts) else "problems"
    out = [
        f"Ours: {', '.join(texts)}; ± is the standard error over {over}; [a, b] stands for it where all or none of a "
        "benchmark are solved, a 95 % interval (Wilson) with a trial per problem."
    ]
    if any(row.clean is not None for row in rows):
        out.append("clean: without the problems that DAPO-Math-17k, the training data, repeats.")
    else:
        out.append("No clean scores: these problems have not been looked for in the training data.")
    return out
