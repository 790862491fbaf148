"""Which runs the studies need, and the Makefile that makes them.

    python -m experiments.study.plan > outputs/study/plan.mk

Standard library only, as `experiments.paper.plan`. A training is a folder with a manifest.json, which is written last;
a result is a JSON file. What is there is not made again; what was interrupted starts again from its own command. SEEDS
and the other names in capitals can be set in the environment for a cheaper study. `experiments.study.show` lists a
study's runs.
"""

import os

from experiments.rules import Run, makefile, options, python
from experiments.study.arms import (
    ARITHMETIC_ARMS,
    ARMS,
    ATTENTION,
    CHOICES,
    NAMES_ARMS,
    SMOLLM2_ARMS,
    SUMS_ARMS,
    WINDOWS_ARMS,
    Arm,
)
from experiments.study.load import load
from experiments.study.registers import registers, registers_smollm2
from experiments.study.runs import DISTILL, GIVEN_THOUGHT, GRPO, KL, SEEDS, Study, accuracies

NAMES = os.environ.get("NAMES", "4")  # digits to remember in the recall task
# Steps of every method alike; and of SmolLM2, whose texts are sampled once for all runs.
DISTILL_STEPS = os.environ.get("DISTILL_STEPS", "200")
GRPO_STEPS = os.environ.get("GRPO_STEPS", "150")
CHOICES_STEPS = os.environ.get("CHOICES_STEPS", "100")  # fewer, so that not everything is learnt
SUMS_STEPS = os.environ.get("SUMS_STEPS", "40")  # of distillation and of GRPO
NAMES_STEPS = os.environ.get("NAMES_STEPS", "100")
NAMES_GRPO_STEPS = os.environ.get("NAMES_GRPO_STEPS", "20")
ARITHMETIC_STEPS = os.environ.get("ARITHMETIC_STEPS", "100")
ARITHMETIC_GRPO_STEPS = os.environ.get("ARITHMETIC_GRPO_STEPS", "20")
SMOLLM2_STEPS = os.environ.get("SMOLLM2_STEPS", "100")
SMOLLM2_TEXTS = os.environ.get("SMOLLM2_TEXTS", "256")  # to distil on
SMOLLM2_HELDOUT = os.environ.get("SMOLLM2_HELDOUT", "8")
SMOLLM2_WINDOWS = os.environ.get("SMOLLM2_WINDOWS", "64 128 256").split()
RECALL_WINDOWS = ("6", "8", "10", "12", "14", "16")  # of the adapters for several windows
NAMES_WINDOWS = ("32", "48", "64", "96", "128")  # a text has some 110 tokens, so 128 forgets nothing
SUMS_WINDOWS = ("8", "16", "full")  # trained at 16; "full" holds any solution
ARITHMETIC_WINDOWS = ("64", "full")  # trained at 64; a solution has some 100 tokens

RECALL, CHOICES_FOLDER, SUMS = "outputs/study/recall", "outputs/study/choices", "outputs/study/sums"
NAMES_FOLDER, ARITHMETIC, SMOLLM2 = "outputs/study/names", "outputs/study/arithmetic", "outputs/study/smollm2"
# What the recipes had when the first arms were recorded; an arm's own flags come behind these.
RECORDED = {"window": "16", "target_modules": ATTENTION, "state_update": "recursive"}
RECORDED_SMOLLM2 = RECORDED | {"window": "64", "num_global_tokens": "32", "state_per_head": "false", "whiten": "true"}
BASE = "outputs/smollm2-135m"
BASE_MODEL = f"{BASE}/config.json"


def recall() -> Study:
    """The recall task, which only what S keeps can solve."""
    study, base = Study("recall", chance="0.1"), f"{RECALL}/base"
    needs, model = (f"{base}/config.json",), python("experiments.study.recall", names=NAMES, output=RECALL)
    study.runs.append(Run(f"{base}/config.json", commands=(model,), present=("$(READY)",)))
    measure = python("experiments.study.evaluate", base=base, names=NAMES, output="$@")
    commands = {
        "grpo": python(GIVEN_THOUGHT, config="recipes/study/recall_grpo.yaml", max_steps=GRPO_STEPS),
        "distill": python(DISTILL, config="recipes/study/recall_distill.yaml", max_steps=DISTILL_STEPS),
    }
    for seed in SEEDS:
        for arm in ARMS:
            run = study.train(arm, seed, commands[arm.stage], needs)
            study.measure(f"{arm.name}-{seed}", (f"{run}/manifest.json",), measure + options(adapter=run))
    study.measure("base-0", needs, measure)
    return study


