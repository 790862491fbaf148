"""What a distillation recipe can say beside `RecipeArguments`."""

from dataclasses import dataclass, field

from trl import DistillationConfig

from pte_trl.settings.extras import check_extra
from pte_trl.settings.limits import SHARE, check_values, choice
from pte_trl.training.config import check_resume, check_sampling, read_numbers


@dataclass
class PteDistillConfig(DistillationConfig):
    """TRL's `DistillationConfig` with the student's method and cache policy; the teacher is the base, full cache."""

    method: str = field(default="pte", metadata={"help": "The student: pte or lora_c."})
    window: str | None = field(default=None, metadata={"help": "W, thought tokens kept; auto: longest prompt."})
    budget: int | None = field(default=None, metadata={"help": "Prompt and thought tokens kept, instead of window."})
    evict_ratio: float = field(default=0.25, metadata={"help": "Share of a full window that leaves at once."})
    rollout_batch_size: str | None = field(
        default="auto", metadata={"help": "Completions decoded at once: a number, or auto for what memory allows."}
    )
    on_policy: bool = field(default=False, metadata={"help": "The student writes the completions, not the teacher."})
    distilled_tokens: str = field(default="all", metadata={"help": "all or after_eviction: those in the loss."})
    beta: float = field(
        default=0.0, metadata={"help": "0: forward KL(teacher || student); 1: reverse; between: generalised JSD."}
    )
    resume: str = field(
        default="auto", metadata={"help": "auto: from the newest complete checkpoint; never; or a checkpoint's PATH."}
    )

    def __post_init__(self):
        read_numbers(self)
        # beta: 0 is the forward KL, 1 the reverse one.
        check_values(self, method=choice("pte", "lora_c"), beta=SHARE)
        check_sampling(self)
        if self.deepspeed:
            check_extra("deepspeed", f"deepspeed={self.deepspeed!r}")
        super().__post_init__()
        check_resume(self)
