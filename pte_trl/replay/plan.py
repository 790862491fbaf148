"""The replay view: ONE ordinary forward over prompt + completion that repeats what the decode computed.

A mask gives every token exactly the tokens it saw when it was decoded; the plan says which tokens each eviction
drops and which tokens are decoded under the state it leaves, so that a PTE layer can use the right one. W may differ
from sample to sample.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from pte_trl.cache.masks import BLOCKWISE, check_mask_taken, config_of, mask_for, masks_by_type, sliding_window_of
from pte_trl.cache.schedule import Schedule
from pte_trl.replay.blocks import Group, bias, groups_of
from pte_trl.transfer import uploaded


@dataclass(frozen=True)
class Places:
    """Tokens that a plan names, as indices into (batch * length, d); none is named twice.

    Attributes:
        source: (batch * J * E_max) row to read; any where the place is empty.
        target: (batch * J * E_max) row to write; the one behind the last where the place is empty.
        filled: (batch, J, E_max, 1), False where the place is empty.
        unnamed: (batch, length, 1), True for tokens that are not named.
    """

    source: Tensor
    target: Tensor
    filled: Tensor
    unnamed: Tensor

    @classmethod
    def of(cls, places: Tensor, length: int) -> "Places":
        """Of positions (batch, J, E_max), `length` where empty."""
        batch, filled = len(places), places < length
        row = places + length * torch.arange(batch, device=places.device).view(-1, 1, 1)
        target = row.masked_fill(~filled, batch * length).flatten()
        unnamed = torch.ones(batch * length + 1, dtype=torch.bool, device=places.device)
        unnamed.index_fill_(0, target, False)  # an index with a number would wait for the device
        source = target.clamp(max=batch * length - 1)
        return cls(source, target, filled.unsqueeze(3), unnamed[:-1].view(batch, length, 1))

    def read(self, x: Tensor, zeros: bool = True) -> Tensor:
        """(batch, length, d) -> (batch, J, E_max, d); empty places hold zeros, or anything."""
        rows = x.reshape(-1, x.shape[-1]).index_select(0, self.source).view(*self.filled.shape[:3], -1)
        return rows * self.filled if zeros else rows

    @staticmethod
    def with_spare(x: Tensor, width: int) -> Tensor:
        """Unwritten rows for the tokens of x, (batch * length + 1, width)."""
        return x.new_empty(x.shape[:2].numel() + 1, width)

    def write(self, out: Tensor, rows: Tensor) -> None:
        """Writes rows (batch, J, E_max, d) to their tokens in (batch * length + 1, d)."""
        out.index_copy_(0, self.target, rows.flatten(0, 2))


@dataclass(frozen=True)
class ReplayPlan:
    """Which positions each eviction drops, and which are decoded under the state it leaves.

    Attributes:
        evicted: (batch, J, E_max) positions dropped by eviction 1 .. J; a place that holds no token is `length`.
        users: (batch, J, E_max) positions decoded under S_1 .. S_J.
        first: (batch, length) position of the oldest thought token that each token attends to.
        real: (batch, length), False where padded.
        prompt: prompt tokens, padding included.
        window: the most thought tokens that a token attends to.
        sliding: window of the model's own sliding layers, in tokens; None if it has none.
    """

    evicted: Tensor
    users: Tensor
    first: Tensor
    real: Tensor
    prompt: int
    window: int
    sliding: int | None = None

    @classmethod
    def build(
        cls, schedules: Sequence[Schedule], prompt: int, attention_mask: Tensor, sliding: int | None = None
    ) -> "ReplayPlan":
        """The plan of a batch.

        Args:
            schedules: of every sample.
            prompt: padded length of the prompts.
            attention_mask: (batch, length), 0 where padded.
            sliding: window of the model's own sliding layers.
        """
        length, device = attention_mask.shape[1], attention_mask.device
        count = max(s.evictions(length - prompt) for s in schedules)
        evict = torch.tensor([s.evict for s in schedules]).view(-1, 1, 1)
        within = torch.arange(int(evict.max()))

        def positions(begin: list[int]) -> Tensor:
            """(batch, J, E_max): E tokens from thought `begin` on, then the E after them, J times."""
            at = torch.tensor(begin).view(-1, 1, 1) + evict * torch.arange(count).view(-1, 1) + within
            return uploaded((prompt + at).masked_fill(within >= evict, length).clamp(max=length), device)

        thought = torch.arange(length - prompt)
        first = torch.stack([prompt + s.first_visible(thought) for s in schedules])
        return cls(
            evicted=positions([s.evicted_by(1).start for s in schedules]),
            users=positions([s.decoded_under(1).start for s in schedules]),
            first=uploaded(nn.functional.pad(first, (prompt, 0), value=prompt), device),
            real=attention_mask.bool(),
            prompt=prompt,
            window=1 + max((prompt + thought - first).flatten().tolist(), default=0),
            sliding=sliding,
        )

    def __reduce__(self):
        """A copy or a pickle is without what is kept for the layers: it is made again, and may hold functions."""
        return ReplayPlan, tuple(getattr(self, field.name) for field in fields(self))

    @property
    def length(self) -> int:
        """Prompt and completion tokens, padding included."""
        return self.real.shape[1]

    @cached_property
    def of_sliding(self) -> "ReplayPlan":
        """What the queries of a sliding layer see: its last tokens, those of the prompt like any others."""
        first = torch.arange(self.length, device=self.real.device) - self.sliding + 1
        first, none = first.clamp(min=0).repeat(len(self.real), 1), self.evicted[:, :0]
        return ReplayPlan(none, none, first, self.real, prompt=0, window=min(self.sliding, self.length))

    @cached_property  # of all layers
    def blocks(self) -> list[Group]:
        """How the queries attend together. The masks grow with the length, not with its square."""
        return groups_of(self.length, self.prompt, self.window, self.seen, self.real.device)

    @cached_property
    def _kept(self) -> dict[Hashable, Any]:
        return {}

    def kept(self, name: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` returns, made once for all layers and kept with the plan under a name."""
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    def kept_of(self, source: Tensor, name: Hashable, make: Callable[[], Any]) -> Any:
        """`kept` for what is made from `source`; made again for another tensor, as of another layer."""
        if self._kept.get(name, (None,))[0] is not source:
            self._kept[name] = source, make()
        return self._kept[name][1]

    def biases(self, dtype: torch.dtype) -> list[Tensor]:
        """The masks of `blocks` as fused kernels take them."""
        return self.kept(dtype, lambda: [bias(group.mask, dtype) for group in self.blocks])

    def mask(self) -> Tensor:
        """(batch, 1, length, length), True where a query sees a key: what `blocks` is tested against."""
        at = torch.arange(self.length, device=self.real.device)
        return self.seen(at[:, None], at[None]).unsqueeze(1)

    def seen(self, query: Tensor, key: Tensor) -> Tensor:
        """Which keys the queries see. A padded query sees itself, so that no row of the softmax is empty.

        Args:
            query, key: positions, (..., n, 1) and (..., 1, m).

        Returns:
            (batch, ..., n, m).
        """
        kept = (key < self.prompt) | (key >= self.first[:, query])
        return (kept & (key <= query) & self.real[:, key]) | (key == query)

    @property
    def count(self) -> int:
        """J, the most evictions of a sample."""
        return self.evicted.shape[1]

    def places(self, which: str) -> Places:
        """Of "evicted" or "users"."""
        return self.kept(which, lambda: Places.of(getattr(self, which), self.length))

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
    attention, config = check_mask_taken(model), config_of(model)
    if isinstance(schedules, Schedule):
        schedules = [schedules] * len(attention_mask)
    plan = ReplayPlan.build(schedules, prompt, attention_mask, sliding_window_of(config))
    sliding = None
    if attention in BLOCKWISE:
        # These have masks of their own, so padding is all that is left to mask; transformers passes on a mask of four
        # dimensions as it is. The rows, 1 or none, say whether the layer is full or sliding (`plan_of`).
        full = plan.real[:, None, None]
        sliding = full[:, :, :0]
    else:
        full = mask_for(model, plan.mask())
    mask = masks_by_type(model, attention_mask, full, sliding)
    position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    return {"attention_mask": mask, "position_ids": position_ids, "use_cache": False, "replay": plan}


def plan_of(mask: Tensor | None, replay: ReplayPlan) -> ReplayPlan | None:
    """What the queries of a layer see, by the mask of `replay_inputs` that the layer was given.

    Args:
        mask: (batch, 1, rows, length) as an attention that reads the plan is given it; None is that of a full layer.

    Returns:
        None where the mask itself says what is seen, (batch, 1, length, length).
    """
    rows = 1 if mask is None else mask.shape[2]
    if rows == 0:
        return replay.of_sliding
    return replay if rows == 1 else None
