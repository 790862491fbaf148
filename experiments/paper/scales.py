"""The scales at which the paper's tables can be made: every difference between them is a field here.

    paper       the paper's three models on 8 GPUs
    night       one small model of the paper's family on one GPU, three seeds: Table 1 with error bars within ten hours
    tiny        a model of a million parameters on generated sums, minutes on two CPU cores
    night-tiny  the night's plan with the tiny model and two steps: tries the night where there is no GPU

Standard library only: make asks for the plan before there is an environment. `NIGHT_MODEL`, a hub name or a folder,
puts another model in the place of the night's; its outputs then have a folder of their own.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

MODELS = {
    "Qwen2.5-3B-Instruct": "qwen3b",
    "Qwen2.5-7B-Instruct": "qwen7b",
    "DeepSeek-R1-Distill-Llama-8B": "llama8b",
}
SINK = 512  # the paper counts so much of a budget for the question


@dataclass(frozen=True)
class Scale:
    """What a scale runs, and on what.

    Args:
        name: what SCALE says.
        folder: of its outputs.
        recipes: the models, by the short names of folders, and the recipe of each.
        model: base model instead of the recipe's, a hub name or a folder.
        data: put before a benchmark's name; "tiny_" for the generated sums.
        shrink: lengths are the paper's divided by it.
        sink: a budget b becomes sink + (b - 512) / shrink.
        training: flags of every training, on top of the recipe's.
        seeds: of the trainings; None is the recipe's own seed, which no folder names.
        problems: only so many of each benchmark, the first ones; None for all.
        runs, tries: samples per problem for pass@1, and for the pass@16 of AIME.
        bin_width: tokens of figure 6 that stand for the paper's 100.
        gpus, card: what the cost is estimated for; `card` is a name of `cost.CARDS`.
        completions: of one training step, on all GPUs.
        batch: completions that an evaluation decodes at once on one GPU.
        stand_in: what replaces the paper's models, for captions; empty for the paper's own.
        note: what a reader has to know of the numbers.
    """

    name: str
    folder: str
    recipes: Mapping[str, str]
    model: str | None = None
    data: str = ""
    shrink: int = 1
    sink: int = SINK
    training: Mapping[str, object] = field(default_factory=dict)
    seeds: tuple[int | None, ...] = (None,)
    problems: int | None = None
    runs: int = 5
    tries: int = 16
    bin_width: float = 100
    gpus: int = 1
    card: str = "A100"
    completions: int = 512
    batch: int = 32
    stand_in: str = ""
    note: str = ""

    @property
    def one_model(self) -> str | None:
        """The model that replaces all of the paper's; None where they are themselves."""
        return next(iter(self.recipes)) if self.stand_in else None

    def length(self, tokens: int) -> int:
        return tokens // self.shrink

    def budget(self, tokens: int) -> int:
        return self.sink + (tokens - SINK) // self.shrink

    def caption(self) -> dict:
        """What the tables say of a stand-in; empty at the paper's scale."""
        if not self.stand_in:
            return {}
        sizes = f"Lengths are 1/{self.shrink} of the paper's; a budget b is {self.sink} + (b - {SINK}) / {self.shrink}"
        bins = f"{self.bin_width} tokens of figure 6 stand for 100"
        return {"model": self.stand_in, "note": f"{self.note} {sizes}; {bins}.", "bin_width": self.bin_width}


PAPER = Scale("paper", "outputs/paper", {short: short for short in MODELS.values()}, gpus=8)

TINY = Scale(
    "tiny",
    "outputs/tiny",
    {"tiny": "tiny"},
    data="tiny_",
    shrink=32,
    sink=32,  # the longest question of ours has 31 tokens
    training={
        "max_steps": 80,  # a few minutes on two cores
        "learning_rate": "2e-4",  # at the recipe's 1e-3 two PTE runs collapsed (docs/log.md)
    },
    bin_width=7,  # its completions have 30 to 50 tokens, the paper's 100 to 800
    card="CPU",
    completions=128,
    batch=128,
    stand_in="a model of a million parameters (tiny) in the place of the paper's",
    note="It adds up generated sums, so the paper's numbers beside it are there for the layout only.",
)

NIGHT_MODEL, STEPS, RATE, COMPLETIONS, FIRST = "Qwen/Qwen2.5-1.5B-Instruct", 50, "5e-5", 256, 200
NIGHT = Scale(
    "night",
    "outputs/night",
    {Path(NIGHT_MODEL).name: "qwen3b"},
    model=NIGHT_MODEL,
    shrink=4,
    sink=256,  # room for nearly every question, and a short thought at the smallest budget
    training={
        "max_steps": STEPS,  # three methods x three seeds: with its evaluations seven hours, as estimated
        "learning_rate": RATE,  # a sixth of the paper's steps at five times its rate; not tuned
        "per_device_train_batch_size": 16,
        "global_batch": COMPLETIONS,
        "rollout_batch_size": 256,
        "replay": "segments",  # of the bounded methods: for their share of the memory, which the paper claims
        "save_steps": 10,
    },
    seeds=(42, 43, 44),
    problems=FIRST,
    runs=4,
    bin_width=25,
    card="H100",
    completions=COMPLETIONS,
    batch=256,
    stand_in=f"{Path(NIGHT_MODEL).name} in the place of the paper's",
    note=f"{STEPS} steps of {COMPLETIONS} completions at a rate of {RATE}, the first {FIRST} problems of a benchmark.",
)

NIGHT_TINY = replace(
    TINY,
    name="night-tiny",
    folder="outputs/night-tiny",
    training=TINY.training | {"max_steps": 2, "per_device_train_batch_size": 16},
    seeds=NIGHT.seeds,
    problems=4,
    runs=2,
    completions=16,
)


def night(model: str | None) -> Scale:
    """The night; with another model than its own, in a folder that names it."""
    name = Path(model or NIGHT_MODEL).name
    if name in NIGHT.recipes:
        return replace(NIGHT, model=model or NIGHT_MODEL)
    (recipe,) = NIGHT.recipes.values()
    stand_in = f"{name} in the place of the paper's"
    return replace(NIGHT, folder=f"outputs/night-{name}", recipes={name: recipe}, model=model, stand_in=stand_in)


SCALES = {scale.name: scale for scale in (PAPER, night(os.environ.get("NIGHT_MODEL")), TINY, NIGHT_TINY)}


def scale_of(name: str) -> Scale:
    """The scale of a name.

    Raises:
        ValueError: there is no such scale.
    """
    if name not in SCALES:
        raise ValueError(f"SCALE={name}: there is no such scale; allowed are {', '.join(SCALES)}")
    return SCALES[name]
