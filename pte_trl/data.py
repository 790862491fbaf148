"""Datasets -> prompts for TRL's GRPOTrainer.

    problems = load_problems("gsm8k_train")                         # from the Hugging Face hub
    problems = load_problems("gsm8k_train", data_dir="my_folder")   # from my_folder/gsm8k_train.jsonl
    problems = load_problems("org/set", problem_column="question", answer_column="gold", split="train")
    prompts = build_prompts(problems, tokenizer, max_prompt_tokens=1024)

A local file holds one JSON object a line with the keys problem, answer and, if wished, id and others.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetNotFoundError
from transformers import PreTrainedTokenizerBase

from .sources import BENCHMARKS, DATASETS, Source, plain

__all__ = ["BENCHMARKS", "DATASETS", "build_prompts", "load_problems"]


@dataclass
class Table:
    """Rows as they were found, before any column is read; `place(i)` says in an error where row i stands."""

    name: str
    source: Source
    rows: Dataset | list[dict]
    columns: list[str]
    place: Callable[[int], str]


def load_problems(
    name: str,
    *,
    data_dir: str | Path | None = None,
    config: str | None = None,
    split: str | None = None,
    problem_column: str | None = None,
    answer_column: str | None = None,
    limit: int | None = None,
) -> Dataset:
    """Problems with their gold answers.

    Args:
        name: a key of `DATASETS`, a .jsonl file, a folder that holds exactly one, or OWNER/NAME on the hub.
        data_dir: folder of NAME.jsonl files, read instead of the hub.
        config, split: of the hub's dataset; the split is "train" unless `DATASETS` says otherwise.
        problem_column, answer_column: taken as they are; "problem" and "answer" unless `DATASETS` says otherwise.
        limit: only the first so many problems.

    Returns:
        Columns id, problem and answer (all str), then the dataset's others.

    Raises:
        ValueError: unknown name, column or setting, a line that is no JSON object, an empty problem or answer.
        FileNotFoundError: no such file, or no such dataset on the hub.
        ConnectionError: the hub cannot be reached. It is tried for half a minute; HF_HUB_OFFLINE=1 spares that.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: must be at least 1")
    path = local_file(name, data_dir)
    table = open_hub(name, config, split) if path is None else open_jsonl(path)
    if path and (config or split):
        raise ValueError(f"config={config!r}, split={split!r}: only for the hub, and {path} is a local file")
    if not len(table.rows):
        raise ValueError(f"{path or name}: holds no rows")
    source = table.source
    if problem_column:
        source = replace(source, problem_column=problem_column, read_problem=plain)
    if answer_column:
        source = replace(source, answer_column=answer_column, read_answer=plain)
    for key in ("problem_column", "answer_column"):
        if getattr(source, key) not in table.columns:
            columns = ", ".join(table.columns)
            raise ValueError(f"{table.name}: no {key}={getattr(source, key)!r}; columns there: {columns}")
    return read_problems(table, source, limit)


def local_file(name: str, data_dir: str | Path | None) -> Path | None:
    """The .jsonl file that `name` and `data_dir` mean, None if they mean the hub."""
    path = Path(name)
    if path.suffix != ".jsonl":
        # A known name is never taken for a folder that happens to be called so.
        if name not in DATASETS and path.is_dir():
            files = sorted(path.glob("*.jsonl"))
            if len(files) != 1:
                raise ValueError(f"{path}: must hold exactly one .jsonl file, holds {jsonl_files(path)}")
            return files[0]
        if data_dir is None:
            return None
        path = Path(data_dir) / f"{path.name}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; .jsonl files beside it: {jsonl_files(path.parent)}")
    return path


def jsonl_files(folder: Path) -> str:
    return ", ".join(sorted(file.name for file in folder.glob("*.jsonl"))) or "none"


def open_jsonl(path: Path) -> Table:
    """A file of JSON objects, one a line; blank lines are skipped."""
    rows, places = [], []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            places.append(f"{path}, line {number}")
            try:
                rows.append(json.loads(line.decode("utf-8")))
            except json.JSONDecodeError as error:
                raise ValueError(f"{places[-1]}: not JSON ({error})") from error
            except UnicodeDecodeError as error:
                raise ValueError(f"{places[-1]}: not UTF-8 ({error})") from error
            if not isinstance(rows[-1], dict):
                raise ValueError(f"{places[-1]}: must be a JSON object, is a {type(rows[-1]).__name__}")
    columns = list(dict.fromkeys(key for row in rows for key in row))  # a row may lack what others have
    return Table(path.stem, Source(hub_id=""), rows, columns, places.__getitem__)


def open_hub(name: str, config: str | None, split: str | None) -> Table:
    """A dataset of the hub; `config` and `split` go before those of `DATASETS`."""
    if name not in DATASETS and "/" not in name:
        known = ", ".join(DATASETS)
        raise ValueError(f"{name!r}: no such file or folder, and not OWNER/NAME on the hub; known names: {known}")
    source = DATASETS.get(name, Source(hub_id=name))
    source = replace(source, config=config or source.config, split=split or source.split)
    advice = f"give data_dir, a folder with a file {Path(name).name}.jsonl of problem and answer, an object a line"
    try:
        rows = load_dataset(source.hub_id, source.config, split=source.split)
    except DatasetNotFoundError as error:
        raise FileNotFoundError(f"{source.hub_id}: not on the Hugging Face hub, or not public; {advice}") from error
    except ConnectionError as error:
        raise ConnectionError(f"{source.hub_id}: the Hugging Face hub cannot be reached; {advice}") from error
    return Table(name, source, rows, rows.column_names, lambda row: f"{name} on the hub, row {row}")


