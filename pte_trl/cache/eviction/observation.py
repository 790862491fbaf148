"""Selection by an observation window, which PyramidKV and HeadKV share (SnapKV's, arXiv 2404.14469)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from pte_trl.cache.eviction.strategy import Strategy


@dataclass
class ObservationWindow(Strategy):
    """Entries that the last few queries attend to least leave; the tokens of these queries are protected.

    Source: SnapKV, arXiv 2404.14469, its method: attention of the queries of the observation window, summed over
    them, then max-pooled over neighbouring tokens so that the surroundings of an important token stay with it.

    Args:
        observe: queries of the observation window; fewer in a head whose capacity is below twice that.
        kernel: width of the pooling in tokens, odd; 1 is no pooling.

    Adaptations: the papers select once, at the end of the prompt; here every eviction selects anew, among the
    thoughts. Neighbours are neighbours in the text: a token that has left counts as 0. With grouped queries the
    attention is summed over the query heads of a kv head. At most half of a head's capacity is observation window:
    with all of it protected there would be nothing to select.
    """

    observe: int = 8
    kernel: int = 7

    def __post_init__(self):
        if self.observe < 1:
            raise ValueError(f"observe={self.observe!r}: must be at least 1 (queries)")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel!r}: must be odd and at least 1 (tokens)")

    def remember(self, past: Tensor | None, now: Tensor) -> Tensor:
        return now if past is None else torch.cat([past, now], dim=2)[:, :, -self.observe :]

    def order(self, past: Tensor, alive: Tensor, age: Tensor, capacity: Tensor) -> tuple[Tensor, Tensor]:
        width = (capacity // 2).clamp(1, self.observe)
        query_age = torch.arange(past.shape[2] - 1, -1, -1, device=past.device).unsqueeze(1)
        protected = (age < width).expand_as(alive)
        scores = (past * (query_age < width.unsqueeze(2))).sum(2).masked_fill(protected | ~alive, 0)
        return self.pool(scores, age.expand_as(alive)), protected

    def pool(self, scores: Tensor, age: Tensor) -> Tensor:
        """Largest score within kernel // 2 tokens of the text, (batch, kv heads, kept) -> the same shape."""
        # Laid out by age. Dead places hold 0 and may share a cell with anything.
        text = scores.new_zeros(*scores.shape[:2], int(age.max()) + 1).scatter_add(2, age, scores)
        return max_pool1d(text, self.kernel, stride=1, padding=self.kernel // 2).gather(2, age)
