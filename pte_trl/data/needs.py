"""Checks every name that only the Hugging Face hub can serve, all at once, before anything is loaded.

check_needs(script)    # a recipe's arguments, or an evaluation's
"""

from pathlib import Path

from pte_trl.data.decontaminate import check_eval_sets
from pte_trl.data.problems import hub_name, local_file
from pte_trl.data.sources import DATASETS
from pte_trl.models.hub import HubName, is_local, reachable


def check_needs(script) -> None:
    """Returns if the hub, or the local cache, has what a run names.

    Args:
        script: with `model_name_or_path`, and where there are such fields `adapter`, `dataset_name`, `decontaminate`,
            `benchmarks` and `data_dir`.

    Raises:
        OSError, ValueError: as `hub.reachable`, for the first name that cannot be had, or for all benchmarks that
            decontamination lacks; names the setting.
    """
    reachable(*needs(script))
    if getattr(script, "decontaminate", False) and not getattr(script, "completions", None):
        check_eval_sets(getattr(script, "data_dir", None))


def model_needs(script) -> list[HubName]:
    """Model and adapter of a run, as far as they are on the hub."""
    found = [repository("model", "model_name_or_path", script.model_name_or_path)]
    if getattr(script, "adapter", None):
        found.append(repository("adapter", "adapter", script.adapter))
    return [hub for hub in found if hub is not None]


def needs(script) -> list[HubName]:
    """What a run needs from the hub: the model, the adapter, the data, the benchmarks."""
    completions, data_dir = getattr(script, "completions", None), getattr(script, "data_dir", None)
    found: list[HubName | None] = list(model_needs(script))
    if getattr(script, "dataset_name", None) and not completions:
        found.append(dataset("dataset_name", script.dataset_name, data_dir))
    found += [dataset("benchmarks", name, data_dir) for name in getattr(script, "benchmarks", None) or []]
    return list(dict.fromkeys(hub for hub in found if hub is not None))


def repository(kind: str, key: str, name: str) -> HubName | None:
    """A model or an adapter of the hub, None for a folder here."""
    if is_local(name, key):
        return None
    return HubName(name, kind, f"{key}={name!r}", f"{key} to a folder that holds the {kind}")


def dataset(key: str, name: str, data_dir: str | Path | None) -> HubName | None:
    """A dataset of the hub, None for one here; what cannot be any name is left to `load_problems`, which says so."""
    if name not in DATASETS and "/" not in name:
        return None
    if local_file(name, data_dir, key) is not None or is_local(
        DATASETS[name].hub_id if name in DATASETS else name, key
    ):
        return None
    return hub_name(name, key)
