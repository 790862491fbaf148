"""Tables as Markdown."""

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]], padded: bool = False) -> str:
    """A table with a line per row; `padded` makes columns of one width, for a terminal."""
    lines = [list(header), *map(list, rows)]
    if padded:
        widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
        lines = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    rule = "|".join("-" * (len(cell) + 2 if padded else 3) for cell in lines[0])
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, f"|{rule}|", *body])
