r"""Train the tiny model from nothing on the written solutions of its task, with full attention.

    python -m experiments.tiny.pretrain
    python -m experiments.tiny.pretrain --difficulty hard --steps 1500 --output outputs/tiny-hard

The folder is written next to its final place and renamed when it is complete, so a folder that exists is finished
and a second run does nothing.
"""

import argparse
import math
import os
import shutil
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from experiments.tiny.model import build
from experiments.tiny.task import DIFFICULTIES, Task, rows, stream

IGNORED = -100  # the label cross_entropy skips
TEST_SEED = 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/tiny-base"))
    parser.add_argument("--difficulty", choices=DIFFICULTIES, default="medium")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--test-problems", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def prompt_of(tokenizer, row: dict[str, str]) -> str:
    """The chat text up to where the answer begins."""
    message = {"role": "user", "content": row["problem"]}
    return tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)


def batches(tokenizer, task: Task, size: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches of fresh problems, padded on the right; only the solution and its end have labels."""
    source = stream("train", seed, task)
    while True:
        examples = []
        for row in islice(source, size):
            prompt = tokenizer(prompt_of(tokenizer, row))["input_ids"]
            solution = tokenizer(row["solution"] + tokenizer.eos_token)["input_ids"]
            examples.append((prompt, solution))
        longest = max(len(prompt) + len(solution) for prompt, solution in examples)
        ids = torch.full((size, longest), tokenizer.pad_token_id)
        labels = torch.full((size, longest), IGNORED)
        for row_ids, row_labels, (prompt, solution) in zip(ids, labels, examples, strict=True):
            end = len(prompt) + len(solution)
            row_ids[:end] = torch.tensor(prompt + solution)
            row_labels[len(prompt) : end] = torch.tensor(solution)
        # Padding lies to the right of everything that has a label: causal attention never sees it.
        yield {"input_ids": ids, "labels": labels}


def train(model, tokenizer, task: Task, args: argparse.Namespace) -> list[float]:
    """Cosine schedule after a short warm-up; returns the loss of every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    warmup = max(1, args.steps // 20)

    def rate(step: int) -> float:
        return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / args.steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    losses = []
    data = batches(tokenizer, task, args.batch_size, args.seed)
    progress = tqdm(islice(data, args.steps), total=args.steps, desc="pretraining", mininterval=1.0)
    for batch in progress:
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


@torch.no_grad()
def accuracy(model, tokenizer, problems: list[dict[str, str]], batch_size: int = 100, longest: int = 160) -> float:
    r"""Share of problems whose greedy answer ends in exactly the right \boxed{}."""
    greedy = GenerationConfig(
        max_new_tokens=longest, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.eval()
    right = 0
    for start in range(0, len(problems), batch_size):
        part = problems[start : start + batch_size]
        inputs = tokenizer([prompt_of(tokenizer, row) for row in part], padding=True, return_tensors="pt")
        output = model.generate(**inputs, generation_config=greedy)
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(text.endswith(rf"\boxed{{{row['answer']}}}") for text, row in zip(texts, part, strict=True))
    return right / len(problems)


def save(model, tokenizer, output: Path) -> None:
    """Write aside, then rename: an interrupted run leaves nothing that looks finished."""
    aside = output.with_name(f"{output.name}.partial-{os.getpid()}")
    model.save_pretrained(aside)  # the generation config goes with it
    tokenizer.save_pretrained(aside)
    try:
        aside.rename(output)
    except OSError:
        shutil.rmtree(aside)
        raise


def main() -> None:
    args = parse_arguments()
    if (args.output / "config.json").exists():
        print(f"{args.output} is there already; nothing to do")
        return
    args.output.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    model, tokenizer = build(args.seed)
    losses = train(model, tokenizer, DIFFICULTIES[args.difficulty], args)
    problems = rows("test", args.test_problems, TEST_SEED, DIFFICULTIES[args.difficulty])
    score = accuracy(model, tokenizer, problems)
    save(model, tokenizer, args.output)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {time.perf_counter() - began:.0f} s")
    print(f"greedy accuracy on {len(problems)} held-out problems, full attention: {score:.3f}")
    print(f"saved to {args.output}")


if __name__ == "__main__":
    main()
