"""Which runs the studies need, and the Makefile that makes them.

    python experiments/study/plan.py > outputs/study/plan.mk

Standard library only, and run by its path, as `experiments/paper/plan.py`. A run is a folder with a manifest.json,
which is written last; a result is a JSON file. What is there is not made again; what was interrupted starts again
from its own command. SEEDS and the others below can be set in the environment for a cheaper study.
"""

import os
from dataclasses import dataclass

SEEDS = os.environ.get("SEEDS", "0 1 2").split()
RECALL, CHOICES_FOLDER = "outputs/study/recall", "outputs/study/choices"
SUMS = "outputs/study/sums"
SMOLLM2 = "outputs/study/smollm2"
BASE = "outputs/smollm2-135m"
NAMES = os.environ.get("NAMES", "4")  # digits to remember in the recall task
# Steps of every method alike; and of SmolLM2, whose texts are sampled once for all runs.
DISTILL_STEPS = os.environ.get("DISTILL_STEPS", "200")
GRPO_STEPS = os.environ.get("GRPO_STEPS", "150")
CHOICES_STEPS = os.environ.get("CHOICES_STEPS", "100")  # fewer, so that not everything is learnt
SUMS_STEPS = os.environ.get("SUMS_STEPS", "40")  # of distillation and of GRPO
SUMS_WINDOWS = ("8", "16", "full")  # trained at 16; "full" holds any solution
SMOLLM2_STEPS = os.environ.get("SMOLLM2_STEPS", "100")
SMOLLM2_TEXTS = os.environ.get("SMOLLM2_TEXTS", "256")  # to distil on
LORA_C = " --alpha 32"  # LoRA's own scale; the recipe's is PTE's
NAMES_STEPS = os.environ.get("NAMES_STEPS", "100")
NAMES_GRPO_STEPS = os.environ.get("NAMES_GRPO_STEPS", "20")
NAMES_WINDOWS = "32 64 96 128"  # trained at 64; a text has some 110 tokens, so 128 forgets nothing
ARITHMETIC = "outputs/study/arithmetic"
ARITHMETIC_STEPS = os.environ.get("ARITHMETIC_STEPS", "100")
ARITHMETIC_GRPO_STEPS = os.environ.get("ARITHMETIC_GRPO_STEPS", "20")
ARITHMETIC_WINDOWS = ("64", "full")  # trained at 64; a solution has some 100 tokens
SMOLLM2_HELDOUT = os.environ.get("SMOLLM2_HELDOUT", "8")
SMOLLM2_WINDOWS = os.environ.get("SMOLLM2_WINDOWS", "64 128 256")


@dataclass(frozen=True)
class Arm:
    """A way to train: `start` is the arm whose adapter it goes on from."""

    name: str
    method: str
    stage: str  # grpo or distill
    start: str | None = None


ARMS = (
    Arm("lora", "lora", "grpo"),
    Arm("lora_c", "lora_c", "grpo"),
    Arm("pte", "pte", "grpo"),
    Arm("lora_c_distilled", "lora_c", "distill"),
    Arm("pte_distilled", "pte", "distill"),
    Arm("lora_c_distilled_grpo", "lora_c", "grpo", "lora_c_distilled"),
    Arm("pte_distilled_grpo", "pte", "grpo", "pte_distilled"),
)
# One change each to recipes/study/recall_distill.yaml.
CHOICES = {
    "default": "",
    "sum": "--state_update sum",
    "column": "--read column",
    "row_norm": "--normalisation row",
    "qkvo": "--target_modules q_proj k_proj v_proj o_proj",
    "update_0.05": "--init_ratio 0.05",
    "update_1": "--init_ratio 1.0",
    "rate_2e-3": "--learning_rate 2e-3",
    "rate_2e-2": "--learning_rate 2e-2",
    "whiten": "--whiten true",
    "whiten_rate_2e-2": "--whiten true --learning_rate 2e-2",
    "alpha_4": "--alpha 4",  # rank over the root of num_global_tokens: what S adds is then of LoRA's size
    "whiten_alpha_4": "--whiten true --alpha 4",
}
# A reward alone has nothing to start from there: the base guesses, one of thirty.
NAMES_ARMS = (*(arm for arm in ARMS if "distilled" in arm.name), Arm("pte_unwhitened", "pte", "distill"))
ARITHMETIC_ARMS = tuple(arm for arm in ARMS if "distilled" in arm.name)
SMOLLM2_ARMS = (Arm("lora_c_distilled", "lora_c", "distill"), Arm("pte_distilled", "pte", "distill"))


