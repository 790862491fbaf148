"""Progressive Thought Encoding (arXiv 2602.16839) for TRL: bounded-cache rollouts, replayed exactly.

    from pte_trl import PteConfig, PteGRPOConfig, PteGRPOTrainer

Importing the package makes PEFT know the adapter (`PeftModel.from_pretrained` loads it), transformers the attention
`blockwise`, and `generate` the bounded cache. What needs TRL is imported when it is asked for.
"""

import importlib

from pte_trl.adapter import PteConfig  # registers the adapter
from pte_trl.cache import BoundedCache, CachePolicy  # teaches `generate` the bounded cache
from pte_trl.replay import flex as _flex  # noqa: F401 (registers the attentions)

# Where the names live that need TRL, or that not everyone needs.
_LATER = {
    "AccuracyReward": "pte_trl.rewards.functions",
    "PteDistillConfig": "pte_trl.training.distill.config",
    "PteDistillationTrainer": "pte_trl.training.distill.trainer",
    "PteGRPOConfig": "pte_trl.training.config",
    "PteGRPOTrainer": "pte_trl.training.trainer",
    "rollout": "pte_trl.rollouts.rollout",
}

__all__ = ["BoundedCache", "CachePolicy", "PteConfig", *_LATER]


def __getattr__(name: str):
    if name not in _LATER:
        raise AttributeError(f"module 'pte_trl' has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
