r"""Word problems in long hand for SmolLM2, and the model that has been shown how they are solved.

    python -m experiments.study.arithmetic --model outputs/smollm2-135m --output outputs/study/arithmetic

    problem    Tom has 5 coins, gets 3 and loses 2. Emma has ... How many coins have Emma and Tom together?
    solution   Tom: 5 + 3 = 8, 8 - 2 = 6. Emma: 2 + 4 = 6, 6 - 1 = 5. ... Emma and Tom: 5 + 6 = 11.
               The answer is \boxed{11}.

The end needs two results from further up. They are in the thought only: once they have left the window they have
to be worked out again from the prompt, two steps each, or remembered. SmolLM2 as it comes boxes no answer to them, so
it is first fine-tuned, whole weights, on a few hundred solutions, from where a reward can be earned. Writes base (a
folder as transformers wants it), train.jsonl and heldout.jsonl; no problem is in two of the sets.
"""

import argparse
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from experiments.study.names import NAMES

THINGS = ("apples", "books", "coins", "eggs", "flowers", "games", "hats", "shoes", "stars", "toys")
PEOPLE = 4


def draw(rng: random.Random) -> dict[str, str]:
    """One row: problem, answer, solution."""
    names, thing = rng.sample(NAMES, PEOPLE), rng.choice(THINGS)
    given, worked, result = [], [], {}
    for name in names:
        has, gets = rng.randint(1, 5), rng.randint(1, 5)
        loses = rng.randint(1, has + gets - 1)
        result[name] = has + gets - loses
        given.append(f"{name} has {has} {thing}, gets {gets} and loses {loses}.")
        worked.append(f"{name}: {has} + {gets} = {has + gets}, {has + gets} - {loses} = {result[name]}.")
    a, b = rng.sample(names, 2)
    answer = result[a] + result[b]
    return {
        "problem": f"{' '.join(given)} How many {thing} have {a} and {b} together?",
        "answer": str(answer),
        "solution": f"{' '.join(worked)} {a} and {b}: {result[a]} + {result[b]} = {answer}. "
        rf"The answer is \boxed{{{answer}}}.",
    }


def rows(counts: dict[str, int], seed: int) -> dict[str, list[dict]]:
    """So many different rows of every set."""
    rng, seen, sets = random.Random(seed), set(), {}
    for name, count in counts.items():
        sets[name] = []
        while len(sets[name]) < count:
            row = draw(rng)
            if row["problem"] not in seen:
                seen.add(row["problem"])
                sets[name].append({"id": f"{name}-{len(sets[name])}", **row})
    return sets


def show(model_path: str, shown: list[dict], output: Path, steps: int, rate: float, seed: int) -> None:
    """Fine-tunes the model on the solutions and saves it to `output`."""
    set_seed(seed)
    data = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["problem"]}],
                "completion": [{"role": "assistant", "content": row["solution"]}],
            }
            for row in shown
        ]
    )
    args = SFTConfig(
        output_dir=str(output.with_name("shown")),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 10),
        bf16=True,
        use_cpu=True,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=5,
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_path), AutoTokenizer.from_pretrained(model_path)
    trainer = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    aside = output.with_name(f"{output.name}.partial-{os.getpid()}")
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    aside.rename(output)


def make_shown(description: str, sets_of: Callable[[dict[str, int], int], dict], steps: int) -> None:
    """The command that writes train.jsonl, heldout.jsonl and base, a model that has been shown solutions.

    Args:
        sets_of: (rows by the name of their set, seed) -> the rows of every set.
        steps: of the fine-tuning where the command line names none.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True, help="folder of the model to start from")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=steps, help="of eight shown solutions each")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--train", type=int, default=1024)
    parser.add_argument("--heldout", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if (args.output / "base").exists():
        raise SystemExit(f"error: {args.output / 'base'} is there already; take another output, or remove it")
    sets = sets_of({"heldout": args.heldout, "train": args.train, "shown": 8 * args.steps}, args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    for name in ("heldout", "train"):
        (args.output / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sets[name]))
    show(args.model, sets["shown"], args.output / "base", args.steps, args.learning_rate, args.seed)


def main() -> None:
    make_shown(__doc__.splitlines()[0], rows, steps=50)


if __name__ == "__main__":
    main()
