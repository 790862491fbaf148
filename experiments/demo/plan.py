"""What the demo trains and measures: its sizes, and its stages as commands anyone can type.

The task is that of `experiments/study/recall.py` with three digits. Base model, recipes and training scripts are the
study's; only the steps are fewer.
"""

from dataclasses import dataclass
from pathlib import Path

from experiments.demo.stages import Stage

ROOT = Path(__file__).resolve().parents[2]
NAMES, WINDOW = 3, 8  # digits to remember; thought tokens that the cache keeps
ROWS = 20_000  # training rows, more than any stage reads
RESULTS, FIGURE, LOGS = "results.json", "demo.png", "logs"


@dataclass(frozen=True)
class Sizes:
    """How long the demo trains; the defaults take about five minutes on two cores.

    Args:
        base_steps: of pretraining, 128 sequences each.
        distill_steps: of distillation, 128 sequences each, for LoRA_c and PTE alike.
        grpo_steps: of GRPO after it, with PTE.
        grpo_batch: completions a step, eight to a prompt.
        sequences: fresh ones that the accuracies are measured on, three questions each.
        seed: of everything but the test sequences, which are always the same.
    """

    base_steps: int = 150
    distill_steps: int = 80
    grpo_steps: int = 60
    grpo_batch: int = 640
    sequences: int = 1024
    seed: int = 0


def stages(sizes: Sizes, folder: Path) -> list[list[Stage]]:
    """Groups of stages, in order; the stages of a group do not depend on each other and run side by side."""
    base, rows = folder / "base", folder / "train.jsonl"

    def training(name: str, title: str, script: list, recipe: str, steps: int, metric: str, *more) -> Stage:
        command = [*script, "--config", ROOT / f"recipes/study/{recipe}.yaml", "--output_dir", folder / name]
        command += ["--model_name_or_path", base, "--dataset_name", rows, "--seed", sizes.seed, "--max_steps", steps]
        command += ["--logging_steps", 5, "--disable_tqdm", "false", *more]
        return Stage(name, title, command, folder / name / "manifest.json", steps, metric)

    def distillation(method: str, title: str) -> Stage:
        script = [ROOT / "recipes/distill_pte.py"]
        return training(method, title, script, "recall_distill", sizes.distill_steps, "kl", "--method", method)

    pretraining = ["-m", "experiments.study.recall", "--output", folder, "--names", NAMES, "--windows", WINDOW]
    pretraining += ["--steps", sizes.base_steps, "--rows", ROWS, "--seed", sizes.seed]
    # The script for tasks whose thought is given: if the policy wrote what it is asked for later, always writing the
    # same digits would be rewarded. Trainer, rollout and replay are those of recipes/grpo_pte.py.
    grpo = ["-m", "experiments.study.grpo"]
    batch = ["--per_device_train_batch_size", sizes.grpo_batch]
    measuring = ["-m", "experiments.demo.measure", "--folder", folder, "--sequences", sizes.sequences]
    return [
        [Stage("base", "pretrain the base model", pretraining, base / "config.json", sizes.base_steps)],
        [distillation("lora_c", "distil LoRA_c"), distillation("pte", "distil PTE")],
        [
            training(
                *("pte_grpo", "GRPO with PTE", grpo, "recall_grpo", sizes.grpo_steps, "reward"),
                *("--adapter", folder / "pte", *batch),
            )
        ],
        [Stage("measure", "measure every arm", measuring, folder / RESULTS, 5)],
    ]
