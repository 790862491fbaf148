"""Files of problems -> rows: JSON lines, JSON, CSV, TSV and Parquet, by the ending of their names.

    table = open_table(Path("problems.csv"), ["problem", "answer"])

Only the wanted columns are kept, with the values as they were written: other columns are not read.
Every row knows its line, or its number, for errors.
"""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
ENDINGS = (*FORMATS, *(f"{ending}.gz" for ending in FORMATS if ending != ".parquet"))
ALLOWED = ", ".join(FORMATS) + " (all but .parquet also followed by .gz)"

MAX_CELL = 2**31 - 1  # characters of a CSV cell; the csv module's own limit is 131,072

# Longest first: UTF-32's mark in little-endian order begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_ENCODINGS = "allowed are UTF-8, and UTF-16 or UTF-32 with a byte order mark"


class Number(str):
    """A JSON number as it was written; 0.10 stays 0.10, and no digit is lost."""


class NotANumber(str):
    """NaN, Infinity or -Infinity, which Python's json writes and reads though JSON has no such value."""


class Row(dict):
    """A JSON object; `repeated` are the keys that occurred in it more than once."""

    repeated: frozenset[str] = frozenset()


@dataclass
class Table:
    """The wanted columns of a file.

    Args:
        name: the file's, without its ending.
        columns: the names of all columns, wanted or not, in their order.
        rows: column -> value, of the wanted columns; a row may lack some.
        places: where each row is, "FILE, line 3".
    """

    name: str
    columns: list[str]
    rows: list[dict[str, Any]]
    places: list[str]


def ending(path: str | Path) -> str:
    """The known ending of a file's name, "" if it has none: problems.jsonl.gz -> .jsonl.gz."""
    name = str(path).lower()
    return next((known for known in sorted(ENDINGS, key=len, reverse=True) if name.endswith(known)), "")


def stem(path: Path) -> str:
    """A file's name without its known ending."""
    return path.name[: len(path.name) - len(ending(path))] or path.name


def tables_in(folder: Path) -> list[Path]:
    """The files of a folder with a known ending."""
    return sorted(path for path in folder.glob("*") if ending(path) and path.is_file())


def names_of(paths: Iterable[Path]) -> str:
    return ", ".join(path.name for path in paths) or "none"


def open_table(path: Path, wanted: Iterable[str]) -> Table:
    """The wanted columns of a file; a column that is not there is missing from `columns`.

    Raises:
        ValueError: an unknown ending, no rows, or a place that cannot be read: names file and line or row.
        OSError: the file cannot be opened.
    """
    kind, wanted = ending(path).removesuffix(".gz"), list(dict.fromkeys(wanted))
    if not kind:
        raise ValueError(f"{path}: the name must end in {ALLOWED}")
    if kind == ".parquet":
        return read_parquet(path, wanted)
    text = read_text(path)
    read: Callable = {".jsonl": read_lines, ".json": read_json, ".csv": read_csv, ".tsv": read_tsv}[kind]
    columns: dict[str, None] = {}
    rows, places = [], []
    for place, row in read(path, text):
        columns.update(dict.fromkeys(row))
        for column in wanted:
            if column in getattr(row, "repeated", ()):
                raise ValueError(f"{place}: {column} occurs in it more than once")
        rows.append({column: row[column] for column in wanted if column in row})
        places.append(place)
    if not rows:
        raise ValueError(f"{path}: holds no rows")
    return Table(stem(path), list(columns), rows, places)


def read_text(path: Path) -> str:
    """The text of a file, packed or not, by its byte order mark; without one it must be UTF-8.

    Raises:
        ValueError: another encoding, or a damaged .gz file.
    """
    data = path.read_bytes()
    if path.name.lower().endswith(".gz"):
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path}: not a complete .gz file ({error})") from error
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    if encoding.startswith("utf-8") and b"\0" in data:
        line = data[: data.index(b"\0")].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: holds a zero byte, as UTF-16 without its mark does; {_ENCODINGS}")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].decode(encoding, "replace").count("\n") + 1
        shown = data[error.start : error.start + 1].hex()
        raise ValueError(f"{path}, line {line}: not {encoding.upper()} (byte 0x{shown}); {_ENCODINGS}") from error


