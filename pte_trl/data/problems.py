"""Datasets -> prompts for TRL's GRPOTrainer.

    problems = load_problems("gsm8k_train")                         # from the Hugging Face hub
    problems = load_problems("gsm8k_train", data_dir="my_folder")   # from my_folder/gsm8k_train.jsonl, .csv, ...
    problems = load_problems("org/set", problem_column="question", answer_column="gold", split="train")
    prompts = build_prompts(problems, tokenizer, max_prompt_tokens=1024)

A local file (`files.py`) has the columns problem, answer and, if wished, id; what is in others does not matter.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from datasets import Dataset, Features, Value, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from pte_trl.data.files import ALLOWED, ENDINGS, ending, names_of, open_table, tables_in
from pte_trl.data.prompts import build_prompts
from pte_trl.data.sources import BENCHMARKS, DATASETS, Source, plain
from pte_trl.models.hub import HubName, is_local, reachable

__all__ = ["BENCHMARKS", "DATASETS", "build_prompts", "load_problems"]

# What the columns of a dataset hold: the names of all, and each row with its place, for errors.
Rows = tuple[list[str], Iterator[tuple[str, dict[str, Any]]]]


def load_problems(
    name: str,
    *,
    data_dir: str | Path | None = None,
    config: str | None = None,
    split: str | None = None,
    problem_column: str | None = None,
    answer_column: str | None = None,
    limit: int | None = None,
    keep: Sequence[str] = (),
    key: str = "dataset_name",
) -> Dataset:
    """Problems with their gold answers.

    Args:
        name: a key of `DATASETS`, a file (.jsonl, .json, .csv, .tsv, .parquet), a folder that holds exactly one, or
            OWNER/NAME on the hub. A local file of that name comes first.
        data_dir: folder of NAME.jsonl files, or of the other kinds, read instead of the hub.
        config, split: of the hub's dataset; the split is "train" unless `DATASETS` says otherwise.
        problem_column, answer_column: taken as they are; "problem" and "answer" unless `DATASETS` says otherwise.
        limit: only the first so many problems.
        keep: other columns to read; they must be there, and hold text or numbers.
        key: the setting that gave `name`, for errors.

    Returns:
        Columns id, problem, answer and those of `keep`, all str.

    Raises:
        ValueError: unknown name, column or setting, a row that cannot be read, a problem or an answer that is empty
            or says nothing ("nan", "None"): names file and line.
        FileNotFoundError: no such file, or no such dataset on the hub.
        PermissionError: a dataset on the hub that needs a login.
        ConnectionError: the hub cannot be reached; that takes `hub.LIMIT` seconds.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: must be at least 1")
    path = local_file(name, data_dir, key)
    if path and (config or split):
        raise ValueError(f"config={config!r}, split={split!r}: only for the hub, and {path} is a local file")
    source = Source(hub_id="") if path else hub_source(name, config, split, key)
    if problem_column:
        source = replace(source, problem_column=problem_column, read_problem=plain)
    if answer_column:
        source = replace(source, answer_column=answer_column, read_answer=plain)
    wanted = [source.id_column, source.problem_column, source.answer_column, *keep]
    columns, rows = file_rows(path, wanted) if path else hub_rows(name, source, wanted, key)
    asked = {"problem_column": source.problem_column, "answer_column": source.answer_column}
    for setting, column in [*asked.items(), *(("column", column) for column in keep)]:
        if column not in columns:
            raise ValueError(f"{path or name}: no {setting}={column!r}; columns there: {listed(columns)}")
    return read_problems(path.name[: -len(ending(path))] if path else name, source, rows, limit, keep)