def rule(target: str, needs: list[str], *commands: str) -> str:
    return f"{target}: {' '.join(needs)}\n" + "".join(f"\t{command}\n" for command in commands)


def recall_rules() -> tuple[list[str], list[str]]:
    """Rules and results of the recall task."""
    base, data = f"{RECALL}/base/config.json", f"{RECALL}/base"
    measure = f"$(PY) -m experiments.study.evaluate --base {data} --names {NAMES}"
    rules, results = (
        [rule(base, ["| $(READY)"], f"$(PY) -m experiments.study.recall --names {NAMES} --output {RECALL}")],
        [],
    )
    for seed in SEEDS:
        for arm in ARMS:
            run = f"{RECALL}/{arm.name}-{seed}"
            needs = [base] + ([f"{RECALL}/{arm.start}-{seed}/manifest.json"] if arm.start else [])
            script = "-m experiments.study.grpo" if arm.stage == "grpo" else "recipes/distill_pte.py"
            steps = GRPO_STEPS if arm.stage == "grpo" else DISTILL_STEPS
            command = f"$(PY) {script} --config recipes/study/recall_{arm.stage}.yaml --method {arm.method}"
            command += " --window full" if arm.method == "lora" else ""
            command += f" --adapter {RECALL}/{arm.start}-{seed}" if arm.start else ""
            rules.append(
                rule(f"{run}/manifest.json", needs, f"{command} --seed {seed} --max_steps {steps} --output_dir {run}")
            )
            results.append(f"{RECALL}/results/{arm.name}-{seed}.json")
            rules.append(rule(results[-1], [f"{run}/manifest.json"], f"{measure} --adapter {run} --output $@"))
    results.append(f"{RECALL}/results/base-0.json")
    rules.append(rule(results[-1], [base], f"{measure} --output $@"))
    return rules, results


def choices_rules() -> tuple[list[str], list[str]]:
    """The encoder's choices, one at a time, by distillation of the recall task; needs the base of `recall_rules`."""
    base, rules, results = f"{RECALL}/base", [], []
    recipe = f"recipes/distill_pte.py --config recipes/study/recall_distill.yaml --max_steps {CHOICES_STEPS}"
    for seed in SEEDS:
        for name, change in CHOICES.items():
            run = f"{CHOICES_FOLDER}/{name}-{seed}"
            needs = [f"{base}/config.json"]
            rules.append(
                rule(f"{run}/manifest.json", needs, f"$(PY) {recipe} {change} --seed {seed} --output_dir {run}")
            )
            results.append(f"{CHOICES_FOLDER}/results/{name}-{seed}.json")
            measure = f"$(PY) -m experiments.study.evaluate --base {base} --names {NAMES} --adapter {run} --output $@"
            rules.append(rule(results[-1], [f"{run}/manifest.json"], measure))
    return rules, results


def sums_rules() -> tuple[list[str], list[str]]:
    """Rules and results of the running sums, which can be added up again from the prompt: the milder task."""
    base, data = "$(TINY_BASE)", "$(TINY_DATA)"
    rules, results = [], [f"{SUMS}/results/base-0.json"]
    evaluation = "--recipe recipes/tiny.yaml --data_dir outputs/tiny/data --benchmarks tiny_math500 --samples 2"
    evaluation += " --max_new_tokens 128 --batch_size 128"
    there = ["|", base, data]
    rules.append(evaluate_rule(f"{SUMS}/evaluate/base-0", results[0], None, evaluation, SUMS_WINDOWS, there))
    for seed in SEEDS:
        for arm in ARMS:
            run = f"{SUMS}/{arm.name}-{seed}"
            needs = [f"{SUMS}/{arm.start}-{seed}/manifest.json"] if arm.start else []
            recipe = "recipes/grpo_pte.py --config recipes/tiny.yaml --learning_rate 2e-4"  # at 1e-3 PTE fell apart
            if arm.stage == "distill":
                recipe = "recipes/distill_pte.py --config recipes/distill_tiny.yaml --dataset_limit 8192"
            command = f"$(PY) {recipe} --method {arm.method} --dataset_name $(TINY_DATA)"
            command += " --window full" if arm.method == "lora" else ""
            command += f" --adapter {SUMS}/{arm.start}-{seed}" if arm.start else ""
            command += f" --seed {seed} --max_steps {SUMS_STEPS} --output_dir {run}"
            rules.append(rule(f"{run}/manifest.json", [*needs, "|", base, data], command))
            results.append(f"{SUMS}/results/{arm.name}-{seed}.json")
            settings = (evaluation, SUMS_WINDOWS, [f"{run}/manifest.json", *there])
            rules.append(evaluate_rule(f"{SUMS}/evaluate/{arm.name}-{seed}", results[-1], run, *settings))
    return rules, results


