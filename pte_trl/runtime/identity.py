"""What decides a result, by its content: weights, tokenizer, template, adapter, data, and the versions at work.

Names and paths stay the same when what they name is changed. So hashes are in the settings of every training and in
every record of an evaluation, and a run that resumes is compared with them (`checkpoints.differences`, `Evaluation`).
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from datasets import Dataset
from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedTokenizerBase

from pte_trl.rewards.worker_pool import verdict_versions
from pte_trl.runtime.together import on_main

DIGITS = 16  # of a hash: this guards against mistakes, not against someone who looks for a collision
WEIGHTS = re.compile(r".*\.(safetensors|gguf)|(?!training_args).*\.bin|.*\.index\.json|(generation_)?config\.json")
TOKENIZER = re.compile(
    r"tokenizer.*|vocab.*|merges\.txt|special_tokens_map\.json|added_tokens\.json|.*\.(model|tiktoken)"
)
ADAPTER = re.compile(r"adapter_(config\.json|model\.safetensors)")
LIBRARIES = ("pte_trl", "torch", "transformers", "tokenizers", "trl", "peft", "accelerate")
SETTLED = 2.0  # s; a file that was written a moment ago can change again without another time stamp


def versions_of(packages: Iterable[str]) -> dict[str, str | None]:
    """Installed versions, by names that can be keys of a record; None for what is not installed."""
    found = {}
    for package in packages:
        try:
            found[package.replace("-", "_")] = version(package)
        except PackageNotFoundError:
            found[package.replace("-", "_")] = None
    return found


# ---- files -----------------------------------------------------------------------------------------------------


def cache_file() -> Path:
    """Where hashes of files are kept, so that 16 GB of weights are read once and not at every start."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pte_trl" / "sha256.json"


def read_cache() -> dict:
    try:
        return json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}


def keep_in_cache(path: str, entry: list) -> None:
    """Adds a hash; a home that cannot be written costs only the time of the next start."""
    try:
        file = cache_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps(read_cache() | {path: entry}))
        aside.replace(file)
    except OSError:
        pass


def sha256_of(path: Path) -> str:
    """The hash of a file, read from the disk."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def kept_sha256(path: Path) -> str:
    """The hash of a file, read again only where its size, times or place on the disk are others."""
    path, stat = path.resolve(), path.stat()
    stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    kept = read_cache().get(str(path))
    if kept and kept[:-1] == stamp:
        return kept[-1]
    digest = sha256_of(path)
    if time.time() - stat.st_ctime > SETTLED:
        keep_in_cache(str(path), [*stamp, digest])
    return digest


def files_hash(folder: Path, names: re.Pattern) -> str | None:
    """Over names and contents of a folder's files that match, None where there are none."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and names.fullmatch(path.name))
    return hash_of([path.name, kept_sha256(path)] for path in files) if files else None


def hash_of(parts: Iterable) -> str:
    """First digits of the hash of values that JSON can hold, one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()[:DIGITS]


# ---- what a run is made of -------------------------------------------------------------------------------------


def base_identity(name: str, commit: str | None = None) -> dict[str, str | None]:
    """base_sha256 and tokenizer_sha256 of a model: of the files of a folder, else the hub's commit that is used.

    Args:
        commit: that the model came from, where it is known; without it, the one that the cache has as main.
    """
    folder = Path(name)
    if folder.is_dir():
        return {"base_sha256": files_hash(folder, WEIGHTS), "tokenizer_sha256": files_hash(folder, TOKENIZER)}
    if commit is None:
        file = try_to_load_from_cache(name, "config.json")  # PATH/snapshots/COMMIT/config.json
        commit = Path(file).parent.name if isinstance(file, str) else None
    named = None if commit is None else f"commit {commit}"
    return {"base_sha256": named, "tokenizer_sha256": named}


def adapter_identity(folder: str | Path | None) -> str | None:
    """The hash of an adapter's weights and settings: trained again, it is another adapter in the same folder."""
    return files_hash(Path(folder), ADAPTER) if folder is not None and Path(folder).is_dir() else None


def template_identity(tokenizer: PreTrainedTokenizerBase) -> str | None:
    return hash_of([tokenizer.chat_template]) if tokenizer.chat_template is not None else None


def rows_identity(rows: Dataset) -> str:
    """The hash of rows in their order; their ids do not count, which may hold a file's name."""
    columns = sorted(column for column in rows.column_names if column != "id")
    return hash_of([columns, *rows.select_columns(columns)]) if columns else hash_of([])


def training_identity(
    script, tokenizer: PreTrainedTokenizerBase, rows: Dataset | None, commit: str | None = None
) -> dict:
    """What a training's settings record of its inputs; the main process reads the files, all get the answer.

    Args:
        script: `RecipeArguments`, model and adapter; None for one that was made in memory.
        rows: the training set as the trainer gets it, after every selection; None for a streamed one.
        commit: as in `base_identity`.
    """
    name = script.model_name_or_path
    files = on_main(
        lambda: (base_identity(name, commit) if name else {}) | {"adapter_sha256": adapter_identity(script.adapter)}
    )
    return files | {
        "template_sha256": template_identity(tokenizer),
        "data_sha256": None if rows is None else rows_identity(rows),
        "versions": versions_of(LIBRARIES) | verdict_versions(),
    }
