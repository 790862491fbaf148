"""HeadKV: more for the heads that retrieve."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pte_trl.cache.eviction.importance import load_importance, measure_importance
from pte_trl.cache.eviction.observation import ObservationWindow


@dataclass
class HeadKV(ObservationWindow):
    """Every kv head gets a base share, and a part of a pool in proportion to its importance for retrieval.

    Source: "Not All Heads Matter: A Head-Level KV Cache Compression Method with Integrated Retrieval and Reasoning",
    arXiv 2410.19258, its method (head importance, allocation, selection), and the official code (FYYFU/HeadKV).
    Beside the observation window the mean share is b = W - observe: b - b / beta for every head, and b / beta times
    the number of heads for the pool. Selection is by the observation window.

    Args:
        beta: 1 / beta of the mean share goes into the pool, at least 1. The official runs try 1.005 to 10; 2 is our
            choice, not stated in the paper.
        importance: (layers, kv heads) numbers of at least 0, their scale does not matter; or the path of a file that
            `save_importance` wrote; or None: measured once, when the first cache is made for a model. Hand in one
            instance for many rollouts to measure only once.
        observe, kernel: of the observation window (`ObservationWindow`).

    Adaptations: HeadKV compresses a prompt once, before decoding; here it bounds the thought while it is decoded.
    Importance is measured by our own test on random tokens (`importance.py`), not on the paper's questions, and
    belongs to kv heads. See `ObservationWindow` for the rest.
    """

    beta: float = 2.0
    importance: list[list[float]] | str | Path | None = None

    def __post_init__(self):
        super().__post_init__()
        if not self.beta >= 1:
            raise ValueError(f"beta={self.beta!r}: must be at least 1")
        if isinstance(self.importance, (str, Path)):
            self.importance = load_importance(self.importance)

    def prepare(self, model: nn.Module) -> None:
        if self.importance is None:
            self.importance = measure_importance(model)

    def shares(self, layers: int, heads: int, window: int, longest: int | None) -> Tensor:
        if self.importance is None:
            raise ValueError("importance=None: call prepare(model) first, or give the importance of every kv head")
        weights = torch.tensor(self.importance, dtype=torch.float64)
        if weights.shape != (layers, heads):
            raise ValueError(
                f"importance of {' x '.join(map(str, weights.shape))} heads, but the model has {layers} layers of "
                f"{heads} kv heads: it was measured on another model"
            )
        weights = weights / weights.sum() if weights.sum() > 0 else torch.full_like(weights, 1 / weights.numel())
        observed = min(self.observe, window // 2)
        mean = window - observed
        pool = mean / self.beta
        # A share of exactly 0 could not be scaled up when others are cut at `longest`.
        return (observed + mean - pool + weights * weights.numel() * pool).clamp(min=1e-3)