def evaluate_rule(
    folder: str,
    result: str,
    run: str | None,
    evaluation: str,
    windows: tuple[str, ...],
    needs: list[str],
    kl: str | None = None,
) -> str:
    """An evaluation per window with the project's own script, and their collection, with the KL, into one result."""
    commands = []
    for window in windows:
        command = f"$(PY) recipes/evaluate.py {evaluation} --temperature 1.0 --top_p 1.0 --use_cpu true"
        command += "" if window == "full" else f" --window {window}"
        command += f" --adapter {run}" if run else ""
        commands.append(f"{command} --output_dir {folder}/{window}")
    commands.append(f"$(PY) -m experiments.study.collect {folder}{f' --kl {kl}' if kl else ''} --output $@")
    return rule(result, [*([kl] if kl else []), *needs], *commands)


def smollm2_rules() -> tuple[list[str], list[str]]:
    """Rules and results of the KL to the full cache on held-out text."""
    config = "--config recipes/distill_smollm2.yaml"
    prompts, model = f"{SMOLLM2}/prompts/train.jsonl", f"{BASE}/config.json"
    rules = [
        rule(prompts, ["| $(READY)"], f"$(PY) -m experiments.study.prompts --output {SMOLLM2}/prompts"),
        rule(model, ["| $(READY)"], f"$(PY) -m pte_trl.smollm2 --output {BASE}"),
    ]
    for name, count, length in (("train", SMOLLM2_TEXTS, 256), ("heldout", SMOLLM2_HELDOUT, 384)):
        command = f"$(PY) recipes/distill_pte.py {config} --dataset_name {SMOLLM2}/prompts/{name}.jsonl"
        command += f" --dataset_limit {count} --max_completion_length {length} --sample_to $@"
        rules.append(rule(f"{SMOLLM2}/{name}.jsonl", [prompts, model], command))
    train, heldout = (f"{SMOLLM2}/{name}.jsonl" for name in ("train", "heldout"))
    measure = f"$(PY) -m pte_trl.inspect.kl --model {BASE} --completions {heldout} --windows {SMOLLM2_WINDOWS}"
    results = [f"{SMOLLM2}/results/base-0.json"]
    rules.append(rule(results[0], [model, heldout], f"{measure} --output $@"))
    for seed in SEEDS:
        for arm in SMOLLM2_ARMS:
            run = f"{SMOLLM2}/{arm.name}-{seed}"
            command = f"$(PY) recipes/distill_pte.py {config} --method {arm.method} --completions {train}"
            command += LORA_C if arm.method == "lora_c" else ""
            command += f" --seed {seed} --max_steps {SMOLLM2_STEPS} --output_dir {run}"
            rules.append(rule(f"{run}/manifest.json", [model, train], command))
            results.append(f"{SMOLLM2}/results/{arm.name}-{seed}.json")
            rules.append(
                rule(results[-1], [f"{run}/manifest.json", heldout], f"{measure} --adapter {run} --output $@")
            )
    return rules, results


def training(folder: str, arm: Arm, seed: str, data: str, command: str) -> str:
    """The rule of an arm of SmolLM2 that needs `data`, and the adapter it goes on from."""
    run, needs = f"{folder}/{arm.name}-{seed}", [data]
    command += f" --method {arm.method}{LORA_C if arm.method == 'lora_c' else ''}"
    if arm.start:
        needs.append(f"{folder}/{arm.start}-{seed}/manifest.json")
        command += f" --adapter {folder}/{arm.start}-{seed}"
    return rule(f"{run}/manifest.json", needs, f"{command} --seed {seed} --output_dir {run}")


def names_rules() -> tuple[list[str], list[str]]:
    """Rules and results of text on SmolLM2 whose end needs its beginning; the model is `smollm2_rules`'."""
    folder, model = "outputs/study/names", f"{BASE}/config.json"
    train, heldout = f"{folder}/train.jsonl", f"{folder}/heldout.jsonl"
    rules = [rule(train, [model], f"$(PY) -m experiments.study.names --model {BASE} --output {folder}")]
    rules.append(rule(heldout, [train]))
    measure = f"$(PY) -m pte_trl.inspect.kl --model {BASE} --completions {heldout} --windows {NAMES_WINDOWS}"
    results = [f"{folder}/results/base-0.json"]
    rules.append(rule(results[0], [heldout], f"{measure} --output $@"))
    distill = f"recipes/distill_pte.py --config recipes/distill_smollm2.yaml --completions {train}"
    distill += f" --per_device_train_batch_size 6 --learning_rate 2e-3 --max_steps {NAMES_STEPS}"
    reward = f"-m experiments.study.grpo --config recipes/study/names_grpo.yaml --max_steps {NAMES_GRPO_STEPS}"
    for seed in SEEDS:
        for arm in NAMES_ARMS:
            run = f"{folder}/{arm.name}-{seed}"
            command = f"$(PY) {distill if arm.stage == 'distill' else reward}"
            command += " --whiten false" if arm.name == "pte_unwhitened" else ""
            rules.append(training(folder, arm, seed, train, command))
            results.append(f"{folder}/results/{arm.name}-{seed}.json")
            rules.append(rule(results[-1], [f"{run}/manifest.json"], f"{measure} --adapter {run} --output $@"))
    return rules, results


