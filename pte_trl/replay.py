"""The replay view: ONE ordinary forward over prompt + completion that repeats what the decode computed.

A mask gives every token exactly the tokens it saw when it was decoded; the plan says which tokens each eviction
drops and which tokens are decoded under the state it leaves, so that a PTE layer can use the right one. W may
differ from sample to sample.
"""

from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from pte_trl.schedule import Schedule

MASKED_ATTENTION = ("blockwise", "sdpa", "eager")  # attention implementations that take an arbitrary mask
BLOCK = 128  # queries that attend together in `pte_trl.attention`


@dataclass(frozen=True)
class ReplayPlan:
    """Which positions each eviction drops, and which are decoded under the state it leaves.

    Attributes:
        evicted: (batch, J, E_max) positions dropped by eviction 1 .. J; a place that holds no token is `length`.
        users: (batch, J, E_max) positions decoded under S_1 .. S_J.
        start: (batch, completion) position of the oldest thought token each thought token attends to.
        length: prompt and completion tokens, padding included.
        prompt: prompt tokens, padding included.
        blocks: (first query, end, oldest thought position that one of them sees) of runs of BLOCK queries.
    """

    evicted: Tensor
    users: Tensor
    start: Tensor
    length: int
    prompt: int
    blocks: list[tuple[int, int, int]]

    @classmethod
    def build(cls, windows: Tensor, evict_ratio: float, prompt: int, completion: int) -> "ReplayPlan":
        """Args: windows: (batch,) W of each sample; prompt, completion: padded lengths of the two parts."""
        length, device = prompt + completion, windows.device
        schedules = [Schedule(int(window), evict_ratio) for window in windows.tolist()]
        count = max(s.evictions(completion) for s in schedules)
        widest = max(s.evict for s in schedules)

        def positions(ranges: list[range]) -> Tensor:
            """One sample's ranges of thought tokens as (J, E_max) positions."""
            rows = torch.full((count, widest), length, dtype=torch.long)
            for row, thought in zip(rows, ranges, strict=True):
                row[: len(thought)] = torch.arange(prompt + thought.start, prompt + thought.stop).clamp(max=length)
            return rows

        evictions = range(1, count + 1)
        thought = torch.arange(completion)
        start = torch.stack([prompt + s.first_visible(thought) for s in schedules])
        oldest = [prompt] * prompt + start.amin(0).tolist()
        return cls(
            evicted=torch.stack([positions([s.evicted_by(k) for k in evictions]) for s in schedules]).to(device),
            users=torch.stack([positions([s.decoded_under(k) for k in evictions]) for s in schedules]).to(device),
            start=start.to(device),
            length=length,
            prompt=prompt,
            blocks=[(at, min(length, at + BLOCK), oldest[at]) for at in range(0, length, BLOCK)],
        )

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

    def mask(self, attention_mask: Tensor) -> Tensor:
        """(batch, length) padding mask -> (batch, 1, length, length), True where a query sees a key.

        A padded query sees itself, so that no row of the softmax is empty.
        """
        at = torch.arange(self.length, device=self.start.device)
        first = nn.functional.pad(self.start, (self.prompt, 0), value=self.prompt)
        is_prompt = at < self.prompt
        kept = is_prompt | (at >= first.unsqueeze(-1))
        seen = kept & (at <= at.unsqueeze(-1)) & attention_mask.bool().unsqueeze(1)
        return (seen | torch.eye(self.length, dtype=torch.bool, device=at.device)).unsqueeze(1)


def adapters_disabled(model: nn.Module) -> bool:
    """Whether the model runs as its base now (`disable_adapter`), as TRL does for the reference of the KL term."""
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    return bool(layers) and all(layer.disable_adapters for layer in layers)


def config_of(model: nn.Module):
    """The model's configuration, through a wrapper such as DDP."""
    return getattr(model, "config", None) or model.module.config


def mask_for(model: nn.Module, mask: Tensor) -> Tensor:
    """A mask of four dimensions, True where a query sees a key, as the model's attention implementation takes it."""
    if config_of(model)._attn_implementation != "eager":
        return mask
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def replay_inputs(
    model: nn.Module, attention_mask: Tensor, prompt: int, windows: Tensor | int, evict_ratio: float = 0.25
) -> dict:
    """Keyword arguments of `model(input_ids, **...)` that make one forward the replay of a bounded decode.

    Args:
        model: a causal language model: bare, with LoRA, or with PTE.
        attention_mask: (batch, prompt + completion), 0 where padded: prompts on the left, completions on the right.
        prompt: padded length of the prompts.
        windows: W of every sample, (batch,), or one for all.
        evict_ratio: as in the rollout.

    Raises:
        ValueError: the model's attention takes no arbitrary mask.
    """
    config = config_of(model)
    if config._attn_implementation not in MASKED_ATTENTION:
        raise ValueError(
            f"attn_implementation={config._attn_implementation!r}: a replay needs an arbitrary attention mask; "
            f"allowed are {', '.join(map(repr, MASKED_ATTENTION))}"
        )
    batch, length = attention_mask.shape
    windows = torch.as_tensor(windows, device=attention_mask.device).expand(batch)
    plan = ReplayPlan.build(windows, evict_ratio, prompt, length - prompt)
    mask = mask_for(model, plan.mask(attention_mask))
    position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    return {"attention_mask": mask, "position_ids": position_ids, "use_cache": False, "replay": plan}
