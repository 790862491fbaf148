"""Private names of huggingface_hub and datasets."""

from pathlib import Path

import datasets
from huggingface_hub import constants

__all__ = ["datasets_cache", "hub_home", "set_offline"]


def set_offline() -> None:
    """Both libraries read their caches from now on and ask no hub; HF_HUB_OFFLINE counts at import only."""
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True  # read again at every call


def datasets_cache() -> Path:
    """Where datasets keeps what it has made of a repository, in a folder OWNER___NAME of small letters."""
    return Path(datasets.config.HF_DATASETS_CACHE)


def hub_home() -> Path:
    """HF_HOME, or its default: where the hub's cache and token lie."""
    return Path(constants.HF_HOME)