def arithmetic_rules() -> tuple[list[str], list[str]]:
    """Rules and results of word problems in long hand on SmolLM2, which has been shown some solutions."""
    folder, base = ARITHMETIC, f"{ARITHMETIC}/base/config.json"
    train, heldout = f"{folder}/train_completions.jsonl", f"{folder}/heldout_completions.jsonl"
    show = f"$(PY) -m experiments.study.arithmetic --model {BASE} --output {folder}"
    distill = f"$(PY) recipes/distill_pte.py --config recipes/distill_smollm2.yaml --model_name_or_path {folder}/base"
    rules, results = [rule(base, ["|", f"{BASE}/config.json"], show)], [f"{folder}/results/base-0.json"]
    for name, count, target in (("train", 640, train), ("heldout", 32, heldout)):
        command = f"{distill} --dataset_name {folder}/{name}.jsonl --dataset_limit {count} --max_completion_length 128"
        rules.append(rule(target, [base], f"{command} --sample_to $@"))
    rules += arithmetic_measures("base-0", None)
    distill += f" --completions {train} --per_device_train_batch_size 6 --max_steps {ARITHMETIC_STEPS}"
    reward = "$(PY) recipes/grpo_pte.py --config recipes/study/arithmetic_grpo.yaml"
    reward += f" --max_steps {ARITHMETIC_GRPO_STEPS}"
    for seed in SEEDS:
        for arm in ARITHMETIC_ARMS:
            command = distill if arm.stage == "distill" else reward
            # at 2e-3 PTE's loss leaps here
            command += " --learning_rate 2e-3" if arm.name == "lora_c_distilled" else ""
            rules.append(training(folder, arm, seed, train, command))
            rules += arithmetic_measures(f"{arm.name}-{seed}", f"{folder}/{arm.name}-{seed}")
            results.append(f"{folder}/results/{arm.name}-{seed}.json")
    return rules, results


def arithmetic_measures(name: str, run: str | None) -> list[str]:
    """The KL on held-out completions, and the accuracy with it."""
    folder, texts = ARITHMETIC, f"{ARITHMETIC}/heldout_completions.jsonl"
    kl, needs = f"{folder}/kl/{name}.json", [f"{run}/manifest.json"] if run else []
    measure = f"$(PY) -m pte_trl.inspect.kl --model {folder}/base --completions {texts} --windows 64"
    measure += f" --adapter {run}" if run else ""
    evaluation = f"--recipe recipes/study/arithmetic_grpo.yaml --benchmarks {folder}/heldout.jsonl"
    evaluation += " --samples 2 --max_new_tokens 128 --batch_size 100"
    settings = (evaluation, ARITHMETIC_WINDOWS, needs, kl)
    return [
        rule(kl, [texts, *needs], f"{measure} --output $@"),
        evaluate_rule(f"{folder}/evaluate/{name}", f"{folder}/results/{name}.json", run, *settings),
    ]


def makefile() -> str:
    parts = ["# Made by experiments/study/plan.py"]
    studies = {"recall": recall_rules(), "choices": choices_rules(), "sums": sums_rules()}
    studies |= {"names": names_rules(), "arithmetic": arithmetic_rules(), "smollm2": smollm2_rules()}
    for name, (rules, results) in studies.items():
        report = f"outputs/study/{name}/table.md"
        draw = f"$(PY) -m experiments.study.report outputs/study/{name}/results --output outputs/study/{name}"
        draw += " --chance 0.1" if name in ("recall", "choices", "sums") else ""  # one digit is asked for
        parts += [
            *rules,
            rule(report, results, draw),
            f".PHONY: study-{name}\n{rule(f'study-{name}', [report])}",
        ]
    return "\n".join([*parts, ".PHONY: study\nstudy: " + " ".join(f"study-{name}" for name in studies) + "\n"])


if __name__ == "__main__":
    print(makefile())
