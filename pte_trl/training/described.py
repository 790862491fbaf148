"""What checkpoints and manifests record of a run: its settings, and hashes of what it is made of."""

import copy
from dataclasses import asdict
from types import SimpleNamespace

from datasets import Dataset

from pte_trl.adapter.check import active_config
from pte_trl.compat.transformers import commit_of
from pte_trl.runtime.identity import training_identity


def stated(args) -> dict:
    """The settings of a trainer's config, None among them: a run that resumes must not have a value there.

    A distillation shares most of its keys with a GRPO, and is another run.
    """
    # A copy: TRL writes into dictionaries of its config later, and a resumed run would differ from itself.
    return copy.deepcopy(args.to_dict()) | {"config_class": type(args).__name__}


def recipe_settings(script, args) -> dict:
    """The settings of a run by a recipe, as its manifest records them."""
    return asdict(script) | stated(args)


def trainer_settings(trainer) -> dict:
    """The settings of a run from Python; model and adapter are those that the trainer has.

    Of a model that was made in memory there is no hash, nor of streamed data.
    """
    name = getattr(trainer.model.config, "name_or_path", "")
    adapter = active_config(trainer.model)
    settings = stated(trainer.args) | {"model_name_or_path": name}
    if adapter is not None:
        # A set has another order in every process.
        settings |= {key: sorted(x) if isinstance(x, set) else x for key, x in adapter.to_dict().items()}
    source = SimpleNamespace(model_name_or_path=name or None, adapter=None)
    rows = trainer.train_dataset if isinstance(trainer.train_dataset, Dataset) else None
    # A `revision`, the trainer's or that of a model which the user has loaded, is another commit than main's.
    return settings | training_identity(source, trainer.processing_class, rows, commit_of(trainer.model.config))
