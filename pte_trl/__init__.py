"""Progressive Thought Encoding (arXiv 2602.16839) for TRL: bounded-cache rollouts, replayed exactly."""

from pte_trl import attention  # registers the attention implementation
from pte_trl.adapter import PteConfig, PteModel
from pte_trl.cache import BoundedCache
from pte_trl.decoding import feed  # teaches `generate` the bounded cache
from pte_trl.replay import ReplayPlan, replay_inputs
from pte_trl.schedule import Schedule

__all__ = ["BoundedCache", "PteConfig", "PteModel", "ReplayPlan", "Schedule", "attention", "feed", "replay_inputs"]
