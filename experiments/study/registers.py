"""The register machine (`experiments.registers`): what was evicted is needed, three values at once.

    make study-registers              # a tiny model, a million parameters
    make study-registers-smollm2      # SmolLM2, which has been shown some solutions
    make plan-study-registers         # lists the runs, and what the rest will take

Distillation, then GRPO, with PTE and LoRA_c; the base, and all of them with the full cache. Standard library only.
"""

import os

from experiments.registers.task import LONGEST
from experiments.rules import Argv, Run, options, python
from experiments.study.arms import MLP, REGISTERS_ARMS, REGISTERS_SMOLLM2_ARMS
from experiments.study.runs import DISTILL, GRPO, KL, SEEDS, Study, accuracies

STEPS = os.environ.get("REGISTERS_STEPS", "200")
GRPO_STEPS = os.environ.get("REGISTERS_GRPO_STEPS", "60")
SMOLLM2_STEPS = os.environ.get("REGISTERS_SMOLLM2_STEPS", "100")
SMOLLM2_GRPO_STEPS = os.environ.get("REGISTERS_SMOLLM2_GRPO_STEPS", "20")
WINDOW = ("8", "16")  # drawn for each sample, or prompt of GRPO
WINDOWS = ("8", "12", "16", "full")  # measured at
SMOLLM2_WINDOW, SMOLLM2_WINDOWS = "48", ("48", "full")
SMOLLM2_LONGEST = 320  # tokens of a solution, and some more
BASE = "outputs/smollm2-135m"  # made by the study of stories


def registers() -> Study:
    """The tiny model."""
    study = Study("registers", chance="0.1")
    base, data = f"{study.folder}/base", {"dataset_name": f"{study.folder}/train.jsonl"}
    pretrain = python("experiments.registers.pretrain", output=study.folder)
    study.runs.append(Run(f"{base}/config.json", commands=(pretrain,), present=("$(READY)",)))
    needs = (f"{base}/config.json",)
    same = {"model_name_or_path": base, "window": WINDOW, "max_completion_length": LONGEST} | data
    same |= {"state_update": "recursive"}  # as the first runs were recorded; distill_tiny.yaml has the sum since
    commands = {
        "grpo": python(GRPO, config="recipes/tiny.yaml", learning_rate="2e-4", max_steps=GRPO_STEPS, **same),
        "distill": python(DISTILL, config="recipes/distill_tiny.yaml", max_steps=STEPS, **same),
    }
    evaluation = {"recipe": "recipes/tiny.yaml", "model_name_or_path": base, "samples": 2, "batch_size": 200}
    evaluation |= {"benchmarks": f"{study.folder}/heldout.jsonl", "max_new_tokens": LONGEST}
    study.measure("base-0", needs, *accuracies(f"{study.folder}/evaluate/base-0", WINDOWS, evaluation))
    for seed in SEEDS:
        for arm in REGISTERS_ARMS:
            run = study.train(arm, seed, commands[arm.stage], needs)
            measures = accuracies(f"{study.folder}/evaluate/{arm.name}-{seed}", WINDOWS, evaluation, run)
            study.measure(f"{arm.name}-{seed}", (f"{run}/manifest.json",), *measures)
    return study


def registers_smollm2() -> Study:
    """SmolLM2, which has been shown some solutions: distilled on short texts, then on solutions, then rewarded."""
    study = Study("registers-smollm2", chance="0.1")
    base, texts = f"{study.folder}/base", f"{study.folder}/train_completions.jsonl"
    show = python("experiments.registers.shown", model=BASE, output=study.folder)
    write = python("experiments.registers.texts", base=base, output=study.folder)
    study.runs.append(Run(f"{base}/config.json", commands=(show,), present=(f"{BASE}/config.json",)))
    study.runs.append(Run(texts, (f"{base}/config.json",), (write,)))
    study.runs.append(Run(f"{study.folder}/heldout_completions.jsonl", (texts,)))
    same = {"model_name_or_path": base, "window": SMOLLM2_WINDOW, "max_prompt_tokens": 320}
    same |= {"max_completion_length": SMOLLM2_LONGEST} | MLP
    distill = python(DISTILL, config="recipes/distill_smollm2.yaml", **same)
    grpo = python(GRPO, config="recipes/study/arithmetic_grpo.yaml", max_steps=SMOLLM2_GRPO_STEPS, **same)
    size = {"per_device_train_batch_size": 6, "learning_rate": "2e-3", "max_steps": SMOLLM2_STEPS}
    commands = {
        "grpo": grpo + options(dataset_name=f"{study.folder}/train.jsonl"),
        "distill": distill + options(completions=texts, **size),
    }
    measure(study, "base-0", None)
    for seed in SEEDS:
        for arm in REGISTERS_SMOLLM2_ARMS:
            measure(study, f"{arm.name}-{seed}", study.train(arm, seed, commands[arm.stage], (texts,)))
    return study


def measure(study: Study, name: str, run: str | None) -> None:
    """The KL on held-out completions, and the accuracy with it."""
    texts, kl = f"{study.folder}/heldout_completions.jsonl", f"{study.folder}/kl/{name}.json"
    base, needs = f"{study.folder}/base", (f"{run}/manifest.json",) if run else ()
    command: Argv = python(KL, model=base, completions=texts, windows=SMOLLM2_WINDOW, adapter=run, output="$@")
    study.runs.append(Run(kl, (texts, *needs), (command,)))
    evaluation = {"recipe": "recipes/study/arithmetic_grpo.yaml", "model_name_or_path": base}
    evaluation |= {"benchmarks": f"{study.folder}/heldout.jsonl", "samples": 2}
    evaluation |= {"max_new_tokens": SMOLLM2_LONGEST, "batch_size": 100}
    measures = accuracies(f"{study.folder}/evaluate/{name}", SMOLLM2_WINDOWS, evaluation, run, kl)
    study.measure(name, (kl, *needs), *measures)
