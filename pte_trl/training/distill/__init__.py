"""Cache distillation: the bounded policy is taught to be the policy that sees everything."""

from pte_trl.training.distill.config import PteDistillConfig
from pte_trl.training.distill.trainer import PteDistillationTrainer

__all__ = ["PteDistillConfig", "PteDistillationTrainer"]