def choices() -> Study:
    """The encoder's choices, one at a time, by distillation of the recall task; needs the base of `recall`."""
    study, base = Study("choices", chance="0.1"), f"{RECALL}/base"
    command = python(DISTILL, config="recipes/study/recall_distill.yaml", max_steps=CHOICES_STEPS)
    measure = python("experiments.study.evaluate", base=base, names=NAMES, output="$@")
    for seed in SEEDS:
        for name, change in CHOICES.items():
            arm = Arm(name, None, "distill", flags=change)  # the method is the recipe's
            run = study.train(arm, seed, command, (f"{base}/config.json",))
            study.measure(f"{name}-{seed}", (f"{run}/manifest.json",), measure + options(adapter=run))
    return study


def windows() -> Study:
    """One adapter for several windows, by distillation of the recall task; needs base and adapters of `recall`."""
    study, base = Study("windows", chance="0.1"), f"{RECALL}/base"
    command = python(DISTILL, config="recipes/study/recall_distill.yaml", max_steps=DISTILL_STEPS)
    measure = python("experiments.study.evaluate", base=base, names=NAMES, windows=RECALL_WINDOWS, output="$@")
    for seed in SEEDS:
        runs = {arm.name: study.train(arm, seed, command, (f"{base}/config.json",)) for arm in WINDOWS_ARMS}
        runs["pte_distilled"] = f"{RECALL}/pte_distilled-{seed}"  # one window, prompts of one length
        for name, run in runs.items():
            study.measure(f"{name}-{seed}", (f"{run}/manifest.json",), measure + options(adapter=run))
    return study


def sums() -> Study:
    """The running sums, which can be added up again from the prompt: the milder task."""
    study, present = Study("sums", chance="0.1"), ("$(TINY_BASE)", "$(TINY_DATA)")
    data = {"dataset_name": "$(TINY_DATA)", "max_steps": SUMS_STEPS} | RECORDED
    commands = {  # at the recipe's 1e-3 PTE fell apart
        "grpo": python(GRPO, config="recipes/tiny.yaml", learning_rate="2e-4", **data),
        "distill": python(DISTILL, config="recipes/distill_tiny.yaml", dataset_limit=8192, **data),
    }
    evaluation = {"recipe": "recipes/tiny.yaml", "data_dir": "outputs/tiny/data", "benchmarks": "tiny_math500"}
    evaluation |= {"samples": 2, "max_new_tokens": 128, "batch_size": 128}
    study.measure("base-0", (), *accuracies(f"{SUMS}/evaluate/base-0", SUMS_WINDOWS, evaluation), present=present)
    for seed in SEEDS:
        for arm in SUMS_ARMS:
            run = study.train(arm, seed, commands[arm.stage], present=present)
            measures = accuracies(f"{SUMS}/evaluate/{arm.name}-{seed}", SUMS_WINDOWS, evaluation, run)
            study.measure(f"{arm.name}-{seed}", (f"{run}/manifest.json",), *measures, present=present)
    return study


def smollm2() -> Study:
    """The KL to the full cache on held-out text of a real model."""
    study, prompts = Study("smollm2"), f"{SMOLLM2}/prompts/train.jsonl"
    model = python("pte_trl.smollm2", output=BASE)
    texts = python("experiments.study.prompts", output=f"{SMOLLM2}/prompts")
    study.runs.append(Run(prompts, commands=(texts,), present=("$(READY)",)))
    study.runs.append(Run(BASE_MODEL, commands=(model,), present=("$(READY)",)))
    distill = python(DISTILL, config="recipes/distill_smollm2.yaml", **RECORDED_SMOLLM2)
    for name, count, length in (("train", SMOLLM2_TEXTS, 256), ("heldout", SMOLLM2_HELDOUT, 384)):
        source = {"dataset_name": f"{SMOLLM2}/prompts/{name}.jsonl", "dataset_limit": count}
        sample = distill + options(**source, max_completion_length=length, sample_to="$@")
        study.runs.append(Run(f"{SMOLLM2}/{name}.jsonl", (prompts, BASE_MODEL), (sample,)))
    train, heldout = f"{SMOLLM2}/train.jsonl", f"{SMOLLM2}/heldout.jsonl"
    measure = python(KL, model=BASE, completions=heldout, windows=SMOLLM2_WINDOWS, output="$@")
    study.measure("base-0", (BASE_MODEL, heldout), measure)
    distill += options(completions=train, max_steps=SMOLLM2_STEPS)
    for seed in SEEDS:
        for arm in SMOLLM2_ARMS:
            run = study.train(arm, seed, distill, (BASE_MODEL, train))
            study.measure(f"{arm.name}-{seed}", (f"{run}/manifest.json", heldout), measure + options(adapter=run))
    return study


