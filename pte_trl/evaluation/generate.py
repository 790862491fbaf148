"""Asks a model questions under a fixed budget of cached tokens, and shows the answer as it is written.

The command is `recipes/generate.py`.
"""

import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TextStreamer

from pte_trl.cache.arguments import CacheArguments
from pte_trl.cache.bounded import BoundedCache
from pte_trl.cache.schedule import Schedule
from pte_trl.data.needs import check_needs
from pte_trl.data.prompts import tokens_of
from pte_trl.evaluation.config import ModelSource
from pte_trl.evaluation.loading import check_evaluation_model, load_for_evaluation
from pte_trl.models.generation_config import eos_token_ids
from pte_trl.models.template import make_prompt
from pte_trl.models.tokens import load_tokenizer
from pte_trl.rollouts.sampling import Sampling
from pte_trl.rollouts.streaming import stream
from pte_trl.runtime.entry import framed, settings_checked
from pte_trl.runtime.faults import Fault
from pte_trl.runtime.finite import tail
from pte_trl.settings.parsing import parse


@dataclass
class GenerateArguments(ModelSource, CacheArguments):
    """Model, question and cache."""

    question: str | None = field(default=None, metadata={"help": "What to ask."})
    file: str | None = field(default=None, metadata={"help": "Or a text file with a question on every line."})
    max_new_tokens: int = field(default=3072, metadata={"help": "Answer tokens at most."})
    seed: int = field(default=0, metadata={"help": "Of the sampling, the same for every question."})
    ignore_eos: bool = field(default=False, metadata={"help": "Go on to max_new_tokens, to look at long texts."})
    status_every: int = field(default=256, metadata={"help": "Tokens between two lines about the cache."})
    use_cpu: bool = field(default=False, metadata={"help": "Leave a GPU alone."})

    def __post_init__(self):
        super().__post_init__()
        if (self.question is None) == (self.file is None):
            raise ValueError(f"question={self.question!r}, file={self.file!r}: give exactly one of the two")
        if (self.window is None) == (self.budget is None):
            raise ValueError(f"window={self.window!r}, budget={self.budget!r}: give exactly one of the two")
        self.questions()

    def questions(self) -> list[str]:
        """What is asked, in order.

        Raises:
            ValueError: a file that cannot be read, or nothing is asked.
        """
        found = [self.question] if self.file is None else lines_of(self.file)
        found = [question for question in found if question.strip()]
        where = f"question={self.question!r}" if self.file is None else f"file={self.file!r}"
        if not found:
            raise ValueError(f"{where}: no question in it")
        for question in found:
            if any("\ud800" <= letter <= "\udfff" for letter in question):
                raise ValueError(f"{where}: {question!r} is not text (lone surrogates)")
        return found


def lines_of(path: str) -> list[str]:
    """Lines of a text file in UTF-8, with or without a byte order mark.

    Raises:
        ValueError: naming the file, and what is wrong with it.
    """
    try:
        # Not `splitlines`, which takes a form feed or U+2028 within a question for its end.
        return Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"file={path!r}: line {line} is not UTF-8 text; save the file as UTF-8") from error
    except OSError as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise ValueError(f"file={path!r}: {why}") from error


class CacheStreamer(TextStreamer):
    """Writes the text as it comes, and now and then what the cache holds."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, cache: BoundedCache, every: int):
        super().__init__(tokenizer, skip_special_tokens=True)
        self.cache, self.every = cache, every
        self.tokens, self.began = 0, time.perf_counter()

    def put(self, value):
        super().put(value)
        self.tokens += 1
        if self.tokens % self.every == 0:
            self.status()

    def status(self) -> None:
        # What is written so far is dropped: a text without line breaks would be decoded anew with every token.
        self.end()
        held = self.cache.first.keys.shape[2]
        print(
            f"[{self.tokens} tokens; cache {held} tokens, {self.cache.nbytes / 1e6:.2f} MB; "
            f"{self.cache.evictions} evictions; {self.tokens / (time.perf_counter() - self.began):.1f} tokens/s; "
            f"process {psutil.Process().memory_info().rss / 1e6:.0f} MB]",
            file=sys.stderr,
            flush=True,
        )


def prepare(tokenizer: PreTrainedTokenizerBase, question: str, args: GenerateArguments) -> tuple[list[int], Schedule]:
    """The question's tokens and its evictions, both as in an evaluation.

    Raises:
        ValueError: the budget leaves none.
    """
    chat = tokenizer.chat_template is not None
    prompt = make_prompt(question, args.system_prompt, args.system_prompt_role, chat=chat)
    ids = tokens_of(prompt, tokenizer, args.chat_template_kwargs)
    if not args.cache_policy.fits(len(ids)):
        raise ValueError(
            f"budget={args.budget}: nothing is left for the thought, {question!r} has {len(ids)} tokens; allowed is "
            f"{len(ids) + 1} or more"
        )
    return ids, args.cache_policy.schedule(len(ids))


@contextmanager
def finite_logits(model: nn.Module, question: str):
    """Stops at logits of a NaN or an infinity, from which any text could be drawn.

    Raises:
        Fault: naming the question.
    """

    def check(module, inputs, output) -> None:
        # Minus infinity for a single token is no fault: some models rule tokens out so.
        size = output.logits[:, -1].float().logsumexp(-1)
        if not torch.isfinite(size).all():
            raise Fault(
                f"question {tail(question)}: logits are not finite ({size[0].item()}); the model or its adapter is "
                "spoilt"
            )

    hook = model.register_forward_hook(check)
    try:
        yield
    finally:
        hook.remove()


def answer(model, tokenizer, ids: list[int], schedule: Schedule, args: GenerateArguments) -> str:
    """Streams the answer to one question and returns it."""
    cache = BoundedCache.from_schedule(schedule)
    streamer = CacheStreamer(tokenizer, cache, args.status_every)
    ends = () if args.ignore_eos else tuple(eos_token_ids(model, tokenizer))
    sampling = Sampling(args.max_new_tokens, ends, 0, args.temperature, args.top_p)  # one prompt: nothing is padded
    written = []
    for token in stream(model, ids, cache, sampling, args.seed):
        written.append(token)
        streamer.put(torch.tensor([token]))
    streamer.status()
    return tokenizer.decode(written, skip_special_tokens=True)


@framed
def main(argv: list[str] | None = None) -> list[str]:
    with settings_checked():
        (args,) = parse((GenerateArguments,), argv)
        check_needs(args)
        check_evaluation_model(args)
        tokenizer = load_tokenizer(args, args.trust_remote_code)
        prepared = [(question, *prepare(tokenizer, question, args)) for question in args.questions()]
    device = torch.device("cuda" if torch.cuda.is_available() and not args.use_cpu else "cpu")
    with settings_checked():
        model = load_for_evaluation(args, device)
    answers = []
    for question, ids, schedule in prepared:
        print(f"question: {question}", flush=True)
        with finite_logits(model, question):
            answers.append(answer(model, tokenizer, ids, schedule, args))
    return answers
