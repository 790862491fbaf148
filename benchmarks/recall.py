"""The probe's task: digits are told in the thought, leave the window, and are asked for afterwards.

One sequence, prompt | thought:

    . , ; .  |  c=3 a=7 d=7 b=0  . ; , ...  d 7 a 7 c 3 b 0

The thought draws a random digit for every name, in random order ("c=3" is one token). Filler follows until the
schedule has evicted all of them; only then are they asked for, each name once. Nothing leaks: the prompt holds
neither digits nor questions, a digit follows from nothing but its pair, and the answers to earlier questions are
about other names. Nor can a digit be handed on: a token of layer l sees what its window held in layer l - 1, so with
L layers whatever lies within L windows can still be reached through the tokens in between. The filler is longer than
that. So whatever sees the window alone is at chance, 0.10, whatever it learns.
"""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pte_trl.cache.schedule import Schedule
from pte_trl.replay.plan import replay_inputs

DIGITS = 10
FILLERS = 4
PROMPT = 4


@dataclass(frozen=True)
class Recall:
    """The task. Tokens: digits, fillers, names, then one token for every pair of a name and a digit.

    Args:
        names: digits to remember, all asked for.
        schedule: when which thought token leaves.
        layers: of the model.
    """

    names: int
    schedule: Schedule
    layers: int

    @property
    def vocabulary(self) -> int:
        return DIGITS + FILLERS + self.names + self.names * DIGITS

    @property
    def filler(self) -> int:
        """Fewest filler tokens after which no path through the layers leads from a question back to a pair."""
        filler = 0
        while self._reach(self.names + filler) < self.names:
            filler += 1
        return filler

    def _reach(self, token: int) -> int:
        """The oldest thought token that can have any effect on `token` but through the state."""
        for _ in range(self.layers):
            token = self.schedule.first_visible(token)
        return token

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(batch, length) tokens, and the positions of the answers."""

        def ints(low: int, high: int, width: int) -> Tensor:
            return torch.randint(low, high, (batch, width), generator=generator)

        def orders() -> Tensor:
            return torch.rand(batch, self.names, generator=generator).argsort(1)

        first_name = DIGITS + FILLERS
        first_pair = first_name + self.names
        digits, told, asked = ints(0, DIGITS, self.names), orders(), orders()
        pairs = first_pair + told * DIGITS + digits.gather(1, told)
        asks = torch.stack([first_name + asked, digits.gather(1, asked)], dim=2).flatten(1)
        tokens = torch.cat(
            [ints(DIGITS, first_name, PROMPT), pairs, ints(DIGITS, first_name, self.filler), asks], dim=1
        )
        return tokens, PROMPT + self.names + self.filler + 2 * torch.arange(self.names) + 1


def inputs_of(model: nn.Module, tokens: Tensor, schedule: Schedule | None) -> dict:
    """Under the window of `schedule`, or with full attention."""
    mask = torch.ones_like(tokens)
    if schedule is None:
        return {"attention_mask": mask, "use_cache": False}
    return replay_inputs(model, mask, PROMPT, schedule)


def answers(model: nn.Module, tokens: Tensor, places: Tensor, schedule: Schedule | None) -> tuple[Tensor, Tensor]:
    """Logits at the tokens that predict the answers, and the answers."""
    logits = model(input_ids=tokens, **inputs_of(model, tokens, schedule)).logits
    return logits[:, places - 1], tokens[:, places]


@torch.no_grad()
def recall(model: nn.Module, task: Recall, schedule: Schedule | None, samples: int = 1024) -> float:
    """Share of right answers, on sequences drawn for the test alone."""
    tokens, places = task.draw(samples, torch.Generator().manual_seed(2**31))
    logits, gold = answers(model, tokens, places, schedule)
    return (logits.argmax(-1) == gold).float().mean().item()


def train(model, task, schedule, steps: int, batch: int, rate: float, seed: int, name: str) -> float:
    """Cross-entropy on the answers, Adam with a short warm-up and a cosine to a tenth; seconds."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    shape = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
    )
    began = time.perf_counter()
    for step in range(1, steps + 1):
        logits, gold = answers(model, *task.draw(batch, generator), schedule)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), gold.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        shape.step()
        if step % 50 == 0:
            right = (logits.argmax(-1) == gold).float().mean().item()
            print(f"  {name} step {step}: loss {loss.item():.3f}, recall in the batch {right:.2f}", flush=True)
    return time.perf_counter() - began