def names() -> Study:
    """Text on SmolLM2 whose end needs its beginning; the model is that of `smollm2`."""
    study, train, heldout = Study("names"), f"{NAMES_FOLDER}/train.jsonl", f"{NAMES_FOLDER}/heldout.jsonl"
    texts = python("experiments.study.names", model=BASE, output=NAMES_FOLDER)
    study.runs += [Run(train, (BASE_MODEL,), (texts,)), Run(heldout, (train,))]
    measure = python(KL, model=BASE, completions=heldout, windows=NAMES_WINDOWS, output="$@")
    study.measure("base-0", (heldout,), measure)
    size = {"per_device_train_batch_size": 6, "learning_rate": "2e-3", "max_steps": NAMES_STEPS} | RECORDED_SMOLLM2
    commands = {
        "grpo": python(GIVEN_THOUGHT, config="recipes/study/names_grpo.yaml", max_steps=NAMES_GRPO_STEPS),
        "distill": python(DISTILL, config="recipes/distill_smollm2.yaml", completions=train, **size),
    }
    for seed in SEEDS:
        for arm in NAMES_ARMS:
            run = study.train(arm, seed, commands[arm.stage], (train,))
            study.measure(f"{arm.name}-{seed}", (f"{run}/manifest.json",), measure + options(adapter=run))
    return study


def arithmetic() -> Study:
    """Word problems in long hand on SmolLM2, which has been shown some solutions."""
    study, base = Study("arithmetic"), f"{ARITHMETIC}/base"
    train, heldout = f"{ARITHMETIC}/train_completions.jsonl", f"{ARITHMETIC}/heldout_completions.jsonl"
    show = python("experiments.study.arithmetic", model=BASE, output=ARITHMETIC)
    study.runs.append(Run(f"{base}/config.json", commands=(show,), present=(BASE_MODEL,)))
    distill = python(DISTILL, config="recipes/distill_smollm2.yaml", model_name_or_path=base, **RECORDED_SMOLLM2)
    for name, count, target in (("train", 640, train), ("heldout", 32, heldout)):
        source = {"dataset_name": f"{ARITHMETIC}/{name}.jsonl", "dataset_limit": count}
        sample = distill + options(**source, max_completion_length=128, sample_to="$@")
        study.runs.append(Run(target, (f"{base}/config.json",), (sample,)))
    measure_arithmetic(study, "base-0", None)
    size = {"per_device_train_batch_size": 6, "max_steps": ARITHMETIC_STEPS}
    commands = {
        "grpo": python(GRPO, config="recipes/study/arithmetic_grpo.yaml", max_steps=ARITHMETIC_GRPO_STEPS),
        "distill": distill + options(completions=train, **size),
    }
    for seed in SEEDS:
        for arm in ARITHMETIC_ARMS:
            measure_arithmetic(study, f"{arm.name}-{seed}", study.train(arm, seed, commands[arm.stage], (train,)))
    return study


def measure_arithmetic(study: Study, name: str, run: str | None) -> None:
    """The KL on held-out completions, and the accuracy with it."""
    texts, kl = f"{ARITHMETIC}/heldout_completions.jsonl", f"{ARITHMETIC}/kl/{name}.json"
    needs = (f"{run}/manifest.json",) if run else ()
    measure = python(KL, model=f"{ARITHMETIC}/base", completions=texts, windows="64", adapter=run, output="$@")
    study.runs.append(Run(kl, (texts, *needs), (measure,)))
    evaluation = {"recipe": "recipes/study/arithmetic_grpo.yaml", "benchmarks": f"{ARITHMETIC}/heldout.jsonl"}
    evaluation |= {"samples": 2, "max_new_tokens": 128, "batch_size": 100}
    folder = f"{ARITHMETIC}/evaluate/{name}"
    study.measure(name, (kl, *needs), *accuracies(folder, ARITHMETIC_WINDOWS, evaluation, run, kl))


def studies() -> list[Study]:
    return [
        *(recall(), choices(), load(), windows(), sums(), registers()),
        *(names(), arithmetic(), smollm2(), registers_smollm2()),
    ]


def rules() -> list[Run]:
    """Every rule of every study, and `study` for all of them."""
    found = studies()
    everything = Run("study", tuple(f"study-{study.name}" for study in found), phony=True)
    return [*(run for study in found for run in study.rules()), everything]


if __name__ == "__main__":
    print(makefile("experiments/study/plan.py", rules()))
