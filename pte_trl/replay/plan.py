"""The replay view: ONE ordinary forward over prompt + completion that repeats what the decode computed.

A mask gives every token exactly the tokens it saw when it was decoded; the plan says which tokens each eviction
drops and which tokens are decoded under the state it leaves, so that a PTE layer can use the right one. W may differ
from sample to sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from pte_trl.cache.masks import check_mask_taken, mask_for
from pte_trl.cache.schedule import Schedule

BLOCK = 128  # queries that attend together in `pte_trl.replay.attention`


@dataclass(frozen=True)
class Block:
    """A run of queries that attend together.

    Attributes:
        start, stop: the queries.
        oldest: the first position behind the prompt that one of them sees; they see the prompt, and oldest .. stop.
        mask: (batch, 1, queries, keys), True where a query sees a key; keys are the prompt, then oldest .. stop.
    """

    start: int
    stop: int
    oldest: int
    mask: Tensor


@dataclass(frozen=True)
class ReplayPlan:
    """Which positions each eviction drops, and which are decoded under the state it leaves.

    Attributes:
        evicted: (batch, J, E_max) positions dropped by eviction 1 .. J; a place that holds no token is `length`.
        users: (batch, J, E_max) positions decoded under S_1 .. S_J.
        first: (batch, length) position of the oldest thought token that each token attends to.
        real: (batch, length), False where padded.
        prompt: prompt tokens, padding included.
    """

    evicted: Tensor
    users: Tensor
    first: Tensor
    real: Tensor
    prompt: int

    @classmethod
    def build(cls, schedules: Sequence[Schedule], prompt: int, attention_mask: Tensor) -> "ReplayPlan":
        """The plan of a batch.

        Args:
            schedules: of every sample.
            prompt: padded length of the prompts.
            attention_mask: (batch, length), 0 where padded.
        """
        length, device = attention_mask.shape[1], attention_mask.device
        count = max(s.evictions(length - prompt) for s in schedules)
        evict = torch.tensor([s.evict for s in schedules]).view(-1, 1, 1)
        within = torch.arange(int(evict.max()))

        def positions(begin: list[int]) -> Tensor:
            """(batch, J, E_max): E tokens from thought `begin` on, then the E after them, J times."""
            at = torch.tensor(begin).view(-1, 1, 1) + evict * torch.arange(count).view(-1, 1) + within
            return (prompt + at).masked_fill(within >= evict, length).clamp(max=length).to(device)

        thought = torch.arange(length - prompt)
        first = torch.stack([prompt + s.first_visible(thought) for s in schedules])
        return cls(
            evicted=positions([s.evicted_by(1).start for s in schedules]),
            users=positions([s.decoded_under(1).start for s in schedules]),
            first=nn.functional.pad(first, (prompt, 0), value=prompt).to(device),
            real=attention_mask.bool(),
            prompt=prompt,
        )

    @property
    def length(self) -> int:
        """Prompt and completion tokens, padding included."""
        return self.real.shape[1]

    @cached_property  # of all layers
    def blocks(self) -> list[Block]:
        """Runs of BLOCK queries, the last one shorter. Their masks grow with the length, not with its square."""
        oldest = self.first.amin(0)[::BLOCK].tolist()
        ends = [*range(BLOCK, self.length, BLOCK), self.length]
        return [
            Block(at, end, old, self._seen(at, end, old))
            for at, end, old in zip(range(0, self.length, BLOCK), ends, oldest, strict=True)
        ]

    def mask(self) -> Tensor:
        """(batch, 1, length, length), True where a query sees a key: what `blocks` is tested against."""
        return self._seen(0, self.length, self.prompt)

    def _seen(self, start: int, stop: int, oldest: int) -> Tensor:
        """The mask of a `Block`. A padded query sees itself, so that no row of the softmax is empty."""
        at = torch.arange(self.length, device=self.real.device)
        query, key = at[start:stop].unsqueeze(1), torch.cat([at[: min(self.prompt, stop)], at[oldest:stop]])
        kept = (key < self.prompt) | (key >= self.first[:, start:stop].unsqueeze(2))
        return ((kept & (key <= query) & self.real[:, key].unsqueeze(1)) | (key == query)).unsqueeze(1)

    @property
    def count(self) -> int:
        """J, the most evictions of a sample."""
        return self.evicted.shape[1]

    def pick(self, x: Tensor, places: Tensor) -> Tensor:
        """x (batch, length, d) at `places` (batch, …) -> (batch, …, d); zero where there is no token."""
        padded = nn.functional.pad(x, (0, 0, 0, 1))
        index = places.flatten(1).unsqueeze(-1).expand(-1, -1, x.shape[-1])
        return padded.gather(1, index).view(*places.shape, x.shape[-1])

    def put(self, x: Tensor, places: Tensor, rows: Tensor) -> Tensor:
        """x with `rows` (batch, …, d) written at `places`; a new tensor, `x` is left alone."""
        padded = nn.functional.pad(x, (0, 0, 0, 1))
        index = places.flatten(1).unsqueeze(-1).expand(-1, -1, x.shape[-1])
        return padded.scatter(1, index, rows.to(x.dtype).flatten(1, -2))[:, :-1]


def replay_inputs(
    model: nn.Module, attention_mask: Tensor, prompt: int, schedules: Schedule | Sequence[Schedule]
) -> dict:
    """Keyword arguments of `model(input_ids, **...)` that make one forward the replay of a bounded decode.

    Args:
        model: a causal language model: bare, with LoRA, or with PTE.
        attention_mask: (batch, prompt + completion), 0 where padded: prompts on the left, completions on the right.
        prompt: padded length of the prompts.
        schedules: that each sample was decoded under, or one for all (`CachePolicy.schedule`).

    Raises:
        ValueError: the model's attention takes no arbitrary mask.
    """
    attention = check_mask_taken(model)
    if isinstance(schedules, Schedule):
        schedules = [schedules] * len(attention_mask)
    plan = ReplayPlan.build(schedules, prompt, attention_mask)
    # The blocks have masks of their own, so padding is all that is left to mask; transformers passes on a mask of four
    # dimensions as it is.
    mask = plan.real[:, None, None] if attention == "blockwise" else mask_for(model, plan.mask())
    position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    return {"attention_mask": mask, "position_ids": position_ids, "use_cache": False, "replay": plan}
