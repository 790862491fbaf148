"""Results of self-tests, kept in small files beside the hub's cache, so that each is run once.

    HF_HOME/pte_trl/self_test/DIGEST.json

The digest is of the reduced configuration, which all sizes of a family share, of what was tested, of the versions of
torch and transformers, and of this package's own code. A folder that cannot be written, and a file that cannot be
read, are as if there were none.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from pte_trl.compat.hub import hub_home

ROOMS = ("adapter", "cache", "compat", "replay")  # whose code a self-test runs
# What a configuration says of a checkpoint or a length, and not of how a forward goes.
NAMES = (
    "_name_or_path",
    "architectures",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "auto_map",
    "initializer_range",
    "max_position_embeddings",
    "max_window_layers",
    "use_cache",
    "attention_dropout",
)

_found: dict[str, dict[str, Any]] = {}


def kept(config: PreTrainedConfig, tested: Any, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `run` returns, or what it returned before.

    Args:
        config: reduced (`pte_trl.adapter.small_copy.reduced`).
        tested: whatever else the result depends on, as JSON takes it.
        run: the self-test; its result is a mapping that JSON takes.
    """
    name = digest(config, tested)
    if name not in _found:
        path = folder() / f"{name}.json"
        found = _read(path)
        if found is None:
            found = run()
            _write(path, found)
        _found[name] = found
    return _found[name]


def folder() -> Path:
    return hub_home() / "pte_trl" / "self_test"


def digest(config: PreTrainedConfig, tested: Any) -> str:
    described = {key: value for key, value in config.to_dict().items() if key not in NAMES}
    versions = [version("torch"), version("transformers"), version("peft"), code()]
    text = json.dumps([type(config).__name__, described, tested, versions], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@cache
def code() -> str:
    """A digest of the code that a self-test runs: an editable installation changes it without its version."""
    found = hashlib.sha256()
    for room in ROOMS:
        for path in sorted((Path(__file__).parent.parent / room).rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "fault" in found else None


def _write(path: Path, found: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as file:
            json.dump(found, file)
        os.replace(file.name, path)  # several processes may write it at once
    except OSError:
        pass
