"""Packages that not everyone needs: which extra installs each, and a sentence where one is missing."""

from importlib.util import find_spec

# Module -> the extra in pyproject.toml that installs it.
EXTRAS = {
    "deepspeed": "deepspeed",
    "vllm": "vllm",
    "gguf": "gguf",
    "matplotlib": "plots",
    "trackio": "tracking",
}


def check_extra(module: str, purpose: str) -> None:
    """Refuses what needs a package that is not installed, before anything is loaded.

    Args:
        module: a key of `EXTRAS`.
        purpose: the setting or command that needs it; the sentence begins with it.

    Raises:
        ValueError: naming the extra to install.
    """
    if find_spec(module) is None:
        raise ValueError(f"{purpose}: {module} is not installed; pip install 'pte_trl[{EXTRAS[module]}]'")
