"""A task that only memory solves: digits told in the thought, asked for when they have left the window.

    python -m experiments.study.recall --output outputs/study/recall

One sequence, prompt | thought, every word a token:

    ~16  |  c3 a7 d7 b0  ~16 ~15 ... ~1  d 7 a 7 c 3 b 0  <end>

The thought draws a random digit for every name, counts down from the number in the prompt, and asks for each name. The
prompt holds neither digits nor questions, and answers to other names say nothing. A countdown that outlasts the
window once per layer leaves no path of attention from a question back to a digit (`countdown`), so whatever sees the
window alone is at chance, 0.10, whatever it learns. The command writes a base model that has learnt the task with full
attention, and train.jsonl: problem (the prompt), thought (up to a question), answer. Its countdown is that of the
first window. completions.jsonl has as many whole thoughts to distil on, in which the countdowns of all windows take
turns: what the base would write, without the time that sampling takes.
"""

import argparse
import json
import math
import os
import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pte_trl.cache.schedule import Schedule

DIGITS = NAMES = 10  # answers there are; names there can be
CHANCE = 1 / DIGITS
LAYERS, HIDDEN = 2, 64
LONGEST = 64  # countdown
PAD, END = "<pad>", "<end>"
WORDS = [
    *(PAD, END),
    *map(str, range(DIGITS)),
    *string.ascii_lowercase[:NAMES],
    *(f"{name}{digit}" for name in string.ascii_lowercase[:NAMES] for digit in range(DIGITS)),
    *(f"~{n}" for n in range(1, LONGEST + 1)),
]
IDS = {word: index for index, word in enumerate(WORDS)}
DIGIT, NAME, PAIR, COUNT = IDS["0"], IDS["a"], IDS["a0"], IDS["~1"] - 1  # first id of each kind; COUNT + n is ~n


def countdown(schedule: Schedule, names: int, layers: int = LAYERS) -> int:
    """The shortest countdown after which no path through the layers leads from a question back to a told digit."""

    def reach(token: int) -> int:
        for _ in range(layers):
            token = schedule.first_visible(token)
        return token

    length = 1
    while reach(names + length) < names:
        length += 1
    return length


def draw(count: int, names: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` whole sequences, (count, tokens), and the places of their answers, (names,)."""

    def orders() -> Tensor:
        return torch.rand(count, names, generator=generator).argsort(1)

    digits, told, asked = torch.randint(DIGITS, (count, names), generator=generator), orders(), orders()
    counting = torch.arange(length, 0, -1).expand(count, -1) + COUNT
    pairs = PAIR + told * DIGITS + digits.gather(1, told)
    asks = torch.stack([NAME + asked, DIGIT + digits.gather(1, asked)], dim=2).flatten(1)
    end = torch.full((count, 1), IDS[END])
    tokens = torch.cat([counting[:, :1], pairs, counting, asks, end], dim=1)
    return tokens, 1 + names + length + 2 * torch.arange(names) + 1


def build_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(IDS, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, padding_side="left", model_max_length=256
    )


def build_model(seed: int) -> LlamaForCausalLM:
    # Not Qwen2: for its folders AutoTokenizer takes Qwen's own tokenizer, whatever the folder says (transformers 5).
    ids = {"eos_token_id": IDS[END], "pad_token_id": IDS[PAD], "bos_token_id": None}
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=3 * HIDDEN,
        initializer_range=HIDDEN**-0.5,
        max_position_embeddings=256,
        **ids,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, **ids)
    return model


def train(model: nn.Module, names: int, lengths: list[int], steps: int, batch: int, rate: float, seed: int) -> None:
    """Next-token loss on the whole thought, so that it writes thoughts of its own, and once more on the answers."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    shape = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
    )
    for step in tqdm(range(1, steps + 1), desc="pretraining", mininterval=1.0):
        tokens, places = draw(batch, names, lengths[step % len(lengths)], generator)
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        loss = losses.mean() + losses[:, places - 1].mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        shape.step()
        if step % 100 == 0:
            right = (logits[:, places - 1].argmax(-1) == tokens[:, places]).float().mean().item()
            print(f"step {step}: loss {loss.item():.3f}, answers right {right:.3f}", flush=True)


def write_rows(path: Path, rows: int, names: int, length: int, seed: int) -> None:
    """Training rows: the thought up to a question, the first to the last in turn, and its answer."""
    tokens, places = draw(rows, names, length, torch.Generator().manual_seed(seed))
    with path.open("w") as file:
        for index, row in enumerate(tokens.tolist()):
            words = [WORDS[token] for token in row[: int(places[index % names]) + 1]]
            file.write(json.dumps({"problem": words[0], "thought": " ".join(words[1:-1]), "answer": words[-1]}) + "\n")


def write_completions(path: Path, rows: int, names: int, lengths: list[int], seed: int) -> None:
    """Whole thoughts as `pte_trl.training.distill.completions` reads them; the countdowns take turns row by row."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [draw(rows, names, length, generator)[0].tolist() for length in lengths]
    with path.open("w") as file:
        for index in range(rows):
            first, *thought = drawn[index % len(lengths)][index]
            file.write(json.dumps({"prompt": WORDS[first], "completion_ids": thought}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--names", type=int, default=4)
    parser.add_argument("--windows", type=int, nargs="+", default=[8, 12, 16], help="the first is the training window")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    lengths = [countdown(Schedule(window), args.names) for window in args.windows]
    if max(lengths) > LONGEST or not 1 <= args.names <= NAMES:
        raise SystemExit(
            f"error: countdowns of {lengths} for windows={args.windows}, names={args.names}: at most "
            f"{LONGEST} and {NAMES}"
        )
    model = build_model(args.seed)
    train(model, args.names, lengths, args.steps, args.batch, args.learning_rate, args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    write_rows(args.output / "train.jsonl", args.rows, args.names, lengths[0], args.seed + 1)
    write_completions(args.output / "completions.jsonl", args.rows, args.names, lengths, args.seed + 1)
    aside = args.output / f"base.partial-{os.getpid()}"
    model.save_pretrained(aside)
    build_tokenizer().save_pretrained(aside)
    aside.rename(args.output / "base")


if __name__ == "__main__":
    main()
