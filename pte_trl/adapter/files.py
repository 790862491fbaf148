"""An adapter's folder, here or fetched from the hub."""

from pathlib import Path

from huggingface_hub import snapshot_download

from pte_trl.compat.peft import SAFETENSORS_WEIGHTS_NAME


def adapter_folder(name: str) -> Path:
    """The folder of an adapter, fetched from the hub if there is no such folder here; its weights are in safetensors.

    Raises:
        ValueError: its weights are not; a pickled file could run any code, and PEFT would load it.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        there = ", ".join(sorted(path.name for path in folder.glob("*.*"))) or "nothing"
        raise ValueError(f"adapter={name!r}: needs {SAFETENSORS_WEIGHTS_NAME}, the only format loaded; holds {there}")
    return folder