def read_problems(table: Table, source: Source, limit: int | None) -> Dataset:
    """id, problem and answer of a table's rows as text, and its other columns beside them."""
    read = [c for c in (source.id_column, source.problem_column, source.answer_column) if c in table.columns]
    on_hub = isinstance(table.rows, Dataset)
    kept, core, seen = [], [], set()
    for index, row in enumerate(table.rows.select_columns(read) if on_hub else table.rows):
        problem = read_cell(row, source.problem_column, source.read_problem, table.place(index))
        if source.unique and problem in seen:
            continue
        seen.add(problem)
        answer = read_cell(row, source.answer_column, source.read_answer, table.place(index))
        name = row.get(source.id_column)
        kept.append(index)
        core.append(
            {"id": f"{table.name}/{index}" if name is None else str(name), "problem": problem, "answer": answer}
        )
        if len(core) == limit:
            break
    others = [column for column in table.columns if column not in {*read, "id", "problem", "answer"}]
    if not others:
        return Dataset.from_list(core)
    if on_hub:
        beside = table.rows.select_columns(others).select(kept)
    else:
        beside = Dataset.from_dict({c: [table.rows[index].get(c) for index in kept] for c in others})
    return concatenate_datasets([Dataset.from_list(core), beside], axis=1)


def read_cell(row: dict, column: str, read: Callable[[Any], str], place: str) -> str:
    """The text of a problem or an answer; an empty one is an error."""
    value = row.get(column)
    try:
        text = "" if value is None else read(value)
    except ValueError as error:
        raise ValueError(f"{place}: {column}: {error}") from error
    if not text:
        raise ValueError(f"{place}: {column} is empty: {str(value)[-80:]!r} holds nothing to read")
    return text


def build_prompts(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    system_prompt: str | None = None,
    max_prompt_tokens: int | None = None,
    num_proc: int | None = None,
    chat_template_kwargs: dict | None = None,
) -> Dataset:
    """Prompts as GRPOTrainer takes them.

    Args:
        dataset: columns id, problem, answer.
        tokenizer: with a chat template the prompts are conversations, without one plain text.
        system_prompt: a system message, or the first line of the plain text.
        max_prompt_tokens: longer prompts are dropped, and their number is printed. Counted as GRPOTrainer feeds
            them: the whole template, with the header of the answer to come (`_tokenize_prompts`, trl 1.16).
        num_proc: processes to tokenize in; a fast tokenizer needs none.
        chat_template_kwargs: those of the GRPOConfig, where there are any, since they change the count.

    Returns:
        Columns id, answer and prompt: [{"role": ..., "content": ...}, ...] or str.

    Raises:
        ValueError: a limit below 1, or one that no prompt meets.
    """
    if max_prompt_tokens is not None and max_prompt_tokens < 1:
        raise ValueError(f"max_prompt_tokens={max_prompt_tokens}: must be at least 1")

    def add_prompts(batch: dict[str, list]) -> dict[str, list]:
        return {"prompt": [make_prompt(problem, system_prompt, chat=chat) for problem in batch["problem"]]}

    def add_lengths(batch: dict[str, list]) -> dict[str, list]:
        if chat:
            options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
            tokens = tokenizer.apply_chat_template(batch["prompt"], **options, **(chat_template_kwargs or {}))
        else:
            tokens = tokenizer(text=batch["prompt"])
        return {"length": [len(ids) for ids in tokens["input_ids"]]}

    chat = tokenizer.chat_template is not None
    prompts = dataset.select_columns(["id", "answer", "problem"]).map(
        add_prompts, batched=True, remove_columns="problem"
    )
    if max_prompt_tokens is None:
        return prompts
    lengths = prompts.map(add_lengths, batched=True, num_proc=num_proc, remove_columns=prompts.column_names)["length"]
    return drop_long(prompts, list(lengths), max_prompt_tokens)


def make_prompt(problem: str, system_prompt: str | None, *, chat: bool) -> str | list[dict[str, str]]:
    if not chat:
        return f"{system_prompt}\n{problem}" if system_prompt else problem
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": problem}]


def drop_long(prompts: Dataset, lengths: list[int], limit: int) -> Dataset:
    """The prompts of at most `limit` tokens; says how many there were beyond."""
    kept = [index for index, length in enumerate(lengths) if length <= limit]
    count = f"{len(lengths) - len(kept)} of {len(lengths)} prompts have more than max_prompt_tokens={limit} tokens"
    if not kept:
        raise ValueError(f"{count} and none is left: the shortest has {min(lengths)}")
    PartialState().print(f"{count} and are dropped; the longest has {max(lengths)}", flush=True)
    return prompts.select(kept)


def tokens_of(prompt: str | list[dict], tokenizer: PreTrainedTokenizerBase, template: dict | None = None) -> list[int]:
    """As TRL tokenizes prompts (`_tokenize_prompts`, trl 1.16)."""
    if isinstance(prompt, str):
        return tokenizer(text=prompt)["input_ids"]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True} | (template or {})
    return tokenizer.apply_chat_template(prompt, **options)["input_ids"]
