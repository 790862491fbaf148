"""MODELS, METHODS, BENCHMARKS and SEEDS: which of a scale's runs are asked for.

A filter leaves runs out; it changes none, so what is done stays done. Standard library only.
"""

import argparse
import re
from dataclasses import dataclass, fields

from experiments.paper.scales import MODELS, Scale

METHODS = ("baseline", "lora", "lora_c", "pte")
BENCHMARKS = ("math500", "olympiadbench", "minerva_math", "amc23", "aime24", "aime25")


@dataclass(frozen=True)
class Filters:
    """Values that are kept, by their names in folders; empty for all."""

    models: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    benchmarks: tuple[str, ...] = ()
    seeds: tuple[str, ...] = ()

    def keep(self, run) -> bool:
        """Whether a training or an evaluation is asked for. The baseline has no seed, a training no benchmark."""
        own = {"models": run.model, "methods": run.run.partition("-")[0]}
        own["benchmarks"] = getattr(run, "benchmark", "").removeprefix("tiny_") or None
        own["seeds"] = None if run.seed is None else str(run.seed)
        return all(own[key] is None or own[key] in kept for key, kept in vars(self).items() if kept)

    def __str__(self) -> str:
        """As they are typed after `make`."""
        return " ".join(f'{key.upper()}="{" ".join(kept)}"' for key, kept in vars(self).items() if kept)


ALL = Filters()


def filters(scale: Scale, **given: str) -> Filters:
    """Filters from texts of words between blanks or commas; a model may have the paper's name.

    Raises:
        ValueError: naming the key, the value and what is allowed.
    """
    words = {key: tuple(word for word in re.split(r"[\s,]+", text or "") if word) for key, text in given.items()}
    words["models"] = tuple(MODELS.get(word, word) for word in words.get("models", ()))
    allowed = {"models": tuple(scale.recipes), "methods": METHODS, "benchmarks": BENCHMARKS}
    allowed["seeds"] = tuple(str(seed) for seed in scale.seeds if seed is not None)
    for key, chosen in words.items():
        for word in chosen:
            if word not in allowed[key]:
                choice = ", ".join(allowed[key]) or "none, its runs have the seed of their recipe"
                raise ValueError(f"{key.upper()}={word}: not of SCALE={scale.name}; allowed are {choice}")
    return Filters(**words)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for one in fields(Filters):
        parser.add_argument(f"--{one.name}", default="", help="words between blanks or commas; all if empty")


def read_arguments(scale: Scale, args: argparse.Namespace) -> Filters:
    """The filters of a command line, see `filters`."""
    return filters(scale, **{one.name: getattr(args, one.name) for one in fields(Filters)})
