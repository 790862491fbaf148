"""Records: one JSON line per sample, appended as it is produced; what is on disk is never produced again.

While an evaluation runs, every process appends to a part of its own (`part-RANK.jsonl`). At the end the main process
merges them, in the order of the problems, into `records.jsonl`, which is complete or not there. Rows hold no time, no
rank and no machine, so one process and two write the same file; those stand in `manifest.json`.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path

COMPLETE = "records.jsonl"


def read_records(folder: str | Path) -> list[dict]:
    """The records of a finished evaluation.

    Raises:
        FileNotFoundError: it is not finished, or not there.
    """
    path = Path(folder) / COMPLETE
    if not path.is_file():
        parts = len(list(Path(folder).glob("part-*.jsonl")))
        raise FileNotFoundError(f"{path}: no finished evaluation there ({parts} parts of an unfinished one)")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_records(folder: str | Path, rows: Iterable[dict]) -> Path:
    """records.jsonl, written aside and renamed, so that a kill leaves the old file or the new one."""
    path = Path(folder) / COMPLETE
    aside = path.with_suffix(".tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.writelines(line(row) for row in rows)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    return path


def line(row: dict) -> str:
    # Lone surrogates, which a cut byte sequence can leave in a completion, survive as escapes.
    return json.dumps(row, ensure_ascii=True) + "\n"


class Parts:
    """The unfinished records of a folder."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def read(self) -> list[dict]:
        """All rows so far. A last line cut by a kill is taken off its file; call it on one process only."""
        rows = []
        for path in sorted(self.folder.glob("part-*.jsonl")):
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):
                with path.open("rb+") as file:
                    file.truncate(len(whole))
            rows += [json.loads(row) for row in whole.splitlines()]
        return rows

    def append(self, rank: int, rows: list[dict]) -> None:
        """Adds rows to this process's part; they are on the disk when this returns."""
        with (self.folder / f"part-{rank}.jsonl").open("a", encoding="utf-8") as file:
            file.write("".join(map(line, rows)))
            file.flush()
            os.fsync(file.fileno())

    def merge(self, order: list[tuple[str, int]]) -> list[dict]:
        """All parts as records.jsonl, in the order of (problem_id, sample); the parts are removed.

        Raises:
            RuntimeError: a sample is missing or there twice.
        """
        rows = self.read()
        by_key = {(row["problem_id"], row["sample"]): row for row in rows}
        if len(by_key) != len(rows) or set(by_key) != set(order):
            raise RuntimeError(
                f"{self.folder}: {len(rows)} rows of {len(by_key)} samples, {len(order)} were expected; "
                f"missing: {sorted(set(order) - set(by_key))[:3]}, unexpected: {sorted(set(by_key) - set(order))[:3]}"
            )
        write_records(self.folder, [by_key[key] for key in order])
        for path in self.folder.glob("part-*.jsonl"):
            path.unlink()
        return [by_key[key] for key in order]
