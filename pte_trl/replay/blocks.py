"""How the queries of a replay are cut: which of them go through an attention kernel together, with which keys.

Up to prompt + R tokens the window forgets nothing, and queries see the keys from the first one on, in runs of RUN.
After that come blocks of BLOCK queries. A block's keys are the prompt and the R thought tokens up to its end; R is
the same for all of them, so that BATCHED blocks are one batch for the kernel. The masks say what of it is visible.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128  # queries of a block
RUN = 256  # queries that attend together where nothing has been forgotten
BATCHED = 8  # blocks in one batch: their keys and values are copied for it, which takes memory
ALIGNED = 16  # rows of a mask begin at multiples of so many elements, which fused kernels on GPUs ask for


@dataclass(frozen=True)
class Group:
    """Blocks of queries that go through the kernel as one batch.

    Attributes:
        start, stop: all its queries.
        count: blocks of (stop - start) / count queries each.
        prompt: prompt tokens that they all see; 0 where `reach` is None.
        reach: thought tokens up to its end that a block sees; None: a single block that sees everything up to there.
        mask: (batch * count, 1, queries of a block, keys), True where a query sees a key.
    """

    start: int
    stop: int
    count: int
    prompt: int
    reach: int | None
    mask: Tensor

    @property
    def size(self) -> int:
        """Queries of a block."""
        return (self.stop - self.start) // self.count

    def queries(self, x: Tensor) -> Tensor:
        """(batch, heads, length, d) -> (batch * count, heads, size, d)."""
        x = x.transpose(1, 2)[:, self.start : self.stop]
        return x.reshape(-1, self.size, *x.shape[2:]).transpose(1, 2)

    def joined(self, x: Tensor) -> Tensor:
        """Back again: (batch * count, heads, size, d) -> (batch, heads, stop - start, d)."""
        x = x.transpose(1, 2)
        return x.reshape(-1, self.stop - self.start, *x.shape[2:]).transpose(1, 2)

    def keys(self, x: Tensor, shared: int) -> Tensor:
        """(batch, kv heads, length, d) -> (batch * count, heads, keys, d), each kv head for `shared` query heads."""
        x = x.transpose(1, 2)
        batch, _, heads, width = x.shape
        if self.reach is None:
            parts = [x[:, None, : self.stop]]
        else:
            windows = x[:, self.start + self.size - self.reach : self.stop].unfold(1, self.reach, self.size)
            parts = [x[:, None, : self.prompt].expand(-1, self.count, -1, -1, -1), windows.movedim(-1, 2)]
        if shared > 1:
            parts = [part.unsqueeze(4).expand(-1, -1, -1, -1, shared, -1) for part in parts]
        seen = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
        return seen.reshape(batch * self.count, -1, heads * shared, width).transpose(1, 2)

    def add_gradient(self, total: Tensor, grad: Tensor) -> None:
        """Adds the gradient of `keys` to that of its argument.

        Args:
            total: (batch, length, kv heads, d), changed in place.
            grad: (batch * count, heads, keys, d).
        """
        batch, _, heads, width = total.shape
        grad = grad.transpose(1, 2).reshape(batch, self.count, -1, heads, grad.shape[1] // heads, width)
        grad = grad.sum(4) if grad.shape[4] > 1 else grad.squeeze(4)
        if self.reach is None:
            total[:, : self.stop].add_(grad[:, 0])
            return
        total[:, : self.prompt].add_(grad[:, :, : self.prompt].sum(1))
        # Windows of neighbours overlap. Columns of `size` do not, and there are few of them; the oldest is narrower.
        window, size = grad[:, :, self.prompt :], self.size
        first, width = self.start + size - self.reach, self.reach % size or size
        begin = 0
        while begin < self.reach:
            at = first + begin
            place = total[:, at : at + self.count * size].unflatten(1, (self.count, size))
            place[:, :, :width].add_(window[:, :, begin : begin + width])
            begin, width = begin + width, size


def up(number: int, multiple: int) -> int:
    """The smallest multiple that is not below the number."""
    return -(-number // multiple) * multiple


def reach_of(prompt: int, window: int, size: int) -> int:
    """R: thought tokens that some query of a block sees, and up to 15 more, so that rows of a mask are aligned."""
    return up(prompt + window - 1 + size, ALIGNED) - prompt


def groups_of(
    length: int, prompt: int, window: int, seen: Callable[[Tensor, Tensor], Tensor], device: torch.device
) -> list[Group]:
    """All queries of a replay, in order.

    Args:
        length: prompt and completion tokens.
        window: the most thought tokens that a token sees, itself included.
        seen: positions of queries (..., n, 1) and of keys (..., 1, m) -> (batch, ..., n, m), True where seen.
        device: of the positions.
    """
    at = torch.arange(length, device=device)
    groups, whole = [], min(length, prompt + reach_of(prompt, window, BLOCK))
    for start in range(0, whole, RUN):
        stop = min(start + RUN, whole)
        mask = seen(at[start:stop, None], at[None, :stop])
        groups.append(Group(start, stop, 1, 0, None, mask.unsqueeze(1)))
    blocks, rest = divmod(length - whole, BLOCK)
    cuts = [(whole + n * BLOCK, min(BATCHED, blocks - n), BLOCK) for n in range(0, blocks, BATCHED)]
    cuts += [(length - rest, 1, rest)] if rest else []
    for start, count, size in cuts:
        stop, reach = start + count * size, reach_of(prompt, window, size)
        query = at[start:stop].view(count, size, 1)
        windows = at[start + size - reach : stop].unfold(0, reach, size).unsqueeze(1)
        keys = torch.cat([at[:prompt].expand(count, 1, -1), windows], dim=2)
        groups.append(Group(start, stop, count, prompt, reach, seen(query, keys).flatten(0, 1).unsqueeze(1)))
    return groups


def bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores: 0 where seen, -inf where not; rows begin at multiples of `ALIGNED`."""
    *rows, keys = mask.shape
    storage = torch.zeros(*rows, up(keys, ALIGNED), dtype=dtype, device=mask.device)
    return storage[..., :keys].masked_fill_(~mask, float("-inf"))