def local_file(name: str, data_dir: str | Path | None, key: str = "dataset_name") -> Path | None:
    """The file that `name` and `data_dir` mean, None if they mean the hub.

    Raises:
        ValueError: a file of another kind, a folder with none or several, several files of one name.
        FileNotFoundError: a path or a file's name, and nothing there.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if not ending(path):
            raise ValueError(f"{key}={name!r}: the name of a file of problems must end in {ALLOWED}")
        return path
    # A known name is never taken for a folder that happens to be called so.
    if name not in DATASETS and path.is_dir():
        files = tables_in(path)
        if len(files) != 1:
            raise ValueError(f"{key}={name!r}: must hold exactly one file of {ALLOWED}, holds {names_of(files)}")
        return files[0]
    if ending(name):
        raise FileNotFoundError(f"{path}: no such file; other files there: {names_of(tables_in(path.parent))}")
    if data_dir is None:
        return None
    folder = Path(data_dir).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"data_dir={str(data_dir)!r}: no such folder")
    files = [folder / f"{path.name}{known}" for known in ENDINGS if (folder / f"{path.name}{known}").is_file()]
    if not files:
        raise FileNotFoundError(
            f"{folder / path.name}.jsonl: no such file, nor one of the other kinds ({ALLOWED}); "
            f"other files there: {names_of(tables_in(folder))}"
        )
    if len(files) > 1:
        raise ValueError(f"data_dir={str(data_dir)!r}: holds {names_of(files)}; keep one of them")
    return files[0]


def listed(columns: Sequence[str]) -> str:
    """Names for an error; half a surrogate pair could not be printed."""
    return ", ".join(columns).encode("utf-8", "backslashreplace").decode()


def file_rows(path: Path, wanted: list[str]) -> Rows:
    table = open_table(path, wanted)
    return table.columns, zip(table.places, table.rows, strict=True)


def hub_source(name: str, config: str | None, split: str | None, key: str) -> Source:
    """Where a dataset lies on the hub; `config` and `split` go before those of `DATASETS`."""
    if name not in DATASETS and "/" not in name:
        known = ", ".join(DATASETS)
        raise ValueError(
            f"{key}={name!r}: no such file or folder, and not OWNER/NAME on the hub; known names: {known}"
        )
    source = DATASETS.get(name, Source(hub_id=name))
    return replace(source, config=config or source.config, split=split or source.split)


def hub_name(name: str, key: str) -> HubName:
    """What `hub.reachable` is asked for a dataset."""
    source = DATASETS.get(name, Source(hub_id=name))
    advice = f"data_dir to a folder with {Path(name).name}.jsonl (problem and answer, an object a line)"
    if key == "decontaminate":
        return HubName(source.hub_id, "dataset", f"{key}=true, {name}", f"{advice}, or decontaminate: false")
    return HubName(source.hub_id, "dataset", f"{key}={name!r}", advice)


def hub_rows(name: str, source: Source, wanted: list[str], key: str) -> Rows:
    """A dataset of the hub, or of a folder of the same name here, which `load_dataset` prefers."""
    hub = hub_name(name, key)
    if not is_local(source.hub_id, key):
        reachable(hub)
    try:
        dataset = load_dataset(source.hub_id, source.config, split=source.split)
    except DatasetNotFoundError as error:
        raise FileNotFoundError(hub.missing()) from error
    except (ConnectionError, httpx.HTTPError) as error:
        raise ConnectionError(hub.unreachable(str(error))) from error
    except DatasetGenerationError as error:
        why = " ".join(str(error.__cause__ or error).split())[:300]
        raise ValueError(f"{key}={name!r}: its files are not one table ({why}); set {hub.advice}") from error
    except FileNotFoundError as error:  # datasets' own for a repository without data
        raise FileNotFoundError(f"{key}={name!r}: {error}") from error
    if not len(dataset):
        raise ValueError(f"{key}={name!r}: holds no rows")
    read = dataset.select_columns([column for column in dict.fromkeys(wanted) if column in dataset.column_names])
    return dataset.column_names, ((f"{name} on the hub, row {index}", row) for index, row in enumerate(read))


def read_problems(
    name: str, source: Source, rows: Iterator[tuple[str, dict]], limit: int | None, keep: Sequence[str]
) -> Dataset:
    """The columns that were asked for as text, row by row."""
    columns: dict[str, list[str]] = {column: [] for column in ("id", "problem", "answer", *keep)}
    seen = set()
    for index, (place, row) in enumerate(rows):
        problem = read_cell(row, source.problem_column, source.read_problem, place)
        if source.unique and problem in seen:
            continue
        seen.add(problem)
        columns["problem"].append(problem)
        columns["answer"].append(read_cell(row, source.answer_column, source.read_answer, place))
        own = row.get(source.id_column)
        columns["id"].append(
            f"{name}/{index}" if own is None or own == "" else read_cell(row, source.id_column, plain, place)
        )
        for column in keep:
            columns[column].append(read_cell(row, column, plain, place))
        if len(seen) == limit or (not source.unique and index + 1 == limit):
            break
    return Dataset.from_dict(columns, features=Features(dict.fromkeys(columns, Value("string"))))


def read_cell(row: dict, column: str, read: Callable[[Any], str], place: str) -> str:
    """The text of a cell; one that says nothing is an error."""
    value = row.get(column)
    try:
        text = "" if value is None else plain(read(value))
    except ValueError as error:
        raise ValueError(f"{place}: {column}: {error}") from error
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"{place}: {column}: {str(value)[:80]!r} is not laid out as on the hub") from error
    if not text:
        raise ValueError(f"{place}: {column} is empty: {str(value)[-80:]!r} holds nothing to read")
    return text