# ---- JSON ------------------------------------------------------------------------------------------------------


def _row(pairs: list[tuple[str, Any]]) -> Row:
    row = Row(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        row.repeated = frozenset(key for key in row if keys.count(key) > 1)
    return row


def _whole(text: str) -> int | Number:
    return int(text) if len(text) < 19 else Number(text)  # Python refuses to read an int of 5,000 digits


_DECODER = json.JSONDecoder(object_pairs_hook=_row, parse_int=_whole, parse_float=Number, parse_constant=NotANumber)


def decode(text: str, place: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none.
    """
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error})") from error
    except RecursionError as error:
        raise ValueError(f"{place}: not JSON that can be read (nested too deeply)") from error


def _as_row(value: Any, place: str, hint: str = "") -> Row:
    if not isinstance(value, Row):
        raise ValueError(f"{place}: must be a JSON object, is a {type(value).__name__}{hint}")
    return value


def read_lines(path: Path, text: str) -> Iterator[tuple[str, Row]]:
    """One object a line; blank lines are skipped. Lines end in LF, CR LF or CR, which no JSON string can hold."""
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text), 1):
        if line.strip():
            place = f"{path}, line {number}"
            hint = "; an array of objects belongs in a .json file" if line.lstrip().startswith("[") else ""
            yield place, _as_row(decode(line, place), place, hint)


def read_json(path: Path, text: str) -> Iterator[tuple[str, Row]]:
    """An array of objects, or one object a line."""
    if not text.lstrip().startswith("["):
        try:
            yield from read_lines(path, text)
        except ValueError as error:
            raise ValueError(f"{error}; a .json file holds an array of objects, or one object a line") from error
        return
    for number, value in enumerate(decode(text.strip(), str(path))):
        place = f"{path}, row {number}"
        yield place, _as_row(value, place)


# ---- CSV -------------------------------------------------------------------------------------------------------


def read_tsv(path: Path, text: str) -> Iterator[tuple[str, Row]]:
    return read_csv(path, text, delimiter="\t")


def read_csv(path: Path, text: str, delimiter: str = ",") -> Iterator[tuple[str, Row]]:
    """Rows under a header; all cells are text, and a cell in quotes may hold line ends."""
    csv.field_size_limit(MAX_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header, line = None, 0
    while True:
        line = reader.line_num + 1
        place = f"{path}, line {line}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{place}: not {ending(path).removesuffix('.gz')[1:].upper()} ({error})") from error
        if cells is None:
            return
        if not cells:  # a blank line
            continue
        if header is None:
            header = [name.strip() for name in cells]
        elif len(cells) != len(header):
            raise ValueError(
                f"{place}: has {len(cells)} cells where the header has {len(header)}; "
                "a cell with a comma, a tab or a line end needs quotes around it"
            )
        else:
            yield place, _row(list(zip(header, cells, strict=True)))


# ---- Parquet ---------------------------------------------------------------------------------------------------


def read_parquet(path: Path, wanted: list[str]) -> Table:
    """The wanted columns; of the others not a byte is read."""
    try:
        file = pq.ParquetFile(path)
        columns = file.schema_arrow.names
        for column in wanted:
            if columns.count(column) > 1:
                raise ValueError(f"{path}: column {column} is there more than once")
        rows = file.read(columns=[column for column in wanted if column in columns]).to_pylist()
        count = file.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError)):
            raise
        raise ValueError(f"{path}: not a Parquet file that can be read ({error})") from error
    if not count:
        raise ValueError(f"{path}: holds no rows")
    return Table(
        stem(path), list(columns), rows or [{} for _ in range(count)], [f"{path}, row {n}" for n in range(count)]
    )
