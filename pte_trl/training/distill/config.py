"""The keys of a distillation recipe that are not in `RecipeArguments`."""

from dataclasses import dataclass, field
from typing import ClassVar

from trl import DistillationConfig

from pte_trl.settings.limits import SHARE, Limit, choice
from pte_trl.training.config import BoundedTrainingConfig


@dataclass
class PteDistillConfig(BoundedTrainingConfig, DistillationConfig):
    """TRL's `DistillationConfig` with the student's method and cache policy; the teacher is the base, full cache."""

    # beta: 0 is the forward KL, 1 the reverse one.
    limits: ClassVar[dict[str, Limit]] = {"method": choice("pte", "lora_c"), "beta": SHARE}

    method: str = field(default="pte", metadata={"help": "The student: pte or lora_c."})
    on_policy: bool = field(default=False, metadata={"help": "The student writes the completions, not the teacher."})
    distilled_tokens: str = field(default="all", metadata={"help": "all or after_eviction: those in the loss."})
    beta: float = field(
        default=0.0, metadata={"help": "0: forward KL(teacher || student); 1: reverse; between: generalised JSD."}
    )
