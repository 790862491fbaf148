"""The Makefile of a scale: a target for every training, evaluation, table and figure.

    python -m experiments.paper.targets tiny             # prints it
    python -m experiments.paper.targets tiny --write     # writes it, and prints where; make includes it

Standard library only.
"""

import argparse
import os
import sys
from hashlib import sha256
from pathlib import Path

from experiments.paper import filters as chosen
from experiments.paper.cost import setting
from experiments.paper.filters import ALL, Filters
from experiments.paper.plan import (
    ITEMS,
    EvaluationRun,
    TrainingRun,
    manifest,
    needed,
    short_name,
    trained,
)
from experiments.paper.scales import SCALES, scale_of
from experiments.rules import Run, makefile, options, python


def train_rule(run: TrainingRun, scale: str) -> Run:
    recipe = f"recipes/{SCALES[scale].recipes[run.model]}.yaml"
    command = ("$(LAUNCH)", "recipes/grpo_pte.py", *options(config=recipe), *within_a_step(run, scale))
    command += options(output_dir=run.folder)
    return Run(manifest(run), (), ((*command, "$(TRAIN_ARGS)"),), present(scale))


def within_a_step(run: TrainingRun, scale: str) -> list[str]:
    """The run's flags; make lowers `steps_per_generation` on many GPUs, so that no rollout spans two steps."""
    words, flag = list(run.options), "--steps_per_generation"
    if flag in words:
        place = words.index(flag) + 1
        micro = setting(run, SCALES[scale], "per_device_train_batch_size")
        words[place] = f"$(call WITHIN_A_STEP,{words[place]},{micro})"
    return words


def evaluate_rule(run: EvaluationRun, scale: str) -> Run:
    """$(FRESH) removes a folder of records that is older than its adapter; an unfinished one is resumed."""
    at, adapter = SCALES[scale], trained(run, scale)
    flags = {"recipe": f"recipes/{at.recipes[run.model]}.yaml", "model_name_or_path": at.model}
    flags |= {"adapter": adapter.folder if adapter else None}
    flags |= {"benchmarks": run.benchmark, "budget": run.budget, "max_new_tokens": run.max_new_tokens}
    flags |= {"evict_ratio": run.evict_ratio, "eviction": run.eviction, "samples": run.samples}
    flags |= {"limit": run.problems, "output_dir": Path(run.folder).parent}
    command = ("$(LAUNCH)", "recipes/evaluate.py", *options(**flags), "$(EVAL_ARGS)")
    needs = (manifest(adapter),) if adapter else ()
    return Run(manifest(run), needs, (("@$(FRESH)",), command), present(scale))


def present(scale: str) -> tuple[str, ...]:
    return ("$(TINY_BASE)", "$(TINY_DATA)") if SCALES[scale].data == "tiny_" else ("$(READY)",)


def run_rules(scale: str) -> list[Run]:
    """Every training and evaluation of a scale, and a name to type for each."""
    found = []
    for run in dict.fromkeys(run for item in ITEMS for run in needed(item, scale)):
        found.append((train_rule if isinstance(run, TrainingRun) else evaluate_rule)(run, scale))
        found.append(Run(short_name(run, scale), (manifest(run),), phony=True))
    return found


def item_rules(item: str, scale: str, filters: Filters) -> list[Run]:
    """Writes the table or figure, and prints the table, once the runs that the filters leave are there."""
    runs = needed(item, scale, filters)
    if not runs:
        say = f"$(error {item}: {filters} leaves none of its runs at SCALE={scale})"
        return [Run(f"reproduce-{item}", (), ((say,),), phony=True)]
    folder = f"{SCALES[scale].folder}/results"
    result = f"{folder}/{item}.{'md' if item.startswith('table') else 'png'}"
    render = python("experiments.paper.render", item, scale=scale, output=folder)
    return [Run(f"reproduce-{item}", (result,), phony=True), Run(result, tuple(map(manifest, runs)), (render,))]


def rules(scale: str, filters: Filters = ALL) -> list[Run]:
    """All of a scale's rules. Filters leave runs out of tables and figures; the runs' own targets are all there."""
    shown = [rule for item in ITEMS for rule in item_rules(item, scale, filters)]
    every = tuple(f"reproduce-{item}" for item in ITEMS if needed(item, scale, filters))
    return [*run_rules(scale), *shown, Run("reproduce-all", every, phony=True)]


def text(scale: str, filters: Filters = ALL) -> str:
    """The Makefile, with what it needs to know of the scale."""
    at, program = SCALES[scale], f"experiments/paper/targets.py for SCALE={scale} {filters}".rstrip()
    return f"OUTPUTS := {at.folder}\nBATCH ?= {at.batch}\n" + makefile(program, rules(scale, filters))


def write(scale: str, filters: Filters) -> Path:
    """The Makefile in the scale's folder. Each set of filters has its own, so that several makes can run at once."""
    name = f"plan-{sha256(str(filters).encode()).hexdigest()[:8]}.mk" if str(filters) else "plan.mk"
    path = Path(SCALES[scale].folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_text(text(scale, filters) + "\n")
    aside.replace(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scale")
    parser.add_argument("--write", action="store_true", help="write the Makefile and print its path")
    chosen.add_arguments(parser)
    args = parser.parse_args()
    try:
        filters = chosen.read_arguments(scale_of(args.scale), args)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(write(args.scale, filters) if args.write else text(args.scale, filters))


if __name__ == "__main__":
    main()
