"""What a distillation recipe can say beside `RecipeArguments`."""

from dataclasses import dataclass, field

from trl import DistillationConfig

from pte_trl.adapter.config import one_of
from pte_trl.config import check_resume, check_sampling, read_numbers

STUDENTS = ("pte", "lora_c")
TOKENS = ("all", "after_eviction")


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
        check_distillation(self)
        super().__post_init__()
        check_resume(self)


def check_distillation(args: PteDistillConfig) -> None:
    """Refuses what cannot teach, or would teach another policy than the one that is run.

    Raises:
        ValueError: naming the key, its value and what is allowed.
    """
    one_of("method", args.method, STUDENTS)
    one_of("distilled_tokens", args.distilled_tokens, TOKENS)
    if isinstance(args.beta, bool) or not 0 <= args.beta <= 1:
        raise ValueError(f"beta={args.beta!r}: must be between 0 (forward KL) and 1 (reverse KL)")
    for key in ("teacher_model_name_or_path", "teacher_model_revision", "teacher_model_init_kwargs"):
        if getattr(args, key) is not None:
            raise ValueError(
                f"{key}={getattr(args, key)!r}: the teacher is the base model itself with its adapter off; "
                "allowed is no value"
            )
    check_sampling(args)
