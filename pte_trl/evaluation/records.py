"""Records: one JSON line per sample, appended as it is produced; what is on disk is never produced again.

While an evaluation runs, every process appends to a part of its own (`part-RANK.jsonl`). At the end the main process
merges them, in the order of the problems, into `records.jsonl`, which is written atomically. Records hold no time,
no rank and no machine, so one process and two write the same file; those are in `manifest.json`.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import (
    Literal,
    NotRequired,  # typing's own cannot be checked by pydantic before Python 3.12
)

from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from pte_trl.runtime.faults import Fault

COMPLETE = "records.jsonl"
SCHEMA = 1  # of the records; to be raised when a key gets another meaning


class Record(TypedDict):
    """One completion and its verdict. The settings of the evaluation are further keys.

    Keys:
        problem_id, sample: which completion of which problem; no two records share both.
        correct, reason, extracted, gold: the verdict (see `Verdict`) and what the answer was compared with.
        completion, tokens: the text, and the number of its tokens.
        completion_ids: the tokens themselves, from which `prefix.py` makes the records of a shorter run.
        finish_reason: "stop", "length", or "no_room" where the prompt fills the budget.
        evictions: how often tokens left the cache.
        contaminated, gold_note: of the problem, see `load_benchmark`.
        prompt, prompt_tokens: as the model saw it.
        sample_seed, sample_window: of this sample; the window is None with the full cache.
        schema: `SCHEMA` of the version that wrote it; 1 where it is missing.
    """

    __pydantic_config__ = ConfigDict(strict=True, extra="allow")

    problem_id: str
    sample: int
    correct: bool
    completion: str
    finish_reason: Literal["stop", "length", "no_room"]
    tokens: int
    evictions: int
    contaminated: bool
    gold: str
    # What the metrics can do without.
    gold_note: NotRequired[str | None]
    reason: NotRequired[str]
    extracted: NotRequired[str | None]
    prompt: NotRequired[str]
    prompt_tokens: NotRequired[int]
    completion_ids: NotRequired[list[int]]
    sample_seed: NotRequired[int]
    sample_window: NotRequired[int | None]
    answer_after: NotRequired[str | None]
    schema: NotRequired[int]


_RECORD = TypeAdapter(Record)


def finished_folders(above: Iterable[Path]) -> list[Path]:
    """Folders of finished evaluations, anywhere below the given ones.

    Raises:
        SystemExit: there is none.
    """
    above = list(above)
    found = sorted({path.parent for folder in above for path in folder.rglob(COMPLETE)})
    if not found:
        raise SystemExit(f"error: no {COMPLETE} below {', '.join(map(str, above))}")
    return found


def read_records(folder: str | Path) -> list[Record]:
    """The records of a finished evaluation.

    Raises:
        FileNotFoundError: it is not finished, or does not exist.
        ValueError: a line that is no record, or one of another schema, with its file and number.
    """
    path = Path(folder) / COMPLETE
    if not path.is_file():
        parts = len(list(Path(folder).glob("part-*.jsonl")))
        raise FileNotFoundError(f"{path}: no finished evaluation there ({parts} parts of an unfinished one)")
    return read_lines(path, path.read_bytes())


def read_lines(path: Path, content: bytes) -> list[Record]:
    """The records in the content of a file.

    Raises:
        ValueError: naming the line that is none, or has another schema.
    """
    remedy = "remove the line" + (", name the file part-0.jsonl" if path.name == COMPLETE else "")
    remedy += ", and the same command makes that sample anew"
    rows = []
    for number, text in enumerate(content.splitlines(), 1):
        try:
            row = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}); {remedy}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: is {json.dumps(row)[:40]} and no record; {remedy}")
        if row.setdefault("schema", 1) != SCHEMA:  # the first records had no such key
            raise ValueError(
                f"{path}, line {number}: schema={row['schema']!r}, this version of pte_trl reads {SCHEMA}; use the "
                f"version that wrote it ({row.get('pte_trl', 'unknown')}), or evaluate again into another output_dir"
            )
        try:
            _RECORD.validate_python(row)
        except ValidationError as error:
            wrong = ", ".join(dict.fromkeys(str(one["loc"][0]) for one in error.errors()))
            raise ValueError(f"{path}, line {number}: a record without a proper {wrong}; {remedy}") from error
        rows.append(row)
    return rows


@contextmanager
def on_full_disk(path: Path) -> Iterator[None]:
    """Names the file that could not be written, and says that nothing is lost."""
    try:
        yield
    except OSError as error:
        raise Fault(
            f"{path}: could not be written ({error.strerror or error}); the records that are there stay, and the same "
            "command resumes from them"
        ) from error


def write_records(folder: str | Path, rows: Iterable[Record]) -> Path:
    """records.jsonl, written aside and renamed, so that a kill leaves the old file or the new one."""
    path = Path(folder) / COMPLETE
    aside = path.with_suffix(".tmp")
    with on_full_disk(aside), aside.open("w", encoding="utf-8") as file:
        file.writelines(line(row) for row in rows)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    return path


def line(row: Record) -> str:
    # Lone surrogates, which a cut byte sequence can leave in a completion, survive as escapes.
    return json.dumps(row, ensure_ascii=True) + "\n"


class Parts:
    """The unfinished records of a folder."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def read(self) -> list[Record]:
        """All rows so far, one for each sample. A last line cut by a kill is taken off its file; on one process only.

        Raises:
            ValueError: a line that is no record, with its file.
        """
        rows = {}
        for path in sorted(self.folder.glob("part-*.jsonl")):
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):
                with path.open("rb+") as file:
                    file.truncate(len(whole))
            for row in read_lines(path, whole):
                rows.setdefault((row["problem_id"], row["sample"]), row)
        return list(rows.values())

    @contextmanager
    def writing(self, rank: int) -> Iterator[None]:
        """Held while a process appends: a second evaluation into the same folder is refused, not interleaved.

        Raises:
            ValueError: another process holds it, such as one that has survived its launcher.
        """
        with (self.folder / f".lock-{rank}").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{self.folder}: another evaluation is writing here; end it first") from None
            yield

    def append(self, rank: int, rows: list[Record]) -> None:
        """Adds rows to this process's part; they are on the disk when this returns."""
        path = self.folder / f"part-{rank}.jsonl"
        with on_full_disk(path), path.open("a", encoding="utf-8") as file:
            file.write("".join(map(line, rows)))
            file.flush()
            os.fsync(file.fileno())

    def merge(self, order: list[tuple[str, int]]) -> list[Record]:
        """All parts as records.jsonl, in the order of (problem_id, sample); the parts are removed.

        Raises:
            ValueError: a sample is missing, or one is there that does not belong here.
        """
        rows = self.read()
        by_key = {(row["problem_id"], row["sample"]): row for row in rows}
        if set(by_key) != set(order):
            raise ValueError(
                f"{self.folder}: {len(by_key)} samples, {len(order)} were expected; "
                f"missing: {sorted(set(order) - set(by_key))[:3]}, unexpected: {sorted(set(by_key) - set(order))[:3]}"
            )
        write_records(self.folder, [by_key[key] for key in order])
        for path in (*self.folder.glob("part-*.jsonl"), *self.folder.glob(".lock-*")):
            path.unlink()
        return [by_key[key] for key in order]
