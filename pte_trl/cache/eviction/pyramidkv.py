"""PyramidKV: more for the lower layers, less for the upper ones."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pte_trl.cache.eviction.observation import ObservationWindow


@dataclass
class PyramidKV(ObservationWindow):
    """Capacities fall in equal steps from the first layer to the last; selection by the observation window.

    Source: "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling", arXiv 2406.02069,
    its section on the method (budget allocation and selection), and the official code (KVCache-Factory). Beside the
    observation window, which every layer keeps, the mean share is W - observe; the last layer gets 1 / beta of it,
    the first twice the mean less that. A share longer than the thought is cut and the last layer's grows by as much.

    Args:
        beta: steepness, at least 1; 1 is flat, the official code uses 20.
        observe, kernel: of the observation window (`ObservationWindow`); 8 and 7, as the official runs use.

    Adaptations: PyramidKV compresses a prompt once, before decoding. Here it bounds the thought while it is decoded:
    the prompt stays, and every eviction selects anew. See `ObservationWindow` for the rest.
    """

    beta: float = 20.0

    def __post_init__(self):
        super().__post_init__()
        if not self.beta >= 1:
            raise ValueError(f"beta={self.beta!r}: must be at least 1")

    def shares(self, layers: int, heads: int, window: int, longest: int | None) -> Tensor:
        observed = min(self.observe, window // 2)
        mean = window - observed
        first = 2 * mean - mean / self.beta
        if longest is not None:
            first = min(first, longest - observed)
        return observed + torch.linspace(first, 2 * mean - first, layers, dtype=torch.float64).unsqueeze(1)
