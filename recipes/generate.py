"""Asks a model questions under a fixed budget of cached tokens, and shows the answer as it is written.

    python recipes/generate.py --recipe recipes/smollm2.yaml --question "What is 7 + 5?" --budget 512
    python recipes/generate.py --recipe recipes/qwen3b.yaml --adapter outputs/qwen3b-pte --file questions.txt \
        --budget 1024 --max_new_tokens 65536

The text goes to the standard output; every `status_every` tokens a line about the cache goes to the standard error.
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedTokenizerBase, TextStreamer, set_seed

from pte_trl import BoundedCache
from pte_trl.data import make_prompt
from pte_trl.evaluation.config import ModelSource
from pte_trl.loading import check_evaluation_model, load_for_evaluation, load_tokenizer
from pte_trl.parsing import parse
from pte_trl.schedule import Schedule, resolve_window


@dataclass
class GenerateArguments(ModelSource):
    """Model, question and cache."""

    question: str | None = field(default=None, metadata={"help": "What to ask."})
    file: str | None = field(default=None, metadata={"help": "Or a text file with a question on every line."})
    budget: int | None = field(default=None, metadata={"help": "Prompt and thought tokens kept."})
    window: int | None = field(default=None, metadata={"help": "Thought tokens kept, instead of budget."})
    evict_ratio: float = field(default=0.25, metadata={"help": "Share of a full window that leaves at once."})
    max_new_tokens: int = field(default=3072, metadata={"help": "Answer tokens at most."})
    temperature: float = field(default=0.6, metadata={"help": "0 is greedy."})
    top_p: float = field(default=0.95, metadata={"help": "Nucleus; 1 for all."})
    seed: int = field(default=0, metadata={"help": "Of the sampling."})
    ignore_eos: bool = field(default=False, metadata={"help": "Go on to max_new_tokens, to look at long texts."})
    status_every: int = field(default=256, metadata={"help": "Tokens between two lines about the cache."})
    use_cpu: bool = field(default=False, metadata={"help": "Leave a GPU alone."})

    def __post_init__(self):
        super().__post_init__()
        if (self.question is None) == (self.file is None):
            raise ValueError(f"question={self.question!r}, file={self.file!r}: give exactly one of the two")
        if self.file is not None and not Path(self.file).is_file():
            raise ValueError(f"file={self.file!r}: no such file")
        if (self.budget is None) == (self.window is None):
            raise ValueError(f"budget={self.budget!r}, window={self.window!r}: give exactly one of the two")
        Schedule(self.window or 1, self.evict_ratio)
        for key in ("max_new_tokens", "status_every"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)!r}: must be at least 1")

    def questions(self) -> list[str]:
        lines = [self.question] if self.file is None else Path(self.file).read_text(encoding="utf-8").splitlines()
        return [line for line in lines if line.strip()]


class CacheStreamer(TextStreamer):
    """Writes the text as it comes, and now and then what the cache holds."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, cache: BoundedCache, every: int):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.cache, self.every = cache, every
        self.tokens, self.began = -1, time.perf_counter()  # the prompt comes first, as one value

    def put(self, value):
        super().put(value)
        self.tokens += 1
        if self.tokens and self.tokens % self.every == 0:
            self.status()

    def status(self) -> None:
        # What is written so far is let go: a text without line breaks would be decoded anew with every token.
        self.end()
        self.next_tokens_are_prompt = False
        held = self.cache.layers[0].keys.shape[2]
        print(
            f"[{self.tokens} tokens; cache {held} tokens, {self.cache.nbytes / 1e6:.2f} MB; "
            f"{self.cache.evictions} evictions; {self.tokens / (time.perf_counter() - self.began):.1f} tokens/s; "
            f"process {psutil.Process().memory_info().rss / 1e6:.0f} MB]",
            file=sys.stderr,
            flush=True,
        )


def prepare(tokenizer: PreTrainedTokenizerBase, question: str, args: GenerateArguments) -> tuple[dict, int]:
    """The question's tokens and the window that its budget leaves.

    Raises:
        ValueError: the budget leaves none.
    """
    chat = tokenizer.chat_template is not None
    prompt = make_prompt(question, args.system_prompt, chat=chat)
    options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    options |= args.chat_template_kwargs or {}
    inputs = tokenizer.apply_chat_template(prompt, **options) if chat else tokenizer(prompt, return_tensors="pt")
    return inputs, resolve_window(args.window, args.budget, inputs["input_ids"].shape[1])


@torch.no_grad()
def answer(model, tokenizer, inputs: dict, window: int, args: GenerateArguments) -> str:
    """Streams the answer to one question and returns it."""
    cache = BoundedCache(window, args.evict_ratio)
    streamer = CacheStreamer(tokenizer, cache, args.status_every)
    sampling = {"do_sample": False}
    if args.temperature:
        sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
    out = model.generate(
        **inputs.to(model.device),
        past_key_values=cache,
        streamer=streamer,
        max_new_tokens=args.max_new_tokens,
        min_new_tokens=args.max_new_tokens if args.ignore_eos else None,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    streamer.status()
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main(argv: list[str] | None = None) -> list[str]:
    try:
        (args,) = parse((GenerateArguments,), argv)
        check_evaluation_model(args)
        tokenizer = load_tokenizer(args, args.trust_remote_code)
        prepared = [(question, *prepare(tokenizer, question, args)) for question in args.questions()]
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    device = torch.device("cuda" if torch.cuda.is_available() and not args.use_cpu else "cpu")
    model = load_for_evaluation(args, device)
    set_seed(args.seed)
    answers = []
    for question, inputs, window in prepared:
        print(f"question: {question}", flush=True)
        answers.append(answer(model, tokenizer, inputs, window, args))
    return answers


if __name__ == "__main__":
    main()
